"""Pages: where the keys, values and compressed tokens of a batch's sequences are kept.

Token p of sequence b lies in row `p % page_size` of page `table[b, p // page_size]`. Compressed
token i lies where its last hop does, as if a hop were a row: in state `i + l / s - 1` of pages that
have `page_size / s` states. So all that is computed from a page's tokens, and from those before
them, lies in that page, and sequences that share the tokens of a prefix can share its pages.

A cache that is contiguous has one page for every sequence. One in which compressed tokens lie
elsewhere than tokens has a table for each.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.checks import check_device, check_rows, check_tensor
from nsa_fsa.ops.common.calls import Windows


class Pages(NamedTuple):
    """Keys, which are rotated, values, and compressed tokens, usually with one table for all."""

    k: Tensor  # [pages, HKV, page_size, D]
    v: Tensor  # [pages, HKV, page_size, DV]
    k_cmp: Tensor  # [pages, HKV, page_size // kernel_stride, D]
    v_cmp: Tensor  # [pages, HKV, page_size // kernel_stride, DV]
    table: Tensor  # int32 [B, pages of a sequence]; only those in use have to be pages
    # int32 [B, pages of a sequence], of k_cmp and v_cmp, whose pages may then be of another size.
    states: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can have."""
        return self.table.shape[1] * self.page_size

    @property
    def table_of_states(self) -> Tensor:
        return self.table if self.states is None else self.states

    @property
    def capacity_of_states(self) -> int:
        """Compressed tokens that a sequence can have, and what lies before the first of them."""
        return self.table_of_states.shape[1] * self.k_cmp.shape[2]

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
        for name, x in zip(self._fields[:4], self[:4], strict=True):
            check_rows(f"{name} of the pages", x, 4, "[pages, HKV, rows, width]")

        stride, shape = windows.kernel_stride, self.k.shape
        for name, x in zip(self._fields[:4], self[:4], strict=True):
            expected = [*shape[:3], shape[3] if name in ("k", "k_cmp") else self.v.shape[-1]]
            if name.endswith("cmp"):
                expected[2] = shape[2] // stride
                if self.states is not None:
                    expected[0], expected[2] = self.k_cmp.shape[0], self.k_cmp.shape[2]
            if list(x.shape) != expected or x.dtype != self.k.dtype:
                raise ValueError(
                    f"{name} of the pages is {x.dtype} {tuple(x.shape)}; it must be {self.k.dtype} "
                    f"{tuple(expected)}. Fix: Pages.empty(...), with this kernel_stride."
                )
            if x.stride(3) != 1:
                raise ValueError(
                    f"{name} of the pages has strides {x.stride()}: the last must be 1. "
                    "Fix: keep the width of a head contiguous."
                )
            check_device(f"{name} of the pages", x, self.k.device)

        for name, table in (("table", self.table), ("states", self.states)):
            if table is not None:
                self._check_table(name, table)

        if self.states is None and self.page_size % stride != 0:
            raise ValueError(
                f"pages have {self.page_size} rows, which is no multiple of "
                f"kernel_stride={stride}. Fix: for example pages of {8 * stride} tokens."
            )
        if self.capacity_of_states < self.capacity // stride:
            raise ValueError(
                f"{self.capacity_of_states} states are too few for {self.capacity} tokens: "
                f"kernel_stride={stride} asks for {self.capacity // stride}. Fix: more of them."
            )

        return self

    def _check_table(self, name: str, table: Tensor) -> None:
        check_tensor(name, table, "int32 [B, pages of a sequence]")
        number = self.table.shape[0]
        if table.dtype != torch.int32 or table.ndim != 2 or 0 in table.shape[1:]:
            raise ValueError(
                f"{name} is {table.dtype} {tuple(table.shape)}; it must be int32 [B, pages of a "
                f"sequence], at least one. Fix: {name}.int()."
            )
        if table.shape[0] != number:
            raise ValueError(
                f"states has {table.shape[0]} rows and table {number}. "
                "Fix: one row for every sequence in both."
            )
        check_device(name, table, self.k.device)


def read_rows(pages: Tensor, table: Tensor, first: int, last: int) -> Tensor:
    """Rows first to last of one sequence, `[last - first, HKV, width]`, from pages
    `[pages, HKV, rows, width]` by its row of the table."""
    row = torch.arange(first, last, device=pages.device)
    page = table[row // pages.shape[2]].long()
    return pages[page, :, row % pages.shape[2]]
