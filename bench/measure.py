"""Clocks, memory and the copy ceiling. Rounds are interleaved, so that ratios hold on a noisy machine."""

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from .case import STEP, Case, Inputs, Row, cotangents

MIN_CALLS, MAX_CALLS = 3, 2000  # of one row in one round
SLOW_SECONDS = 0.3  # a call that takes longer is alone in its round
WARM_ROUNDS = 1
TURN_SECONDS = 0.03  # of one row in one round
STATUS = Path("/proc/self/status")
CEILING_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # of one buffer: past any cache
CEILING_WIDTH = {"cpu": 2048, "cuda": 8192}  # of a square matrix


class Timing(NamedTuple):
    """Seconds a call, over rounds; a round is the mean of several calls."""

    median: float
    p20: float
    p80: float
    min: float
    rounds: int

    @classmethod
    def of(cls, rounds: Sequence[float]) -> "Timing":
        fifths = statistics.quantiles(rounds, n=5, method="inclusive")
        return cls(statistics.median(rounds), fifths[0], fifths[3], min(rounds), len(rounds))

    def microseconds(self) -> dict[str, str]:
        """As the CSV files hold it."""
        return {f"{name}_us": f"{getattr(self, name) * 1e6:.3f}" for name in ("median", "p20", "p80", "min")}


@contextmanager
def quiet_gc() -> Iterator[None]:
    """A full collection takes 100 ms in a process with torch in it, and lands on whichever row comes next."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def seconds_per_call(step: Callable[[int], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(calls):
            step(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for i in range(calls):
        step(i)
    return (time.perf_counter() - start) / calls


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """One set on a CPU; on a GPU as many as overflow its L2 twice (at most 64: launches bound tiny cases)."""
    first = case.inputs(device)
    if device.type != "cuda":
        return [first]
    size = sum(t.nbytes for t in (*first.leaves, *([] if first.grad_z is None else [first.grad_z])))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = min(64, math.ceil(2 * cache / max(size, 1)))
    return [first, *(case.inputs(device) for _ in range(copies - 1))]


def directions(case: Case, row: Row) -> tuple[str, ...]:
    if row.step:
        return (STEP,)
    return ("forward", "forward+backward") if case.work_backward and row.backward else ("forward",)


def steps(case: Case, row: Row, sets: list[Inputs]) -> dict[str, Callable[[int], object]]:
    """{direction: step(i)}; step i uses the i-th input set, and frees its results, at a cost."""
    calls = [tuple(t if row.backward else t.detach() for t in s.leaves) for s in sets]

    def forward(i: int) -> None:
        row.call(*calls[i % len(calls)])

    first, *more = directions(case, row)
    if not more:
        return {first: forward}
    outputs = row.call(*calls[0])
    grads = [cotangents(outputs, s) for s in sets]

    def both(i: int) -> None:
        leaves = calls[i % len(calls)]
        torch.autograd.backward(row.call(*leaves)[:2], grads[i % len(calls)])
        for leaf in leaves:
            leaf.grad = None

    return {first: forward, more[0]: both}


def interleaved(work: dict[tuple[str, str], Callable[[int], object]], rounds: int, turn: float,
                device: torch.device) -> dict[tuple[str, str], Timing]:  # fmt: skip
    """Times every (row, direction) once a round, each round in another order, for about `turn` seconds."""
    keys = list(work)
    calls = {}
    for key in keys:
        seconds_per_call(work[key], 1, device)
        once = seconds_per_call(work[key], 1, device)
        least = MIN_CALLS if once < SLOW_SECONDS else 1
        calls[key] = min(MAX_CALLS, max(least, math.ceil(turn / once)))
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    with quiet_gc():
        for r in range(-WARM_ROUNDS, rounds):
            gc.collect(1)
            shift = r % len(keys)
            for key in keys[shift:] + keys[:shift]:
                measured = seconds_per_call(work[key], calls[key], device)
                if r >= 0:
                    seconds[key].append(measured)
    return {key: Timing.of(values) for key, values in seconds.items()}


def ceiling(kind: str, device: torch.device, rounds: int, quick: bool) -> tuple[Timing, int]:
    """What the machine does at best, and how much work that is.

    "copy": a plain copy, bytes read and written. "matmul": the product of two square matrices, operations, in
    fp32 or, where that is faster, bf16.
    """
    if kind == "copy":
        source = torch.ones(CEILING_BYTES[device.type] // (16 if quick else 1) // 4, device=device)
        target = torch.empty_like(source)
        steps, amount = {"copy": lambda i: target.copy_(source)}, 2 * source.nbytes
    else:
        width = CEILING_WIDTH[device.type] // (4 if quick else 1)
        matrices = [torch.randn(width, width, device=device).to(d) for d in (torch.float32, torch.bfloat16)]
        steps, amount = {str(m.dtype): lambda i, m=m: m @ m for m in matrices}, 2 * width**3
    work = {(name, "forward"): step for name, step in steps.items()}
    return min(
        interleaved(work, rounds, TURN_SECONDS, device).values(), key=lambda timing: timing.min
    ), amount


def _peak(step: Callable[[int], object]) -> int:
    """Growth of resident memory during a call, its results included; 0 where there is no Linux /proc."""
    import vaeops

    def status(field: str) -> int:
        return int(re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.M)[1]) * 1024  # type: ignore[index]

    if not STATUS.exists():
        return 0
    step(0)  # what the first call sets up is not the op's
    gc.collect()
    vaeops.empty_cache()
    STATUS.with_name("clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    step(0)
    return max(0, status("VmHWM") - before)


def memory(case: Case, row: Row, inputs: Inputs) -> int:
    """CPU: what `case.memory` says; "kept" counts the inputs too. GPU: peak bytes above the inputs'."""
    leaves = inputs.leaves if row.backward else tuple(t.detach() for t in inputs.leaves)
    device = leaves[0].device if leaves else None
    if device is not None and device.type == "cuda":
        step = list(steps(case, row, [inputs]).values())[-1]
        step(0)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(0)
        return torch.cuda.max_memory_allocated(device) - before
    if case.memory == "peak":
        return _peak(list(steps(case, row, [inputs]).values())[-1])
    kept = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = row.call(
            *leaves
        )  # alive until counted, so that no storage is freed and its address used again
    del outputs
    return sum(kept.values())
