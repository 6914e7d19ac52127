"""The selected and the sliding branch of new tokens, and the sum of the three.

attend  A program owns a share of what one new token reads for one KV head: some of the chosen
        blocks, and some of the sliding window. Every share knows which blocks are chosen from
        the shortlists.
merge   A program owns one new token and one head, and adds up the shares of the three branches,
        weighted by their gates.
"""

import triton
import triton.language as tl

from nsa_fsa.decode.paged import row_of
from nsa_fsa.decode.score import LAST_BLOCK, store_partial
from nsa_fsa.ops.common.primitives import dot_keys, kernel, load_rows, online_softmax


@triton.jit
def chosen_blocks(
    list_ptr, token, head, own, CHUNKS: tl.constexpr, LISTED: tl.constexpr, SIZES: tl.constexpr
):
    """The blocks that a query reads, ascending, `[LISTED]`; LAST_BLOCK where there is none."""
    FREE: tl.constexpr = SIZES.NUM_SELECTED - SIZES.INIT - SIZES.LOCAL
    at = (token * SIZES.HKV + head) * (CHUNKS * LISTED)
    keys = tl.load(list_ptr + at + tl.arange(0, CHUNKS * LISTED))
    best = keys
    if CHUNKS > 1:
        best = tl.topk(keys, LISTED)
    place = tl.arange(0, LISTED)
    block = LAST_BLOCK - (best & LAST_BLOCK).to(tl.int32)
    block = tl.where((place < FREE) & (best >= 0), block, LAST_BLOCK)
    # The forced ones.
    block = tl.where((place >= FREE) & (place < FREE + SIZES.INIT), place - FREE, block)
    is_local = (place >= FREE + SIZES.INIT) & (place < SIZES.NUM_SELECTED)
    block = tl.where(is_local, own - (SIZES.NUM_SELECTED - 1 - place), block)
    everything = tl.where(place <= own, place, LAST_BLOCK)
    return tl.sort(tl.where(own + 1 <= SIZES.NUM_SELECTED, everything, block))


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
    STAGES: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Program (share, KV head, new token). selected and sliding are `Partial`; scale is that of
    base 2. The first share writes down which blocks are read."""
    share, sequence = tl.program_id(0), tl.program_id(2) // SIZES.NEW
    head, token = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    new = tl.program_id(2) % SIZES.NEW
    position = tl.load(lengths_ptr + sequence) - SIZES.NEW + new
    BLOCK: tl.constexpr = SIZES.BLOCK_HOPS * SIZES.STRIDE
    own = tl.where(position >= 0, position // BLOCK, -1)
    chosen = chosen_blocks(list_ptr, token, head, own, CHUNKS, LISTED, SIZES)
    place = tl.arange(0, LISTED)
    if share == 0:
        at = (token * SIZES.HKV + head) * SIZES.NUM_SELECTED + place
        index = tl.where(chosen == LAST_BLOCK, -1, chosen)
        tl.store(indices_ptr + at, index, mask=place < SIZES.NUM_SELECTED)

    member = tl.arange(0, ROWS)
    used = (member < SIZES.G) & (position >= 0)
    at = token * q.stride_t + (head * SIZES.G + member) * q.stride_h
    queries = load_rows(q.ptr, at, used, SIZES.D, SIZES.PADDED_D, True)
    pair = token * (SIZES.HKV * SIZES.G) + head * SIZES.G + member
    column = tl.arange(0, KEYS)

    STEPS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS  # of a block
    softmax = nothing_seen(ROWS, SIZES)
    for step in tl.range(share, SIZES.NUM_SELECTED * STEPS, SHARES, num_stages=STAGES):
        block = tl.sum(tl.where(place == step // STEPS, chosen, 0), 0)
        in_block = step % STEPS * KEYS + column
        # The key of a block that is none is not computed, which would overflow.
        exists = block <= own
        key = tl.where(exists, block, 0) * BLOCK + in_block
        seen = exists & (in_block < BLOCK) & (key <= position)
        softmax = attend_keys(
            queries, softmax, k, v, table, sequence, head, key, seen, scale, SIZES
        )
    store_partial(selected, pair * SHARES + share, *softmax, used, SIZES)

    softmax = nothing_seen(ROWS, SIZES)
    START: tl.constexpr = (SIZES.WINDOW + KEYS - 1) // KEYS
    for step in tl.range(share, START, SHARES, num_stages=STAGES):
        key = position - SIZES.WINDOW + 1 + step * KEYS + column
        seen = (key >= 0) & (key <= position)
        softmax = attend_keys(
            queries, softmax, k, v, table, sequence, head, key, seen, scale, SIZES
        )
    store_partial(sliding, pair * SHARES + share, *softmax, used, SIZES)


@triton.jit
def merged(partial, pair, SHARES: tl.constexpr, SIZES: tl.constexpr):
    """A branch's output for one pair, float32 `[PADDED_DV]`; 0 where nothing is seen."""
    at = pair * SHARES + tl.arange(0, SHARES)
    maximum = tl.load(partial.maximum_ptr + at)
    top = tl.max(maximum, 0)
    weight = tl.exp2(maximum - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(tl.load(partial.total_ptr + at) * weight, 0)
    o = load_rows(partial.o_ptr, at * SIZES.DV, at >= 0, SIZES.DV, SIZES.PADDED_DV, False)
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
        o += merged(sliding, pair, SHARES, SIZES) * tl.sigmoid(logit)
    tl.store(o_ptr + pair * SIZES.DV + column, o.to(o_ptr.dtype.element_ty), mask=inside)
