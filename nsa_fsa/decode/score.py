"""The compressed branch of new tokens, and their choice of blocks.

    score      A program owns a share of one sequence's compressed tokens, for one KV head and all
               new tokens. It attends to them, and leaves of every head and block how much softmax
               weight their windows have, relative to the largest score of its tile: what they give
               to the block that they begin in, and what to the next one. Nothing is read twice.
    shortlist  Once the shares' softmax statistics are known, so is what these weights are of the
               whole. A program owns one new token, one KV head and some neighbouring blocks, and
               leaves the best of them.

How a sequence is cut into shares depends on its own length alone.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nsa_fsa.decode.paged import row_of
from nsa_fsa.ops.common.primitives import dot_keys, kernel, load_rows, online_softmax


class Sizes(NamedTuple):
    """What is alike in all programs of decoding; a constant of the kernels."""

    NEW: int  # new tokens of a sequence
    HKV: int
    G: int
    D: int
    PADDED_D: int
    DV: int
    PADDED_DV: int
    WINDOW_HOPS: int
    BLOCK_HOPS: int
    STRIDE: int  # tokens of a hop
    NUM_SELECTED: int
    INIT: int
    LOCAL: int
    WINDOW: int  # keys of the sliding window
    PAGE: int  # tokens of a page; 0: a sequence has one
    STATES: int  # states of a page; 0: a sequence has one
    PRECISION: str  # of products


class ScoreTile(NamedTuple):
    """How the compressed branch cuts its work; a constant of the kernels."""

    ROWS: int  # pairs of a program: heads of the group, for one new token after the other
    BLOCKS: int  # of a step
    PHASES: int  # windows that begin in a block, to a power of two
    SHARES: int  # of a sequence at most
    LEAST: int  # steps of a share
    STAGES: int


class Partial(NamedTuple):
    """Softmax of shares, in a kernel: o `[T, HQ, shares, DV]`, the others `[T, HQ, shares]`."""

    o_ptr: Any
    maximum_ptr: Any  # in base 2
    total_ptr: Any


class BlockSums(NamedTuple):
    """What windows weigh, in a kernel, relative to their tile's largest score."""

    own_ptr: Any  # [T, HQ, blocks], in the block that they begin in
    next_ptr: Any  # [T, HQ, blocks], in the one after it
    shift_ptr: Any  # [T, HQ, tiles], that score, in base 2


