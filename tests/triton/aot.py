"""Compiles kernels for a GPU that is not there: launchers run on CPU tensors, their launches only compile.

Tests only. Everything up to the launch itself is the real path: shapes, strides, specialisation, cache.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class _Driver:
    """Answers what the JIT asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a device of its own per architecture: the JIT caches by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled(NamedTuple):
    """One compiled kernel: `elements` of a tile, its PTX, and what ptxas made of it."""

    name: str
    ptx: str
    registers: int
    stack: int  # bytes
    spills: int  # bytes
    shared: int  # bytes
    instructions: Counter  # of SASS, by opcode

    def per_element(self, elements: int) -> float:
        return sum(self.instructions.values()) / elements


@contextlib.contextmanager
def compiling(capability: int):
    """Within it launches compile for sm_<capability> and do not run. Yields the list of kernels launched.

    A grid that a GPU would refuse fails.
    """
    launched: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert 0 < grid[0] < 2**31 and all(0 < n < 2**16 for n in grid[1:]), f"{self.fn.__name__}: {grid}"
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = before


def report(kernel) -> Compiled:
    """Registers, stack and spills from ptxas -v; the instructions from its cubin."""
    ptx = kernel.asm["ptx"]
    architecture = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = os.path.join(folder, "k.ptx"), os.path.join(folder, "k.cubin")
        Path(source).write_text(ptx)
        for name in ("ptxas", "ptxas-blackwell"):  # an older ptxas refuses the newer PTX of triton 3.9
            command = [_tool(name), "-v", f"--gpu-name={architecture}", "--fmad=false", source, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stderr
        sass = subprocess.run(
            [_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    ).groups()
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
    return Compiled(
        kernel.metadata.name, ptx, int(re.search(r"Used (\d+) registers", done.stderr)[1]), int(stack),
        int(stores) + int(loads), kernel.metadata.shared, Counter(opcodes),
    )  # fmt: skip


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
