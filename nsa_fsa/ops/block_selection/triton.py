"""Block selection: the blocks that the queries of a KV head read, without ever holding a score for every query and block.

A program owns a tile of rows, the (query, head of the group) pairs of neighbouring queries, and walks the blocks that are
neither forced nor future. It does so in several columns at once: column c takes the c-th of as many contiguous ranges of
blocks, one block a step.

    score    The keys of a step lie phase by phase: the m-th compressed tokens of every column's block are neighbours. So the
             tokens of one block end up in registers of one thread and are summed without a shuffle. What a window gives to
             the next block is handed on to the column's next step, whose block that is; every column starts one block early
             for it.
    keep     Every column has a list of the best blocks that it has seen for each query, one tensor per place. New scores are
             sorted into it by elementwise minima and maxima. The low bits of a score are replaced by its step, which says
             which block it was and settles ties.
    merge    The best one at the heads of the columns' lists is taken, as many times as there are places.

Scores are compared exactly in float32. Those of 16-bit inputs give up as many bits as number the steps, 7 of 23 for 65,536
tokens in blocks of 64.
"""

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.common.locate import load_tile, locate_tiles
from nsa_fsa.ops.common.primitives import LOG2_E, dot_keys, kernel, load_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.common.tuning import dot_precision

MAX_HEADS = 16  # of a group, that are rows of one tile
MAX_LISTED = 32  # blocks a query, of two queries a thread: lists of 61 spill 736 bytes
# Steps that a key of 32 bits can number; more take 64 bits, as float32 inputs do.
NARROW_STEPS = tl.constexpr(1024)
LOW_BITS = tl.constexpr(2**31 - 1)  # of a key of 64 bits, which number its steps
NO_BLOCK = tl.constexpr(-(2**31))  # below every block number with its sign changed


@dataclass(frozen=True)
class SelectionTile:
    """How the kernel cuts its work."""

    rows: int = 128  # (query, head of the group) pairs of a program
    columns: int = 8  # ranges of blocks that are walked side by side
    keys: int = 64  # compressed tokens of a product
    products: int = 2  # of an iteration; the blocks that they score are sorted into the lists together
    warps: int = 8
    stages: int = 2


@triton.jit
def query_of_row(row, HEADS: tl.constexpr):
    """Which of the tile's queries a row belongs to. One thread holds rows r and r + 8: two heads of a query."""
    if HEADS == 1:
        return row
    return row // 16 * (16 // HEADS) + row % 8 // (HEADS // 2)


@triton.jit
def head_of_row(row, HEADS: tl.constexpr):
    if HEADS == 1:
        return row * 0
    return row // 8 % 2 * (HEADS // 2) + row % (HEADS // 2)


