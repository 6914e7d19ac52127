"""Compressed attention, forward: a flash-attention loop whose causal mask advances by one window
every `kernel_stride` tokens.

A program owns a tile of (query, head of the group) rows of one KV head, so that no group size pads
anything, and walks the compressed tokens that some of them see. All but the last one or two steps
are seen by every row and need no mask. Tiles with the most work come first, and all tiles of a KV
head before those of the next, whose keys and values then stay in the cache.

Windows of one token every token are the tokens themselves, and with a lower bound, WINDOW, the
sliding window's: the plain kernels run it where FlashAttention cannot, in float32 for one.
"""

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import heads
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import locate_tiles
from nsa_fsa.ops.common.primitives import (
    LN_2,
    LOG2_E,
    dot_keys,
    kernel,
    load_rows,
    online_softmax,
    store_rows,
)
from nsa_fsa.ops.common.sizes import rows_contiguous
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.common.windowed_attention.tiles import (
    is_seen,
    load_heads,
    query_tile,
    rows_of,
    shape_of,
    visible_windows,
    window_constant,
)


@kernel
def compressed_fwd_kernel(
    q,
    k,
    v,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    scale,
    num_heads,
    num_tiles,
    num_rows,
    num_sequences,
    WINDOWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and lse of a tile of (query, head) rows, from the windows that some of them see."""

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
    k_ptr = k.ptr + tile.first_window.to(tl.int64) * k.stride_t + head * k.stride_h
    v_ptr = v.ptr + tile.first_window.to(tl.int64) * v.stride_t + head * v.stride_h

    acc = tl.zeros([BLOCK_M, PADDED_DV], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, BLOCK_N)
    first = 0
    full = tile.least // BLOCK_N * BLOCK_N  # up to here every row sees every window
    if WINDOW > 0:
        first = tl.maximum(tile.position + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        full = first

    for start in tl.range(first, full, BLOCK_N, num_stages=NUM_STAGES):
        window = (start + column).to(tl.int64)
        k_tile = load_rows(k_ptr, window * k.stride_t, window >= 0, D, PADDED_D, False)
        v_tile = load_rows(v_ptr, window * v.stride_t, window >= 0, DV, PADDED_DV, False)
        scores = dot_keys(q_tile, k_tile, PRECISION) * scale
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v_tile, PRECISION)

    for start in tl.range(full, tile.most, BLOCK_N, num_stages=NUM_STAGES):
        window = start + column
        exists = window < tile.num_windows
        k_tile = load_rows(k_ptr, window.to(tl.int64) * k.stride_t, exists, D, PADDED_D, True)
        v_tile = load_rows(v_ptr, window.to(tl.int64) * v.stride_t, exists, DV, PADDED_DV, True)
        scores = dot_keys(q_tile, k_tile, PRECISION) * scale
        scores = tl.where(is_seen(window, visible, WINDOW), scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v_tile, PRECISION)

    seen_any = total > 0
    acc = acc * (1.0 / tl.where(seen_any, total, 1.0))[:, None]  # acc is 0 where nothing was seen
    target = rows.query * num_heads + rows.head
    store_rows(o_ptr, target * DV, acc, rows.inside, DV, PADDED_DV)
    lse_ptr += target
    lse = tl.where(seen_any, (maximum + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse_ptr, lse, mask=rows.inside)


def num_multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@functools.cache
def hopper() -> Any:
    """The Gluon kernels, imported only where they run: Gluon is an interface that changes with
    every version of Triton.
    """
    from nsa_fsa.ops.common.windowed_attention import hopper_forward

    return hopper_forward


def prepared(call: WindowedCall, hopper: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with rows that the kernels can read; those for Hopper want the heads of k and v to
    lie together.
    """
    q, k, v = (rows_contiguous(x, hopper) for x in (call.q, call.k, call.v))
    if hopper:
        k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    return q, k, v


def windowed_attention_fwd(
    call: WindowedCall, config: tuning.CompressedConfig | None = None
) -> AttentionResult:
    """o `[T, HQ, DV]` and the natural-log lse, float32 `[T, HQ]`."""
    num_rows, num_heads = call.q.shape[:2]
    (num_kv_heads, v_dim), group_size = call.v.shape[1:], call.group_size
    config = config or tuning.compressed_config(
        call.q, call.v, group_size, call.window_size is not None
    )
    q, k, v = prepared(call, config.hopper)

    o = q.new_empty(num_rows, num_heads, v_dim)
    lse = q.new_empty(num_rows, num_heads, dtype=torch.float32)
    if o.numel() == 0:
        return AttentionResult(o, lse.fill_(-torch.inf))

    tiles = locate_tiles(num_rows, call.sequences, config.fwd_m // group_size)
    tensors = (heads(q), heads(k), heads(v))
    sizes = (call.scale * LOG2_E, num_heads, tiles.number, num_rows, tiles.num_sequences)
    constants = dict(WINDOWS=call.windows, SHAPE=shape_of(q, v), BLOCK_N=config.fwd_n)

    if config.hopper:
        num_work = tiles.number * num_kv_heads  # computed in the kernel it costs 8 bytes of stack
        hopper().compressed_fwd_hopper_kernel[(min(num_work, num_multiprocessors(q)),)](
            *tensors,
            *hopper().head_columns((k, v), config.fwd_n),
            *(o, lse, tiles.table),
            *(*sizes, num_work),
            **constants,
            STAGES=config.fwd_stages,
            SLOTS=config.fwd_slots,
            REGISTERS=config.fwd_registers,
            num_warps=4,
        )
        return AttentionResult(o, lse)

    compressed_fwd_kernel[tiles.number, num_kv_heads](
        *tensors,
        *(o, lse, tiles.table),
        *sizes,
        **constants,
        WINDOW=window_constant(call.window_size, group_size),
        BLOCK_M=config.fwd_m,
        NUM_STAGES=config.fwd_stages,
        PRECISION=tuning.dot_precision(q.dtype),
        num_warps=config.fwd_warps,
    )
    return AttentionResult(o, lse)
