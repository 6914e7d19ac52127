"""The selected and the sliding branch of new tokens, and the sum of the three.

attend  A program owns a share of the chosen blocks of one new token, or a share of the sliding
        windows of a tile of a sequence's pairs, which overlap; in both cases for one KV head.
merge   A program owns one new token and one head, and adds up the shares of the three branches,
        weighted by their gates.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nsa_fsa.decode.choose import SHARES_AT_ONCE
from nsa_fsa.decode.overlap import take_turn
from nsa_fsa.decode.paged import offsets_of, row_of
from nsa_fsa.decode.score import nothing_seen, number_of, pairs_of, store_partial
from nsa_fsa.ops.common.bundles import Pairs
from nsa_fsa.ops.common.primitives import dot_keys, kernel, load_pairs, load_rows, online_softmax


@triton.jit
def attend_keys(
    q,
    softmax,
    cache,
    of_pages,
    sequence,
    head,
    key,
    there,
    visible,
    scale,
    SIZES: tl.constexpr,
    PITCHES: tl.constexpr,
):
    """One step of attention to some keys of a sequence.

    softmax: acc, maximum and total so far. Keys that are not `there`, `[N]`, are not read; visible,
    `[M or 1, N]`, says which query sees which.
    """
    page, row = row_of(cache.table, sequence, key, there, SIZES.PAGE)
    of_keys, of_values = offsets_of(cache.k, cache.v, of_pages, page, row, head, PITCHES)
    keys = load_rows(cache.k.ptr, of_keys, there, SIZES.D, SIZES.PADDED_D, True)
    values = load_rows(cache.v.ptr, of_values, there, SIZES.DV, SIZES.PADDED_DV, True)
    scores = dot_keys(q, keys, SIZES.PRECISION) * scale
    scores = tl.where(visible, scores, float("-inf"))
    acc, maximum, total = softmax
    return online_softmax(acc, maximum, total, scores, values, SIZES.PRECISION)


@triton.jit
def attend_blocks(
    q, cache, of_pages, total_tokens, indices_ptr, partial, scale, share,
    SIZES: tl.constexpr, PITCHES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the chosen blocks of a new token, or where it is dense, of all blocks."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sequence, new = tl.program_id(0) // SIZES.NEW, tl.program_id(0) % SIZES.NEW
    BLOCK: tl.constexpr = SIZES.BLOCK_HOPS * SIZES.STRIDE
    STEPS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS  # of a block

    position, member = total_tokens - SIZES.NEW + new, tl.arange(0, ROWS)
    used = (member < SIZES.G) & (position >= 0)
    pairs = Pairs(token + member * 0, head * SIZES.G + member, used)
    queries = load_pairs(q, pairs, SIZES.D, SIZES.PADDED_D)
    indices_ptr += (token * SIZES.HKV + head) * SIZES.NUM_SELECTED
    softmax = nothing_seen(ROWS, SIZES)

    num_blocks = SIZES.NUM_SELECTED
    if SIZES.DENSE > 0:
        is_dense = position < SIZES.DENSE
        num_blocks = tl.where(is_dense, position // BLOCK + 1, num_blocks)

    for step in tl.range(share, num_blocks * STEPS, SHARES, num_stages=STAGES):
        block = step // STEPS
        if SIZES.DENSE > 0:
            chosen = tl.load(indices_ptr + block, mask=block < SIZES.NUM_SELECTED, other=-1)
            block = tl.where(is_dense, block, chosen)
        else:
            block = tl.load(indices_ptr + block)
        in_block = step % STEPS * KEYS + tl.arange(0, KEYS)
        key = block * BLOCK + in_block
        there = (block >= 0) & (in_block < BLOCK) & (key <= position)
        softmax = attend_keys(
            *(queries, softmax, cache, of_pages, sequence, head, key, there, there[None, :]),
            *(scale, SIZES, PITCHES),
        )

    store_partial(partial, number_of(pairs, SIZES) * SHARES + share, *softmax, used, SIZES)


@triton.jit
def attend_sliding(
    q,
    cache,
    of_pages,
    total_tokens,
    partial,
    scale,
    share,
    SIZES: tl.constexpr,
    PITCHES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A share of the sliding windows of a tile of a sequence's pairs; nothing for a new token
    behind as many as there are tiles."""
    head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(0) // SIZES.NEW
    tile = tl.program_id(0) % SIZES.NEW
    if tile * ROWS >= SIZES.NEW * SIZES.G:
        return
    pairs, position = pairs_of(sequence, head, tile, total_tokens, ROWS, SIZES)
    queries = load_pairs(q, pairs, SIZES.D, SIZES.PADDED_D)
    softmax = nothing_seen(ROWS, SIZES)
    start = tl.maximum(total_tokens - SIZES.NEW - (SIZES.SLIDING - 1), 0)
    steps = tl.cdiv(total_tokens - start, KEYS)
    for step in tl.range(share, steps, SHARES, num_stages=STAGES):
        key = start + step * KEYS + tl.arange(0, KEYS)
        there = key < total_tokens
        behind = position[:, None] - key[None, :]
        visible = there[None, :] & (behind >= 0) & (behind < SIZES.SLIDING)
        softmax = attend_keys(
            *(queries, softmax, cache, of_pages, sequence, head, key, there, visible),
            *(scale, SIZES, PITCHES),
        )
    at = number_of(pairs, SIZES) * SHARES + share
    store_partial(partial, at, *softmax, pairs.inside, SIZES)


