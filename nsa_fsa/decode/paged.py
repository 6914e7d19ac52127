"""Pages in a kernel.

Where a row begins takes one product of 64 bits: its number among all rows, times a constant, the
pitch of the tensor. With strides, which kernels extend to 64 bits, it would take two, of four
instructions each; they were a third of all instructions of a step.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MOST_PITCHES = 2**31  # of a tensor; a signed number of 32 bits counts them


class Paged(NamedTuple):
    """A tensor `[pages, HKV, rows, width]` whose rows are contiguous, in a kernel."""

    ptr: Any
    stride_h: Any


class Table(NamedTuple):
    """Which page holds which rows of a sequence, in a kernel."""

    ptr: Any
    stride_b: Any


class Cache(NamedTuple):
    """Keys and values of sequences, in a kernel."""

    k: Any  # `Paged`
    v: Any  # `Paged`
    table: Any  # `Table`


class PagePitches(NamedTuple):
    """How far pages lie apart, in a kernel. Products with these have 32 bits, which strides, the
    integers behind a pointer in a bundle, must not have."""

    key: Any
    value: Any


class Pitches(NamedTuple):
    """How far rows lie apart; a constant of the kernels."""

    KEY: int  # elements of a pitch
    KEY_ROW: int  # pitches from a row to the next
    VALUE: int
    VALUE_ROW: int
    ALIKE: bool  # whether keys and values lie in the same way


def pitch_of(x: Tensor) -> int:
    """The elements that pages and rows of `[pages, HKV, rows, width]` lie a multiple of apart."""
    pages, _, rows, _ = x.shape
    of_page, _, of_row, _ = x.stride()
    pitch = math.gcd(of_page, of_row) or 1
    if ((pages - 1) * of_page + (rows - 1) * of_row) // pitch >= MOST_PITCHES:
        raise ValueError(
            f"pages of shape {list(x.shape)} lie {of_page} elements apart and their rows {of_row}: "
            f"multiples of {pitch}, of which there are more than a number of 32 bits counts. Fix: "
            "make the first a multiple of the second, as in a contiguous tensor."
        )
    return pitch


def laid_out(k: Tensor, v: Tensor, table: Tensor) -> tuple[Cache, PagePitches, Pitches]:
    """What a kernel is given of keys and values `[pages, HKV, rows, width]` and of the table
    `[B, pages of a sequence]`, whose rows are contiguous."""
    of_heads = [Paged(x, x.stride(1)) for x in (k, v)]
    cache = Cache(of_heads[0], of_heads[1], Table(table, table.stride(0)))
    of_k, of_v = pitch_of(k), pitch_of(v)
    of_pages = PagePitches(k.stride(0) // of_k, v.stride(0) // of_v)
    rows = (k.stride(2) // of_k, v.stride(2) // of_v)
    return cache, of_pages, Pitches(of_k, rows[0], of_v, rows[1], k.stride() == v.stride())


def page_rows(table: Tensor, pages: Tensor) -> int:
    """Rows of a page, as kernels take them: 0 where a sequence has one page."""
    return pages.shape[2] if table.shape[1] > 1 else 0


@triton.jit
def row_of(table, sequence, row, exists, PAGE: tl.constexpr):
    """The page, and the row in it, of rows of a sequence. Of several pages that of a row that does
    not exist is not looked up.

    PAGE: rows of a page, or 0 where the sequence has one page.
    """
    at = table.ptr + sequence.to(tl.int64) * table.stride_b
    if PAGE == 0:
        return tl.load(at) + row * 0, row
    return tl.load(at + row // PAGE, mask=exists, other=0), row % PAGE


@triton.jit
def offsets_of(k, v, of_pages, page, row, head, PITCHES: tl.constexpr):
    """Where rows of keys and of values begin, int64; k and v are `Paged`."""
    number = page * of_pages.key + row * PITCHES.KEY_ROW
    of_keys = number.to(tl.int64) * PITCHES.KEY + head * k.stride_h
    of_values = of_keys
    if not PITCHES.ALIKE:
        number = page * of_pages.value + row * PITCHES.VALUE_ROW
        of_values = number.to(tl.int64) * PITCHES.VALUE + head * v.stride_h
    return of_keys, of_values
