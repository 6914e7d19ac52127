"""What attention gives to blocks, in Triton: the logarithm of what every pair, and then of what
every query and KV head, gives to each block.

Dense attention is compressed attention whose windows are single tokens. So one kernel computes both
sides of the divergence: where dense attention's mass lies, and the block scores of compressed
attention.

    weigh   A program owns a tile of pairs of one KV head and walks the blocks that some of them
            see, some blocks a step, or a piece of one. The windows that overlap a block lie
            together in a step, so that one reduction over neighbouring columns makes them one
            number. A window that overlaps two blocks is computed for both: of dense attention,
            where nearly all of the work is, there is none.
    join    The heads of a group are added up, for a tile of queries and of blocks.

Logarithms are those of base 2. They are kept because softmax weights underflow where a query is
sure of its windows, and what is to be learned there is how to be less so.

A chunk is the query rows `first_row` up to `end_row`. Its results lie block by block, `[HKV, J,
pairs]` and `[HKV, J, rows]`, so that what neighbouring queries give to a block lies together.

In a kernel SHAPE is the `Shape` of one side, and TILE a `BlockTile` or a `RowTile`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.bundles import constants
from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.common.primitives import LOG2_E, dot_keys, kernel, load_pairs, load_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim
from nsa_fsa.ops.common.tuning import dot_precision
from nsa_fsa.ops.common.windowed_attention.tiles import pairs_of_tile, query_tile, windows_of_tile

TO_BASE_2 = tl.constexpr(LOG2_E)


class Shape(NamedTuple):
    """What kernels know of one side, as constants: dense or compressed attention."""

    G: Any  # query heads of a KV head
    D: Any  # width of heads
    PADDED_D: Any  # the power of two that it is computed with
    KERNEL_SIZE: Any  # 1 for dense attention, as the stride
    KERNEL_STRIDE: Any
    WINDOW_HOPS: Any  # hops of a window
    BLOCK_HOPS: Any  # hops of a block


class BlockTile(NamedTuple):
    """What a program that multiplies works on at a time, as constants."""

    BLOCK_M: Any  # pairs
    BLOCKS: Any  # blocks of a step, one where a block has several pieces
    PIECE: Any  # windows of a block, or of a piece of one: a power of two
    PIECES: Any  # of a block
    NUM_STAGES: Any
    PRECISION: Any


class RowTile(NamedTuple):
    """What a program that reads results block by block works on at a time, as constants."""

    ROWS: Any  # queries, or pairs
    BLOCKS: Any


class Logs(NamedTuple):
    """What pairs give to blocks, float32 `[HKV, J, pairs]`; in a kernel, pointers."""

    dense: Tensor
    compressed: Tensor


class Joined(NamedTuple):
    """What the heads of a group give to blocks, float32 `[HKV, J, rows]`; in a kernel, pointers."""

    mass: Tensor  # dense attention's, divided by G; in the backward what `grade` puts there
    scores: Tensor  # their logarithms


@triton.jit
def blocks_reached(num_windows, SHAPE: tl.constexpr):
    """How many blocks the first windows of a sequence overlap."""
    last_hop = num_windows + SHAPE.WINDOW_HOPS - 2
    return tl.where(num_windows > 0, last_hop // SHAPE.BLOCK_HOPS + 1, 0)


@triton.jit
def load_lse(lse, pairs):
    """The natural lse of some `Pairs`, 0 where nothing is seen; lse: `Heads`."""
    at = pairs.query * lse.stride_t + pairs.head * lse.stride_h
    found = tl.load(lse.ptr + at, mask=pairs.inside, other=0.0)
    return tl.where(found == float("-inf"), 0.0, found)


@triton.jit
def log_weights(scores, scale, lse):
    """Logarithms of softmax weights. The difference comes before the change of base: both of its
    sides may be in the thousands, and each would round there."""
    return (scores * scale - lse) * TO_BASE_2


@triton.jit
def weights_of_step(
    q_tile, lse, visible, k, num_windows, step, scale, SHAPE: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Logarithms of what pairs give to the windows of a step, each times the hops that it shares
    with the step's block: `[BLOCK_M, BLOCKS, PIECE]`.

    MASKED: some windows are not seen, or do not exist, or there are too few for the step.
    """
    WINDOW: tl.constexpr = SHAPE.WINDOW_HOPS
    BLOCK: tl.constexpr = SHAPE.BLOCK_HOPS
    column = tl.arange(0, TILE.BLOCKS * TILE.PIECE)
    block = step // TILE.PIECES * TILE.BLOCKS + column // TILE.PIECE
    nth = step % TILE.PIECES * TILE.PIECE + column % TILE.PIECE  # of those that overlap the block
    window = block * BLOCK + nth - (WINDOW - 1)
    exists = (nth < BLOCK + WINDOW - 1) & (window >= 0) & (window < num_windows)
    at = window.to(tl.int64) * k.stride_t
    k_tile = load_rows(k.ptr, at, exists, SHAPE.D, SHAPE.PADDED_D, MASKED)
    logs = log_weights(dot_keys(q_tile, k_tile, TILE.PRECISION), scale, lse[:, None])
    if MASKED:
        if WINDOW > 1:
            shared = tl.minimum(nth + 1, BLOCK) - tl.maximum(nth - (WINDOW - 1), 0)
            logs += tl.log2(tl.where(exists, shared, 1).to(tl.float32))[None, :]
        seen = exists[None, :] & (window[None, :] < visible[:, None])
        logs = tl.where(seen, logs, float("-inf"))
    return tl.reshape(logs, [TILE.BLOCK_M, TILE.BLOCKS, TILE.PIECE])


