"""Pages in a kernel.

Where a row begins takes one product of 64 bits: its number among all rows, times a constant, the
unit that they lie apart by. With strides, which kernels extend to 64 bits, it would take two, of
four instructions each; they were a third of all instructions of a step.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MOST_UNITS = 2**31  # of a tensor: what 32 bits count


class Paged(NamedTuple):
    """A tensor `[pages, HKV, rows, width]` whose rows are contiguous, in a kernel.

    A pointer comes first where only strides follow, which are never multiplied in 32 bits.
    """

    page_units: Any  # from a page to the next
    ptr: Any
    stride_h: Any


class Unit(NamedTuple):
    """What a tensor's pages and rows lie apart by."""

    elements: int
    row: int  # units from a row to the next


class Units(NamedTuple):
    """Those of keys and of values; a constant of the kernels."""

    KEY: int
    KEY_ROW: int
    VALUE: int
    VALUE_ROW: int
    ALIKE: bool  # whether both lie in the same way


class Table(NamedTuple):
    """Which page holds which rows of a sequence, in a kernel."""

    ptr: Any
    stride_b: Any


class Cache(NamedTuple):
    """Keys and values of sequences, in a kernel."""

    k: Any  # `Paged`
    v: Any  # `Paged`
    table: Any  # `Table`


def unit_of(x: Tensor) -> Unit:
    """That of a tensor `[pages, HKV, rows, width]`."""
    pages, _, rows, _ = x.shape
    of_page, _, of_row, _ = x.stride()
    unit = math.gcd(of_page, of_row) or 1
    if ((pages - 1) * of_page + (rows - 1) * of_row) // unit >= MOST_UNITS:
        raise ValueError(
            f"pages of shape {list(x.shape)} lie {of_page} elements apart and their rows {of_row}; "
            f"of the unit of both, {unit}, there are more than 32 bits count. Fix: make the first "
            "a multiple of the second, as in a contiguous tensor."
        )
    return Unit(unit, of_row // unit)


def units_of(k: Tensor, v: Tensor) -> Units:
    """What a kernel is given of keys and values."""
    return Units(*unit_of(k), *unit_of(v), k.stride() == v.stride())


def paged(x: Tensor) -> Paged:
    """What a kernel is given of `[pages, HKV, rows, width]`."""
    return Paged(x.stride(0) // unit_of(x).elements, x, x.stride(1))


def table_of(table: Tensor) -> Table:
    """What a kernel is given of a table `[B, pages of a sequence]`."""
    return Table(table, table.stride(0))


def cache_of(k: Tensor, v: Tensor, table: Tensor) -> Cache:
    """What a kernel is given of keys and values `[pages, HKV, rows, width]` and their table."""
    return Cache(paged(k), paged(v), table_of(table))


def page_rows(table: Tensor, pages: Tensor) -> int:
    """Rows of a page, as kernels take them: 0 where a sequence has one page."""
    return pages.shape[2] if table.shape[1] > 1 else 0


@triton.jit
def row_of(table, sequence, row, exists, PAGE: tl.constexpr):
    """The page, and the row in it, of rows of a sequence; what does not exist is not looked up.

    PAGE: rows of a page, or 0 where the sequence has one page.
    """
    at = table.ptr + sequence.to(tl.int64) * table.stride_b
    if PAGE == 0:
        return tl.load(at) + row * 0, row
    return tl.load(at + row // PAGE, mask=exists, other=0), row % PAGE


@triton.jit
def offset_of(x, page, row, head, UNIT: tl.constexpr, ROW: tl.constexpr):
    """Where rows of `Paged` begin, int64."""
    return (page * x.page_units + row * ROW).to(tl.int64) * UNIT + head * x.stride_h


@triton.jit
def offsets_of(k, v, page, row, head, UNITS: tl.constexpr):
    """Where rows of keys and of values begin, int64."""
    of_keys = offset_of(k, page, row, head, UNITS.KEY, UNITS.KEY_ROW)
    of_values = of_keys
    if not UNITS.ALIKE:
        of_values = offset_of(v, page, row, head, UNITS.VALUE, UNITS.VALUE_ROW)
    return of_keys, of_values
