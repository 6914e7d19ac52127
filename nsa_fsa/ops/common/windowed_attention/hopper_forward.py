"""Compressed attention for Hopper, in Gluon. The kernels of the same name without `hopper` are
their plain Triton twins, for every other GPU, shape and dtype, and say what is computed.

A program is three warpgroups. One of them loads: whole tiles by bulk copies, others by cp.async,
which takes any layout and fills what must not be read with zeros. A barrier in shared memory opens
when a tile is there. The other two compute, 64 pairs each, and hand a buffer back once both have
read it. While one of them waits for the matrix unit the other takes exponentials. The forward and
dq are as many programs as there are multiprocessors, and the next tile's queries arrive while one
is finished.

Measured on an H200 (65,536 tokens, 64 heads, windows of 32 every 16): the forward took 9.3 ms with
all loads by cp.async, which shares a queue with the exponentials, and 7.8 with bulk copies.
"""

import functools
from typing import Any, NamedTuple

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

from nsa_fsa.ops.common.bundles import Heads, constants
from nsa_fsa.ops.common.hopper import copy_rows, copy_rows_or_zeros, gluon_kernel, thread_barrier
from nsa_fsa.ops.common.windowed_attention.hopper_layouts import product_layout, row_layout
from nsa_fsa.ops.common.windowed_attention.hopper_pipelines import (
    LOADER_WARPS,
    WARPGROUP_ROWS,
    bulk_copy_windows,
    gluon_object,
    new_query_ring,
    new_window_ring,
)
from nsa_fsa.ops.common.windowed_attention.tiles import query_tile, visible_windows, windows_of_tile

LN_2 = gl.constexpr(0.6931471805599453)
FEW_ROWS = gl.constexpr(8)  # copied at a time where a loader has few registers, or loads but once


class RingTile(NamedTuple):
    """What the rings of the forward and of dq hold."""

    BLOCK_N: Any  # windows of a step
    STAGES: Any
    QUERY_STAGES: Any
    REGISTERS: Any  # a thread of the computing warpgroups


@gluon.jit
def new_rings(q, HAS_DO: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr):
    """The rings of the forward, or of dq."""
    dtype: gl.constexpr = q.ptr.dtype.element_ty
    queries = new_query_ring(TILE.QUERY_STAGES, SHAPE.D, HAS_DO, dtype)
    return queries, new_window_ring(TILE.STAGES, TILE.BLOCK_N, SHAPE.D, dtype)


@gluon_object
class QueryWork:
    """The tiles of queries of all KV heads, which the programs take in turn."""

    tiles_ptr: gl.tensor | gl.constexpr  # as of `locate_tiles`
    num_tiles: gl.tensor  # of one KV head
    num_rows: gl.tensor
    num_sequences: gl.tensor | gl.constexpr
    total: gl.tensor  # tiles of all KV heads
    num_heads: gl.tensor | gl.constexpr  # of q
    SHAPE: gl.constexpr

    @gluon.jit
    def tile(self, work):
        """The KV head of the `work`-th tile, and the tile, as `QueryTile`."""
        head, number = work // self.num_tiles, work % self.num_tiles
        pairs: gl.constexpr = 2 * WARPGROUP_ROWS
        return head, query_tile(
            *(self.tiles_ptr, self.num_tiles, number, self.num_rows, self.num_sequences),
            *(self.SHAPE, pairs),
        )

    @gluon.jit
    def steps(self, tile, pair, BLOCK_N: gl.constexpr):
        """A tile's steps, those that need no mask, and how many windows its pairs see."""
        position = tile.position + pair // self.SHAPE.G
        visible = visible_windows(position, tile.num_keys, tile.num_windows, self.SHAPE)
        return gl.cdiv(tile.most, BLOCK_N), tile.least // BLOCK_N, visible


