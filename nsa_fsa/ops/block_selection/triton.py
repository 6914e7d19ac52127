"""Block selection in Triton: the blocks that the queries of a KV head read, without ever holding a
score for every query and block.

A program owns a tile of pairs, the queries' and the group's heads', of neighbouring queries, and
walks the blocks that are neither forced nor future. It does so in several columns at once: column c
takes the c-th of as many runs of neighbouring blocks, one block a step.

    score    The keys of a step lie phase by phase: the m-th compressed tokens of every column's
             block are neighbours. So the tokens of one block end up in registers of one thread and
             are summed without a shuffle. What a window gives to the next block is handed on to the
             column's next step, whose block that is; every column starts one block early for it.
    keep     Every column has a list of the best blocks that it has seen for each query, one tensor
             per place. New scores are sorted into it by elementwise minima and maxima. The low bits
             of a score are replaced by its step, which says which block it was and settles ties.
    merge    The best one at the heads of the columns' lists is taken, as many times as there are
             places.

Scores are compared exactly in float32. Those of 16-bit inputs give up as many bits as number the
steps, 7 of 23 for 65,536 tokens in blocks of 64.

In a kernel SELECTION is the launch's `Selection`, as a constant.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.block_selection.sorting import (
    NARROW_STEPS,
    NO_BLOCK,
    make_sort_key,
    merge_columns,
    sort_into,
)
from nsa_fsa.ops.common.bundles import Pairs, constants, heads
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.ops.common.locate import count_windows, load_query_tile, locate_tiles
from nsa_fsa.ops.common.primitives import LOG2_E, dot_keys, kernel, load_pairs, load_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.common.tuning import dot_precision

TO_BASE_2 = tl.constexpr(LOG2_E)  # A kernel reads no global but a constexpr.
MAX_HEADS = 16  # Of a group, a tile has so many heads at a time.
MAX_LISTED = 32  # So many blocks a query are listed for two queries a thread: 61 spill 736 bytes.


@dataclass(frozen=True)
class TileSizes:
    """How the kernel cuts its work."""

    pairs: int = 128  # of a program
    columns: int = 8  # runs of blocks that are walked side by side
    keys: int = 64  # compressed tokens of a product
    products: int = 2  # of an iteration, whose blocks are sorted into the lists together
    warps: int = 8
    stages: int = 2


class Group(NamedTuple):
    """The query heads of a KV head."""

    G: int  # their number
    HEADS: int  # pairs of a tile that a query has: all heads, or as many as are computed at a time
    D: int  # their width
    PADDED_D: int


class Phases(NamedTuple):
    """How the compressed tokens of a product belong to blocks.

    A hop is kernel_stride tokens, after which the next window begins: phase m of a block is the
    window that begins with the block's hop m.
    """

    BLOCK_HOPS: int  # hops, and so windows that begin, in a block
    WINDOW_HOPS: int  # hops of a window
    ALL: int  # BLOCK_HOPS and some that count for nothing: a power of two
    OF_PRODUCT: int  # phases that a product has
    STEPS: int  # steps that a product has


class Selection(NamedTuple):
    """What is alike in all programs of a launch; a constant of the kernel."""

    WINDOWS: Windows
    BLOCKS: Blocks
    NUM_SELECTED: int  # blocks of a query
    FREE: int  # those of them that are not forced
    GROUP: Group
    TILE: TileSizes
    PHASES: Phases
    WIDE: bool  # whether sort keys have 64 bits
    EXACT: bool  # whether no bit of a score is given up
    PRECISION: str  # of products


class Queries(NamedTuple):
    """The pairs of a tile, and what they are loaded from."""

    q: Any  # `Heads`
    lse: Any  # `Heads` of a width of 1
    query: Any  # row of q, int64 [BLOCK_M]
    position: Any  # of the query inside its sequence
    used: Any  # whether there is such a query
    first_head: Any  # of the group


class LoadedQueries(NamedTuple):
    """Some heads of the queries of a tile."""

    q: Any  # [BLOCK_M, PADDED_D]
    lse: Any  # [BLOCK_M], in base 2; inf for pairs without a query, whose weights are then 0


class CompressedKeys(NamedTuple):
    """The compressed tokens of one sequence and KV head."""

    ptr: Any  # of the first
    stride_t: Any
    last: Any  # number of the last that a query of the tile may choose


@triton.jit
def query_of_pair(pair, HEADS: tl.constexpr):
    """Which of the tile's queries a pair belongs to.

    One thread holds the pairs n and n + 8, which are two heads of a query.
    """
    if HEADS == 1:
        return pair
    return pair // 16 * (16 // HEADS) + pair % 8 // (HEADS // 2)


@triton.jit
def head_of_pair(pair, HEADS: tl.constexpr):
    """Which of a query's HEADS heads a pair has."""
    if HEADS == 1:
        return pair * 0
    return pair // 8 % 2 * (HEADS // 2) + pair % (HEADS // 2)


