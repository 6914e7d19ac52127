"""The backward of compressed attention for Hopper, in Gluon: dq, and dk and dv, in the form that `compressed_attention_hopper`
describes. What is computed say the kernels of the same name without `hopper`, in `compressed_attention_backward`.

Measured on an H200 (65,536 tokens, 64 heads, windows of 32 every 16): dq 9.3 to 10.2 ms, dk and dv 15.3; all three in one pass
19.8, of which additions of dq are 2, and 1.4 around it to clear and to scale their sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_fsa.ops.common.hopper import bulk_add, gluon_kernel, thread_barrier
from nsa_fsa.ops.common.windowed_attention.hopper_forward import (
    EITHER_WAY,
    FEW_ROWS,
    GROUP_ROWS,
    LN_2,
    LOADER_THREADS,
    LOADER_WARPS,
    allocate_barriers,
    complete,
    copy_query_rows,
    copy_windows,
    load_queries_then_windows,
    load_tile,
    query_tile,
    store_tile,
    visible_windows,
)


@gluon.jit
def gather_dq(
    q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free, shift_ptr, delta_ptr, dq_ptr, tiles_ptr, scale2, scale,
    num_heads,
    num_tiles, num_rows, num_work,
    TILE_QUERIES: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, SINGLE: gl.constexpr,
    ACCUMULATE: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup of dq."""
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    row_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    row = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, row_of)
    none = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, s_layout)
    turn, count = 0, 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        head = work // num_tiles
        first_row, position, queries, _, num_keys, num_windows, steps, full_steps = query_tile(
            tiles_ptr, num_tiles, work % num_tiles, num_rows, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_N, SINGLE
        )
        visible = visible_windows(position + row // G, num_keys, num_windows, KERNEL_SIZE, KERNEL_STRIDE)
        inside = row < queries * G
        statistic = (head.to(gl.int64) * num_rows + first_row) * G
        shift = gl.load(shift_ptr + statistic + row, mask=inside, other=0.0) * scale2
        delta = gl.load(delta_ptr + statistic + row, mask=inside, other=0.0)
        dq = gl.zeros([GROUP_ROWS, D], gl.float32, dq_layout)
        slot = turn % SLOTS
        q_tile, do_tile = q_s.index(2 * slot + GROUP), do_s.index(2 * slot + GROUP)
        mbarrier.wait(q_ready.index(slot), turn // SLOTS & 1)
        for step in range(0, steps):
            stage = count % STAGES
            mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
            mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
            count += 1
            if (step == 0) | (step >= full_steps):  # q and do, and the last windows of a sequence, come by cp.async
                fence_async_shared()
            scores = warpgroup_mma(q_tile, k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
            dp = warpgroup_mma(do_tile, v_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            p = gl.exp2(scores * scale2 + shift[:, None])  # stays before the wait for dp because a branch follows
            if step >= full_steps:
                window = step * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
                p = gl.where(window[None, :] < visible[:, None], p, 0.0)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds = (p * (dp + delta[:, None])).to(dtype)
            dq = warpgroup_mma(gl.convert_layout(ds, ds_layout), k_s.index(stage), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            thread_barrier()
            mbarrier.arrive(free.index(stage), count=1)
        thread_barrier()  # all warps have read the scores' q
        at = (first_row.to(gl.int64) * num_heads + head * G) * D
        store_tile(q_tile, dq_ptr + at, dq * scale, GROUP * GROUP_ROWS, queries, num_heads * D, D, G, D, ACCUMULATE)
        thread_barrier()
        mbarrier.arrive(q_free.index(slot), count=1)
        turn += 1  # noqa: SIM113


@gluon_kernel
def compressed_bwd_dq_hopper_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, do_ptr, shift_ptr, delta_ptr, dq_ptr, tiles_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    scale2, scale, num_heads, num_tiles, num_rows, num_work,
    TILE_QUERIES: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, SINGLE: gl.constexpr,
    ACCUMULATE: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    row_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_ROWS, D], dtype)
    key_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS, D], row_shared)
    do_s = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS, D], row_shared)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], key_shared)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], key_shared)
    q_ready, q_free = allocate_barriers(SLOTS, LOADER_THREADS), allocate_barriers(SLOTS, 2)
    k_ready, v_ready = allocate_barriers(STAGES, EITHER_WAY), allocate_barriers(STAGES, EITHER_WAY)
    free = allocate_barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (
                gather_dq,
                (
                    q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free, shift_ptr, delta_ptr, dq_ptr, tiles_ptr,
                    scale2, scale, num_heads, num_tiles, num_rows, num_work, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE,
                    ACCUMULATE, G, D, BLOCK_N, STAGES, SLOTS, 0,
                ),
            ),
            (
                gather_dq,
                (
                    q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free, shift_ptr, delta_ptr, dq_ptr, tiles_ptr,
                    scale2, scale, num_heads, num_tiles, num_rows, num_work, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE,
                    ACCUMULATE, G, D, BLOCK_N, STAGES, SLOTS, 1,
                ),
            ),
            (
                load_queries_then_windows,
                (
                    q_ptr, do_ptr, k_ptr, v_ptr, k_desc, v_desc, tiles_ptr, q_s, do_s, k_s, v_s, q_ready, q_free, k_ready,
                    v_ready, free,
                    stride_q_t, stride_q_h, stride_do_t, stride_do_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
                    num_tiles, num_rows, num_work, True, 0, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE, G, D, BLOCK_N,
                    STAGES, SLOTS,
                ),
            ),
        ],
        [4, LOADER_WARPS],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


