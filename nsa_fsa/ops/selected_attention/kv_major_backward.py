"""Selected attention, backward, in the loop order of FSA.

    statistics  gives, per query and head, shift = -lse / scale, so that
                p = exp((q k + shift) * scale), and delta = -sum(o * do).
    gather      A program holds one block's keys and values and walks the queries that see it: first
                the run of rows that see it densely, then its entries of the block index. dk and dv
                stay in registers; each pair leaves a partial dq. Scores are computed transposed,
                [keys, pairs], so that p and ds feed the matrix unit from registers. Large blocks
                are held in pieces, as in the forward.
    sum dk, dv  adds up where a block's queries were cut into several items.
    sum dq      adds up each pair's partial results in a stream.

Nothing is added atomically, so the result is the same in every run.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import Heads, heads
from nsa_fsa.ops.common.calls import AddTo, AttentionGradients
from nsa_fsa.ops.common.locate import BlockTable, RowTable
from nsa_fsa.ops.common.primitives import add_product, kernel, load_rows, store_rows
from nsa_fsa.ops.common.sizes import cdiv, rows_contiguous
from nsa_fsa.ops.common.softmax_statistics import Statistics
from nsa_fsa.ops.common.windowed_attention.heads import (
    load_keys,
    load_statistics,
    of_head,
    scaled,
    store_or_add,
)

# What the forward and the backward share.
from nsa_fsa.ops.selected_attention.call import BlockIndex, SelectedCall
from nsa_fsa.ops.selected_attention.kv_major_forward import hopper
from nsa_fsa.ops.selected_attention.work import (
    Launch,
    Work,
    buffers_of_unit,
    cut_units,
    load_block,
    load_item,
    partials_of_unit,
    planned_launches,
    shape_of,
    tile_of,
)


class Scratch(NamedTuple):
    """What the gather kernel leaves to the sums."""

    dq: Any  # [partials, D], by query, slot, piece and head
    dkdv: Any  # float32 [buffers, BLOCK_SIZE, D + DV], of the items of blocks that have several


@kernel
def gather_bwd_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    statistics,
    index,
    blocks,
    scratch,
    plan,
    place,
    first_head,
    num_tokens,
    item_queries,
    low_row,
    num_heads,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
    STORE_DQ: tl.constexpr,
):
    """A program walks an item, with a piece of the keys of its block."""

    G: tl.constexpr = SHAPE.G
    KEYS: tl.constexpr = TILE.KEYS
    SLOTS: tl.constexpr = SHAPE.NUM_SLOTS + SHAPE.INIT_BLOCKS + SHAPE.LOCAL_BLOCKS
    number, piece = tl.program_id(0) // TILE.PIECES, tl.program_id(0) % TILE.PIECES
    head, planned = first_head + tl.program_id(1), place + tl.program_id(1)
    if number >= tl.load(plan.num_items + planned):
        return

    block = load_block(plan, planned, number)
    item = load_item(plan, planned, number, block, item_queries, G)
    num_dense = tl.load(plan.num_dense + item.at) - item.first_query
    first_dense = tl.load(plan.first_dense + item.at) + item.first_query
    first_entry = head.to(tl.int64) * num_tokens * SHAPE.NUM_SLOTS
    entries_ptr = index.entries + (first_entry + tl.load(plan.first_entry + item.at))
    PARTIALS: tl.constexpr = SLOTS * TILE.PIECES * G
    partial = partials_of_unit(num_tokens, PARTIALS) + piece * G
    low_query = low_row if SHAPE.RANGED else 0

    q_ptr = q.ptr + head.to(tl.int64) * G * q.stride_h
    do_ptr = do.ptr + head.to(tl.int64) * G * do.stride_h
    of_group = Statistics(statistics.shift + head * G, statistics.delta + head * G)

    query_row = tl.load(blocks.query_row + block)
    block_number = tl.load(blocks.number + block)
    column = piece * KEYS + tl.arange(0, KEYS)
    exists = column < tl.load(blocks.num_rows + block)
    key = (tl.load(blocks.first_row + block) + column).to(tl.int64)
    k, v = of_head(k, head), of_head(v, head)
    k_tile, v_tile = load_keys(k, v, key, exists, SHAPE)
    dk_tile = tl.zeros([KEYS, SHAPE.PADDED_D], tl.float32)
    dv_tile = tl.zeros([KEYS, SHAPE.PADDED_DV], tl.float32)

    num_rows = item.num_rows if TILE.STOP_EARLY else item_queries * G
    for start in tl.range(0, num_rows, TILE.BLOCK_M, num_stages=TILE.NUM_STAGES):
        row = start + tl.arange(0, TILE.BLOCK_M)
        inside = row < item.num_rows
        nth = row // G
        member = (row % G).to(tl.int64)
        dense = nth < num_dense
        entry = tl.load(entries_ptr + (nth - num_dense), mask=inside & ~dense, other=0)
        query = tl.where(dense, first_dense + nth, entry // SHAPE.NUM_SLOTS)
        query = tl.where(inside, query, query_row)

        q_offset = query.to(tl.int64) * q.stride_t + member * q.stride_h
        do_offset = query.to(tl.int64) * do.stride_t + member * do.stride_h
        q_tile = load_rows(q_ptr, q_offset, inside, SHAPE.D, SHAPE.PADDED_D, True)
        do_tile = load_rows(do_ptr, do_offset, inside, SHAPE.DV, SHAPE.PADDED_DV, True)
        at = query.to(tl.int64) * num_heads + member
        shift, delta = load_statistics(of_group, at, inside)

        ahead = query - query_row  # how far the query lies beyond the block's first key
        if SHAPE.OWN_IS_OPTIONAL:
            flags_ptr = index.num_sparse + head.to(tl.int64) * num_tokens
            flags = tl.load(flags_ptr + query, mask=inside, other=0)
            is_own = ahead < SHAPE.BLOCK_SIZE
            shift = tl.where(is_own & (flags >= 0), float("-inf"), shift)

        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=TILE.PRECISION)  # [KEYS, BLOCK_M]
        # (scores + shift) * scale2 would begin its sum at shift, which is large, and round there
        # with every product.
        p = tl.exp2(scores * statistics.scale2 + (shift * statistics.scale2)[None, :])
        p = tl.where(column[:, None] <= ahead[None, :], p, 0.0)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=TILE.PRECISION)
        dv_tile = add_product(dv_tile, p.to(do_tile.dtype), do_tile, TILE.PRECISION)
        ds = (p * (dp + delta[None, :]) * statistics.scale).to(q_tile.dtype)
        dk_tile = add_product(dk_tile, ds, q_tile, TILE.PRECISION)

        if STORE_DQ:
            if KEYS < 64:
                # As [D, BLOCK_M] its layout, all warps along D, would be that of dk and dv too,
                # where D is the other axis: every warp would hold all of them. From 64 keys on
                # there is work for the warps along the keys.
                dq = tl.dot(tl.trans(ds), k_tile, input_precision=TILE.PRECISION)
            else:
                dq = tl.trans(tl.dot(tl.trans(k_tile), ds, input_precision=TILE.PRECISION))
            local_slot = SHAPE.INIT_BLOCKS + ahead // SHAPE.BLOCK_SIZE
            dense_slot = tl.where(block_number < SHAPE.INIT_BLOCKS, block_number, local_slot)
            slot = tl.where(dense, SHAPE.NUM_SLOTS + dense_slot, entry % SHAPE.NUM_SLOTS)
            target = (query - low_query).to(tl.int64) * SLOTS + slot
            offset = (partial + target * (TILE.PIECES * G) + member) * SHAPE.D
            store_rows(scratch.dq, offset, dq, inside, SHAPE.D, SHAPE.PADDED_D, STREAM=True)

    if tl.load(plan.num_queries + item.at) > item_queries:  # one item of several
        everywhere = column >= 0
        buffer = buffers_of_unit(num_tokens, item_queries, SLOTS)
        buffer += tl.load(plan.first_buffer + item.at) + item.nth
        offset = (buffer * SHAPE.BLOCK_SIZE + column) * (SHAPE.D + SHAPE.DV)
        dv_ptr = scratch.dkdv + SHAPE.D
        store_rows(scratch.dkdv, offset, dk_tile, everywhere, SHAPE.D, SHAPE.PADDED_D)
        store_rows(dv_ptr, offset, dv_tile, everywhere, SHAPE.DV, SHAPE.PADDED_DV)
    else:
        # Not by the names of the arguments: a stride of 1 is a constant, and stays one.
        k_out, v_out = of_head(dk, head), of_head(dv, head)
        at_k, at_v = key * k_out.stride_t, key * v_out.stride_t
        store_or_add(k_out.ptr, at_k, dk_tile, exists, ADD, SHAPE.D, SHAPE.PADDED_D)
        store_or_add(v_out.ptr, at_v, dv_tile, exists, ADD, SHAPE.DV, SHAPE.PADDED_DV)


@kernel
def sum_dkdv_kernel(
    dk,
    dv,
    blocks,
    scratch,
    plan,
    place,
    first_head,
    num_tokens,
    item_queries,
    SHAPE: tl.constexpr,
    KEYS: tl.constexpr,
    ADD: tl.constexpr,
):
    """dk and dv of the blocks whose queries were cut into several items."""
    PROGRAMS: tl.constexpr = SHAPE.BLOCK_SIZE // KEYS  # of a block
    SLOTS: tl.constexpr = SHAPE.NUM_SLOTS + SHAPE.INIT_BLOCKS + SHAPE.LOCAL_BLOCKS
    block, head = tl.program_id(0) // PROGRAMS, first_head + tl.program_id(1)
    at = (place + tl.program_id(1)).to(tl.int64) * plan.stride_blocks + block
    num_queries = tl.load(plan.num_queries + at)
    if num_queries <= item_queries:
        return

    column = tl.program_id(0) % PROGRAMS * KEYS + tl.arange(0, KEYS)
    exists = column < tl.load(blocks.num_rows + block)
    key = (tl.load(blocks.first_row + block) + column).to(tl.int64)
    dk, dv = of_head(dk, head), of_head(dv, head)

    dk_tile = tl.zeros([KEYS, SHAPE.PADDED_D], tl.float32)
    dv_tile = tl.zeros([KEYS, SHAPE.PADDED_DV], tl.float32)
    if ADD:
        old_dk, old_dv = load_keys(dk, dv, key, exists, SHAPE)
        dk_tile, dv_tile = dk_tile + old_dk, dv_tile + old_dv

    first = buffers_of_unit(num_tokens, item_queries, SLOTS) + tl.load(plan.first_buffer + at)
    for nth in tl.range(0, (num_queries + item_queries - 1) // item_queries, num_stages=4):
        offset = ((first + nth) * SHAPE.BLOCK_SIZE + column) * (SHAPE.D + SHAPE.DV)
        dv_ptr = scratch.dkdv + SHAPE.D
        dk_tile += load_rows(scratch.dkdv, offset, exists, SHAPE.D, SHAPE.PADDED_D, True)
        dv_tile += load_rows(dv_ptr, offset, exists, SHAPE.DV, SHAPE.PADDED_DV, True)

    store_rows(dk.ptr, key * dk.stride_t, dk_tile, exists, SHAPE.D, SHAPE.PADDED_D)
    store_rows(dv.ptr, key * dv.stride_t, dv_tile, exists, SHAPE.DV, SHAPE.PADDED_DV)


@kernel
def sum_dq_kernel(
    dq_ptr,
    scratch,
    index,
    rows,
    first_head,
    low_row,
    high_row,
    num_tokens,
    num_heads,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
    ADD: tl.constexpr,
):
    """dq of a tile of pairs: the sum of what the blocks that each query sees left for it."""

    G: tl.constexpr = SHAPE.G
    SLOTS: tl.constexpr = SHAPE.NUM_SLOTS + SHAPE.INIT_BLOCKS + SHAPE.LOCAL_BLOCKS
    head = first_head + tl.program_id(1)
    row = tl.program_id(0) * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    query = (low_row if SHAPE.RANGED else 0) + row // G
    inside = query < high_row
    at = head.to(tl.int64) * num_tokens + query
    num_sparse = tl.load(index.num_sparse + at, mask=inside, other=0) & 0x7FFFFFFF
    position = tl.load(rows.position + query, mask=inside, other=-1)
    own, sees = position // SHAPE.BLOCK_SIZE, position >= 0  # division rounds to zero
    PARTIALS: tl.constexpr = SLOTS * TILE.PIECES * G
    first = (row // G).to(tl.int64) * PARTIALS
    partial = partials_of_unit(num_tokens, PARTIALS) + first + row % G

    dq = tl.zeros([TILE.BLOCK_M, SHAPE.PADDED_D], tl.float32)
    for i in tl.range(0, SLOTS * TILE.PIECES, num_stages=TILE.NUM_STAGES):
        slot = i // TILE.PIECES
        initial = slot - SHAPE.NUM_SLOTS
        local = initial - SHAPE.INIT_BLOCKS
        is_seen = tl.where(
            initial < SHAPE.INIT_BLOCKS, initial <= own, own - local >= SHAPE.INIT_BLOCKS
        )
        exists = tl.where(slot < SHAPE.NUM_SLOTS, slot < num_sparse, is_seen)
        offset = (partial + i * G) * SHAPE.D
        share = load_rows(scratch.dq, offset, exists & sees, SHAPE.D, SHAPE.PADDED_D, True)
        dq += share.to(tl.float32)

    target = query.to(tl.int64) * num_heads + head * G + row % G
    store_or_add(dq_ptr, target * SHAPE.D, dq, inside, ADD, SHAPE.D, SHAPE.PADDED_D)


@dataclass(frozen=True)
class KeyGradients:
    """Where the kernels put dk `[T, HKV, D]` and dv `[T, HKV, DV]`.

    Where a launch does one range of a head, the ranges add up in float32, one head at a time.
    """

    grads: tuple[Tensor, Tensor]
    sums: tuple[Tensor, Tensor] | None  # [T, D] and [T, DV], of the present head
    add: bool  # to what grads hold already

    @classmethod
    def of(cls, dk: Tensor, dv: Tensor, ranged: bool, add: bool) -> "KeyGradients":
        """With sums where they are wanted."""
        if not ranged:
            return cls((dk, dv), None, add)
        rows, device = dk.shape[0], dk.device
        dk_sum = torch.empty(rows, dk.shape[2], dtype=torch.float32, device=device)
        dv_sum = torch.empty(rows, dv.shape[2], dtype=torch.float32, device=device)
        return cls((dk, dv), (dk_sum, dv_sum), add)

    @property
    def heads(self) -> tuple[Heads, Heads]:
        """What the kernels write to; every head of the sums is the present one."""
        if self.sums is None:
            dk, dv = self.grads
            return heads(dk), heads(dv)
        dk, dv = self.sums
        return Heads(dk, dk.stride(0), 0), Heads(dv, dv.stride(0), 0)

    def begin(self, launch: Launch) -> None:
        """Clears the sums before the first range of a head."""
        if self.sums is not None and launch.low_row == 0:
            for total in self.sums:
                total.zero_()

    def finish(self, launch: Launch, num_rows: int) -> None:
        """Hands the sums over after the last range of a head, which has so many rows."""
        if self.sums is not None and launch.high_row == num_rows:
            for grad, total in zip(self.grads, self.sums, strict=True):
                of_head = grad[:, launch.first_head]
                of_head.copy_(total + of_head if self.add else total)


def cut_backward(
    call: SelectedCall, index: BlockIndex, config: tuning.Config, store_dq: bool
) -> Work:
    """How the backward is cut so that its partial results fit the workspace."""
    block_size, init_blocks, local_blocks = call.blocks
    num_slots = call.num_slots + init_blocks + max(local_blocks, 1)
    group_size, element_size = call.group_size, call.q.element_size()
    num_tokens, _, head_dim = call.q.shape
    num_keys, num_kv_heads, v_dim = call.v.shape
    whole = config.bwd_hopper and store_dq
    pieces = 1 if whole else block_size // min(config.bwd_keys, block_size)
    item_queries = max(config.bwd_item_rows // group_size, 1)

    dq_bytes = pieces * group_size * head_dim * element_size * store_dq
    dkdv_bytes = block_size * (head_dim + v_dim) * 4
    # Two buffers for every item_queries queries: see `buffers_of_unit`.
    row_bytes = num_slots * (dq_bytes + 2 * dkdv_bytes // item_queries + 1)
    workspace_bytes = call.workspace_bytes
    units = cut_units(num_kv_heads, num_tokens, row_bytes, workspace_bytes, block_size)
    if units.num_ranges > 1:
        # The sums of a head's dk and dv come out of the workspace, but not more than half of it:
        # with less for partial results a million tokens would take 16,384 launches.
        sums = num_keys * (head_dim + v_dim) * 4
        left = max(workspace_bytes - sums, workspace_bytes // 2)
        units = cut_units(num_kv_heads, num_tokens, row_bytes, left, block_size)
    return Work(units, num_tokens, index.blocks.shape[1], num_slots, item_queries, pieces)


def new_scratch(call: SelectedCall, work: Work, store_dq: bool) -> Scratch:
    """Room for the partial results of a launch."""
    head_dim, v_dim = call.q.shape[2], call.v.shape[2]
    num_partials = work.partials(call.group_size) if store_dq else 0
    block_elements = call.blocks.block_size * (head_dim + v_dim)
    num_elements = work.units.launch_size * work.max_buffers * block_elements
    return Scratch(
        call.q.new_empty(num_partials, head_dim),
        call.q.new_empty(num_elements, dtype=torch.float32),
    )


def selected_attention_bwd(
    call: SelectedCall,
    config: tuning.Config,
    do: Tensor,
    statistics: Statistics,
    add_to: AddTo,
    store_dq: bool = True,
) -> AttentionGradients:
    """Gradients of q `[T, HQ, D]`, k `[T, HKV, D]` and v `[T, HKV, DV]` of a call with an index.
    Queries may be only the last positions of their sequences.

    add_to: gradients of q, and of both k and v or of neither.
    store_dq: False leaves dq alone, because another kernel computes it.
    """
    assert call.index is not None
    do, q, k, v = (rows_contiguous(x, config.bwd_hopper) for x in (do, call.q, call.k, call.v))
    num_tokens, num_heads, _ = q.shape
    dq, dk, dv = add_to.targets(q, k, v)
    add_dq, add_dkdv = add_to.q is not None, add_to.k is not None
    if not (add_dkdv or call.sequences.shares_rows):  # nobody may have seen a block of the past
        dk.zero_(), dv.zero_()
    if num_tokens == 0 or num_heads == 0:
        return AttentionGradients(*((dq, dk, dv) if add_dkdv else (dq, dk.zero_(), dv.zero_())))

    index, rows, blocks = call.index, RowTable(*call.index.rows), BlockTable(*call.index.blocks)
    work = cut_backward(call, index, config, store_dq)
    shape, block_size = shape_of(call, work), call.blocks.block_size
    keys, sum_keys = block_size // work.pieces, min(block_size, 16)
    sizes = (config.bwd_m, keys, config.bwd_stages, config.bwd_warps, config.stop_early)
    dkdv_programs = work.num_blocks * (block_size // sum_keys)
    dq_programs = cdiv(work.units.range_rows * call.group_size, config.dq_m)

    scratch = new_scratch(call, work, store_dq)
    key_grads = KeyGradients.of(dk, dv, work.ranged, add_dkdv)
    outputs, add = key_grads.heads, add_dkdv or work.ranged  # ranges add to sums
    tensors = (heads(q), heads(k), heads(v), heads(do), *outputs)
    inputs = (*tensors, scaled(statistics, call.scale), index, blocks, scratch)
    partials = (dq, scratch, index, rows)
    tile = tile_of(call, work, *sizes)
    gathering = dict(SHAPE=shape, TILE=tile, ADD=add, STORE_DQ=store_dq, num_warps=config.bwd_warps)
    dq_tile = tile_of(call, work, config.dq_m, 0, config.dq_stages, config.dq_warps)
    summing = dict(SHAPE=shape, TILE=dq_tile, ADD=add_dq, num_warps=config.dq_warps)
    gluon = config.bwd_hopper and store_dq
    gather = hopper().gather_bwd_hopper_kernel if gluon else gather_bwd_kernel

    for launch in planned_launches(call, index, blocks, work, dense=True):
        plan, place, first_head, low_row, high_row, count = launch
        key_grads.begin(launch)
        items = (plan, place, first_head, num_tokens, work.item_queries)
        gather[(work.max_items * work.pieces, count)](
            *inputs, *items, low_row, num_heads, **gathering
        )
        if work.max_buffers:
            sum_dkdv_kernel[(dkdv_programs, count)](
                *outputs, blocks, scratch, *items, SHAPE=shape, KEYS=sum_keys, ADD=add
            )
        if store_dq:
            queries = (first_head, low_row, high_row, num_tokens, num_heads)
            sum_dq_kernel[(dq_programs, count)](*partials, *queries, **summing)
        key_grads.finish(launch, num_tokens)
    return AttentionGradients(dq, dk, dv)