@triton.jit
def sum_heads(x, HEADS: tl.constexpr):
    """`[BLOCK_M, COLUMNS] -> [QUERIES, COLUMNS]`."""
    if HEADS > 1:
        M: tl.constexpr = x.shape[0]
        C: tl.constexpr = x.shape[1]
        x = tl.sum(tl.reshape(x, [M // 16, 2, 8, C]), 1)  # [M // 16, 8, C]
        if HEADS > 2:
            x = tl.sum(tl.reshape(x, [M // 16, 16 // HEADS, HEADS // 2, C]), 2)  # [M // 16, 16 // HEADS, C]
        x = tl.reshape(x, [M // HEADS, C])
    return x


@triton.jit
def split_columns(x, PARTS: tl.constexpr):
    """x `[M, N]` as PARTS, a power of two, tensors of neighbouring columns `[M, N // PARTS]`."""
    parts = (x,)
    for _ in tl.static_range((PARTS - 1).bit_length()):
        halves: tl.tuple = ()
        for i in tl.static_range(len(parts)):
            part = tl.reshape(parts[i], [x.shape[0], 2, parts[i].shape[1] // 2])
            halves = halves + tl.split(tl.permute(part, (0, 2, 1)))
        parts = halves
    return parts


@triton.jit
def stack_columns(parts):
    """A power of two of tensors `[M]` as one `[M, N]`."""
    N: tl.constexpr = len(parts)
    M: tl.constexpr = parts[0].shape[0]
    for _ in tl.static_range((N - 1).bit_length()):
        joined: tl.tuple = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[len(parts) // 2 + i]),)
        parts = joined
    return tl.reshape(parts[0], [M, N])


@triton.constexpr_function
def sort_partner(n, length, in_order, distance):
    """Batcher's odd-even merge sort, runs of `in_order` elements to runs of twice as many: what element n is compared to."""
    first = distance % in_order
    partner = n + distance if (n - first) // distance % 2 == 0 else n - distance
    if min(n, partner) < first or partner >= length or n // (2 * in_order) != partner // (2 * in_order):
        return n
    return partner


@triton.constexpr_function
def valley_partner(n, length, distance):
    """Batcher's bitonic merge: the same. What is missing to a power of two would come first, and be greater than the rest."""
    missing = (1 << (length - 1).bit_length()) - length
    partner = n + distance if (n + missing) // distance % 2 == 0 else n - distance
    return n if partner < 0 else partner


@triton.jit
def exchange(x, n: tl.constexpr, PARTNER: tl.constexpr):
    """Element n of a tuple after it and its partner have been put in descending order."""
    if n < PARTNER:
        return tl.maximum(x[n], x[PARTNER])
    if n > PARTNER:
        return tl.minimum(x[PARTNER], x[n])
    return x[n]


@triton.jit
def sort_descending(x):
    """A tuple of tensors, elementwise."""
    for i in tl.static_range((len(x) - 1).bit_length()):
        for j in tl.static_range(i + 1):
            layer: tl.tuple = ()
            for n in tl.static_range(len(x)):
                layer = layer + (exchange(x, n, sort_partner(n, len(x), 1 << i, 1 << (i - j))),)
            x = layer
    return x


@triton.jit
def sort_valley(x):
    """A tuple of tensors that descends and then ascends, in descending order: elementwise."""
    for i in tl.static_range((len(x) - 1).bit_length()):
        layer: tl.tuple = ()
        for n in tl.static_range(len(x)):
            layer = layer + (exchange(x, n, valley_partner(n, len(x), 1 << ((len(x) - 1).bit_length() - 1 - i))),)
        x = layer
    return x


@triton.jit
def sort_into(best, fresh):
    """The first len(best) of two tuples of tensors in descending order, of which best is sorted: elementwise.

    One by one this takes 2 len(best) operations a tensor. Together they are put in order first, and then opposite to the
    last places: 14 operations for each of 4 tensors, 11 for each of 8, where there are 13 places.
    """
    K: tl.constexpr = len(best)
    if min(len(fresh), K) <= 2:
        for i in tl.static_range(len(fresh)):
            x = fresh[i]
            pushed: tl.tuple = ()
            for k in tl.static_range(K):
                pushed = pushed + (tl.maximum(best[k], x),)
                x = tl.minimum(best[k], x)
            best = pushed
        return best
    fresh = sort_descending(fresh)
    merged: tl.tuple = ()
    for k in tl.static_range(K):
        merged = merged + (best[k] if k + len(fresh) < K else tl.maximum(best[k], fresh[K - 1 - k]),)
    return sort_valley(merged)


@triton.jit
def load_queries(queries, chunk, G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr):
    """q `[BLOCK_M, PADDED_D]` and lse `[BLOCK_M]` in base 2 of a tile's rows, for the chunk-th HEADS heads of the group.

    Rows without a query get an lse of inf, and so the weight 0.
    """
    q_ptr, lse_ptr, row, used, first_head, stride_q_t, stride_q_h, stride_lse_t, stride_lse_h = queries
    member = chunk * HEADS + head_of_row(tl.arange(0, row.shape[0]), HEADS)
    used = used & (member < G)
    head = first_head + member
    q = load_rows(q_ptr, row * stride_q_t + head * stride_q_h, used, D, PADDED_D, True)
    lse = tl.load(lse_ptr + row * stride_lse_t + head * stride_lse_h, mask=used, other=float("inf"))
    return q, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def window_weights(
    queries, q, lse, k_ptr, stride_k_t, token, last_token, position, scale,
    KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, MASKED: tl.constexpr,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax weight that a tile's rows give to some tokens of their sequence: `[BLOCK_M, KEYS]`.

    Tokens before the first or after the last one get the weight of another, and nothing of theirs is read. MASKED: tokens
    may end after a query. q and lse are those of the first HEADS heads.
    """
    at = tl.maximum(tl.minimum(token, last_token), 0)
    k = load_rows(k_ptr, at.to(tl.int64) * stride_k_t, at >= 0, D, PADDED_D, False)
    p = tl.exp2(dot_keys(q, k, PRECISION) * scale - lse[:, None])
    for chunk in range(1, (G + HEADS - 1) // HEADS):  # all heads of the group are summed in the end
        more = load_queries(queries, chunk, G, HEADS, D, PADDED_D)
        p += tl.exp2(dot_keys(more[0], k, PRECISION) * scale - more[1][:, None])
    if MASKED:
        p = tl.where((token * KERNEL_STRIDE + KERNEL_SIZE - 1)[None, :] <= position[:, None], p, 0.0)
    return p


@triton.jit
def sum_phases(p, PHASES: tl.constexpr, STEPS: tl.constexpr, UNITS: tl.constexpr, WINDOW: tl.constexpr):
    """What the windows that begin in a block give to this block, and what to the next one.

    p `[M, PHASES * STEPS * COLUMNS]` -> for each step two tensors `[M, COLUMNS]`. The window of phase m shares
    `min(WINDOW, UNITS - m)` strides with the block that it begins in and the rest of its WINDOW strides with the next.
    """
    parts = split_columns(p, PHASES * STEPS)
    own: tl.tuple = ()
    following: tl.tuple = ()
    for step in tl.static_range(STEPS):
        to_own = parts[step]
        to_next = parts[step] * 0.0
        for m in tl.static_range(1, UNITS - WINDOW + 1):
            to_own += parts[m * STEPS + step]
        to_own *= WINDOW
        for m in tl.static_range(UNITS - WINDOW + 1, UNITS):
            part = parts[m * STEPS + step]
            to_own += part * (UNITS - m)
            to_next = part if m == UNITS - WINDOW + 1 else to_next + part * (m + WINDOW - UNITS)
        own, following = own + (to_own,), following + (to_next,)
    return own, following


@triton.jit
def add_phases(own, following, p, first_phase, PHASES: tl.constexpr, UNITS: tl.constexpr, WINDOW: tl.constexpr):
    """The same for some of the phases of one step, from first_phase on."""
    parts = split_columns(p, PHASES)
    for i in tl.static_range(PHASES):
        m = first_phase + i
        to_own = tl.maximum(tl.minimum(WINDOW, UNITS - m), 0)
        to_next = tl.where(m < UNITS, WINDOW - to_own, 0)
        own += parts[i] * tl.cast(to_own, tl.float32)
        following += parts[i] * tl.cast(to_next, tl.float32)
    return own, following


@triton.jit
def make_key(score, step, eligible, mask, WIDE: tl.constexpr, EXACT: tl.constexpr):
    """Scores and the step they come from as integers in the order of preference; -1 for what cannot be chosen.

    Floats that are not negative compare as their bits do. Where a key has room for all of them, and so may be told to keep
    to what the narrower key of a shorter sequence has, is that a longer neighbour must not change what a sequence gets.
    """
    bits = score.to(tl.int32, bitcast=True)
    if WIDE:
        if not EXACT:
            bits = bits & ~tl.where(mask < NARROW_STEPS, mask, 0)
        key = (bits.to(tl.int64) << 32) | (LOW_BITS - step)
    else:
        key = (bits & ~mask) | (mask - step)
    return tl.where(eligible, key, -1)


@triton.jit
def take_best(best, first_block, mask, WIDE: tl.constexpr):
    """The block `[QUERIES]` with the highest key at the head of any column's list, and the lists without it.

    Ties go to the lowest column, whose blocks come first. first_block `[1, COLUMNS]`: the block of step 0.
    """
    C: tl.constexpr = best[0].shape[1]
    if WIDE:
        mask = LOW_BITS
    column = tl.arange(0, C)[None, :]
    rank = (best[0] & ~mask) | (C - 1 - column)
    taken = rank == tl.max(rank, 1)[:, None]
    step = mask - (best[0] & mask).to(tl.int32)
    block = tl.sum(tl.where(taken, first_block + step, 0), 1)
    rest: tl.tuple = ()
    for k in tl.static_range(1, len(best)):
        rest = rest + (tl.where(taken, best[k], best[k - 1]),)
    return block, rest + (tl.where(taken, -1, best[len(best) - 1]),)


@triton.jit
def merge_columns(best, first_block, mask, WIDE: tl.constexpr, UNROLL: tl.constexpr):
    """The best blocks of all columns, ascending, each `[QUERIES]` with its sign changed."""
    K: tl.constexpr = len(best)
    chosen: tl.tuple = ()
    if UNROLL:
        for _ in tl.static_range(K):
            block, best = take_best(best, first_block, mask, WIDE)
            chosen = chosen + (-block,)
        chosen = sort_descending(chosen)
    else:
        for _ in tl.static_range(K):
            chosen = chosen + (tl.full([best[0].shape[0]], NO_BLOCK, tl.int32),)
        for _ in range(K):
            block, best = take_best(best, first_block, mask, WIDE)
            chosen = sort_into(chosen, (-block,))
    return chosen


@triton.jit
def store_blocks(indices_ptr, chosen, own, NUM_SELECTED: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, inside):
    """Forced blocks and the chosen ones; where there are no more blocks than places all of them."""
    PADDED: tl.constexpr = 1 << (NUM_SELECTED - 1).bit_length()
    slots: tl.tuple = ()
    for slot in tl.static_range(PADDED):
        value = own * 0 + slot
        if slot >= NUM_SELECTED - LOCAL:
            value = own - (NUM_SELECTED - 1 - slot)
        elif slot >= INIT:
            value = -chosen[slot - INIT]
        slots = slots + (tl.where(own < NUM_SELECTED, tl.where(slot <= own, slot, -1), value),)
    slot = tl.arange(0, PADDED)[None, :]
    tl.store(indices_ptr + slot, stack_columns(slots), mask=inside[:, None] & (slot < NUM_SELECTED))


@kernel
def select_blocks_kernel(
    q_ptr, k_ptr, lse_ptr, tiles_ptr, indices_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_lse_t, stride_lse_h, scale, num_tiles, num_rows,
    KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, PRODUCTS: tl.constexpr, NUM_STAGES: tl.constexpr,
    SINGLE: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // HEADS
    FREE: tl.constexpr = NUM_SELECTED - INIT - LOCAL
    head = tl.program_id(1).to(tl.int64)
    index, first_query, num_queries, offset, first_key, num_keys = load_tile(
        tiles_ptr, num_tiles, tl.program_id(0), num_rows, False, SINGLE
    )
    first_query += index * QUERIES
    num_queries -= index * QUERIES
    offset += index * QUERIES
    if num_queries <= 0:
        return
    num_queries = tl.minimum(num_queries, QUERIES)
    query = tl.arange(0, QUERIES)
    used = (query < num_queries) & (offset + query < num_keys)
    own = tl.where(used, (offset + query) // BLOCK_SIZE, -1)
    last_own = (tl.minimum(offset + num_queries, num_keys) - 1) // BLOCK_SIZE

    chosen: tl.tuple = ()
    for _ in tl.static_range(FREE):
        chosen = chosen + (tl.full([QUERIES], NO_BLOCK, tl.int32),)
    if FREE > 0:  # noqa: SIM102, one is known to the compiler and the other is not
        if last_own >= NUM_SELECTED:
            first_row = first_key // KERNEL_STRIDE  # of k_cmp
            chosen = choose_free_blocks(
                q_ptr, k_ptr, lse_ptr, own, last_own, first_query, num_queries, offset, first_row, num_keys, head,
                stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_lse_t, stride_lse_h, scale,
                KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, FREE, INIT, LOCAL, G, HEADS, D, PADDED_D,
                BLOCK_M, COLUMNS, KEYS, PRODUCTS, NUM_STAGES, WIDE, EXACT, PRECISION,
            )  # fmt: skip
    row = (first_query + query).to(tl.int64) * tl.num_programs(1) + head
    store_blocks(indices_ptr + row[:, None] * NUM_SELECTED, chosen, own, NUM_SELECTED, INIT, LOCAL, query < num_queries)


@triton.jit
def choose_free_blocks(
    q_ptr, k_ptr, lse_ptr, own, last_own, first_query, num_queries, offset, first_row, num_keys, head,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_lse_t, stride_lse_h, scale,
    KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FREE: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    G: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, PRODUCTS: tl.constexpr, NUM_STAGES: tl.constexpr,
    WIDE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's best blocks besides the forced ones, as `merge_columns` returns them."""
    QUERIES: tl.constexpr = BLOCK_M // HEADS
    UNITS: tl.constexpr = BLOCK_SIZE // KERNEL_STRIDE  # tokens of a block
    WINDOW: tl.constexpr = KERNEL_SIZE // KERNEL_STRIDE
    ALL_PHASES: tl.constexpr = 1 << (UNITS - 1).bit_length()  # UNITS and some that count for nothing
    PHASES: tl.constexpr = min(ALL_PHASES, KEYS // COLUMNS)
    STEPS: tl.constexpr = KEYS // (COLUMNS * PHASES)  # of a product
    # Whether windows that overlap a block which a query may choose end after the query.
    MASKED: tl.constexpr = KERNEL_SIZE - KERNEL_STRIDE > BLOCK_SIZE * (LOCAL - 1) + 1

    row = query_of_row(tl.arange(0, BLOCK_M), HEADS)
    position = offset + row
    row_used = (row < num_queries) & (position < num_keys)
    row = (first_query + row).to(tl.int64)
    queries = (q_ptr, lse_ptr, row, row_used, head * G, stride_q_t, stride_q_h, stride_lse_t, stride_lse_h)
    q, lse = load_queries(queries, 0, G, HEADS, D, PADDED_D)

    column = tl.arange(0, COLUMNS)[None, :]
    num_steps = tl.cdiv(last_own - LOCAL - INIT + 1, COLUMNS)  # blocks of a column
    first_block = INIT + column * num_steps
    eligible_steps = tl.minimum(own[:, None] - LOCAL - first_block + 1, num_steps)  # [QUERIES, COLUMNS]
    mask = tl.maximum(num_steps, COLUMNS) - 1
    for i in tl.static_range(5):
        mask = mask | (mask >> (1 << i))

    key = tl.arange(0, KEYS)
    first_token = ((INIT + key % COLUMNS * num_steps) + key // COLUMNS % STEPS) * UNITS + key // (COLUMNS * STEPS)
    num_windows = (num_keys - KERNEL_SIZE) // KERNEL_STRIDE + 1
    last_token = tl.minimum(UNITS * (last_own - LOCAL + 1), num_windows) - 1
    k_ptr += head * stride_k_h + tl.cast(first_row, tl.int64) * stride_k_t

    best: tl.tuple = ()
    for _ in tl.static_range(FREE):
        best = best + (tl.full([QUERIES, COLUMNS], -1, tl.int64 if WIDE else tl.int32),)
    carry = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    EARLY: tl.constexpr = 1 if WINDOW > 1 else 0
    for start in tl.range(-EARLY, num_steps, STEPS * PRODUCTS, num_stages=NUM_STAGES):
        fresh: tl.tuple = ()
        for product in tl.static_range(PRODUCTS):
            first_step = start + product * STEPS
            token = first_token + first_step * UNITS
            if PHASES == ALL_PHASES:
                p = window_weights(
                    queries, q, lse, k_ptr, stride_k_t, token, last_token, position, scale,
                    KERNEL_SIZE, KERNEL_STRIDE, MASKED, G, HEADS, D, PADDED_D, PRECISION,
                )  # fmt: skip
                to_own, to_next = sum_phases(p, PHASES, STEPS, UNITS, WINDOW)
            else:
                own_part = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
                next_part = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
                for first_phase in tl.range(0, ALL_PHASES, PHASES, num_stages=NUM_STAGES):
                    p = window_weights(
                        queries, q, lse, k_ptr, stride_k_t, token + first_phase, last_token, position, scale,
                        KERNEL_SIZE, KERNEL_STRIDE, MASKED, G, HEADS, D, PADDED_D, PRECISION,
                    )  # fmt: skip
                    own_part, next_part = add_phases(own_part, next_part, p, first_phase, PHASES, UNITS, WINDOW)
                to_own, to_next = (own_part,), (next_part,)
            for i in tl.static_range(STEPS):
                score = to_own[i]
                if WINDOW > 1:
                    score += carry
                    carry = to_next[i]
                score = sum_heads(score, HEADS)
                step = first_step + i
                if INIT == 0 and WINDOW > 1:  # there is no block before the first one
                    carry = tl.where((step < 0) & (column == 0), 0.0, carry)
                eligible = tl.where(step < 0, num_steps, step) < eligible_steps
                fresh = fresh + (make_key(score, step, eligible, mask, WIDE, EXACT),)
        best = sort_into(best, fresh)
    return merge_columns(best, first_block, mask, WIDE, FREE <= 16)


def choose_tile(q: Tensor, heads: int, listed: int) -> SelectionTile:
    """The default tile for queries `[T, HQ, D]`, `heads` rows a query and lists of `listed` blocks. `make resources` shows that
    none spills.

    On an H200, 65,536 tokens, 16 blocks of 64, ms at G = 1, 4, 16: 6.6, 5.6, 5.8 with two products of 64 tokens, 8.5, 5.6, 5.6
    with one of 128, 8.1, 6.4, 5.8 with one of 64. With 8 blocks of 128: 5.2, 5.1, 5.0; 5.3, 4.8, 5.0; 4.9, 4.9, 5.0.
    """
    if q.element_size() == 4:  # without the matrix unit a thread holds whole rows of both factors of a product
        return SelectionTile(rows=32, keys=32, products=1)
    if q.shape[2] > 128:
        return SelectionTile(keys=32, products=2 if 8 < listed <= MAX_LISTED else 1)
    if not 8 < listed <= MAX_LISTED:
        return SelectionTile(keys=64, products=1)
    return SelectionTile(keys=128, products=1) if heads == MAX_HEADS else SelectionTile(keys=64, products=2)


def select_blocks(call: SelectionCall, tile: SelectionTile | None = None, wide: bool | None = None) -> Tensor:
    """block_indices int32 `[T, HKV, num_selected_blocks]`.

    tile: other than the default. wide: 64-bit keys, which longer sequences than max_seqlen would need.
    """
    cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k = call.sequences
    (kernel_size, kernel_stride), num_selected_blocks = call.windows, call.num_selected_blocks
    block_size, init_blocks, local_blocks = call.blocks
    q, k_cmp, lse = rows_contiguous(call.q), rows_contiguous(call.k_cmp), call.lse.float()
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cmp.shape[1]
    group_size = num_heads // num_kv_heads
    indices = q.new_empty(num_rows, num_kv_heads, num_selected_blocks, dtype=torch.int32)
    if indices.numel() == 0:
        return indices
    heads = min(next_power_of_2(group_size), MAX_HEADS)
    listed = num_selected_blocks - init_blocks - local_blocks
    if heads == 1 and listed > MAX_LISTED:
        heads = 2  # one is missing, and with it half of what a thread lists
    tile = tile or choose_tile(q, heads, listed)
    if group_size > MAX_HEADS and head_dim > 128:  # two tiles of queries at a time: 192 KiB of shared memory
        tile = dataclasses.replace(tile, rows=64, products=1)
    queries = tile.rows // heads
    tiles = locate_tiles(num_rows, cu_seqlens, queries, cu_seqlens_q, seqused_k)
    num_tiles = cdiv(num_rows, queries) if tiles is None else tiles.shape[1]
    exact = q.dtype == torch.float32
    if wide is None:
        wide = exact or cdiv(max_seqlen, block_size * tile.columns) > NARROW_STEPS.value
    select_blocks_kernel[(num_tiles, num_kv_heads)](
        q, k_cmp, lse, tiles, indices, *q.stride()[:2], *k_cmp.stride()[:2], *lse.stride(), call.scale * LOG2_E,
        num_tiles, num_rows,
        KERNEL_SIZE=kernel_size, KERNEL_STRIDE=kernel_stride, BLOCK_SIZE=block_size,
        NUM_SELECTED=num_selected_blocks, INIT=init_blocks, LOCAL=local_blocks,
        G=group_size, HEADS=heads, D=head_dim, PADDED_D=padded_dim(head_dim),
        BLOCK_M=tile.rows, COLUMNS=tile.columns, KEYS=tile.keys, PRODUCTS=tile.products, NUM_STAGES=tile.stages,
        SINGLE=tiles is None, WIDE=wide, EXACT=exact, PRECISION=dot_precision(q.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return indices
