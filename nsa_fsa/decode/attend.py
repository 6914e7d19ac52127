"""The selected and the sliding branch of new tokens, and the sum of the three.

attend  A program owns a share of the chosen blocks of one new token, or a share of the sliding
        windows of all new tokens of a sequence, which overlap; in both cases for one KV head.
merge   A program owns one new token and one head, and adds up the shares of the three branches,
        weighted by their gates.
"""

import triton
import triton.language as tl

from nsa_fsa.decode.choose import AT_ONCE
from nsa_fsa.decode.paged import offsets_of, row_of
from nsa_fsa.decode.score import store_partial
from nsa_fsa.ops.common.primitives import dot_keys, kernel, load_rows, online_softmax


@triton.jit
def attend_keys(
    q, softmax, cache, sequence, head, key, there, visible, scale,
    SIZES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One step of attention to some keys of a sequence.

    softmax: acc, maximum and total so far. Keys that are not `there`, `[N]`, are not read; visible,
    `[M or 1, N]`, says which query sees which.
    """
    page, row = row_of(cache.table, sequence, key, there, SIZES.PAGE)
    of_keys, of_values = offsets_of(cache.k, cache.v, page, row, head, UNITS)
    keys = load_rows(cache.k.ptr, of_keys, there, SIZES.D, SIZES.PADDED_D, True)
    values = load_rows(cache.v.ptr, of_values, there, SIZES.DV, SIZES.PADDED_DV, True)
    scores = dot_keys(q, keys, SIZES.PRECISION) * scale
    scores = tl.where(visible, scores, float("-inf"))
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


@triton.jit
def queries_of(q, token, query_head, used, SIZES: tl.constexpr):
    at = token * q.stride_t + query_head * q.stride_h
    return load_rows(q.ptr, at, used, SIZES.D, SIZES.PADDED_D, True)


@triton.jit
def attend_blocks(
    q, cache, total_tokens, indices_ptr, partial, scale, share,
    SIZES: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the chosen blocks of a new token."""
    head, token = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    sequence, new = tl.program_id(2) // SIZES.NEW, tl.program_id(2) % SIZES.NEW
    BLOCK: tl.constexpr = SIZES.BLOCK_HOPS * SIZES.STRIDE
    STEPS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS  # of a block
    position = total_tokens - SIZES.NEW + new
    member = tl.arange(0, ROWS)
    used, query_head = (member < SIZES.G) & (position >= 0), head * SIZES.G + member
    queries = queries_of(q, token, query_head, used, SIZES)
    indices_ptr += (token * SIZES.HKV + head) * SIZES.NUM_SELECTED
    softmax = nothing_seen(ROWS, SIZES)
    for step in tl.range(share, SIZES.NUM_SELECTED * STEPS, SHARES, num_stages=STAGES):
        block = tl.load(indices_ptr + step // STEPS)
        in_block = step % STEPS * KEYS + tl.arange(0, KEYS)
        key = block * BLOCK + in_block
        there = (block >= 0) & (in_block < BLOCK) & (key <= position)
        softmax = attend_keys(
            *(queries, softmax, cache, sequence, head),
            *(key, there, there[None, :], scale, SIZES, UNITS),
        )
    pair = token * (SIZES.HKV * SIZES.G) + query_head
    store_partial(partial, pair * SHARES + share, *softmax, used, SIZES)


@triton.jit
def attend_windows(
    q, cache, total_tokens, partial, scale, share,
    SIZES: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the sliding windows of some new tokens of a sequence; nothing where this program's
    new token comes behind as many tiles as there are."""
    head, sequence = tl.program_id(1).to(tl.int64), tl.program_id(2) // SIZES.NEW
    tile = tl.program_id(2) % SIZES.NEW
    PAIRS: tl.constexpr = SIZES.NEW * SIZES.G
    if tile * ROWS >= PAIRS:
        return
    number = tile * ROWS + tl.arange(0, ROWS)
    position = total_tokens - SIZES.NEW + number // SIZES.G
    used = (number < PAIRS) & (position >= 0)
    token = (sequence * SIZES.NEW + number // SIZES.G).to(tl.int64)
    query_head = head * SIZES.G + number % SIZES.G
    queries = queries_of(q, token, query_head, used, SIZES)
    softmax = nothing_seen(ROWS, SIZES)
    start = total_tokens - (SIZES.WINDOW + SIZES.NEW - 1)
    STEPS: tl.constexpr = (SIZES.WINDOW + SIZES.NEW + KEYS - 2) // KEYS
    for step in tl.range(share, STEPS, SHARES, num_stages=STAGES):
        key = start + step * KEYS + tl.arange(0, KEYS)
        there = (key >= 0) & (key < total_tokens)
        behind = position[:, None] - key[None, :]
        visible = there[None, :] & (behind >= 0) & (behind < SIZES.WINDOW)
        softmax = attend_keys(
            *(queries, softmax, cache, sequence, head), *(key, there, visible, scale, SIZES, UNITS)
        )
    pair = token * (SIZES.HKV * SIZES.G) + query_head
    store_partial(partial, pair * SHARES + share, *softmax, used, SIZES)


@kernel
def attend_kernel(
    q,
    cache,
    lengths_ptr,
    indices_ptr,
    selected,
    sliding,
    scale,
    SIZES: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SHARES: tl.constexpr,
    WINDOW_SHARES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (share, KV head, new token). The first SHARES are of the token's blocks, for the
    group of heads, ROWS. Of the other WINDOW_SHARES the n-th new token of a sequence has those of
    the n-th WINDOW_ROWS of all pairs of new tokens and heads of the group, if there are as many.

    cache is `Cache`, indices are `[T, HKV, NUM_SELECTED]`, and selected and sliding are `Partial`;
    scale is that of base 2."""
    share = tl.program_id(0)
    total_tokens = tl.load(lengths_ptr + tl.program_id(2) // SIZES.NEW)
    if share < SHARES:
        attend_blocks(
            *(q, cache, total_tokens, indices_ptr, selected, scale, share),
            *(SIZES, UNITS, ROWS, KEYS, SHARES, STAGES),
        )
    else:
        attend_windows(
            *(q, cache, total_tokens, sliding, scale, share - SHARES),
            *(SIZES, UNITS, WINDOW_ROWS, KEYS, WINDOW_SHARES, STAGES),
        )


@triton.jit
def merged(partial, pair, num_shares, SHARES: tl.constexpr, SIZES: tl.constexpr):
    """A branch's output for one pair, float32 `[PADDED_DV]`; 0 where nothing is seen. SHARES are
    loaded at once."""
    acc = tl.zeros([SIZES.PADDED_DV], tl.float32)
    top, total = -float("inf"), 0.0
    for first in tl.range(0, num_shares, SHARES, num_stages=1):
        share = first + tl.arange(0, SHARES)
        at = pair * num_shares + share
        exists = share < num_shares
        maximum = tl.load(partial.maximum_ptr + at, mask=exists, other=-float("inf"))
        totals = tl.load(partial.total_ptr + at, mask=exists, other=0.0)
        # A share that has nothing left no output.
        some = totals != 0
        o = load_rows(partial.o_ptr, at * SIZES.DV, some, SIZES.DV, SIZES.PADDED_DV, True)
        higher = tl.maximum(top, tl.max(maximum, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weight, decay = tl.exp2(maximum - shift), tl.exp2(top - shift)
        total = total * decay + tl.sum(totals * weight, 0)
        acc = acc * decay + tl.sum(o * weight[:, None], 0)
        top = higher
    return acc / tl.where(total == 0, 1.0, total)


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
    SHARES: tl.constexpr,
    WINDOW_SHARES: tl.constexpr,
):
    """Program (new token, query head). The branches are `Partial`, gates are `Gates`; num_shares
    are those of the compressed branch."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(lengths_ptr + token // SIZES.NEW) - SIZES.NEW + token % SIZES.NEW
    pair = token * (SIZES.HKV * SIZES.G) + head
    column = tl.arange(0, SIZES.PADDED_DV)
    inside = column < SIZES.DV
    o = tl.zeros([SIZES.PADDED_DV], tl.float32)
    if position >= 0:
        gate = gates.ptr + token * gates.stride_t + head * gates.stride_h
        logit = tl.load(gate).to(tl.float32)
        o = merged(compressed, pair, num_shares, AT_ONCE, SIZES) * tl.sigmoid(logit)
        logit = tl.load(gate + gates.stride_b).to(tl.float32)
        o += merged(selected, pair, SHARES, SHARES, SIZES) * tl.sigmoid(logit)
        logit = tl.load(gate + 2 * gates.stride_b).to(tl.float32)
        o += merged(sliding, pair, WINDOW_SHARES, WINDOW_SHARES, SIZES) * tl.sigmoid(logit)
    tl.store(o_ptr + pair * SIZES.DV + column, o.to(o_ptr.dtype.element_ty), mask=inside)
