"""Pages in a kernel."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Paged(NamedTuple):
    """A tensor `[pages, HKV, rows, width]` whose rows are contiguous, in a kernel."""

    ptr: Any
    stride_p: Any
    stride_h: Any
    stride_n: Any


class Table(NamedTuple):
    """Which page holds which rows of a sequence, in a kernel."""

    ptr: Any
    stride_b: Any


def paged(x: Tensor) -> Paged:
    """What a kernel is given of `[pages, HKV, rows, width]`."""
    return Paged(x, *x.stride()[:3])


def table_of(table: Tensor) -> Table:
    """What a kernel is given of a table `[B, pages of a sequence]`."""
    return Table(table, table.stride(0))


def page_rows(table: Tensor, pages: Tensor) -> int:
    """Rows of a page, as kernels take them: 0 where a sequence has one page."""
    return pages.shape[2] if table.shape[1] > 1 else 0


@triton.jit
def row_of(table, sequence, row, exists, PAGE: tl.constexpr):
    """The page, int64, and the row in it, of rows of a sequence; what does not exist is not looked
    up. PAGE: rows of a page, or 0 where the sequence has one page."""
    at = table.ptr + sequence.to(tl.int64) * table.stride_b
    if PAGE == 0:
        return tl.load(at).to(tl.int64) + row * 0, row.to(tl.int64)
    page = tl.load(at + row // PAGE, mask=exists, other=0).to(tl.int64)
    return page, (row % PAGE).to(tl.int64)
