"""Loads the compiled parts, once, and remembers why one is missing. `VAEOPS_NATIVE` and `VAEOPS_CUDA` steer
it: auto (the default) takes what was built, require refuses to start without it, 0 leaves it out."""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_status: dict[str, str] = {}  # library stem -> why it is not loaded; absent: loaded


def _find(stem: str) -> Path | None:
    return next(iter(sorted(_HERE.glob(f"{stem}.*so"))), None)


def _load(stem: str, variable: str, unusable: str | None) -> None:
    wish = os.environ.get(variable, "auto")
    if wish not in ("auto", "require", "0"):
        raise ValueError(f"{variable} must be auto, require or 0, got {wish!r}")
    path = _find(stem)
    if wish == "0":
        _status[stem] = f"left out by {variable}=0"
    elif unusable is not None:
        _status[stem] = unusable
    elif path is None:
        _status[stem] = "not built at install (see `pip install -v`, or set VAEOPS_NATIVE=require)"
    else:
        torch.ops.load_library(path)  # present but broken is an error, not a fallback
    if wish == "require" and stem in _status:
        raise ImportError(f"vaeops: {variable}=require, but {stem} is missing: {_status[stem]}")


def load() -> None:
    _load("_ops_cpu", "VAEOPS_NATIVE", None)
    cuda = os.environ.get("VAEOPS_NATIVE", "auto") != "0"
    unusable = None if torch.version.cuda else "this torch is not a CUDA build"
    _load("_ops_cuda", "VAEOPS_CUDA", unusable if cuda else "left out by VAEOPS_NATIVE=0")


def why_not(stem: str) -> str | None:
    return _status.get(stem)


def empty_cache() -> int:
    """Return to the system the memory of large CPU outputs that is kept for reuse; how many bytes that was.

    Outputs of 128 KiB and more that have been freed are kept, up to 512 MiB, since fresh memory costs more
    than the kernels that fill it.
    """
    library = path("_ops_cpu")
    if library is None:
        return 0
    release = ctypes.CDLL(str(library)).vaeops_release_pages
    release.restype = ctypes.c_size_t
    return release()


def isa() -> int | None:
    """Which instruction set the CPU kernels use, as a number; None without them."""
    ask = _isa()
    return None if ask is None else ask()


# What torch.compiler.assume_constant_result does, which would import Dynamo for it.
isa._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _isa() -> Callable[[], int] | None:
    library = path("_ops_cpu")
    return None if library is None else ctypes.CDLL(str(library)).vaeops_isa


def path(stem: str) -> Path | None:
    return None if stem in _status else _find(stem)