@triton.jit
def num_windows(num_tokens, SIZES: tl.constexpr):
    """Windows that so many tokens complete."""
    return tl.maximum(num_tokens // SIZES.STRIDE - (SIZES.WINDOW_HOPS - 1), 0)


@triton.jit
def share_of(tiles, share, TILE: tl.constexpr):
    """The tiles of one of a sequence's shares: the first, and the one after the last."""
    most = tl.maximum(tl.cdiv(tiles, TILE.SHARES), TILE.LEAST)
    return share * most, tl.minimum(share * most + most, tiles)


@triton.jit
def store_partial(partial, at, acc, maximum, total, used, SIZES: tl.constexpr):
    """acc `[M, PADDED_DV]`, maximum and total `[M]`, to the places `at`; no acc where nothing is
    seen."""
    column = tl.arange(0, SIZES.PADDED_DV)
    some = used & (maximum > -float("inf"))
    inside = some[:, None] & (column < SIZES.DV)[None, :]
    tl.store(partial.o_ptr + (at * SIZES.DV)[:, None] + column[None, :], acc, mask=inside)
    tl.store(partial.maximum_ptr + at, maximum, mask=used)
    tl.store(partial.total_ptr + at, total, mask=used)


@triton.jit
def store_sums(sums, p, shift, pair, tile, used, num_blocks, SIZES: tl.constexpr, TILE):
    """What a tile's windows weigh, p `[M, PHASES * BLOCKS]`, by block."""
    M: tl.constexpr = p.shape[0]
    phase = tl.arange(0, TILE.PHASES)[None, :, None]
    exists = phase < SIZES.BLOCK_HOPS
    hops = tl.where(exists, tl.minimum(SIZES.WINDOW_HOPS, SIZES.BLOCK_HOPS - phase), 0)
    rest = tl.where(exists, SIZES.WINDOW_HOPS - hops, 0)
    p = tl.reshape(p, [M, TILE.PHASES, TILE.BLOCKS])
    block = tile * TILE.BLOCKS + tl.arange(0, TILE.BLOCKS)
    at = (pair * num_blocks)[:, None] + block[None, :]
    mask = used[:, None] & (block < num_blocks)[None, :]
    tl.store(sums.own_ptr + at, tl.sum(p * hops.to(tl.float32), 1), mask=mask)
    tl.store(sums.next_ptr + at, tl.sum(p * rest.to(tl.float32), 1), mask=mask)
    tl.store(sums.shift_ptr + pair * tl.cdiv(num_blocks, TILE.BLOCKS) + tile, shift, mask=used)


@triton.jit
def store_nothing(partial, number, share, head, sequence, SIZES: tl.constexpr, TILE: tl.constexpr):
    """What a share without any tile leaves; nobody reads its output."""
    token = (sequence * SIZES.NEW + number // SIZES.G).to(tl.int64)
    pair = token * (SIZES.HKV * SIZES.G) + head * SIZES.G + number % SIZES.G
    used = number < SIZES.NEW * SIZES.G
    tl.store(partial.maximum_ptr + pair * TILE.SHARES + share, float("-inf"), mask=used)
    tl.store(partial.total_ptr + pair * TILE.SHARES + share, 0.0, mask=used)


@kernel
def score_kernel(
    q,
    k_cmp,
    v_cmp,
    table,
    lengths_ptr,
    partial,
    sums,
    scale,
    num_blocks,
    SIZES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (share, KV head and tile of its pairs, sequence); q is `Heads`, k_cmp and v_cmp are
    `Paged`. scale is that of base 2, and num_blocks are those that a sequence can have."""
    share, sequence = tl.program_id(0), tl.program_id(2)
    PAIRS: tl.constexpr = SIZES.NEW * SIZES.G
    TILES: tl.constexpr = (PAIRS + TILE.ROWS - 1) // TILE.ROWS
    head = (tl.program_id(1) // TILES).to(tl.int64)
    N: tl.constexpr = TILE.BLOCKS * TILE.PHASES

    # Pairs of a new token and a head of the group.
    number = tl.program_id(1) % TILES * TILE.ROWS + tl.arange(0, TILE.ROWS)
    new = number // SIZES.G
    total_tokens = tl.load(lengths_ptr + sequence)
    windows = num_windows(total_tokens, SIZES)
    tiles = tl.cdiv(windows, TILE.BLOCKS * SIZES.BLOCK_HOPS)
    first, end = share_of(tiles, share, TILE)
    if first >= end:
        store_nothing(partial, number, share, head, sequence, SIZES, TILE)
        return
    position = total_tokens - SIZES.NEW + new
    used = (number < PAIRS) & (position >= 0)
    token = (sequence * SIZES.NEW + new).to(tl.int64)
    query_head = head * SIZES.G + number % SIZES.G
    at = token * q.stride_t + query_head * q.stride_h
    loaded = load_rows(q.ptr, at, used, SIZES.D, SIZES.PADDED_D, True)
    visible = tl.where(used, num_windows(position + 1, SIZES), 0)
    pair = token * (SIZES.HKV * SIZES.G) + query_head

    acc = tl.zeros([TILE.ROWS, SIZES.PADDED_DV], tl.float32)
    maximum = tl.full([TILE.ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE.ROWS], tl.float32)

    # The windows of a tile lie phase by phase: those that begin in one block far apart, so that
    # they are summed without a shuffle.
    column = tl.arange(0, N)
    phase, block = column // TILE.BLOCKS, column % TILE.BLOCKS
    for tile in tl.range(first, end, num_stages=TILE.STAGES):
        window = (tile * TILE.BLOCKS + block) * SIZES.BLOCK_HOPS + phase
        exists = (window < windows) & (phase < SIZES.BLOCK_HOPS)
        state = window + SIZES.WINDOW_HOPS - 1
        page, row = row_of(table, sequence, state, exists, SIZES.STATES)
        where = page * k_cmp.stride_p + head * k_cmp.stride_h + row * k_cmp.stride_n
        k = load_rows(k_cmp.ptr, where, exists, SIZES.D, SIZES.PADDED_D, True)
        where = page * v_cmp.stride_p + head * v_cmp.stride_h + row * v_cmp.stride_n
        v = load_rows(v_cmp.ptr, where, exists, SIZES.DV, SIZES.PADDED_DV, True)

        scores = dot_keys(loaded, k, SIZES.PRECISION) * scale
        seen = exists[None, :] & (window[None, :] < visible[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v, SIZES.PRECISION)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        p = tl.exp2(scores - shift[:, None])
        store_sums(sums, p, shift, pair, tile, used, num_blocks, SIZES, TILE)
    store_partial(partial, pair * TILE.SHARES + share, acc, maximum, total, used, SIZES)


@triton.jit
def log_of_total(partial, pair, used, SHARES: tl.constexpr):
    """The log of the softmax's sum over all shares of some pairs, in base 2; -inf for nothing."""
    at = (pair * SHARES)[:, None] + tl.arange(0, SHARES)[None, :]
    maximum = tl.load(partial.maximum_ptr + at, mask=used[:, None], other=-float("inf"))
    total = tl.load(partial.total_ptr + at, mask=used[:, None], other=0.0)
    top = tl.max(maximum, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return shift + tl.log2(tl.sum(total * tl.exp2(maximum - shift[:, None]), 1))


@triton.jit
def weight_of(sums_ptr, shift_ptr, log_total, pair, block, here, num_blocks, TILE: tl.constexpr):
    """What pairs' windows weigh in blocks, of the whole softmax: `[pairs, blocks]`, 0 elsewhere
    than `here`."""
    at = (pair * num_blocks)[:, None] + block[None, :]
    weight = tl.load(sums_ptr + at, mask=here, other=0.0)
    at = (pair * tl.cdiv(num_blocks, TILE.BLOCKS))[:, None] + (block // TILE.BLOCKS)[None, :]
    shift = tl.load(shift_ptr + at, mask=here, other=0.0)
    return tl.where(here, weight * tl.exp2(shift - log_total[:, None]), 0.0)


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
    the first are the best. A sort would take many times the instructions of this search, bit by
    bit, for the least score that is good enough.
    """
    least = 0
    for bit in tl.static_range(30, -1, -1):
        tried = least | (1 << bit)
        least = tl.where(tl.sum((score >= tried).to(tl.int32), 0) >= BEST, tried, least)
    better, equal = score > least, score == least
    room = BEST - tl.sum(better.to(tl.int32), 0)
    best = better | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    return best, tl.cumsum(best.to(tl.int32), 0) - 1


@kernel
def shortlist_kernel(
    sums,
    partial,
    lengths_ptr,
    list_ptr,
    num_blocks,
    SIZES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Program (CHUNK neighbouring blocks, KV head, new token): its best blocks that are not forced,
    ascending, and their scores, to list `[T, HKV, programs, LISTED]`; -1 behind them.

    HEADS is the group's size, to a power of two.
    """
    chunk, head, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total_tokens = tl.load(lengths_ptr + token // SIZES.NEW)
    position = total_tokens - SIZES.NEW + token % SIZES.NEW
    own = position // (SIZES.BLOCK_HOPS * SIZES.STRIDE)
    tiles = tl.cdiv(num_windows(total_tokens, SIZES), TILE.BLOCKS * SIZES.BLOCK_HOPS)
    written = tiles * TILE.BLOCKS  # blocks whose sums there are
    at = (token.to(tl.int64) * SIZES.HKV + head) * tl.num_programs(0) + chunk
    list_ptr += at * LISTED

    # Of few blocks all are chosen, whatever is listed.
    if (own < SIZES.NUM_SELECTED) | (chunk * CHUNK > own - SIZES.LOCAL):
        place = tl.arange(0, LISTED)
        tl.store(list_ptr + place, tl.full([LISTED], -1, tl.int64))
        return
    member = tl.arange(0, HEADS)
    used = member < SIZES.G
    pair = token.to(tl.int64) * (SIZES.HKV * SIZES.G) + head * SIZES.G + member
    log_total = log_of_total(partial, pair, used, TILE.SHARES)
    block = chunk * CHUNK + tl.arange(0, CHUNK)
    eligible = (block >= SIZES.INIT) & (block <= own - SIZES.LOCAL)
    here = used[:, None] & (eligible & (block < written))[None, :]
    weight = weight_of(
        *(sums.own_ptr, sums.shift_ptr, log_total, pair, block, here, num_blocks, TILE)
    )
    before = block - 1
    here = used[:, None] & (eligible & (before >= 0) & (before < written))[None, :]
    weight += weight_of(
        *(sums.next_ptr, sums.shift_ptr, log_total, pair, before, here, num_blocks, TILE)
    )
    score = tl.where(eligible, tl.sum(weight, 0).to(tl.int32, bitcast=True), -1)
    best, number = best_of(score, SIZES.NUM_SELECTED - SIZES.INIT - SIZES.LOCAL)
    tl.store(list_ptr + number, pack(score, block), mask=best)
    place = tl.arange(0, LISTED)
    tl.store(list_ptr + place, -1, mask=place >= tl.sum(best.to(tl.int32), 0))
