"""The operator library: schemas, fakes, and which kernel serves an op on which device.

Every low-level op is defined once as `vaeops::<name>`, served by the best kernel of the device that its
tensors are on, and once per implementation as an overload (`vaeops::<name>.ref`, `.cpp`, `.triton`, `.cuda`)
that `impl=` selects.
"""

import importlib.util
import os
from collections.abc import Callable

import torch

from .. import _native

IMPLS = ("ref", "cpp", "triton", "cuda")

library = torch.library.Library("vaeops", "DEF")
names: list[str] = []
_without_cuda: set[str] = set()  # names of ops that have no CUDA C++ kernel
_triton_first: set[str] = set()  # names of ops whose CUDA C++ kernel serves CUDA only where Triton is missing


def define(name: str, signature: str, *, fake: Callable, ref: Callable, triton: Callable,
           cuda: bool = True, triton_first: bool = False) -> None:  # fmt: skip
    """Register `vaeops::name(signature)`. C++ and CUDA kernels attach themselves when their library loads.

    `triton` is called only when a Triton kernel has to run, so it may import Triton. `cuda`: whether the op
    has a CUDA C++ kernel; without one Triton serves CUDA. `triton_first`: Triton serves CUDA although it has;
    its C++ binding then leaves the CUDA default to this function.
    """
    names.append(name)
    if not cuda:
        _without_cuda.add(name)
    if triton_first:
        _triton_first.add(name)
    for overload in ("", *IMPLS):
        qualified = f"{name}.{overload}" if overload else name
        library.define(qualified + signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"vaeops::{qualified}", fake, lib=library)
    library.impl(name, ref, "CompositeExplicitAutograd")
    library.impl(f"{name}.ref", ref, "CompositeExplicitAutograd")
    # Triton's interpreter runs kernels on CPU tensors; it takes the place of a GPU in tests and serves
    # `impl="triton"` only.
    library.impl(f"{name}.triton", triton, "CPU" if _interpreting() else "CUDA")
    best = serving("cuda", name)
    if best == "triton":
        library.impl(name, triton, "CUDA")
    elif best == "cuda" and triton_first:
        library.impl(name, lambda *args: overloads(name)["cuda"](*args), "CUDA")


def overloads(name: str) -> dict[str | None, torch._ops.OpOverload]:
    """{None: the device's best, "ref": ..., ...}"""
    packet = getattr(torch.ops.vaeops, name)
    return {None: packet.default} | {impl: getattr(packet, impl) for impl in IMPLS}


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(impl: str, device_type: str, name: str | None = None) -> str | None:
    """Why `impl` (of the low-level op `name`) cannot run on such a device here; None when it can."""
    if impl == "ref":
        return None
    if impl == "cpp":
        return "runs on CPU tensors only" if device_type != "cpu" else _native.why_not("_ops_cpu")
    if impl == "cuda":
        if name in _without_cuda:
            return "this op has no CUDA C++ kernel: Triton serves CUDA"
        return "runs on CUDA tensors only" if device_type != "cuda" else _native.why_not("_ops_cuda")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreting():
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    if device_type != "cuda":
        return "runs on CUDA tensors only (on CPU tensors under TRITON_INTERPRET=1)"
    return "not tested on ROCm" if torch.version.hip else None


def serving(device_type: str, name: str | None = None) -> str:
    """What serves a device when nothing is forced: the reference last, native code first for most ops."""
    order = ("cpp", "triton", "cuda") if name in _triton_first else ("cpp", "cuda", "triton")
    for impl in order:
        if impl == "triton" and _interpreting():
            continue
        if why_not(impl, device_type, name) is None:
            return impl
    return "ref"


def check_impl(op: str, impl: str | None, like: torch.Tensor, name: str | None = None) -> None:
    """Raises, with every reason, where a forced implementation cannot run on `like`'s device here.

    name: of the low-level op that will run.
    """
    if impl is None:
        return
    device_type = like.device.type
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be None or one of {IMPLS}, got {impl!r}")
    reason = why_not(impl, device_type, name)
    if reason is not None:
        others = "; ".join(f"{i}: {why_not(i, device_type, name) or 'can run'}" for i in IMPLS if i != impl)
        raise ValueError(f"{op}: impl={impl!r} cannot run on {device_type} tensors here: {reason} ({others})")
