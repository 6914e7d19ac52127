"""Compressed attention for Hopper, in Gluon; the kernels of the same name without `hopper` are their plain Triton twins, for
every other GPU, shape and dtype, and say what is computed.

A program is three warpgroups. One of them loads: whole tiles by bulk copies, others by cp.async, which takes any layout and
fills what must not be read with zeros. A barrier in shared memory opens when a tile is there. The other two compute, 64 rows
each, and hand a buffer back once both have read it. While one of them waits for the matrix unit the other takes exponentials.
The forward and dq are as many programs as there are multiprocessors, and the next tile's rows arrive while one is finished.

Measured on an H200 (65,536 tokens, 64 heads, windows of 32 every 16): the forward took 9.3 ms with all loads by cp.async, which
shares a queue with the exponentials, and 7.8 with bulk copies.
"""

import functools

import torch
from torch import Tensor
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_fsa.ops.common.hopper import copy_rows, copy_rows_or_zeros, gluon_kernel, thread_barrier

LN_2 = gl.constexpr(0.6931471805599453)
GROUP_ROWS = gl.constexpr(64)  # of a computing warpgroup
LOADER_WARPS = gl.constexpr(4)
FEW_ROWS = gl.constexpr(8)  # copied at a time where a loader has few registers, or loads but once
LOADER_THREADS = gl.constexpr(128)
# Arrivals that complete a buffer which is loaded by either way: of the loading threads, once their copies are there, and of the
# one that announces the bulk copy or its absence.
EITHER_WAY = gl.constexpr(129)


@gluon.jit
def allocate_barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def visible_windows(position, num_keys, num_windows, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr):
    """How many compressed tokens a position sees."""
    seen = (position + 1 - KERNEL_SIZE + KERNEL_STRIDE) // KERNEL_STRIDE  # the windows of a sequence that ends here
    return gl.where(position < num_keys, gl.minimum(gl.maximum(seen, 0), num_windows), 0)


@gluon.jit
def load_tile(tiles_ptr, num_tiles, number, num_rows, OF_KEYS: gl.constexpr, SINGLE: gl.constexpr):
    """As in kernels.sequences."""
    index = number if OF_KEYS else num_tiles - 1 - number
    none = number * 0
    first_query, num_queries, offset, first_key, num_keys = none, num_rows, none, none, num_rows
    if not SINGLE:
        index = gl.load(tiles_ptr + number)
        first_query = gl.load(tiles_ptr + num_tiles + number)
        num_queries = gl.load(tiles_ptr + 2 * num_tiles + number)
        offset = gl.load(tiles_ptr + 3 * num_tiles + number)
        first_key = gl.load(tiles_ptr + 4 * num_tiles + number)
        num_keys = gl.load(tiles_ptr + 5 * num_tiles + number)
    return index, first_query, num_queries, offset, first_key, num_keys


