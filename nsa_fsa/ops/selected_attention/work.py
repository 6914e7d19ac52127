"""How the KV-major kernels cut their work.

    unit   is a KV head and a range of query rows. A launch does several heads whole or one range of
           one head, whatever the workspace has room for.
    item   is a block and a share of the unit's queries that see it, so that a block that everyone
           chose is no hot spot. A program walks the G pairs of each query.
    piece  is what one program holds of a block's keys. Programs that hold the pieces of one block
           share its items.
    slot   is the place of a block among those of a query.

The queries of a block are, first, those that see it densely, which are a run of rows and belong to
the backward alone, and then those that its entries in the block index name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import constants
from nsa_fsa.ops.common.locate import BlockTable
from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import aligned_rows, cdiv, widths
from nsa_fsa.ops.selected_attention.call import BlockIndex, SelectedCall

# Constants of the kernels


class Shape(NamedTuple):
    """What the kernels know of the call."""

    G: Any  # query heads of a KV head
    D: Any
    PADDED_D: Any
    DV: Any
    PADDED_DV: Any
    BLOCK_SIZE: Any
    NUM_SLOTS: Any  # sparse blocks of a query at most
    INIT_BLOCKS: Any
    LOCAL_BLOCKS: Any  # at least the query's own
    OWN_IS_OPTIONAL: Any  # bit 31 of `num_sparse` says whether a query sees its own block
    RANGED: Any  # a launch does one range of a head
    BY_UNIONS: Any  # some queries, of which bit 30 of `num_sparse` says so, are done already


class Tile(NamedTuple):
    """What a program works on at a time."""

    BLOCK_M: Any  # pairs
    KEYS: Any
    PIECES: Any  # of a block, in the kernel that leaves partial results
    NUM_STAGES: Any
    WARPS: Any
    PRECISION: Any
    STOP_EARLY: Any  # at an item's last row; otherwise all items are walked as far as the largest


def shape_of(call: SelectedCall, work: "Work", by_unions: bool = False) -> Shape:
    """The constants of a pass."""
    shape = Shape(
        call.group_size,
        *widths(call.q, call.v),
        BLOCK_SIZE=call.blocks.block_size,
        NUM_SLOTS=call.num_slots,
        INIT_BLOCKS=call.blocks.init_blocks,
        LOCAL_BLOCKS=max(call.blocks.local_blocks, 1),
        OWN_IS_OPTIONAL=call.blocks.local_blocks == 0,
        RANGED=work.ranged,
        BY_UNIONS=by_unions,
    )
    return constants(shape)


def tile_of(
    call: SelectedCall,
    work: "Work",
    block_m: int,
    keys: int,
    stages: int,
    warps: int,
    stop_early: bool = True,
) -> Tile:
    """The tile of a kernel."""
    precision = tuning.dot_precision(call.q.dtype)
    return constants(Tile(block_m, keys, work.pieces, stages, warps, precision, stop_early))


# Units and launches


class Units(NamedTuple):
    """Units are numbered head by head, and within a head by range."""

    num_ranges: int
    range_rows: int  # query rows of a range; the last may have fewer
    num_units: int
    launch_size: int  # units of a launch; 1 where heads are cut into ranges

    def launches(self) -> list[tuple[int, int]]:
        """First unit and number of units of every launch."""
        starts = range(0, self.num_units, self.launch_size)
        return [(first, min(self.launch_size, self.num_units - first)) for first in starts]


def cut_units(
    num_heads: int, num_rows: int, row_bytes: int, workspace_bytes: int, align: int
) -> Units:
    """Units of which a launch, at row_bytes a row, fits the workspace; whole heads if one fits."""
    rows = max(workspace_bytes // row_bytes, 1)
    if rows >= num_rows:
        return Units(1, num_rows, num_heads, min(rows // num_rows, num_heads))

    rows = max(rows // align * align, align)
    num_ranges = cdiv(num_rows, rows)
    # Ranges are equal, because a small last one would run half empty.
    range_rows = cdiv(cdiv(num_rows, num_ranges), align) * align
    num_ranges = cdiv(num_rows, range_rows)
    return Units(num_ranges, range_rows, num_heads * num_ranges, 1)


class Plan(NamedTuple):
    """The items of the units of some launches, int32; those of a unit are numbered by block.

    Strides are multiples of 16 whatever the lengths, so that they never compile a kernel anew.
    """

    stride_items: int
    stride_blocks: int
    items: Tensor  # [units, stride_items]: the block of each item
    num_items: Tensor  # [units]
    first_item: Tensor  # [units, stride_blocks]
    first_buffer: Tensor  # [units, stride_blocks]: numbers only the items of blocks with several
    first_dense: Tensor  # [units, stride_blocks]: first row of the dense run
    num_dense: Tensor  # [units, stride_blocks]
    first_entry: Tensor  # [units, stride_blocks]
    num_queries: Tensor  # [units, stride_blocks]: dense rows and entries together


class Launch(NamedTuple):
    """The units of one launch: whole heads, or one range of one head."""

    plan: Plan
    place: int  # of the first unit in the plan
    first_head: int
    low_row: int
    high_row: int  # the row after the range's last
    num_units: int


@dataclass(frozen=True)
class Work:
    """How one pass is cut."""

    units: Units
    num_rows: int
    num_blocks: int
    num_slots: int  # of a query: its sparse blocks, and in the backward those that it sees densely
    item_queries: int  # queries of an item at most
    pieces: int

    @property
    def ranged(self) -> bool:
        """True if a launch does one range of a head."""
        return self.units.num_ranges > 1

    @property
    def max_items(self) -> int:
        """Items of a unit at most: every row has so many slots, and every block one item."""
        return self.num_blocks + self.units.range_rows * self.num_slots // self.item_queries

    @property
    def max_buffers(self) -> int:
        """Items of a unit at most that belong to blocks with several, as `buffers_of_unit`."""
        return 2 * (self.units.range_rows * self.num_slots // self.item_queries)

    def partials(self, group_size: int) -> int:
        """Partial results of a launch: one for each slot, piece and head of the group."""
        rows = self.units.launch_size * self.units.range_rows
        return rows * self.num_slots * self.pieces * group_size


# What a program works on


class Item(NamedTuple):
    """An item as a program of a gather kernel sees it."""

    at: Any  # its block in the plan's tables
    nth: Any  # among the items of its block
    first_query: Any  # number of its first query among those of its block
    num_rows: Any  # queries times heads of the group


@triton.jit
def load_item(plan, planned, number, block, item_queries, G: tl.constexpr):
    """The item `number`, of `block`, of the unit that is `planned` in the plan."""
    at = planned * plan.stride_blocks + block
    nth = number - tl.load(plan.first_item + at)
    first_query = nth * item_queries
    num_queries = tl.minimum(tl.load(plan.num_queries + at) - first_query, item_queries)
    return Item(at, nth, first_query, num_queries * G)


@triton.jit
def load_block(plan, planned, number):
    """The block of an item."""
    return tl.load(plan.items + planned * plan.stride_items + number)


@triton.jit
def partials_of_unit(num_tokens, PARTIALS: tl.constexpr):
    """The place of the first partial result of the program's unit, with PARTIALS a query.

    Only whole heads, of num_tokens rows, have others before them in the buffer.
    """
    return tl.program_id(1).to(tl.int64) * num_tokens * PARTIALS


@triton.jit
def buffers_of_unit(num_tokens, item_queries, SLOTS: tl.constexpr):
    """The program's unit's first buffer of dk and dv, of which only whole heads have several.

    A block cut into several items has at most two for every item_queries queries.
    """
    return tl.program_id(1).to(tl.int64) * (2 * (num_tokens * SLOTS // item_queries))


# The plan


@triton.jit
def first_entry_from(entries_ptr, low, count, row, num_steps, NUM_SLOTS: tl.constexpr):
    """How many of `count` ascending entries from `low` on have queries before `row`: bisection."""
    below = count * 0
    above = count
    for _ in range(num_steps):
        middle = (below + above) // 2
        open_ = below < above
        entry = tl.load(entries_ptr + low + middle, mask=open_, other=0)
        smaller = open_ & (entry // NUM_SLOTS < row)
        below = tl.where(smaller, middle + 1, below)
        above = tl.where(open_ & ~smaller, middle, above)
    return below


class DenseRun(NamedTuple):
    """The rows of a range that see a block densely."""

    first: Any
    num_rows: Any


@triton.jit
def dense_run(blocks, block, inside, low_row, high_row, init_blocks, local_rows):
    """All rows from an initial block on, and local_rows rows from any other; of queries that follow
    a past, as many of these as there are."""
    first_row = tl.load(blocks.first_query + block, mask=inside, other=0)
    query_row = tl.load(blocks.query_row + block, mask=inside, other=0)
    end_row = tl.load(blocks.end_query + block, mask=inside, other=0)
    used = tl.load(blocks.num_rows + block, mask=inside, other=0) > 0
    initial = tl.load(blocks.number + block, mask=inside, other=0) < init_blocks

    first = tl.maximum(first_row, low_row)
    end = tl.where(initial, end_row, tl.minimum(query_row + local_rows, end_row))
    count = tl.maximum(tl.minimum(end, high_row) - first, 0)
    return DenseRun(first, tl.where(used, count, 0))


@kernel
def plan_kernel(
    index,
    blocks,
    plan,
    num_blocks,
    num_rows,
    first_unit,
    num_ranges,
    range_rows,
    num_steps,
    init_blocks,
    local_rows,
    item_queries,
    NUM_SLOTS: tl.constexpr,
    DENSE: tl.constexpr,
    RANGED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program plans a unit. num_steps: of the bisection of a block's entries."""

    planned = tl.program_id(0)
    unit = first_unit + planned
    head, low_row = unit, unit * 0
    if RANGED:
        head, low_row = unit // num_ranges, unit % num_ranges * range_rows
    high_row = tl.minimum(low_row + range_rows, num_rows)
    entries_ptr = index.entries + head.to(tl.int64) * num_rows * NUM_SLOTS
    of_head = head * num_blocks
    first_place = planned * plan.stride_blocks
    items_ptr = plan.items + planned * plan.stride_items

    item_total = 0
    buffer_total = 0
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        first = tl.load(index.first_entry + of_head + block, mask=inside, other=0)
        count = tl.load(index.num_entries + of_head + block, mask=inside, other=0)
        if RANGED:
            skipped = first_entry_from(entries_ptr, first, count, low_row, num_steps, NUM_SLOTS)
            end = first_entry_from(entries_ptr, first, count, high_row, num_steps, NUM_SLOTS)
            count = end - skipped
            first += skipped

        none = tl.zeros([BLOCKS], tl.int32)
        dense = DenseRun(none, none)
        if DENSE:
            dense = dense_run(blocks, block, inside, low_row, high_row, init_blocks, local_rows)

        total = dense.num_rows + count
        num_items = (total + item_queries - 1) // item_queries
        num_buffers = tl.where(num_items > 1, num_items, 0)
        first_item = item_total + tl.cumsum(num_items, 0) - num_items
        first_buffer = buffer_total + tl.cumsum(num_buffers, 0) - num_buffers

        at = first_place + block
        tl.store(plan.first_item + at, first_item, mask=inside)
        tl.store(plan.first_buffer + at, first_buffer, mask=inside)
        tl.store(plan.first_dense + at, dense.first, mask=inside)
        tl.store(plan.num_dense + at, dense.num_rows, mask=inside)
        tl.store(plan.first_entry + at, first, mask=inside)
        tl.store(plan.num_queries + at, total, mask=inside)
        for nth in range(0, tl.max(num_items)):
            tl.store(items_ptr + first_item + nth, block, mask=inside & (nth < num_items))
        item_total += tl.sum(num_items)
        buffer_total += tl.sum(num_buffers)
    tl.store(plan.num_items + planned, item_total)


