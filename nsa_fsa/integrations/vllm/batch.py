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
from torch.nn.functional import pad

from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.integrations.vllm import names
from nsa_fsa.ops.common.sizes import cdiv


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
    sequences: list[Group]  # each alone
    starts: Tensor  # int32 [B + 1], where they begin among these rows
    lengths: Tensor  # int32 [B], new tokens included
    # The pages of all sequences in order, and one more that nobody reads: int64.
    pages: Tensor
    page_starts: Tensor  # int32 [B + 1], where a sequence begins among them; last: their number
    longest: int  # an upper bound of the lengths
    _rows: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def rows_in(self, cache: Tensor) -> Tensor:
        """Where the tokens of the pages lie in a cache `[pages, HKV, rows, width]`, int64
        `[N, HKV]`, in units of what its rows lie a multiple of apart; found once a step for all
        layers."""
        _, num_heads, num_rows, _ = cache.shape
        of_page, of_head, of_row = (x // unit_of(cache) for x in cache.stride()[:3])
        key = (num_heads, num_rows, of_page, of_head, of_row)
        if key not in self._rows:
            heads, rows = (torch.arange(x, device=cache.device) for x in (num_heads, num_rows))
            in_page = rows[:, None] * of_row + heads * of_head
            self._rows[key] = (self.pages[:, None, None] * of_page + in_page).flatten(0, 1)
        return self._rows[key]

    def gather(self, cache: Tensor) -> Tensor:
        """The tokens of the pages of a cache `[pages, HKV, rows, width]`: `[N, HKV, width]`."""
        rows, width = self.rows_in(cache), cache.shape[3]
        unit = unit_of(cache)
        last = sum((x - 1) * y for x, y in zip(cache.shape[:3], cache.stride(), strict=False))
        # In one kernel: by pages, heads would have to change places with rows afterwards.
        found = cache.as_strided((last // unit + 1, width), (unit, 1))[rows.flatten()]
        return found.unflatten(0, rows.shape)


def unit_of(cache: Tensor) -> int:
    """What the rows of a cache `[pages, HKV, rows, width]` lie a multiple of elements apart."""
    return math.gcd(*cache.stride()[:3])


@dataclass
class Batch(names.AttentionMetadata):
    """One step. Its tokens may be followed by rows that nobody reads."""

    groups: list[Group]
    chunks: list[Chunk]


def split(common: names.CommonAttentionMetadata, page_size: int, most_pages: int) -> Batch:
    """The groups and chunks of a step.

    Args:
        page_size: tokens of a page.
        most_pages: as many of all sequences of a chunk are gathered at once, or those of one.
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
            of_members = [row for b in members for row in range(ends[b], ends[b + 1])]
            rows, chosen = (to_device(x, lengths.device) for x in (of_members, members))
        groups.append(Group(rows, num_new, table[chosen], aligned(lengths[chosen])))
    chunked = [b for b, x in enumerate(new) if x > MOST_NEW]
    if not chunked:
        return Batch(groups, [])
    bounds = common.seq_lens_cpu_upper_bound  # exact for prompts
    totals = (lengths if bounds is None else bounds).tolist()
    needed = [cdiv(x, page_size) for x in totals]
    chunks = [
        _chunk(common, members, ends, needed, max(totals[b] for b in members))
        for members in _runs(chunked, needed, most_pages)
    ]
    return Batch(groups, chunks)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where it does not begin at a multiple of 16 bytes: kernels would be compiled
    once more for it."""
    return x.clone() if x.data_ptr() % 16 else x


def to_device(numbers: list[int], device: torch.device) -> Tensor:
    """int64, without the host waiting for the device."""
    found = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return found.to(device, non_blocking=True)


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
    common: names.CommonAttentionMetadata,
    members: range,
    ends: list[int],
    needed: list[int],
    longest: int,
) -> Chunk:
    first, last = members.start, members.stop
    lengths, table = common.seq_lens[first:last], common.block_table_tensor
    alone = pad(lengths[:, None], (0, 16 // lengths.element_size() - 1))  # so that each is aligned
    sequences = [
        Group(slice(*ends[b : b + 2]), ends[b + 1] - ends[b], table[b : b + 1], length[:1])
        for b, length in zip(members, alone, strict=True)
    ]
    page_starts = [0, *itertools.accumulate(needed[b] for b in members)]
    pages = [table[b, : needed[b]] for b in members]
    # vLLM's page 0 is nobody's.
    pages.append(table.new_zeros(1))
    page_starts[-1] += 1
    return Chunk(
        slice(ends[first], ends[last]),
        sequences,
        (common.query_start_loc[first : last + 1] - ends[first]).int(),
        aligned(lengths),
        torch.cat(pages).long(),
        to_device(page_starts, lengths.device).int(),
        longest,
    )


class BatchBuilder(names.AttentionMetadataBuilder[Any]):
    """Makes a `Batch` of every step. What graphs are captured of, sequences with as many new tokens
    each, is views of vLLM's own tensors, which stay where they are."""

    _cudagraph_support: ClassVar[names.AttentionCGSupport] = names.AttentionCGSupport.UNIFORM_BATCH

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
        common_attn_metadata: names.CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Batch:
        return split(common_attn_metadata, self.page_size, self.most_pages)


class StatesBuilder(names.AttentionMetadataBuilder[Any]):
    """Of the cache of compressed tokens, which has the table of the other one."""

    _cudagraph_support: ClassVar[names.AttentionCGSupport] = names.AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> names.AttentionMetadata:
        return names.AttentionMetadata()


class NSABackend(names.AttentionBackend):
    """What vLLM asks about a cache; the layer attends by itself."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    rows: ClassVar[int]  # a page has a multiple of so many
    builder: ClassVar[type[names.AttentionMetadataBuilder[Any]]]

    @classmethod
    def get_name(cls) -> str:
        return "NSA_FSA"

    @staticmethod
    def get_impl_cls() -> type[names.AttentionImplBase[Any]]:
        return names.AttentionImplBase

    @classmethod
    def get_builder_cls(cls) -> type[names.AttentionMetadataBuilder[Any]]:
        return cls.builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        return [names.MultipleOf(cls.rows)]

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
def backend_of(rows: int, builder: type[names.AttentionMetadataBuilder[Any]]) -> type[NSABackend]:
    """The backend of caches whose pages have a multiple of so many rows."""
    name = f"NSA{builder.__name__.removesuffix('Builder')}{rows}"
    return type(name, (NSABackend,), {"__module__": __name__, "rows": rows, "builder": builder})


def rows_of(block_sizes: Sequence[int]) -> int:
    """What the tokens of a page are a multiple of: selection blocks of all layers lie in one."""
    return math.lcm(16, *block_sizes)
