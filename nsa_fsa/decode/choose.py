"""The choice of blocks of new tokens.

Once all shares of the compressed branch are done, so is its softmax, and what every block's windows
weigh of the whole is known. A program owns one new token, one KV head and some neighbouring blocks,
and lists the best of them; the last program of a token and KV head chooses from all lists.
"""

import triton
import triton.language as tl

from nsa_fsa.decode.overlap import pass_turn, take_turn
from nsa_fsa.decode.score import num_windows
from nsa_fsa.ops.common.primitives import kernel

# Shares that are added up at once; empty ones behind them change no bit.
SHARES_AT_ONCE = tl.constexpr(32)
BEYOND_INF = tl.constexpr(0x7F800001)  # the bits of a NaN


@triton.jit
def log_of_total(partial, first_pair, used, num_shares):
    """The log of the softmax's sum over all shares of the group's pairs, in base 2; 0 for
    nothing."""
    top = tl.full(used.shape, float("-inf"), tl.float32)
    total = tl.zeros(used.shape, tl.float32)
    member = tl.arange(0, used.shape[0])
    maximum_ptr = partial.maximum_ptr + first_pair * num_shares
    total_ptr = partial.total_ptr + first_pair * num_shares
    for first in tl.range(0, num_shares, SHARES_AT_ONCE, num_stages=1):
        share = first + tl.arange(0, SHARES_AT_ONCE)
        at = (member * num_shares)[:, None] + share[None, :]
        mask = used[:, None] & (share < num_shares)[None, :]
        maximum = tl.load(maximum_ptr + at, mask=mask, other=-float("inf"))
        totals = tl.load(total_ptr + at, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(maximum, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total *= tl.exp2(top - shift)
        total += tl.sum(totals * tl.exp2(maximum - shift[:, None]), 1)
        top = higher
    return tl.where(total == 0, 0.0, top + tl.log2(total))


@triton.jit
def scores_of(
    sums,
    log_total,
    first_pair,
    used,
    block,
    eligible,
    written,
    num_blocks,
    BLOCKS_OF_TILE: tl.constexpr,
):
    """What windows weigh in blocks, of the whole softmax, all heads of the group together; 0 in
    blocks that are not eligible. written: blocks whose sums there are."""
    num_tiles, member = tl.cdiv(num_blocks, BLOCKS_OF_TILE), tl.arange(0, used.shape[0])
    at = (member * num_blocks)[:, None] + block[None, :]
    tile = (member * num_tiles)[:, None] + (block // BLOCKS_OF_TILE)[None, :]
    shift_ptr = sums.shift_ptr + first_pair * num_tiles

    here = used[:, None] & (eligible & (block < written))[None, :]
    shift = tl.load(shift_ptr + tile, mask=here, other=-float("inf"))
    scale = tl.exp2(shift - log_total[:, None])
    sums_of_own = tl.load(sums.own_ptr + first_pair * num_blocks + at, mask=here, other=0.0)
    weight = sums_of_own * scale

    # Windows that begin in the block before this one lie in another tile if this one begins a tile.
    here = used[:, None] & (eligible & (block > 0) & (block <= written))[None, :]
    first = (block % BLOCKS_OF_TILE == 0)[None, :]
    shift = tl.load(shift_ptr + tile - 1, mask=here & first, other=-float("inf"))
    scale = tl.where(first, tl.exp2(shift - log_total[:, None]), scale)
    sums_of_last = tl.load(sums.last_ptr + first_pair * num_blocks + at, mask=here, other=0.0)
    return tl.sum(weight + sums_of_last * scale, 0)


@triton.jit
def pack(score, block):
    """The bits of a score, and a block, in 64 bits."""
    return (score.to(tl.int64) << 32) | block.to(tl.int64)


@triton.jit
def unpack(packed):
    """The opposite; -1 and -1 of -1."""
    return (packed >> 32).to(tl.int32), packed.to(tl.int32)


@triton.jit
def best_of(score, BEST: tl.constexpr):
    """Which are the BEST of all scores, or all that there are, and what number each has among them.

    score: int32, the bits of a number that is not negative, or -1 for none; `[N]`. Of equal ones
    the first are the best, and what lies beyond inf is equal. The least score that is good enough
    is searched for two bits at a time, until as many are as good: few additions, where a sort would
    need many comparisons. One sum counts what is as good as each of three scores, side by side.
    """
    COUNT: tl.constexpr = tl.int32 if score.shape[0] <= 512 else tl.int64
    BITS: tl.constexpr = 10 if score.shape[0] <= 512 else 20
    score = tl.minimum(score, BEYOND_INF)
    least, bit = 0, 29
    count = tl.sum((score >= 0).to(tl.int32), 0)
    while (count > BEST) & (bit >= 0):
        counts = (score >= least + (1 << bit)).to(COUNT)
        counts += (score >= least + (2 << bit)).to(COUNT) << BITS
        counts += (score >= least + (3 << bit)).to(COUNT) << 2 * BITS
        counts = tl.sum(counts, 0)
        passed = 0
        for tried in tl.static_range(3):
            as_good = ((counts >> tried * BITS) & ((1 << BITS) - 1)).to(tl.int32)
            count = tl.where(as_good >= BEST, as_good, count)
            passed = tl.where(as_good >= BEST, tried + 1, passed)
        least += passed << bit
        bit = tl.where(bit == 1, 0, bit - 2)  # 29, 27, ... 1, and the last one alone
    best = score >= least
    if count > BEST:  # ties
        better, equal = score > least, score == least
        room = BEST - tl.sum(better.to(tl.int32), 0)
        best = better | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return best, tl.cumsum(best.to(tl.int32), 0) - 1


@triton.jit
def store_list(list_ptr, packed, best, number, LISTED: tl.constexpr):
    """Writes the best of some scores with their blocks, and -1 behind them."""
    tl.store(list_ptr + number, packed, mask=best)
    place = tl.arange(0, LISTED)
    behind = place >= tl.sum(best.to(tl.int32), 0)
    tl.store(list_ptr + place, tl.full([LISTED], -1, tl.int64), mask=behind)


@triton.jit
def store_forced(indices_ptr, own, PLACES: tl.constexpr, SIZES: tl.constexpr):
    """Writes the blocks that a query reads whatever their scores: the first and the last, or all
    that there are. own: the query's own block, -1 for a query that there is not."""
    place = tl.arange(0, PLACES)
    block = tl.where(place < SIZES.INIT, place, own - (SIZES.NUM_SELECTED - 1 - place))
    forced = (place < SIZES.INIT) | (place >= SIZES.NUM_SELECTED - SIZES.LOCAL)
    if own < SIZES.NUM_SELECTED:
        block = tl.where(place <= own, place, -1)
        forced = place >= 0
    tl.store(indices_ptr + place, block, mask=forced & (place < SIZES.NUM_SELECTED))


@triton.jit
def best_of_lists(list_ptr, num_lists, AT_ONCE: tl.constexpr, LISTED: tl.constexpr, BEST):
    """The blocks of the best of all listed scores, which of them are the best, and what number each
    has among these: `[AT_ONCE * LISTED]`.

    AT_ONCE lists are looked at together. Of more, the best of each AT_ONCE are listed first, in
    place of lists that have been read.
    """
    listed = tl.arange(0, AT_ONCE * LISTED)
    while num_lists > AT_ONCE:
        shorter = tl.cdiv(num_lists, AT_ONCE)
        for i in tl.range(0, shorter, num_stages=1):
            tl.debug_barrier()
            inside = i * (AT_ONCE * LISTED) + listed < num_lists * LISTED
            at = list_ptr + i * (AT_ONCE * LISTED) + listed
            found = tl.load(at, mask=inside, other=-1, cache_modifier=".cg")
            best, number = best_of(unpack(found)[0], BEST)
            tl.debug_barrier()
            store_list(list_ptr + i * LISTED, found, best, number, LISTED)
        num_lists = shorter
        tl.debug_barrier()
    found = tl.load(
        list_ptr + listed, mask=listed < num_lists * LISTED, other=-1, cache_modifier=".cg"
    )
    score, block = unpack(found)
    best, number = best_of(score, BEST)
    return block, best, number


@kernel
def choose_kernel(
    sums,
    partial,
    lengths_ptr,
    list_ptr,
    finished_ptr,
    indices_ptr,
    num_blocks,
    num_shares,
    most_lists,
    SIZES: tl.constexpr,
    BLOCKS_OF_TILE: tl.constexpr,
    RANKED: tl.constexpr,
    HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (new token, KV head, RANKED neighbouring blocks): its best blocks that are not
    forced, ascending, and their scores, to list `[T, HKV, most_lists, LISTED]`, -1 behind them. The
    last one of a token and KV head writes the chosen blocks to indices `[T, HKV, NUM_SELECTED]`.

    finished `[T, HKV]` counts the programs that have written their list. HEADS is the group's size
    and LISTED that of a list, to powers of two; AT_ONCE lists are looked at together.
    """
    take_turn(OVERLAP)
    token, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    BEST: tl.constexpr = SIZES.NUM_SELECTED - SIZES.INIT - SIZES.LOCAL
    total_tokens = tl.load(lengths_ptr + tl.program_id(0) // SIZES.NEW)
    position = total_tokens - SIZES.NEW + tl.program_id(0) % SIZES.NEW
    own = tl.where(position >= 0, position // (SIZES.BLOCK_HOPS * SIZES.STRIDE), -1)
    of_pair = token * SIZES.HKV + head
    indices_ptr += of_pair * SIZES.NUM_SELECTED
    if part == 0:
        store_forced(indices_ptr, own, LISTED, SIZES)
    lists = tl.cdiv(own - SIZES.LOCAL + 1, RANKED)
    if (own < SIZES.NUM_SELECTED) | (BEST == 0) | (part >= lists):
        return

    used, first_pair = tl.arange(0, HEADS) < SIZES.G, of_pair * SIZES.G
    log_total = log_of_total(partial, first_pair, used, num_shares)
    tiles = tl.cdiv(num_windows(total_tokens, SIZES), BLOCKS_OF_TILE * SIZES.BLOCK_HOPS)
    block = part * RANKED + tl.arange(0, RANKED)
    eligible = (block >= SIZES.INIT) & (block <= own - SIZES.LOCAL)
    score = scores_of(
        *(sums, log_total, first_pair, used, block, eligible, tiles * BLOCKS_OF_TILE, num_blocks),
        BLOCKS_OF_TILE,
    )
    # NaN is as good as the best or the worst, so that as many blocks are chosen as there should be.
    score = tl.where(eligible, tl.maximum(score.to(tl.int32, bitcast=True), 0), -1)
    best, number = best_of(score, BEST)
    pass_turn(OVERLAP)
    indices_ptr += SIZES.INIT
    if lists == 1:
        tl.store(indices_ptr + number, block, mask=best)
        return

    list_ptr += of_pair * most_lists * LISTED
    store_list(list_ptr + part * LISTED, pack(score, block), best, number, LISTED)
    tl.debug_barrier()  # all of the list before it counts
    if tl.atomic_add(finished_ptr + of_pair, 1, sem="acq_rel") < lists - 1:
        return
    block, best, number = best_of_lists(list_ptr, lists, AT_ONCE, LISTED, BEST)
    tl.store(indices_ptr + number, block, mask=best)
