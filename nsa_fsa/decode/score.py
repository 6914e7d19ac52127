"""The compressed branch of new tokens.

A program owns a share of one sequence's compressed tokens, for one KV head and a tile of the pairs
of its new tokens with the heads of the group. It attends to them, and leaves of every pair and
block how much softmax weight their windows have, relative to the largest score that the share has
met by then: what they give to the block that they begin in, and what to the next one. Up to 64
pairs read a compressed token once.

How a sequence is cut into shares depends on its own length alone.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nsa_fsa.decode.overlap import take_turn
from nsa_fsa.decode.paged import offsets_of, row_of
from nsa_fsa.ops.common.bundles import Pairs
from nsa_fsa.ops.common.primitives import dot_keys, kernel, load_pairs, load_rows, online_softmax


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
    SLIDING: int  # keys of the sliding window
    DENSE: int  # queries at a smaller position read all keys, as one branch; 0: none do
    PAGE: int  # tokens of a page; 0: a sequence has one
    STATES: int  # states of a page; 0: a sequence has one
    PRECISION: str  # of products


class ScoreTile(NamedTuple):
    """How the compressed branch cuts its work; a constant of the kernels."""

    ROWS: int  # pairs of a program: heads of the group, for one new token after the other
    BLOCKS: int  # of a step
    PHASES: int  # windows that begin in a block, to a power of two
    SHARES: int  # of a sequence at most, however long
    LEAST: int  # steps of a share
    STAGES: int


class Partial(NamedTuple):
    """Softmax of shares, in a kernel: o `[T, HQ, shares, DV]`, the others `[T, HQ, shares]`."""

    o_ptr: Any
    maximum_ptr: Any  # in base 2
    total_ptr: Any


class BlockSums(NamedTuple):
    """What windows weigh, in a kernel, relative to a score that is their tile's."""

    own_ptr: Any  # [T, HQ, blocks], of windows that begin in the block
    last_ptr: Any  # [T, HQ, blocks], of those that begin in the block before, and its tile
    shift_ptr: Any  # [T, HQ, tiles], that score, in base 2; -inf before the first


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
def pairs_of(sequence, head, tile, total_tokens, ROWS: tl.constexpr, SIZES: tl.constexpr):
    """A tile of the pairs of a sequence's new tokens with the heads of a group, and the tokens'
    positions."""
    number = tile * ROWS + tl.arange(0, ROWS)
    position = total_tokens - SIZES.NEW + number // SIZES.G
    token = (sequence * SIZES.NEW + number // SIZES.G).to(tl.int64)
    used = (number < SIZES.NEW * SIZES.G) & (position >= 0)
    return Pairs(token, head * SIZES.G + number % SIZES.G, used), position


@triton.jit
def number_of(pairs, SIZES: tl.constexpr):
    """Where pairs stand among all of them, int64."""
    return pairs.query * (SIZES.HKV * SIZES.G) + pairs.head


@triton.jit
def nothing_seen(ROWS: tl.constexpr, SIZES: tl.constexpr):
    """acc, maximum and total before the first key."""
    return (
        tl.zeros([ROWS, SIZES.PADDED_DV], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )


@triton.jit
def store_partial(partial, at, acc, maximum, total, used, SIZES: tl.constexpr):
    """acc `[M, PADDED_DV]`, maximum and total `[M]`, to the places `at`. Where nothing was seen, so
    that the total is 0, acc is not written; a total of NaN counts as seen."""
    column = tl.arange(0, SIZES.PADDED_DV)
    some = used & (total != 0)
    inside = some[:, None] & (column < SIZES.DV)[None, :]
    o_ptr = partial.o_ptr + (at * SIZES.DV)[:, None] + column[None, :]
    # What is read once more stays in the L2 cache, unlike the keys and values that pass through it.
    tl.store(o_ptr, acc, mask=inside, eviction_policy="evict_last")
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
    # Triton sums a reshaped tensor wrongly if lanes hold copies of an element: see check_resources.
    p = tl.reshape(p, [M, TILE.PHASES, TILE.BLOCKS])
    block = tile * TILE.BLOCKS + tl.arange(0, TILE.BLOCKS)
    at = (pair * num_blocks)[:, None] + block[None, :]
    mask = used[:, None] & (block < num_blocks)[None, :]
    tl.store(sums.own_ptr + at, tl.sum(p * hops.to(tl.float32), 1), mask=mask)
    mask = used[:, None] & (block + 1 < num_blocks)[None, :]
    tl.store(sums.last_ptr + at + 1, tl.sum(p * rest.to(tl.float32), 1), mask=mask)
    tl.store(sums.shift_ptr + pair * tl.cdiv(num_blocks, TILE.BLOCKS) + tile, shift, mask=used)


@triton.jit
def windows_of(tile, windows, SIZES: tl.constexpr, TILE: tl.constexpr):
    """A tile's windows, and which of them there are.

    They lie phase by phase, those that begin in one block far apart, so that a thread has them all
    and adds them up alone, unless a tile has few blocks.
    """
    column = tl.arange(0, TILE.BLOCKS * TILE.PHASES)
    phase, block = column // TILE.BLOCKS, column % TILE.BLOCKS
    window = (tile * TILE.BLOCKS + block) * SIZES.BLOCK_HOPS + phase
    return window, (window < windows) & (phase < SIZES.BLOCK_HOPS)


@kernel
def score_kernel(
    q,
    cache,
    of_pages,
    lengths_ptr,
    partial,
    sums,
    finished_ptr,
    scale,
    num_blocks,
    SIZES: tl.constexpr,
    PITCHES: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (sequence, KV head and tile of its pairs, share). q is `Heads`; cache is `Cache` and
    of_pages `PagePitches`, of compressed tokens. scale is that of base 2, and num_blocks are those
    that a sequence can have. finished `[T, HKV]` is set to 0, for the next kernel."""
    take_turn(OVERLAP)
    sequence, share, num_shares = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    TILES: tl.constexpr = (SIZES.NEW * SIZES.G + TILE.ROWS - 1) // TILE.ROWS
    head = (tl.program_id(1) // TILES).to(tl.int64)
    total_tokens = tl.load(lengths_ptr + sequence)
    of_tile = tl.program_id(1) % TILES
    pairs, position = pairs_of(sequence, head, of_tile, total_tokens, TILE.ROWS, SIZES)

    number = of_tile * TILE.ROWS + tl.arange(0, TILE.ROWS)
    first_of_token = (number < SIZES.NEW * SIZES.G) & (number % SIZES.G + share == 0)
    tl.store(finished_ptr + pairs.query * SIZES.HKV + head, 0, mask=first_of_token)

    windows = num_windows(total_tokens, SIZES)
    tiles = tl.cdiv(windows, TILE.BLOCKS * SIZES.BLOCK_HOPS)
    first, end = share_of(tiles, share, TILE)
    acc, maximum, total = nothing_seen(TILE.ROWS, SIZES)
    pair = number_of(pairs, SIZES)
    if first >= end:
        store_partial(partial, pair * num_shares + share, acc, maximum, total, pairs.inside, SIZES)
        return
    queries = load_pairs(q, pairs, SIZES.D, SIZES.PADDED_D)
    visible = tl.where(pairs.inside, num_windows(position + 1, SIZES), 0)
    for tile in tl.range(first, end, num_stages=TILE.STAGES):
        window, there = windows_of(tile, windows, SIZES, TILE)
        state = window + SIZES.WINDOW_HOPS - 1
        page, row = row_of(cache.table, sequence, state, there, SIZES.STATES)
        of_k, of_v = offsets_of(cache.k, cache.v, of_pages, page, row, head, PITCHES)
        k = load_rows(cache.k.ptr, of_k, there, SIZES.D, SIZES.PADDED_D, True)
        v = load_rows(cache.v.ptr, of_v, there, SIZES.DV, SIZES.PADDED_DV, True)

        scores = dot_keys(queries, k, SIZES.PRECISION) * scale
        seen = there[None, :] & (window[None, :] < visible[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v, SIZES.PRECISION)
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
        p = tl.exp2(scores - shift[:, None])
        store_sums(sums, p, maximum, pair, tile, pairs.inside, num_blocks, SIZES, TILE)
    store_partial(partial, pair * num_shares + share, acc, maximum, total, pairs.inside, SIZES)
