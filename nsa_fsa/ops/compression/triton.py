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

In a kernel WINDOWS is the call's `Windows`, as a constant.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.common.locate import find_sequence, max_num_blocks
from nsa_fsa.ops.common.primitives import kernel, store_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim
from nsa_fsa.sequences import Sequences


class Tile(NamedTuple):
    """How much of x, or of its gradient, a program has in flight."""

    elements: int  # rows x padded head width
    warps: int


# These make 16 elements a thread, which are two loads of 16 bytes in 16 bits. WEIGHT takes 8 warps
# so that a row of 128 has fewer elements than there are threads: Triton then loads the pooled
# gradient where it is needed instead of passing it through shared memory.
POOL, GATHER, ROWS, WEIGHT = Tile(2048, 4), Tile(2048, 4), Tile(2048, 4), Tile(4096, 8)
# The gradient of the weights takes so many programs, unless a program would then add up more
# windows than WEIGHT_MAX_WINDOWS, one after the other in float32, or fewer than make it worth its
# start.
WEIGHT_PROGRAMS, WEIGHT_MAX_WINDOWS, WEIGHT_MIN_WINDOWS = 16384, 128, 4


class Rows(NamedTuple):
    """`[T, H, D]` in a kernel, one row for each token; or `[N, H, D]`, one for each window."""

    ptr: Any
    stride_t: Any
    stride_h: Any
    stride_d: Any


class WindowRows(NamedTuple):
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
    num_windows: Any  # of the sequence
    first: Any  # the tile's first hop, counted inside its sequence


@triton.jit
def point_at(ptr, offsets, stride_d, PADDED_DIM: tl.constexpr):
    """Rows that begin at `offsets`, their elements stride_d apart: pointers `[M, PADDED_DIM]`.

    Triton makes a constant of a stride of 1, and 16-byte loads of such rows. A gradient expanded
    from one number has a stride of 0.
    """
    return ptr + (offsets[:, None] + tl.arange(0, PADDED_DIM).to(tl.int64)[None, :] * stride_d)