@triton.jit
def sum_heads(x, HEADS: tl.constexpr):
    """`[BLOCK_M, COLUMNS] -> [QUERIES, COLUMNS]`."""
    if HEADS > 1:
        M: tl.constexpr = x.shape[0]
        C: tl.constexpr = x.shape[1]
        x = tl.sum(tl.reshape(x, [M // 16, 2, 8, C]), 1)  # [M // 16, 8, C]
        if HEADS > 2:
            x = tl.reshape(x, [M // 16, 16 // HEADS, HEADS // 2, C])
            x = tl.sum(x, 2)  # [M // 16, 16 // HEADS, C]
        x = tl.reshape(x, [M // HEADS, C])
    return x


@triton.jit
def split_columns(x, NUMBER: tl.constexpr):
    """x `[M, N]` as a power of two of tensors of neighbouring columns `[M, N // NUMBER]`."""
    found = (x,)
    for _ in tl.static_range((NUMBER - 1).bit_length()):
        halves: tl.tuple = ()
        for i in tl.static_range(len(found)):
            pair = tl.reshape(found[i], [x.shape[0], 2, found[i].shape[1] // 2])
            halves = halves + tl.split(tl.permute(pair, (0, 2, 1)))
        found = halves
    return found


@triton.jit
def stack_columns(columns):
    """A power of two of tensors `[M]` as one `[M, N]`."""
    N: tl.constexpr = len(columns)
    M: tl.constexpr = columns[0].shape[0]
    for _ in tl.static_range((N - 1).bit_length()):
        joined: tl.tuple = ()
        for i in tl.static_range(len(columns) // 2):
            joined = joined + (tl.join(columns[i], columns[len(columns) // 2 + i]),)
        columns = joined
    return tl.reshape(columns[0], [M, N])


@triton.jit
def load_queries(queries, nth, GROUP: tl.constexpr):
    """The nth HEADS heads of the group, as `LoadedQueries`."""
    member = nth * GROUP.HEADS + head_of_pair(tl.arange(0, queries.query.shape[0]), GROUP.HEADS)
    used = queries.used & (member < GROUP.G)
    pairs = Pairs(queries.query, queries.first_head + member, used)
    loaded = load_pairs(queries.q, pairs, GROUP.D, GROUP.PADDED_D)
    lse = queries.lse
    at = pairs.query * lse.stride_t + pairs.head * lse.stride_h
    log = tl.load(lse.ptr + at, mask=used, other=float("inf"))
    return LoadedQueries(loaded, tl.where(log == float("-inf"), float("inf"), log * TO_BASE_2))


@triton.jit
def window_weights(queries, loaded, keys, token, scale, SELECTION: tl.constexpr):
    """The softmax weight that a tile's pairs give to some tokens of a sequence, `[BLOCK_M, KEYS]`.

    Tokens before the first or after the last one get the weight of another, and nothing of theirs
    is read. loaded: the first HEADS heads.
    """
    GROUP: tl.constexpr = SELECTION.GROUP
    WINDOWS: tl.constexpr = SELECTION.WINDOWS
    BLOCKS: tl.constexpr = SELECTION.BLOCKS
    at = tl.maximum(tl.minimum(token, keys.last), 0)
    k = load_rows(
        keys.ptr, at.to(tl.int64) * keys.stride_t, at >= 0, GROUP.D, GROUP.PADDED_D, False
    )
    p = tl.exp2(dot_keys(loaded.q, k, SELECTION.PRECISION) * scale - loaded.lse[:, None])
    # The weights of all heads of the group are summed in the end.
    for nth in range(1, (GROUP.G + GROUP.HEADS - 1) // GROUP.HEADS):
        more = load_queries(queries, nth, GROUP)
        p += tl.exp2(dot_keys(more.q, k, SELECTION.PRECISION) * scale - more.lse[:, None])

    # A window that overlaps a block which a query may choose can end after the query only if it is
    # longer than the local blocks are.
    local = BLOCKS.block_size * (BLOCKS.local_blocks - 1)
    if WINDOWS.kernel_size - WINDOWS.kernel_stride > local + 1:
        end = token * WINDOWS.kernel_stride + WINDOWS.kernel_size - 1
        p = tl.where(end[None, :] <= queries.position[:, None], p, 0.0)
    return p


@triton.jit
def sum_phases(p, PHASES: tl.constexpr):
    """What the windows that begin in a block give to this block, and what to the next one.

    p `[M, phases * steps * COLUMNS]` -> for each step two tensors `[M, COLUMNS]`. The window of
    phase m shares `min(WINDOW_HOPS, BLOCK_HOPS - m)` hops with the block that it begins in and the
    rest of its hops with the next.
    """
    STEPS: tl.constexpr = PHASES.STEPS
    BLOCK: tl.constexpr = PHASES.BLOCK_HOPS
    WINDOW: tl.constexpr = PHASES.WINDOW_HOPS
    weights = split_columns(p, PHASES.OF_PRODUCT * STEPS)
    own: tl.tuple = ()
    following: tl.tuple = ()
    for step in tl.static_range(STEPS):
        to_own = weights[step]
        to_next = weights[step] * 0.0
        for m in tl.static_range(1, BLOCK - WINDOW + 1):
            to_own += weights[m * STEPS + step]
        to_own *= WINDOW
        for m in tl.static_range(BLOCK - WINDOW + 1, BLOCK):
            weight = weights[m * STEPS + step]
            to_own += weight * (BLOCK - m)
            to_next = weight if m == BLOCK - WINDOW + 1 else to_next + weight * (m + WINDOW - BLOCK)
        own, following = own + (to_own,), following + (to_next,)
    return own, following


@triton.jit
def add_phases(own, following, p, first_phase, PHASES: tl.constexpr):
    """The same for some phases of one step, from first_phase on, added to what others gave."""
    weights = split_columns(p, PHASES.OF_PRODUCT)
    for i in tl.static_range(len(weights)):
        m = first_phase + i
        to_own = tl.maximum(tl.minimum(PHASES.WINDOW_HOPS, PHASES.BLOCK_HOPS - m), 0)
        to_next = tl.where(m < PHASES.BLOCK_HOPS, PHASES.WINDOW_HOPS - to_own, 0)
        own += weights[i] * tl.cast(to_own, tl.float32)
        following += weights[i] * tl.cast(to_next, tl.float32)
    return own, following


@triton.jit
def score_steps(queries, loaded, keys, token, scale, SELECTION: tl.constexpr):
    """What `sum_phases` returns of the steps of a product, whose tokens of phase 0 are `token`."""
    PHASES: tl.constexpr = SELECTION.PHASES
    PAIRS: tl.constexpr = SELECTION.TILE.pairs
    COLUMNS: tl.constexpr = SELECTION.TILE.columns
    STAGES: tl.constexpr = SELECTION.TILE.stages
    if PHASES.OF_PRODUCT == PHASES.ALL:
        p = window_weights(queries, loaded, keys, token, scale, SELECTION)
        return sum_phases(p, PHASES)
    else:
        own = tl.zeros([PAIRS, COLUMNS], tl.float32)
        following = tl.zeros([PAIRS, COLUMNS], tl.float32)
        for phase in tl.range(0, PHASES.ALL, PHASES.OF_PRODUCT, num_stages=STAGES):
            p = window_weights(queries, loaded, keys, token + phase, scale, SELECTION)
            own, following = add_phases(own, following, p, phase, PHASES)
        return (own,), (following,)


@triton.jit
def key_mask(num_steps, COLUMNS: tl.constexpr):
    """The low bits of a key, which number the steps or, later, the columns."""
    mask = tl.maximum(num_steps, COLUMNS) - 1
    for i in tl.static_range(5):
        mask = mask | (mask >> (1 << i))
    return mask


@triton.jit
def choose_free_blocks(q, k, lse, tile, own, last_own, head, scale, SELECTION: tl.constexpr):
    """A tile's best blocks besides the forced ones, as `merge_columns` returns them."""
    WINDOWS: tl.constexpr = SELECTION.WINDOWS
    GROUP: tl.constexpr = SELECTION.GROUP
    PHASES: tl.constexpr = SELECTION.PHASES
    STEPS: tl.constexpr = PHASES.STEPS
    PAIRS: tl.constexpr = SELECTION.TILE.pairs
    QUERIES: tl.constexpr = PAIRS // GROUP.HEADS
    COLUMNS: tl.constexpr = SELECTION.TILE.columns
    PRODUCTS: tl.constexpr = SELECTION.TILE.products
    INIT: tl.constexpr = SELECTION.BLOCKS.init_blocks
    LOCAL: tl.constexpr = SELECTION.BLOCKS.local_blocks
    OVERLAP: tl.constexpr = PHASES.WINDOW_HOPS > 1  # windows give something to the next block
    EARLY: tl.constexpr = 1 if OVERLAP else 0
    WIDE: tl.constexpr = SELECTION.WIDE

    number = query_of_pair(tl.arange(0, PAIRS), GROUP.HEADS)
    position = tile.offset + number
    used = (number < tile.num_queries) & (position < tile.num_keys)
    query = (tile.first_query + number).to(tl.int64)
    queries = Queries(q, lse, query, position, used, head * GROUP.G)
    loaded = load_queries(queries, 0, GROUP)

    column = tl.arange(0, COLUMNS)[None, :]
    num_steps = tl.cdiv(last_own - LOCAL - INIT + 1, COLUMNS)  # blocks of a column
    first_block = INIT + column * num_steps
    eligible_steps = tl.minimum(own[:, None] - LOCAL - first_block + 1, num_steps)
    mask = key_mask(num_steps, COLUMNS)

    key = tl.arange(0, SELECTION.TILE.keys)
    block = (INIT + key % COLUMNS * num_steps) + key // COLUMNS % STEPS  # of the product at step 0
    first_token = block * PHASES.BLOCK_HOPS + key // (COLUMNS * STEPS)
    num_windows = count_windows(tile.num_keys, WINDOWS.kernel_size, WINDOWS.kernel_stride)
    last = tl.minimum(PHASES.BLOCK_HOPS * (last_own - LOCAL + 1), num_windows) - 1
    first_row = tl.cast(tile.first_key // WINDOWS.kernel_stride, tl.int64)  # of k
    keys = CompressedKeys(k.ptr + (head * k.stride_h + first_row * k.stride_t), k.stride_t, last)

    best: tl.tuple = ()
    for _ in tl.static_range(SELECTION.FREE):
        best = best + (tl.full([QUERIES, COLUMNS], -1, tl.int64 if WIDE else tl.int32),)
    carry = tl.zeros([PAIRS, COLUMNS], tl.float32)  # what the step before gives to this one

    for start in tl.range(-EARLY, num_steps, STEPS * PRODUCTS, num_stages=SELECTION.TILE.stages):
        fresh: tl.tuple = ()
        for product in tl.static_range(PRODUCTS):
            first_step = start + product * STEPS
            token = first_token + first_step * PHASES.BLOCK_HOPS
            to_own, to_next = score_steps(queries, loaded, keys, token, scale, SELECTION)

            for i in tl.static_range(STEPS):
                score = to_own[i]
                if OVERLAP:
                    score += carry
                    carry = to_next[i]
                score = sum_heads(score, GROUP.HEADS)
                step = first_step + i
                if INIT == 0 and OVERLAP:  # there is no block before the first one
                    carry = tl.where((step < 0) & (column == 0), 0.0, carry)
                eligible = tl.where(step < 0, num_steps, step) < eligible_steps
                fresh = fresh + (make_sort_key(score, step, eligible, mask, WIDE, SELECTION.EXACT),)
        best = sort_into(best, fresh)
    return merge_columns(best, first_block, mask, WIDE, SELECTION.FREE <= 16)


@triton.jit
def store_blocks(ptr, chosen, own, inside, SELECTION: tl.constexpr):
    """Writes the forced blocks and the chosen ones, or all blocks if there are places for all.

    ptr `[QUERIES, 1]`: the queries' first places.
    """
    NUM_SELECTED: tl.constexpr = SELECTION.NUM_SELECTED
    BLOCKS: tl.constexpr = SELECTION.BLOCKS
    PADDED: tl.constexpr = 1 << (NUM_SELECTED - 1).bit_length()
    places: tl.tuple = ()
    for place in tl.static_range(PADDED):
        value = own * 0 + place
        if place >= NUM_SELECTED - BLOCKS.local_blocks:
            value = own - (NUM_SELECTED - 1 - place)
        elif place >= BLOCKS.init_blocks:
            value = -chosen[place - BLOCKS.init_blocks]
        all_blocks = tl.where(place <= own, place, -1)
        places = places + (tl.where(own < NUM_SELECTED, all_blocks, value),)
    place = tl.arange(0, PADDED)[None, :]
    tl.store(ptr + place, stack_columns(places), mask=inside[:, None] & (place < NUM_SELECTED))


@kernel
def select_blocks_kernel(
    tiles_ptr,
    indices_ptr,
    q,
    k,
    lse,
    scale,
    num_tiles,
    num_rows,
    num_sequences,
    SELECTION: tl.constexpr,
):
    """q, k and lse: `Heads`, of which lse has rows of one element. scale: in base 2."""
    NUM_SELECTED: tl.constexpr = SELECTION.NUM_SELECTED
    BLOCK_SIZE: tl.constexpr = SELECTION.BLOCKS.block_size
    QUERIES: tl.constexpr = SELECTION.TILE.pairs // SELECTION.GROUP.HEADS
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = load_query_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, QUERIES)
    if tile.num_queries <= 0:
        return

    query = tl.arange(0, QUERIES)
    used = (query < tile.num_queries) & (tile.offset + query < tile.num_keys)
    own = tl.where(used, (tile.offset + query) // BLOCK_SIZE, -1)
    end = tl.minimum(tile.offset + tile.num_queries, tile.num_keys)
    last_own = (end - 1) // BLOCK_SIZE

    chosen: tl.tuple = ()
    for _ in tl.static_range(SELECTION.FREE):
        chosen = chosen + (tl.full([QUERIES], NO_BLOCK, tl.int32),)
    if SELECTION.FREE > 0:  # noqa: SIM102, one is known to the compiler and the other is not
        if last_own >= NUM_SELECTED:
            chosen = choose_free_blocks(q, k, lse, tile, own, last_own, head, scale, SELECTION)

    row = (tile.first_query + query).to(tl.int64) * tl.num_programs(1) + head
    places_ptr = indices_ptr + row[:, None] * NUM_SELECTED
    store_blocks(places_ptr, chosen, own, query < tile.num_queries, SELECTION)


def heads_of_tile(group_size: int, listed: int) -> int:
    """How many pairs of a tile a query has, for lists of `listed` blocks."""
    found = min(next_power_of_2(group_size), MAX_HEADS)
    # With two pairs, of which one is nothing, a thread lists blocks for one query instead of two.
    return 2 if found == 1 and listed > MAX_LISTED else found


def choose_tile(q: Tensor, heads: int, listed: int) -> TileSizes:
    """The default for queries `[T, HQ, D]`, `heads` pairs a query and lists of `listed` blocks.

    `make resources` shows that none spills. H200, 65,536 tokens, 16 blocks of 64, ms at G = 1, 4,
    16: 6.6, 5.6, 5.8 with two products of 64 tokens, 8.5, 5.6, 5.6 with one of 128, 8.1, 6.4, 5.8
    with one of 64. With 8 blocks of 128: 5.2, 5.1, 5.0; 5.3, 4.8, 5.0; 4.9, 4.9, 5.0.
    """
    if q.element_size() == 4:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        return TileSizes(pairs=32, keys=32, products=1)
    if q.shape[2] > 128:
        return TileSizes(keys=32, products=2 if 8 < listed <= MAX_LISTED else 1)
    if not 8 < listed <= MAX_LISTED:
        return TileSizes(keys=64, products=1)
    if heads == MAX_HEADS:
        return TileSizes(keys=128, products=1)
    return TileSizes(keys=64, products=2)


def lay_out_phases(windows: Windows, blocks: Blocks, tile: TileSizes) -> Phases:
    """How the tokens of a product belong to blocks."""
    block_hops = blocks.block_size // windows.kernel_stride
    window_hops = windows.kernel_size // windows.kernel_stride
    phases = next_power_of_2(block_hops)
    of_product = min(phases, tile.keys // tile.columns)
    steps = tile.keys // (tile.columns * of_product)
    return Phases(block_hops, window_hops, phases, of_product, steps)


def select_blocks(
    call: SelectionCall, tile: TileSizes | None = None, wide: bool | None = None
) -> Tensor:
    """block_indices int32 `[T, HKV, num_selected_blocks]`.

    tile: other than the default. wide: whether sort keys have 64 bits; None: as max_seqlen asks.
    """
    q, k_cmp, lse = rows_contiguous(call.q), rows_contiguous(call.k_cmp), call.lse.float()
    (num_rows, num_heads, head_dim), num_kv_heads = q.shape, k_cmp.shape[1]
    indices = q.new_empty(num_rows, num_kv_heads, call.num_selected_blocks, dtype=torch.int32)
    if indices.numel() == 0:
        return indices

    group_size = num_heads // num_kv_heads
    listed = call.num_selected_blocks - call.blocks.init_blocks - call.blocks.local_blocks
    pairs_of_query = heads_of_tile(group_size, listed)
    tile = tile or choose_tile(q, pairs_of_query, listed)
    if group_size > MAX_HEADS and head_dim > 128:
        # Two tiles of queries are held at a time, in 192 KiB of shared memory.
        tile = dataclasses.replace(tile, pairs=64, products=1)

    tiles = locate_tiles(num_rows, call.sequences, tile.pairs // pairs_of_query)
    exact = q.dtype == torch.float32
    if wide is None:
        steps = cdiv(call.sequences.max_seqlen, call.blocks.block_size * tile.columns)
        wide = exact or steps > NARROW_STEPS.value

    group = Group(group_size, pairs_of_query, head_dim, padded_dim(head_dim))
    selection = Selection(
        *(call.windows, call.blocks, call.num_selected_blocks, listed, group, tile),
        *(lay_out_phases(call.windows, call.blocks, tile), wide, exact, dot_precision(q.dtype)),
    )
    select_blocks_kernel[(tiles.number, num_kv_heads)](
        *(tiles.table, indices, heads(q), heads(k_cmp), heads(lse)),
        *(call.scale * LOG2_E, tiles.number, num_rows, tiles.num_sequences),
        constants(selection),
        num_warps=tile.warps,
    )
    return indices
