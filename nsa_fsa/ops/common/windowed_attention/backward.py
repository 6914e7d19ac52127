"""Compressed attention, backward, in two passes that compute the scores anew, or in one.

statistics  see `softmax_statistics`. dq          a program owns a tile of (query, head) rows, as in
the forward, and walks the compressed tokens. dk, dv      a program owns a tile of compressed tokens
and walks the rows that see them, or one of several parts of these, whose sums `sum_parts` adds:
where there are few KV heads there are too few tiles to fill a GPU.

Nothing is added atomically, so the result is the same in every run. On Hopper, and for long
sequences, the pass of dk and dv adds up dq as well, in float32 and by bulk steps: five products
instead of seven, but in no fixed order. Deterministic algorithms keep to two passes.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import heads
from nsa_fsa.ops.common.calls import NOTHING, AddTo, AttentionGradients, Softmax
from nsa_fsa.ops.common.locate import Tiles, load_tile, locate_tiles
from nsa_fsa.ops.common.primitives import (
    LOG2_E,
    add_product,
    dot_keys,
    kernel,
    load_rows,
    softmax_of,
    store_rows,
)
from nsa_fsa.ops.common.sizes import cdiv, head_chunks, padded_dim, rows_contiguous
from nsa_fsa.ops.common.softmax_statistics import Statistics, statistics
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.common.windowed_attention.forward import hopper, num_multiprocessors, prepared
from nsa_fsa.ops.common.windowed_attention.tiles import (
    count_windows,
    is_seen,
    key_tile_work,
    load_heads,
    query_tile,
    rows_of,
    rows_that_see,
    shape_of,
    visible_windows,
    window_constant,
)

SUMMED_KEYS = 16  # that a program of `sum_parts_kernel` adds up; tiles of keys are whole multiples


class Parts(NamedTuple):
    """A gradient `[P, T, H, D]` whose rows are contiguous, in a kernel: every part of the queries
    has its own sums.
    """

    ptr: Any
    stride_p: Any
    stride_t: Any
    stride_h: Any


class Inputs(NamedTuple):
    """What both passes read."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    statistics: Statistics  # [HKV, T, G] each

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def of(self, query_heads: slice, kv_heads: slice) -> "Inputs":
        """Those of some heads alone, as views."""
        shift, delta = self.statistics
        return Inputs(
            self.q[:, query_heads],
            self.k[:, kv_heads],
            self.v[:, kv_heads],
            self.do[:, query_heads],
            Statistics(shift[kv_heads], delta[kv_heads]),
        )


class KeyCut(NamedTuple):
    """How dk and dv are cut into programs: a tile of keys of a head,
    and a part of the rows that see it.
    """

    tiles: Tiles  # of one head
    num_parts: int
    part_rows: int  # (query, head) pairs


