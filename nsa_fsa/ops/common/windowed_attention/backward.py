"""Compressed attention, backward, in two passes that compute the scores anew, or in one.

    statistics  see `softmax_statistics`.
    dq          A program owns a tile of pairs, as in the forward, and walks the compressed tokens.
    dk, dv      A program owns a tile of compressed tokens and walks the pairs that see them, or one
                of several parts of these, whose sums `sum_parts` adds: where there are few KV heads
                there are too few tiles to fill a GPU.

Nothing is added atomically, so the result is the same in every run. On Hopper, and for long
sequences, the pass of dk and dv adds up dq as well, in float32 and by bulk additions: five products
instead of seven, but in no fixed order. Deterministic algorithms keep to two passes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import heads
from nsa_fsa.ops.common.calls import NOTHING, AddTo, AttentionGradients, Softmax
from nsa_fsa.ops.common.locate import Tiles, count_windows, load_tile, locate_tiles
from nsa_fsa.ops.common.primitives import (
    add_product,
    dot_keys,
    kernel,
    load_pairs,
    load_rows,
    softmax_of,
    store_rows,
)
from nsa_fsa.ops.common.sizes import cdiv, head_chunks, padded_dim, rows_contiguous
from nsa_fsa.ops.common.softmax_statistics import Statistics, statistics
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall

# What the forward and the backward share.
from nsa_fsa.ops.common.windowed_attention.forward import (
    config_of,
    hopper,
    num_multiprocessors,
    plain_tile,
    prepared,
)
from nsa_fsa.ops.common.windowed_attention.heads import (
    load_keys,
    load_statistics,
    of_head,
    scaled,
    store_or_add,
)
from nsa_fsa.ops.common.windowed_attention.tiles import (
    is_seen,
    key_tile_work,
    pairs_of,
    pairs_of_tile,
    pairs_that_see,
    query_tile,
    shape_of,
    windows_of_tile,
)

# Windows that a program of `sum_parts_kernel` adds up; tiles of keys are whole multiples.
SUMMED_WINDOWS = 16


class Parts(NamedTuple):
    """A gradient `[P, T, H, D]` in a kernel: each part of the queries has sums of its own."""

    ptr: Any
    stride_p: Any
    stride_t: Any
    stride_h: Any


class Inputs(NamedTuple):
    """What both passes read, and how they are cut."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    statistics: Statistics  # [HKV, T, G] each
    call: WindowedCall
    config: tuning.CompressedConfig

    def of(self, query_heads: slice, kv_heads: slice) -> "Inputs":
        """Those of some heads alone, as views."""
        return self._replace(
            q=self.q[:, query_heads],
            k=self.k[:, kv_heads],
            v=self.v[:, kv_heads],
            do=self.do[:, query_heads],
            statistics=Statistics(*(x[kv_heads] for x in self.statistics)),
        )


class KeyCut(NamedTuple):
    """Programs of dk and dv: a tile of windows of a head, and a part of the pairs that see it."""

    tiles: Tiles  # of one head
    num_parts: int
    part_rows: int  # pairs of a part


