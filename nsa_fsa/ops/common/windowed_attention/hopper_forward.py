"""Compressed attention for Hopper, in Gluon. The kernels of the same name without `hopper` are
their plain Triton twins, for every other GPU, shape and dtype, and say what is computed.

A program is three warpgroups. One of them loads: whole tiles by bulk copies, others by cp.async,
which takes any layout and fills what must not be read with zeros. A barrier in shared memory opens
when a tile is there. The other two compute, 64 rows each, and hand a buffer back once both have
read it. While one of them waits for the matrix unit the other takes exponentials. The forward and
dq are as many programs as there are multiprocessors, and the next tile's rows arrive while one is
finished.

Measured on an H200 (65,536 tokens, 64 heads, windows of 32 every 16): the forward took 9.3 ms with
all loads by cp.async, which shares a queue with the exponentials, and 7.8 with bulk copies.
"""

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_fsa.ops.common.bundles import Heads
from nsa_fsa.ops.common.hopper import copy_rows, copy_rows_or_zeros, gluon_kernel, thread_barrier
from nsa_fsa.ops.common.windowed_attention.hopper_pipelines import (
    GROUP_ROWS,
    LOADER_WARPS,
    bulk_copy_windows,
    gluon_object,
    new_query_ring,
    new_window_ring,
)
from nsa_fsa.ops.common.windowed_attention.tiles import query_tile, visible_windows

LN_2 = gl.constexpr(0.6931471805599453)
FEW_ROWS = gl.constexpr(8)  # copied at a time where a loader has few registers, or loads but once


@gluon_object
class QueryWork:
    """The tiles of queries of all KV heads, which the programs take in turn."""

    tiles_ptr: gl.tensor | gl.constexpr  # as of `locate_tiles`
    num_tiles: gl.tensor  # of one KV head
    num_rows: gl.tensor
    num_sequences: gl.tensor | gl.constexpr
    total: gl.tensor  # tiles of all KV heads
    num_heads: gl.tensor | gl.constexpr  # of q
    WINDOWS: gl.constexpr
    G: gl.constexpr

    @gluon.jit
    def tile(self, work):
        """The `work`-th tile, as `QueryTile`."""
        queries: gl.constexpr = 2 * GROUP_ROWS // self.G
        number = work % self.num_tiles
        return query_tile(
            self.tiles_ptr,
            self.num_tiles,
            number,
            self.num_rows,
            self.num_sequences,
            self.WINDOWS,
            queries,
        )

    @gluon.jit
    def head(self, work):
        """The KV head of the `work`-th tile."""
        return work // self.num_tiles

    @gluon.jit
    def visible(self, tile, row):
        """How many windows the (query, head) rows of a tile see."""
        position = tile.position + row // self.G
        return visible_windows(position, tile.num_keys, tile.num_windows, self.WINDOWS)


