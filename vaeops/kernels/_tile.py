"""What the kernels share on the device: tiles of a [rows, cols] view, operands, deterministic sums.

A program walks the tiles [R, C] of one chunk of one group. A group depends on what the kernel sums (AXIS):
    "none", "rows"  a tile; "rows": it holds whole rows, each summed by itself
    "all"           consecutive tiles whose elements make one sum: the whole view, or one long row
    "columns"       the tiles below one another: one sum per column
A group of several chunks leaves fp32 (fp64 for fp64) partial sums; the program that arrives last adds them in
the order of their index, so the result does not depend on which one that is.

An operand's strides are (row, col), or one per merged dim when the view has `sizes`. None: broadcast there.
"""

import triton
import triton.language as tl


@triton.jit
def tile_at(group, inner, rows, cols, group_tiles, AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Tile `inner` of a group: (row [R, 1], col [1, C], row inside, col inside, cols), and its first column.

    Tiles are counted in 32 bits, since 64-bit division is slow: 2^31 of them are more than any memory holds.
    """
    col_blocks = ((cols + C - 1) // C).to(tl.int32)
    if AXIS == "columns":
        row_block, col_block = inner, group
    else:
        tile = group * group_tiles + inner
        row_block, col_block = tile // col_blocks, tile % col_blocks
    if AXIS == "all" or AXIS == "columns":  # a chunk may have more tiles than its group has left
        rows = tl.where(inner < group_tiles, rows, 0)
    first_col = col_block.to(tl.int64) * C
    row = row_block.to(tl.int64) * R + tl.arange(0, R)[:, None]
    col = first_col + tl.arange(0, C)[None, :]
    return (row, col, row < rows, col < cols, cols), first_col


@triton.jit
def offset(tile, sizes, strides, WIDE: tl.constexpr):
    """Offset [R, C] of a tile's logical elements: their index taken apart along the merged dims.

    WIDE: the index needs 64 bits.
    """
    row, col, _, _, cols = tile
    rest = row * cols + col
    if not WIDE:
        rest = rest.to(tl.int32)
    total = tl.zeros(rest.shape, tl.int64)
    for d in tl.static_range(len(strides) - 1, 0, -1):
        if strides[d] is not None:
            total += (rest % sizes[d - 1]).to(tl.int64) * strides[d]
        rest = rest // sizes[d - 1]
    if strides[0] is not None:
        total += rest.to(tl.int64) * strides[0]
    return total


@triton.jit
def load(pointer, tile, sizes, strides, WIDE: tl.constexpr):
    """An operand on the tile: [R, C], or [R, 1], [1, C] or a scalar where it is broadcast."""
    row, col, row_ok, col_ok, _ = tile
    if sizes is not None:
        value = tl.load(pointer + offset(tile, sizes, strides, WIDE), mask=row_ok & col_ok)
    elif strides[0] is not None:
        if strides[1] is not None:
            value = tl.load(pointer + row * strides[0] + col * strides[1], mask=row_ok & col_ok)
        else:
            value = tl.load(pointer + row * strides[0], mask=row_ok)
    elif strides[1] is not None:
        value = tl.load(pointer + col * strides[1], mask=col_ok)
    else:
        value = tl.load(pointer)
    return value


@triton.jit
def store(pointer, value, tile, sizes, strides, WIDE: tl.constexpr):
    """The transpose of `load` for an operand that is not broadcast."""
    row, col, row_ok, col_ok, _ = tile
    if sizes is not None:
        tl.store(pointer + offset(tile, sizes, strides, WIDE), value, mask=row_ok & col_ok)
    elif strides[0] is not None:
        tl.store(pointer + row * strides[0] + col * strides[1], value, mask=row_ok & col_ok)
    else:
        tl.store(pointer + col * strides[1], value, mask=row_ok & col_ok)


@triton.jit
def store_sum(total, out, partial, group, chunk, chunks, cols, scale,
              AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """The sum of total [R, C]: scaled into `out` if the chunk is its group's only one, else into `partial`.

    out [groups] (AXIS "all") or [cols]; partial [groups, chunks] or [chunks, cols].
    """
    if AXIS == "all":
        value = tl.sum(tl.reshape(total, [R * C]), axis=0)
        if chunks == 1:
            tl.store(out + group, value * scale)
        else:
            tl.store(partial + group * chunks + chunk, value)
    else:
        col = group.to(tl.int64) * C + tl.arange(0, C)
        value = tl.sum(total, axis=0)
        if chunks == 1:
            tl.store(out + col, value * scale, mask=col < cols)
        else:
            tl.store(partial + chunk * cols + col, value, mask=col < cols)


@triton.jit
def arrive(ticket, group, chunks):
    """True in the program that comes last of its group; the stores of the others are visible to it."""
    tl.debug_barrier()  # every thread's sums are out before the one that takes the ticket publishes them
    last = tl.atomic_add(ticket + group, 1, sem="acq_rel") == chunks - 1
    tl.debug_barrier()
    return last


@triton.jit
def collect(out, partial, group, chunks, cols, scale, AXIS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The sum of a group's partial sums, in the order of their index, scaled into `out`."""
    if AXIS == "all":
        lane = tl.arange(0, R * C)
        total = tl.zeros([R * C], partial.dtype.element_ty)
        for first in range(0, chunks, R * C):
            at = first + lane
            total += tl.load(partial + group * chunks + at, mask=at < chunks, other=0.0, cache_modifier=".cg")
        tl.store(out + group, tl.sum(total, axis=0) * scale)
    else:
        col = group.to(tl.int64) * C + tl.arange(0, C)[None, :]
        total = tl.zeros([R, C], partial.dtype.element_ty)
        for first in range(0, chunks, R):
            at = first + tl.arange(0, R)[:, None]
            ok = (at < chunks) & (col < cols)
            total += tl.load(partial + at * cols + col, mask=ok, other=0.0, cache_modifier=".cg")
        value = tl.sum(total, axis=0)
        col = group.to(tl.int64) * C + tl.arange(0, C)
        tl.store(out + col, value * scale, mask=col < cols)


@triton.jit
def release(ticket, group):
    """Leaves the ticket as it was found, for the next launch on this stream."""
    tl.store(ticket + group, 0)


@triton.jit
def aligned(cols, ALIGNED: tl.constexpr):
    """cols, in a form that shows the compiler that it is a multiple of 16: it then loads 16 bytes at a time.

    It takes no notice of tl.multiple_of on a kernel argument.
    """
    return cols // 16 * 16 if ALIGNED else cols
