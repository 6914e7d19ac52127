"""Compression windows in Triton: pooled (mean and weighted), or gathered for a matrix product, and the gradients of both.

Everything here is bound by memory. A row of x lies in l / s windows; of a tile of windows the ones that share a row read it
one right after the other, so that it comes from memory once. Nothing is added up with atomics: the gradient of a row gathers
from its windows, that of the weights is summed in two steps.

Sequences are cut into tiles, numbered as the blocks in sequences.py, so that a program looks up one sequence; it does so in
cu_seqlens itself, as a table would cost a launch. The one axis of programs has the heads innermost: those that run at the same
time then read whole rows of x, all heads of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.locate import find_sequence, max_num_blocks
from nsa_fsa.ops.common.primitives import kernel, store_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim


class Tile(NamedTuple):
    """How much of x, or of its gradient, a program has in flight."""

    elements: int  # rows x padded head width
    warps: int


# 16 elements a thread, two loads of 16 bytes in 16 bits. WEIGHT takes 8 warps so that a row of 128 has fewer elements than
# there are threads: Triton then loads the pooled gradient where it is needed instead of passing it through shared memory.
POOL, GATHER, ROWS, WEIGHT = Tile(2048, 4), Tile(2048, 4), Tile(2048, 4), Tile(4096, 8)
# Of the gradient of the weights: so many programs, unless a program would then add up more windows than this, one after the
# other in float32, or fewer than it takes to be worth its start.
WEIGHT_PROGRAMS, WEIGHT_MAX_WINDOWS, WEIGHT_MIN_WINDOWS = 16384, 128, 4


@triton.jit
def point_at(ptr, offsets, stride_d, PADDED_DIM: tl.constexpr):
    """Rows that begin at `offsets`, their elements stride_d apart: pointers `[M, PADDED_DIM]`.

    Triton makes a constant of a stride of 1, and 16-byte loads of such rows. Gradients expanded from one number have 0.
    """
    return ptr + (offsets[:, None] + tl.arange(0, PADDED_DIM).to(tl.int64)[None, :] * stride_d)


@triton.jit
def mask_of(inside, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """`[M] -> [M, PADDED_DIM]`, or `[M, 1]` where that says the same."""
    return inside[:, None] if DIM == PADDED_DIM else inside[:, None] & (tl.arange(0, PADDED_DIM) < DIM)[None, :]


@triton.jit
def find_tile(
    cu_seqlens_ptr, seqused_k_ptr, tile, num_sequences, num_steps,
    L: tl.constexpr, S: tl.constexpr, UNITS: tl.constexpr, HAS_USED: tl.constexpr,
):  # fmt: skip
    """The sequence that a tile of UNITS x S rows belongs to: its first row, the row after its last, how many windows it has,
    and the number of the tile's first unit inside it."""
    sequence = find_sequence(cu_seqlens_ptr, tile, num_sequences, num_steps, S * UNITS, 1)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    length = tl.load(seqused_k_ptr + sequence) if HAS_USED else end - start
    return start, end, count_windows(length, L, S), (tile - (start // (S * UNITS) + sequence)) * UNITS


@triton.jit
def count_windows(length, L: tl.constexpr, S: tl.constexpr):
    return tl.maximum(length - L + S, 0) // S  # division rounds towards 0


@triton.jit
def position_at(step, L: tl.constexpr, S: tl.constexpr):
    """The positions 0 .. L - 1 of a window in an order in which overlapping windows come to a row in successive steps."""
    return step % (L // S) * S + step // (L // S)


@kernel
def pool_windows_fwd_kernel(
    x_ptr, weight_ptr, pooled_ptr, cu_seqlens_ptr, seqused_k_ptr,
    stride_x_t, stride_x_h, stride_x_d, stride_weight_h, stride_weight_l,
    num_heads, num_sequences, num_steps,
    L: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_USED: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    start, end, num_owned, first = find_tile(
        cu_seqlens_ptr, seqused_k_ptr, tl.program_id(0) // num_heads, num_sequences, num_steps, L, S, WINDOWS, HAS_USED
    )  # fmt: skip
    if start // S + first >= end // S:  # a number that no tile owns
        return
    window = first + tl.arange(0, WINDOWS)
    inside = start // S + window < end // S
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    x_ptr += head.to(tl.int64) * stride_x_h + start * stride_x_t
    if HAS_WEIGHT:
        weight_ptr += head.to(tl.int64) * stride_weight_h
    of_head = (tl.arange(0, PADDED_DIM) < DIM)[None, :]
    acc = tl.zeros([WINDOWS, PADDED_DIM], tl.float32)
    if first < num_owned:
        # Without a mask ptxas keeps several loads in flight; with one it waits for each before it starts the next.
        x_ptrs = point_at(x_ptr, tl.minimum(window, num_owned - 1) * S * stride_x_t, stride_x_d, PADDED_DIM)
        for step in range(0, L):
            position = position_at(step, L, S)
            if DIM == PADDED_DIM:
                x = tl.load(x_ptrs + position * stride_x_t).to(tl.float32)
            else:
                x = tl.load(x_ptrs + position * stride_x_t, mask=of_head, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                acc += x * tl.load(weight_ptr + position * stride_weight_l).to(tl.float32)
            else:
                acc += x
    if not HAS_WEIGHT:
        acc *= 1.0 / L
    acc = tl.where((window < num_owned)[:, None], acc, 0.0)
    at = ((start // S + window).to(tl.int64) * num_heads + head) * DIM
    store_rows(pooled_ptr, at, acc, inside, DIM, PADDED_DIM)


@kernel
def gather_windows_fwd_kernel(
    x_ptr, windows_ptr, cu_seqlens_ptr, seqused_k_ptr,
    stride_x_t, stride_x_h, stride_x_d,
    num_heads, num_sequences, num_steps,
    L: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    HAS_USED: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % num_heads
    start, end, num_owned, first = find_tile(
        cu_seqlens_ptr, seqused_k_ptr, tl.program_id(0) // num_heads, num_sequences, num_steps, L, S, WINDOWS, HAS_USED
    )  # fmt: skip
    if start // S + first >= end // S:  # a number that no tile owns
        return
    window = first + tl.arange(0, WINDOWS)
    inside = start // S + window < end // S
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    x_ptr += head.to(tl.int64) * stride_x_h + start * stride_x_t
    x_ptrs = point_at(x_ptr, window * S * stride_x_t, stride_x_d, PADDED_DIM)
    to_ptrs = point_at(windows_ptr, ((start // S + window).to(tl.int64) * num_heads + head) * (L * DIM), 1, PADDED_DIM)
    owned, inside = mask_of(window < num_owned, DIM, PADDED_DIM), mask_of(inside, DIM, PADDED_DIM)
    for step in range(0, L):
        position = position_at(step, L, S)
        x = tl.load(x_ptrs + position * stride_x_t, mask=owned, other=0.0)
        tl.store(to_ptrs + position * DIM, x, mask=inside)


@kernel
def windows_bwd_kernel_dx(
    dwindows_ptr, weight_ptr, dx_ptr, cu_seqlens_ptr, seqused_k_ptr,
    stride_dwindows_n, stride_dwindows_h, stride_dwindows_l, stride_dwindows_d, stride_weight_h, stride_weight_l, scale,
    num_heads, num_sequences, num_steps,
    L: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_USED: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """dwindows `[N, HKV, L, D]`; the gradient of a pooled window is that of each of its rows: a stride of 0.

    All S rows of unit u lie in the windows u, u - 1, .. u - L / S + 1 of their sequence.
    """
    head = tl.program_id(0) % num_heads
    start, end, num_owned, first = find_tile(
        cu_seqlens_ptr, seqused_k_ptr, tl.program_id(0) // num_heads, num_sequences, num_steps, L, S, UNITS, HAS_USED
    )  # fmt: skip
    if start + first * S >= end:  # a number that no tile owns
        return
    unit = first + tl.arange(0, UNITS)
    row = start + unit * S
    stride_dwindows_n, stride_dwindows_l = tl.cast(stride_dwindows_n, tl.int64), tl.cast(stride_dwindows_l, tl.int64)
    dwindows_ptr += head.to(tl.int64) * stride_dwindows_h + start // S * stride_dwindows_n
    if HAS_WEIGHT:
        weight_ptr += head.to(tl.int64) * stride_weight_h
    d_ptrs = point_at(dwindows_ptr, unit * stride_dwindows_n, stride_dwindows_d, PADDED_DIM)
    dx_ptrs = point_at(dx_ptr, (row.to(tl.int64) * num_heads + head) * DIM, 1, PADDED_DIM)
    for step in range(0, S):
        acc = tl.zeros([UNITS, PADDED_DIM], tl.float32)
        for back in range(0, L // S):
            position = back * S + step
            contains = mask_of((unit >= back) & (unit - back < num_owned), DIM, PADDED_DIM)
            offset = position * stride_dwindows_l - back * stride_dwindows_n
            d = tl.load(d_ptrs + offset, mask=contains, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                acc += d * tl.load(weight_ptr + position * stride_weight_l).to(tl.float32)
            else:
                acc += d
        if not HAS_WEIGHT:
            acc *= scale
        inside = mask_of(row + step < end, DIM, PADDED_DIM)
        tl.store(dx_ptrs + step * tl.cast(num_heads, tl.int64) * DIM, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def pool_windows_bwd_kernel_dweight(
    dpooled_ptr, x_ptr, partial_ptr, cu_seqlens_ptr, seqused_k_ptr,
    stride_dpooled_n, stride_dpooled_h, stride_dpooled_d, stride_x_t, stride_x_h, stride_x_d,
    num_windows, num_heads, num_sequences, num_steps, windows_per_program,
    L: tl.constexpr, S: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    HAS_USED: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Sums over some successive windows, for POSITIONS positions of the window: partial `[parts, HKV, L]`."""
    NUM_CHUNKS: tl.constexpr = (L + POSITIONS - 1) // POSITIONS
    MASKED: tl.constexpr = L % POSITIONS != 0 or DIM != PADDED_DIM
    chunk = tl.program_id(0) % NUM_CHUNKS
    head = tl.program_id(0) // NUM_CHUNKS % num_heads
    part = tl.program_id(0) // NUM_CHUNKS // num_heads
    position = chunk * POSITIONS + tl.arange(0, POSITIONS)
    column = tl.arange(0, PADDED_DIM)
    stride_x_t, stride_dpooled_n = tl.cast(stride_x_t, tl.int64), tl.cast(stride_dpooled_n, tl.int64)
    x_ptr += head.to(tl.int64) * stride_x_h
    x_ptrs = point_at(x_ptr, position * stride_x_t, stride_x_d, PADDED_DIM)
    dpooled_ptrs = dpooled_ptr + (head.to(tl.int64) * stride_dpooled_h + column.to(tl.int64) * stride_dpooled_d)
    in_window = mask_of(position < L, DIM, PADDED_DIM)
    acc = tl.zeros([POSITIONS, PADDED_DIM], tl.float32)  # summed over D at the end only: a step has no shuffles
    row = part * windows_per_program
    last = tl.load(cu_seqlens_ptr + num_sequences) // S  # where cu_seqlens ends too early, what lies behind it is no sequence
    stop = tl.minimum(row + windows_per_program, tl.minimum(num_windows, last))
    sequence = find_sequence(cu_seqlens_ptr, row, num_sequences, num_steps, S, 0)
    while row < stop:  # a sequence's share of the rows of dpooled
        start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
        length = tl.load(seqused_k_ptr + sequence) if HAS_USED else end - start
        first = start // S
        for window in tl.range(row, tl.minimum(first + count_windows(length, L, S), stop), loop_unroll_factor=2):
            at = x_ptrs + (start + (window - first) * S) * stride_x_t
            x = tl.load(at, mask=in_window, other=0.0) if MASKED else tl.load(at)
            at = dpooled_ptrs + window * stride_dpooled_n
            d = tl.load(at) if DIM == PADDED_DIM else tl.load(at, mask=column < DIM, other=0.0)
            acc += x.to(tl.float32) * d.to(tl.float32)[None, :]
        row = end // S
        sequence += 1
    tl.store(partial_ptr + (part.to(tl.int64) * num_heads + head) * L + position, tl.sum(acc, 1), mask=position < L)


def pool_windows(
    x: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
    tile: Tile = POOL,
) -> Tensor:
    """x `[T, HKV, D]`, weight `[HKV, l]` (None: the mean) -> weighted sums of the windows `[T // s, HKV, D]`."""
    num_windows, num_heads, dim = x.shape[0] // kernel_stride, *x.shape[1:]
    pooled = x.new_empty(num_windows, num_heads, dim)
    if pooled.numel():
        num_sequences, padded = cu_seqlens.shape[0] - 1, padded_dim(dim)
        windows = max(tile.elements // padded, 1)
        num_tiles = max_num_blocks(num_windows, num_sequences, windows)
        pool_windows_fwd_kernel[(num_tiles * num_heads,)](
            x, weight, pooled, cu_seqlens, seqused_k,
            *x.stride(), *(weight.stride() if weight is not None else (0, 0)),
            num_heads, num_sequences, num_sequences.bit_length(),
            L=kernel_size, S=kernel_stride, DIM=dim, PADDED_DIM=padded,
            HAS_WEIGHT=weight is not None, HAS_USED=seqused_k is not None, WINDOWS=windows, num_warps=tile.warps,
        )  # fmt: skip
    return pooled


def pool_windows_backward(
    dpooled: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
    tile_dx: Tile = ROWS,
    tile_dweight: Tile = WEIGHT,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `pool_windows` with respect to x and weight (None for the mean)."""
    stride_n, stride_h, stride_d = dpooled.stride()
    sizes = (kernel_size, kernel_stride, seqused_k)
    dx = _rows_gradient(dpooled, (stride_n, stride_h, 0, stride_d), weight, 1 / kernel_size, x, cu_seqlens, *sizes, tile_dx)
    if weight is None:
        return dx, None
    return dx, _weight_gradient(dpooled, x, cu_seqlens, *sizes, tile_dweight).to(weight.dtype)


def gather_windows(
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
    tile: Tile = GATHER,
) -> Tensor:
    """x `[T, HKV, D]` -> its windows `[T // s, HKV, l, D]`; rows that no sequence owns are 0."""
    num_windows, num_heads, dim = x.shape[0] // kernel_stride, *x.shape[1:]
    gathered = x.new_empty(num_windows, num_heads, kernel_size, dim)
    if gathered.numel():
        num_sequences, padded = cu_seqlens.shape[0] - 1, padded_dim(dim)
        windows = max(tile.elements // padded, 1)
        num_tiles = max_num_blocks(num_windows, num_sequences, windows)
        gather_windows_fwd_kernel[(num_tiles * num_heads,)](
            x, gathered, cu_seqlens, seqused_k, *x.stride(),
            num_heads, num_sequences, num_sequences.bit_length(),
            L=kernel_size, S=kernel_stride, DIM=dim, PADDED_DIM=padded,
            HAS_USED=seqused_k is not None, WINDOWS=windows, num_warps=tile.warps,
        )  # fmt: skip
    return gathered


def gather_windows_backward(
    dwindows: Tensor,
    x: Tensor,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    seqused_k: Tensor | None = None,
    tile: Tile = ROWS,
) -> Tensor:
    """Gradient of `gather_windows` with respect to x; gradients of unowned rows are ignored."""
    return _rows_gradient(dwindows, dwindows.stride(), None, 1.0, x, cu_seqlens, kernel_size, kernel_stride, seqused_k, tile)


def _rows_gradient(
    dwindows: Tensor, strides: tuple[int, ...], weight: Tensor | None, scale: float, x: Tensor, cu_seqlens: Tensor,
    kernel_size: int, kernel_stride: int, seqused_k: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """The sum over the windows that contain a row of weight, or scale, times dwindows, whose strides are of `[N, H, L, D]`."""
    num_rows, num_heads, dim = x.shape
    dx = x.new_empty(x.shape)
    if dx.numel():
        num_sequences, padded = cu_seqlens.shape[0] - 1, padded_dim(dim)
        units = max(tile.elements // padded, 1)
        num_tiles = max_num_blocks(num_rows, num_sequences, kernel_stride * units)
        windows_bwd_kernel_dx[(num_tiles * num_heads,)](
            dwindows, weight, dx, cu_seqlens, seqused_k,
            *strides, *(weight.stride() if weight is not None else (0, 0)), scale,
            num_heads, num_sequences, num_sequences.bit_length(),
            L=kernel_size, S=kernel_stride, DIM=dim, PADDED_DIM=padded,
            HAS_WEIGHT=weight is not None, HAS_USED=seqused_k is not None, UNITS=units, num_warps=tile.warps,
        )  # fmt: skip
    return dx


def _weight_gradient(
    dpooled: Tensor, x: Tensor, cu_seqlens: Tensor,
    kernel_size: int, kernel_stride: int, seqused_k: Tensor | None, tile: Tile,
) -> Tensor:  # fmt: skip
    """float32 `[HKV, l]`: what each position of the windows has in common with the gradient, summed over windows and D."""
    num_windows, num_heads, dim = dpooled.shape
    num_sequences, padded = cu_seqlens.shape[0] - 1, padded_dim(dim)
    positions = min(next_power_of_2(kernel_size), max(tile.elements // padded, 1))
    chunks = cdiv(kernel_size, positions)
    windows = cdiv(num_windows * num_heads * chunks, WEIGHT_PROGRAMS)
    windows = max(min(windows, WEIGHT_MAX_WINDOWS), WEIGHT_MIN_WINDOWS)
    parts = cdiv(num_windows, windows) if dim else 0
    partial = x.new_empty(parts, num_heads, kernel_size, dtype=torch.float32)
    if partial.numel():
        pool_windows_bwd_kernel_dweight[(parts * num_heads * chunks,)](
            dpooled, x, partial, cu_seqlens, seqused_k, *dpooled.stride(), *x.stride(),
            num_windows, num_heads, num_sequences, num_sequences.bit_length(), windows,
            L=kernel_size, S=kernel_stride, DIM=dim, PADDED_DIM=padded,
            HAS_USED=seqused_k is not None, POSITIONS=positions,
            num_warps=max(min(positions * padded // (tile.elements // tile.warps), tile.warps), 1),
        )  # fmt: skip
    return partial.sum(0)
