"""Gradients of q and k_cmp from those of the logarithms of block scores, in Triton.

    dq      A program owns a tile of pairs and walks the windows that some of them see.
    dk_cmp  A program owns a tile of windows and walks the pairs of a chunk that see them, or one of
            several parts of these: where there are few KV heads there are too few tiles to fill a
            GPU. It adds to its own sums, which the chunks before have left.

Nothing is added atomically, so the result is the same in every run. A tile
of windows is those that begin in some neighbouring blocks, or in a piece of one, so that what is
known of a block is loaded once for all of its windows. In a kernel SHAPE is the `Shape` of
compressed attention, and TILE a `BlockTile`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.block_divergence.weigh import blocks_reached, load_lse, log_weights
from nsa_fsa.ops.common.bundles import Pairs
from nsa_fsa.ops.common.locate import count_windows, load_tile
from nsa_fsa.ops.common.primitives import (
    add_product,
    dot_keys,
    kernel,
    load_pairs,
    load_rows,
    store_rows,
)
from nsa_fsa.ops.common.windowed_attention.tiles import (
    pairs_of,
    pairs_of_tile,
    query_tile,
    visible_windows,
    windows_of_tile,
)


class Graded(NamedTuple):
    """What the gradients of a chunk's scores follow from, float32; in a kernel, pointers."""

    of_blocks: Tensor  # [HKV, J, rows], the gradients of the logarithms of block scores
    scores: Tensor  # [HKV, J, rows], these logarithms
    delta: Tensor  # [HKV, rows, G], see `subtract_kernel`


class SpreadPairs(NamedTuple):
    """What is known of some pairs, with an axis for blocks and one for windows of a block, before
    the pairs or behind them."""

    lse: Any
    delta: Any
    row: Any  # of the query, in the chunk
    visible: Any  # windows that it sees
    reached: Any  # blocks that these overlap


@triton.jit
def spread(x, PAIRS_FIRST: tl.constexpr):
    """x `[pairs]` as `[pairs, 1, 1]` or `[1, 1, pairs]`."""
    return x[:, None, None] if PAIRS_FIRST else x[None, None, :]


@triton.jit
def load_softmax(
    lse, graded, pairs, visible, first_row, head, chunk_rows, SHAPE: tl.constexpr,
    PAIRS_FIRST: tl.constexpr,
):  # fmt: skip
    """What is known of some `Pairs`; those that are not inside see nothing. lse: `Heads`."""
    log = load_lse(lse, pairs)
    row = pairs.query - first_row
    at = (head * chunk_rows + row) * SHAPE.G + (pairs.head - head * SHAPE.G)
    delta = tl.load(graded.delta + at, mask=pairs.inside, other=0.0)
    visible = tl.where(pairs.inside, visible, 0)
    reached = blocks_reached(visible, SHAPE)
    return SpreadPairs(
        spread(log, PAIRS_FIRST),
        spread(delta, PAIRS_FIRST),
        spread(row, PAIRS_FIRST),
        spread(visible, PAIRS_FIRST),
        spread(reached, PAIRS_FIRST),
    )


