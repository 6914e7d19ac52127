"""Comparing what dense and compressed attention give to blocks, in Triton, query by query.

A program owns a tile of queries of one KV head and walks the blocks that these see more than once:
for the sums over the compared blocks, and then for what is to be known of each.

    compare    the divergence, the mass in chosen blocks and their recall. A chosen block is among
               those with the most mass if fewer have more: nothing is sorted.
    grade      the gradients of the logarithms of block scores, which take the place of the mass.
    subtract   what the softmax of every pair subtracts from the gradients of its scores, as in any
               attention: the sum of the gradients times the softmax weights.

In a kernel joined is `Joined`, RULE is the call's `Rule`, and TILE a `RowTile`. Logarithms are of
base 2 but for the results.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nsa_fsa.ops.block_divergence.weigh import logarithm
from nsa_fsa.ops.common.primitives import LN_2, kernel


class Rule(NamedTuple):
    """Which blocks are compared, as constants."""

    BLOCK_SIZE: Any
    KERNEL_STRIDE: Any
    WINDOW_HOPS: Any  # hops of a window
    BLOCK_HOPS: Any  # hops of a block
    INIT: Any  # forced blocks
    LOCAL: Any
    FREE_ONLY: Any
    G: Any  # query heads of a KV head


class Queries(NamedTuple):
    """Some queries of a chunk, and the blocks of each."""

    inside: Any  # whether there is such a query
    own: Any  # its own block; -1 for a row without a position
    begin: Any  # the first compared block
    end: Any  # the block after the last compared one
    last: Any  # the last block that any of them sees


@triton.jit
def queries_of(positions_ptr, row, first_row, end_row, num_blocks, RULE: tl.constexpr):
    """The queries `row` of the chunk, as `Queries`.

    The compared blocks are neighbours: those that a window reaches that lies in the past, or of
    these the free ones.
    """
    inside = first_row + row < end_row
    position = tl.maximum(tl.load(positions_ptr + first_row + row, mask=inside, other=-1), -1)
    own = tl.where(position < 0, -1, position // RULE.BLOCK_SIZE)
    own = tl.minimum(own, num_blocks - 1)
    hops = (position + 1) // RULE.KERNEL_STRIDE
    begin = tl.zeros_like(own)
    end = tl.where(hops >= RULE.WINDOW_HOPS, (hops + RULE.BLOCK_HOPS - 1) // RULE.BLOCK_HOPS, 0)
    end = tl.minimum(end, num_blocks)
    if RULE.FREE_ONLY:
        begin += RULE.INIT
        end = tl.minimum(end, own - RULE.LOCAL + 1)
    return Queries(inside, own, begin, end, tl.max(own, 0))


@triton.jit
def add_compared(joined, of_row, queries, chunk_rows, TILE: tl.constexpr):
    """The mass of the compared blocks, and the logarithm of their scores' sum; 0 for none."""
    total_mass = tl.zeros([TILE.ROWS], tl.float32)
    maximum = tl.full([TILE.ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE.ROWS], tl.float32)
    for start in range(0, queries.last + 1, TILE.BLOCKS):
        block = start + tl.arange(0, TILE.BLOCKS)[:, None]
        compared = (block >= queries.begin[None, :]) & (block < queries.end[None, :])
        at = of_row[None, :] + block.to(tl.int64) * chunk_rows
        mass = tl.load(joined.mass + at, mask=compared, other=0.0)
        scores = tl.load(joined.scores + at, mask=compared, other=float("-inf"))
        total_mass += tl.sum(mass, 0)
        raised = tl.maximum(maximum, tl.max(scores, 0))
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp2(maximum - shift) + tl.sum(tl.exp2(scores - shift[None, :]), 0)
        maximum = raised
    total_score = logarithm(maximum, total)
    return total_mass, tl.where(total > 0, total_score, 0.0)


