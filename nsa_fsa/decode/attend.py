"""The selected and the sliding branch of new tokens, and the sum of the three.

attend  A program owns a share of what one new token reads for one KV head: some of the chosen
        blocks, or some of the sliding window. Which blocks are chosen every share finds from the
        shortlists.
merge   A program owns one new token and one head, and adds up the shares of the three branches,
        weighted by their gates.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nsa_fsa.decode.paged import row_of
from nsa_fsa.decode.score import best_of, store_partial, unpack
from nsa_fsa.ops.common.primitives import dot_keys, kernel, load_rows, online_softmax


class Chosen(NamedTuple):
    """The blocks that a query reads, in a kernel: the first ones, the last ones, and between them
    those whose scores are the best."""

    own: Any  # the block of the query itself; -1 for a query that there is not
    best: Any  # [N], whether a listed block is read
    number: Any  # [N], its number among those that are
    block: Any  # [N]


@triton.jit
def choose(list_ptr, own, LISTS: tl.constexpr, LISTED: tl.constexpr, SIZES: tl.constexpr):
    """The best of all shortlists of a query, whose blocks ascend."""
    score, block = unpack(tl.load(list_ptr + tl.arange(0, LISTS * LISTED)))
    if LISTS == 1:
        best, number = score >= 0, tl.arange(0, LISTED)
    else:
        best, number = best_of(score, SIZES.NUM_SELECTED - SIZES.INIT - SIZES.LOCAL)
    return Chosen(own, best, number, block)


@triton.jit
def chosen_block(chosen, place, SIZES: tl.constexpr):
    """The block that a query reads at one of the places 0 to NUM_SELECTED - 1; -1: none."""
    all_of_them = chosen.own < SIZES.NUM_SELECTED
    here = chosen.best & (chosen.number == place - SIZES.INIT)
    block = tl.sum(tl.where(here, chosen.block, 0), 0)
    block = tl.where(place < SIZES.INIT, place, block)
    from_last = SIZES.NUM_SELECTED - 1 - place
    block = tl.where(from_last < SIZES.LOCAL, chosen.own - from_last, block)
    return tl.where(all_of_them, tl.where(place <= chosen.own, place, -1), block)


@triton.jit
def attend_keys(q, softmax, k, v, table, sequence, head, key, seen, scale, SIZES: tl.constexpr):
    """One step of attention to some keys of a sequence, of which only those `seen` are read.

    softmax: acc, maximum and total so far.
    """
    page, row = row_of(table, sequence, key, seen, SIZES.PAGE)
    at = page * k.stride_p + head * k.stride_h + row * k.stride_n
    keys = load_rows(k.ptr, at, seen, SIZES.D, SIZES.PADDED_D, True)
    at = page * v.stride_p + head * v.stride_h + row * v.stride_n
    values = load_rows(v.ptr, at, seen, SIZES.DV, SIZES.PADDED_DV, True)
    scores = dot_keys(q, keys, SIZES.PRECISION) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    acc, maximum, total = softmax
    return online_softmax(acc, maximum, total, scores, values, SIZES.PRECISION)


@triton.jit
def nothing_seen(ROWS: tl.constexpr, SIZES: tl.constexpr):
    """acc, maximum and total before the first key."""
    return (
        tl.zeros([ROWS, SIZES.PADDED_DV], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
    )


@kernel
def attend_kernel(
    q,
    k,
    v,
    table,
    lengths_ptr,
    list_ptr,
    indices_ptr,
    selected,
    sliding,
    scale,
    SIZES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
    WINDOW_SHARES: tl.constexpr,
    STAGES: tl.constexpr,
    LISTS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Program (share, KV head, new token); the first SHARES are of the blocks, WINDOW_SHARES of the
    window. selected and sliding are `Partial`; scale is that of base 2. Which blocks are read is
    written to indices `[T, HKV, NUM_SELECTED]`."""
    share, sequence = tl.program_id(0), tl.program_id(2) // SIZES.NEW
    head, token = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    new = tl.program_id(2) % SIZES.NEW
    position = tl.load(lengths_ptr + sequence) - SIZES.NEW + new
    member = tl.arange(0, ROWS)
    used = (member < SIZES.G) & (position >= 0)
    at = token * q.stride_t + (head * SIZES.G + member) * q.stride_h
    queries = load_rows(q.ptr, at, used, SIZES.D, SIZES.PADDED_D, True)
    pair = token * (SIZES.HKV * SIZES.G) + head * SIZES.G + member
    column = tl.arange(0, KEYS)
    softmax = nothing_seen(ROWS, SIZES)

    if share >= SHARES:
        START: tl.constexpr = (SIZES.WINDOW + KEYS - 1) // KEYS
        for step in tl.range(share - SHARES, START, WINDOW_SHARES, num_stages=STAGES):
            key = position - SIZES.WINDOW + 1 + step * KEYS + column
            seen = (key >= 0) & (key <= position)
            softmax = attend_keys(
                queries, softmax, k, v, table, sequence, head, key, seen, scale, SIZES
            )
        store_partial(sliding, pair * WINDOW_SHARES + share - SHARES, *softmax, used, SIZES)
        return

    BLOCK: tl.constexpr = SIZES.BLOCK_HOPS * SIZES.STRIDE
    STEPS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS  # of a block
    own = tl.where(position >= 0, position // BLOCK, -1)
    of_pair = token * SIZES.HKV + head
    chosen = choose(list_ptr + of_pair * (LISTS * LISTED), own, LISTS, LISTED, SIZES)
    for step in tl.range(share, SIZES.NUM_SELECTED * STEPS, SHARES, num_stages=STAGES):
        place = step // STEPS
        block = chosen_block(chosen, place, SIZES)
        if step % STEPS == 0:
            tl.store(indices_ptr + of_pair * SIZES.NUM_SELECTED + place, block)
        in_block = step % STEPS * KEYS + column
        key = block * BLOCK + in_block
        seen = (block >= 0) & (in_block < BLOCK) & (key <= position)
        softmax = attend_keys(
            queries, softmax, k, v, table, sequence, head, key, seen, scale, SIZES
        )
    store_partial(selected, pair * SHARES + share, *softmax, used, SIZES)


@triton.jit
def merged(partial, pair, SHARES: tl.constexpr, SIZES: tl.constexpr):
    """A branch's output for one pair, float32 `[PADDED_DV]`; 0 where nothing is seen."""
    at = pair * SHARES + tl.arange(0, SHARES)
    maximum = tl.load(partial.maximum_ptr + at)
    top = tl.max(maximum, 0)
    weight = tl.exp2(maximum - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(tl.load(partial.total_ptr + at) * weight, 0)
    # A share that has nothing left no output.
    some = maximum > -float("inf")
    o = load_rows(partial.o_ptr, at * SIZES.DV, some, SIZES.DV, SIZES.PADDED_DV, True)
    return tl.sum(o * weight[:, None], 0) / tl.where(total > 0, total, 1.0)


@kernel
def merge_kernel(
    compressed,
    selected,
    sliding,
    gates,
    lengths_ptr,
    o_ptr,
    SIZES: tl.constexpr,
    SCORE_SHARES: tl.constexpr,
    SHARES: tl.constexpr,
    WINDOW_SHARES: tl.constexpr,
):
    """Program (new token, query head). The branches are `Partial`, gates are `Gates`."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(lengths_ptr + token // SIZES.NEW) - SIZES.NEW + token % SIZES.NEW
    pair = token * (SIZES.HKV * SIZES.G) + head
    column = tl.arange(0, SIZES.PADDED_DV)
    inside = column < SIZES.DV
    o = tl.zeros([SIZES.PADDED_DV], tl.float32)
    if position >= 0:
        gate = gates.ptr + token * gates.stride_t + head * gates.stride_h
        logit = tl.load(gate).to(tl.float32)
        o = merged(compressed, pair, SCORE_SHARES, SIZES) * tl.sigmoid(logit)
        logit = tl.load(gate + gates.stride_b).to(tl.float32)
        o += merged(selected, pair, SHARES, SIZES) * tl.sigmoid(logit)
        logit = tl.load(gate + 2 * gates.stride_b).to(tl.float32)
        o += merged(sliding, pair, WINDOW_SHARES, SIZES) * tl.sigmoid(logit)
    tl.store(o_ptr + pair * SIZES.DV + column, o.to(o_ptr.dtype.element_ty), mask=inside)
