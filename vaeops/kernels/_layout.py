"""What the launchers share on the host: how tensors are seen as [rows, cols], how the work is cut, tickets.

Nothing here depends on a tensor's value, and nothing synchronises.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

# Kernel arguments that change from batch to batch: Triton must not compile anew for their values.
FIXED = (
    "rows", "cols", "per_stream", "chunks", "tiles", "group_tiles",
    "scale", "clamp_lo", "clamp_hi", "temperature",
)  # fmt: skip

Strides = tuple[int, ...]


def settings(dtype: torch.dtype, prior_sums: bool = False) -> tuple[int, int]:
    """(elements of a tile, warps of a program). Not tuned on a GPU yet: 8 fp32 elements a thread, two 16-byte
    loads each; half of that where more registers are needed: fp64, and the sums of a prior's gradient."""
    block = 1024 >> (dtype is torch.float64) >> prior_sums
    return block, 4


# A sum's partial results. One program adds those of a group at the end, so there must not be too many.
MAX_CHUNKS = 4096  # of the sum over everything
MAX_ROW_CHUNKS = 256  # of a long row; a function of its length alone, so that a row's sum is too
COLUMN_PROGRAMS = 2048  # enough to fill a large GPU


def guard(t: Tensor) -> torch.cuda.device_of:
    """Makes t's device current; nothing for a CPU tensor under the interpreter."""
    return torch.cuda.device_of(t)


def broadcast_strides(t: Tensor, shape: torch.Size) -> Strides:
    """Strides of t seen in `shape`, aligned at the last dim: 0 where it is broadcast."""
    missing = len(shape) - t.dim()
    return (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride()))


def reduced_strides(t: Tensor, shape: torch.Size, reduction: int, batch_ndim: int) -> Strides:
    """Strides in `shape` of a tensor that holds the KL reduced."""
    if reduction == 0:
        return t.stride()
    if reduction == 1:
        return (0,) * batch_ndim + t.stride()
    if reduction == 2:
        return t.stride() + (0,) * (len(shape) - batch_ndim)
    return (0,) * len(shape)


def _merge(shape: Strides, strides: list[Strides]) -> list[tuple[int, list[int]]]:
    """(size, stride of every operand) per dim; dims joined where every operand allows, size 1 dropped."""
    dims: list[tuple[int, list[int]]] = []
    for d, size in enumerate(shape):
        if size == 1:
            continue
        here = [s[d] for s in strides]
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], here)):
            dims[-1] = (dims[-1][0] * size, here)
        else:
            dims.append((size, here))
    return dims


class View(NamedTuple):
    """The elements of a call as [rows, cols] in logical order, cut into tiles [R, C]."""

    rows: int
    cols: int
    R: int
    C: int
    sizes: Strides | None  # of the merged dims but the first; None: offsets are row * stride + col * stride
    strides: list[tuple[int | None, ...]]  # per operand


def view(shape: torch.Size, strides: list[Strides], split: int | None, streams: int, block: int) -> View:
    """`split`: the dim at which a row begins, None where any rows will do. `streams`: of noise."""
    n = shape.numel()
    dims = _merge(shape, strides)
    if split is not None:
        outer, inner = shape[:split], shape[split:]
        row_dims = _merge(outer, [s[:split] for s in strides])
        col_dims = _merge(inner, [s[split:] for s in strides])
        rows, cols = outer.numel(), inner.numel()
        simple = len(row_dims) <= 1 and len(col_dims) <= 1
    elif len(dims) == 2:
        row_dims, col_dims = dims[:1], dims[1:]
        rows, cols, simple = dims[0][0], dims[1][0], True
    else:
        rows, cols, simple = streams, n // streams, len(dims) <= 1
        col_dims = dims
        row_dims = [(rows, [s * cols for s in dims[0][1]])] if simple and dims and rows > 1 else []
    flat = rows == 1 and split is None
    C = block if flat else min(block, max(4, _next_power_of_two(cols)))
    R = 1 if flat else block // C
    if simple:
        # A dim of one element needs no stride, but a tile may be larger than it and its offsets need a shape.
        row_strides = row_dims[0][1] if row_dims else [0 if flat else cols] * len(strides)
        col_strides = col_dims[0][1] if col_dims else [1] * len(strides)
        return View(rows, cols, R, C, None, [_present(pair) for pair in zip(row_strides, col_strides)])
    sizes = tuple(size for size, _ in dims[1:])
    return View(rows, cols, R, C, sizes, [_present(one) for one in zip(*(s for _, s in dims))])


def _present(strides: Strides) -> tuple[int | None, ...]:
    return tuple(s or None for s in strides)


class Sums(NamedTuple):
    """What a kernel sums: its AXIS, where a row begins, whether each row has a sum of its own."""

    axis: str
    split: int | None = None  # None: wherever
    per_row: bool = False
    shape: Strides = ()  # of the sums where they are not yet the result, else ()


NO_SUMS = Sums("none")


def _row_sums(shape: Strides, split: int, block: int, sums: Strides = ()) -> Sums:
    cols = math.prod(shape[split:])
    return Sums("rows" if cols <= block else "all", split, True, sums)


