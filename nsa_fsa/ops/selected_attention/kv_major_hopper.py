"""The two gather kernels of the KV-major order for Hopper, in Gluon; the kernels of the same name without `hopper` are their
plain Triton twins, for every other GPU, shape and dtype, and say what is computed.

What Gluon adds is control over what waits for what. A program is one warpgroup (two for blocks of 128), two or three of them
share a multiprocessor, and in the loop over tiles nothing waits for global memory that was not asked for a tile earlier:

- rows of q and do arrive by cp.async while the tile before is computed, and the entries that say where they lie a tile before
  that. Loads into registers instead spill, and a spill waits for its load: 19.5 ms instead of the backward's 16.4.
- matrix products run asynchronously; k q^T and v do^T together, ds q beside dsT k.
- a result is staged in the buffer of the queries that it belongs to, which are no longer needed, and leaves in 16-byte stores.

Rows past the end of an item repeat its last one, so that nothing undefined is ever multiplied; they are not stored.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from nsa_fsa.ops.common.hopper import copy_rows, gluon_kernel, thread_barrier

VECTOR = gl.constexpr(8)  # elements of a 16-byte copy; offsets are multiples, and kept divided by it, in 32 bits
RING = gl.constexpr(4)  # tiles whose entries and statistics are kept


@gluon.jit
def copy_entries(buffer, entries_ptr, row, last, num_dense, G: gl.constexpr):
    """Asynchronously, the entries of rows; entries_ptr is where the entry of row 0 would be if all rows had one."""
    number = gl.minimum(row, last) // G
    async_copy.async_copy_global_to_shared(buffer, entries_ptr + number, mask=number >= num_dense)


@gluon.jit
def resolve_rows(
    entry, row, last, num_dense, first_dense, first_row, first_target, block_index,
    NUM_SLOTS: gl.constexpr, INIT_BLOCKS: gl.constexpr, LOCAL_BLOCKS: gl.constexpr, BLOCK_SIZE: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Query and head of the group of each row of an item, and the row of its partial dq. First come the queries that see the
    block densely."""
    number, member = gl.minimum(row, last) // G, row % G
    dense = number < num_dense
    query = gl.where(dense, first_dense + number, entry // max(NUM_SLOTS, 1))
    dense_slot = gl.where(block_index < INIT_BLOCKS, block_index, INIT_BLOCKS + (query - first_row) // BLOCK_SIZE)
    slot = gl.where(dense, NUM_SLOTS + dense_slot, entry % max(NUM_SLOTS, 1))
    target = first_target + (query * (NUM_SLOTS + INIT_BLOCKS + LOCAL_BLOCKS) + slot) * G + member
    return query, member, target


@gluon_kernel
def gather_fwd_hopper_kernel(
    q_ptr, k_ptr, v_ptr, entries_ptr, partial_o_ptr, partial_lse_ptr,
    items_ptr, num_items_ptr, first_item_ptr, first_entry_ptr, num_queries_ptr, first_row_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    scale, num_blocks, capacity, max_items, place, partial_rows, first_unit, num_ranges, range_rows, item_queries,
    NUM_SLOTS: gl.constexpr, RANGED: gl.constexpr, G: gl.constexpr, BLOCK_SIZE: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    WARPS: gl.constexpr, STOP_EARLY: gl.constexpr,
):  # fmt: skip
    item, planned, unit = gl.program_id(0), place + gl.program_id(1), first_unit + gl.program_id(1)
    block = gl.load(items_ptr + planned * max_items + item)  # before it is known to be one, so that the two loads overlap
    if item >= gl.load(num_items_ptr + planned):
        return
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    row_of: gl.constexpr = gl.SliceLayout(1, rows)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_SIZE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    key_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_SIZE, D], dtype)
    k_s = gl.allocate_shared_memory(dtype, [BLOCK_SIZE, D], key_shared)
    v_s = gl.allocate_shared_memory(dtype, [BLOCK_SIZE, D], key_shared)
    q_s = gl.allocate_shared_memory(dtype, [2, BLOCK_M, D], tile_shared)
    entry_s = gl.allocate_shared_memory(gl.int32, [RING, BLOCK_M], flat)

    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    segment = planned * num_blocks + block
    low = (item - gl.load(first_item_ptr + segment)) * item_queries
    num_rows = gl.minimum(gl.load(num_queries_ptr + segment) - low, item_queries) * G
    last = num_rows - 1
    entries_ptr += head.to(gl.int64) * capacity + gl.load(first_entry_ptr + segment) + low
    q_ptr += head.to(gl.int64) * G * stride_q_h
    partial = gl.program_id(1).to(gl.int64) * partial_rows
    partial_o_ptr += partial * D
    partial_lse_ptr += partial

    key = (gl.load(first_row_ptr + block) + gl.arange(0, BLOCK_SIZE, row_of)).to(gl.int64)
    copy_rows(k_s, k_ptr + head.to(gl.int64) * stride_k_h, key * stride_k_t, D, rows)
    copy_rows(v_s, v_ptr + head.to(gl.int64) * stride_v_h, key * stride_v_t, D, rows)
    lane = gl.arange(0, BLOCK_M, line)
    row = gl.arange(0, BLOCK_M, row_of)
    s_row = gl.arange(0, BLOCK_M, gl.SliceLayout(1, s_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, rows))
    for i in gl.static_range(2):
        entry_s.index(i).store(gl.load(entries_ptr + gl.minimum(i * BLOCK_M + lane, last) // G))
    thread_barrier()
    query = (entry_s.index(0).load(row_of) // NUM_SLOTS).to(gl.int64)
    copy_rows(q_s.index(0), q_ptr, query * stride_q_t + (row % G).to(gl.int64) * stride_q_h, D, rows)
    async_copy.commit_group()

    tile = 0
    for start in range(0, num_rows if STOP_EARLY else item_queries * G, BLOCK_M):
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        q_tile = q_s.index(tile % 2)
        none = gl.zeros([BLOCK_M, BLOCK_SIZE], gl.float32, s_layout)
        scores = warpgroup_mma(q_tile, k_s.permute((1, 0)), none, use_acc=False, is_async=True)
        query = (entry_s.index((tile + 1) % RING).load(row_of) // NUM_SLOTS).to(gl.int64)
        member = ((start + BLOCK_M + row) % G).to(gl.int64)
        copy_rows(q_s.index((tile + 1) % 2), q_ptr, query * stride_q_t + member * stride_q_h, D, rows)
        copy_entries(entry_s.index((tile + 2) % RING), entries_ptr, start + 2 * BLOCK_M + lane, last, 0, G)
        async_copy.commit_group()

        scores = warpgroup_mma_wait(0, deps=(scores,))
        maximum = gl.max(scores, 1) * scale
        p = gl.exp2(scores * scale - maximum[:, None])
        total = gl.sum(p, 1)
        p = gl.convert_layout((p * (1.0 / total)[:, None]).to(dtype), gl.DotOperandLayout(0, o_layout, 2))
        o = warpgroup_mma(p, v_s, gl.zeros([BLOCK_M, D], gl.float32, o_layout), use_acc=False, is_async=True)
        entries = entry_s.index(tile % RING)
        s_target = (entries.load(gl.SliceLayout(1, s_layout)) - low_row * NUM_SLOTS) * G + (start + s_row) % G
        gl.store(partial_lse_ptr + s_target, maximum + gl.log2(total), mask=start + s_row < num_rows)
        target = ((entries.load(row_of) - low_row * NUM_SLOTS) * G + (start + row) % G).to(gl.int64)
        o = warpgroup_mma_wait(0, deps=(o,))
        # Every warp has waited for its scores, and reads only the rows of q_tile that it writes here.
        q_tile.store(o.to(dtype))
        thread_barrier()
        out = partial_o_ptr + target[:, None] * D + column[None, :]
        gl.store(out, q_tile.load(rows), mask=(start + row < num_rows)[:, None], cache_modifier=".cs")
        tile += 1  # noqa: SIM113
    async_copy.wait_group(0)


@gluon_kernel
def gather_bwd_hopper_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, shift_ptr, delta_ptr, num_sparse_ptr, entries_ptr, partial_dq_ptr, items_buffer_ptr,
    dk_ptr, dv_ptr,
    items_ptr, num_items_ptr, first_item_ptr, first_buffer_ptr, first_dense_ptr, num_dense_ptr, first_entry_ptr,
    num_queries_ptr, first_row_ptr, num_rows_ptr, block_index_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    scale2, scale, num_heads, num_tokens, num_blocks, capacity, max_items, max_buffers, place, partial_rows, first_unit,
    num_ranges, range_rows, item_queries,
    NUM_SLOTS: gl.constexpr, INIT_BLOCKS: gl.constexpr, LOCAL_BLOCKS: gl.constexpr, OWN_IS_OPTIONAL: gl.constexpr,
    ACCUMULATE: gl.constexpr, RANGED: gl.constexpr, G: gl.constexpr, BLOCK_SIZE: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr, NUM_STAGES: gl.constexpr, WARPS: gl.constexpr, STOP_EARLY: gl.constexpr,
):  # fmt: skip
    item, planned, unit = gl.program_id(0), place + gl.program_id(1), first_unit + gl.program_id(1)
    block = gl.load(items_ptr + planned * max_items + item)  # before it is known to be one, so that the two loads overlap
    if item >= gl.load(num_items_ptr + planned):
        return
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    row_of: gl.constexpr = gl.SliceLayout(1, rows)
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, WARPS // 4], [16, D * 4 // WARPS, 16])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    key_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_SIZE, D], dtype)
    ds_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_SIZE, BLOCK_M], dtype)
    k_s = gl.allocate_shared_memory(dtype, [BLOCK_SIZE, D], key_shared)
    v_s = gl.allocate_shared_memory(dtype, [BLOCK_SIZE, D], key_shared)
    q_s = gl.allocate_shared_memory(dtype, [NUM_STAGES, BLOCK_M, D], tile_shared)
    do_s = gl.allocate_shared_memory(dtype, [NUM_STAGES, BLOCK_M, D], tile_shared)
    ds_s = gl.allocate_shared_memory(dtype, [BLOCK_SIZE, BLOCK_M], ds_shared)
    # One thread a row works out what all threads need to know of it.
    entry_s = gl.allocate_shared_memory(gl.int32, [2, BLOCK_M], flat)
    q_offset_s = gl.allocate_shared_memory(gl.int32, [2, BLOCK_M], flat)
    do_offset_s = gl.allocate_shared_memory(gl.int32, [2, BLOCK_M], flat)
    target_s = gl.allocate_shared_memory(gl.int32, [RING, BLOCK_M], flat)
    shift_s = gl.allocate_shared_memory(gl.float32, [RING, BLOCK_M], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [RING, BLOCK_M], flat)

    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    segment = planned * num_blocks + block
    low = (item - gl.load(first_item_ptr + segment)) * item_queries
    num_rows = gl.minimum(gl.load(num_queries_ptr + segment) - low, item_queries) * G
    last = num_rows - 1
    num_dense = gl.load(num_dense_ptr + segment) - low
    first_dense = gl.load(first_dense_ptr + segment) + low
    entries_ptr += head.to(gl.int64) * capacity + gl.load(first_entry_ptr + segment) - num_dense
    # Of query 0; it wraps around with the products that are added to it.
    first_target = gl.program_id(1) * partial_rows - low_row * ((NUM_SLOTS + INIT_BLOCKS + LOCAL_BLOCKS) * G)
    q_ptr += head.to(gl.int64) * G * stride_q_h
    do_ptr += head.to(gl.int64) * G * stride_do_h
    first_row = gl.load(first_row_ptr + block)
    block_index = gl.load(block_index_ptr + block)
    rows_of_block = gl.load(num_rows_ptr + block)

    # Keys past the end of a sequence are never seen: any row that exists will do.
    key = (first_row + gl.minimum(gl.arange(0, BLOCK_SIZE, row_of), rows_of_block - 1)).to(gl.int64)
    copy_rows(k_s, k_ptr + head.to(gl.int64) * stride_k_h, key * stride_k_t, D, rows)
    copy_rows(v_s, v_ptr + head.to(gl.int64) * stride_v_h, key * stride_v_t, D, rows)
    lane = gl.arange(0, BLOCK_M, line)
    row = gl.arange(0, BLOCK_M, row_of)
    column = gl.arange(0, D, gl.SliceLayout(0, rows))
    masked_rows = (first_row + BLOCK_SIZE - first_dense) * G  # of queries inside this very block
    # Rows begin at multiples of VECTOR elements.
    q_step_t, q_step_h = gl.cast(stride_q_t // VECTOR, gl.int32), gl.cast(stride_q_h // VECTOR, gl.int32)
    do_step_t, do_step_h = gl.cast(stride_do_t // VECTOR, gl.int32), gl.cast(stride_do_h // VECTOR, gl.int32)
    for i in gl.static_range(2):
        number = gl.minimum(i * BLOCK_M + lane, last) // G
        entry = gl.load(entries_ptr + number, mask=number >= num_dense, other=0)
        query, member, target = resolve_rows(
            entry, i * BLOCK_M + lane, last, num_dense, first_dense, first_row, first_target, block_index,
            NUM_SLOTS, INIT_BLOCKS, LOCAL_BLOCKS, BLOCK_SIZE, G,
        )  # fmt: skip
        q_offset_s.index(i).store(query * q_step_t + member * q_step_h)
        do_offset_s.index(i).store(query * do_step_t + member * do_step_h)
        target_s.index(i).store(target)
        statistic = query.to(gl.int64) * num_heads + (head * G + member)
        async_copy.async_copy_global_to_shared(shift_s.index(i), shift_ptr + statistic)
        async_copy.async_copy_global_to_shared(delta_s.index(i), delta_ptr + statistic)
    copy_entries(entry_s.index(0), entries_ptr, 2 * BLOCK_M + lane, last, num_dense, G)
    thread_barrier()
    copy_rows(q_s.index(0), q_ptr, q_offset_s.index(0).load(row_of).to(gl.int64) * VECTOR, D, rows)
    copy_rows(do_s.index(0), do_ptr, do_offset_s.index(0).load(row_of).to(gl.int64) * VECTOR, D, rows)
    async_copy.commit_group()

    dk = gl.zeros([BLOCK_SIZE, D], gl.float32, d_layout)
    dv = gl.zeros([BLOCK_SIZE, D], gl.float32, d_layout)
    for start in range(0, num_rows if STOP_EARLY else item_queries * G, BLOCK_M):
        tile = start // BLOCK_M
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        q_tile = q_s.index(tile % NUM_STAGES)
        do_tile = do_s.index(tile % NUM_STAGES)
        # The statistics are where the accumulators begin, so that they take no registers later.
        shift = gl.zeros([BLOCK_SIZE, BLOCK_M], gl.float32, s_layout) + shift_s.index(tile % RING).load(s_column)[None, :]
        scores = warpgroup_mma(k_s, q_tile.permute((1, 0)), shift, is_async=True)
        minus_delta = gl.zeros([BLOCK_SIZE, BLOCK_M], gl.float32, s_layout) + delta_s.index(tile % RING).load(s_column)[None, :]
        dp = warpgroup_mma(v_s, do_tile.permute((1, 0)), minus_delta, is_async=True)

        # The rows of the next tile, the statistics of the one after it, and the entries of the one after that.
        if NUM_STAGES > 1:
            copy_rows(
                q_s.index((tile + 1) % NUM_STAGES),
                q_ptr,
                q_offset_s.index((tile + 1) % 2).load(row_of).to(gl.int64) * VECTOR,
                D,
                rows,
            )
            copy_rows(
                do_s.index((tile + 1) % NUM_STAGES),
                do_ptr,
                do_offset_s.index((tile + 1) % 2).load(row_of).to(gl.int64) * VECTOR,
                D,
                rows,
            )
        query, member, target = resolve_rows(
            entry_s.index(tile % 2).load(line), start + 2 * BLOCK_M + lane, last, num_dense, first_dense, first_row,
            first_target, block_index, NUM_SLOTS, INIT_BLOCKS, LOCAL_BLOCKS, BLOCK_SIZE, G,
        )  # fmt: skip
        q_offset_s.index(tile % 2).store(query * q_step_t + member * q_step_h)
        do_offset_s.index(tile % 2).store(query * do_step_t + member * do_step_h)
        target_s.index((tile + 2) % RING).store(target)
        statistic = query.to(gl.int64) * num_heads + (head * G + member)
        async_copy.async_copy_global_to_shared(shift_s.index((tile + 2) % RING), shift_ptr + statistic)
        async_copy.async_copy_global_to_shared(delta_s.index((tile + 2) % RING), delta_ptr + statistic)
        copy_entries(entry_s.index((tile + 1) % 2), entries_ptr, start + 3 * BLOCK_M + lane, last, num_dense, G)
        async_copy.commit_group()

        scores = warpgroup_mma_wait(1, deps=(scores,))
        p = gl.exp2(scores * scale2)
        if (start < masked_rows) | (start + BLOCK_M > num_rows):
            s_row = start + gl.arange(0, BLOCK_M, s_column)
            # The dense run begins `first_dense - first_row` keys into the block, and what follows it lies beyond the block.
            offset = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, s_layout)) - (first_dense - first_row)
            seen = (s_row[None, :] >= (offset * G)[:, None]) & (s_row < num_rows)[None, :]
            if OWN_IS_OPTIONAL:
                here = (s_row < masked_rows) & (s_row < num_rows)
                flag_ptr = num_sparse_ptr + head.to(gl.int64) * num_tokens + first_dense
                seen = seen & (gl.load(flag_ptr + s_row // G, mask=here, other=-1) < 0)[None, :]
            p = gl.where(seen, p, 0.0)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        # p stays in float32 until here: read back from 16 bits it would be converted one number at a time.
        ds = (p * dp * scale).to(dtype)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), a_layout), do_tile, dv, is_async=True)
        # dk takes ds from shared memory too: from registers it would spill.
        ds_s.store(ds)
        fence_async_shared()
        thread_barrier()
        dk = warpgroup_mma(ds_s, q_tile, dk, is_async=True)
        nothing = gl.zeros([BLOCK_M, D], gl.float32, dq_layout)
        dq = warpgroup_mma(ds_s.permute((1, 0)), k_s, nothing, use_acc=False, is_async=True)
        dq, dk, dv = warpgroup_mma_wait(0, deps=(dq, dk, dv))
        thread_barrier()
        q_tile.store(dq.to(dtype))
        thread_barrier()
        out_row = target_s.index(tile % RING).load(row_of).to(gl.int64)
        out = partial_dq_ptr + out_row[:, None] * D + column[None, :]
        gl.store(out, q_tile.load(rows), mask=(start + row < num_rows)[:, None], cache_modifier=".cs")
        if NUM_STAGES == 1:
            thread_barrier()
            copy_rows(q_s.index(0), q_ptr, q_offset_s.index((tile + 1) % 2).load(row_of).to(gl.int64) * VECTOR, D, rows)
            copy_rows(do_s.index(0), do_ptr, do_offset_s.index((tile + 1) % 2).load(row_of).to(gl.int64) * VECTOR, D, rows)
            async_copy.commit_group()
    async_copy.wait_group(0)

    # Looked up again, because what the loop does not need would spill if it lived through it.
    block = gl.load(items_ptr + planned * max_items + item)
    segment = planned * num_blocks + block
    out_key = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, d_layout))
    out_column = gl.arange(0, D, gl.SliceLayout(0, d_layout))
    if gl.load(num_queries_ptr + segment) > item_queries:  # one item of several
        part = item - gl.load(first_item_ptr + segment)
        buffer = gl.program_id(1).to(gl.int64) * max_buffers + gl.load(first_buffer_ptr + segment) + part
        at = ((buffer * BLOCK_SIZE + out_key) * (2 * D))[:, None] + out_column[None, :]
        gl.store(items_buffer_ptr + at, dk)
        gl.store(items_buffer_ptr + at + D, dv)
    else:
        out_head = (unit // num_ranges if RANGED else unit).to(gl.int64)
        out_at = (gl.load(first_row_ptr + block) + out_key).to(gl.int64)
        exists = (out_key < gl.load(num_rows_ptr + block))[:, None]
        dk_at = dk_ptr + out_head * stride_dk_h + (out_at * stride_dk_t)[:, None] + out_column[None, :]
        dv_at = dv_ptr + out_head * stride_dv_h + (out_at * stride_dv_t)[:, None] + out_column[None, :]
        if ACCUMULATE:
            dk += gl.load(dk_at, mask=exists, other=0.0).to(gl.float32)
            dv += gl.load(dv_at, mask=exists, other=0.0).to(gl.float32)
        gl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=exists)
        gl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=exists)
