"""Images/s of a batch gathered from the decoded cache, against decoding each sample every epoch.

`python bench/loader.py celeba_64.tar celeba_178x218_300.tar`. Both give the same uint8 batches on the CPU, in
the same random order; the files are read into memory first, so that no disk is timed. The two take turns.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path, PurePosixPath

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch import Tensor

from vaeops.train.data import Batches, load
from vaeops.train.data.cache import decode
from vaeops.train.data.files import Files
from vaeops.train.data.images import face_side

SIDE = 64


def images_per_second(batch: Callable[[Tensor], Tensor], order: Batches, seconds: float) -> float:
    done, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        done += len(batch(next(order)))
    return done / passed


def measure(source: Path, batch: int, rounds: int, seconds: float, cache: str) -> None:
    cached = load("celeba", source, size=SIDE, cache=cache)
    with closing(Files("celeba", source)) as files:
        where = {PurePosixPath(name).name: name for name in files.names()}
        faces = [(name, files.read(where[name])) for name in cached.extra["files"]]

    def gather(indices: Tensor) -> Tensor:
        return cached.batch(indices)[0]

    def decode_each(indices: Tensor) -> Tensor:
        return torch.from_numpy(
            np.stack([decode([faces[i]], source.name, "RGB", SIDE, face_side)[0] for i in indices.tolist()])
        )

    rivals = {"decode, crop, resize each sample": decode_each, "gather from the cache": gather}
    order = Batches(len(faces), batch)
    indices = next(order)
    assert torch.equal(gather(indices), decode_each(indices))
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            found[name].append(images_per_second(rival, order, seconds))
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    base = medians["decode, crop, resize each sample"]
    print(
        f"{source.name}: {len(faces):,} training images to {SIDE}x{SIDE}, batches of {batch}, {rounds} rounds"
    )
    for name, rate in medians.items():
        low, high = min(found[name]), max(found[name])
        print(f"  {name:<34}{rate:>12,.0f} images/s  ({low:,.0f} to {high:,.0f}){rate / base:>8.1f}x")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench/loader.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", type=Path, nargs="+", help="faces in CelebA's layout")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each of the two in a round")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as cache:
        for source in args.source:
            measure(source, args.batch, args.rounds, args.seconds, cache)


if __name__ == "__main__":
    main()