@triton.jit
def windows_of_blocks(
    first_block, first_phase, num_windows, SHAPE: tl.constexpr, TILE: tl.constexpr
):
    """Numbers of the windows of a tile `[BLOCKS * PIECE]`, and which of them exist: of each of its
    blocks those that begin with the hops first_phase and following."""
    column = tl.arange(0, TILE.BLOCKS * TILE.PIECE)
    phase = first_phase + column % TILE.PIECE
    window = (first_block + column // TILE.PIECE) * SHAPE.BLOCK_HOPS + phase
    return window, (phase < SHAPE.BLOCK_HOPS) & (window < num_windows)


@triton.jit
def load_block(graded, at, inside):
    """The gradients of the logarithms of some scores, and these; 0 and inf for none."""
    grad = tl.load(graded.of_blocks + at, mask=inside, other=0.0)
    return grad, tl.load(graded.scores + at, mask=inside, other=float("inf"))


@triton.jit
def gradients_of_scores(
    scores, first_block, first_phase, known, graded, of_head, chunk_rows, scale,
    SHAPE: tl.constexpr, TILE: tl.constexpr, PAIRS_FIRST: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile's scores of windows, `[pairs, windows]` or the transpose of it.

    known: `SpreadPairs`.
    """
    WINDOW: tl.constexpr = SHAPE.WINDOW_HOPS
    BLOCK: tl.constexpr = SHAPE.BLOCK_HOPS
    if PAIRS_FIRST:
        block = first_block + tl.arange(0, TILE.BLOCKS)[None, :, None]
        phase = first_phase + tl.arange(0, TILE.PIECE)[None, None, :]
        spread_scores = tl.reshape(scores, [TILE.BLOCK_M, TILE.BLOCKS, TILE.PIECE])
    else:
        block = first_block + tl.arange(0, TILE.BLOCKS)[:, None, None]
        phase = first_phase + tl.arange(0, TILE.PIECE)[None, :, None]
        spread_scores = tl.reshape(scores, [TILE.BLOCKS, TILE.PIECE, TILE.BLOCK_M])
    seen = (phase < BLOCK) & (block * BLOCK + phase < known.visible)
    weights = log_weights(spread_scores, scale, known.lse)
    weights = tl.where(seen, weights, float("-inf"))

    to_own = tl.minimum(BLOCK - phase, WINDOW)  # hops that it shares with the block it begins in
    at = of_head + block.to(tl.int64) * chunk_rows + known.row
    grad, score = load_block(graded, at, block < known.reached)
    ds = grad * tl.exp2(weights - score) * to_own.to(tl.float32)
    if WINDOW > 1:
        grad, score = load_block(graded, at + chunk_rows, block + 1 < known.reached)
        # Of a window that does not reach it, a block's score may be far less than the weight.
        share = tl.exp2(tl.where(to_own < WINDOW, weights - score, float("-inf")))
        ds += grad * share * (WINDOW - to_own).to(tl.float32)
    ds -= tl.exp2(weights) * known.delta
    return tl.reshape(ds, scores.shape)


@kernel
def divergence_dq_kernel(
    q,
    k,
    lse,
    graded,
    dq_ptr,
    tiles_ptr,
    scale,
    num_blocks,
    num_heads,
    chunk_rows,
    first_row,
    end_row,
    num_tiles,
    num_rows,
    num_sequences,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """dq of a tile of pairs. q, k and lse: `Heads`, of which lse has rows of one element."""
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = query_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, SHAPE, TILE.BLOCK_M)
    end_query = tile.first_query + tile.num_queries
    if (tile.num_queries <= 0) | (tile.first_query >= end_row) | (end_query <= first_row):
        return

    pairs, visible = pairs_of_tile(tile, head, SHAPE, TILE.BLOCK_M)
    inside = pairs.inside & (pairs.query >= first_row) & (pairs.query < end_row)
    pairs = Pairs(pairs.query, pairs.head, inside)
    q_tile = load_pairs(q, pairs, SHAPE.D, SHAPE.PADDED_D)
    known = load_softmax(lse, graded, pairs, visible, first_row, head, chunk_rows, SHAPE, True)
    k = windows_of_tile(k, tile, head)
    of_head = head * num_blocks * chunk_rows
    num_steps = tl.cdiv(tl.cdiv(tile.most, SHAPE.BLOCK_HOPS), TILE.BLOCKS) * TILE.PIECES

    dq = tl.zeros([TILE.BLOCK_M, SHAPE.PADDED_D], tl.float32)
    for step in tl.range(0, num_steps, num_stages=TILE.NUM_STAGES):
        block, phase = step // TILE.PIECES * TILE.BLOCKS, step % TILE.PIECES * TILE.PIECE
        window, exists = windows_of_blocks(block, phase, tile.num_windows, SHAPE, TILE)
        at = window.to(tl.int64) * k.stride_t
        k_tile = load_rows(k.ptr, at, exists, SHAPE.D, SHAPE.PADDED_D, True)
        scores = dot_keys(q_tile, k_tile, TILE.PRECISION)
        ds = gradients_of_scores(
            *(scores, block, phase, known, graded, of_head, chunk_rows, scale), *(SHAPE, TILE, True)
        )
        dq = add_product(dq, ds.to(k_tile.dtype), k_tile, TILE.PRECISION)

    target = (pairs.query * num_heads + pairs.head) * SHAPE.D
    store_rows(dq_ptr, target, dq * scale, inside, SHAPE.D, SHAPE.PADDED_D)


@kernel
def divergence_dk_kernel(
    q,
    k,
    lse,
    graded,
    sums_ptr,
    tiles_ptr,
    scale,
    num_blocks,
    chunk_rows,
    part_rows,
    first_row,
    end_row,
    stride_part,
    num_tiles,
    num_rows,
    num_sequences,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds dk of a tile of windows, from a part of the chunk's queries, to the sums of this part,
    float32 `[P, T // kernel_stride, HKV, D]`. Tiles are of whole blocks, or of pieces of one."""
    G: tl.constexpr = SHAPE.G
    BLOCK: tl.constexpr = SHAPE.BLOCK_HOPS
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    number, head, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    of_tile = number // TILE.PIECES
    tile = load_tile(tiles_ptr, num_tiles, of_tile, num_rows, num_sequences, True)
    num_windows = count_windows(tile.num_keys, SHAPE.KERNEL_SIZE, SHAPE.KERNEL_STRIDE)
    first_block, first_phase = tile.number * TILE.BLOCKS, number % TILE.PIECES * TILE.PIECE
    first_window = first_block * BLOCK + first_phase
    # The first query of the sequence that sees the tile's first window, and those of this part.
    first = first_window * SHAPE.KERNEL_STRIDE + SHAPE.KERNEL_SIZE - 1 - tile.offset
    begin_row = first_row + part * part_rows
    end = tl.minimum(tile.num_queries, tile.num_keys - tile.offset)
    end = tl.minimum(end, tl.minimum(begin_row + part_rows, end_row) - tile.first_query)
    begin = tl.maximum(tl.maximum(first, 0), begin_row - tile.first_query)
    if (tile.num_queries == 0) | (first_window >= num_windows) | (begin >= end):
        return

    first_row_of_k = (tile.first_key // SHAPE.KERNEL_STRIDE).to(tl.int64)
    window, exists = windows_of_blocks(first_block, first_phase, num_windows, SHAPE, TILE)
    row = first_row_of_k + window
    k_ptr = k.ptr + head * k.stride_h
    k_tile = load_rows(k_ptr, row * k.stride_t, exists, SHAPE.D, SHAPE.PADDED_D, True)
    of_head = head * num_blocks * chunk_rows

    dk = tl.zeros([TILE.BLOCKS * TILE.PIECE, SHAPE.PADDED_D], tl.float32)
    for start in tl.range(begin * G, end * G, BLOCK_M, num_stages=TILE.NUM_STAGES):
        pair = start + tl.arange(0, BLOCK_M)
        pairs = pairs_of(pair, pair < end * G, tile.first_query, head, G)
        q_tile = load_pairs(q, pairs, SHAPE.D, SHAPE.PADDED_D)
        visible = visible_windows(tile.offset + pair // G, tile.num_keys, num_windows, SHAPE)
        known = load_softmax(lse, graded, pairs, visible, first_row, head, chunk_rows, SHAPE, False)
        # Scores are transposed, [windows, pairs]: ds feeds the matrix unit from registers.
        scores = dot_keys(k_tile, q_tile, TILE.PRECISION)
        ds = gradients_of_scores(
            *(scores, first_block, first_phase, known, graded, of_head, chunk_rows),
            *(scale, SHAPE, TILE, False),
        )
        dk = add_product(dk, ds.to(q_tile.dtype), q_tile, TILE.PRECISION)

    at = part.to(tl.int64) * stride_part + (row * tl.num_programs(1) + head) * SHAPE.D
    dk = dk * scale + load_rows(sums_ptr, at, exists, SHAPE.D, SHAPE.PADDED_D, True)
    store_rows(sums_ptr, at, dk, exists, SHAPE.D, SHAPE.PADDED_D)
