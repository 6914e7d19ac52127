"""Selected attention, forward, in the loop order of FSA: KV blocks outside, the queries that chose each block inside.

    gather   a program holds one block's keys and values and walks the queries that chose it, a tile of (query, head of the
             group) rows at a time, so that no group size pads anything. Each row leaves a partial result, normalised,
             with its own log-sum-exp, at (query, slot). Where a block is too much for one program several hold a piece
             each, and a slot has room for the partials of all pieces.
    merge    a program owns a tile of rows that share their own block. It attends to the forced blocks densely, which holds the
             only causal masking here, and folds in the partials. The initial block, which every query sees, is no hot spot.

Partials take `workspace_bytes` at most: KV heads, and where one head is too much ranges of queries, are done in turn.
"""

from typing import Any

import torch
import triton.language as tl

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import BlockTable
from nsa_fsa.ops.common.primitives import LN_2, LOG2_E, dot_keys, kernel, load_rows, online_softmax, store_rows
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.work import cut_units, planned_launches


@kernel
def gather_fwd_kernel(
    q_ptr, k_ptr, v_ptr, entries_ptr, partial_o_ptr, partial_lse_ptr,
    items_ptr, num_items_ptr, first_item_ptr, first_entry_ptr, num_queries_ptr, first_row_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    scale, num_blocks, capacity, max_items, place, partial_rows, first_unit, num_ranges, range_rows, item_queries,
    NUM_SLOTS: tl.constexpr, RANGED: tl.constexpr, G: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr, STOP_EARLY: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = BLOCK_SIZE // KEYS  # programs that share an item, each with so many of its block's keys
    item, piece = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    planned, unit = place + tl.program_id(1), first_unit + tl.program_id(1)
    if item >= tl.load(num_items_ptr + planned):
        return
    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    block = tl.load(items_ptr + planned * max_items + item)
    segment = planned * num_blocks + block
    part = item - tl.load(first_item_ptr + segment)
    low = part * item_queries
    num_rows = tl.minimum(tl.load(num_queries_ptr + segment) - low, item_queries) * G
    entries_ptr += head.to(tl.int64) * capacity + tl.load(first_entry_ptr + segment) + low
    q_ptr += head.to(tl.int64) * G * stride_q_h
    partial = tl.program_id(1).to(tl.int64) * partial_rows + piece * G

    # Whoever chose this block lies beyond it, so all of its keys exist and are seen.
    key = (tl.load(first_row_ptr + block) + piece * KEYS + tl.arange(0, KEYS)).to(tl.int64)
    k = load_rows(k_ptr + head.to(tl.int64) * stride_k_h, key * stride_k_t, key >= 0, D, PADDED_D, False)
    v = load_rows(v_ptr + head.to(tl.int64) * stride_v_h, key * stride_v_t, key >= 0, DV, PADDED_DV, False)
    k = tl.trans(k)
    for start in tl.range(0, num_rows if STOP_EARLY else item_queries * G, BLOCK_M, num_stages=NUM_STAGES):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < num_rows
        entry = tl.load(entries_ptr + row // G, mask=inside, other=0)
        member = row % G
        q_offset = (entry // NUM_SLOTS).to(tl.int64) * stride_q_t + member.to(tl.int64) * stride_q_h
        q = load_rows(q_ptr, q_offset, inside, D, PADDED_D, True)
        scores = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_M, KEYS]
        maximum = tl.max(scores, 1) * scale
        p = tl.exp2(scores * scale - maximum[:, None])
        total = tl.sum(p, 1)
        # Dividing p costs half of what dividing o would: [M, 64] against [M, 128].
        p = p * (1.0 / total)[:, None]
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        target = partial + (entry - low_row * NUM_SLOTS).to(tl.int64) * (PIECES * G) + member
        store_rows(partial_o_ptr, target * DV, o, inside, DV, PADDED_DV, STREAM=True)
        tl.store(partial_lse_ptr + target, maximum + tl.log2(total), mask=inside)


@kernel
def merge_fwd_kernel(
    q_ptr, k_ptr, v_ptr, num_sparse_ptr, partial_o_ptr, partial_lse_ptr, o_ptr, lse_ptr,
    first_row_ptr, num_rows_ptr, block_index_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    scale, num_heads, num_tokens, partial_rows, first_unit, num_ranges, range_rows,
    NUM_SLOTS: tl.constexpr, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, OWN_IS_OPTIONAL: tl.constexpr,
    RANGED: tl.constexpr, G: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr, PIECES: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (BLOCK_SIZE * G + BLOCK_M - 1) // BLOCK_M
    block, tile, unit = tl.program_id(0) // TILES, tl.program_id(0) % TILES, first_unit + tl.program_id(1)
    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    high_row = tl.minimum(low_row + range_rows, num_tokens)
    first_row = tl.load(first_row_ptr + block)
    rows_of_block = tl.load(num_rows_ptr + block)
    first_query = tile * BLOCK_M // G
    if (first_query >= rows_of_block) | (first_row + rows_of_block <= low_row) | (first_row >= high_row):
        return
    own = tl.load(block_index_ptr + block)  # the queries' own block
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row // G < rows_of_block
    query = first_row + row // G
    inside = inside & (query >= low_row) & (query < high_row)
    query_head = (head * G + row % G).to(tl.int64)
    num_sparse = tl.load(num_sparse_ptr + head.to(tl.int64) * num_tokens + query, mask=inside, other=0)
    q_offset = query.to(tl.int64) * stride_q_t + query_head * stride_q_h
    q = load_rows(q_ptr, q_offset, inside, D, PADDED_D, True)
    k_ptr += head.to(tl.int64) * stride_k_h
    v_ptr += head.to(tl.int64) * stride_v_h

    acc = tl.zeros([BLOCK_M, PADDED_DV], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    column = tl.arange(0, KEYS)
    # Local blocks from the own one back, then the initial ones that are not among them.
    for i in range(0, LOCAL_BLOCKS + INIT_BLOCKS):
        offset = tl.where(i < LOCAL_BLOCKS, i, own - (i - LOCAL_BLOCKS))
        if (offset <= own) & ((i < LOCAL_BLOCKS) | (offset >= LOCAL_BLOCKS)):
            for first_key in range(0, BLOCK_SIZE, KEYS):
                key = first_row - offset * BLOCK_SIZE + first_key + column
                exists = key < first_row + rows_of_block
                k = load_rows(k_ptr, key.to(tl.int64) * stride_k_t, exists, D, PADDED_D, True)
                v = load_rows(v_ptr, key.to(tl.int64) * stride_v_t, exists, DV, PADDED_DV, True)
                scores = dot_keys(q, k, PRECISION) * scale
                seen = key[None, :] <= query[:, None]
                if OWN_IS_OPTIONAL:
                    seen = seen & ((offset > 0) | (num_sparse < 0))[:, None]  # bit 31: the own block was chosen
                scores = tl.where(seen, scores, float("-inf"))
                acc, maximum, total = online_softmax(acc, maximum, total, scores, v, PRECISION)

    if NUM_SLOTS > 0:
        num_sparse = num_sparse & 0x7FFFFFFF
        first_slot = (query - low_row).to(tl.int64) * (NUM_SLOTS * PIECES)
        partial = tl.program_id(1).to(tl.int64) * partial_rows + first_slot * G + row % G
        for i in tl.range(0, tl.max(num_sparse) * PIECES, num_stages=NUM_STAGES):
            exists = i < num_sparse * PIECES
            at = partial + i * G
            lse = tl.load(partial_lse_ptr + at, mask=exists, other=float("-inf"))
            o = load_rows(partial_o_ptr, at * DV, exists, DV, PADDED_DV, True)
            raised = tl.maximum(maximum, lse)
            shift = tl.where(raised == float("-inf"), 0.0, raised)
            decay, weight = tl.exp2(maximum - shift), tl.exp2(lse - shift)
            total = total * decay + weight
            acc = acc * decay[:, None] + weight[:, None] * o.to(tl.float32)
            maximum = raised

    seen_any = total > 0
    total = tl.where(seen_any, total, 1.0)  # acc is 0 where nothing was seen
    acc = acc * (1.0 / total)[:, None]
    target = query.to(tl.int64) * num_heads + query_head
    store_rows(o_ptr, target * DV, acc, inside, DV, PADDED_DV)
    lse = tl.where(seen_any, (maximum + tl.log2(total)) * LN_2, float("-inf"))
    tl.store(lse_ptr + target, lse, mask=inside)


def hopper() -> Any:
    """The Gluon kernels, imported only where they run: they are written for one version of a moving interface."""
    from nsa_fsa.ops.selected_attention import kv_major_hopper as selected_kv_major_hopper

    return selected_kv_major_hopper


def selected_attention_fwd(call: SelectedCall, config: tuning.Config) -> AttentionResult:
    """o `[T, HQ, DV]` and the natural-log lse, float32 `[T, HQ]`, of a call with a block index."""
    assert call.index is not None
    index, slots, scale = call.index, call.num_slots, call.scale
    block_size, init_blocks, local_blocks = call.blocks
    q, k, v = (rows_contiguous(x, config.fwd_hopper) for x in (call.q, call.k, call.v))
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, v_dim = v.shape[1:]
    group_size, precision = call.group_size, tuning.dot_precision(q.dtype)
    o = q.new_empty(num_tokens, num_heads, v_dim)
    lse = q.new_empty(num_tokens, num_heads, dtype=torch.float32)
    if o.numel() == 0:
        return AttentionResult(o, lse.fill_(-torch.inf))
    widths = dict(D=head_dim, PADDED_D=padded_dim(head_dim), DV=v_dim, PADDED_DV=padded_dim(v_dim))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    blocks = BlockTable(*index.blocks)
    num_blocks = index.blocks.shape[1]
    keys = block_size if config.fwd_hopper else min(config.fwd_keys, block_size)
    pieces = block_size // keys
    row_bytes = max(slots, 1) * (pieces * group_size * (v_dim * q.element_size() + 4) + 1)
    units = cut_units(num_kv_heads, num_tokens, row_bytes, call.workspace_bytes, block_size)
    partial_rows = units.range_rows * slots * pieces * group_size
    partial_o = q.new_empty(units.step * partial_rows, v_dim)
    partial_lse = q.new_empty(units.step * partial_rows, dtype=torch.float32)
    merge_m = min(config.merge_m, max(16, next_power_of_2(block_size * group_size)))
    tiles = cdiv(block_size * group_size, merge_m)
    item_queries = max(config.fwd_item_rows // group_size, 1)
    for plan, place, first, count in planned_launches(index, units, num_slots=slots, item_queries=item_queries):
        where = (partial_rows, first, units.num_ranges, units.range_rows)
        if slots:
            arguments = (
                q, k, v, index.entries, partial_o, partial_lse,
                plan.items, plan.num_items, plan.first_item, plan.first_entry, plan.num_queries, blocks.first_row,
                *strides, scale * LOG2_E, num_blocks, index.entries.shape[1], plan.items.shape[1], place, *where, item_queries,
            )  # fmt: skip
            constants = dict(
                NUM_SLOTS=slots, RANGED=units.num_ranges > 1, G=group_size, BLOCK_SIZE=block_size, BLOCK_M=config.fwd_m,
                STOP_EARLY=config.stop_early, num_warps=config.fwd_warps,
            )  # fmt: skip
            grid = (plan.items.shape[1] * pieces, count)
            if config.fwd_hopper:
                hopper().gather_fwd_hopper_kernel[grid](*arguments, D=head_dim, WARPS=config.fwd_warps, **constants)
            else:
                gather_fwd_kernel[grid](
                    *arguments, PRECISION=precision, KEYS=keys, NUM_STAGES=config.fwd_stages, **constants, **widths
                )
        merge_fwd_kernel[(num_blocks * tiles, count)](
            q, k, v, index.num_sparse, partial_o, partial_lse, o, lse, *blocks[:3],
            *strides, scale * LOG2_E, num_heads, num_tokens, *where,
            NUM_SLOTS=slots, INIT_BLOCKS=init_blocks, LOCAL_BLOCKS=max(local_blocks, 1), OWN_IS_OPTIONAL=local_blocks == 0,
            RANGED=units.num_ranges > 1, G=group_size, BLOCK_SIZE=block_size, BLOCK_M=merge_m,
            KEYS=min(config.merge_keys, block_size), PIECES=pieces, PRECISION=precision, NUM_STAGES=config.merge_stages,
            num_warps=config.merge_warps, **widths,
        )  # fmt: skip
    return AttentionResult(o, lse)