def reduction_sums(shape: torch.Size, reduction: int, batch_ndim: int, block: int) -> Sums:
    """The sums of a reduced KL or density."""
    if reduction < 1:
        return NO_SUMS
    if reduction == 1:
        return Sums("columns", batch_ndim)
    if reduction == 2:
        return _row_sums(shape, batch_ndim, block)
    return Sums("all")


def broadcast_sums(small: torch.Size, shape: torch.Size, block: int) -> Sums:
    """The sums that take gradients of all elements to a tensor of shape `small`, broadcast to `shape`."""
    padded = (1,) * (len(shape) - len(small)) + tuple(small)
    dims = [d for d, n in enumerate(shape) if n > 1]
    kept = [padded[d] > 1 for d in dims]
    if all(kept):
        return NO_SUMS
    if not any(kept):
        return Sums("all")
    if not kept[-1]:
        last = len(kept) - kept[::-1].index(True)  # dims before it are summed afterwards, where at all
        split = dims[last]
        incomplete = (*shape[:split], *[1] * (len(shape) - split))
        return _row_sums(shape, split, block, () if all(kept[:last]) else incomplete)
    first = kept.index(True)
    if all(kept[first:]):
        return Sums("columns", dims[first])
    return Sums("none", shape=tuple(shape))


class Launch(NamedTuple):
    """Launch arguments that follow from shapes, strides and sums, in the kernels' order."""

    grid: tuple[int]
    strides: tuple[tuple[int | None, ...] | None, ...]  # of the operands, then the sizes of the view
    sizes: tuple[int, ...]  # rows, cols, per_stream, chunks, tiles, group_tiles
    constants: tuple[str | int, ...]  # AXIS, WIDE, ALIGNED, ONE_STREAM, QUADS, R, C
    groups: int
    partials: int  # elements

    def workspace(self, sums: int, dtype: torch.dtype, like: Tensor) -> list[Tensor | None]:
        """Room for each sum's partial results, then the tickets; None where nothing is summed over tiles."""
        if self.constants[0] not in ("all", "columns"):
            return [None] * (sums + 1)
        rooms: list[Tensor | None] = [like.new_empty(self.partials, dtype=dtype) for _ in range(sums)]
        return [*rooms, tickets(like, self.groups)]


@functools.lru_cache(maxsize=1024)
def plan(
    shape: torch.Size, operands: tuple[Strides | None, ...], sums: Sums, streams: int, block: int,
    least: int = 1,
) -> Launch:  # fmt: skip
    """`operands`: strides in `shape` of all that the kernel knows, in its order; None for an absent one.
    `least`: tiles of a chunk, where a group has as many.

    A model calls with few shapes, and finding out takes longer than a launch: hence the cache.
    """
    present = [strides for strides in operands if strides is not None]
    v = view(shape, present, sums.split, streams, block)
    length = v.rows * v.cols // streams
    row_blocks, col_blocks = -(-v.rows // v.R), -(-v.cols // v.C)
    if sums.axis == "columns":
        groups, group_tiles, most = col_blocks, row_blocks, max(1, COLUMN_PROGRAMS // col_blocks)
    elif sums.axis != "all":
        groups, group_tiles, most = row_blocks * col_blocks, 1, 1
    elif sums.per_row:
        groups, group_tiles, most = v.rows, col_blocks, MAX_ROW_CHUNKS
    else:
        groups, group_tiles, most = 1, row_blocks * col_blocks, MAX_CHUNKS
    tiles = max(-(-group_tiles // most), min(least, group_tiles))
    chunks = -(-group_tiles // tiles)
    quads = length % v.cols == 0 and (v.cols % 4 == 0 or v.cols == length)
    found = iter(v.strides)
    return Launch(
        grid=(groups * chunks,),
        strides=(*(None if strides is None else next(found) for strides in operands), v.sizes),
        sizes=(v.rows, v.cols, length // v.cols if quads else length, chunks, tiles, group_tiles),
        constants=(sums.axis, v.rows * v.cols >= 1 << 31, v.cols % 16 == 0, streams == 1, quads, v.R, v.C),
        groups=groups,
        partials=chunks * (v.cols if sums.axis == "columns" else groups),
    )


_tickets: dict[tuple, Tensor] = {}


def tickets(t: Tensor, groups: int) -> Tensor:
    """int32 zeros [>= groups] on t's device.

    A kernel leaves zeros behind, so the launches of one stream share them. A captured CUDA graph gets its
    own: its replays may run next to anything.
    """
    if t.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return t.new_zeros(groups, dtype=torch.int32)
        key: tuple = (t.get_device(), torch.cuda.current_stream(t.device).cuda_stream)
    else:
        key = (-1, 0)
    found = _tickets.get(key)
    if found is None or found.numel() < groups:
        found = _tickets[key] = _kept_zeros(max(1024, groups), t.device)
    return found


def _kept_zeros(n: int, device: torch.device) -> Tensor:
    """int32 zeros [n] that outlive the call.

    Another thread makes them: this one may be allocating from a pool that ends with the call, as when
    torch.compile warms up a CUDA graph, and a pool takes the allocations of one thread.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def make() -> Tensor:
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            return torch.zeros(n, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def _next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