@gluon.jit
def copy_statistics(shift_s, delta_s, shift_ptr, delta_ptr, start, last, BLOCK_M: gl.constexpr):
    row = gl.minimum(start + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [LOADER_WARPS], [0])), last)
    async_copy.async_copy_global_to_shared(shift_s, shift_ptr + row)
    async_copy.async_copy_global_to_shared(delta_s, delta_ptr + row)


@gluon.jit
def load_query_rows(
    q_ptr, do_ptr, q_desc, do_desc, shift_ptr, delta_ptr, q_s, do_s, shift_s, delta_s, q_ready, free,
    stride_q_t, stride_q_h, stride_do_t, stride_do_h, query, query_head, num_rows,
    G: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, BULK: gl.constexpr,
):  # fmt: skip
    """The loading warpgroup of dk and dv: the program's rows, the last first, so that all programs of a head walk together and
    share what they read. Bulk copies take whole tiles only; a last one that is none is there already."""
    steps = gl.cdiv(num_rows, BLOCK_M)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADER_WARPS, 1], [1, 0])
    for step in range(gl.minimum(num_rows % BLOCK_M, 1) if BULK else 0, steps):
        stage = step % STAGES
        start = (steps - 1 - step) * BLOCK_M
        barrier = q_ready.index(stage)
        mbarrier.wait(free.index(stage), step // STAGES & 1 ^ 1)
        copy_statistics(shift_s.index(stage), delta_s.index(stage), shift_ptr, delta_ptr, start, num_rows - 1, BLOCK_M)
        if BULK:
            shape: gl.constexpr = [BLOCK_M // G, G, D]  # in the buffers they lie as (query, head) rows do
            at = [query + start // G, query_head, 0]
            mbarrier.expect(barrier, 2 * BLOCK_M * D * 2)
            q_tile = q_s.index(stage)._reinterpret(q_desc.dtype, shape, q_desc.layout)
            tma.async_copy_global_to_shared(q_desc, at, barrier, q_tile)
            do_tile = do_s.index(stage)._reinterpret(do_desc.dtype, shape, do_desc.layout)
            tma.async_copy_global_to_shared(do_desc, at, barrier, do_tile)
            async_copy.mbarrier_arrive(barrier, increment_count=False)
        else:
            last = num_rows - 1
            copy_query_rows(q_s.index(stage), q_ptr, stride_q_t, stride_q_h, start, last, BLOCK_M, FEW_ROWS, G, D, rows)
            copy_query_rows(do_s.index(stage), do_ptr, stride_do_t, stride_do_h, start, last, BLOCK_M, FEW_ROWS, G, D, rows)
            complete(barrier)


@gluon.jit
def product_dq(ds_s, k_s, ds_ready, step, D: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr):
    """A step's gradient of its rows, half of the columns for each group, once both groups have left its ds in shared memory.
    Before the first step, a number that nobody needs."""
    HALF: gl.constexpr = D // 2
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    buffer = (step + 2) % 2
    mbarrier.wait(ds_ready.index(buffer), (step + 2) // 2 - 1 & 1, pred=step >= 0)
    none = gl.zeros([BLOCK_M, HALF], gl.float32, dq_layout)
    keys = k_s.index(0).slice(GROUP * HALF, HALF, dim=1)
    dq = warpgroup_mma(ds_s.index(2 * buffer).permute((1, 0)), keys, none, use_acc=False, is_async=True)
    keys = k_s.index(1).slice(GROUP * HALF, HALF, dim=1)
    return warpgroup_mma(ds_s.index(2 * buffer + 1).permute((1, 0)), keys, dq, is_async=True)


@gluon.jit
def add_dq(
    dq, dq_s, dq_desc, ds_free, step, steps, num_rows, query, query_head,
    G: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Adds what `product_dq` gave to the sums that other programs add to as well."""
    HALF: gl.constexpr = D // 2
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    start = (steps - 1 - step) * BLOCK_M
    if step >= 0:
        if start + BLOCK_M > num_rows:  # the other rows of a last tile may be those of another sequence: nothing is added
            row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, dq_layout))
            dq = gl.where((row < num_rows)[:, None], dq, 0.0)
        tma.store_wait(0)  # the buffer of the step before has been read
        thread_barrier()
        mbarrier.arrive(ds_free.index((step + 2) % 2), count=1)
        dq_s.index(GROUP).store(dq)
        fence_async_shared()
        thread_barrier()
        shape: gl.constexpr = [BLOCK_M // G, G, HALF]
        at = [query + start // G, query_head, GROUP * HALF]
        bulk_add(dq_desc, at, dq_s.index(GROUP)._reinterpret(gl.float32, shape, dq_desc.layout))


@gluon.jit
def gather_dkdv(
    q_s, do_s, k_s, v_s, ds_s, dq_s, shift_s, delta_s, q_ready, free, ds_ready, ds_free, dk_ptr, dv_ptr, dq_desc,
    stride_t, scale2, num_keys, first_seen, num_rows, query, query_head,
    G: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, BULK: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup of dk and dv: 64 keys. Scores are computed transposed, [keys, rows], so that p and ds feed the
    matrix unit from registers. Rows count from the program's first; what it does not need would spill.

    With a dq_desc also dq, which takes ds of all keys from shared memory, and a step later: neither group waits for the other.
    """
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    s_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    dk = gl.zeros([GROUP_ROWS, D], gl.float32, d_layout)
    dv = gl.zeros([GROUP_ROWS, D], gl.float32, d_layout)
    none = gl.zeros([GROUP_ROWS, BLOCK_M], gl.float32, s_layout)
    steps = gl.cdiv(num_rows, BLOCK_M)
    for step in range(0, steps):
        stage = step % STAGES
        mbarrier.wait(q_ready.index(stage), step // STAGES & 1)
        if not BULK:
            fence_async_shared()  # the rows came by cp.async
        scores = warpgroup_mma(k_s.index(GROUP), q_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        dp = warpgroup_mma(v_s.index(GROUP), do_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        shift = shift_s.index(stage).load(s_column) * scale2
        p = gl.exp2(scores * scale2 + shift[None, :])
        start = (steps - 1 - step) * BLOCK_M
        if (start < first_seen + (GROUP * GROUP_ROWS + GROUP_ROWS - 1) * KERNEL_STRIDE * G) | (start + BLOCK_M > num_rows):
            row = start + gl.arange(0, BLOCK_M, s_column)
            key = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, s_layout))
            seen = row[None, :] >= (first_seen + key * (KERNEL_STRIDE * G))[:, None]
            p = gl.where(seen & (row < num_rows)[None, :], p, 0.0)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        # p stays in float32 until here: read back from 16 bits it would be converted one number at a time, in the unit that
        # takes exponentials.
        ds = (p * (dp + delta_s.index(stage).load(s_column)[None, :])).to(dtype)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), a_layout), do_s.index(stage), dv, is_async=True)
        if dq_desc is not None:
            buffer = step % 2
            mbarrier.wait(ds_free.index(buffer), step // 2 & 1 ^ 1)
            ds_s.index(2 * buffer + GROUP).store(ds)
            fence_async_shared()
            thread_barrier()
            mbarrier.arrive(ds_ready.index(buffer), count=1)
            dq = product_dq(ds_s, k_s, ds_ready, step - 1, D, BLOCK_M, GROUP)
        dk = warpgroup_mma(gl.convert_layout(ds, a_layout), q_s.index(stage), dk, is_async=True)
        if dq_desc is not None:
            dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))  # dk goes on meanwhile
            add_dq(dq, dq_s, dq_desc, ds_free, step - 1, steps, num_rows, query, query_head, G, D, BLOCK_M, GROUP)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        thread_barrier()
        mbarrier.arrive(free.index(stage), count=1)
    if dq_desc is not None:
        dq = product_dq(ds_s, k_s, ds_ready, steps - 1, D, BLOCK_M, GROUP)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        add_dq(dq, dq_s, dq_desc, ds_free, steps - 1, steps, num_rows, query, query_head, G, D, BLOCK_M, GROUP)
    key = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, d_layout))
    column = gl.arange(0, D, gl.SliceLayout(0, d_layout))
    exists = (key < num_keys)[:, None]
    row = key.to(gl.int64)[:, None]
    at = row * stride_t + column[None, :]
    gl.store(dk_ptr + at, (dk * (scale2 * LN_2)).to(dk_ptr.dtype.element_ty), mask=exists)
    gl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=exists)
    if dq_desc is not None:
        tma.store_wait(0)  # shared memory may be another program's once this one has ended


