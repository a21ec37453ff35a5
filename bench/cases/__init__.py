"""Every case, by family. A new op adds its file here."""

from ..case import Case
from . import gaussian, perceptual, recon, rng, train, vq

ALL: list[Case] = [*rng.CASES, *gaussian.CASES, *recon.CASES, *vq.CASES, *perceptual.CASES, *train.CASES]


def select(patterns: list[str] | None) -> list[Case]:
    """Cases whose `family/name` contains one of the patterns; all without patterns."""
    return [c for c in ALL if not patterns or any(p in f"{c.family}/{c.name}" for p in patterns)]
