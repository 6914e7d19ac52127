"""Compression windows in Triton: pooled (mean and weighted), or gathered for a matrix product, and
the gradients of both.

Everything here is bound by memory. A row of x lies in kernel_size / kernel_stride windows; the
windows of a tile that share a row read it one right after the other, so that it comes from memory
once. Nothing is added up with atomics: the gradient of a row gathers from its windows, that of the
weights is summed in two steps.

A hop is kernel_stride successive rows of a sequence; window i begins with hop i. Sequences are cut
into tiles of hops, which are numbered as the blocks in locate.py, so that a program looks up one
sequence. It does so in cu_seqlens itself, because a table would cost a launch. The one axis of
programs has the heads innermost: programs that run at the same time then read whole rows of x.

In a kernel SIZES is the launch's `Sizes`, as a constant.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.bundles import constants
from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.common.locate import Boundaries, count_windows, find_sequence, max_num_blocks
from nsa_fsa.ops.common.primitives import kernel, store_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim
from nsa_fsa.sequences import Sequences


class TileSize(NamedTuple):
    """How much of x, or of its gradient, a program has in flight."""

    elements: int  # rows x padded head width
    warps: int


# These make 16 elements a thread, which are two loads of 16 bytes in 16 bits. WEIGHT takes 8 warps
# so that a row of 128 has fewer elements than there are threads: Triton then loads the pooled
# gradient where it is needed instead of passing it through shared memory.
POOL, GATHER, DX, WEIGHT = (*(TileSize(2048, 4),) * 3, TileSize(4096, 8))
# The gradient of the weights takes so many programs, unless a program would then add up more
# windows than WEIGHT_MAX_WINDOWS, one after the other in float32, or fewer than make it worth its
# start.
WEIGHT_PROGRAMS, WEIGHT_MAX_WINDOWS, WEIGHT_MIN_WINDOWS = 16384, 128, 4


class Sizes(NamedTuple):
    """What is alike in all programs of a launch; a constant of the kernel."""

    WINDOWS: Windows
    DIM: int
    PADDED_DIM: int
    # Hops of a tile; where the gradient of the weights is summed, positions of a window.
    LENGTH: int


class StridedHeads(NamedTuple):
    """`[T, H, D]` in a kernel, one row for each token; or `[N, H, D]`, one for each window."""

    ptr: Any
    stride_t: Any
    stride_h: Any
    stride_d: Any


class StridedWindows(NamedTuple):
    """`[N, H, L, D]` in a kernel: the rows of each window, all the same where stride_l is 0."""

    ptr: Any
    stride_n: Any
    stride_h: Any
    stride_l: Any
    stride_d: Any


class Weight(NamedTuple):
    """`[H, L]` in a kernel: a factor for each position of a window."""

    ptr: Any
    stride_h: Any
    stride_l: Any


class HopTile(NamedTuple):
    """Neighbouring hops of one sequence, and the head that a program has of them."""

    head: Any  # int64
    start: Any  # the sequence's first row
    end: Any  # the row after the sequence's last
    first_window: Any  # the row of the sequence's first window in a tensor of windows
    end_window: Any  # the row after those that are the sequence's
    num_windows: Any  # of the sequence, which may have more rows
    first: Any  # the tile's first hop, counted inside its sequence
    hop: Any  # all of them [LENGTH]


@triton.jit
def point_at(ptr, offsets, stride_d, SIZES: tl.constexpr):
    """Rows that begin at `offsets`, their elements stride_d apart: pointers `[M, PADDED_DIM]`.

    Triton makes a constant of a stride of 1, and 16-byte loads of such rows. A gradient expanded
    from one number has a stride of 0.
    """
    column = tl.arange(0, SIZES.PADDED_DIM).to(tl.int64)
    return ptr + (offsets[:, None] + column[None, :] * stride_d)


@triton.jit
def mask_of(inside, SIZES: tl.constexpr):
    """`[M] -> [M, PADDED_DIM]`, or `[M, 1]` where that says the same."""
    if SIZES.DIM == SIZES.PADDED_DIM:
        return inside[:, None]
    else:
        return inside[:, None] & (tl.arange(0, SIZES.PADDED_DIM) < SIZES.DIM)[None, :]


@triton.jit
def windows_of(bounds, sequence, SIZES: tl.constexpr):
    """How many windows a sequence has; bounds: `Boundaries`."""
    if bounds.seqused_k is None:
        start = tl.load(bounds.cu_seqlens + sequence)
        length = tl.load(bounds.cu_seqlens + sequence + 1) - start
    else:
        length = tl.load(bounds.seqused_k + sequence)
    return count_windows(length, SIZES.WINDOWS.kernel_size, SIZES.WINDOWS.kernel_stride)


@triton.jit
def hop_tile(bounds, num_heads, num_sequences, num_steps, SIZES: tl.constexpr):
    """The tile of hops that this program owns, as a `HopTile`."""
    S: tl.constexpr = SIZES.WINDOWS.kernel_stride
    TILE_ROWS: tl.constexpr = S * SIZES.LENGTH
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    sequence = find_sequence(bounds.cu_seqlens, tile, num_sequences, num_steps, TILE_ROWS, 1)
    start, end = tl.load(bounds.cu_seqlens + sequence), tl.load(bounds.cu_seqlens + sequence + 1)
    num_windows = windows_of(bounds, sequence, SIZES)
    first = (tile - (start // TILE_ROWS + sequence)) * SIZES.LENGTH
    first_window, end_window = start // S, end // S
    hop = first + tl.arange(0, SIZES.LENGTH)
    return HopTile(head.to(tl.int64), start, end, first_window, end_window, num_windows, first, hop)


@triton.jit
def position_at(step, SIZES: tl.constexpr):
    """The positions of a window, in an order in which windows that overlap come to a row in
    successive steps."""
    S: tl.constexpr = SIZES.WINDOWS.kernel_stride
    HOPS: tl.constexpr = SIZES.WINDOWS.kernel_size // S
    return step % HOPS * S + step // HOPS


@kernel
def pool_windows_fwd_kernel(
    x, weight, pooled_ptr, bounds, num_heads, num_sequences, num_steps, SIZES: tl.constexpr
):
    """x: `StridedHeads`. weight: `Weight`, or None for the mean. pooled `[N, H, D]`, contiguous."""
    L: tl.constexpr = SIZES.WINDOWS.kernel_size
    S: tl.constexpr = SIZES.WINDOWS.kernel_stride
    tile = hop_tile(bounds, num_heads, num_sequences, num_steps, SIZES)
    if tile.first_window + tile.first >= tile.end_window:  # no sequence owns this number of a tile
        return

    inside = tile.first_window + tile.hop < tile.end_window
    stride_t = tl.cast(x.stride_t, tl.int64)
    x_ptr = x.ptr + (tile.head * x.stride_h + tile.start * stride_t)
    if weight is not None:
        weight_ptr = weight.ptr + tile.head * weight.stride_h
    of_head = (tl.arange(0, SIZES.PADDED_DIM) < SIZES.DIM)[None, :]

    acc = tl.zeros([SIZES.LENGTH, SIZES.PADDED_DIM], tl.float32)
    if tile.first < tile.num_windows:
        # No row is masked, because ptxas keeps several loads without a mask in flight; with a mask
        # it waits for each before it starts the next.
        begin = tl.minimum(tile.hop, tile.num_windows - 1) * S * stride_t
        x_ptrs = point_at(x_ptr, begin, x.stride_d, SIZES)
        for step in range(0, L):
            position = position_at(step, SIZES)
            if SIZES.DIM == SIZES.PADDED_DIM:
                row = tl.load(x_ptrs + position * stride_t).to(tl.float32)
            else:
                row = tl.load(x_ptrs + position * stride_t, mask=of_head, other=0.0).to(tl.float32)
            if weight is not None:
                acc += row * tl.load(weight_ptr + position * weight.stride_l).to(tl.float32)
            else:
                acc += row

    if weight is None:
        acc *= 1.0 / L
    acc = tl.where((tile.hop < tile.num_windows)[:, None], acc, 0.0)
    target = ((tile.first_window + tile.hop).to(tl.int64) * num_heads + tile.head) * SIZES.DIM
    store_rows(pooled_ptr, target, acc, inside, SIZES.DIM, SIZES.PADDED_DIM)


@kernel
def gather_windows_fwd_kernel(
    x, windows_ptr, bounds, num_heads, num_sequences, num_steps, SIZES: tl.constexpr
):
    """x: `StridedHeads`. windows `[N, H, L, D]`, contiguous."""
    L: tl.constexpr = SIZES.WINDOWS.kernel_size
    S: tl.constexpr = SIZES.WINDOWS.kernel_stride
    tile = hop_tile(bounds, num_heads, num_sequences, num_steps, SIZES)
    if tile.first_window + tile.first >= tile.end_window:  # no sequence owns this number of a tile
        return

    stride_t = tl.cast(x.stride_t, tl.int64)
    x_ptr = x.ptr + (tile.head * x.stride_h + tile.start * stride_t)
    x_ptrs = point_at(x_ptr, tile.hop * S * stride_t, x.stride_d, SIZES)
    target = ((tile.first_window + tile.hop).to(tl.int64) * num_heads + tile.head) * (L * SIZES.DIM)
    to_ptrs = point_at(windows_ptr, target, 1, SIZES)

    exists = mask_of(tile.hop < tile.num_windows, SIZES)
    inside = mask_of(tile.first_window + tile.hop < tile.end_window, SIZES)
    for step in range(0, L):
        position = position_at(step, SIZES)
        row = tl.load(x_ptrs + position * stride_t, mask=exists, other=0.0)
        tl.store(to_ptrs + position * SIZES.DIM, row, mask=inside)


@kernel
def windows_bwd_kernel_dx(
    dwindows,
    weight,
    dx_ptr,
    scale,
    bounds,
    num_heads,
    num_sequences,
    num_steps,
    SIZES: tl.constexpr,
):
    """The sum over the windows that contain a row of what they owe it.

    dwindows: `StridedWindows`; the gradient of a pooled window is that of each of its rows. weight:
    `Weight`, or None where all positions have the factor `scale`. dx `[T, H, D]`, contiguous.
    """
    L: tl.constexpr = SIZES.WINDOWS.kernel_size
    S: tl.constexpr = SIZES.WINDOWS.kernel_stride
    tile = hop_tile(bounds, num_heads, num_sequences, num_steps, SIZES)
    if tile.start + tile.first * S >= tile.end:  # no sequence owns this number of a tile
        return

    row = tile.start + tile.hop * S
    stride_n = tl.cast(dwindows.stride_n, tl.int64)
    stride_l = tl.cast(dwindows.stride_l, tl.int64)
    d_ptr = dwindows.ptr + (tile.head * dwindows.stride_h + tile.first_window * stride_n)
    d_ptrs = point_at(d_ptr, tile.hop * stride_n, dwindows.stride_d, SIZES)
    if weight is not None:
        weight_ptr = weight.ptr + tile.head * weight.stride_h
    dx_ptrs = point_at(dx_ptr, (row.to(tl.int64) * num_heads + tile.head) * SIZES.DIM, 1, SIZES)

    for step in range(0, S):
        acc = tl.zeros([SIZES.LENGTH, SIZES.PADDED_DIM], tl.float32)
        for back in range(0, L // S):  # hop u lies in the windows u, u - 1, .. u - L / S + 1
            position = back * S + step
            contains = mask_of((tile.hop >= back) & (tile.hop - back < tile.num_windows), SIZES)
            offset = position * stride_l - back * stride_n
            d = tl.load(d_ptrs + offset, mask=contains, other=0.0).to(tl.float32)
            if weight is not None:
                acc += d * tl.load(weight_ptr + position * weight.stride_l).to(tl.float32)
            else:
                acc += d

        if weight is None:
            acc *= scale
        inside = mask_of(row + step < tile.end, SIZES)
        target = dx_ptrs + step * tl.cast(num_heads, tl.int64) * SIZES.DIM
        tl.store(target, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def pool_windows_bwd_kernel_dweight(
    dpooled,
    x,
    sums_ptr,
    bounds,
    num_windows,
    num_heads,
    num_sequences,
    num_steps,
    windows_of_share,
    SIZES: tl.constexpr,
):
    """Sums over a share of the windows, for SIZES.LENGTH positions of the window.

    dpooled and x: `StridedHeads`. sums `[shares, H, L]`, float32.
    """
    L: tl.constexpr = SIZES.WINDOWS.kernel_size
    S: tl.constexpr = SIZES.WINDOWS.kernel_stride
    DIM: tl.constexpr = SIZES.DIM
    PADDED_DIM: tl.constexpr = SIZES.PADDED_DIM
    POSITIONS: tl.constexpr = SIZES.LENGTH
    PROGRAMS: tl.constexpr = (L + POSITIONS - 1) // POSITIONS  # of a share and head
    MASKED: tl.constexpr = L % POSITIONS != 0 or DIM != PADDED_DIM
    first_position = tl.program_id(0) % PROGRAMS * POSITIONS
    head = (tl.program_id(0) // PROGRAMS % num_heads).to(tl.int64)
    share = tl.program_id(0) // PROGRAMS // num_heads

    position = first_position + tl.arange(0, POSITIONS)
    column = tl.arange(0, PADDED_DIM)
    stride_t, stride_n = tl.cast(x.stride_t, tl.int64), tl.cast(dpooled.stride_t, tl.int64)
    x_ptr = x.ptr + head * x.stride_h
    x_ptrs = point_at(x_ptr, position * stride_t, x.stride_d, SIZES)
    d_ptrs = dpooled.ptr + (head * dpooled.stride_h + column.to(tl.int64) * dpooled.stride_d)
    in_window = mask_of(position < L, SIZES)

    # What lies behind the last number of cu_seqlens belongs to no sequence.
    last = tl.load(bounds.cu_seqlens + num_sequences) // S
    row = share * windows_of_share  # of dpooled
    stop = tl.minimum(row + windows_of_share, tl.minimum(num_windows, last))
    sequence = find_sequence(bounds.cu_seqlens, row, num_sequences, num_steps, S, 0)
    acc = tl.zeros([POSITIONS, PADDED_DIM], tl.float32)  # summed over D at the end, with shuffles
    while row < stop:
        start = tl.load(bounds.cu_seqlens + sequence)
        end = tl.load(bounds.cu_seqlens + sequence + 1)
        first = start // S
        behind = first + windows_of(bounds, sequence, SIZES)
        for window in tl.range(row, tl.minimum(behind, stop), loop_unroll_factor=2):
            at = x_ptrs + (start + (window - first) * S) * stride_t
            rows = tl.load(at, mask=in_window, other=0.0) if MASKED else tl.load(at)
            at = d_ptrs + window * stride_n
            d = tl.load(at) if DIM == PADDED_DIM else tl.load(at, mask=column < DIM, other=0.0)
            acc += rows.to(tl.float32) * d.to(tl.float32)[None, :]
        row = end // S  # which is the next sequence's first
        sequence += 1

    target = (share.to(tl.int64) * num_heads + head) * L + position
    tl.store(sums_ptr + target, tl.sum(acc, 1), mask=position < L)


def boundaries(sequences: Sequences) -> Boundaries:
    """What a kernel is given of sequences whose windows are pooled or gathered."""
    return Boundaries(sequences.cu_seqlens, None, sequences.seqused_k)


def cut_hops(
    x: Tensor, sequences: Sequences, windows: Windows, size: TileSize
) -> tuple[tuple[int], tuple[Any, ...]]:
    """Cuts x `[T, HKV, D]` into tiles of hops that have about `size.elements` elements each.

    Returns the grid of a kernel that owns such tiles, and its arguments from `bounds` on.
    """
    num_rows, num_heads, dim = x.shape
    num_sequences, padded = sequences.cu_seqlens.shape[0] - 1, padded_dim(dim)
    hops = max(size.elements // padded, 1)
    num_tiles = max_num_blocks(num_rows, num_sequences, hops * windows.kernel_stride)
    counts = (num_heads, num_sequences, num_sequences.bit_length())
    sizes = constants(Sizes(windows, dim, padded, hops))
    return (num_tiles * num_heads,), (boundaries(sequences), *counts, sizes)


def weight_of(weight: Tensor | None) -> Weight | None:
    """What a kernel is given of a weight `[HKV, l]`, or of the mean."""
    return None if weight is None else Weight(weight, *weight.stride())


def pool_windows(
    x: Tensor, weight: Tensor | None, sequences: Sequences, windows: Windows, size: TileSize = POOL
) -> Tensor:
    """Weighted sums of the windows of x `[T, HKV, D]`: `[T // s, HKV, D]`.

    weight: `[HKV, l]`, or None for the mean.
    """
    num_rows, num_heads, dim = x.shape
    pooled = x.new_empty(num_rows // windows.kernel_stride, num_heads, dim)
    if pooled.numel():
        grid, arguments = cut_hops(x, sequences, windows, size)
        heads = StridedHeads(x, *x.stride())
        pool_windows_fwd_kernel[grid](
            heads, weight_of(weight), pooled, *arguments, num_warps=size.warps
        )
    return pooled


def pool_windows_backward(
    dpooled: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sequences: Sequences,
    windows: Windows,
    size_dx: TileSize = DX,
    size_dweight: TileSize = WEIGHT,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `pool_windows` with respect to x and weight (None for the mean)."""
    stride_n, stride_h, stride_d = dpooled.stride()
    dwindows = StridedWindows(dpooled, stride_n, stride_h, 0, stride_d)
    scale = 1 / windows.kernel_size
    dx = _rows_gradient(dwindows, weight, scale, x, sequences, windows, size_dx)
    if weight is None:
        return dx, None
    dweight = _weight_gradient(dpooled, x, sequences, windows, size_dweight)
    return dx, dweight.to(weight.dtype)


