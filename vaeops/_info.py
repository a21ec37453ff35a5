"""`vaeops.info()`: what was built, what the machine offers, and which implementation of each op runs here."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import Any

import torch

from . import _native
from .ops import _library

VARIABLES = ("VAEOPS_NATIVE", "VAEOPS_CUDA", "VAEOPS_DATA")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key


class Info(dict):
    """A dict of plain values, which `json.dumps` takes and which prints as a readable page."""

    def __str__(self) -> str:
        return "\n".join(line for name, part in self.items() for line in _section(name, part))

    __repr__ = __str__


def _section(name: str, part: Any) -> list[str]:
    if name == "ops":
        return _ops_section(part)
    if name == "environment":
        part = {variable: "not set" if value is None else value for variable, value in part.items()}
    return [name, *_lines(part)]


def _lines(part: Any, indent: str = "  ") -> list[str]:
    if not isinstance(part, dict):
        return [f"{indent}{item}" for item in (part if isinstance(part, list) else [part])]
    width = max((len(key) for key in part), default=0)
    lines = []
    for key, item in part.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}", *_lines(item, indent + "  ")]
        else:
            text = ", ".join(item) if isinstance(item, list) else "none" if item is None else str(item)
            lines.append(f"{indent}{key:{width}s}  {text}")
    return lines


def _ops_section(ops: dict[str, Any]) -> list[str]:
    """Per device: each op and what runs it; then each reason once, with the ops that it concerns."""
    lines = []
    width = max(len(op) for op in ops)
    for device in {device: None for by_device in ops.values() for device in by_device}:
        lines.append(f"ops on {device}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for op, by_device in ops.items():
            lines.append(f"  {op:{width}s}  {by_device[device]['runs']}")
            for impl, reason in by_device[device].items():
                if impl != "runs":
                    reasons.setdefault((impl, reason), []).append(op)
        for (impl, reason), concerned in reasons.items():
            whom = "" if len(concerned) == len(ops) else f" ({', '.join(concerned)})"
            lines.append(f"  {impl}: {reason}{whom}")
    return lines


def _versions() -> dict[str, str | None]:
    from . import __version__

    try:
        triton = importlib.metadata.version("triton")  # importing Triton would take seconds
    except importlib.metadata.PackageNotFoundError:
        triton = None
    python, cuda = platform.python_version(), torch.version.cuda
    return {
        "vaeops": __version__,
        "python": python,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": cuda,
    }


def _host() -> Any | None:
    """The optional module that knows the CPU; None where it was not built. A broken one raises."""
    if importlib.util.find_spec("vaeops._host") is None:
        return None
    return importlib.import_module("vaeops._host")


def _native_parts(host: Any | None) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for stem in ("_ops_cpu", "_ops_cuda"):
        reason = _native.why_not(stem)
        parts[stem] = f"not loaded: {reason}" if reason else f"loaded from {_native.path(stem)}"
    parts["_host"] = "not built for this Python; no kernel needs it" if host is None else host.build_info()
    return parts


def _cpu(host: Any | None) -> dict[str, Any]:
    """The instruction set is the kernels' own answer; `set_isa` can ask for a lesser one than the CPU has."""
    kernels = _native.path("_ops_cpu")
    unknown = "unknown: vaeops._host is not built"
    absent = "none: the CPU kernels are not loaded"
    return {
        "threads": torch.get_num_threads(),
        "features": unknown if host is None else [name for name, has in host.cpu_features().items() if has],
        "isa": absent if kernels is None else unknown if host is None else host.isa(str(kernels)),
    }


def _gpus() -> list[str] | str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none: torch finds no GPU" if built else "none: this torch is CPU only"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found


def _why_not(op: str, impl: str, device: str) -> str | None:
    """Why `impl` of this one op cannot run on the device; the dispatcher knows whether it has a kernel."""
    reason = _library.why_not(impl, device, op)
    if reason is None and impl != "ref":
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"vaeops::{op}.{impl}", _KEYS[device])
        reason = None if registered else "this op has no such kernel"
    return reason


def _op(op: str, device: str) -> dict[str, Any]:
    why_not = {impl: _why_not(op, impl, device) for impl in _library.IMPLS}
    best = _library.serving(device, op)
    runs = best if why_not[best] is None else "ref"
    others = {impl: reason or f"can run: impl={impl!r}" for impl, reason in why_not.items() if impl != runs}
    return {"runs": runs, **others}


def _ops() -> dict[str, Any]:
    """{op: {device: {"runs": impl, other impl: why it does not}}} for the devices that this machine has."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table: dict[str, Any] = {op: {device: _op(op, device) for device in devices} for op in _library.names}
    if torch.backends.mps.is_available() or torch.xpu.is_available():
        for op in table:
            others = dict.fromkeys(_library.IMPLS[1:], "not written for this device")
            table[op]["mps, xpu"] = {"runs": "ref", **others}
    return table


def info() -> Info:
    """What was built, what the machine offers, and op by op which implementation runs on which device.

    Returns:
        Info, a dict that prints as a page, of plain values: "versions", "native", "cpu", "gpu", "environment"
        (variables that steer vaeops; None: not set), "ops" ({op: {device: {"runs": impl, other: why not}}}).

    With a CUDA GPU it asks for the device's name, which initialises CUDA; `import vaeops` alone never does.
    """
    host = _host()
    return Info(
        versions=_versions(),
        native=_native_parts(host),
        cpu=_cpu(host),
        gpu=_gpus(),
        environment={name: os.environ.get(name) for name in VARIABLES},
        ops=_ops(),
    )


def to_json(value: Info) -> str:
    return json.dumps(value, indent=2)