@gluon.jit
def copy_pairs(buffer, x, start, last, COPIED: gl.constexpr, G: gl.constexpr):
    """Asynchronously, the lines of pairs from `start` on, counted from x.ptr; what is past the last
    pair repeats it.

    COPIED lines are copied at a time: few take few registers, but a barrier each.
    """
    ROWS: gl.constexpr = buffer.shape[0]
    DIM: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = row_layout(DIM)
    for i in gl.static_range(ROWS // COPIED):
        pair = start + i * COPIED + gl.arange(0, COPIED, gl.SliceLayout(1, layout))
        pair = gl.minimum(pair, last)
        at = (pair // G).to(gl.int64) * x.stride_t + (pair % G).to(gl.int64) * x.stride_h
        copy_rows(buffer.slice(i * COPIED, COPIED), x.ptr, at, DIM, layout)


@gluon.jit
def copy_windows(buffer, x, first, num_windows, COPIED: gl.constexpr):
    """Asynchronously, the windows of x from `first` on, counted from x.ptr; zeros for those that a
    sequence does not have, where NaN may lie.
    """
    ROWS: gl.constexpr = buffer.shape[0]
    DIM: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = row_layout(DIM)
    for i in gl.static_range(ROWS // COPIED):
        window = first + i * COPIED + gl.arange(0, COPIED, gl.SliceLayout(1, layout))
        at, exists = window.to(gl.int64) * x.stride_t, window < num_windows
        copy_rows_or_zeros(buffer.slice(i * COPIED, COPIED), x.ptr, at, exists, DIM, layout)


@gluon.jit
def load_queries_then_windows(
    work, q, do, k, v, k_desc, v_desc, queries, windows, VALUES_LATER: gl.constexpr
):
    """The loading warpgroup of the forward and of dq: of every tile its queries, then keys and
    values step by step.

    VALUES_LATER: a step's keys are freed together with the values of so many steps before it.
    """
    G: gl.constexpr = work.SHAPE.G
    BLOCK_N: gl.constexpr = windows.k.shape[1]
    D: gl.constexpr = windows.k.shape[2]
    turn, count = 0, 0
    for number in range(gl.program_id(0), work.total, gl.num_programs(0)):
        head, tile = work.tile(number)
        steps = gl.cdiv(tile.most, BLOCK_N)
        queries.free.wait_for_last(turn)
        if tile.num_queries > 0:
            at = tile.first_query.to(gl.int64)
            last = tile.num_queries * G - 1
            load_query_tile(queries.q, q, queries.number(turn, 0), at, head, last, G)
            if do is not None:
                load_query_tile(queries.do, do, queries.number(turn, 0), at, head, last, G)
        queries.ready.arrive_after_copies(turn)

        keys, values = windows_of_tile(k, tile, head), windows_of_tile(v, tile, head)
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
            copy_windows(windows.keys(count), keys, start, tile.num_windows, FEW_ROWS)
            windows.k_ready.complete(count)
            windows.free.wait_for_last(count + VALUES_LATER)
            copy_windows(windows.values(count), values, start, tile.num_windows, FEW_ROWS)
            windows.v_ready.complete(count)
            count += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def load_query_tile(buffers, x, number, first_query, head, last, G: gl.constexpr):
    """Asynchronously, the pairs of both warpgroups, into the buffers `number` and the next."""
    ptr = x.ptr + first_query * x.stride_t + head.to(gl.int64) * G * x.stride_h
    queries = Heads(ptr, x.stride_t, x.stride_h)
    for warpgroup in gl.static_range(2):
        buffer = buffers.index(number + warpgroup)
        copy_pairs(buffer, queries, warpgroup * WARPGROUP_ROWS, last, WARPGROUP_ROWS, G)


@gluon.jit
def store_tile(
    buffer, ptr, values, num_heads, first_pair, num_queries, G: gl.constexpr, ADD: gl.constexpr
):
    """Stages a warpgroup's pairs in its own buffer, and stores them 16 bytes at a time.

    ptr: of the tile's first pair in a contiguous `[T, HQ, D]`; with ADD they are added to
    what is there.
    """
    D: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = row_layout(D)
    buffer.store(values.to(ptr.dtype.element_ty))
    thread_barrier()
    pair = first_pair + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, layout))
    offset = (pair // G).to(gl.int64) * (num_heads * D) + pair % G * D
    at = ptr + offset[:, None] + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    inside = (pair < num_queries * G)[:, None]
    tile = buffer.load(layout)
    if ADD:
        before = gl.load(at, mask=inside, other=0.0)
        tile = (tile.to(gl.float32) + before.to(gl.float32)).to(tile.dtype)
    gl.store(at, tile, mask=inside)


@gluon.jit
def step_weights(scores, maximum, total, scale, step, full_steps, visible):
    """Weights of one step, the decay of those before, the new maximum (base 2) and total."""
    layout: gl.constexpr = scores.type.layout
    BLOCK_N: gl.constexpr = scores.shape[1]
    if step >= full_steps:
        window = step * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        scores = gl.where(window[None, :] < visible[:, None], scores, float("-inf"))
    raised = gl.maximum(maximum, gl.max(scores, 1) * scale)
    shift = gl.where(raised == float("-inf"), 0.0, raised)  # a pair that has seen nothing yet
    p = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(maximum - shift)
    return p, decay, raised, total * decay + gl.sum(p, 1)


@gluon.jit
def attend(work, queries, windows, o_ptr, lse_ptr, scale, WARPGROUP: gl.constexpr):
    """A computing warpgroup of the forward. The scores of a step are asked for together with the
    values of the step before.
    """
    G: gl.constexpr = work.SHAPE.G
    BLOCK_N: gl.constexpr = windows.k.shape[1]
    D: gl.constexpr = windows.k.shape[2]
    dtype: gl.constexpr = queries.q.dtype
    s_layout: gl.constexpr = product_layout(BLOCK_N)
    o_layout: gl.constexpr = product_layout(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    pair_of: gl.constexpr = gl.SliceLayout(1, s_layout)
    pair = WARPGROUP * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, pair_of)
    none = gl.zeros([WARPGROUP_ROWS, BLOCK_N], gl.float32, s_layout)

    turn, count = 0, 0
    for number in range(gl.program_id(0), work.total, gl.num_programs(0)):
        head, tile = work.tile(number)
        steps, full_steps, visible = work.steps(tile, pair, BLOCK_N)
        maximum = gl.full([WARPGROUP_ROWS], float("-inf"), gl.float32, pair_of)
        total = gl.zeros([WARPGROUP_ROWS], gl.float32, pair_of)
        acc = gl.zeros([WARPGROUP_ROWS, D], gl.float32, o_layout)
        q_tile = queries.q.index(queries.number(turn, WARPGROUP))
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
        inside = pair < tile.num_queries * G
        lse_at = lse_ptr + at + (pair // G).to(gl.int64) * work.num_heads + pair % G
        gl.store(lse_at, lse, mask=inside)

        factor = 1.0 / gl.where(seen_any, total, 1.0)  # acc is 0 where nothing was seen
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, o_layout))[:, None]
        thread_barrier()  # all warps have read the scores' q
        first_pair, o_at, num_queries = WARPGROUP * WARPGROUP_ROWS, o_ptr + at * D, tile.num_queries
        store_tile(q_tile, o_at, acc, work.num_heads, first_pair, num_queries, G, False)
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
    SHAPE: gl.constexpr,
    TILE: gl.constexpr,
):
    """o and lse of as many tiles as every program comes to."""

    queries, windows = new_rings(q, False, SHAPE, TILE)
    work = QueryWork(tiles_ptr, num_tiles, num_rows, num_sequences, num_work, num_heads, SHAPE)
    gl.warp_specialize(
        [
            (attend, (work, queries, windows, o_ptr, lse_ptr, scale, 0)),
            (attend, (work, queries, windows, o_ptr, lse_ptr, scale, 1)),
            (load_queries_then_windows, (work, q, None, k, v, k_desc, v_desc, queries, windows, 1)),
        ],
        [4, LOADER_WARPS],
        [TILE.REGISTERS, 504 - 2 * TILE.REGISTERS],
    )


def ring_tile(block_n: int, stages: int, query_stages: int, registers: int) -> RingTile:
    """The tile of the forward, or of dq."""
    return constants(RingTile(block_n, stages, query_stages, registers))


GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.cache
def shared_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(box), GLUON_DTYPES[dtype])


def describe(x: Tensor, *box: int) -> TensorDescriptor:
    """What a bulk copy of boxes of x needs to know."""
    layout = shared_layout(box, x.dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), layout)


def head_columns(tensors: tuple[Tensor, ...], rows: int) -> list[TensorDescriptor]:
    """Bulk copies of `rows` rows of one head of tensors `[N, HKV, D]` whose heads lie together."""
    # Without any window there is nothing to copy, but a descriptor wants rows.
    return [
        describe((x if x.shape[0] else x.new_empty(1, *x.shape[1:])).flatten(1), rows, x.shape[2])
        for x in tensors
    ]
