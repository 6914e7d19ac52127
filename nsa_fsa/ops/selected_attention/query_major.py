"""Selected attention in the loop order of NSA: queries outside, the blocks that each one chose inside.

A program owns one query and one KV head; its tile is the G query heads of the group, padded to what a matrix unit takes (16),
so small groups pay for rows that do not exist. It needs no index and no partials, and is what decoding wants, where a
sequence has a single query. The backward computes dq here, and dk and dv with the KV-major kernel, which owns the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import RowTable, locate_rows
from nsa_fsa.ops.common.primitives import LN_2, LOG2_E, add_product, dot_keys, kernel, load_rows, online_softmax, store_rows
from nsa_fsa.ops.common.sizes import next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.selected_attention.call import SelectedCall


@triton.jit
def chosen_blocks(
    indices_ptr, counts_ptr, own, query, head, stride_indices_t, stride_indices_h, stride_counts_t, stride_counts_h,
    NUM_INDICES: tl.constexpr, PADDED_INDICES: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """A query's blocks, `[PADDED_INDICES]`; -1 for what is out of range, past the count or a repetition of an earlier one."""
    indices_ptr += query * stride_indices_t + head * stride_indices_h
    count = tl.load(counts_ptr + query * stride_counts_t + head * stride_counts_h) if HAS_COUNTS else NUM_INDICES
    column = tl.arange(0, PADDED_INDICES)
    read = column < NUM_INDICES
    block = tl.load(indices_ptr + column, mask=read, other=-1)
    valid = (column < count) & (block >= 0) & (block <= own)
    # Ascending rows, which is what select_blocks gives, cannot repeat a block.
    before = tl.load(indices_ptr + column - 1, mask=read & (column > 0), other=-1)
    ascending = (column == 0) | ~valid | ((before >= 0) & (before < block))
    if tl.min(ascending.to(tl.int32), 0) == 0:
        for other in range(0, NUM_INDICES - 1):
            valid = valid & ((column <= other) | (block != tl.load(indices_ptr + other)))
    return tl.where(valid, block, -1)