@gluon.jit
def copy_query_rows(buffer, x, start, last, CHUNK: gl.constexpr, G: gl.constexpr):
    """Asynchronously, (query, head) rows from `start` on, counted from x.ptr;
    rows past the last repeat it.

    CHUNK rows are copied at a time: few take few registers, but a barrier each.
    """
    ROWS: gl.constexpr = buffer.shape[0]
    DIM: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = row_layout(DIM)
    for i in gl.static_range(ROWS // CHUNK):
        row = gl.minimum(start + i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout)), last)
        part = buffer.slice(i * CHUNK, CHUNK)
        at = (row // G).to(gl.int64) * x.stride_t + (row % G).to(gl.int64) * x.stride_h
        copy_rows(part, x.ptr, at, DIM, layout)


@gluon.jit
def copy_windows(buffer, ptr, stride_t, first, num_windows, CHUNK: gl.constexpr):
    """Asynchronously, compressed rows from `first` on; zeros for those that a sequence does not
    have, where NaN may lie.
    """
    ROWS: gl.constexpr = buffer.shape[0]
    DIM: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = row_layout(DIM)
    for i in gl.static_range(ROWS // CHUNK):
        window = first + i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        part = buffer.slice(i * CHUNK, CHUNK)
        at = window.to(gl.int64) * stride_t
        copy_rows_or_zeros(part, ptr, at, window < num_windows, DIM, layout)


@gluon.constexpr_function
def row_layout(width):
    """Of four warps that read or write rows of so many 16-bit numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def product_layout(width):
    """Of the matrix unit's result, 64 rows of so many numbers, in one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.jit
def load_queries_then_windows(
    work, q, do, k, v, k_desc, v_desc, queries, windows, VALUES_LATER: gl.constexpr
):
    """The loading warpgroup of the forward and of dq: of every tile its rows, then keys and values
    step by step.

    VALUES_LATER: a step's keys are freed together with the values of so many steps before it.
    """
    G: gl.constexpr = work.G
    BLOCK_N: gl.constexpr = windows.k.shape[1]
    D: gl.constexpr = windows.k.shape[2]
    turn, count = 0, 0
    for number in range(gl.program_id(0), work.total, gl.num_programs(0)):
        head = work.head(number)
        tile = work.tile(number)
        steps = gl.cdiv(tile.most, BLOCK_N)
        queries.free.wait_for_last(turn)
        if tile.num_queries > 0:
            at = tile.first_query.to(gl.int64)
            last = tile.num_queries * G - 1
            load_query_tile(queries.q, q, queries.number(turn, 0), at, head, last, G)
            if do is not None:
                load_query_tile(queries.do, do, queries.number(turn, 0), at, head, last, G)
        queries.ready.arrive_after_copies(turn)

        k_ptr = k.ptr + tile.first_window.to(gl.int64) * k.stride_t + head.to(gl.int64) * k.stride_h
        v_ptr = v.ptr + tile.first_window.to(gl.int64) * v.stride_t + head.to(gl.int64) * v.stride_h
        whole_steps = gl.minimum(steps, tile.num_windows // BLOCK_N)
        for step in range(0, whole_steps):
            at_row = [tile.first_window + step * BLOCK_N, head * D]
            windows.free.wait_for_last(count)
            bulk_copy_windows(k_desc, at_row, windows.k_ready, count, windows.keys(count))
            windows.free.wait_for_last(count + VALUES_LATER)
            bulk_copy_windows(v_desc, at_row, windows.v_ready, count, windows.values(count))
            count += 1

        if whole_steps < steps:  # the last windows of the sequence
            start = whole_steps * BLOCK_N
            windows.free.wait_for_last(count)
            copy_windows(windows.keys(count), k_ptr, k.stride_t, start, tile.num_windows, FEW_ROWS)
            windows.k_ready.complete(count)
            windows.free.wait_for_last(count + VALUES_LATER)
            copy_windows(
                windows.values(count), v_ptr, v.stride_t, start, tile.num_windows, FEW_ROWS
            )
            windows.v_ready.complete(count)
            count += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def load_query_tile(buffers, x, number, first_query, head, last, G: gl.constexpr):
    """Asynchronously, the rows of both computing warpgroups, into the buffers `number` and `number
    + 1`.
    """
    ptr = x.ptr + first_query * x.stride_t + head.to(gl.int64) * G * x.stride_h
    rows = Heads(ptr, x.stride_t, x.stride_h)
    for group in gl.static_range(2):
        buffer = buffers.index(number + group)
        copy_query_rows(buffer, rows, group * GROUP_ROWS, last, GROUP_ROWS, G)


@gluon.jit
def store_tile(
    buffer,
    ptr,
    values,
    num_heads,
    first_row,
    num_queries,
    G: gl.constexpr,
    ADD: gl.constexpr = False,
):
    """Stages a group's (query, head) rows in a buffer that only it reads,
    and stores them 16 bytes at a time.

    ptr: of the tile's first row in a contiguous `[T, HQ, D]`; with ADD they are added to
    what is there.
    """
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = row_layout(D)
    buffer.store(values.to(ptr.dtype.element_ty))
    thread_barrier()
    row = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    offset = (row // G).to(gl.int64) * (num_heads * D) + row % G * D
    at = ptr + offset[:, None] + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    inside = (row < num_queries * G)[:, None]
    tile = buffer.load(layout)
    if ADD:
        before = gl.load(at, mask=inside, other=0.0)
        tile = (tile.to(gl.float32) + before.to(gl.float32)).to(tile.dtype)
    gl.store(at, tile, mask=inside)


@gluon.jit
def step_weights(scores, maximum, total, scale, step, full_steps, visible):
    """Weights of one step, what decays the steps before it, and the new maximum and total; scores
    and maximum in base 2.
    """
    layout: gl.constexpr = scores.type.layout
    BLOCK_N: gl.constexpr = scores.shape[1]
    if step >= full_steps:
        window = step * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        scores = gl.where(window[None, :] < visible[:, None], scores, float("-inf"))
    raised = gl.maximum(maximum, gl.max(scores, 1) * scale)
    shift = gl.where(raised == float("-inf"), 0.0, raised)  # a row that has seen nothing yet
    p = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(maximum - shift)
    return p, decay, raised, total * decay + gl.sum(p, 1)


@gluon.jit
def attend(work, queries, windows, o_ptr, lse_ptr, scale, GROUP: gl.constexpr):
    """A computing warpgroup of the forward. The scores of a step are asked for together with the
    values of the step before.
    """
    G: gl.constexpr = work.G
    BLOCK_N: gl.constexpr = windows.k.shape[1]
    D: gl.constexpr = windows.k.shape[2]
    dtype: gl.constexpr = queries.q.dtype
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    o_layout: gl.constexpr = product_layout(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    row = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, row_of)
    none = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, s_layout)

    turn, count = 0, 0
    for number in range(gl.program_id(0), work.total, gl.num_programs(0)):
        head = work.head(number)
        tile = work.tile(number)
        steps, full_steps = gl.cdiv(tile.most, BLOCK_N), tile.least // BLOCK_N
        visible = work.visible(tile, row)
        maximum = gl.full([GROUP_ROWS], float("-inf"), gl.float32, row_of)
        total = gl.zeros([GROUP_ROWS], gl.float32, row_of)
        acc = gl.zeros([GROUP_ROWS, D], gl.float32, o_layout)
        q_tile = queries.q.index(queries.number(turn, GROUP))
        queries.ready.wait(turn)

        if steps > 0:
            windows.k_ready.wait(count)
            fence_async_shared()  # q came by cp.async
            keys = windows.keys(count).permute((1, 0))
            scores = warpgroup_mma(q_tile, keys, none, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            windows.free.arrive(count)
            p, decay, maximum, total = step_weights(
                scores, maximum, total, scale, 0, full_steps, visible
            )
            p = gl.convert_layout(p.to(dtype), p_layout)
            windows.v_ready.wait(count)

            for step in range(1, steps):
                before = windows.stage(count)
                count += 1
                windows.k_ready.wait(count)
                if step >= full_steps:  # the last windows of a sequence come by cp.async
                    fence_async_shared()
                keys = windows.keys(count).permute((1, 0))
                scores = warpgroup_mma(q_tile, keys, none, use_acc=False, is_async=True)
                acc = warpgroup_mma(p, windows.v.index(before), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                weights, decay, maximum, total = step_weights(
                    scores, maximum, total, scale, step, full_steps, visible
                )
                weights = gl.convert_layout(weights.to(dtype), p_layout)
                # Here and not where the values are needed, because ptxas moves the exponentials
                # behind the next wait unless a branch, which this is, lies between them.
                windows.v_ready.wait(count)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                windows.free.arrive(count)
                acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, o_layout))[:, None]
                p = weights

            last = windows.stage(count)
            count += 1
            fence_async_shared()
            acc = warpgroup_mma(p, windows.v.index(last), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))

        seen_any = total > 0
        lse = gl.where(seen_any, (maximum + gl.log2(total)) * LN_2, float("-inf"))
        at = tile.first_query.to(gl.int64) * work.num_heads + head * G
        inside = row < tile.num_queries * G
        lse_at = lse_ptr + at + (row // G).to(gl.int64) * work.num_heads + row % G
        gl.store(lse_at, lse, mask=inside)

        factor = 1.0 / gl.where(seen_any, total, 1.0)  # acc is 0 where nothing was seen
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
        thread_barrier()  # all warps have read the scores' q
        first_row = GROUP * GROUP_ROWS
        store_tile(q_tile, o_ptr + at * D, acc, work.num_heads, first_row, tile.num_queries, G)
        queries.free.arrive(turn)
        turn += 1  # noqa: SIM113


@gluon_kernel
def compressed_fwd_hopper_kernel(
    q,
    k,
    v,
    k_desc,
    v_desc,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    scale,
    num_heads,
    num_tiles,
    num_rows,
    num_sequences,
    num_work,
    WINDOWS: gl.constexpr,
    SHAPE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """o and lse of as many tiles as every program comes to."""

    dtype: gl.constexpr = q.ptr.dtype.element_ty
    D: gl.constexpr = SHAPE.D
    queries = new_query_ring(SLOTS, D, False, dtype)
    windows = new_window_ring(STAGES, BLOCK_N, D, dtype)
    work = QueryWork(
        tiles_ptr, num_tiles, num_rows, num_sequences, num_work, num_heads, WINDOWS, SHAPE.G
    )
    gl.warp_specialize(
        [
            (attend, (work, queries, windows, o_ptr, lse_ptr, scale, 0)),
            (attend, (work, queries, windows, o_ptr, lse_ptr, scale, 1)),
            (load_queries_then_windows, (work, q, None, k, v, k_desc, v_desc, queries, windows, 1)),
        ],
        [4, LOADER_WARPS],
        [REGISTERS, 504 - 2 * REGISTERS],
    )


GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_DTYPES[dtype])


def describe(x: Tensor, *block: int) -> TensorDescriptor:
    """What a bulk copy of blocks of x needs to know."""
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), list(block), shared_layout(block, x.dtype)
    )


def head_columns(tensors: tuple[Tensor, ...], rows: int) -> list[TensorDescriptor]:
    """Bulk copies of `rows` rows of one head of tensors `[N, HKV, D]` whose heads lie together."""
    # Without any window there is nothing to copy, but a descriptor wants rows.
    return [
        describe((x if x.shape[0] else x.new_empty(1, *x.shape[1:])).flatten(1), rows, x.shape[2])
        for x in tensors
    ]