@kernel
def compressed_bwd_dq_kernel(
    q,
    k,
    v,
    do,
    statistics,
    dq_ptr,
    tiles_ptr,
    scale2,
    scale,
    num_heads,
    num_tiles,
    num_rows,
    num_sequences,
    WINDOWS: tl.constexpr,
    WINDOW: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a tile of (query, head) rows, from the windows that some of them see."""

    G: tl.constexpr = SHAPE.G
    D: tl.constexpr = SHAPE.D
    PADDED_D: tl.constexpr = SHAPE.PADDED_D
    DV: tl.constexpr = SHAPE.DV
    PADDED_DV: tl.constexpr = SHAPE.PADDED_DV

    number = tl.program_id(0)
    tile = query_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, WINDOWS, BLOCK_M // G)
    if tile.num_queries <= 0:
        return
    head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    inside = row < tile.num_queries * G
    visible = visible_windows(tile.position + row // G, tile.num_keys, tile.num_windows, WINDOWS)
    rows = rows_of(row, inside, tile.first_query, head, G)
    q_tile = load_heads(q, rows, D, PADDED_D)
    do_tile = load_heads(do, rows, DV, PADDED_DV)
    statistic = (head * num_rows + tile.first_query) * G + row
    shift = tl.load(statistics.shift + statistic, mask=rows.inside, other=float("-inf"))
    delta = tl.load(statistics.delta + statistic, mask=rows.inside, other=0.0)

    k_ptr = k.ptr + tile.first_window.to(tl.int64) * k.stride_t + head * k.stride_h
    v_ptr = v.ptr + tile.first_window.to(tl.int64) * v.stride_t + head * v.stride_h
    dq = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(tile.position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    for start in tl.range(first, tile.most, BLOCK_N, num_stages=NUM_STAGES):
        window = start + tl.arange(0, BLOCK_N)
        exists = window < tile.num_windows
        k_tile = load_rows(k_ptr, window.to(tl.int64) * k.stride_t, exists, D, PADDED_D, True)
        v_tile = load_rows(v_ptr, window.to(tl.int64) * v.stride_t, exists, DV, PADDED_DV, True)

        scores = dot_keys(q_tile, k_tile, PRECISION)
        seen = is_seen(window, visible, WINDOW)
        p = tl.where(seen, softmax_of(scores, shift[:, None], scale2, PRECISION), 0.0)
        dp = dot_keys(do_tile, v_tile, PRECISION)
        ds = (p * (dp + delta[:, None])).to(k_tile.dtype)
        dq = add_product(dq, ds, k_tile, PRECISION)

    dq *= scale
    target = (rows.query * num_heads + rows.head) * D
    if ACCUMULATE:
        dq += load_rows(dq_ptr, target, rows.inside, D, PADDED_D, True).to(tl.float32)
    store_rows(dq_ptr, target, dq, rows.inside, D, PADDED_D)


@kernel
def compressed_bwd_dkdv_kernel(
    q,
    k,
    v,
    do,
    statistics,
    dk,
    dv,
    tiles_ptr,
    scale2,
    scale,
    num_tiles,
    num_rows,
    num_sequences,
    part_rows,
    WINDOWS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a tile of windows, from a part of the rows that see some of them."""

    G: tl.constexpr = SHAPE.G
    D: tl.constexpr = SHAPE.D
    PADDED_D: tl.constexpr = SHAPE.PADDED_D
    DV: tl.constexpr = SHAPE.DV
    PADDED_DV: tl.constexpr = SHAPE.PADDED_DV

    work = key_tile_work(num_tiles, HEADS)
    head = work.head.to(tl.int64)
    ALIKE: tl.constexpr = tiles_ptr is None
    tile = load_tile(tiles_ptr, num_tiles, work.tile, num_rows, num_sequences, True, ALIKE)
    first_window = tile.number * BLOCK_N
    num_keys = count_windows(tile.num_keys, WINDOWS) - first_window
    if (tile.num_queries == 0) | (num_keys <= 0):
        return
    seen_by = rows_that_see(tile, first_window, work.part, part_rows, WINDOWS, G)
    end = seen_by.end
    if WINDOW > 0:
        end = tl.minimum(end, seen_by.first + (BLOCK_N - 1 + WINDOW) * G)

    key = tl.arange(0, BLOCK_N)
    exists = key < num_keys
    window = (tile.first_key // WINDOWS.kernel_stride + first_window + key).to(tl.int64)
    k_tile = load_rows(k.ptr + head * k.stride_h, window * k.stride_t, exists, D, PADDED_D, True)
    v_tile = load_rows(v.ptr + head * v.stride_h, window * v.stride_t, exists, DV, PADDED_DV, True)
    statistic = (head * num_rows + tile.first_query) * G
    dk_tile = tl.zeros([BLOCK_N, PADDED_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, PADDED_DV], tl.float32)

    for start in tl.range(seen_by.begin, end, BLOCK_M, num_stages=NUM_STAGES):
        row = start + tl.arange(0, BLOCK_M)
        rows = rows_of(row, row < end, tile.first_query, head, G)
        q_tile = load_heads(q, rows, D, PADDED_D)
        do_tile = load_heads(do, rows, DV, PADDED_DV)
        shift = tl.load(statistics.shift + statistic + row, mask=rows.inside, other=float("-inf"))
        delta = tl.load(statistics.delta + statistic + row, mask=rows.inside, other=0.0)

        # Scores are transposed, [keys, rows], so that p and ds feed the matrix unit from registers.
        scores = dot_keys(k_tile, q_tile, PRECISION)
        p = softmax_of(scores, shift[None, :], scale2, PRECISION)
        first_row = seen_by.first + key * (WINDOWS.kernel_stride * G)
        p = tl.where(row[None, :] >= first_row[:, None], p, 0.0)
        if WINDOW > 0:
            p = tl.where(row[None, :] < (seen_by.first + (key + WINDOW) * G)[:, None], p, 0.0)
        dv_tile = add_product(dv_tile, p.to(do_tile.dtype), do_tile, PRECISION)
        dp = dot_keys(v_tile, do_tile, PRECISION)
        ds = (p * (dp + delta[None, :])).to(q_tile.dtype)
        dk_tile = add_product(dk_tile, ds, q_tile, PRECISION)

    part = work.part.to(tl.int64)
    dk_ptr = dk.ptr + part * dk.stride_p + head * dk.stride_h
    dv_ptr = dv.ptr + part * dv.stride_p + head * dv.stride_h
    store_rows(dk_ptr, window * dk.stride_t, dk_tile * scale, exists, D, PADDED_D)
    store_rows(dv_ptr, window * dv.stride_t, dv_tile, exists, DV, PADDED_DV)


@kernel
def sum_parts_kernel(
    parts_ptr,
    dk,
    dv,
    tiles_ptr,
    stride_p,
    num_tiles,
    num_rows,
    num_sequences,
    num_heads,
    num_parts,
    WINDOWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Adds up the parts of KEYS rows of dk and dv, which lie side by side in
    `[P, T, H, D + DV]`.
    """

    pieces = TILE_KEYS // KEYS
    tile_number, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    head = tl.program_id(1).to(tl.int64)
    ALIKE: tl.constexpr = tiles_ptr is None
    tile = load_tile(tiles_ptr, num_tiles, tile_number, num_rows, num_sequences, True, ALIKE)
    key = tile.number * TILE_KEYS + piece * KEYS + tl.arange(0, KEYS)
    exists = (key < count_windows(tile.num_keys, WINDOWS)) & (tile.num_queries > 0)
    row = (tile.first_key // WINDOWS.kernel_stride + key).to(tl.int64)

    total = tl.zeros([KEYS, PADDED], tl.float32)
    at = (row * num_heads + head) * (D + DV)
    for _ in tl.range(0, num_parts, num_stages=3):
        total += load_rows(parts_ptr, at, exists, D + DV, PADDED, True)
        at += stride_p

    column = tl.arange(0, PADDED)[None, :]
    of_k = exists[:, None] & (column < D)
    at = (row * dk.stride_t + head * dk.stride_h)[:, None] + column
    tl.store(dk.ptr + at, total.to(dk.ptr.dtype.element_ty), mask=of_k)
    of_v = exists[:, None] & (column >= D) & (column < D + DV)
    at = (row * dv.stride_t + head * dv.stride_h)[:, None] + column - D
    tl.store(dv.ptr + at, total.to(dv.ptr.dtype.element_ty), mask=of_v)


@kernel
def scale_rows_kernel(
    dq,
    sums_ptr,
    scale,
    num_heads,
    total,
    ACCUMULATE: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS of the `total` rows of dq `[T * H, D]` become scale * sums, or that is added to them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    at = row // num_heads * dq.stride_t + row % num_heads * dq.stride_h
    scaled = load_rows(sums_ptr, row * D, inside, D, PADDED_D, True) * scale
    if ACCUMULATE:
        scaled += load_rows(dq.ptr, at, inside, D, PADDED_D, True).to(tl.float32)
    store_rows(dq.ptr, at, scaled, inside, D, PADDED_D)


def scale_rows(dq: Tensor, sums: Tensor, scale: float, accumulate: bool) -> None:
    """dq `[T, H, D]`, whose heads may be some of a larger tensor's, becomes scale * sums, or that
    is added to it.
    """
    num_rows, num_heads, head_dim = dq.shape
    rows, total = 32, num_rows * num_heads
    scale_rows_kernel[(cdiv(total, rows),)](
        *(heads(dq), sums, scale, num_heads, total),
        ACCUMULATE=accumulate,
        D=head_dim,
        PADDED_D=padded_dim(head_dim),
        ROWS=rows,
    )


@functools.cache
def hopper_backward() -> Any:
    """The Gluon kernels of the backward, imported as those of the forward by `hopper`."""
    from nsa_fsa.ops.common.windowed_attention import hopper_backward

    return hopper_backward


def cut_rows(
    max_seqlen: int, group_size: int, num_tiles: int | None, config: tuning.CompressedConfig
) -> tuple[int, int]:
    """Into how many parts, and of how many rows each, the (query, head) rows of the longest
    sequence are cut for dk and dv.

    Args:
        max_seqlen: the longest sequence, in tokens.
        group_size: query heads of a KV head.
        num_tiles: tiles of keys, those of all KV heads, which are as many programs without any cut;
            None for one pass, which is for sequences that have enough of them.
        config: says how many programs are wanted.
    """
    num_rows = max_seqlen * group_size
    if num_tiles is None:
        parts = min(cdiv(num_rows, config.one_pass_part_rows), config.one_pass_parts)
    else:
        parts = min(cdiv(config.dkdv_programs, num_tiles), cdiv(num_rows, config.dkdv_part_rows))
    # A part has whole tiles, and whole queries because the Gluon kernel counts queries from the
    # first of the part.
    whole = math.lcm(config.dkdv_m, group_size)
    return parts, cdiv(cdiv(num_rows, max(parts, 1)), whole) * whole


def windowed_attention_bwd(
    call: WindowedCall,
    do: Tensor,
    softmax: Softmax,
    add_to: AddTo = NOTHING,
    config: tuning.CompressedConfig | None = None,
) -> AttentionGradients:
    """Gradients of q, k and v, each in its own shape and dtype; rows that no window owns get 0.

    The workspace is for float32 sums, where one pass computes all gradients.
    """
    num_windows, num_kv_heads = call.v.shape[:2]
    group_size = call.group_size
    config = config or tuning.compressed_config(
        call.q, call.v, group_size, call.window_size is not None
    )
    q, k, v = prepared(call, config.hopper)
    do = rows_contiguous(do, config.hopper)

    accumulate = add_to.q is not None
    dq = q.new_empty(q.shape) if add_to.q is None else add_to.q
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    if q.numel() == 0 or do.numel() == 0:
        return add_to.add((q.new_zeros(q.shape), dk, dv))

    inputs = Inputs(q, k, v, do, statistics(do, softmax, call.scale, group_size))
    if num_windows and in_one_pass(config, group_size, call.sequences.max_seqlen):
        one_head = bytes_of_kv_head(inputs, call, config)
        chunks = head_chunks(num_kv_heads, group_size, one_head, call.workspace_bytes)
        for query_heads, kv_heads in chunks:
            of_heads = (dq[:, query_heads], dk[:, kv_heads], dv[:, kv_heads])
            run_one_pass(inputs.of(query_heads, kv_heads), call, config, *of_heads, accumulate)
    else:
        run_dq(inputs, call, config, dq, accumulate)
        if num_windows:
            run_dkdv(inputs, call, config, dk, dv)
    return AddTo(None, add_to.k, add_to.v).add((dq, dk, dv))


def in_one_pass(config: tuning.CompressedConfig, group_size: int, max_seqlen: int) -> bool:
    """Whether the kernel of dk and dv adds up dq as well: in no fixed order, and by bulk steps of
    whole tiles.
    """
    whole_groups = config.dkdv_m % group_size == 0
    if not config.hopper or not whole_groups or torch.are_deterministic_algorithms_enabled():
        return False
    return max_seqlen >= config.one_pass_tokens


def bytes_of_kv_head(inputs: Inputs, call: WindowedCall, config: tuning.CompressedConfig) -> int:
    """What one pass takes for a KV head: float32 sums of dq, and the parts of dk and dv."""
    num_rows, _, head_dim = inputs.q.shape
    num_windows, _, v_dim = inputs.v.shape
    group_size = inputs.group_size
    parts, _ = cut_rows(call.sequences.max_seqlen, group_size, None, config)
    of_parts = parts * num_windows * (head_dim + v_dim) if parts > 1 else 0
    return 4 * (num_rows * group_size * head_dim + of_parts)


def run_one_pass(
    inputs: Inputs,
    call: WindowedCall,
    config: tuning.CompressedConfig,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool,
) -> None:
    """Writes all three gradients, whose heads may be some of larger tensors', or adds to dq."""
    sums = inputs.q.new_zeros(inputs.q.shape, dtype=torch.float32)
    run_dkdv(inputs, call, config, dk, dv, sums)
    scale_rows(dq, sums, call.scale, accumulate)


def run_dq(
    inputs: Inputs,
    call: WindowedCall,
    config: tuning.CompressedConfig,
    dq: Tensor,
    accumulate: bool,
) -> None:
    """Writes dq, or adds to it."""
    (num_rows, num_heads), num_kv_heads = inputs.q.shape[:2], inputs.k.shape[1]
    group_size = inputs.group_size
    q, k, v, do, found = inputs

    tiles = locate_tiles(num_rows, call.sequences, config.dq_m // group_size)
    tensors = (heads(q), heads(k), heads(v))
    sizes = (num_heads, tiles.number, num_rows, tiles.num_sequences)
    constants = dict(
        WINDOWS=call.windows, ACCUMULATE=accumulate, SHAPE=shape_of(q, v), BLOCK_N=config.dq_n
    )

    if config.hopper:
        num_work = tiles.number * num_kv_heads
        hopper_backward().compressed_bwd_dq_hopper_kernel[(min(num_work, num_multiprocessors(q)),)](
            *tensors,
            *hopper().head_columns((k, v), config.dq_n),
            *(heads(do), found, dq, tiles.table),
            *(call.scale * LOG2_E, call.scale),
            *(*sizes, num_work),
            **constants,
            STAGES=config.dq_stages,
            SLOTS=config.dq_slots,
            REGISTERS=config.dq_registers,
            num_warps=4,
        )
        return

    compressed_bwd_dq_kernel[tiles.number, num_kv_heads](
        *tensors,
        *(heads(do), found, dq, tiles.table),
        *(call.scale * LOG2_E, call.scale),
        *sizes,
        **constants,
        WINDOW=window_constant(call.window_size, group_size),
        BLOCK_M=config.dq_m,
        NUM_STAGES=config.dq_stages,
        PRECISION=tuning.dot_precision(q.dtype),
        num_warps=config.dq_warps,
    )


def cut_keys(
    inputs: Inputs, call: WindowedCall, config: tuning.CompressedConfig, one_pass: bool
) -> KeyCut:
    """The programs of dk and dv."""
    num_windows, num_kv_heads = inputs.k.shape[:2]
    kernel_stride, group_size = call.windows.kernel_stride, inputs.group_size
    tiles = locate_tiles(
        inputs.q.shape[0],
        call.sequences,
        config.dkdv_n * kernel_stride,
        num_keys=num_windows * kernel_stride,
        hop=kernel_stride,
    )
    if call.window_size is not None:  # few rows see a tile: they are one part
        config = dataclasses.replace(config, dkdv_programs=1)
    uncut = None if one_pass else tiles.number * num_kv_heads
    return KeyCut(tiles, *cut_rows(call.sequences.max_seqlen, group_size, uncut, config))


def run_dkdv(
    inputs: Inputs,
    call: WindowedCall,
    config: tuning.CompressedConfig,
    dk: Tensor,
    dv: Tensor,
    dq_sums: Tensor | None = None,
) -> None:
    """Writes dk and dv, whose heads may be some of larger tensors'.

    With dq_sums, float32 `[T, HQ, D]`, dq / scale is added to it.
    """
    cut = cut_keys(inputs, call, config, dq_sums is not None)
    if cut.num_parts <= 1:
        launch_dkdv(inputs, call, config, cut, parts_of(dk, dv), dq_sums)
        return
    of_each = (dk.shape[2], dv.shape[2])
    sums = dk.new_empty(cut.num_parts, *dk.shape[:2], sum(of_each), dtype=torch.float32)
    launch_dkdv(inputs, call, config, cut, parts_of(*sums.split(of_each, 3)), dq_sums)
    sum_parts(sums, dk, dv, inputs.q.shape[0], call, config, cut)


def launch_dkdv(
    inputs: Inputs,
    call: WindowedCall,
    config: tuning.CompressedConfig,
    cut: KeyCut,
    targets: tuple[Parts, Parts],
    dq_sums: Tensor | None,
) -> None:
    """Launches the kernel of dk and dv."""
    q, k, v, do, found = inputs
    num_kv_heads, group_size, one_pass = k.shape[1], inputs.group_size, dq_sums is not None
    heads_at_a_time = 1 if one_pass else math.gcd(num_kv_heads, config.dkdv_heads)

    grid = (cut.tiles.number * num_kv_heads, cut.num_parts)
    tensors = (heads(q), heads(k), heads(v), heads(do))
    sizes = (cut.tiles.number, q.shape[0], cut.tiles.num_sequences, cut.part_rows)
    constants = dict(
        WINDOWS=call.windows, HEADS=heads_at_a_time, SHAPE=shape_of(q, v), BLOCK_M=config.dkdv_m
    )

    if config.hopper:
        hopper_backward().compressed_bwd_dkdv_hopper_kernel[grid](
            *tensors,
            *row_copies(inputs, dq_sums, config.dkdv_m),
            *(found, *targets, cut.tiles.table, call.scale * LOG2_E),
            *sizes,
            **constants,
            STAGES=config.one_pass_stages if one_pass else config.dkdv_stages,
            REGISTERS=config.dkdv_registers,
            num_warps=4,
        )
        return

    compressed_bwd_dkdv_kernel[grid](
        *tensors,
        *(found, *targets, cut.tiles.table, call.scale * LOG2_E, call.scale),
        *sizes,
        **constants,
        WINDOW=window_constant(call.window_size, group_size),
        BLOCK_N=config.dkdv_n,
        NUM_STAGES=config.dkdv_stages,
        PRECISION=tuning.dot_precision(q.dtype),
        num_warps=config.dkdv_warps,
    )


def parts_of(dk: Tensor, dv: Tensor) -> tuple[Parts, Parts]:
    """The bundles of gradients in parts, `[P, T, HKV, D]`, or whole, `[T, HKV, D]`."""
    return Parts(dk, *(0, *dk.stride())[-4:-1]), Parts(dv, *(0, *dv.stride())[-4:-1])


def row_copies(inputs: Inputs, dq_sums: Tensor | None, tile_rows: int) -> tuple[Any, Any, Any]:
    """Descriptors for bulk copies of q, do and dq_sums: none where groups do not fill a tile, or
    for dq_sums without any.
    """
    group_size, head_dim = inputs.group_size, inputs.q.shape[2]
    if tile_rows % group_size != 0:
        return None, None, None
    block = (tile_rows // group_size, group_size)
    q, do = (hopper().describe(x, *block, head_dim) for x in (inputs.q, inputs.do))
    return q, do, None if dq_sums is None else hopper().describe(dq_sums, *block, head_dim // 2)


def sum_parts(
    sums: Tensor,
    dk: Tensor,
    dv: Tensor,
    num_rows: int,
    call: WindowedCall,
    config: tuning.CompressedConfig,
    cut: KeyCut,
) -> None:
    """dk and dv from their parts `[P, T, HKV, D + DV]`."""
    num_kv_heads, head_dim, v_dim = *dk.shape[1:], dv.shape[2]
    num_pieces = cut.tiles.number * (config.dkdv_n // SUMMED_KEYS)
    sum_parts_kernel[num_pieces, num_kv_heads](
        *(sums, heads(dk), heads(dv), cut.tiles.table, sums.stride(0)),
        *(cut.tiles.number, num_rows, cut.tiles.num_sequences, num_kv_heads, cut.num_parts),
        WINDOWS=call.windows,
        TILE_KEYS=config.dkdv_n,
        D=head_dim,
        DV=v_dim,
        PADDED=padded_dim(head_dim + v_dim),
        KEYS=SUMMED_KEYS,
        num_warps=4,
    )