@triton.jit
def load_step(
    k_ptr, v_ptr, stride_k_t, stride_v_t, blocks, step, position, first_key,
    PADDED_INDICES: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
):  # fmt: skip
    """The `step`th KEYS keys and values of a query's blocks, and which of them it sees, `[KEYS]`."""
    STEPS: tl.constexpr = BLOCK_SIZE // KEYS
    block = tl.sum(tl.where(tl.arange(0, PADDED_INDICES) == step // STEPS, blocks, 0), 0)
    key = block * BLOCK_SIZE + step % STEPS * KEYS + tl.arange(0, KEYS)
    seen = (block >= 0) & (key <= position)
    row = (first_key + key).to(tl.int64)
    k = load_rows(k_ptr, row * stride_k_t, seen, D, PADDED_D, True)
    return k, load_rows(v_ptr, row * stride_v_t, seen, DV, PADDED_DV, True), seen


@kernel
def query_fwd_kernel(
    q_ptr, k_ptr, v_ptr, indices_ptr, counts_ptr, position_ptr, first_key_ptr, o_ptr, lse_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_indices_t, stride_indices_h, stride_counts_t, stride_counts_h, scale, num_heads,
    NUM_INDICES: tl.constexpr, PADDED_INDICES: tl.constexpr, HAS_COUNTS: tl.constexpr, G: tl.constexpr, PADDED_G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    KEYS: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position, first_key = tl.load(position_ptr + query), tl.load(first_key_ptr + query)
    blocks = chosen_blocks(
        indices_ptr, counts_ptr, position // BLOCK_SIZE, query, head,
        stride_indices_t, stride_indices_h, stride_counts_t, stride_counts_h, NUM_INDICES, PADDED_INDICES, HAS_COUNTS,
    )  # fmt: skip
    member = tl.arange(0, PADDED_G)
    real = member < G
    query_head = head * G + member
    q = load_rows(q_ptr + query * stride_q_t, query_head * stride_q_h, real, D, PADDED_D, True)
    k_ptr += head * stride_k_h
    v_ptr += head * stride_v_h

    acc = tl.zeros([PADDED_G, PADDED_DV], tl.float32)
    maximum = tl.full([PADDED_G], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_G], tl.float32)
    for step in tl.range(0, NUM_INDICES * (BLOCK_SIZE // KEYS), num_stages=NUM_STAGES):
        k, v, seen = load_step(
            k_ptr, v_ptr, stride_k_t, stride_v_t, blocks, step, position, first_key,
            PADDED_INDICES, BLOCK_SIZE, KEYS, D, PADDED_D, DV, PADDED_DV,
        )  # fmt: skip
        scores = dot_keys(q, k, PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        acc, maximum, total = online_softmax(acc, maximum, total, scores, v, PRECISION)

    seen_any = total > 0
    total = tl.where(seen_any, total, 1.0)
    target = query * num_heads + query_head
    store_rows(o_ptr, target * DV, acc * (1.0 / total)[:, None], real, DV, PADDED_DV)
    tl.store(lse_ptr + target, tl.where(seen_any, (maximum + tl.log2(total)) * LN_2, float("-inf")), mask=real)


@kernel
def query_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, shift_ptr, delta_ptr, indices_ptr, counts_ptr, position_ptr, first_key_ptr, dq_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_do_t, stride_do_h,
    stride_indices_t, stride_indices_h, stride_counts_t, stride_counts_h, scale2, scale, num_heads,
    NUM_INDICES: tl.constexpr, PADDED_INDICES: tl.constexpr, HAS_COUNTS: tl.constexpr, G: tl.constexpr, PADDED_G: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, DV: tl.constexpr, PADDED_DV: tl.constexpr,
    KEYS: tl.constexpr, NUM_STAGES: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    query, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position, first_key = tl.load(position_ptr + query), tl.load(first_key_ptr + query)
    blocks = chosen_blocks(
        indices_ptr, counts_ptr, position // BLOCK_SIZE, query, head,
        stride_indices_t, stride_indices_h, stride_counts_t, stride_counts_h, NUM_INDICES, PADDED_INDICES, HAS_COUNTS,
    )  # fmt: skip
    member = tl.arange(0, PADDED_G)
    real = member < G
    query_head = head * G + member
    target = query * num_heads + query_head
    q = load_rows(q_ptr + query * stride_q_t, query_head * stride_q_h, real, D, PADDED_D, True)
    do = load_rows(do_ptr + query * stride_do_t, query_head * stride_do_h, real, DV, PADDED_DV, True)
    shift = tl.load(shift_ptr + target, mask=real, other=float("-inf"))
    delta = tl.load(delta_ptr + target, mask=real, other=0.0)
    k_ptr += head * stride_k_h
    v_ptr += head * stride_v_h

    dq = tl.zeros([PADDED_G, PADDED_D], tl.float32)
    for step in tl.range(0, NUM_INDICES * (BLOCK_SIZE // KEYS), num_stages=NUM_STAGES):
        k, v, seen = load_step(
            k_ptr, v_ptr, stride_k_t, stride_v_t, blocks, step, position, first_key,
            PADDED_INDICES, BLOCK_SIZE, KEYS, D, PADDED_D, DV, PADDED_DV,
        )  # fmt: skip
        scores = dot_keys(q, k, PRECISION)
        p = tl.where(seen[None, :], tl.exp2(scores * scale2 + (shift * scale2)[:, None]), 0.0)
        dp = dot_keys(do, v, PRECISION)
        ds = (p * (dp + delta[:, None]) * scale).to(k.dtype)
        dq = add_product(dq, ds, k, PRECISION)
    if ACCUMULATE:
        dq += load_rows(dq_ptr, target * D, real, D, PADDED_D, True).to(tl.float32)
    store_rows(dq_ptr, target * D, dq, real, D, PADDED_D)


def _arguments(call: SelectedCall, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor):
    """Strides, and the constants and warps, that both kernels take."""
    group_size, block_counts, block_size = call.group_size, call.block_counts, call.blocks.block_size
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    index_strides = (*block_indices.stride()[:2], *(block_counts.stride() if block_counts is not None else (0, 0)))
    keys, num_warps, num_stages = tuning.query_major_tile(q, v)
    constants = dict(
        NUM_INDICES=block_indices.shape[2], PADDED_INDICES=max(next_power_of_2(block_indices.shape[2]), 2),
        HAS_COUNTS=block_counts is not None, G=group_size, PADDED_G=max(next_power_of_2(group_size), 16),
        BLOCK_SIZE=block_size, D=q.shape[2], PADDED_D=padded_dim(q.shape[2]), DV=v.shape[2], PADDED_DV=padded_dim(v.shape[2]),
        KEYS=min(keys, block_size), NUM_STAGES=num_stages, PRECISION=tuning.dot_precision(q.dtype), num_warps=num_warps,
    )  # fmt: skip
    return strides, index_strides, constants


def query_major_fwd(call: SelectedCall) -> AttentionResult:
    """o `[Tq, HQ, DV]` and the natural-log lse, float32 `[Tq, HQ]`; also for queries that are only the last positions of their
    sequences."""
    q, k, v, block_indices = (rows_contiguous(x) for x in (call.q, call.k, call.v, call.block_indices))
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    if o.numel() == 0 or block_indices.shape[2] == 0:
        return AttentionResult(o.zero_(), lse.fill_(-torch.inf))
    cu_seqlens, _, cu_seqlens_q, seqused_k = call.sequences
    rows = RowTable(*locate_rows(q.shape[0], cu_seqlens, call.blocks.block_size, cu_seqlens_q, seqused_k))
    strides, index_strides, constants = _arguments(call, q, k, v, block_indices)
    query_fwd_kernel[(q.shape[0], k.shape[1])](
        q, k, v, block_indices, call.block_counts, rows.position, rows.first_key, o, lse,
        *strides, *index_strides, call.scale * LOG2_E, q.shape[1], **constants,
    )  # fmt: skip
    return AttentionResult(o, lse)


def query_major_bwd_dq(call: SelectedCall, do: Tensor, shift: Tensor, delta: Tensor, dq: Tensor, accumulate: bool) -> None:
    """Writes dq `[T, HQ, D]`, or adds to it; shift and delta as `statistics` gives them."""
    assert call.index is not None
    do, q, k, v, block_indices = (rows_contiguous(x) for x in (do, call.q, call.k, call.v, call.block_indices))
    if dq.numel() == 0 or block_indices.shape[2] == 0:
        if not accumulate:
            dq.zero_()
        return
    rows = RowTable(*call.index.rows)
    strides, index_strides, constants = _arguments(call, q, k, v, block_indices)
    query_bwd_dq_kernel[(q.shape[0], k.shape[1])](
        q, k, v, do, shift, delta, block_indices, call.block_counts, rows.position, rows.first_key, dq,
        *strides, *do.stride()[:2], *index_strides, call.scale * LOG2_E, call.scale, q.shape[1],
        ACCUMULATE=accumulate, **constants,
    )  # fmt: skip
