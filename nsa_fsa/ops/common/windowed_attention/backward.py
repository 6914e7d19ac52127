"""Compressed attention, backward, in two passes that compute the scores anew, or in one.

    statistics  see `softmax_statistics`.
    dq          a program owns a tile of (query, head) rows, as in the forward, and walks the compressed tokens.
    dk, dv      a program owns a tile of compressed tokens and walks the rows that see them, or one of several parts of these,
                whose sums `sum_parts` adds: where there are few KV heads there are too few tiles to fill a GPU.

Nothing is added atomically, so the result is the same in every run. On Hopper, and for long sequences, the pass of dk and dv
adds up dq as well, in float32 and by bulk steps: five products instead of seven, but in no fixed order. Deterministic
algorithms keep to two passes.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import NOTHING, AddTo, AttentionGradients, Softmax
from nsa_fsa.ops.common.locate import load_tile, locate_tiles
from nsa_fsa.ops.common.primitives import LOG2_E, add_product, dot_keys, kernel, load_rows, softmax_of, store_rows
from nsa_fsa.ops.common.sizes import cdiv, head_chunks, padded_dim, rows_contiguous
from nsa_fsa.ops.common.softmax_statistics import statistics
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.common.windowed_attention.forward import (
    count_windows,
    hopper,
    is_seen,
    num_multiprocessors,
    query_tile,
    visible_windows,
    window_constant,
)


class Inputs(NamedTuple):
    """What both passes read."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    shift: Tensor  # as `statistics` returns it
    delta: Tensor

    def of(self, heads: slice, kv_heads: slice) -> "Inputs":
        """Those of some heads alone, as views."""
        q, k, v, do, shift, delta = self
        return Inputs(q[:, heads], k[:, kv_heads], v[:, kv_heads], do[:, heads], shift[kv_heads], delta[kv_heads])

    def strides(self) -> tuple[int, ...]:
        return tuple(stride for x in self[:4] for stride in x.stride()[:2])

    def widths(self) -> dict[str, Any]:
        """Constants of the plain kernels."""
        head_dim, v_dim = self.q.shape[2], self.v.shape[2]
        padded = dict(PADDED_D=padded_dim(head_dim), PADDED_DV=padded_dim(v_dim))
        return dict(D=head_dim, DV=v_dim, PRECISION=tuning.dot_precision(self.q.dtype), **padded)


