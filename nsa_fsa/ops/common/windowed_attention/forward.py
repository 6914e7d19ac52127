"""Compressed attention, forward: a flash-attention loop whose causal mask advances by one window
every `kernel_stride` tokens.

A program owns a tile of pairs of one KV head, so that no group size pads anything, and walks the
compressed tokens that some of them see. All but the last one or two steps are seen by every pair
and need no mask. Tiles with the most work come first, and all tiles of a KV head before those of
the next, whose keys and values then stay in L2.

Windows of one token every token are the tokens themselves, and a WINDOW_SIZE makes them those of
the sliding window: the plain kernels run it where FlashAttention cannot, in float32 for one.
"""

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import locate_tiles
from nsa_fsa.ops.common.primitives import LOG2_E, dot_keys, kernel, load_pairs, online_softmax
from nsa_fsa.ops.common.sizes import rows_contiguous
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.common.windowed_attention.heads import load_keys, store_attended
from nsa_fsa.ops.common.windowed_attention.tiles import (
    Tile,
    is_seen,
    pairs_of_tile,
    query_tile,
    shape_of,
    windows_of_tile,
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
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """o and lse of a tile of pairs, from the windows that some of them see."""

    number = tl.program_id(0)
    tile = query_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, SHAPE, TILE.BLOCK_M)
    if tile.num_queries <= 0:
        return
    head = tl.program_id(1).to(tl.int64)
    pairs, visible = pairs_of_tile(tile, head, SHAPE, TILE.BLOCK_M)
    q_tile = load_pairs(q, pairs, SHAPE.D, SHAPE.PADDED_D)
    k, v = windows_of_tile(k, tile, head), windows_of_tile(v, tile, head)

    acc = tl.zeros([TILE.BLOCK_M, SHAPE.PADDED_DV], tl.float32)
    maximum = tl.full([TILE.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE.BLOCK_M], tl.float32)
    column = tl.arange(0, TILE.BLOCK_N)
    first = 0
    full = tile.least // TILE.BLOCK_N * TILE.BLOCK_N  # up to here every pair sees every window
    if SHAPE.WINDOW_SIZE > 0:
        first = tl.maximum(tile.position + 1 - SHAPE.WINDOW_SIZE, 0) // TILE.BLOCK_N * TILE.BLOCK_N
        full = first

    for start in tl.range(first, full, TILE.BLOCK_N, num_stages=TILE.NUM_STAGES):
        window = (start + column).to(tl.int64)
        k_tile, v_tile = load_keys(k, v, window, window >= 0, SHAPE, MASKED=False)
        scores = dot_keys(q_tile, k_tile, TILE.PRECISION) * scale
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v_tile, TILE.PRECISION)

    for start in tl.range(full, tile.most, TILE.BLOCK_N, num_stages=TILE.NUM_STAGES):
        window = start + column
        k_tile, v_tile = load_keys(k, v, window, window < tile.num_windows, SHAPE)
        scores = dot_keys(q_tile, k_tile, TILE.PRECISION) * scale
        scores = tl.where(is_seen(window, visible, SHAPE), scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v_tile, TILE.PRECISION)

    store_attended(
        *(o_ptr, lse_ptr, pairs.query, pairs.head, num_heads, pairs.inside),
        *(acc, maximum, total, SHAPE),
    )


def num_multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@functools.cache
def hopper() -> Any:
    """The Gluon kernels, imported where they run: Gluon changes with every version of Triton."""
    from nsa_fsa.ops.common.windowed_attention import hopper_forward

    return hopper_forward


def prepared(call: WindowedCall, hopper: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the kernels read them; for Hopper the heads of k and v lie together."""
    q, k, v = (rows_contiguous(x, hopper) for x in (call.q, call.k, call.v))
    if hopper:
        k, v = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (k, v))
    return q, k, v


def config_of(call: WindowedCall) -> tuning.CompressedConfig:
    """The tile sizes of a call; there are no Gluon kernels of the sliding window."""
    plain = call.window_size is not None
    return tuning.compressed_config(call.q, call.v, call.group_size, plain)


def plain_tile(q: Tensor, block_m: int, block_n: int, num_stages: int) -> Tile:
    """The tile of a plain kernel."""
    return constants(Tile(block_m, block_n, num_stages, tuning.dot_precision(q.dtype)))


def windowed_attention_fwd(
    call: WindowedCall, config: tuning.CompressedConfig | None = None
) -> AttentionResult:
    """o `[T, HQ, DV]` and the natural-log lse, float32 `[T, HQ]`."""
    num_rows, num_heads = call.q.shape[:2]
    num_kv_heads, v_dim = call.v.shape[1:]
    config = config or config_of(call)
    q, k, v = prepared(call, config.hopper)

    o = q.new_empty(num_rows, num_heads, v_dim)
    lse = q.new_empty(num_rows, num_heads, dtype=torch.float32)
    if o.numel() == 0:
        return AttentionResult(o, lse.fill_(-torch.inf))

    tiles = locate_tiles(num_rows, call.sequences, config.fwd_m // call.group_size)
    tensors = (heads(q), heads(k), heads(v))
    sizes = (call.scale * LOG2_E, num_heads, tiles.number, num_rows, tiles.num_sequences)
    shape = shape_of(call, q, v)

    if config.hopper:
        num_work = tiles.number * num_kv_heads  # computed in the kernel it costs 8 bytes of stack
        hopper().compressed_fwd_hopper_kernel[(min(num_work, num_multiprocessors(q)),)](
            *tensors,
            *hopper().head_columns((k, v), config.fwd_n),
            *(o, lse, tiles.table),
            *(*sizes, num_work),
            SHAPE=shape,
            TILE=hopper().ring_tile(
                config.fwd_n, config.fwd_stages, config.fwd_slots, config.fwd_registers
            ),
            num_warps=4,
        )
        return AttentionResult(o, lse)

    compressed_fwd_kernel[tiles.number, num_kv_heads](
        *tensors,
        *(o, lse, tiles.table),
        *sizes,
        SHAPE=shape,
        TILE=plain_tile(q, config.fwd_m, config.fwd_n, config.fwd_stages),
        num_warps=config.fwd_warps,
    )
    return AttentionResult(o, lse)