def gather_windows(
    x: Tensor, sequences: Sequences, windows: Windows, size: TileSize = GATHER
) -> Tensor:
    """The windows of x `[T, HKV, D]`: `[T // s, HKV, l, D]`; those that no sequence owns are 0."""
    num_rows, num_heads, dim = x.shape
    num_windows = num_rows // windows.kernel_stride
    gathered = x.new_empty(num_windows, num_heads, windows.kernel_size, dim)
    if gathered.numel():
        grid, arguments = cut_hops(x, sequences, windows, size)
        heads = StridedHeads(x, *x.stride())
        gather_windows_fwd_kernel[grid](heads, gathered, *arguments, num_warps=size.warps)
    return gathered


def gather_windows_backward(
    dwindows: Tensor, x: Tensor, sequences: Sequences, windows: Windows, size: TileSize = DX
) -> Tensor:
    """Gradient of `gather_windows` with respect to x; gradients of unowned windows are ignored."""
    strided = StridedWindows(dwindows, *dwindows.stride())
    return _rows_gradient(strided, None, 1.0, x, sequences, windows, size)


def _rows_gradient(
    dwindows: StridedWindows,
    weight: Tensor | None,
    scale: float,
    x: Tensor,
    sequences: Sequences,
    windows: Windows,
    size: TileSize,
) -> Tensor:
    """The sum over the windows that contain a row of weight, or scale, times dwindows."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        grid, arguments = cut_hops(x, sequences, windows, size)
        windows_bwd_kernel_dx[grid](
            dwindows, weight_of(weight), dx, scale, *arguments, num_warps=size.warps
        )
    return dx


def _weight_gradient(
    dpooled: Tensor, x: Tensor, sequences: Sequences, windows: Windows, size: TileSize
) -> Tensor:
    """float32 `[HKV, l]`: x times dpooled for each position, summed over the windows and D."""
    num_windows, num_heads, dim = dpooled.shape
    num_sequences = sequences.cu_seqlens.shape[0] - 1
    kernel_size, padded = windows.kernel_size, padded_dim(dim)

    positions = min(next_power_of_2(kernel_size), max(size.elements // padded, 1))
    programs = num_heads * cdiv(kernel_size, positions)  # of a share
    of_share = cdiv(num_windows * programs, WEIGHT_PROGRAMS)  # windows
    of_share = max(min(of_share, WEIGHT_MAX_WINDOWS), WEIGHT_MIN_WINDOWS)
    shares = cdiv(num_windows, of_share) if dim else 0
    elements_of_warp = size.elements // size.warps
    warps = max(min(positions * padded // elements_of_warp, size.warps), 1)

    sums = x.new_empty(shares, num_heads, kernel_size, dtype=torch.float32)
    if sums.numel():
        pool_windows_bwd_kernel_dweight[(shares * programs,)](
            *(StridedHeads(dpooled, *dpooled.stride()), StridedHeads(x, *x.stride()), sums),
            *(boundaries(sequences), num_windows, num_heads),
            *(num_sequences, num_sequences.bit_length(), of_share),
            constants(Sizes(windows, dim, padded, positions)),
            num_warps=warps,
        )
    return sums.sum(0)
