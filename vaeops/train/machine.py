"""What a training runs on: device, processes, repeatability, and the signals that ask it to stop."""

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Place(NamedTuple):
    """A process: its device, and which of how many it is."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
            x /= self.world
        return x

    def any(self, value: bool) -> bool:
        """Whether it is true of any process. Waits for all of them."""
        if self.world == 1:
            return value
        return bool(self.mean(torch.tensor(float(value), device=self.device)))


def device(name: str | None) -> torch.device:
    """The device of a name; None: CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: torch does not know it, or cannot keep tensors on it here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: torch knows no {name!r}; cpu, cuda and cuda:1 are devices") from error
    if found.type == "cuda":  # whose memory is not touched here: each process has a GPU of its own
        if not torch.cuda.is_available():
            raise ValueError(f"device: torch finds no GPU, got {name!r}")
        if (found.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: torch finds {torch.cuda.device_count()} GPUs, got {name!r}")
        return found
    try:
        torch.zeros((), device=found).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: torch keeps no tensors on {name!r} here") from error
    return found


@contextmanager
def processes(name: str | None) -> Iterator[Place]:
    """This process's place; under torchrun the default group, which is made unless there is one already."""
    found = device(name)
    ours = not (dist.is_available() and dist.is_initialized())
    if ours and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place(found)
        return
    if found.type == "cuda":
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(found)
    if ours:
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Place(found, dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()


@contextmanager
def repeatable(deterministic: bool) -> Iterator[None]:
    """Only deterministic algorithms, if asked for."""
    if not deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it set before it starts
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals that came, SIGINT (Ctrl-C) or SIGTERM. The same one again acts at once, as ever."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # Python delivers signals to the main thread alone
        return

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