def new_plan(work: Work, index: BlockIndex) -> Plan:
    """Room for the plan of as many whole launches as fit what `workspace_bytes` leaves to it.

    That is a byte for every row and slot of a launch, and 28 for every block and KV head.
    """
    units, num_blocks = work.units, work.num_blocks
    room = units.launch_size * units.range_rows * work.num_slots + 28 * index.num_entries.numel()
    unit_bytes = 4 * (work.max_items + 1 + 6 * num_blocks)
    launches = max(room // unit_bytes // units.launch_size, 1)
    planned = min(launches * units.launch_size, units.num_units)

    like = index.entries
    stride_items, stride_blocks = (cdiv(n, 16) * 16 for n in (work.max_items, num_blocks))
    return Plan(
        stride_items,
        stride_blocks,
        like.new_empty(planned, stride_items),
        like.new_empty(planned),
        *aligned_rows(6, planned, stride_blocks, dtype=like.dtype, device=like.device),
    )


def planned_launches(
    call: SelectedCall, index: BlockIndex, blocks: BlockTable, work: Work, *, dense: bool = False
) -> Iterator[Launch]:
    """The launches of a pass, each of which is planned when it is reached.

    A plan is made for as many launches as its memory allows, and the next one in its place: one
    kernel a launch took 0.4 ms more at 65,536 tokens and G = 16, and all units at once would take
    20 GB where a small workspace cuts a million tokens of 64 heads into ranges.

    dense: items also hold the queries that see a block densely.
    """
    units, num_rows = work.units, work.num_rows
    _, init_blocks, local_blocks = call.blocks
    plan = new_plan(work, index)
    planned_units = plan.num_items.shape[0]

    for first, count in units.launches():
        place = first % planned_units
        if place == 0 and work.num_slots:
            plan_kernel[(min(planned_units, units.num_units - first),)](
                *(index, blocks, plan, work.num_blocks, num_rows, first),
                *(units.num_ranges, units.range_rows, num_rows.bit_length() + 1),
                *(init_blocks, max(local_blocks, 1) * call.blocks.block_size, work.item_queries),
                NUM_SLOTS=max(call.num_slots, 1),
                DENSE=dense,
                RANGED=work.ranged,
                BLOCKS=1024,
                num_warps=8,
            )

        head, low_row = first // units.num_ranges, first % units.num_ranges * units.range_rows
        high_row = min(low_row + units.range_rows, num_rows)
        yield Launch(plan, place, head, low_row, high_row, count)
