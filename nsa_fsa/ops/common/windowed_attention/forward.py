"""Compressed attention, forward: a flash-attention loop whose causal mask advances by one window every `kernel_stride` tokens.

A program owns a tile of (query, head of the group) rows of one KV head, so that no group size pads anything, and walks the
compressed tokens that some of them see. All but the last one or two steps are seen by every row and need no mask. Tiles with
the most work come first, and all tiles of a KV head before those of the next, whose keys and values then stay in the cache.

Windows of one token every token are the tokens themselves, and with a lower bound, WINDOW, the sliding window's: the plain
kernels run it where FlashAttention cannot, in float32 for one.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import load_tile, locate_tiles
from nsa_fsa.ops.common.primitives import LN_2, LOG2_E, dot_keys, kernel, load_rows, online_softmax, store_rows
from nsa_fsa.ops.common.sizes import cdiv, padded_dim, rows_contiguous
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall


@triton.jit
def visible_windows(position, num_keys, num_windows, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """How many compressed tokens a position sees."""
    seen = (position + 1 - KERNEL_SIZE + KERNEL_STRIDE) // KERNEL_STRIDE  # the windows of a sequence that ends here
    return tl.where(position < num_keys, tl.minimum(tl.maximum(seen, 0), num_windows), 0)


@triton.jit
def is_seen(window, visible, WINDOW: tl.constexpr):
    """Which compressed tokens rows see that see `visible` of them, or with a WINDOW the last so many: `[rows, windows]`."""
    seen = window[None, :] < visible[:, None]
    if WINDOW > 0:
        seen = seen & (window[None, :] >= (visible - WINDOW)[:, None])
    return seen


@triton.jit
def count_windows(num_keys, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """How many compressed tokens a sequence has."""
    return tl.maximum((num_keys - KERNEL_SIZE + KERNEL_STRIDE) // KERNEL_STRIDE, 0)


@triton.jit
def query_tile(
    tiles_ptr, num_tiles, num_rows, TILE_QUERIES: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Row and position of the tile's first query, its queries, the sequence's first compressed row, keys and windows, and how
    many windows the tile's last and first query see."""
    index, first_query, num_queries, offset, first_key, num_keys = load_tile(
        tiles_ptr, num_tiles, tl.program_id(0), num_rows, False, SINGLE
    )
    first = index * TILE_QUERIES
    queries = tl.minimum(num_queries - first, TILE_QUERIES)  # none for a number that no tile owns
    num_windows = count_windows(num_keys, KERNEL_SIZE, KERNEL_STRIDE)
    position = offset + first
    last = position + queries - 1
    most = visible_windows(tl.minimum(last, num_keys - 1), num_keys, num_windows, KERNEL_SIZE, KERNEL_STRIDE)
    least = tl.where(last < num_keys, visible_windows(position, num_keys, num_windows, KERNEL_SIZE, KERNEL_STRIDE), 0)
    return first_query + first, position, queries, first_key // KERNEL_STRIDE, num_keys, num_windows, most, least


@kernel
def compressed_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, tiles_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, scale, num_heads, num_tiles, num_rows,
    TILE_QUERIES: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    SINGLE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, position, queries, first_window, num_keys, num_windows, most, least = query_tile(
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
    k_ptr += first_window.to(tl.int64) * stride_k_t + head * stride_k_h
    v_ptr += first_window.to(tl.int64) * stride_v_t + head * stride_v_h

    acc = tl.zeros([BLOCK_M, PADDED_DV], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, BLOCK_N)
    first = 0
    full = least // BLOCK_N * BLOCK_N  # up to here every row sees every window
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        full = first
    for start in tl.range(first, full, BLOCK_N, num_stages=NUM_STAGES):
        window = (start + column).to(tl.int64)
        k = load_rows(k_ptr, window * stride_k_t, window >= 0, D, PADDED_D, False)
        v = load_rows(v_ptr, window * stride_v_t, window >= 0, DV, PADDED_DV, False)
        scores = dot_keys(q, k, PRECISION) * scale
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v, PRECISION)
    for start in tl.range(full, most, BLOCK_N, num_stages=NUM_STAGES):
        window = start + column
        exists = window < num_windows
        k = load_rows(k_ptr, window.to(tl.int64) * stride_k_t, exists, D, PADDED_D, True)
        v = load_rows(v_ptr, window.to(tl.int64) * stride_v_t, exists, DV, PADDED_DV, True)
        scores = dot_keys(q, k, PRECISION) * scale
        scores = tl.where(is_seen(window, visible, WINDOW), scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v, PRECISION)

    seen_any = total > 0
    acc = acc * (1.0 / tl.where(seen_any, total, 1.0))[:, None]  # acc is 0 where nothing was seen
    target = query * num_heads + query_head
    store_rows(o_ptr, target * DV, acc, inside, DV, PADDED_DV)
    tl.store(lse_ptr + target, tl.where(seen_any, (maximum + tl.log2(total)) * LN_2, float("-inf")), mask=inside)