@kernel
def compressed_bwd_dq_kernel(
    q,
    k,
    v,
    do,
    statistics,
    dq_ptr,
    tiles_ptr,
    num_heads,
    num_tiles,
    num_rows,
    num_sequences,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
):
    """dq of a tile of pairs, from the windows that some of them see."""

    number = tl.program_id(0)
    tile = query_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, SHAPE, TILE.BLOCK_M)
    if tile.num_queries <= 0:
        return
    head = tl.program_id(1).to(tl.int64)
    pairs, visible = pairs_of_tile(tile, head, SHAPE, TILE.BLOCK_M)
    q_tile = load_pairs(q, pairs, SHAPE.D, SHAPE.PADDED_D)
    do_tile = load_pairs(do, pairs, SHAPE.DV, SHAPE.PADDED_DV)
    at = (head * num_rows + tile.first_query) * SHAPE.G + tl.arange(0, TILE.BLOCK_M)
    shift, delta = load_statistics(statistics, at, pairs.inside)
    k, v = windows_of_tile(k, tile, head), windows_of_tile(v, tile, head)

    dq = tl.zeros([TILE.BLOCK_M, SHAPE.PADDED_D], tl.float32)
    first = 0
    if SHAPE.WINDOW_SIZE > 0:
        first = tl.maximum(tile.position + 1 - SHAPE.WINDOW_SIZE, 0) // TILE.BLOCK_N * TILE.BLOCK_N
    for start in tl.range(first, tile.most, TILE.BLOCK_N, num_stages=TILE.NUM_STAGES):
        window = start + tl.arange(0, TILE.BLOCK_N)
        k_tile, v_tile = load_keys(k, v, window, window < tile.num_windows, SHAPE)
        scores = dot_keys(q_tile, k_tile, TILE.PRECISION)
        seen = is_seen(window, visible, SHAPE)
        p = softmax_of(scores, shift[:, None], statistics.scale2, TILE.PRECISION)
        p = tl.where(seen, p, 0.0)
        dp = dot_keys(do_tile, v_tile, TILE.PRECISION)
        ds = (p * (dp + delta[:, None])).to(k_tile.dtype)
        dq = add_product(dq, ds, k_tile, TILE.PRECISION)

    dq *= statistics.scale
    target = (pairs.query * num_heads + pairs.head) * SHAPE.D
    store_or_add(dq_ptr, target, dq, pairs.inside, ADD, SHAPE.D, SHAPE.PADDED_D)


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
    num_tiles,
    num_rows,
    num_sequences,
    part_rows,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """dk and dv of a tile of windows, from a part of the pairs that see some of them."""
    G: tl.constexpr = SHAPE.G
    BLOCK_N: tl.constexpr = TILE.BLOCK_N

    work = key_tile_work(num_tiles, HEADS)
    head = work.head.to(tl.int64)
    tile = load_tile(tiles_ptr, num_tiles, work.tile, num_rows, num_sequences, True)
    first_window = tile.number * BLOCK_N
    num_windows = (
        count_windows(tile.num_keys, SHAPE.KERNEL_SIZE, SHAPE.KERNEL_STRIDE) - first_window
    )
    if (tile.num_queries == 0) | (num_windows <= 0):
        return
    seen_by = pairs_that_see(tile, first_window, work.part, part_rows, SHAPE)
    end = seen_by.end
    if SHAPE.WINDOW_SIZE > 0:
        end = tl.minimum(end, seen_by.first + (BLOCK_N - 1 + SHAPE.WINDOW_SIZE) * G)

    window = tl.arange(0, BLOCK_N)
    exists = window < num_windows
    row = (tile.first_key // SHAPE.KERNEL_STRIDE + first_window + window).to(tl.int64)
    k, v = of_head(k, head), of_head(v, head)
    k_tile, v_tile = load_keys(k, v, row, exists, SHAPE)
    at = (head * num_rows + tile.first_query) * G
    of_sequence = Statistics(statistics.shift + at, statistics.delta + at)
    dk_tile = tl.zeros([BLOCK_N, SHAPE.PADDED_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, SHAPE.PADDED_DV], tl.float32)

    for start in tl.range(seen_by.begin, end, TILE.BLOCK_M, num_stages=TILE.NUM_STAGES):
        pair = start + tl.arange(0, TILE.BLOCK_M)
        pairs = pairs_of(pair, pair < end, tile.first_query, head, G)
        q_tile = load_pairs(q, pairs, SHAPE.D, SHAPE.PADDED_D)
        do_tile = load_pairs(do, pairs, SHAPE.DV, SHAPE.PADDED_DV)
        shift, delta = load_statistics(of_sequence, pair, pairs.inside)

        # Scores are transposed, [windows, pairs]: p and ds feed the matrix unit from registers.
        scores = dot_keys(k_tile, q_tile, TILE.PRECISION)
        p = softmax_of(scores, shift[None, :], statistics.scale2, TILE.PRECISION)
        first_pair = seen_by.first + window * (SHAPE.KERNEL_STRIDE * G)
        p = tl.where(pair[None, :] >= first_pair[:, None], p, 0.0)
        if SHAPE.WINDOW_SIZE > 0:
            end_pair = seen_by.first + (window + SHAPE.WINDOW_SIZE) * G
            p = tl.where(pair[None, :] < end_pair[:, None], p, 0.0)
        dv_tile = add_product(dv_tile, p.to(do_tile.dtype), do_tile, TILE.PRECISION)
        dp = dot_keys(v_tile, do_tile, TILE.PRECISION)
        ds = (p * (dp + delta[None, :])).to(q_tile.dtype)
        dk_tile = add_product(dk_tile, ds, q_tile, TILE.PRECISION)

    part = work.part.to(tl.int64)
    dk_ptr = dk.ptr + part * dk.stride_p + head * dk.stride_h
    dv_ptr = dv.ptr + part * dv.stride_p + head * dv.stride_h
    dk_tile *= statistics.scale
    store_rows(dk_ptr, row * dk.stride_t, dk_tile, exists, SHAPE.D, SHAPE.PADDED_D)
    store_rows(dv_ptr, row * dv.stride_t, dv_tile, exists, SHAPE.DV, SHAPE.PADDED_DV)


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
    SHAPE: tl.constexpr,
    TILE_WINDOWS: tl.constexpr,
    WINDOWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Adds up the parts of WINDOWS rows of dk and dv, side by side in `[P, T, H, D + DV]`."""

    WIDTH: tl.constexpr = SHAPE.D + SHAPE.DV
    PROGRAMS: tl.constexpr = TILE_WINDOWS // WINDOWS  # of a tile
    tile_number, nth = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    head = tl.program_id(1).to(tl.int64)
    tile = load_tile(tiles_ptr, num_tiles, tile_number, num_rows, num_sequences, True)
    window = tile.number * TILE_WINDOWS + nth * WINDOWS + tl.arange(0, WINDOWS)
    exists = (window < count_windows(tile.num_keys, SHAPE.KERNEL_SIZE, SHAPE.KERNEL_STRIDE)) & (
        tile.num_queries > 0
    )
    row = (tile.first_key // SHAPE.KERNEL_STRIDE + window).to(tl.int64)

    total = tl.zeros([WINDOWS, PADDED], tl.float32)
    at = (row * num_heads + head) * WIDTH
    for _ in tl.range(0, num_parts, num_stages=3):
        total += load_rows(parts_ptr, at, exists, WIDTH, PADDED, True)
        at += stride_p

    column = tl.arange(0, PADDED)[None, :]
    of_k = exists[:, None] & (column < SHAPE.D)
    at = (row * dk.stride_t + head * dk.stride_h)[:, None] + column
    tl.store(dk.ptr + at, total.to(dk.ptr.dtype.element_ty), mask=of_k)
    of_v = exists[:, None] & (column >= SHAPE.D) & (column < WIDTH)
    at = (row * dv.stride_t + head * dv.stride_h)[:, None] + column - SHAPE.D
    tl.store(dv.ptr + at, total.to(dv.ptr.dtype.element_ty), mask=of_v)


@kernel
def scale_rows_kernel(
    dq,
    sums_ptr,
    scale,
    num_heads,
    total,
    ADD: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """PAIRS of the `total` lines of dq `[T * H, D]` become scale * sums, or it is added to them."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < total
    at = pair // num_heads * dq.stride_t + pair % num_heads * dq.stride_h
    scaled = load_rows(sums_ptr, pair * D, inside, D, PADDED_D, True) * scale
    store_or_add(dq.ptr, at, scaled, inside, ADD, D, PADDED_D)


def scale_rows(dq: Tensor, sums: Tensor, scale: float, add: bool) -> None:
    """dq `[T, H, D]`, which may be a view, becomes scale * sums, or that is added to it."""
    num_rows, num_heads, head_dim = dq.shape
    pairs, total = 32, num_rows * num_heads
    scale_rows_kernel[(cdiv(total, pairs),)](
        *(heads(dq), sums, scale, num_heads, total),
        ADD=add,
        D=head_dim,
        PADDED_D=padded_dim(head_dim),
        PAIRS=pairs,
    )


@functools.cache
def hopper_backward() -> Any:
    """The Gluon kernels of the backward, imported as those of the forward by `hopper`."""
    from nsa_fsa.ops.common.windowed_attention import hopper_backward

    return hopper_backward


def cut_parts(
    max_seqlen: int, group_size: int, num_tiles: int | None, config: tuning.CompressedConfig
) -> tuple[int, int]:
    """Into how many parts, and of how many pairs each, the pairs of the longest sequence and a KV
    head are cut for dk and dv.

    Args:
        max_seqlen: the longest sequence, in tokens.
        group_size: query heads of a KV head.
        num_tiles: tiles of keys, those of all KV heads, which are as many programs without any cut;
            None for one pass, which is for sequences that have enough of them.
        config: says how many programs are wanted.
    """
    num_pairs = max_seqlen * group_size
    if num_tiles is None:
        parts = min(cdiv(num_pairs, config.one_pass_part_rows), config.one_pass_parts)
    else:
        parts = min(cdiv(config.dkdv_programs, num_tiles), cdiv(num_pairs, config.dkdv_part_rows))
    # A part has whole tiles, and whole queries: the Gluon kernel counts queries from its first.
    whole = math.lcm(config.dkdv_m, group_size)
    return parts, cdiv(cdiv(num_pairs, max(parts, 1)), whole) * whole


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
    num_windows, group_size = call.v.shape[0], call.group_size
    config = config or config_of(call)
    q, k, v = prepared(call, config.hopper)
    do = rows_contiguous(do, config.hopper)

    add = add_to.q is not None
    dq = q.new_empty(q.shape) if add_to.q is None else add_to.q
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    if q.numel() == 0 or do.numel() == 0:
        return add_to.add((q.new_zeros(q.shape), dk, dv))

    found = statistics(do, softmax, call.scale, group_size)
    inputs = Inputs(q, k, v, do, found, call, config)
    if num_windows and in_one_pass(config, group_size, call.sequences.max_seqlen):
        for query_heads, kv_heads in one_pass_chunks(inputs):
            of_heads = (dq[:, query_heads], dk[:, kv_heads], dv[:, kv_heads])
            run_one_pass(inputs.of(query_heads, kv_heads), *of_heads, add)
    else:
        run_dq(inputs, dq, add)
        if num_windows:
            run_dkdv(inputs, dk, dv)
    return AddTo(None, add_to.k, add_to.v).add((dq, dk, dv))


def in_one_pass(config: tuning.CompressedConfig, group_size: int, max_seqlen: int) -> bool:
    """Whether the kernel of dk and dv adds up dq as well, by bulk additions in no fixed order."""
    whole_groups = config.dkdv_m % group_size == 0
    if not config.hopper or not whole_groups or torch.are_deterministic_algorithms_enabled():
        return False
    return max_seqlen >= config.one_pass_tokens


def one_pass_chunks(inputs: Inputs) -> Iterator[tuple[slice, slice]]:
    """Query heads and KV heads that one pass does at a time."""
    call = inputs.call
    one_head = bytes_of_kv_head(inputs)
    sums = 4 * inputs.q.shape[0] * call.group_size * inputs.q.shape[2]
    most = min(call.workspace_bytes, inputs.config.one_pass_sums // sums * one_head)
    return head_chunks(inputs.k.shape[1], call.group_size, one_head, most)


def bytes_of_kv_head(inputs: Inputs) -> int:
    """What one pass takes for a KV head: float32 sums of dq, and the parts of dk and dv."""
    num_rows, _, head_dim = inputs.q.shape
    num_windows, _, v_dim = inputs.v.shape
    call = inputs.call
    parts, _ = cut_parts(call.sequences.max_seqlen, call.group_size, None, inputs.config)
    of_parts = parts * num_windows * (head_dim + v_dim) if parts > 1 else 0
    return 4 * (num_rows * call.group_size * head_dim + of_parts)


def run_one_pass(inputs: Inputs, dq: Tensor, dk: Tensor, dv: Tensor, add: bool) -> None:
    """Writes all three gradients, whose heads may be some of larger tensors', or adds to dq."""
    sums = inputs.q.new_zeros(inputs.q.shape, dtype=torch.float32)
    run_dkdv(inputs, dk, dv, sums)
    scale_rows(dq, sums, inputs.call.scale, add)


def run_dq(inputs: Inputs, dq: Tensor, add: bool) -> None:
    """Writes dq, or adds to it."""
    q, k, v, do, found, call, config = inputs
    (num_rows, num_heads), num_kv_heads = q.shape[:2], k.shape[1]

    tiles = locate_tiles(num_rows, call.sequences, config.dq_m // call.group_size)
    tensors = (heads(q), heads(k), heads(v))
    others = (heads(do), scaled(found, call.scale), dq, tiles.table)
    sizes = (num_heads, tiles.number, num_rows, tiles.num_sequences)
    constants = dict(SHAPE=shape_of(call, q, v), ADD=add)

    if config.hopper:
        num_work = tiles.number * num_kv_heads
        hopper_backward().compressed_bwd_dq_hopper_kernel[(min(num_work, num_multiprocessors(q)),)](
            *tensors,
            *hopper().head_columns((k, v), config.dq_n),
            *others,
            *(*sizes, num_work),
            **constants,
            TILE=hopper().ring_tile(
                config.dq_n, config.dq_stages, config.dq_slots, config.dq_registers
            ),
            num_warps=4,
        )
        return

    compressed_bwd_dq_kernel[tiles.number, num_kv_heads](
        *tensors,
        *others,
        *sizes,
        **constants,
        TILE=plain_tile(q, config.dq_m, config.dq_n, config.dq_stages),
        num_warps=config.dq_warps,
    )


def cut_keys(inputs: Inputs, one_pass: bool) -> KeyCut:
    """The programs of dk and dv."""
    call, config = inputs.call, inputs.config
    num_windows, num_kv_heads = inputs.k.shape[:2]
    kernel_stride = call.windows.kernel_stride
    tiles = locate_tiles(
        inputs.q.shape[0],
        call.sequences,
        config.dkdv_n * kernel_stride,
        num_keys=num_windows * kernel_stride,
        hop=kernel_stride,
    )
    if call.window_size is not None:  # few pairs see a tile: they are one part
        config = dataclasses.replace(config, dkdv_programs=1)
    uncut = None if one_pass else tiles.number * num_kv_heads
    return KeyCut(tiles, *cut_parts(call.sequences.max_seqlen, call.group_size, uncut, config))


def run_dkdv(inputs: Inputs, dk: Tensor, dv: Tensor, dq_sums: Tensor | None = None) -> None:
    """Writes dk and dv, whose heads may be some of larger tensors'.

    With dq_sums, float32 `[T, HQ, D]`, dq / scale is added to it.
    """
    cut = cut_keys(inputs, dq_sums is not None)
    if cut.num_parts <= 1:
        launch_dkdv(inputs, cut, parts_of(dk, dv), dq_sums)
        return
    of_each = (dk.shape[2], dv.shape[2])
    sums = dk.new_empty(cut.num_parts, *dk.shape[:2], sum(of_each), dtype=torch.float32)
    launch_dkdv(inputs, cut, parts_of(*sums.split(of_each, 3)), dq_sums)
    sum_parts(inputs, cut, sums, dk, dv)


def launch_dkdv(
    inputs: Inputs, cut: KeyCut, targets: tuple[Parts, Parts], dq_sums: Tensor | None
) -> None:
    """Launches the kernel of dk and dv."""
    q, k, v, do, found, call, config = inputs
    num_kv_heads, one_pass = k.shape[1], dq_sums is not None
    heads_at_a_time = 1 if one_pass else math.gcd(num_kv_heads, config.dkdv_heads)

    grid = (cut.tiles.number * num_kv_heads, cut.num_parts)
    tensors = (heads(q), heads(k), heads(v), heads(do))
    others = (scaled(found, call.scale), *targets, cut.tiles.table)
    sizes = (cut.tiles.number, q.shape[0], cut.tiles.num_sequences, cut.part_rows)
    constants = dict(SHAPE=shape_of(call, q, v), HEADS=heads_at_a_time)

    if config.hopper:
        hopper_backward().compressed_bwd_dkdv_hopper_kernel[grid](
            *tensors,
            *bulk_copies(inputs, dq_sums),
            *others,
            *sizes,
            **constants,
            BLOCK_M=config.dkdv_m,
            STAGES=config.one_pass_stages if one_pass else config.dkdv_stages,
            REGISTERS=config.dkdv_registers,
            num_warps=4,
        )
        return

    compressed_bwd_dkdv_kernel[grid](
        *tensors,
        *others,
        *sizes,
        **constants,
        TILE=plain_tile(q, config.dkdv_m, config.dkdv_n, config.dkdv_stages),
        num_warps=config.dkdv_warps,
    )


def parts_of(dk: Tensor, dv: Tensor) -> tuple[Parts, Parts]:
    """The bundles of gradients in parts, `[P, T, HKV, D]`, or whole, `[T, HKV, D]`."""
    return Parts(dk, *(0, *dk.stride())[-4:-1]), Parts(dv, *(0, *dv.stride())[-4:-1])


def bulk_copies(inputs: Inputs, dq_sums: Tensor | None) -> tuple[Any, Any, Any]:
    """Descriptors for bulk copies of q, do and dq_sums; None where groups do not fill a tile."""
    group_size, tile_pairs = inputs.call.group_size, inputs.config.dkdv_m
    head_dim = inputs.q.shape[2]
    if tile_pairs % group_size != 0:
        return None, None, None
    box = (tile_pairs // group_size, group_size)
    q, do = (hopper().describe(x, *box, head_dim) for x in (inputs.q, inputs.do))
    return q, do, None if dq_sums is None else hopper().describe(dq_sums, *box, head_dim // 2)


def sum_parts(inputs: Inputs, cut: KeyCut, sums: Tensor, dk: Tensor, dv: Tensor) -> None:
    """dk and dv from their parts `[P, T, HKV, D + DV]`."""
    num_rows, num_kv_heads, tile_windows = inputs.q.shape[0], dk.shape[1], inputs.config.dkdv_n
    grid = (cut.tiles.number * (tile_windows // SUMMED_WINDOWS), num_kv_heads)
    sum_parts_kernel[grid](
        *(sums, heads(dk), heads(dv), cut.tiles.table, sums.stride(0)),
        *(cut.tiles.number, num_rows, cut.tiles.num_sequences, num_kv_heads, cut.num_parts),
        SHAPE=shape_of(inputs.call, inputs.q, inputs.v),
        TILE_WINDOWS=tile_windows,
        WINDOWS=SUMMED_WINDOWS,
        PADDED=padded_dim(sums.shape[3]),
        num_warps=4,
    )
