"""Pages: where the keys, values and compressed tokens of a batch's sequences are kept.

Token p of sequence b lies in row `p % page_size` of page `table[b, p // page_size]`. Compressed
token i lies where its last hop does, as if a hop were a row: in state `i + l / s - 1` of pages that
have `page_size / s` states. So all that is computed from a page's tokens, and from those before
them, lies in that page, and sequences that share the tokens of a prefix can share its pages.

A cache that is contiguous has one page for every sequence.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.checks import check_device, check_tensor
from nsa_fsa.ops.common.calls import Windows


class Pages(NamedTuple):
    """Keys, which are rotated, values, and compressed tokens, with one table for all of them."""

    k: Tensor  # [pages, HKV, page_size, D]
    v: Tensor  # [pages, HKV, page_size, DV]
    k_cmp: Tensor  # [pages, HKV, page_size // kernel_stride, D]
    v_cmp: Tensor  # [pages, HKV, page_size // kernel_stride, DV]
    table: Tensor  # int32 [B, pages of a sequence]; only those in use have to be pages

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.table.shape[1] * self.page_size

    @classmethod
    def empty(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        kernel_stride: int,
        table: Tensor,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "Pages":
        """New pages, uninitialised, on the table's device."""

        def make(rows: int, width: int) -> Tensor:
            shape = (num_pages, num_kv_heads, rows, width)
            return torch.empty(shape, dtype=dtype, device=table.device)

        states = page_size // kernel_stride
        return cls(
            *(make(page_size, head_dim), make(page_size, v_head_dim)),
            *(make(states, head_dim), make(states, v_head_dim), table),
        )

    def check(self, windows: Windows) -> "Pages":
        """Raises ValueError for shapes, dtypes or devices that do not fit together; returns
        itself."""
        k, _, _, _, table = self
        stride = windows.kernel_stride
        for name, x in zip(self._fields[:4], self[:4], strict=True):
            check_tensor(name, x, "[pages, HKV, rows, width]")
            rows = self.page_size if name in ("k", "v") else self.page_size // stride
            width = k.shape[3] if name in ("k", "k_cmp") else self.v.shape[3]
            expected = (k.shape[0], k.shape[1], rows, width)
            if x.ndim != 4 or x.shape != expected or x.dtype != k.dtype:
                raise ValueError(
                    f"{name} of the pages is {x.dtype} {tuple(x.shape)}; it must be {k.dtype} "
                    f"{expected}. Fix: Pages.empty(...), with this kernel_stride."
                )
            if x.stride(3) != 1:
                raise ValueError(
                    f"{name} of the pages has strides {x.stride()}: the last must be 1. "
                    "Fix: keep the width of a head contiguous."
                )
            check_device(f"{name} of the pages", x, table.device)
        check_tensor("table", table, "int32 [B, pages of a sequence]")
        if table.dtype != torch.int32 or table.ndim != 2 or table.shape[1] == 0:
            raise ValueError(
                f"table is {table.dtype} {tuple(table.shape)}; it must be int32 [B, pages of a "
                "sequence], at least one. Fix: table.int()."
            )
        if self.page_size % stride != 0:
            raise ValueError(
                f"pages have {self.page_size} rows, which is no multiple of "
                f"kernel_stride={stride}. Fix: for example pages of {8 * stride} tokens."
            )
        return self


def read_rows(pages: Tensor, table: Tensor, first: int, last: int) -> Tensor:
    """Rows first to last of one sequence, `[last - first, HKV, width]`, from pages
    `[pages, HKV, rows, width]` by its row of the table."""
    row = torch.arange(first, last, device=pages.device)
    page = table[row // pages.shape[2]].long()
    return pages[page, :, row % pages.shape[2]]