@kernel
def attend_kernel(
    q,
    cache,
    of_pages,
    lengths_ptr,
    indices_ptr,
    selected,
    sliding,
    scale,
    SIZES: tl.constexpr,
    PITCHES: tl.constexpr,
    ROWS: tl.constexpr,
    SLIDING_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
    SLIDING_SHARES: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (new token, KV head, share). The first SHARES are of the token's chosen blocks; the
    heads of the group take ROWS. The other SLIDING_SHARES are of sliding windows. For these the
    pairs of a sequence are cut into tiles of SLIDING_ROWS, and the programs of its n-th new token
    do the n-th tile, if there is one.

    cache is `Cache`, of_pages `PagePitches`, indices are `[T, HKV, NUM_SELECTED]`, and selected and
    sliding are `Partial`; scale is that of base 2."""
    take_turn(OVERLAP)
    share = tl.program_id(2)
    total_tokens = tl.load(lengths_ptr + tl.program_id(0) // SIZES.NEW)
    if share < SHARES:
        attend_blocks(
            *(q, cache, of_pages, total_tokens, indices_ptr, selected, scale, share),
            *(SIZES, PITCHES, ROWS, KEYS, SHARES, STAGES),
        )
    else:
        attend_sliding(
            *(q, cache, of_pages, total_tokens, sliding, scale, share - SHARES),
            *(SIZES, PITCHES, SLIDING_ROWS, KEYS, SLIDING_SHARES, STAGES),
        )


class Shares(NamedTuple):
    """Some shares of a branch that one pair has, in a kernel, `[SHARES]` each."""

    at: Any  # where they stand among all
    maximum: Any
    total: Any


@triton.jit
def load_shares(partial, pair, first, num_shares, SHARES: tl.constexpr):
    """SHARES from the first on; of those behind num_shares, none saw anything."""
    share = first + tl.arange(0, SHARES)
    at, exists = pair * num_shares + share, share < num_shares
    maximum = tl.load(partial.maximum_ptr + at, mask=exists, other=-float("inf"))
    return Shares(at, maximum, tl.load(partial.total_ptr + at, mask=exists, other=0.0))


@triton.jit
def load_outputs(partial, shares, SIZES: tl.constexpr):
    """What shares leave, `[SHARES, PADDED_DV]`; 0 where they saw nothing, and wrote nothing."""
    some = shares.total != 0
    return load_rows(partial.o_ptr, shares.at * SIZES.DV, some, SIZES.DV, SIZES.PADDED_DV, True)


@triton.jit
def softmax_of(shares):
    """The highest score of shares, and the softmax's sum relative to it; 0 and 1 for nothing."""
    top = tl.max(shares.maximum, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(shares.total * tl.exp2(shares.maximum - top), 0)
    return top, tl.where(total == 0, 1.0, total)


@triton.jit
def add_up(shares, o, top):
    """What shares leave, together, relative to the score `top`, `[PADDED_DV]`."""
    return tl.sum(o * tl.exp2(shares.maximum - top)[:, None], 0)


@kernel
def merge_kernel(
    compressed,
    selected,
    sliding,
    gates,
    lengths_ptr,
    o_ptr,
    num_shares,
    SIZES: tl.constexpr,
    MOST_SHARES: tl.constexpr,
    SHARES: tl.constexpr,
    SLIDING_SHARES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (new token, query head). The branches are `Partial`, gates are `Gates`; num_shares
    are those of the compressed branch, at most MOST_SHARES."""
    take_turn(OVERLAP)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(lengths_ptr + token // SIZES.NEW) - SIZES.NEW + token % SIZES.NEW
    pair = token * (SIZES.HKV * SIZES.G) + head
    column = tl.arange(0, SIZES.PADDED_DV)
    inside = column < SIZES.DV
    o = tl.zeros([SIZES.PADDED_DV], tl.float32)
    if position >= 0:
        # What is needed is asked for before the first of it is used.
        a = load_shares(compressed, pair, 0, num_shares, MOST_SHARES)
        b = load_shares(selected, pair, 0, SHARES, SHARES)
        c = load_shares(sliding, pair, 0, SLIDING_SHARES, SLIDING_SHARES)
        gate = gates.ptr + token * gates.stride_t + head * gates.stride_h
        gate_a = tl.sigmoid(tl.load(gate).to(tl.float32))
        gate_b = tl.sigmoid(tl.load(gate + gates.stride_b).to(tl.float32))
        gate_c = tl.sigmoid(tl.load(gate + 2 * gates.stride_b).to(tl.float32))
        if SIZES.DENSE > 0:  # then the selected branch has read everything
            is_dense = position < SIZES.DENSE
            gate_a, gate_c = tl.where(is_dense, 0.0, gate_a), tl.where(is_dense, 0.0, gate_c)
            gate_b = tl.where(is_dense, 1.0, gate_b)
        o_b, o_c = load_outputs(selected, b, SIZES), load_outputs(sliding, c, SIZES)

        top, total = softmax_of(a)
        for first in tl.range(0, num_shares, SHARES_AT_ONCE, num_stages=1):
            some = load_shares(compressed, pair, first, num_shares, SHARES_AT_ONCE)
            o += add_up(some, load_outputs(compressed, some, SIZES), top)
        o *= gate_a / total
        top, total = softmax_of(b)
        o += add_up(b, o_b, top) * (gate_b / total)
        top, total = softmax_of(c)
        o += add_up(c, o_c, top) * (gate_c / total)
    tl.store(o_ptr + pair * SIZES.DV + column, o.to(o_ptr.dtype.element_ty), mask=inside)
