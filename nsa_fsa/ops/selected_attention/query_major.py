"""Selected attention in the loop order of NSA: queries outside, the blocks that each chose inside.

A program owns one query and one KV head; its tile is the G query heads of the group, padded to what
a matrix unit takes (16), so small groups pay for rows that do not exist. It needs no index and no
partial results, and is what decoding wants, where a sequence has a single query. The backward
computes dq here, and dk and dv with the KV-major kernel, which owns the blocks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import RowTable, locate_rows
from nsa_fsa.ops.common.primitives import (
    LOG2_E,
    add_product,
    dot_keys,
    kernel,
    load_rows,
    online_softmax,
)
from nsa_fsa.ops.common.sizes import next_power_of_2, rows_contiguous, widths
from nsa_fsa.ops.common.softmax_statistics import Statistics
from nsa_fsa.ops.common.windowed_attention.heads import (
    load_keys,
    load_statistics,
    of_head,
    scaled,
    store_attended,
    store_or_add,
)
from nsa_fsa.ops.selected_attention.call import SelectedCall


class Shape(NamedTuple):
    """What the kernels know of the call, and of a step of theirs."""

    NUM_INDICES: Any
    PADDED_INDICES: Any
    G: Any  # query heads of a KV head
    PADDED_G: Any
    D: Any
    PADDED_D: Any
    DV: Any
    PADDED_DV: Any
    BLOCK_SIZE: Any
    KEYS: Any  # of a step
    NUM_STEPS: Any
    NUM_STAGES: Any
    PRECISION: Any


class Selection(NamedTuple):
    """What a query sees."""

    position: Any  # inside its sequence
    first_key: Any  # row of its sequence's first key
    blocks: Any  # [PADDED_INDICES]; -1 for what is out of range, past the count or a repetition


class Step(NamedTuple):
    """Keys and values of a step, and which of them the query sees, `[KEYS]`."""

    k: Any
    v: Any
    seen: Any


@triton.jit
def chosen_blocks(indices, counts, own, query, head, SHAPE: tl.constexpr):
    """A query's blocks, as `Selection.blocks`; own: the number of its own block."""
    indices_ptr = indices.ptr + query * indices.stride_t + head * indices.stride_h
    count = SHAPE.NUM_INDICES
    if counts is not None:
        count = tl.load(counts.ptr + query * counts.stride_t + head * counts.stride_h)
    column = tl.arange(0, SHAPE.PADDED_INDICES)
    read = column < SHAPE.NUM_INDICES
    block = tl.load(indices_ptr + column, mask=read, other=-1)
    valid = (column < count) & (block >= 0) & (block <= own)

    # Ascending rows, which is what select_blocks gives, cannot repeat a block.
    before = tl.load(indices_ptr + column - 1, mask=read & (column > 0), other=-1)
    ascending = (column == 0) | ~valid | ((before >= 0) & (before < block))
    if tl.min(ascending.to(tl.int32), 0) == 0:
        for other in range(0, SHAPE.NUM_INDICES - 1):
            valid = valid & ((column <= other) | (block != tl.load(indices_ptr + other)))
    return tl.where(valid, block, -1)


@triton.jit
def load_selection(rows, indices, counts, query, head, SHAPE: tl.constexpr):
    """What a query sees."""
    position, first_key = tl.load(rows.position + query), tl.load(rows.first_key + query)
    own = position // SHAPE.BLOCK_SIZE
    blocks = chosen_blocks(indices, counts, own, query, head, SHAPE)
    return Selection(position, first_key, blocks)


@triton.jit
def load_step(k, v, head, selection, step, SHAPE: tl.constexpr):
    """The `step`th KEYS keys and values of a query's blocks."""
    KEYS: tl.constexpr = SHAPE.KEYS
    STEPS: tl.constexpr = SHAPE.BLOCK_SIZE // KEYS
    is_present = tl.arange(0, SHAPE.PADDED_INDICES) == step // STEPS
    block = tl.sum(tl.where(is_present, selection.blocks, 0), 0)
    key = block * SHAPE.BLOCK_SIZE + step % STEPS * KEYS + tl.arange(0, KEYS)
    seen = (block >= 0) & (key <= selection.position)
    row = selection.first_key + key
    k_tile, v_tile = load_keys(of_head(k, head), of_head(v, head), row, seen, SHAPE)
    return Step(k_tile, v_tile, seen)


@kernel
def query_fwd_kernel(
    q, k, v, indices, counts, rows, o_ptr, lse_ptr, scale, num_heads, SHAPE: tl.constexpr
):
    """A program does one query and one KV head."""
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    selection = load_selection(rows, indices, counts, query, head, SHAPE)
    member = tl.arange(0, SHAPE.PADDED_G)
    real = member < SHAPE.G
    query_head = head * SHAPE.G + member
    q_ptr = q.ptr + query * q.stride_t
    q_tile = load_rows(q_ptr, query_head * q.stride_h, real, SHAPE.D, SHAPE.PADDED_D, True)

    acc = tl.zeros([SHAPE.PADDED_G, SHAPE.PADDED_DV], tl.float32)
    maximum = tl.full([SHAPE.PADDED_G], float("-inf"), tl.float32)
    total = tl.zeros([SHAPE.PADDED_G], tl.float32)
    for step in tl.range(0, SHAPE.NUM_STEPS, num_stages=SHAPE.NUM_STAGES):
        k_tile, v_tile, seen = load_step(k, v, head, selection, step, SHAPE)
        scores = dot_keys(q_tile, k_tile, SHAPE.PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v_tile, SHAPE.PRECISION)

    store_attended(
        *(o_ptr, lse_ptr, query, query_head, num_heads, real, acc, maximum, total, SHAPE)
    )


