"""Triton launch settings, timed: the evidence for the table in vaeops/kernels.

    python bench/sweep.py --out sweep.csv [--case FAMILY]

The hook is a module's function `settings`, which its launchers ask at every call. Each candidate takes its
place, passes the case's check, and is timed in rounds interleaved with the others'.
"""

import argparse
import csv
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from bench import measure, results
from bench.case import Case, Row
from bench.cases import select
from bench.text import UNITS, time_text
from vaeops.ops._library import why_not

WARPS = (4, 8)
CASES = [
    "rng/2^24",
    "gaussian/64x16x128x128-fp32-sample",
    "gaussian/64x16x128x128-bf16-sample",
    "gaussian/4096x256-fp32-sample",
    "gaussian/4096x256-fp32-freebits",
    "gaussian/128x20-fp32-batchmean",
    "recon/bce_logits-256x3x64x64-fp32",
    "recon/multinomial-512x100000-fp32",
    "vq/65536x1024x64",
    "vq/16384x8192x64",
    "vq/16384x8192x256",
    "vq/16384x16384x8",
    "perceptual/64x64x64",
    "perceptual/1x256x256",
]
FIELDS = (
    "commit", "versions", "machine", "date", "case", "direction", "settings", "present", "median_us",
    "p20_us", "p80_us", "min_us", "rounds", "g_per_s",
)  # fmt: skip


class Hook(NamedTuple):
    """A case's hook: the module with `settings`, what it returns now, and what to try instead."""

    module: ModuleType
    present: tuple[int, ...]
    candidates: list[tuple[int, ...]]


def hook(case: Case) -> Hook:
    if case.family == "vq":  # (rows of a program, dims of a step, warps) of the fast pass
        module = importlib.import_module("vaeops.kernels.vq.assign")
        present = module.settings(case.d, case.dtype)  # type: ignore[attr-defined]
        return Hook(
            module, present, [(n, present[1], w) for n, w in itertools.product((64, 128, 256), WARPS)]
        )
    if case.family == "perceptual":  # of the convolutions that Triton makes, see its settings
        module = importlib.import_module("vaeops.kernels.perceptual.conv")
        present = module.settings(torch.bfloat16)  # type: ignore[attr-defined]
        tiles = itertools.product(((8, 8), (8, 16), (16, 16)), (64, 128), WARPS)
        return Hook(module, present, [(*tile, out, present[3], w, present[5]) for tile, out, w in tiles])
    module = importlib.import_module("vaeops.kernels._layout")  # (elements of a tile, warps)
    return Hook(module, module.settings(case.dtype), list(itertools.product((512, 1024, 2048, 4096), WARPS)))


def use(module: ModuleType, settings: Callable) -> None:
    """Launchers look `settings` up in its module at every call."""
    module.settings = settings  # type: ignore[attr-defined]


def triton_row(case: Case, device: torch.device) -> Row:
    wanted = "vaeops, bf16" if case.family == "perceptual" else "vaeops (triton)"
    return next(row for row in case.rows(device, compiled=False) if row.name == wanted)


def sweep(case: Case, device: torch.device, rounds: int) -> list[dict]:
    """Rows of FIELDS for every candidate that compiles and is right; prints them, the quickest first."""
    torch.manual_seed(0)
    sets = measure.input_sets(case, device)
    row = triton_row(case, device)
    module, present, candidates = hook(case)
    original = module.settings
    work = {}
    for candidate in candidates:
        use(module, _always(candidate))
        try:
            shares = case.check(row, sets[0])
        except Exception as error:
            print(f"  {candidate}: {type(error).__name__}: {''.join(str(error).splitlines()[:1])}")
            continue
        if not all(share <= 1 for share in shares.values()):
            print(f"  {candidate}: WRONG {shares}")
            continue
        for direction, step in measure.steps(case, row, sets).items():
            # Backward runs outside the row's call, so the candidate is put in place before each step.
            work[" ".join(map(str, candidate)), direction] = _stepper(module, _always(candidate), step)
    timings = measure.interleaved(work, rounds, 0.005, device) if work else {}
    use(module, original)
    found = []
    for (name, direction), timing in sorted(timings.items(), key=lambda item: (item[0][1], item[1].median)):
        size = case.work_forward + (case.work_backward if "backward" in direction else 0)
        mark = name == " ".join(map(str, present))
        print(f"  {direction:17s} {name:12s}  {time_text(timing.median):>9s}  "
              f"{size / timing.median / 1e9:7.1f} {UNITS[case.ceiling]}{'  (present)' * mark}")  # fmt: skip
        found.append({
            "case": f"{case.family}/{case.name}", "direction": direction, "settings": name,
            "present": int(mark), "rounds": timing.rounds, **timing.microseconds(),
            "g_per_s": f"{size / timing.median / 1e9:.3f}",
        })  # fmt: skip
    return found


def _always(candidate: tuple[int, ...]) -> Callable:
    return lambda *_, **__: candidate


def _stepper(
    module: ModuleType, settings: Callable, step: Callable[[int], object]
) -> Callable[[int], object]:
    def run(i: int) -> None:
        use(module, settings)
        step(i)

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/sweep.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--case", metavar="FAMILY", help="one family; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    refusal = why_not("triton", "cuda") if torch.cuda.is_available() else "no CUDA GPU"
    if refusal:
        print(f"not run: {refusal}")
        return 0
    device = torch.device("cuda")
    common = {"commit": results.commit(), "versions": results.versions(), "machine": results.machine(device),
              "date": results.today()}  # fmt: skip
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for case in select(CASES):
            if args.case in (None, case.family):
                print(f"{case.family}/{case.name}")
                writer.writerows(common | row for row in sweep(case, device, args.rounds))
                file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