@gluon.jit
def query_tile(
    tiles_ptr, num_tiles, number, num_rows, TILE_QUERIES: gl.constexpr, KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr, BLOCK_N: gl.constexpr, SINGLE: gl.constexpr,
):  # fmt: skip
    """Row and position of the tile's first query, its queries, the sequence's first compressed row, keys and windows, and the
    steps of BLOCK_N windows that some of the queries see, of which the first so many are seen by all."""
    index, first_query, num_queries, offset, first_key, num_keys = load_tile(
        tiles_ptr, num_tiles, number, num_rows, False, SINGLE
    )
    first = index * TILE_QUERIES
    queries = gl.minimum(num_queries - first, TILE_QUERIES)  # none for a number that no tile owns
    position = offset + first
    num_windows = gl.maximum((num_keys - KERNEL_SIZE + KERNEL_STRIDE) // KERNEL_STRIDE, 0)
    last = position + queries - 1
    most = visible_windows(gl.minimum(last, num_keys - 1), num_keys, num_windows, KERNEL_SIZE, KERNEL_STRIDE)
    least = gl.where(last < num_keys, visible_windows(position, num_keys, num_windows, KERNEL_SIZE, KERNEL_STRIDE), 0)
    steps = gl.cdiv(most, BLOCK_N)
    return first_query + first, position, queries, first_key // KERNEL_STRIDE, num_keys, num_windows, steps, least // BLOCK_N


@gluon.jit
def copy_query_rows(
    buffer, ptr, stride_t, stride_h, start, last, ROWS: gl.constexpr, CHUNK: gl.constexpr, G: gl.constexpr,
    DIM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """(query, head) rows start .. start + ROWS - 1, counted from ptr on; rows past the last repeat it. CHUNK rows at a time:
    few take few registers, but a barrier each."""
    for i in gl.static_range(ROWS // CHUNK):
        row = gl.minimum(start + i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout)), last)
        part = buffer.slice(i * CHUNK, CHUNK)
        copy_rows(part, ptr, (row // G).to(gl.int64) * stride_t + (row % G).to(gl.int64) * stride_h, DIM, layout)


@gluon.jit
def copy_windows(
    buffer, ptr, stride_t, first, num_windows, ROWS: gl.constexpr, CHUNK: gl.constexpr, DIM: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Compressed rows first .. first + ROWS - 1, zeros for those that a sequence does not have: NaN may lie there."""
    for i in gl.static_range(ROWS // CHUNK):
        window = first + i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        part = buffer.slice(i * CHUNK, CHUNK)
        copy_rows_or_zeros(part, ptr, window.to(gl.int64) * stride_t, window < num_windows, DIM, layout)


@gluon.jit
def complete(barrier):
    """The arrivals of a buffer that came by cp.async."""
    async_copy.mbarrier_arrive(barrier, increment_count=False)
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def bulk_copy_windows(desc, at, barrier, buffer, ROWS: gl.constexpr, DIM: gl.constexpr):
    """Compressed rows of one head from `at` on, all of which exist; and the arrivals."""
    mbarrier.expect(barrier, ROWS * DIM * 2)
    tma.async_copy_global_to_shared(desc, at, barrier, buffer)
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def load_queries_then_windows(
    q_ptr, do_ptr, k_ptr, v_ptr, k_desc, v_desc, tiles_ptr, q_s, do_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free,
    stride_q_t, stride_q_h, stride_do_t, stride_do_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    num_tiles, num_rows, num_work,
    HAS_DO: gl.constexpr, VALUES_LATER: gl.constexpr, TILE_QUERIES: gl.constexpr, KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr,
    SINGLE: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warpgroup of the forward and of dq: of every tile its rows, then keys and values step by step."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [LOADER_WARPS, 1], [1, 0])
    turn, count = 0, 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        head = work // num_tiles
        first_row, _, queries, first_window, _, num_windows, steps, _ = query_tile(
            tiles_ptr, num_tiles, work % num_tiles, num_rows, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_N, SINGLE
        )
        slot = turn % SLOTS
        mbarrier.wait(q_free.index(slot), turn // SLOTS & 1 ^ 1)
        if queries > 0:
            at = first_row.to(gl.int64)
            q_at = q_ptr + at * stride_q_t + head.to(gl.int64) * G * stride_q_h
            last = queries * G - 1
            for group in gl.static_range(2):
                q_tile = q_s.index(2 * slot + group)
                copy_query_rows(
                    q_tile, q_at, stride_q_t, stride_q_h, group * GROUP_ROWS, last, GROUP_ROWS, GROUP_ROWS, G, D, rows
                )
            if HAS_DO:
                do_at = do_ptr + at * stride_do_t + head.to(gl.int64) * G * stride_do_h
                for group in gl.static_range(2):
                    do_tile = do_s.index(2 * slot + group)
                    copy_query_rows(
                        do_tile, do_at, stride_do_t, stride_do_h, group * GROUP_ROWS, last, GROUP_ROWS, GROUP_ROWS, G, D, rows
                    )
        async_copy.mbarrier_arrive(q_ready.index(slot), increment_count=False)
        k_at = k_ptr + first_window.to(gl.int64) * stride_k_t + head.to(gl.int64) * stride_k_h
        v_at = v_ptr + first_window.to(gl.int64) * stride_v_t + head.to(gl.int64) * stride_v_h
        # A step's keys are freed together with the values of VALUES_LATER steps before it.
        whole_steps = gl.minimum(steps, num_windows // BLOCK_N)
        for step in range(0, whole_steps):
            stage, later = count % STAGES, count + VALUES_LATER
            at_row = [first_window + step * BLOCK_N, head * D]
            mbarrier.wait(free.index(stage), count // STAGES & 1 ^ 1)
            bulk_copy_windows(k_desc, at_row, k_ready.index(stage), k_s.index(stage), BLOCK_N, D)
            mbarrier.wait(free.index(later % STAGES), later // STAGES & 1 ^ 1)
            bulk_copy_windows(v_desc, at_row, v_ready.index(stage), v_s.index(stage), BLOCK_N, D)
            count += 1
        if whole_steps < steps:  # the last windows of the sequence
            stage, later = count % STAGES, count + VALUES_LATER
            start = whole_steps * BLOCK_N
            mbarrier.wait(free.index(stage), count // STAGES & 1 ^ 1)
            copy_windows(k_s.index(stage), k_at, stride_k_t, start, num_windows, BLOCK_N, FEW_ROWS, D, rows)
            complete(k_ready.index(stage))
            mbarrier.wait(free.index(later % STAGES), later // STAGES & 1 ^ 1)
            copy_windows(v_s.index(stage), v_at, stride_v_t, start, num_windows, BLOCK_N, FEW_ROWS, D, rows)
            complete(v_ready.index(stage))
            count += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def store_tile(
    buffer, ptr, values, row, queries, stride_t, stride_h, G: gl.constexpr, D: gl.constexpr, ADD: gl.constexpr = False
):
    """Stages a group's rows in a buffer that only it reads, and stores them, or adds them to what is there, 16 bytes at a
    time."""
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    buffer.store(values.to(ptr.dtype.element_ty))
    thread_barrier()
    row = row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, rows))
    at = (
        ptr
        + ((row // G).to(gl.int64) * stride_t + row % G * stride_h)[:, None]
        + gl.arange(0, D, gl.SliceLayout(0, rows))[None, :]
    )
    inside = (row < queries * G)[:, None]
    tile = buffer.load(rows)
    if ADD:
        tile = (tile.to(gl.float32) + gl.load(at, mask=inside, other=0.0).to(gl.float32)).to(tile.dtype)
    gl.store(at, tile, mask=inside)


@gluon.jit
def online_softmax(scores, maximum, total, scale, step, full_steps, visible, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Weights of one step, what decays the steps before it, and the new maximum and total; scores and maximum in base 2."""
    if step >= full_steps:
        window = step * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        scores = gl.where(window[None, :] < visible[:, None], scores, float("-inf"))
    raised = gl.maximum(maximum, gl.max(scores, 1) * scale)
    shift = gl.where(raised == float("-inf"), 0.0, raised)  # a row that has seen nothing yet
    p = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(maximum - shift)
    return p, decay, raised, total * decay + gl.sum(p, 1)


@gluon.jit
def attend(
    q_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free, o_ptr, lse_ptr, tiles_ptr, scale, num_heads,
    num_tiles, num_rows, num_work,
    TILE_QUERIES: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, SINGLE: gl.constexpr,
    G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup of the forward. The scores of a step are asked for together with the values of the step before."""
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
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
        maximum = gl.full([GROUP_ROWS], float("-inf"), gl.float32, row_of)
        total = gl.zeros([GROUP_ROWS], gl.float32, row_of)
        acc = gl.zeros([GROUP_ROWS, D], gl.float32, o_layout)
        slot = turn % SLOTS
        q_tile = q_s.index(2 * slot + GROUP)
        mbarrier.wait(q_ready.index(slot), turn // SLOTS & 1)
        if steps > 0:
            mbarrier.wait(k_ready.index(count % STAGES), count // STAGES & 1)
            fence_async_shared()  # q came by cp.async
            scores = warpgroup_mma(q_tile, k_s.index(count % STAGES).permute((1, 0)), none, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            thread_barrier()  # a buffer is free once every warp of both groups has read it
            mbarrier.arrive(free.index(count % STAGES), count=1)
            p, decay, maximum, total = online_softmax(scores, maximum, total, scale, 0, full_steps, visible, BLOCK_N, s_layout)
            p = gl.convert_layout(p.to(dtype), p_layout)
            mbarrier.wait(v_ready.index(count % STAGES), count // STAGES & 1)
            for step in range(1, steps):
                before = count % STAGES
                count += 1
                stage = count % STAGES
                mbarrier.wait(k_ready.index(stage), count // STAGES & 1)
                if step >= full_steps:  # the last windows of a sequence come by cp.async
                    fence_async_shared()
                scores = warpgroup_mma(q_tile, k_s.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
                acc = warpgroup_mma(p, v_s.index(before), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                weights, decay, maximum, total = online_softmax(
                    scores, maximum, total, scale, step, full_steps, visible, BLOCK_N, s_layout
                )
                weights = gl.convert_layout(weights.to(dtype), p_layout)
                # Here and not where the values are needed, because ptxas moves the exponentials behind the next wait unless a
                # branch, which this is, lies between them.
                mbarrier.wait(v_ready.index(stage), count // STAGES & 1)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                thread_barrier()
                mbarrier.arrive(free.index(stage), count=1)
                acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
                p = weights
            last = count % STAGES
            count += 1
            fence_async_shared()
            acc = warpgroup_mma(p, v_s.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
        seen_any = total > 0
        lse = gl.where(seen_any, (maximum + gl.log2(total)) * LN_2, float("-inf"))
        at = first_row.to(gl.int64) * num_heads + head * G
        gl.store(lse_ptr + at + (row // G).to(gl.int64) * num_heads + row % G, lse, mask=row < queries * G)
        factor = 1.0 / gl.where(seen_any, total, 1.0)  # acc is 0 where nothing was seen
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
        thread_barrier()  # all warps have read the scores' q
        store_tile(q_tile, o_ptr + at * D, acc, GROUP * GROUP_ROWS, queries, num_heads * D, D, G, D)
        thread_barrier()
        mbarrier.arrive(q_free.index(slot), count=1)
        turn += 1  # noqa: SIM113


@gluon_kernel
def compressed_fwd_hopper_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, o_ptr, lse_ptr, tiles_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, scale, num_heads, num_tiles, num_rows, num_work,
    TILE_QUERIES: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, SINGLE: gl.constexpr,
    G: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    row_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP_ROWS, D], dtype)
    key_shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2 * SLOTS, GROUP_ROWS, D], row_shared)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], key_shared)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], key_shared)
    q_ready, q_free = allocate_barriers(SLOTS, LOADER_THREADS), allocate_barriers(SLOTS, 2)
    k_ready, v_ready = allocate_barriers(STAGES, EITHER_WAY), allocate_barriers(STAGES, EITHER_WAY)
    free = allocate_barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (
                attend,
                (
                    q_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free, o_ptr, lse_ptr, tiles_ptr, scale, num_heads,
                    num_tiles, num_rows, num_work, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE, G, D, BLOCK_N, STAGES,
                    SLOTS, 0,
                ),
            ),
            (
                attend,
                (
                    q_s, k_s, v_s, q_ready, q_free, k_ready, v_ready, free, o_ptr, lse_ptr, tiles_ptr, scale, num_heads,
                    num_tiles, num_rows, num_work, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE, G, D, BLOCK_N, STAGES,
                    SLOTS, 1,
                ),
            ),
            (
                load_queries_then_windows,
                (
                    q_ptr, q_ptr, k_ptr, v_ptr, k_desc, v_desc, tiles_ptr, q_s, q_s, k_s, v_s, q_ready, q_free, k_ready,
                    v_ready, free,
                    stride_q_t, stride_q_h, stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
                    num_tiles, num_rows, num_work, False, 1, TILE_QUERIES, KERNEL_SIZE, KERNEL_STRIDE, SINGLE, G, D, BLOCK_N,
                    STAGES, SLOTS,
                ),
            ),
        ],
        [4, LOADER_WARPS],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])


def describe(x: Tensor, *block: int) -> TensorDescriptor:
    """What a bulk copy of blocks of x needs to know."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), shared_layout(block, x.dtype))


def head_columns(tensors: tuple[Tensor, ...], rows: int) -> list[TensorDescriptor]:
    """Bulk copies of `rows` rows of one head of tensors `[N, HKV, D]` whose heads lie together."""
    # Without any window there is nothing to copy, but a descriptor wants rows.
    return [describe((x if x.shape[0] else x.new_empty(1, *x.shape[1:])).flatten(1), rows, x.shape[2]) for x in tensors]