@kernel
def query_bwd_dq_kernel(
    q,
    k,
    v,
    do,
    statistics,
    indices,
    counts,
    rows,
    dq_ptr,
    num_heads,
    SHAPE: tl.constexpr,
    ADD: tl.constexpr,
):
    """A program does dq of one query and one KV head."""

    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    selection = load_selection(rows, indices, counts, query, head, SHAPE)
    member = tl.arange(0, SHAPE.PADDED_G)
    real = member < SHAPE.G
    query_head = head * SHAPE.G + member
    target = query * num_heads + query_head
    q_ptr, do_ptr = q.ptr + query * q.stride_t, do.ptr + query * do.stride_t
    q_tile = load_rows(q_ptr, query_head * q.stride_h, real, SHAPE.D, SHAPE.PADDED_D, True)
    do_tile = load_rows(do_ptr, query_head * do.stride_h, real, SHAPE.DV, SHAPE.PADDED_DV, True)
    shift, delta = load_statistics(statistics, target, real)

    dq = tl.zeros([SHAPE.PADDED_G, SHAPE.PADDED_D], tl.float32)
    for step in tl.range(0, SHAPE.NUM_STEPS, num_stages=SHAPE.NUM_STAGES):
        k_tile, v_tile, seen = load_step(k, v, head, selection, step, SHAPE)
        scores = dot_keys(q_tile, k_tile, SHAPE.PRECISION)
        p = tl.exp2(scores * statistics.scale2 + (shift * statistics.scale2)[:, None])
        p = tl.where(seen[None, :], p, 0.0)
        dp = dot_keys(do_tile, v_tile, SHAPE.PRECISION)
        ds = (p * (dp + delta[:, None]) * statistics.scale).to(k_tile.dtype)
        dq = add_product(dq, ds, k_tile, SHAPE.PRECISION)

    store_or_add(dq_ptr, target * SHAPE.D, dq, real, ADD, SHAPE.D, SHAPE.PADDED_D)


def make_shape(call: SelectedCall, keys: int, num_stages: int) -> Shape:
    """The constants of a call; keys: of a step at most."""
    num_indices, block_size = call.block_indices.shape[2], call.blocks.block_size
    keys = min(keys, block_size)
    shape = Shape(
        *(num_indices, max(next_power_of_2(num_indices), 2)),
        *(call.group_size, max(next_power_of_2(call.group_size), 16)),
        *widths(call.q, call.v),
        BLOCK_SIZE=block_size,
        KEYS=keys,
        NUM_STEPS=num_indices * (block_size // keys),
        NUM_STAGES=num_stages,
        PRECISION=tuning.dot_precision(call.q.dtype),
    )
    return constants(shape)


def query_major_fwd(call: SelectedCall) -> AttentionResult:
    """o `[Tq, HQ, DV]` and the natural-log lse, float32 `[Tq, HQ]`.

    Queries may be only the last positions of their sequences.
    """
    q, k, v, indices = (rows_contiguous(x) for x in (call.q, call.k, call.v, call.block_indices))
    num_queries, num_heads, _ = q.shape
    o = q.new_empty(num_queries, num_heads, v.shape[2])
    lse = q.new_empty(num_queries, num_heads, dtype=torch.float32)
    if o.numel() == 0 or indices.shape[2] == 0:
        return AttentionResult(o.zero_(), lse.fill_(-torch.inf))

    rows = RowTable(*locate_rows(num_queries, call.sequences, call.blocks.block_size))
    counts = None if call.block_counts is None else heads(call.block_counts)
    keys, num_warps, num_stages = tuning.query_major_tile(q, v)
    shape = make_shape(call, keys, num_stages)

    inputs = (heads(q), heads(k), heads(v), heads(indices), counts, rows)
    query_fwd_kernel[(num_queries, k.shape[1])](
        *inputs, o, lse, call.scale * LOG2_E, num_heads, SHAPE=shape, num_warps=num_warps
    )
    return AttentionResult(o, lse)


def query_major_bwd_dq(
    call: SelectedCall, do: Tensor, statistics: Statistics, dq: Tensor, add: bool
) -> None:
    """Writes dq `[T, HQ, D]`, or adds to it."""
    assert call.index is not None
    tensors = (call.q, call.k, call.v, do, call.block_indices)
    q, k, v, do, indices = (rows_contiguous(x) for x in tensors)
    if dq.numel() == 0 or indices.shape[2] == 0:
        if not add:
            dq.zero_()
        return

    rows = RowTable(*call.index.rows)
    counts = None if call.block_counts is None else heads(call.block_counts)
    keys, num_warps, num_stages = tuning.query_major_tile(q, v)
    shape = make_shape(call, keys, num_stages)

    inputs = (heads(q), heads(k), heads(v), heads(do), scaled(statistics, call.scale))
    query_bwd_dq_kernel[(q.shape[0], k.shape[1])](
        *(*inputs, heads(indices), counts, rows, dq, q.shape[1]),
        SHAPE=shape,
        ADD=add,
        num_warps=num_warps,
    )