def window_constant(window_size: int | None, group_size: int) -> int:
    """What kernels take as WINDOW: 0 for none, and no number that overflows when it is counted in rows."""
    return min(window_size or 0, (1 << 30) // group_size)


def num_multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@functools.cache
def hopper() -> Any:
    """The Gluon kernels, imported only where they run: they are written for one version of a moving interface."""
    from nsa_fsa.ops.common.windowed_attention import hopper_forward

    return hopper_forward


def windowed_attention_fwd(call: WindowedCall, config: tuning.CompressedConfig | None = None) -> AttentionResult:
    """o `[T, HQ, DV]` and the natural-log lse, float32 `[T, HQ]`."""
    (kernel_size, kernel_stride), window_size, scale = call.windows, call.window_size, call.scale
    cu_seqlens, _, cu_seqlens_q, seqused_k = call.sequences
    num_rows, num_heads, head_dim = call.q.shape
    (num_kv_heads, v_dim), group_size = call.v.shape[1:], call.group_size
    config = config or tuning.compressed_config(call.q, call.v, group_size, window_size is not None)
    q, k, v = (rows_contiguous(x, config.hopper) for x in (call.q, call.k, call.v))
    if config.hopper:
        k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    o = q.new_empty(num_rows, num_heads, v_dim)
    lse = q.new_empty(num_rows, num_heads, dtype=torch.float32)
    if o.numel() == 0:
        return AttentionResult(o, lse.fill_(-torch.inf))
    tile_queries = config.fwd_m // group_size
    tiles = locate_tiles(num_rows, cu_seqlens, tile_queries, cu_seqlens_q, seqused_k)
    num_tiles = cdiv(num_rows, tile_queries) if tiles is None else tiles.shape[1]
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    sizes = (scale * LOG2_E, num_heads, num_tiles, num_rows)
    constants = dict(
        TILE_QUERIES=tile_queries, KERNEL_SIZE=kernel_size, KERNEL_STRIDE=kernel_stride, SINGLE=tiles is None, G=group_size,
        D=head_dim, BLOCK_N=config.fwd_n,
    )  # fmt: skip
    if config.hopper:
        num_work = num_tiles * num_kv_heads
        bulk = hopper().head_columns((k, v), config.fwd_n)
        hopper().compressed_fwd_hopper_kernel[(min(num_work, num_multiprocessors(q)),)](
            q, k, v, *bulk, o, lse, tiles, *strides, *sizes, num_work, **constants,
            STAGES=config.fwd_stages, SLOTS=config.fwd_slots, REGISTERS=config.fwd_registers, num_warps=4,
        )  # fmt: skip
    else:
        compressed_fwd_kernel[num_tiles, num_kv_heads](
            q, k, v, o, lse, tiles, *strides, *sizes, **constants, WINDOW=window_constant(window_size, group_size),
            PADDED_D=padded_dim(head_dim), DV=v_dim, PADDED_DV=padded_dim(v_dim), BLOCK_M=config.fwd_m,
            NUM_STAGES=config.fwd_stages, PRECISION=tuning.dot_precision(q.dtype), num_warps=config.fwd_warps,
        )  # fmt: skip
    return AttentionResult(o, lse)