@triton.jit
def add_piece(maximum, total, logs, piece, PIECES: tl.constexpr):
    """Sums of `[M, BLOCKS]` blocks, total * 2 ** maximum, to which a piece of each is added; the
    first piece begins anew. Of an empty sum the maximum is -inf."""
    raised = tl.max(logs, 2)
    if PIECES > 1:
        maximum = tl.where(piece == 0, float("-inf"), maximum)
        raised = tl.maximum(maximum, raised)
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    found = tl.sum(tl.exp2(logs - shift[:, :, None]), 2)
    if PIECES > 1:
        found += tl.where(piece == 0, 0.0, total * tl.exp2(maximum - shift))
    return raised, found


@triton.jit
def logarithm(maximum, total):
    """That of total * 2 ** maximum; -inf of 0."""
    logs = maximum + tl.log2(tl.where(total > 0, total, 1.0))
    return tl.where(total > 0, logs, float("-inf"))


@triton.jit
def store_step(
    ptr, of_pair, maximum, total, inside, step, num_blocks, stride_block, TILE: tl.constexpr
):
    """Writes the logarithms of a step's blocks, once their last pieces are added."""
    block = step // TILE.PIECES * TILE.BLOCKS + tl.arange(0, TILE.BLOCKS)
    done = (block < num_blocks) & (step % TILE.PIECES == TILE.PIECES - 1)
    at = of_pair[:, None] + block.to(tl.int64)[None, :] * stride_block
    logs = logarithm(maximum, total)
    tl.store(ptr + at, logs, mask=inside[:, None] & done[None, :])