@kernel
def compressed_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, shift_ptr, delta_ptr, dq_ptr, tiles_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    scale2, scale, num_heads, num_tiles, num_rows,
    TILE_QUERIES: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    SINGLE: tl.constexpr, ACCUMULATE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr,
    PADDED_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, position, queries, first_window, num_keys, num_windows, most, _ = query_tile(
        tiles_ptr, num_tiles, num_rows, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE
    )
    if queries <= 0:
        return
    head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    inside = row < queries * G
    visible = visible_windows(position + row // G, num_keys, num_windows, KERNEL_SIZE, KERNEL_STRIDE)
    query, query_head = (first_row + row // G).to(tl.int64), head * G + row % G
    q = load_rows(q_ptr, query * stride_q_t + query_head * stride_q_h, inside, D, PADDED_D, True)
    do = load_rows(do_ptr, query * stride_do_t + query_head * stride_do_h, inside, DV, PADDED_DV, True)
    statistic = (head * num_rows + first_row) * G + row
    shift = tl.load(shift_ptr + statistic, mask=inside, other=float("-inf"))
    delta = tl.load(delta_ptr + statistic, mask=inside, other=0.0)
    k_ptr += first_window.to(tl.int64) * stride_k_t + head * stride_k_h
    v_ptr += first_window.to(tl.int64) * stride_v_t + head * stride_v_h
    dq = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    for start in tl.range(first, most, BLOCK_N, num_stages=NUM_STAGES):
        window = start + tl.arange(0, BLOCK_N)
        exists = window < num_windows
        k = load_rows(k_ptr, window.to(tl.int64) * stride_k_t, exists, D, PADDED_D, True)
        v = load_rows(v_ptr, window.to(tl.int64) * stride_v_t, exists, DV, PADDED_DV, True)
        scores = dot_keys(q, k, PRECISION)
        p = tl.where(is_seen(window, visible, WINDOW), softmax_of(scores, shift[:, None], scale2, PRECISION), 0.0)
        dp = dot_keys(do, v, PRECISION)
        ds = (p * (dp + delta[:, None])).to(k.dtype)
        dq = add_product(dq, ds, k, PRECISION)
    dq *= scale
    target = (query * num_heads + query_head) * D
    if ACCUMULATE:
        dq += load_rows(dq_ptr, target, inside, D, PADDED_D, True).to(tl.float32)
    store_rows(dq_ptr, target, dq, inside, D, PADDED_D)


@kernel
def compressed_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, shift_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    stride_dk_p, stride_dk_t, stride_dk_h, stride_dv_p, stride_dv_t, stride_dv_h,
    scale2, scale, num_tiles, num_rows, part_rows,
    KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, WINDOW: tl.constexpr, SINGLE: tl.constexpr, HEADS: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Some heads at a time, the longest tiles of all of them first: few long ones run at the end, and what these read is shared.
    at = tl.program_id(0) % (num_tiles * HEADS)
    head = (tl.program_id(0) // (num_tiles * HEADS) * HEADS + at % HEADS).to(tl.int64)
    part = tl.num_programs(1) - 1 - tl.program_id(1)  # every tile's keys are seen by the last rows
    index, first_query, num_queries, offset, first_key, num_keys = load_tile(
        tiles_ptr, num_tiles, at // HEADS, num_rows, True, SINGLE
    )
    first_window = index * BLOCK_N
    keys = count_windows(num_keys, KERNEL_SIZE, KERNEL_STRIDE) - first_window
    if (num_queries == 0) | (keys <= 0):
        return
    # Rows are (query, head) pairs of the sequence. This program's are those of its part that see the tile's first key.
    first_seen = (first_window * KERNEL_STRIDE + KERNEL_SIZE - 1 - offset) * G
    begin = tl.maximum(tl.maximum(first_seen, 0), part * part_rows)
    end = tl.minimum(tl.minimum(num_queries, num_keys - offset) * G, (part + 1) * part_rows)
    if WINDOW > 0:
        end = tl.minimum(end, first_seen + (BLOCK_N - 1 + WINDOW) * G)
    key = tl.arange(0, BLOCK_N)
    compressed_row = (first_key // KERNEL_STRIDE + first_window + key).to(tl.int64)
    k = load_rows(k_ptr + head * stride_k_h, compressed_row * stride_k_t, key < keys, D, PADDED_D, True)
    v = load_rows(v_ptr + head * stride_v_h, compressed_row * stride_v_t, key < keys, DV, PADDED_DV, True)
    statistic = (head * num_rows + first_query) * G
    dk = tl.zeros([BLOCK_N, PADDED_D], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED_DV], tl.float32)
    for start in tl.range(begin, end, BLOCK_M, num_stages=NUM_STAGES):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < end
        query, query_head = (first_query + row // G).to(tl.int64), head * G + row % G
        q = load_rows(q_ptr, query * stride_q_t + query_head * stride_q_h, inside, D, PADDED_D, True)
        do = load_rows(do_ptr, query * stride_do_t + query_head * stride_do_h, inside, DV, PADDED_DV, True)
        shift = tl.load(shift_ptr + statistic + row, mask=inside, other=float("-inf"))
        delta = tl.load(delta_ptr + statistic + row, mask=inside, other=0.0)
        # Transposed, [keys, rows], so that p and ds feed the matrix unit from registers.
        scores = dot_keys(k, q, PRECISION)
        p = softmax_of(scores, shift[None, :], scale2, PRECISION)
        p = tl.where(row[None, :] >= (first_seen + key * (KERNEL_STRIDE * G))[:, None], p, 0.0)
        if WINDOW > 0:
            p = tl.where(row[None, :] < (first_seen + (key + WINDOW) * G)[:, None], p, 0.0)
        dv = add_product(dv, p.to(do.dtype), do, PRECISION)
        dp = dot_keys(v, do, PRECISION)
        ds = (p * (dp + delta[None, :])).to(q.dtype)
        dk = add_product(dk, ds, q, PRECISION)
    target = part.to(tl.int64)
    store_rows(
        dk_ptr + target * stride_dk_p + head * stride_dk_h, compressed_row * stride_dk_t, dk * scale, key < keys, D, PADDED_D
    )
    store_rows(dv_ptr + target * stride_dv_p + head * stride_dv_h, compressed_row * stride_dv_t, dv, key < keys, DV, PADDED_DV)


@kernel
def sum_parts_kernel(
    parts_ptr, dk_ptr, dv_ptr, tiles_ptr, stride_p, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    num_tiles, num_rows, num_heads, num_parts,
    KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, SINGLE: tl.constexpr, TILE_KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, piece = tl.program_id(0) // (TILE_KEYS // KEYS), tl.program_id(0) % (TILE_KEYS // KEYS)
    head = tl.program_id(1).to(tl.int64)
    index, _, num_queries, _, first_key, num_keys = load_tile(tiles_ptr, num_tiles, tile, num_rows, True, SINGLE)
    key = index * TILE_KEYS + piece * KEYS + tl.arange(0, KEYS)
    exists = (key < count_windows(num_keys, KERNEL_SIZE, KERNEL_STRIDE)) & (num_queries > 0)
    row = (first_key // KERNEL_STRIDE + key).to(tl.int64)
    total = tl.zeros([KEYS, PADDED], tl.float32)
    at = (row * num_heads + head) * (D + DV)
    for _ in tl.range(0, num_parts, num_stages=3):
        total += load_rows(parts_ptr, at, exists, D + DV, PADDED, True)
        at += stride_p
    column = tl.arange(0, PADDED)[None, :]
    at = (row * stride_dk_t + head * stride_dk_h)[:, None] + column
    tl.store(dk_ptr + at, total.to(dk_ptr.dtype.element_ty), mask=exists[:, None] & (column < D))
    at = (row * stride_dv_t + head * stride_dv_h)[:, None] + column - D
    tl.store(dv_ptr + at, total.to(dv_ptr.dtype.element_ty), mask=exists[:, None] & (column >= D) & (column < D + DV))


@kernel
def scale_rows_kernel(
    dq_ptr, sums_ptr, scale, stride_t, stride_h, num_heads, total,
    ACCUMULATE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    at = row // num_heads * stride_t + row % num_heads * stride_h
    dq = load_rows(sums_ptr, row * D, inside, D, PADDED_D, True) * scale
    if ACCUMULATE:
        dq += load_rows(dq_ptr, at, inside, D, PADDED_D, True).to(tl.float32)
    store_rows(dq_ptr, at, dq, inside, D, PADDED_D)


def scale_rows(dq: Tensor, sums: Tensor, scale: float, accumulate: bool) -> None:
    """dq `[T, H, D]`, whose heads may be some of a larger tensor's, becomes scale * sums, or that is added to it."""
    num_rows, num_heads, head_dim = dq.shape
    rows, total = 32, num_rows * num_heads
    scale_rows_kernel[(cdiv(total, rows),)](
        dq, sums, scale, *dq.stride()[:2], num_heads, total, ACCUMULATE=accumulate, D=head_dim, PADDED_D=padded_dim(head_dim),
        ROWS=rows,
    )  # fmt: skip


@functools.cache
def hopper_backward() -> Any:
    """As `hopper`."""
    from nsa_fsa.ops.common.windowed_attention import hopper_backward

    return hopper_backward


def cut_rows(max_seqlen: int, group_size: int, num_tiles: int | None, config: tuning.CompressedConfig) -> tuple[int, int]:
    """Into how many parts, and of how many rows each, the (query, head) rows of the longest sequence are cut for dk and dv.

    num_tiles: tiles of keys, those of all KV heads, which are as many programs without any cut; None for one pass, which is for
    sequences that have enough of them.
    """
    num_rows = max_seqlen * group_size
    if num_tiles is None:
        parts = min(cdiv(num_rows, config.one_pass_part_rows), config.one_pass_parts)
    else:
        parts = min(cdiv(config.dkdv_programs, num_tiles), cdiv(num_rows, config.dkdv_part_rows))
    # Whole tiles, and whole queries: the Gluon kernel counts queries from the first of the part.
    unit = math.lcm(config.dkdv_m, group_size)
    return parts, cdiv(cdiv(num_rows, max(parts, 1)), unit) * unit


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
    config = config or tuning.compressed_config(call.q, call.v, group_size, call.window_size is not None)
    do, q, k, v = (rows_contiguous(x, config.hopper) for x in (do, call.q, call.k, call.v))
    if config.hopper:
        k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    accumulate = add_to.q is not None
    dq = q.new_empty(q.shape) if add_to.q is None else add_to.q
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    if q.numel() == 0 or do.numel() == 0:
        return add_to.add((q.new_zeros(q.shape), dk, dv))

    inputs = Inputs(q, k, v, do, *statistics(do, softmax, call.scale, group_size))
    if num_windows and in_one_pass(config, group_size, call.sequences.max_seqlen):
        one_head = bytes_of_kv_head(inputs, call, config)
        for heads, kv_heads in head_chunks(num_kv_heads, group_size, one_head, call.workspace_bytes):
            of_heads = (dq[:, heads], dk[:, kv_heads], dv[:, kv_heads])
            _run_one_pass(inputs.of(heads, kv_heads), call, config, *of_heads, accumulate)
    else:
        _run_dq(inputs, call, config, dq, accumulate)
        if num_windows:
            _run_dkdv(inputs, call, config, dk, dv)
    return AddTo(None, add_to.k, add_to.v).add((dq, dk, dv))


def in_one_pass(config: tuning.CompressedConfig, group_size: int, max_seqlen: int) -> bool:
    """Whether the kernel of dk and dv adds up dq as well: in no fixed order, and by bulk steps of whole tiles."""
    able = config.hopper and config.dkdv_m % group_size == 0 and not torch.are_deterministic_algorithms_enabled()
    return able and max_seqlen >= config.one_pass_tokens


def bytes_of_kv_head(inputs: Inputs, call: WindowedCall, config: tuning.CompressedConfig) -> int:
    """What one pass takes for a KV head: float32 sums of dq, and the parts of dk and dv."""
    num_rows, num_heads, head_dim = inputs.q.shape
    num_windows, num_kv_heads, v_dim = inputs.v.shape
    group_size = num_heads // num_kv_heads
    parts, _ = cut_rows(call.sequences.max_seqlen, group_size, None, config)
    of_parts = parts * num_windows * (head_dim + v_dim) if parts > 1 else 0
    return 4 * (num_rows * group_size * head_dim + of_parts)


def _windows(call: WindowedCall) -> dict[str, int]:
    """Constants of the kernels."""
    return dict(KERNEL_SIZE=call.windows.kernel_size, KERNEL_STRIDE=call.windows.kernel_stride)


def _run_one_pass(
    inputs: Inputs, call: WindowedCall, config: tuning.CompressedConfig, dq: Tensor, dk: Tensor, dv: Tensor, accumulate: bool
) -> None:
    sums = inputs.q.new_zeros(inputs.q.shape, dtype=torch.float32)
    _run_dkdv(inputs, call, config, dk, dv, sums)
    scale_rows(dq, sums, call.scale, accumulate)


def _run_dq(inputs: Inputs, call: WindowedCall, config: tuning.CompressedConfig, dq: Tensor, accumulate: bool) -> None:
    (num_rows, num_heads, head_dim), num_kv_heads = inputs.q.shape, inputs.k.shape[1]
    group_size = num_heads // num_kv_heads
    tile_queries = config.dq_m // group_size
    cu_seqlens, _, *cached = call.sequences
    tiles = locate_tiles(num_rows, cu_seqlens, tile_queries, *cached)
    num_tiles = cdiv(num_rows, tile_queries) if tiles is None else tiles.shape[1]
    sizes = (call.scale * LOG2_E, call.scale, num_heads, num_tiles, num_rows)
    constants = dict(
        TILE_QUERIES=tile_queries, SINGLE=tiles is None, ACCUMULATE=accumulate, G=group_size, BLOCK_N=config.dq_n,
        **_windows(call),
    )  # fmt: skip
    q, k, v, do, shift, delta = inputs
    if config.hopper:
        num_work = num_tiles * num_kv_heads
        bulk = hopper().head_columns((k, v), config.dq_n)
        hopper_backward().compressed_bwd_dq_hopper_kernel[(min(num_work, num_multiprocessors(q)),)](
            q, k, v, *bulk, do, shift, delta, dq, tiles, *inputs.strides(), *sizes, num_work, **constants, D=head_dim,
            STAGES=config.dq_stages, SLOTS=config.dq_slots, REGISTERS=config.dq_registers, num_warps=4,
        )  # fmt: skip
    else:
        compressed_bwd_dq_kernel[num_tiles, num_kv_heads](
            q, k, v, do, shift, delta, dq, tiles, *inputs.strides(), *sizes, **constants, **inputs.widths(),
            WINDOW=window_constant(call.window_size, group_size), BLOCK_M=config.dq_m, NUM_STAGES=config.dq_stages,
            num_warps=config.dq_warps,
        )  # fmt: skip


def _run_dkdv(
    inputs: Inputs, call: WindowedCall, config: tuning.CompressedConfig, dk: Tensor, dv: Tensor, dq_sums: Tensor | None = None
) -> None:
    """dk and dv, whose heads may be some of larger tensors'. What is added to dq_sums, float32 `[T, HQ, D]`, is dq / scale."""
    (num_rows, num_heads, head_dim), (num_windows, num_kv_heads, v_dim) = inputs.q.shape, inputs.v.shape
    group_size, windows = num_heads // num_kv_heads, _windows(call)
    tile_keys, kernel_stride = config.dkdv_n, windows["KERNEL_STRIDE"]
    where, _, *others = call.sequences
    tiles = locate_tiles(num_windows * kernel_stride, where, tile_keys * kernel_stride, *others, of_keys=True)
    num_tiles = cdiv(num_windows, tile_keys) if tiles is None else tiles.shape[1]
    one_pass = dq_sums is not None
    if call.window_size is not None:  # few rows see a tile: they are one part
        config = dataclasses.replace(config, dkdv_programs=1)
    parts, part_rows = cut_rows(call.sequences.max_seqlen, group_size, None if one_pass else num_tiles * num_kv_heads, config)
    q, k, v, do, shift, delta = inputs
    targets = (dk, dv)
    if parts > 1:
        sums = q.new_empty(parts, num_windows, num_kv_heads, head_dim + v_dim, dtype=torch.float32)
        targets = (sums[..., :head_dim], sums[..., head_dim:])
    target_strides = [stride for x in targets for stride in (x.stride()[:3] if parts > 1 else (0, *x.stride()[:2]))]
    sizes = (call.scale * LOG2_E, call.scale, num_tiles, num_rows, part_rows)
    heads = 1 if one_pass else math.gcd(num_kv_heads, config.dkdv_heads)
    constants = dict(SINGLE=tiles is None, HEADS=heads, G=group_size, BLOCK_M=config.dkdv_m, **windows)
    grid = (num_tiles * num_kv_heads, parts)
    if config.hopper:
        bulk = config.dkdv_m % group_size == 0
        block = (config.dkdv_m // group_size, group_size)
        rows = [hopper().describe(x, *block, head_dim) if bulk else None for x in (q, do)]
        dq_desc = hopper().describe(dq_sums, *block, head_dim // 2) if one_pass else None
        hopper_backward().compressed_bwd_dkdv_hopper_kernel[grid](
            q, k, v, do, *rows, dq_desc, shift, delta, *targets, tiles, *inputs.strides(), *target_strides, *sizes,
            **constants, D=head_dim, STAGES=config.one_pass_stages if one_pass else config.dkdv_stages, BULK=bulk,
            REGISTERS=config.dkdv_registers, num_warps=4,
        )  # fmt: skip
    else:
        compressed_bwd_dkdv_kernel[grid](
            q, k, v, do, shift, delta, *targets, tiles, *inputs.strides(), *target_strides, *sizes, **constants,
            **inputs.widths(), WINDOW=window_constant(call.window_size, group_size), BLOCK_N=tile_keys,
            NUM_STAGES=config.dkdv_stages, num_warps=config.dkdv_warps,
        )  # fmt: skip
    if parts > 1:
        keys = 16
        sum_parts_kernel[num_tiles * (tile_keys // keys), num_kv_heads](
            sums, dk, dv, tiles, sums.stride(0), *dk.stride()[:2], *dv.stride()[:2], num_tiles, num_rows, num_kv_heads, parts,
            **windows, SINGLE=tiles is None, TILE_KEYS=tile_keys, D=head_dim, DV=v_dim, PADDED=padded_dim(head_dim + v_dim),
            KEYS=keys, num_warps=4,
        )  # fmt: skip
