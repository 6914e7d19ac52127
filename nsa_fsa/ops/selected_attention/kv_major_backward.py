"""Selected attention, backward, in the loop order of FSA.

    statistics  per query and head, shift = -lse / scale, so that p = exp((q k + shift) * scale), and delta = -sum(o * do).
    gather      a program holds one block's keys and values and walks the queries that see it: first the run of rows that see
                it densely, then its entries of the block index. dk and dv stay in registers; each row leaves a partial dq.
                Scores are computed transposed, [keys, rows], so that p and ds feed the matrix unit from registers.
                Large blocks are held in pieces, as in the forward.
    sum dk, dv  where a block's queries were cut into several items.
    sum dq      a streaming sum over each row's partials.

Nothing is added atomically, so the result is the same in every run.
"""

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AddTo, AttentionGradients
from nsa_fsa.ops.common.locate import BlockTable, RowTable
from nsa_fsa.ops.common.primitives import LOG2_E, add_product, kernel, load_rows, store_rows
from nsa_fsa.ops.common.sizes import cdiv, padded_dim, rows_contiguous
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.kv_major_forward import hopper
from nsa_fsa.ops.selected_attention.work import cut_units, planned_launches


@kernel
def gather_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, shift_ptr, delta_ptr, num_sparse_ptr, entries_ptr, partial_dq_ptr, items_buffer_ptr,
    dk_ptr, dv_ptr,
    items_ptr, num_items_ptr, first_item_ptr, first_buffer_ptr, first_dense_ptr, num_dense_ptr, first_entry_ptr,
    num_queries_ptr, first_row_ptr, num_rows_ptr, block_index_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    scale2, scale, num_heads, num_tokens, num_blocks, capacity, max_items, max_buffers, place, partial_rows, first_unit,
    num_ranges, range_rows, item_queries,
    NUM_SLOTS: tl.constexpr, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, OWN_IS_OPTIONAL: tl.constexpr,
    ACCUMULATE: tl.constexpr, RANGED: tl.constexpr, G: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, KEYS: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr, STORE_DQ: tl.constexpr,
    STOP_EARLY: tl.constexpr,
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
    num_queries = tl.load(num_queries_ptr + segment)
    num_rows = tl.minimum(num_queries - low, item_queries) * G
    num_dense = tl.load(num_dense_ptr + segment) - low
    first_dense = tl.load(first_dense_ptr + segment) + low
    entries_ptr += head.to(tl.int64) * capacity + tl.load(first_entry_ptr + segment)
    SLOTS: tl.constexpr = NUM_SLOTS + INIT_BLOCKS + LOCAL_BLOCKS
    partial = tl.program_id(1).to(tl.int64) * partial_rows + piece * G
    q_ptr += head.to(tl.int64) * G * stride_q_h
    do_ptr += head.to(tl.int64) * G * stride_do_h
    shift_ptr += head * G
    delta_ptr += head * G

    first_row = tl.load(first_row_ptr + block)
    block_index = tl.load(block_index_ptr + block)
    column = piece * KEYS + tl.arange(0, KEYS)
    exists = column < tl.load(num_rows_ptr + block)
    key = (first_row + column).to(tl.int64)
    k = load_rows(k_ptr + head.to(tl.int64) * stride_k_h, key * stride_k_t, exists, D, PADDED_D, True)
    v = load_rows(v_ptr + head.to(tl.int64) * stride_v_h, key * stride_v_t, exists, DV, PADDED_DV, True)
    dk = tl.zeros([KEYS, PADDED_D], tl.float32)
    dv = tl.zeros([KEYS, PADDED_DV], tl.float32)
    for start in tl.range(0, num_rows if STOP_EARLY else item_queries * G, BLOCK_M, num_stages=NUM_STAGES):
        row = start + tl.arange(0, BLOCK_M)
        inside = row < num_rows
        number = row // G
        member = (row % G).to(tl.int64)
        dense = number < num_dense
        entry = tl.load(entries_ptr + (number - num_dense), mask=inside & ~dense, other=0)
        query = tl.where(dense, first_dense + number, entry // NUM_SLOTS)
        query = tl.where(inside, query, first_row)
        q_offset = query.to(tl.int64) * stride_q_t + member * stride_q_h
        do_offset = query.to(tl.int64) * stride_do_t + member * stride_do_h
        q = load_rows(q_ptr, q_offset, inside, D, PADDED_D, True)
        do = load_rows(do_ptr, do_offset, inside, DV, PADDED_DV, True)
        at = query.to(tl.int64) * num_heads + member
        shift = tl.load(shift_ptr + at, mask=inside, other=float("-inf"))
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        ahead = query - first_row  # how far the query lies beyond the block's first key
        if OWN_IS_OPTIONAL:
            flags = tl.load(num_sparse_ptr + head.to(tl.int64) * num_tokens + query, mask=inside, other=0)
            shift = tl.where((ahead < BLOCK_SIZE) & (flags >= 0), float("-inf"), shift)

        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, BLOCK_M]
        # Not (scores + shift) * scale2: the sum would begin at shift, which is large, and round there with every product.
        p = tl.exp2(scores * scale2 + (shift * scale2)[None, :])
        p = tl.where(column[:, None] <= ahead[None, :], p, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dv = add_product(dv, p.to(do.dtype), do, PRECISION)
        ds = (p * (dp + delta[None, :]) * scale).to(q.dtype)
        dk = add_product(dk, ds, q, PRECISION)
        if STORE_DQ:
            if KEYS < 64:
                # As [D, BLOCK_M] its layout, all warps along D, would be that of dk and dv too, where D is the other axis:
                # every warp would hold all of them. From 64 keys on there is work for the warps along the keys.
                dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
            else:
                dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION))
            dense_slot = NUM_SLOTS + tl.where(block_index < INIT_BLOCKS, block_index, INIT_BLOCKS + ahead // BLOCK_SIZE)
            slot = tl.where(dense, dense_slot, entry % NUM_SLOTS)
            target = partial + ((query - low_row).to(tl.int64) * SLOTS + slot) * (PIECES * G) + member
            store_rows(partial_dq_ptr, target * D, dq, inside, D, PADDED_D, STREAM=True)

    everywhere = column >= 0
    if num_queries > item_queries:  # one item of several
        buffer = tl.program_id(1).to(tl.int64) * max_buffers + tl.load(first_buffer_ptr + segment) + part
        target = (buffer * BLOCK_SIZE + column) * (D + DV)
        store_rows(items_buffer_ptr, target, dk, everywhere, D, PADDED_D)
        store_rows(items_buffer_ptr + D, target, dv, everywhere, DV, PADDED_DV)
    else:
        dk_ptr += head.to(tl.int64) * stride_dk_h
        dv_ptr += head.to(tl.int64) * stride_dv_h
        if ACCUMULATE:
            dk += load_rows(dk_ptr, key * stride_dk_t, exists, D, PADDED_D, True)
            dv += load_rows(dv_ptr, key * stride_dv_t, exists, DV, PADDED_DV, True)
        store_rows(dk_ptr, key * stride_dk_t, dk, exists, D, PADDED_D)
        store_rows(dv_ptr, key * stride_dv_t, dv, exists, DV, PADDED_DV)


@kernel
def sum_dkdv_kernel(
    items_buffer_ptr, dk_ptr, dv_ptr, first_buffer_ptr, num_queries_ptr, first_row_ptr, num_rows_ptr,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, num_blocks, max_buffers, place, first_unit, num_ranges,
    item_queries, ACCUMULATE: tl.constexpr, RANGED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dk and dv of the blocks whose queries were cut into several items."""
    PARTS: tl.constexpr = BLOCK_SIZE // ROWS
    block, unit = tl.program_id(0) // PARTS, first_unit + tl.program_id(1)
    segment = (place + tl.program_id(1)) * num_blocks + block
    num_queries = tl.load(num_queries_ptr + segment)
    if num_queries <= item_queries:
        return
    column = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    exists = column < tl.load(num_rows_ptr + block)
    key = (tl.load(first_row_ptr + block) + column).to(tl.int64)
    head = (unit // num_ranges if RANGED else unit).to(tl.int64)
    dk_ptr += head * stride_dk_h
    dv_ptr += head * stride_dv_h
    dk = tl.zeros([ROWS, PADDED_D], tl.float32)
    dv = tl.zeros([ROWS, PADDED_DV], tl.float32)
    if ACCUMULATE:
        dk += load_rows(dk_ptr, key * stride_dk_t, exists, D, PADDED_D, True)
        dv += load_rows(dv_ptr, key * stride_dv_t, exists, DV, PADDED_DV, True)
    first = tl.program_id(1).to(tl.int64) * max_buffers + tl.load(first_buffer_ptr + segment)
    for part in tl.range(0, (num_queries + item_queries - 1) // item_queries, num_stages=4):
        source = ((first + part) * BLOCK_SIZE + column) * (D + DV)
        dk += load_rows(items_buffer_ptr, source, exists, D, PADDED_D, True)
        dv += load_rows(items_buffer_ptr + D, source, exists, DV, PADDED_DV, True)
    store_rows(dk_ptr, key * stride_dk_t, dk, exists, D, PADDED_D)
    store_rows(dv_ptr, key * stride_dv_t, dv, exists, DV, PADDED_DV)


@kernel
def sum_dq_kernel(
    partial_dq_ptr, num_sparse_ptr, position_ptr, dq_ptr,
    num_heads, num_tokens, partial_rows, first_unit, num_ranges, range_rows,
    NUM_SLOTS: tl.constexpr, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, G: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ACCUMULATE: tl.constexpr, RANGED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PIECES: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    unit = first_unit + tl.program_id(1)
    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    high_row = tl.minimum(low_row + range_rows, num_tokens)
    SLOTS: tl.constexpr = NUM_SLOTS + INIT_BLOCKS + LOCAL_BLOCKS
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = low_row + row // G
    inside = query < high_row
    num_sparse = tl.load(num_sparse_ptr + head.to(tl.int64) * num_tokens + query, mask=inside, other=0) & 0x7FFFFFFF
    own = tl.load(position_ptr + query, mask=inside, other=-1) // BLOCK_SIZE
    partial = tl.program_id(1).to(tl.int64) * partial_rows + (row // G).to(tl.int64) * (SLOTS * PIECES * G) + row % G
    dq = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    for i in tl.range(0, SLOTS * PIECES, num_stages=NUM_STAGES):
        slot = i // PIECES
        initial = slot - NUM_SLOTS
        local = initial - INIT_BLOCKS
        exists = tl.where(
            slot < NUM_SLOTS, slot < num_sparse, tl.where(initial < INIT_BLOCKS, initial <= own, own - local >= INIT_BLOCKS)
        )
        dq += load_rows(partial_dq_ptr, (partial + i * G) * D, exists & inside, D, PADDED_D, True).to(tl.float32)
    target = query.to(tl.int64) * num_heads + head * G + row % G
    if ACCUMULATE:
        dq += load_rows(dq_ptr, target * D, inside, D, PADDED_D, True).to(tl.float32)
    store_rows(dq_ptr, target * D, dq, inside, D, PADDED_D)


def selected_attention_bwd(
    call: SelectedCall,
    config: tuning.Config,
    do: Tensor,
    shift: Tensor,
    delta: Tensor,
    add_to: AddTo,
    store_dq: bool = True,
) -> AttentionGradients:
    """Gradients of q `[T, HQ, D]`, k `[T, HKV, D]` and v `[T, HKV, DV]`, each in its own dtype, of a call with a block index.

    shift, delta: as `statistics` gives them.
    add_to: gradients of q, and of both k and v or of neither.
    store_dq: leave dq alone (uninitialised, where it is new) because another kernel computes it.
    """
    assert call.index is not None
    index, slots, scale, workspace_bytes = call.index, call.num_slots, call.scale, call.workspace_bytes
    block_size, init_blocks, local_blocks = call.blocks
    do, q, k, v = (rows_contiguous(x, config.bwd_hopper) for x in (do, call.q, call.k, call.v))
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, v_dim = v.shape[1:]
    group_size, precision = call.group_size, tuning.dot_precision(q.dtype)
    add_dq, add_dkdv = add_to.q is not None, add_to.k is not None
    dq, dk, dv = add_to.targets(q, k, v)
    if num_tokens == 0 or num_heads == 0:
        return AttentionGradients(*((dq, dk, dv) if add_dkdv else (dq, dk.zero_(), dv.zero_())))

    all_slots = slots + init_blocks + max(local_blocks, 1)
    gluon = config.bwd_hopper and store_dq
    keys = block_size if gluon else min(config.bwd_keys, block_size)
    pieces = block_size // keys
    item_queries = max(config.bwd_item_rows // group_size, 1)
    dkdv_bytes = block_size * (head_dim + v_dim) * 4
    # Blocks cut into several items have at most two items for every item_queries queries.
    row_bytes = all_slots * (pieces * group_size * head_dim * q.element_size() * store_dq + 2 * dkdv_bytes // item_queries + 1)
    position, blocks = RowTable(*index.rows).position, BlockTable(*index.blocks)
    num_blocks = index.blocks.shape[1]
    units = cut_units(num_kv_heads, num_tokens, row_bytes, workspace_bytes, block_size)
    ranged = units.num_ranges > 1
    dk_sum, dv_sum = dk, dv
    if ranged:  # the ranges of a head add up in float32, one head at a time
        # Half of the workspace is for partial results all the same: with less, a million tokens would take 16,384 launches.
        left = max(workspace_bytes - num_tokens * (head_dim + v_dim) * 4, workspace_bytes // 2)
        units = cut_units(num_kv_heads, num_tokens, row_bytes, left, block_size)
        dk_sum = torch.empty(num_tokens, 1, head_dim, dtype=torch.float32, device=q.device)
        dv_sum = torch.empty(num_tokens, 1, v_dim, dtype=torch.float32, device=q.device)
    head_strides = (0, 0) if ranged else (dk.stride(1), dv.stride(1))
    out_strides = (dk_sum.stride(0), head_strides[0], dv_sum.stride(0), head_strides[1])
    partial_rows = units.range_rows * all_slots * pieces * group_size
    partial_dq = q.new_empty(units.step * partial_rows if store_dq else 0, head_dim)
    max_buffers = 2 * (units.range_rows * all_slots // item_queries)
    buffer = torch.empty(units.step * max_buffers * dkdv_bytes // 4, dtype=torch.float32, device=q.device)
    dims = dict(D=head_dim, PADDED_D=padded_dim(head_dim))
    v_dims = dict(DV=v_dim, PADDED_DV=padded_dim(v_dim))
    forced = dict(NUM_SLOTS=slots, INIT_BLOCKS=init_blocks, LOCAL_BLOCKS=max(local_blocks, 1))
    launches = planned_launches(
        index, units, num_slots=slots, item_queries=item_queries, dense=True,
        init_blocks=init_blocks, local_blocks=local_blocks, block_size=block_size,
    )  # fmt: skip
    for plan, place, first, count in launches:
        if ranged and first % units.num_ranges == 0:
            dk_sum.zero_()
            dv_sum.zero_()
        arguments = (
            q, k, v, do, shift, delta, index.num_sparse, index.entries, partial_dq, buffer, dk_sum, dv_sum,
            *plan, *blocks[:3], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2], *out_strides,
            scale * LOG2_E, scale, num_heads, num_tokens, num_blocks, index.entries.shape[1], plan.items.shape[1], max_buffers,
            place, partial_rows, first, units.num_ranges, units.range_rows, item_queries,
        )  # fmt: skip
        constants = dict(
            OWN_IS_OPTIONAL=local_blocks == 0, ACCUMULATE=ranged or add_dkdv, RANGED=ranged, G=group_size,
            BLOCK_SIZE=block_size, BLOCK_M=config.bwd_m, NUM_STAGES=config.bwd_stages, STOP_EARLY=config.stop_early,
            num_warps=config.bwd_warps, **forced,
        )  # fmt: skip
        grid = (plan.items.shape[1] * pieces, count)
        if gluon:
            hopper().gather_bwd_hopper_kernel[grid](*arguments, D=head_dim, WARPS=config.bwd_warps, **constants)
        else:
            gather_bwd_kernel[grid](
                *arguments, PRECISION=precision, STORE_DQ=store_dq, KEYS=keys, **constants, **dims, **v_dims
            )
        if max_buffers:
            sum_rows = min(block_size, 16)
            sum_dkdv_kernel[(num_blocks * (block_size // sum_rows), count)](
                buffer, dk_sum, dv_sum, plan.first_buffer, plan.num_queries, *blocks[:2],
                *out_strides, num_blocks, max_buffers, place, first, units.num_ranges, item_queries,
                ACCUMULATE=ranged or add_dkdv, RANGED=ranged, BLOCK_SIZE=block_size, ROWS=sum_rows, **dims, **v_dims,
            )  # fmt: skip
        if store_dq:
            sum_dq_kernel[(cdiv(units.range_rows * group_size, config.dq_m), count)](
                partial_dq, index.num_sparse, position, dq,
                num_heads, num_tokens, partial_rows, first, units.num_ranges, units.range_rows,
                ACCUMULATE=add_dq, RANGED=ranged, G=group_size, BLOCK_SIZE=block_size, BLOCK_M=config.dq_m, PIECES=pieces,
                NUM_STAGES=config.dq_stages, num_warps=config.dq_warps, **forced, **dims,
            )  # fmt: skip
        if ranged and (first + 1) % units.num_ranges == 0:
            for total, of_head in ((dk, dk_sum), (dv, dv_sum)):
                column = total[:, first // units.num_ranges]
                column.copy_(of_head[:, 0] + column if add_dkdv else of_head[:, 0])
    return AttentionGradients(dq, dk, dv)