@triton.jit
def chosen_block(indices_ptr, place, inside, own, PLACES: tl.constexpr):
    """The block at a place of each query's choice, or -1 for none that it sees, and for one that an
    earlier place has as well. indices_ptr: the queries' first places."""
    block = tl.load(indices_ptr + place, mask=inside, other=-1)
    block = tl.where((block >= 0) & (block <= own), block, -1)
    repeated = tl.zeros_like(block)
    for start in range(0, place, PLACES):
        earlier = start + tl.arange(0, PLACES)[:, None]
        mask = inside[None, :] & (earlier < place)
        others = tl.load(indices_ptr[None, :] + earlier, mask=mask, other=-1)
        repeated += tl.sum((others == block[None, :]).to(tl.int32), 0)
    return tl.where(repeated > 0, -1, block)


@triton.jit
def is_free(block, own, RULE: tl.constexpr):
    """Which blocks are neither forced nor future."""
    return (block >= RULE.INIT) & (block <= own - RULE.LOCAL)


@triton.jit
def measure_choice(
    joined, of_row, indices_ptr, queries, chunk_rows, num_selected, RULE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The mass in the chosen blocks, and their recall."""
    PLACES: tl.constexpr = 16  # looked at together for repetitions
    inside, own = queries.inside, queries.own
    held = tl.zeros([TILE.ROWS], tl.float32)
    num_chosen = tl.zeros([TILE.ROWS], tl.int32)  # of free blocks
    for place in range(0, num_selected):
        block = chosen_block(indices_ptr, place, inside, own, PLACES)
        chosen_at = of_row + block.to(tl.int64) * chunk_rows
        held += tl.load(joined.mass + chosen_at, mask=block >= 0, other=0.0)
        num_chosen += ((block >= 0) & is_free(block, own, RULE)).to(tl.int32)

    found = tl.zeros([TILE.ROWS], tl.int32)
    for place in range(0, num_selected):
        block = chosen_block(indices_ptr, place, inside, own, PLACES)
        chosen = (block >= 0) & is_free(block, own, RULE)
        chosen_at = of_row + block.to(tl.int64) * chunk_rows
        mass = tl.load(joined.mass + chosen_at, mask=chosen, other=0.0)
        rank = tl.zeros([TILE.ROWS], tl.int32)  # how many free blocks come before this one
        for start in range(0, queries.last + 1, TILE.BLOCKS):
            other = start + tl.arange(0, TILE.BLOCKS)[:, None]
            free = is_free(other, own[None, :], RULE)
            at = of_row[None, :] + other.to(tl.int64) * chunk_rows
            others = tl.load(joined.mass + at, mask=free, other=-1.0)
            tied_before = (others == mass[None, :]) & (other < block[None, :])
            rank += tl.sum((free & ((others > mass[None, :]) | tied_before)).to(tl.int32), 0)
        found += (chosen & (rank < num_chosen)).to(tl.int32)

    num_free = tl.maximum(own - RULE.LOCAL - RULE.INIT + 1, 0)
    has_choice = (num_chosen > 0) & (num_free > num_chosen)
    recall = found.to(tl.float32) / tl.maximum(num_chosen, 1).to(tl.float32)
    return held, tl.where(has_choice, recall, float("nan"))


@kernel
def compare_kernel(
    joined,
    positions_ptr,
    indices,
    divergence_ptr,
    mass_ptr,
    recall_ptr,
    num_selected,
    num_blocks,
    chunk_rows,
    first_row,
    end_row,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The three results of a tile of queries, each `[T, HKV]`. indices: `Heads`."""
    row = tl.program_id(0) * TILE.ROWS + tl.arange(0, TILE.ROWS)  # of the chunk
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    queries = queries_of(positions_ptr, row, first_row, end_row, num_blocks, RULE)
    of_row = head * num_blocks * chunk_rows + row
    total_mass, total_score = add_compared(joined, of_row, queries, chunk_rows, TILE)
    total_mass = tl.where(total_mass == 0, 1.0, total_mass)

    divergence = tl.zeros([TILE.ROWS], tl.float32)
    for start in range(0, queries.last + 1, TILE.BLOCKS):
        block = start + tl.arange(0, TILE.BLOCKS)[:, None]
        compared = (block >= queries.begin[None, :]) & (block < queries.end[None, :])
        at = of_row[None, :] + block.to(tl.int64) * chunk_rows
        target = tl.load(joined.mass + at, mask=compared, other=0.0) / total_mass[None, :]
        student = tl.load(joined.scores + at, mask=compared, other=0.0) - total_score[None, :]
        known = tl.log2(tl.where(target > 0, target, 1.0))
        divergence += tl.sum(tl.where(target > 0, target * (known - student), 0.0), 0)

    query = (first_row + row).to(tl.int64)
    indices_ptr = indices.ptr + query * indices.stride_t + head * indices.stride_h
    mass, recall = measure_choice(
        joined, of_row, indices_ptr, queries, chunk_rows, num_selected, RULE, TILE
    )
    target_at = query * num_heads + head
    tl.store(divergence_ptr + target_at, divergence * LN_2, mask=queries.inside)
    tl.store(mass_ptr + target_at, mass, mask=queries.inside)
    tl.store(recall_ptr + target_at, recall, mask=queries.inside)


@kernel
def grade_kernel(
    joined,
    positions_ptr,
    do_ptr,
    num_blocks,
    chunk_rows,
    first_row,
    end_row,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes, over the mass of every block up to the own ones of a tile of queries, the gradient of
    the logarithm of its score; do_ptr has the divergence's, `[T, HKV]`."""
    row = tl.program_id(0) * TILE.ROWS + tl.arange(0, TILE.ROWS)  # of the chunk
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    queries = queries_of(positions_ptr, row, first_row, end_row, num_blocks, RULE)
    of_row = head * num_blocks * chunk_rows + row
    total_mass, total_score = add_compared(joined, of_row, queries, chunk_rows, TILE)
    is_known = total_mass > 0
    total_mass = tl.where(is_known, total_mass, 1.0)
    query = (first_row + row).to(tl.int64)
    do = tl.load(do_ptr + query * num_heads + head, mask=queries.inside, other=0.0)

    for start in range(0, queries.last + 1, TILE.BLOCKS):
        block = start + tl.arange(0, TILE.BLOCKS)[:, None]
        compared = (block >= queries.begin[None, :]) & (block < queries.end[None, :])
        at = of_row[None, :] + block.to(tl.int64) * chunk_rows
        target = tl.load(joined.mass + at, mask=compared, other=0.0) / total_mass[None, :]
        scores = tl.load(joined.scores + at, mask=compared, other=float("-inf"))
        student = tl.where(is_known[None, :], tl.exp2(scores - total_score[None, :]), 0.0)
        grad = tl.where(compared, (student - target) * do[None, :], 0.0)
        tl.store(joined.mass + at, grad, mask=block <= queries.own[None, :])


@kernel
def subtract_kernel(
    joined,
    logs_ptr,
    positions_ptr,
    delta_ptr,
    num_blocks,
    chunk_rows,
    first_row,
    end_row,
    RULE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of a tile of pairs the sum of the gradients of their scores before softmax subtracts it,
    delta `[HKV, rows, G]`: of every block's gradient the share that the pair has in its score.

    logs_ptr: of compressed attention, `[HKV, J, pairs]`.
    """
    G: tl.constexpr = RULE.G
    pair = tl.program_id(0) * TILE.ROWS + tl.arange(0, TILE.ROWS)  # of the chunk
    head = tl.program_id(1).to(tl.int64)
    row = pair // G
    queries = queries_of(positions_ptr, row, first_row, end_row, num_blocks, RULE)
    of_head = head * num_blocks * chunk_rows

    delta = tl.zeros([TILE.ROWS], tl.float32)
    for start in range(0, queries.last + 1, TILE.BLOCKS):
        block = start + tl.arange(0, TILE.BLOCKS)[:, None]
        compared = (block >= queries.begin[None, :]) & (block < queries.end[None, :])
        of_block = of_head + block.to(tl.int64) * chunk_rows
        at = of_block + row[None, :]
        grad = tl.load(joined.mass + at, mask=compared, other=0.0)
        scores = tl.load(joined.scores + at, mask=compared, other=0.0)
        own = tl.load(logs_ptr + of_block * G + pair[None, :], mask=compared, other=float("-inf"))
        delta += tl.sum(grad * tl.exp2(own - scores), 0)
    tl.store(delta_ptr + head * chunk_rows * G + pair, delta, mask=queries.inside)