@kernel
def weigh_blocks_kernel(
    q,
    k,
    lse,
    logs_ptr,
    tiles_ptr,
    scale,
    num_blocks,
    chunk_pairs,
    first_row,
    end_row,
    num_tiles,
    num_rows,
    num_sequences,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The logarithm of what each pair of a tile gives to each block that some of them see.

    q, k and lse: `Heads`, of which lse has rows of one element. Tiles outside of the chunk do
    nothing.
    """
    PIECES: tl.constexpr = TILE.PIECES
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = query_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, SHAPE, TILE.BLOCK_M)
    end_query = tile.first_query + tile.num_queries
    if (tile.num_queries <= 0) | (tile.first_query >= end_row) | (end_query <= first_row):
        return

    pairs, visible = pairs_of_tile(tile, head, SHAPE, TILE.BLOCK_M)
    q_tile = load_pairs(q, pairs, SHAPE.D, SHAPE.PADDED_D)
    of_pairs = load_lse(lse, pairs)
    k = windows_of_tile(k, tile, head)

    inside = pairs.inside & (pairs.query >= first_row) & (pairs.query < end_row)
    pair = (pairs.query - first_row) * SHAPE.G + (pairs.head - head * SHAPE.G)  # of the chunk
    of_pair = head * num_blocks * chunk_pairs + pair
    reached = tl.minimum(blocks_reached(tile.most, SHAPE), num_blocks)
    num_steps = tl.cdiv(reached, TILE.BLOCKS) * PIECES
    # Up to here every pair sees every window, of which a step has as many as it has columns.
    full = num_steps * 0
    if SHAPE.WINDOW_HOPS == 1 and TILE.PIECE * PIECES == SHAPE.BLOCK_HOPS:
        full = tl.minimum(tile.least // (TILE.BLOCKS * TILE.PIECE), num_steps)
    maximum = tl.full([TILE.BLOCK_M, TILE.BLOCKS], float("-inf"), tl.float32)
    total = tl.zeros([TILE.BLOCK_M, TILE.BLOCKS], tl.float32)
    for step in tl.range(0, full, num_stages=TILE.NUM_STAGES):
        logs = weights_of_step(
            q_tile, of_pairs, visible, k, tile.num_windows, step, scale, SHAPE, TILE, False
        )
        maximum, total = add_piece(maximum, total, logs, step % PIECES, PIECES)
        store_step(logs_ptr, of_pair, maximum, total, inside, step, reached, chunk_pairs, TILE)
    for step in tl.range(full, num_steps, num_stages=TILE.NUM_STAGES):
        logs = weights_of_step(
            q_tile, of_pairs, visible, k, tile.num_windows, step, scale, SHAPE, TILE, True
        )
        maximum, total = add_piece(maximum, total, logs, step % PIECES, PIECES)
        store_step(logs_ptr, of_pair, maximum, total, inside, step, reached, chunk_pairs, TILE)


@triton.jit
def add_logs(maximum, total, logs):
    """The sum total * 2 ** maximum, to which powers of two are added; any of them may be 0."""
    raised = tl.maximum(maximum, logs)
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, total * tl.exp2(maximum - shift) + tl.exp2(logs - shift)


@kernel
def join_heads_kernel(
    logs,
    joined,
    positions_ptr,
    num_blocks,
    chunk_rows,
    first_row,
    end_row,
    COMPRESSED: tl.constexpr,
    DENSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds up the heads of a group, for a tile of queries and of blocks.

    COMPRESSED and DENSE: the `Shape`s. Blocks that a query sees nothing of are left out.
    """
    G: tl.constexpr = DENSE.G
    row = tl.program_id(0) * TILE.ROWS + tl.arange(0, TILE.ROWS)  # of the chunk
    block = tl.program_id(1) * TILE.BLOCKS + tl.arange(0, TILE.BLOCKS)[:, None]
    head = tl.program_id(2).to(tl.int64)
    inside = first_row + row < end_row
    position = tl.load(positions_ptr + first_row + row, mask=inside, other=-1)
    num_tokens = tl.maximum(position + 1, 0)
    eligible = block < tl.minimum(blocks_reached(num_tokens, DENSE), num_blocks)[None, :]
    num_windows = tl.maximum(num_tokens - COMPRESSED.KERNEL_SIZE + COMPRESSED.KERNEL_STRIDE, 0)
    num_windows = num_windows // COMPRESSED.KERNEL_STRIDE
    scored = block < tl.minimum(blocks_reached(num_windows, COMPRESSED), num_blocks)[None, :]

    of_block = (head * num_blocks + block) * chunk_rows
    mass = tl.zeros([TILE.BLOCKS, TILE.ROWS], tl.float32)
    maximum = tl.full([TILE.BLOCKS, TILE.ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE.BLOCKS, TILE.ROWS], tl.float32)
    for member in range(G):
        at = (of_block + row[None, :]) * G + member
        mass += tl.exp2(tl.load(logs.dense + at, mask=eligible, other=float("-inf")))
        more = tl.load(logs.compressed + at, mask=scored, other=float("-inf"))
        maximum, total = add_logs(maximum, total, more)
    at = of_block + row[None, :]
    tl.store(joined.mass + at, mass * (1.0 / G), mask=eligible)
    scores = logarithm(maximum, total)
    tl.store(joined.scores + at, scores, mask=scored)


def shape_of(q: Tensor, k: Tensor, windows: Windows, block_size: int) -> Shape:
    """The constants of q `[T, HQ, D]` over k `[T // kernel_stride, HKV, D]`."""
    group_size, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    kernel_size, kernel_stride = windows
    hops = (kernel_size // kernel_stride, block_size // kernel_stride)
    return constants(Shape(group_size, head_dim, padded_dim(head_dim), *windows, *hops))


def block_tile(num_windows: int, q: Tensor, m: int, n: int, num_stages: int) -> BlockTile:
    """A tile of m pairs and n windows, of which a block has num_windows."""
    piece = min(next_power_of_2(num_windows), n)
    cut = (n // piece, piece, cdiv(num_windows, piece))
    return constants(BlockTile(m, *cut, num_stages, dot_precision(q.dtype)))
