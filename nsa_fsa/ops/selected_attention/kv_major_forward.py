"""Selected attention, forward, in the loop order of FSA: blocks outside, their queries inside.

    gather   A program holds one block's keys and values and walks the queries that chose it, a tile
             of pairs at a time, so that no group size pads anything. Each pair leaves a partial
             result, normalised, with its own log-sum-exp, at (query, slot).
             Where a block is too much for one program several hold a piece each, and a slot has
             room for the partial results of all pieces.
    merge    A program owns a tile of pairs that share their own block. It attends to the forced
             blocks densely, which is the only causal masking here, and folds in the partial
             results. The initial block, which every query sees, is no hot spot.

Where queries are the last positions of longer sequences, blocks are rows of the keys and all else
is rows of the queries: what is allocated grows with the queries, and with the number of blocks.

Partial results take `workspace_bytes` at most: KV heads, and where one head is too much ranges of
queries, are done in turn.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import heads
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import BlockTable, RowTable, RunTable, locate_runs
from nsa_fsa.ops.common.primitives import (
    LOG2_E,
    dot_keys,
    kernel,
    load_rows,
    online_softmax,
    store_rows,
)
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, rows_contiguous
from nsa_fsa.ops.common.windowed_attention.heads import load_keys, of_head, store_attended
from nsa_fsa.ops.selected_attention.call import BlockIndex, SelectedCall
from nsa_fsa.ops.selected_attention.union_forward import union_attention_fwd
from nsa_fsa.ops.selected_attention.unions import GOES_BY_UNION, find_unions, index_of_others
from nsa_fsa.ops.selected_attention.work import (
    Work,
    cut_units,
    load_block,
    load_item,
    partials_of_unit,
    planned_launches,
    shape_of,
    tile_of,
)


class Partials(NamedTuple):
    """Normalised results of one piece of one block each, by query, slot, piece and head."""

    o: Any  # [partials, DV]
    lse: Any  # [partials], of base 2


class Runs(NamedTuple):
    """Runs of queries that share their own block, as `RunTable`. Where queries and keys share their
    rows these are the blocks themselves, and what would say so again is None."""

    first_query: Tensor
    num_queries: Tensor
    number: Tensor
    first_key: Tensor | None
    end_key: Tensor | None
    position: Tensor | None  # [T], of every query, as in `RowTable`


@kernel
def gather_fwd_kernel(
    q,
    k,
    v,
    index,
    blocks,
    partials,
    plan,
    place,
    first_head,
    num_tokens,
    item_queries,
    low_row,
    scale,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program walks an item, with a piece of the keys of its block."""
    G: tl.constexpr = SHAPE.G
    KEYS: tl.constexpr = TILE.KEYS
    number, piece = tl.program_id(0) // TILE.PIECES, tl.program_id(0) % TILE.PIECES
    head, planned = first_head + tl.program_id(1), place + tl.program_id(1)
    if number >= tl.load(plan.num_items + planned):
        return

    block = load_block(plan, planned, number)
    item = load_item(plan, planned, number, block, item_queries, G)
    entries_ptr = index.entries + head.to(tl.int64) * num_tokens * SHAPE.NUM_SLOTS
    entries_ptr += tl.load(plan.first_entry + item.at) + item.first_query
    q_ptr = q.ptr + head.to(tl.int64) * G * q.stride_h
    PARTIALS: tl.constexpr = SHAPE.NUM_SLOTS * TILE.PIECES * G
    partial = partials_of_unit(num_tokens, PARTIALS) + piece * G
    low_entry = low_row * SHAPE.NUM_SLOTS if SHAPE.RANGED else 0

    # Whoever chose this block lies beyond it, so all of its keys exist and are seen.
    key = tl.load(blocks.first_row + block) + piece * KEYS + tl.arange(0, KEYS)
    k, v = of_head(k, head), of_head(v, head)
    k_tile, v_tile = load_keys(k, v, key, key >= 0, SHAPE, MASKED=False)
    k_tile = tl.trans(k_tile)

    num_rows = item.num_rows if TILE.STOP_EARLY else item_queries * G
    for start in tl.range(0, num_rows, TILE.BLOCK_M, num_stages=TILE.NUM_STAGES):
        row = start + tl.arange(0, TILE.BLOCK_M)
        inside = row < item.num_rows
        entry = tl.load(entries_ptr + row // G, mask=inside, other=0)
        member = row % G
        query = (entry // SHAPE.NUM_SLOTS).to(tl.int64)
        q_offset = query * q.stride_t + member.to(tl.int64) * q.stride_h
        q_tile = load_rows(q_ptr, q_offset, inside, SHAPE.D, SHAPE.PADDED_D, True)

        scores = tl.dot(q_tile, k_tile, input_precision=TILE.PRECISION)  # [BLOCK_M, KEYS]
        maximum = tl.max(scores, 1) * scale
        p = tl.exp2(scores * scale - maximum[:, None])
        total = tl.sum(p, 1)
        # Dividing p costs half of what dividing o would: [M, 64] against [M, 128].
        p = p * (1.0 / total)[:, None]
        o = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=TILE.PRECISION)

        target = partial + (entry - low_entry).to(tl.int64) * (TILE.PIECES * G) + member
        offset = target * SHAPE.DV
        store_rows(partials.o, offset, o, inside, SHAPE.DV, SHAPE.PADDED_DV, STREAM=True)
        tl.store(partials.lse + target, maximum + tl.log2(total), mask=inside)


class Attended(NamedTuple):
    """The state of an online softmax."""

    acc: Any
    maximum: Any
    total: Any


@triton.jit
def attend_forced(
    q_tile,
    k,
    v,
    head,
    own_key,
    flags,
    own,
    first_key,
    end_key,
    scale,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attends to the local blocks, and to the initial ones that are not among them.

    own_key: the rows of the queries' own keys, which are the last that they see.
    own, first_key, end_key: number, first row and row after the last of the queries' own block.
    """
    k, v = of_head(k, head), of_head(v, head)
    acc = tl.zeros([TILE.BLOCK_M, SHAPE.PADDED_DV], tl.float32)
    maximum = tl.full([TILE.BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE.BLOCK_M], tl.float32)
    column = tl.arange(0, TILE.KEYS)

    for i in range(0, SHAPE.LOCAL_BLOCKS + SHAPE.INIT_BLOCKS):
        is_local = i < SHAPE.LOCAL_BLOCKS
        back = tl.where(is_local, i, own - (i - SHAPE.LOCAL_BLOCKS))  # from the own block
        if (back <= own) & (is_local | (back >= SHAPE.LOCAL_BLOCKS)):
            for first in range(0, SHAPE.BLOCK_SIZE, TILE.KEYS):
                key = first_key - back * SHAPE.BLOCK_SIZE + first + column
                k_tile, v_tile = load_keys(k, v, key, key < end_key, SHAPE)
                scores = dot_keys(q_tile, k_tile, TILE.PRECISION) * scale
                seen = key[None, :] <= own_key[:, None]
                if SHAPE.OWN_IS_OPTIONAL:
                    seen = seen & ((back > 0) | (flags < 0))[:, None]
                scores = tl.where(seen, scores, float("-inf"))
                acc, maximum, total = online_softmax(
                    acc, maximum, total, scores, v_tile, TILE.PRECISION
                )
    return Attended(acc, maximum, total)


@kernel
def merge_fwd_kernel(
    q,
    k,
    v,
    index,
    runs,
    partials,
    o_ptr,
    lse_ptr,
    first_head,
    low_row,
    high_row,
    num_tokens,
    num_heads,
    scale,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program owns a tile of pairs of one run."""

    G: tl.constexpr = SHAPE.G
    TILES: tl.constexpr = (SHAPE.BLOCK_SIZE * G + TILE.BLOCK_M - 1) // TILE.BLOCK_M
    run, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    head = first_head + tl.program_id(1)
    first_query = tl.load(runs.first_query + run)
    num_queries = tl.load(runs.num_queries + run)
    end_query = first_query + num_queries
    is_empty = tile * TILE.BLOCK_M // G >= num_queries
    if is_empty | (end_query <= low_row) | (first_query >= high_row):
        return

    own = tl.load(runs.number + run)
    row = tile * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    query = first_query + row // G
    inside = (row // G < num_queries) & (query >= low_row) & (query < high_row)
    query_head = (head * G + row % G).to(tl.int64)
    at = head.to(tl.int64) * num_tokens + query
    flags = tl.load(index.num_sparse + at, mask=inside, other=0)  # bit 31: its own was chosen
    if SHAPE.BY_UNIONS:
        inside = inside & ((flags & GOES_BY_UNION) == 0)
        if tl.max(inside.to(tl.int32), 0) == 0:
            return
    q_offset = query.to(tl.int64) * q.stride_t + query_head * q.stride_h
    q_tile = load_rows(q.ptr, q_offset, inside, SHAPE.D, SHAPE.PADDED_D, True)

    if runs.position is None:
        own_key, first_key, end_key = query, first_query, end_query
    else:
        first_key, end_key = tl.load(runs.first_key + run), tl.load(runs.end_key + run)
        position = tl.load(runs.position + query, mask=inside, other=-1)
        own_key = first_key + (position - own * SHAPE.BLOCK_SIZE)
    acc, maximum, total = attend_forced(
        q_tile, k, v, head, own_key, flags, own, first_key, end_key, scale, SHAPE, TILE
    )

    if SHAPE.NUM_SLOTS > 0:
        num_partials = tl.where(inside, flags & 0x7FFFFFFF, 0) * TILE.PIECES
        PARTIALS: tl.constexpr = SHAPE.NUM_SLOTS * TILE.PIECES * G
        first = (query - low_row).to(tl.int64) * PARTIALS
        first = partials_of_unit(num_tokens, PARTIALS) + first + row % G
        for i in tl.range(0, tl.max(num_partials), num_stages=TILE.NUM_STAGES):
            exists = i < num_partials
            at = first + i * G
            lse = tl.load(partials.lse + at, mask=exists, other=float("-inf"))
            o = load_rows(partials.o, at * SHAPE.DV, exists, SHAPE.DV, SHAPE.PADDED_DV, True)
            raised = tl.maximum(maximum, lse)
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            decay, weight = tl.exp2(maximum - shift), tl.exp2(lse - shift)
            total = total * decay + weight
            acc = acc * decay[:, None] + weight[:, None] * o.to(tl.float32)
            maximum = raised

    query = query.to(tl.int64)
    store_attended(
        *(o_ptr, lse_ptr, query, query_head, num_heads, inside, acc, maximum, total, SHAPE)
    )


def hopper() -> Any:
    """The Gluon kernels, imported only where they run: their interface moves with Triton."""
    from nsa_fsa.ops.selected_attention import kv_major_hopper

    return kv_major_hopper


def cut_forward(call: SelectedCall, index: BlockIndex, config: tuning.Config) -> Work:
    """How the forward is cut so that its partial results fit the workspace."""
    block_size, num_slots = call.blocks.block_size, call.num_slots
    num_tokens, (_, num_kv_heads, v_dim) = call.q.shape[0], call.v.shape
    keys = block_size if config.fwd_hopper else min(config.fwd_keys, block_size)
    pieces = block_size // keys

    slot_bytes = pieces * call.group_size * (v_dim * call.q.element_size() + 4) + 1
    row_bytes = max(num_slots, 1) * slot_bytes
    units = cut_units(num_kv_heads, num_tokens, row_bytes, call.workspace_bytes, block_size)
    item_queries = max(config.fwd_item_rows // call.group_size, 1)
    return Work(units, num_tokens, index.blocks.shape[1], num_slots, item_queries, pieces)


def runs_of(call: SelectedCall, index: BlockIndex) -> Runs:
    """Where the queries lie that share their own block."""
    if call.sequences.shares_rows:
        blocks = BlockTable(*index.blocks)
        return Runs(blocks.first_row, blocks.num_rows, blocks.number, None, None, None)
    found = locate_runs(call.q.shape[0], call.sequences, call.blocks.block_size)
    return Runs(*RunTable(*found), RowTable(*index.rows).position)


def selected_attention_fwd(call: SelectedCall, config: tuning.Config) -> AttentionResult:
    """o `[T, HQ, DV]` and the natural-log lse, float32 `[T, HQ]`; of a call without a block index
    that of the queries which need one is made."""
    q, k, v = (rows_contiguous(x, config.fwd_hopper) for x in (call.q, call.k, call.v))
    num_tokens, num_heads, _ = q.shape
    o = q.new_empty(num_tokens, num_heads, v.shape[2])
    lse = q.new_empty(num_tokens, num_heads, dtype=torch.float32)
    if o.numel() == 0:
        return AttentionResult(o, lse.fill_(-torch.inf))

    unions = find_unions(call, config)
    index = index_of_others(call, unions)
    if unions is not None:
        union_attention_fwd(call, config, unions, (q, k, v), AttentionResult(o, lse))

    blocks, runs = BlockTable(*index.blocks), runs_of(call, index)
    work = cut_forward(call, index, config)
    shape, block_size = shape_of(call, work, unions is not None), call.blocks.block_size
    block_pairs = block_size * call.group_size
    merge_m = min(config.merge_m, max(16, next_power_of_2(block_pairs)))
    keys, merge_keys = block_size // work.pieces, min(config.merge_keys, block_size)
    sizes = (config.fwd_m, keys, config.fwd_stages, config.fwd_warps, config.stop_early)
    merge_sizes = (merge_m, merge_keys, config.merge_stages, config.merge_warps)
    gathering = dict(SHAPE=shape, TILE=tile_of(call, work, *sizes), num_warps=config.fwd_warps)
    merging = dict(
        SHAPE=shape, TILE=tile_of(call, work, *merge_sizes), num_warps=config.merge_warps
    )
    merge_programs = runs.number.shape[0] * cdiv(block_pairs, merge_m)

    num_partials = work.partials(call.group_size)
    partials = Partials(
        q.new_empty(num_partials, v.shape[2]), q.new_empty(num_partials, dtype=torch.float32)
    )
    inputs = (heads(q), heads(k), heads(v), index)
    gather = hopper().gather_fwd_hopper_kernel if config.fwd_hopper else gather_fwd_kernel
    scale = call.scale * LOG2_E

    for launch in planned_launches(call, index, blocks, work):
        plan, place, first_head, low_row, high_row, count = launch
        if call.num_slots:
            items = (plan, place, first_head, num_tokens, work.item_queries)
            gather[(work.max_items * work.pieces, count)](
                *(*inputs, blocks, partials, *items, low_row, scale), **gathering
            )
        rows = (first_head, low_row, high_row, num_tokens, num_heads)
        merge_fwd_kernel[(merge_programs, count)](
            *(*inputs, runs, partials, o, lse, *rows, scale), **merging
        )
    return AttentionResult(o, lse)