@gluon_kernel
def compressed_bwd_dkdv_hopper_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, q_desc, do_desc, dq_desc, shift_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    stride_dk_p, stride_dk_t, stride_dk_h, stride_dv_p, stride_dv_t, stride_dv_h,
    scale2, scale, num_tiles, num_rows, part_rows,
    KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, SINGLE: gl.constexpr, HEADS: gl.constexpr,
    G: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, BULK: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    # Some heads at a time, the longest tiles of all of them first: few long ones run at the end, and what these read is shared.
    at = gl.program_id(0) % (num_tiles * HEADS)
    head = gl.program_id(0) // (num_tiles * HEADS) * HEADS + at % HEADS
    part = gl.num_programs(1) - 1 - gl.program_id(1)  # every tile's keys are seen by the last rows
    index, first_query, num_queries, offset, first_key, num_keys = load_tile(
        tiles_ptr, num_tiles, at // HEADS, num_rows, True, SINGLE
    )
    num_windows = gl.maximum((num_keys - KERNEL_SIZE + KERNEL_STRIDE) // KERNEL_STRIDE, 0)
    first_window = index * (2 * GROUP_ROWS)
    if (num_queries == 0) | (first_window >= num_windows):
        return
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    row_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    key_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_ROWS, D], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [2, GROUP_ROWS, D], key_shared)
    v_s = gl.allocate_shared_memory(dtype, [2, GROUP_ROWS, D], key_shared)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], row_shared)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], row_shared)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    q_ready = allocate_barriers(STAGES, EITHER_WAY)
    free = allocate_barriers(STAGES, 2)
    ds_s, dq_s, ds_ready, ds_free = None, None, None, None
    if dq_desc is not None:
        ds_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_ROWS, BLOCK_M], dtype)
        dq_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D // 2], gl.float32)
        ds_s = gl.allocate_shared_memory(dtype, [4, GROUP_ROWS, BLOCK_M], ds_shared)  # two steps of both groups
        dq_s = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M, D // 2], dq_shared)
        ds_ready, ds_free = allocate_barriers(2, 2), allocate_barriers(2, 2)
    # Rows are (query, head) pairs of the sequence. This program's are those of its part that see the tile's first key.
    first_seen = (first_window * KERNEL_STRIDE + KERNEL_SIZE - 1 - offset) * G
    begin = gl.maximum(gl.maximum(first_seen, 0), part * part_rows)
    end = gl.minimum(gl.minimum(num_queries, num_keys - offset) * G, (part + 1) * part_rows)
    first_row, wide_head = first_query.to(gl.int64), head.to(gl.int64)
    q_ptr += first_row * stride_q_t + wide_head * G * stride_q_h
    do_ptr += first_row * stride_do_t + wide_head * G * stride_do_h
    compressed_row = (first_key // KERNEL_STRIDE + first_window).to(gl.int64)
    k_ptr += compressed_row * stride_k_t + wide_head * stride_k_h
    v_ptr += compressed_row * stride_v_t + wide_head * stride_v_h
    dk_ptr += part.to(gl.int64) * stride_dk_p + compressed_row * stride_dk_t + wide_head * stride_dk_h
    dv_ptr += part.to(gl.int64) * stride_dv_p + compressed_row * stride_dv_t + wide_head * stride_dv_h
    statistic = (wide_head * num_rows + first_row) * G
    shift_ptr += statistic
    delta_ptr += statistic
    num_rows_here = gl.maximum(end - begin, 0)
    first = begin // G  # a multiple of G
    q_ptr += first.to(gl.int64) * stride_q_t
    do_ptr += first.to(gl.int64) * stride_do_t
    shift_ptr += begin
    delta_ptr += begin
    # What is loaded once, while there are registers for it: keys and values, and last rows that do not fill a tile.
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    keys = num_windows - first_window
    for group in gl.static_range(2):
        copy_windows(k_s.index(group), k_ptr, stride_k_t, group * GROUP_ROWS, keys, GROUP_ROWS, GROUP_ROWS, D, rows)
        copy_windows(v_s.index(group), v_ptr, stride_v_t, group * GROUP_ROWS, keys, GROUP_ROWS, GROUP_ROWS, D, rows)
    if BULK:
        few_rows = num_rows_here % BLOCK_M
        if few_rows > 0:
            start, last = num_rows_here - few_rows, num_rows_here - 1
            copy_query_rows(q_s.index(0), q_ptr, stride_q_t, stride_q_h, start, last, BLOCK_M, BLOCK_M, G, D, rows)
            copy_query_rows(do_s.index(0), do_ptr, stride_do_t, stride_do_h, start, last, BLOCK_M, BLOCK_M, G, D, rows)
            copy_statistics(shift_s.index(0), delta_s.index(0), shift_ptr, delta_ptr, start, last, BLOCK_M)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    if BULK:
        mbarrier.arrive(q_ready.index(0), count=EITHER_WAY, pred=num_rows_here % BLOCK_M > 0)
    gl.warp_specialize(
        [
            (
                gather_dkdv,
                (
                    q_s, do_s, k_s, v_s, ds_s, dq_s, shift_s, delta_s, q_ready, free, ds_ready, ds_free, dk_ptr, dv_ptr,
                    dq_desc, stride_dk_t, scale2, keys, first_seen - begin, num_rows_here, first_query + first,
                    head * G, G, D, BLOCK_M, STAGES, BULK, KERNEL_STRIDE, 0,
                ),
            ),
            (
                gather_dkdv,
                (
                    q_s, do_s, k_s, v_s, ds_s, dq_s, shift_s, delta_s, q_ready, free, ds_ready, ds_free, dk_ptr, dv_ptr,
                    dq_desc, stride_dk_t, scale2, keys, first_seen - begin, num_rows_here, first_query + first,
                    head * G, G, D, BLOCK_M, STAGES, BULK, KERNEL_STRIDE, 1,
                ),
            ),
            (
                load_query_rows,
                (
                    q_ptr, do_ptr, q_desc, do_desc, shift_ptr, delta_ptr, q_s, do_s, shift_s, delta_s, q_ready, free,
                    stride_q_t, stride_q_h, stride_do_t, stride_do_h, first_query + first, head * G, num_rows_here,
                    G, D, BLOCK_M, STAGES, BULK,
                ),
            ),
        ],
        [4, LOADER_WARPS],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip
