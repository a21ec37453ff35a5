"""Where a training step's time goes: the steps of bench/cases/train.py under torch.profiler, part by part.

    python bench/profile_step.py --case celeba-vae --threads 2

A call's time counts for the part that it lies in, and in backward for the part that made the node; what is
not in a part is a matrix product or convolution, Adam, or the rest: activations, norms, Python between calls.
The profiler makes short calls longer, so read shares. On the CPU, and of what is not compiled, alone.
"""

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

if __package__ in (None, ""):  # run as a script: its own folder gives way to the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench import results
from bench.case import Row
from bench.cases import train
from bench.measure import Timing
from bench.text import time_text
from vaeops.models import conv, vae, vq

PRODUCTS, LATENT, RECON, PERCEPTUAL, QUANTIZE, ADAM, REST = PARTS = (
    "products", "latent", "reconstruction", "perceptual", "quantization", "Adam", "rest",
)  # fmt: skip
PRODUCT = re.compile(r"aten::(conv\w*|\w+_convolution|linear|addmm|mm|bmm|baddbmm)")
BACKWARD = "autograd::engine::evaluate_function"
MARK, STEP_MARK = "part: ", "step"
WARM_STEPS = 2


class Labels:
    """While it is open, the calls of a step that are a part are marked for the profiler.

    spans: (first, end, part): autograd nodes made in a part have sequence numbers in [first, end).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.spans: list[tuple[int, int, str]] = []
        self._calls = [
            (train, "latent", LATENT), (train, "reconstruction", RECON),
            (train.Hooks, "__call__", PERCEPTUAL), (vae, "recon_loss", RECON), (vq, "recon_loss", RECON),
            (conv, "perceptual_loss", PERCEPTUAL),
        ]  # fmt: skip
        modules = (("latent", LATENT), ("quantize", QUANTIZE))
        self._calls += [(getattr(model, n), "forward", part) for n, part in modules if hasattr(model, n)]
        self._stack = ExitStack()

    def __enter__(self) -> "Labels":
        for owner, name, part in self._calls:
            marked = self._marked(getattr(owner, name), part)
            self._stack.enter_context(mock.patch.object(owner, name, marked))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _marked(self, call: Callable, part: str) -> Callable:
        def marked(*args, **options):
            first = torch._C._autograd._get_sequence_nr()
            with record_function(MARK + part):
                out = call(*args, **options)
            self.spans.append((first, torch._C._autograd._get_sequence_nr(), part))
            return out

        return marked

    def part(self, event: FunctionEvent | None) -> str:
        product = False
        while event is not None:
            if event.name.startswith(MARK):
                return event.name.removeprefix(MARK)
            if event.name.startswith("Optimizer."):
                return ADAM
            if event.name.startswith(BACKWARD):
                for first, end, part in self.spans:
                    if first <= event.sequence_nr < end:
                        return part
            product |= PRODUCT.fullmatch(event.name) is not None
            event = event.cpu_parent
        return PRODUCTS if product else REST


def attributed(step: train.Step, x: torch.Tensor) -> list[tuple[FunctionEvent, str]]:
    """The events of one step, and the part of each."""
    with (
        Labels(step.model) as labels,
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        record_function(STEP_MARK),
    ):
        step(x)
    found = []
    for event in profiler.events():
        top = event
        while top.cpu_parent is not None:
            top = top.cpu_parent
        if top.name == STEP_MARK:  # not what the profiler itself does
            found.append((event, labels.part(event)))
    return found


def parts_of(step: train.Step, x: torch.Tensor) -> dict[str, float]:
    """Seconds of one step, by part."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for event, part in attributed(step, x):
        seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def profiled(case: train.StepCase, row: Row, steps: int) -> list[dict]:
    """The rows of one row for the CSV, its parts; those that take no time are left out."""
    (x,) = case.inputs(torch.device("cpu")).leaves
    assert isinstance(row.call, train.Step)
    for _ in range(WARM_STEPS):
        parts_of(row.call, x)
    found = [parts_of(row.call, x) for _ in range(steps)]
    timings = {part: Timing.of([seconds[part] for seconds in found]) for part in PARTS}
    total = sum(timing.median for timing in timings.values())
    common = {"row": row.name, "rounds": steps, "ceiling": "", "work": 0, "g_per_s": "",
              "elements": case.elements, "memory_bytes": 0}  # fmt: skip
    return [
        common | {"direction": part, **timing.microseconds(), "share": f"{timing.median / total:.4f}"}
        for part, timing in timings.items() if timing.median
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/profile_step.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--case", default="", metavar="TEXT", help="cases whose family/name contains TEXT")
    add("--steps", type=int, default=5, help="profiled of a row (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--quick", action="store_true", help="small cases; stores nothing unless --out is given")
    add("--out", type=Path, metavar="CSV", help="default: bench/results/<machine>.csv")
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error(f"--steps must be at least 3, got {args.steps}")
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [c for c in train.CASES if c.small == args.quick and args.case in f"{c.family}/{c.name}"]
    if not cases:
        parser.error(f"no case matches {args.case!r}: {', '.join(c.name for c in train.CASES)}")
    device = torch.device("cpu")
    name = results.machine(device)
    out = args.out or (None if args.quick else results.FOLDER / f"{name}.csv")
    common = {"commit": results.commit(), "versions": results.versions(), "machine": name,
              "date": results.today(), "threads": torch.get_num_threads()}  # fmt: skip
    for case in cases:
        print(f"\n{case.family}/{case.name}")
        stored = []
        for row in case.rows(device, compiled=False):
            if row.name.endswith("fused Adam"):  # of which Adam alone differs
                continue
            stored += (found := profiled(case, row, args.steps))
            parts = (
                f"{r['direction']} {time_text(float(r['median_us']) / 1e6)} {float(r['share']):.0%}"
                for r in found
            )
            print(f"  {row.name:15s} {', '.join(parts)}")
        if out is not None:
            results.store(out, common | {"case": f"step-parts/{case.name}"}, stored)
    return 0


if __name__ == "__main__":
    sys.exit(main())
