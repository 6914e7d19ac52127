"""What the layers of one step are told of its batch: which sequences decode, and which prefill.

Sequences that have as many new tokens, 16 at most, are decoded together, over vLLM's own pages. The
others are chunks of prompts. A batch may have both, and prompts that were cached in part.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.integrations.vllm.names import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2


class NewWindows(NamedTuple):
    """The compression windows that new tokens may complete, as many as there can be: whether they
    do is known on the device alone."""

    sequence: Tensor  # int64 [N]
    nth: Tensor  # int64 [N], among those of its sequence


@dataclass
class Group:
    """Sequences that have as many new tokens."""

    rows: slice | Tensor  # of the step's tokens
    num_new: int  # of every sequence
    table: Tensor  # int32 [B, pages]
    lengths: Tensor  # int32 [B], new tokens included; 0 for a place in a graph that nobody has
    _windows: dict[int, NewWindows] = field(default_factory=dict)

    def windows(self, kernel_stride: int) -> NewWindows:
        """Found once a step for all layers."""
        if kernel_stride not in self._windows:
            number, device = self.lengths.shape[0], self.lengths.device
            most = cdiv(self.num_new, kernel_stride)
            row = torch.arange(number * most, device=device)
            self._windows[kernel_stride] = NewWindows(row // most, row % most)
        return self._windows[kernel_stride]


@dataclass
class Chunk:
    """Sequences with more new tokens than are decoded, one after the other."""

    rows: slice  # of the step's tokens
    new: list[int]  # tokens of every sequence
    starts: Tensor  # int32 [B + 1], where they begin among these rows
    slots: Tensor  # int64 [T], page * page_size + row of every new token
    table: Tensor  # int32 [B, pages]
    lengths: Tensor  # int32 [B], new tokens included
    # The pages of all sequences in order, and one more that nobody reads: int64.
    pages: Tensor
    page_starts: Tensor  # int32 [B + 1], where a sequence begins among them; last: their number
    longest: int  # an upper bound of the lengths
    _windows: dict[int, NewWindows] = field(default_factory=dict)

    def windows(self, kernel_stride: int) -> NewWindows:
        """Found once a step for all layers."""
        if kernel_stride not in self._windows:
            most = torch.tensor([cdiv(x, kernel_stride) for x in self.new])
            sequence = torch.arange(len(self.new)).repeat_interleave(most)
            nth = torch.arange(len(sequence)) - (most.cumsum(0) - most)[sequence]
            device = self.lengths.device
            self._windows[kernel_stride] = NewWindows(sequence.to(device), nth.to(device))
        return self._windows[kernel_stride]


@dataclass
class Batch(AttentionMetadata):
    """One step. Its tokens may be followed by rows that nobody reads."""

    groups: list[Group]
    chunks: list[Chunk]


def split(
    common: CommonAttentionMetadata, page_size: int, most_pages: int, num_columns: int
) -> Batch:
    """The groups and chunks of a step.

    Args:
        page_size: tokens of a page.
        most_pages: as many of all sequences of a chunk are gathered at once, or those of one.
        num_columns: of the table that groups are given.
    """
    ends: list[int] = common.query_start_loc_cpu.tolist()
    new = [last - first for first, last in itertools.pairwise(ends)]
    table, lengths = common.block_table_tensor, common.seq_lens
    groups = []
    for num_new in sorted({x for x in new if 0 < x <= MOST_NEW}):
        members = [b for b, x in enumerate(new) if x == num_new]
        first, last = members[0], members[-1] + 1
        rows: slice | Tensor = slice(ends[first], ends[last])
        chosen: slice | Tensor = slice(first, last)
        if last - first > len(members):
            of_members = [torch.arange(ends[b], ends[b + 1]) for b in members]
            rows = torch.cat(of_members).to(lengths.device)
            chosen = torch.tensor(members, device=lengths.device)
        groups.append(Group(rows, num_new, table[chosen, :num_columns], lengths[chosen]))
    chunked = [b for b, x in enumerate(new) if x > MOST_NEW]
    if not chunked:
        return Batch(groups, [])
    bounds = common.seq_lens_cpu_upper_bound  # exact for prompts
    totals = (lengths if bounds is None else bounds).tolist()
    needed = [cdiv(x, page_size) for x in totals]
    chunks = [
        _chunk(common, members, new, needed, max(totals[b] for b in members))
        for members in _runs(chunked, needed, most_pages)
    ]
    return Batch(groups, chunks)


def _runs(members: Sequence[int], needed: Sequence[int], most: int) -> list[range]:
    """Members that follow one another, in parts that need no more than `most` together."""
    runs: list[range] = []
    used = 0
    for b in members:
        used += needed[b]
        if runs and runs[-1].stop == b and used <= most:
            runs[-1] = range(runs[-1].start, b + 1)
        else:
            runs.append(range(b, b + 1))
            used = needed[b]
    return runs


def _chunk(
    common: CommonAttentionMetadata, members: range, new: list[int], needed: list[int], longest: int
) -> Chunk:
    first, last = members.start, members.stop
    device, table = common.seq_lens.device, common.block_table_tensor
    rows = slice(*(int(common.query_start_loc_cpu[b]) for b in (first, last)))
    starts = common.query_start_loc[first : last + 1] - rows.start
    page_starts = [0]
    for b in members:
        page_starts.append(page_starts[-1] + needed[b])
    pages = [table[b, : needed[b]] for b in members]
    # vLLM's page 0 is nobody's.
    pages.append(torch.zeros(1, dtype=table.dtype, device=device))
    page_starts[-1] += 1
    return Chunk(
        rows,
        new[first:last],
        starts.int(),
        common.slot_mapping[rows].long(),
        table[first:last],
        common.seq_lens[first:last],
        torch.cat(pages).long(),
        torch.tensor(page_starts, dtype=torch.int32).to(device),
        longest,
    )


class BatchBuilder(AttentionMetadataBuilder[Any]):
    """Makes a `Batch` of every step. What graphs are captured of, sequences with as many new tokens
    each, is views of vLLM's own tensors, which stay where they are."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Those that decode come first in a batch.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.page_size: int = kv_cache_spec.block_size
        self.most_pages = cdiv(vllm_config.model_config.max_model_len, self.page_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        pages = cdiv(max(int(common_attn_metadata.max_seq_len), 1), self.page_size)
        # Of few different widths, because what a launch does is kept for each.
        return self._split(common_attn_metadata, next_power_of_2(pages))

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Batch:
        """With tables of all pages that there can be, because lengths will be others."""
        return self._split(common_attn_metadata, common_attn_metadata.block_table_tensor.shape[1])

    def _split(self, common: CommonAttentionMetadata, num_columns: int) -> Batch:
        return split(common, self.page_size, self.most_pages, num_columns)


class StatesBuilder(AttentionMetadataBuilder[Any]):
    """Of the cache of compressed tokens, which has the table of the other one."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> AttentionMetadata:
        return AttentionMetadata()


class NSABackend(AttentionBackend):
    """What vLLM asks about a cache; the layer attends by itself."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    rows: ClassVar[int]  # a page has a multiple of so many
    builder: ClassVar[type[AttentionMetadataBuilder[Any]]]

    @classmethod
    def get_name(cls) -> str:
        return "NSA_FSA"

    @staticmethod
    def get_impl_cls() -> type[AttentionImplBase[Any]]:
        return AttentionImplBase

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder[Any]]:
        return cls.builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(cls.rows)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *args: Any, **_: Any
    ) -> tuple[int, ...]:
        """Asked by versions that do not take it from the spec."""
        return num_blocks, num_kv_heads, block_size, head_size

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # batches are split by what the host knows


@functools.cache
def backend_of(rows: int, builder: type[AttentionMetadataBuilder[Any]]) -> type[NSABackend]:
    """The backend of caches whose pages have a multiple of so many rows."""
    name = f"NSA{builder.__name__.removesuffix('Builder')}{rows}"
    return type(name, (NSABackend,), {"__module__": __name__, "rows": rows, "builder": builder})


def rows_of(block_sizes: Sequence[int]) -> int:
    """What the tokens of a page are a multiple of: selection blocks of all layers lie in one."""
    return math.lcm(16, *block_sizes)
