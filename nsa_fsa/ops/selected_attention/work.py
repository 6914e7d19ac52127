"""Work items of the KV-major kernels: a block and a part of its queries, so that a block that everyone chose is no hot spot.

A unit is a KV head and a range of query rows; launches do as many units at a time as their partials fit the workspace. A
block's queries in a unit are, first, those that see it densely (a run of rows, only in the backward) and then its entries of
the block index, both cut to the range. The kernels walk them G rows at a time, one per query head of the group.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import aligned_rows, cdiv
from nsa_fsa.ops.selected_attention.call import BlockIndex


class Units(NamedTuple):
    """How the work is cut: units are numbered head by head, and within a head by range."""

    num_ranges: int
    range_rows: int  # query rows of a range; the last may have fewer
    num_units: int
    step: int  # units to launch at a time

    def launches(self) -> list[tuple[int, int]]:
        """First unit and number of units of every launch."""
        return [(first, min(self.step, self.num_units - first)) for first in range(0, self.num_units, self.step)]


def cut_units(num_heads: int, num_rows: int, row_bytes: int, workspace_bytes: int, align: int) -> Units:
    """Units such that `step` of them, at row_bytes a row, fit the workspace; whole heads if at least one fits."""
    rows = max(workspace_bytes // row_bytes, 1)
    if rows >= num_rows:
        return Units(1, num_rows, num_heads, min(rows // num_rows, num_heads))
    rows = max(rows // align * align, align)
    num_ranges = cdiv(num_rows, rows)
    # Equal ranges: a small last one would run half empty.
    range_rows = cdiv(cdiv(num_rows, num_ranges), align) * align
    return Units(cdiv(num_rows, range_rows), range_rows, num_heads * cdiv(num_rows, range_rows), 1)


class Plan(NamedTuple):
    """The items of the units of some launches, int32; those of a unit are numbered in order of blocks."""

    items: Tensor  # [units, max_items]: the block of each item
    num_items: Tensor  # [units]
    first_item: Tensor  # [units, num_blocks]
    first_buffer: Tensor  # [units, num_blocks]: numbers only the items of blocks that have several
    first_dense: Tensor  # [units, num_blocks]: first row of the dense run
    num_dense: Tensor  # [units, num_blocks]
    first_entry: Tensor  # [units, num_blocks]
    num_queries: Tensor  # [units, num_blocks]: dense rows and entries together


@triton.jit
def first_entry_from(entries_ptr, low, count, row, num_steps, NUM_SLOTS: tl.constexpr):
    """How many of `count` ascending entries from `low` on belong to queries before `row`, by bisection."""
    below = count * 0
    above = count
    for _ in range(num_steps):
        middle = (below + above) // 2
        open_ = below < above
        smaller = open_ & (tl.load(entries_ptr + low + middle, mask=open_, other=0) // NUM_SLOTS < row)
        below = tl.where(smaller, middle + 1, below)
        above = tl.where(open_ & ~smaller, middle, above)
    return below


@kernel
def plan_kernel(
    entries_ptr, index_first_ptr, index_count_ptr, first_row_ptr, num_block_rows_ptr, block_index_ptr,
    end_row_ptr,
    items_ptr, num_items_ptr, first_item_ptr, first_buffer_ptr, first_dense_ptr, num_dense_ptr, first_entry_ptr,
    num_queries_ptr,
    num_blocks, num_rows, capacity, max_items, first_unit,
    num_ranges, range_rows, num_steps, init_blocks, local_rows, item_queries,
    NUM_SLOTS: tl.constexpr, DENSE: tl.constexpr, RANGED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    planned = tl.program_id(0)
    unit = first_unit + planned
    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    high_row = tl.minimum(low_row + range_rows, num_rows)
    entries_ptr += head.to(tl.int64) * capacity
    index_first_ptr += head * num_blocks
    index_count_ptr += head * num_blocks
    item_total = 0
    buffer_total = 0
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        first = tl.load(index_first_ptr + block, mask=inside, other=0)
        count = tl.load(index_count_ptr + block, mask=inside, other=0)
        if RANGED:
            skipped = first_entry_from(entries_ptr, first, count, low_row, num_steps, NUM_SLOTS)
            count = first_entry_from(entries_ptr, first, count, high_row, num_steps, NUM_SLOTS) - skipped
            first += skipped
        dense_first = tl.zeros([BLOCKS], tl.int32)
        dense_count = tl.zeros([BLOCKS], tl.int32)
        if DENSE:
            first_row = tl.load(first_row_ptr + block, mask=inside, other=0)
            end_row = tl.load(end_row_ptr + block, mask=inside, other=0)
            used = tl.load(num_block_rows_ptr + block, mask=inside, other=0) > 0
            initial = tl.load(block_index_ptr + block, mask=inside, other=0) < init_blocks
            dense_first = tl.maximum(first_row, low_row)
            dense_end = tl.minimum(tl.where(initial, end_row, tl.minimum(first_row + local_rows, end_row)), high_row)
            dense_count = tl.where(used, tl.maximum(dense_end - dense_first, 0), 0)
        total = dense_count + count
        num_items = (total + item_queries - 1) // item_queries
        num_buffers = tl.where(num_items > 1, num_items, 0)
        first_item = item_total + tl.cumsum(num_items, 0) - num_items
        at = planned * num_blocks + block
        tl.store(first_item_ptr + at, first_item, mask=inside)
        tl.store(first_buffer_ptr + at, buffer_total + tl.cumsum(num_buffers, 0) - num_buffers, mask=inside)
        tl.store(first_dense_ptr + at, dense_first, mask=inside)
        tl.store(num_dense_ptr + at, dense_count, mask=inside)
        tl.store(first_entry_ptr + at, first, mask=inside)
        tl.store(num_queries_ptr + at, total, mask=inside)
        most = tl.max(num_items)
        for part in range(0, most):
            tl.store(items_ptr + planned * max_items + first_item + part, block, mask=inside & (part < num_items))
        item_total += tl.sum(num_items)
        buffer_total += tl.sum(num_buffers)
    tl.store(num_items_ptr + planned, item_total)


def planned_launches(
    index: BlockIndex,
    units: Units,
    *,
    num_slots: int,
    item_queries: int,
    dense: bool = False,
    init_blocks: int = 0,
    local_blocks: int = 0,
    block_size: int = 0,
) -> Iterator[tuple[Plan, int, int, int]]:
    """Plan, place in it of the launch's first unit, first unit and number of units of every launch, whose units are cut into
    items of at most `item_queries` queries each.

    A plan is made for as many launches as its memory allows, and the next one in its place: one kernel a launch took 0.4 ms
    more at 65,536 tokens and G = 16, and all units at once would take 20 GB where a small workspace cuts a million tokens of
    64 heads into ranges.
    """
    num_blocks, (num_heads, num_rows) = index.blocks.shape[1], index.num_sparse.shape
    local_blocks = max(local_blocks, 1)
    # Every row has so many entries at most, and sees so many blocks densely.
    all_slots = num_slots + (init_blocks + local_blocks if dense else 0)
    max_items = num_blocks + units.range_rows * all_slots // item_queries
    # What `workspace_bytes` leaves to the plan: a byte for every row and slot of a launch, and 28 for every block and KV head.
    room = units.step * units.range_rows * all_slots + 28 * num_blocks * num_heads
    unit_bytes = 4 * (max_items + 1 + 6 * num_blocks)
    planned_units = min(max(room // unit_bytes // units.step, 1) * units.step, units.num_units)
    new: dict[str, Any] = dict(dtype=torch.int32, device=index.entries.device)
    plan = Plan(
        torch.empty(planned_units, max_items, **new),
        torch.empty(planned_units, **new),
        *aligned_rows(6, planned_units, num_blocks, **new),
    )
    for first, count in units.launches():
        place = first % planned_units
        if place == 0 and all_slots:
            plan_kernel[(min(planned_units, units.num_units - first),)](
                *index[:3], *index.blocks, *plan,
                num_blocks, num_rows, index.entries.shape[1], max_items, first, units.num_ranges, units.range_rows,
                num_rows.bit_length() + 1, init_blocks, local_blocks * block_size, item_queries,
                NUM_SLOTS=max(num_slots, 1), DENSE=dense, RANGED=units.num_ranges > 1, BLOCKS=1024, num_warps=8,
            )  # fmt: skip
        yield plan, place, first, count