@triton.jit
def mask_of(inside, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """`[M] -> [M, PADDED_DIM]`, or `[M, 1]` where that says the same."""
    if DIM == PADDED_DIM:
        return inside[:, None]
    else:
        return inside[:, None] & (tl.arange(0, PADDED_DIM) < DIM)[None, :]


@triton.jit
def count_windows(cu_seqlens_ptr, seqused_k_ptr, sequence, WINDOWS: tl.constexpr):
    """How many windows a sequence has; seqused_k_ptr is None where all of its rows count."""
    if seqused_k_ptr is None:
        start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
        length = end - start
    else:
        length = tl.load(seqused_k_ptr + sequence)
    # The division rounds towards 0.
    return (
        tl.maximum(length - WINDOWS.kernel_size + WINDOWS.kernel_stride, 0) // WINDOWS.kernel_stride
    )


@triton.jit
def hop_tile(
    cu_seqlens_ptr,
    seqused_k_ptr,
    num_heads,
    num_sequences,
    num_steps,
    WINDOWS: tl.constexpr,
    HOPS: tl.constexpr,
):
    """The tile of HOPS hops that this program owns, as a `HopTile`."""
    TILE_ROWS: tl.constexpr = WINDOWS.kernel_stride * HOPS
    head = tl.program_id(0) % num_heads
    tile = tl.program_id(0) // num_heads
    sequence = find_sequence(cu_seqlens_ptr, tile, num_sequences, num_steps, TILE_ROWS, 1)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    num_windows = count_windows(cu_seqlens_ptr, seqused_k_ptr, sequence, WINDOWS)
    first = (tile - (start // TILE_ROWS + sequence)) * HOPS
    return HopTile(head.to(tl.int64), start, end, num_windows, first)


@triton.jit
def position_at(step, WINDOWS: tl.constexpr):
    """The positions of a window, in an order in which windows that overlap come to a row in
    successive steps."""
    HOPS: tl.constexpr = WINDOWS.kernel_size // WINDOWS.kernel_stride
    return step % HOPS * WINDOWS.kernel_stride + step // HOPS


@kernel
def pool_windows_fwd_kernel(
    x,
    weight,
    pooled_ptr,
    cu_seqlens_ptr,
    seqused_k_ptr,
    num_heads,
    num_sequences,
    num_steps,
    WINDOWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HOPS: tl.constexpr,
):
    """x: `Rows`. weight: `Weight`, or None for the mean. pooled `[N, H, D]`, contiguous."""
    L: tl.constexpr = WINDOWS.kernel_size
    S: tl.constexpr = WINDOWS.kernel_stride
    tile = hop_tile(
        cu_seqlens_ptr, seqused_k_ptr, num_heads, num_sequences, num_steps, WINDOWS, HOPS
    )
    first_row = tile.start // S  # of pooled
    if first_row + tile.first >= tile.end // S:  # no sequence owns this number of a tile
        return

    window = tile.first + tl.arange(0, HOPS)
    inside = first_row + window < tile.end // S
    stride_t = tl.cast(x.stride_t, tl.int64)
    x_ptr = x.ptr + (tile.head * x.stride_h + tile.start * stride_t)
    if weight is not None:
        weight_ptr = weight.ptr + tile.head * weight.stride_h
    of_head = (tl.arange(0, PADDED_DIM) < DIM)[None, :]

    acc = tl.zeros([HOPS, PADDED_DIM], tl.float32)
    if tile.first < tile.num_windows:
        # No row is masked, because ptxas keeps several loads without a mask in flight; with a mask
        # it waits for each before it starts the next.
        begin = tl.minimum(window, tile.num_windows - 1) * S * stride_t
        x_ptrs = point_at(x_ptr, begin, x.stride_d, PADDED_DIM)
        for step in range(0, L):
            position = position_at(step, WINDOWS)
            if DIM == PADDED_DIM:
                row = tl.load(x_ptrs + position * stride_t).to(tl.float32)
            else:
                row = tl.load(x_ptrs + position * stride_t, mask=of_head, other=0.0).to(tl.float32)
            if weight is not None:
                acc += row * tl.load(weight_ptr + position * weight.stride_l).to(tl.float32)
            else:
                acc += row

    if weight is None:
        acc *= 1.0 / L
    acc = tl.where((window < tile.num_windows)[:, None], acc, 0.0)
    target = ((first_row + window).to(tl.int64) * num_heads + tile.head) * DIM
    store_rows(pooled_ptr, target, acc, inside, DIM, PADDED_DIM)


@kernel
def gather_windows_fwd_kernel(
    x,
    windows_ptr,
    cu_seqlens_ptr,
    seqused_k_ptr,
    num_heads,
    num_sequences,
    num_steps,
    WINDOWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HOPS: tl.constexpr,
):
    """x: `Rows`. windows `[N, H, L, D]`, contiguous."""
    L: tl.constexpr = WINDOWS.kernel_size
    S: tl.constexpr = WINDOWS.kernel_stride
    tile = hop_tile(
        cu_seqlens_ptr, seqused_k_ptr, num_heads, num_sequences, num_steps, WINDOWS, HOPS
    )
    first_row = tile.start // S  # of windows
    if first_row + tile.first >= tile.end // S:  # no sequence owns this number of a tile
        return

    window = tile.first + tl.arange(0, HOPS)
    stride_t = tl.cast(x.stride_t, tl.int64)
    x_ptr = x.ptr + (tile.head * x.stride_h + tile.start * stride_t)
    x_ptrs = point_at(x_ptr, window * S * stride_t, x.stride_d, PADDED_DIM)
    target = ((first_row + window).to(tl.int64) * num_heads + tile.head) * (L * DIM)
    to_ptrs = point_at(windows_ptr, target, 1, PADDED_DIM)

    exists = mask_of(window < tile.num_windows, DIM, PADDED_DIM)
    inside = mask_of(first_row + window < tile.end // S, DIM, PADDED_DIM)
    for step in range(0, L):
        position = position_at(step, WINDOWS)
        row = tl.load(x_ptrs + position * stride_t, mask=exists, other=0.0)
        tl.store(to_ptrs + position * DIM, row, mask=inside)


@kernel
def windows_bwd_kernel_dx(
    dwindows,
    weight,
    dx_ptr,
    scale,
    cu_seqlens_ptr,
    seqused_k_ptr,
    num_heads,
    num_sequences,
    num_steps,
    WINDOWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HOPS: tl.constexpr,
):
    """The sum over the windows that contain a row of what they owe it.

    dwindows: `WindowRows`; the gradient of a pooled window is that of each of its rows. weight:
    `Weight`, or None where all positions have the factor `scale`. dx `[T, H, D]`, contiguous.
    """
    L: tl.constexpr = WINDOWS.kernel_size
    S: tl.constexpr = WINDOWS.kernel_stride
    tile = hop_tile(
        cu_seqlens_ptr, seqused_k_ptr, num_heads, num_sequences, num_steps, WINDOWS, HOPS
    )
    if tile.start + tile.first * S >= tile.end:  # no sequence owns this number of a tile
        return

    hop = tile.first + tl.arange(0, HOPS)
    row = tile.start + hop * S
    stride_n = tl.cast(dwindows.stride_n, tl.int64)
    stride_l = tl.cast(dwindows.stride_l, tl.int64)
    d_ptr = dwindows.ptr + (tile.head * dwindows.stride_h + tile.start // S * stride_n)
    d_ptrs = point_at(d_ptr, hop * stride_n, dwindows.stride_d, PADDED_DIM)
    if weight is not None:
        weight_ptr = weight.ptr + tile.head * weight.stride_h
    dx_ptrs = point_at(dx_ptr, (row.to(tl.int64) * num_heads + tile.head) * DIM, 1, PADDED_DIM)

    for step in range(0, S):
        acc = tl.zeros([HOPS, PADDED_DIM], tl.float32)
        for back in range(0, L // S):  # hop u lies in the windows u, u - 1, .. u - L / S + 1
            position = back * S + step
            contains = mask_of((hop >= back) & (hop - back < tile.num_windows), DIM, PADDED_DIM)
            offset = position * stride_l - back * stride_n
            d = tl.load(d_ptrs + offset, mask=contains, other=0.0).to(tl.float32)
            if weight is not None:
                acc += d * tl.load(weight_ptr + position * weight.stride_l).to(tl.float32)
            else:
                acc += d

        if weight is None:
            acc *= scale
        inside = mask_of(row + step < tile.end, DIM, PADDED_DIM)
        target = dx_ptrs + step * tl.cast(num_heads, tl.int64) * DIM
        tl.store(target, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def pool_windows_bwd_kernel_dweight(
    dpooled,
    x,
    partial_ptr,
    cu_seqlens_ptr,
    seqused_k_ptr,
    num_windows,
    num_heads,
    num_sequences,
    num_steps,
    windows_per_program,
    WINDOWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Sums over some successive windows, for POSITIONS positions of the window.

    dpooled and x: `Rows`. partial `[parts, H, L]`, float32.
    """
    L: tl.constexpr = WINDOWS.kernel_size
    S: tl.constexpr = WINDOWS.kernel_stride
    NUM_CHUNKS: tl.constexpr = (L + POSITIONS - 1) // POSITIONS
    MASKED: tl.constexpr = L % POSITIONS != 0 or DIM != PADDED_DIM
    chunk = tl.program_id(0) % NUM_CHUNKS
    head = (tl.program_id(0) // NUM_CHUNKS % num_heads).to(tl.int64)
    part = tl.program_id(0) // NUM_CHUNKS // num_heads

    position = chunk * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.arange(0, PADDED_DIM)
    stride_t, stride_n = tl.cast(x.stride_t, tl.int64), tl.cast(dpooled.stride_t, tl.int64)
    x_ptr = x.ptr + head * x.stride_h
    x_ptrs = point_at(x_ptr, position * stride_t, x.stride_d, PADDED_DIM)
    d_ptrs = dpooled.ptr + (head * dpooled.stride_h + column.to(tl.int64) * dpooled.stride_d)
    in_window = mask_of(position < L, DIM, PADDED_DIM)

    # What lies behind the last number of cu_seqlens belongs to no sequence.
    last = tl.load(cu_seqlens_ptr + num_sequences) // S
    row = part * windows_per_program  # of dpooled
    stop = tl.minimum(row + windows_per_program, tl.minimum(num_windows, last))
    sequence = find_sequence(cu_seqlens_ptr, row, num_sequences, num_steps, S, 0)
    acc = tl.zeros([POSITIONS, PADDED_DIM], tl.float32)  # summed over D at the end, with shuffles
    while row < stop:
        start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
        first = start // S
        behind = first + count_windows(cu_seqlens_ptr, seqused_k_ptr, sequence, WINDOWS)
        for window in tl.range(row, tl.minimum(behind, stop), loop_unroll_factor=2):
            at = x_ptrs + (start + (window - first) * S) * stride_t
            rows = tl.load(at, mask=in_window, other=0.0) if MASKED else tl.load(at)
            at = d_ptrs + window * stride_n
            d = tl.load(at) if DIM == PADDED_DIM else tl.load(at, mask=column < DIM, other=0.0)
            acc += rows.to(tl.float32) * d.to(tl.float32)[None, :]
        row = end // S  # which is the next sequence's first
        sequence += 1

    target = (part.to(tl.int64) * num_heads + head) * L + position
    tl.store(partial_ptr + target, tl.sum(acc, 1), mask=position < L)


class Cut(NamedTuple):
    """How the kernels that own tiles of hops are launched."""

    grid: tuple[int]
    layout: tuple[Tensor | int | None, ...]  # arguments that say where sequences and heads lie
    constants: dict[str, Any]


def cut_hops(x: Tensor, sequences: Sequences, windows: Windows, tile: Tile) -> Cut:
    """Cuts x `[T, HKV, D]` into tiles of hops that have about `tile.elements` elements each."""
    num_rows, num_heads, dim = x.shape
    cu_seqlens, seqused_k = sequences.cu_seqlens, sequences.seqused_k
    num_sequences, padded = cu_seqlens.shape[0] - 1, padded_dim(dim)
    hops = max(tile.elements // padded, 1)
    num_tiles = max_num_blocks(num_rows, num_sequences, hops * windows.kernel_stride)
    return Cut(
        (num_tiles * num_heads,),
        (cu_seqlens, seqused_k, num_heads, num_sequences, num_sequences.bit_length()),
        dict(WINDOWS=windows, DIM=dim, PADDED_DIM=padded, HOPS=hops, num_warps=tile.warps),
    )


def weight_of(weight: Tensor | None) -> Weight | None:
    """What a kernel is given of a weight `[HKV, l]`, or of the mean."""
    return None if weight is None else Weight(weight, *weight.stride())


def pool_windows(
    x: Tensor, weight: Tensor | None, sequences: Sequences, windows: Windows, tile: Tile = POOL
) -> Tensor:
    """Weighted sums of the windows of x `[T, HKV, D]`: `[T // s, HKV, D]`.

    weight: `[HKV, l]`, or None for the mean.
    """
    num_rows, num_heads, dim = x.shape
    pooled = x.new_empty(num_rows // windows.kernel_stride, num_heads, dim)
    if pooled.numel():
        cut = cut_hops(x, sequences, windows, tile)
        pool_windows_fwd_kernel[cut.grid](
            Rows(x, *x.stride()), weight_of(weight), pooled, *cut.layout, **cut.constants
        )
    return pooled


def pool_windows_backward(
    dpooled: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sequences: Sequences,
    windows: Windows,
    tile_dx: Tile = ROWS,
    tile_dweight: Tile = WEIGHT,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `pool_windows` with respect to x and weight (None for the mean)."""
    stride_n, stride_h, stride_d = dpooled.stride()
    dwindows = WindowRows(dpooled, stride_n, stride_h, 0, stride_d)
    scale = 1 / windows.kernel_size
    dx = _rows_gradient(dwindows, weight, scale, x, sequences, windows, tile_dx)
    if weight is None:
        return dx, None
    dweight = _weight_gradient(dpooled, x, sequences, windows, tile_dweight)
    return dx, dweight.to(weight.dtype)


def gather_windows(
    x: Tensor, sequences: Sequences, windows: Windows, tile: Tile = GATHER
) -> Tensor:
    """The windows of x `[T, HKV, D]`: `[T // s, HKV, l, D]`; those that no sequence owns are 0."""
    num_rows, num_heads, dim = x.shape
    num_windows = num_rows // windows.kernel_stride
    gathered = x.new_empty(num_windows, num_heads, windows.kernel_size, dim)
    if gathered.numel():
        cut = cut_hops(x, sequences, windows, tile)
        gather_windows_fwd_kernel[cut.grid](
            Rows(x, *x.stride()), gathered, *cut.layout, **cut.constants
        )
    return gathered


def gather_windows_backward(
    dwindows: Tensor, x: Tensor, sequences: Sequences, windows: Windows, tile: Tile = ROWS
) -> Tensor:
    """Gradient of `gather_windows` with respect to x; gradients of unowned windows are ignored."""
    rows = WindowRows(dwindows, *dwindows.stride())
    return _rows_gradient(rows, None, 1.0, x, sequences, windows, tile)


def _rows_gradient(
    dwindows: WindowRows,
    weight: Tensor | None,
    scale: float,
    x: Tensor,
    sequences: Sequences,
    windows: Windows,
    tile: Tile,
) -> Tensor:
    """The sum over the windows that contain a row of weight, or scale, times dwindows."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        cut = cut_hops(x, sequences, windows, tile)
        windows_bwd_kernel_dx[cut.grid](
            dwindows, weight_of(weight), dx, scale, *cut.layout, **cut.constants
        )
    return dx


def _weight_gradient(
    dpooled: Tensor, x: Tensor, sequences: Sequences, windows: Windows, tile: Tile
) -> Tensor:
    """float32 `[HKV, l]`: x times dpooled for each position, summed over the windows and D."""
    num_windows, num_heads, dim = dpooled.shape
    num_sequences = sequences.cu_seqlens.shape[0] - 1
    kernel_size = windows.kernel_size

    padded = padded_dim(dim)
    positions = min(next_power_of_2(kernel_size), max(tile.elements // padded, 1))
    chunks = cdiv(kernel_size, positions)
    per_program = cdiv(num_windows * num_heads * chunks, WEIGHT_PROGRAMS)
    per_program = max(min(per_program, WEIGHT_MAX_WINDOWS), WEIGHT_MIN_WINDOWS)
    parts = cdiv(num_windows, per_program) if dim else 0
    elements_of_warp = tile.elements // tile.warps
    warps = max(min(positions * padded // elements_of_warp, tile.warps), 1)

    partial = x.new_empty(parts, num_heads, kernel_size, dtype=torch.float32)
    if partial.numel():
        pool_windows_bwd_kernel_dweight[(parts * num_heads * chunks,)](
            Rows(dpooled, *dpooled.stride()),
            Rows(x, *x.stride()),
            partial,
            sequences.cu_seqlens,
            sequences.seqused_k,
            *(num_windows, num_heads, num_sequences, num_sequences.bit_length(), per_program),
            WINDOWS=windows,
            DIM=dim,
            PADDED_DIM=padded,
            POSITIONS=positions,
            num_warps=warps,
        )
    return partial.sum(0)
