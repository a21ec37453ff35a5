"""What an image costs celeba-vae-xl in memory: `python bench/memory.py`; --measure: for real, too.

Counted: by how much the bytes of all tensors that are alive at once, at the peak of a training step, grow
with each image. The tensors are fakes, which have a shape and no memory, so that models of any size are
counted on any machine. Measured: by how much the resident memory of a process grows, with what the
convolutions' own buffers take.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import _peak
from vaeops import models

WIDTHS = (32, 64, 128, 256, 512, 512)
SIZES = ((128, 1), (128, 2), (128, 4), (256, 1))  # side, and how many times WIDTHS
COUNTED, MEASURED = (128, 256), (8, 16)  # batches; large ones, so that the activations make the peak


def training(side, factor, amp, checkpointing, batch):
    """(model, a step of its training)"""
    model = models.create("celeba-vae-xl", side=side, widths=tuple(factor * w for w in WIDTHS),
                          checkpointing=bool(checkpointing))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, seed = torch.zeros(batch, 3, side, side), torch.zeros(2, dtype=torch.int64)

    def step(_=0):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(amp)):
            losses = model.terms(x, seed=seed).losses
        torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def counted(*what):
    """(parameters, bytes at the peak of a step)"""
    with FakeTensorMode():
        model, step = training(*what)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
        return sum(p.numel() for p in model.parameters()), peak["Total"]


def measured(*what):
    """Bytes by which a step grows a process, of its own: what one leaves behind, another need not take."""
    command = [sys.executable, __file__, "--one", *(str(int(value)) for value in what)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="also train the smallest one")
    parser.add_argument("--one", nargs=5, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(_peak(training(*args.one)[1]))
        return
    print("| side | widths | parameters | amp | checkpointing | an image | measured |")
    print("|---|---|---|---|---|---|---|")
    for side, factor in SIZES:
        for amp in (False, True):
            for checkpointing in (False, True):
                what = side, factor, amp, checkpointing
                (n, few), (_, many) = (counted(*what, batch) for batch in COUNTED)
                image, found = (many - few) / (COUNTED[1] - COUNTED[0]), ""
                if args.measure and side * factor == 128:
                    few, many = (measured(*what, batch) for batch in MEASURED)
                    found = f"{(many - few) / (MEASURED[1] - MEASURED[0]) / 2**20:.0f} MiB"
                cells = (side, f"x{factor}", f"{n:,}", "bf16" if amp else "fp32",
                         "yes" if checkpointing else "no", f"{image / 2**20:.0f} MiB", found)  # fmt: skip
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
