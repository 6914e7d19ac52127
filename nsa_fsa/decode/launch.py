"""The four launches of `nsa_decode`, and the memory between them."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.decode.attend import attend_kernel, merge_kernel
from nsa_fsa.decode.call import DecodeCall, Decoded
from nsa_fsa.decode.choose import AT_ONCE, choose_kernel
from nsa_fsa.decode.paged import cache_of, page_rows, units_of
from nsa_fsa.decode.score import BlockSums, Partial, ScoreTile, Sizes, score_kernel
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.primitives import LOG2_E
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.common.tuning import dot_precision
from nsa_fsa.ops.gated_combine.triton import gates_of

MERGED_BY_WARP = 2048  # numbers of a pair's shares that a warp holds
MOST_LISTED = 4096  # blocks of all lists of a query and KV head, which one program chooses from


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernels cut their work."""

    rows: int = 64  # pairs of new tokens and heads of a group, of a program, at most
    score_windows: int = 64  # of a step
    score_shares: int = 32  # of a sequence at most
    score_least: int = 2  # steps of a share
    score_warps: int = 2
    score_stages: int = 2
    ranked: int = 1024  # blocks of all heads together, of a list
    choose_warps: int = 1
    keys: int = 64  # of a step
    shares: int = 8  # of the blocks that a query reads
    window_shares: int = 4  # of the windows
    attend_warps: int = 4
    attend_stages: int = 2


@functools.cache
def num_processors(device: torch.device) -> int:
    """Of a GPU; as an H100's where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def default_config(q: Tensor, num_kv_heads: int) -> DecodeConfig:
    """For queries `[T, HQ, D]`. Depends on no length and no batch, as what a sequence gets must
    not."""
    processors = num_processors(q.device)
    shares = min(max(next_power_of_2(cdiv(2 * processors, num_kv_heads)), 4), 64)
    warps = 1 if q.shape[1] < 8 * num_kv_heads else 2
    config = DecodeConfig(score_shares=shares, choose_warps=warps)
    if 12 * num_kv_heads < processors:
        config = dataclasses.replace(config, shares=16, window_shares=8)
    if 32 * num_kv_heads <= processors:
        # A program has a multiprocessor to itself, and asks for rows a step ahead. Pages are looked
        # up another step ahead, and Triton takes two stages for a step.
        config = dataclasses.replace(config, score_stages=5, score_least=4)
    if q.element_size() == 4:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        return dataclasses.replace(config, rows=16, score_warps=4, score_windows=16, keys=16)
    if q.shape[2] > 128:
        return dataclasses.replace(config, rows=32, score_warps=4, score_windows=32)
    return config


class Work(NamedTuple):
    """A call, and how its kernels cut it."""

    call: DecodeCall
    q: Tensor
    sizes: Sizes
    config: DecodeConfig

    @property
    def of_pairs(self) -> tuple[int, int]:
        """New tokens and query heads."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def of_groups(self) -> tuple[int, int]:
        """New tokens and KV heads."""
        return self.q.shape[0], self.sizes.HKV

    @property
    def num_blocks(self) -> int:
        """Blocks that a sequence can have."""
        return cdiv(self.call.pages.capacity, self.call.blocks.block_size)

    @property
    def scale(self) -> float:
        return self.call.scale * LOG2_E

    @property
    def rows(self) -> int:
        """Pairs of new tokens and heads of a group that a program does at a time."""
        return min(max(next_power_of_2(self.sizes.NEW * self.sizes.G), 16), self.config.rows)

    def new_partial(self, shares: int) -> Partial:
        """What the shares of a branch leave, uninitialised."""
        shape = (*self.of_pairs, shares)
        of_shares = [self.q.new_empty(shape, dtype=torch.float32) for _ in range(2)]
        o = self.q.new_empty(*shape, self.sizes.DV, dtype=torch.float32)
        return Partial(o, *of_shares)


class Scored(NamedTuple):
    """What the compressed branch leaves."""

    partial: Partial
    num_shares: int
    sums: BlockSums
    tile: ScoreTile
    finished: Tensor  # int32 [T, HKV], zeros


def sizes_of(call: DecodeCall) -> Sizes:
    pages, (kernel_size, kernel_stride) = call.pages, call.windows
    head_dim, v_dim = pages.k.shape[3], pages.v.shape[3]
    blocks = call.blocks
    return Sizes(
        *(call.num_new, pages.k.shape[1], call.group_size),
        *(head_dim, padded_dim(head_dim), v_dim, padded_dim(v_dim)),
        *(kernel_size // kernel_stride, blocks.block_size // kernel_stride, kernel_stride),
        *(call.num_selected_blocks, blocks.init_blocks, blocks.local_blocks, call.window_size),
        *(page_rows(pages.table, pages.k), page_rows(pages.table_of_states, pages.k_cmp)),
        dot_precision(call.q.dtype),
    )


def score(work: Work) -> Scored:
    """The compressed branch. What a sequence's shares are does not depend on how many there can
    be."""
    q, sizes, config, pages = work.q, work.sizes, work.config, work.call.pages
    phases = next_power_of_2(sizes.BLOCK_HOPS)
    blocks = max(config.score_windows // phases, 1)
    cut = (config.score_shares, config.score_least, config.score_stages)
    tile = ScoreTile(work.rows, blocks, phases, *cut)
    tiles = cdiv(work.num_blocks, blocks)
    num_shares = min(config.score_shares, cdiv(tiles, config.score_least))
    own, last, shift = (
        q.new_empty(*work.of_pairs, n, dtype=torch.float32)
        for n in (work.num_blocks, work.num_blocks, tiles)
    )
    finished = q.new_empty(work.of_groups, dtype=torch.int32)
    scored = Scored(
        work.new_partial(num_shares), num_shares, BlockSums(own, last, shift), tile, finished
    )

    tiles_of_pairs = cdiv(sizes.NEW * sizes.G, work.rows)
    score_kernel[(num_shares, sizes.HKV * tiles_of_pairs, work.call.lengths.shape[0])](
        *(heads(q), cache_of(pages.k_cmp, pages.v_cmp, pages.table_of_states), work.call.lengths),
        *(scored.partial, scored.sums, finished, work.scale, work.num_blocks, constants(sizes)),
        *(constants(units_of(pages.k_cmp, pages.v_cmp)), constants(tile)),
        num_warps=max(config.score_warps, work.rows // 16),
    )
    return scored


def choose(work: Work, scored: Scored) -> Tensor:
    """The blocks of every new token, int32 `[T, HKV, T_sel]`."""
    sizes, config = work.sizes, work.config
    listed = max(next_power_of_2(sizes.NUM_SELECTED), 2)
    heads_of_group = next_power_of_2(sizes.G)
    least = next_power_of_2(cdiv(work.num_blocks * listed, MOST_LISTED))
    chunk = max(config.ranked // heads_of_group, listed, least, scored.tile.BLOCKS)
    chunks = cdiv(work.num_blocks, chunk)
    lists = next_power_of_2(chunks)
    indices = work.q.new_empty(*work.of_groups, sizes.NUM_SELECTED, dtype=torch.int32)
    listing = work.q.new_empty(*work.of_groups, lists, listed, dtype=torch.int64)
    choose_kernel[(chunks, sizes.HKV, work.q.shape[0])](
        *(scored.sums, scored.partial, work.call.lengths, listing, scored.finished, indices),
        *(work.num_blocks, scored.num_shares, constants(sizes), constants(scored.tile)),
        *(chunk, heads_of_group, lists, listed),
        num_warps=config.choose_warps,
    )
    return indices


def attend(work: Work, indices: Tensor) -> tuple[Partial, Partial]:
    """The selected and the sliding branch."""
    sizes, config, pages = work.sizes, work.config, work.call.pages
    selected, sliding = (work.new_partial(x) for x in (config.shares, config.window_shares))
    rows = max(next_power_of_2(sizes.G), 16)
    attend_kernel[(config.shares + config.window_shares, sizes.HKV, work.q.shape[0])](
        *(heads(work.q), cache_of(pages.k, pages.v, pages.table), work.call.lengths, indices),
        *(selected, sliding, work.scale),
        *(constants(sizes), constants(units_of(pages.k, pages.v)), rows, max(rows, work.rows)),
        *(config.keys, config.shares, config.window_shares, config.attend_stages),
        num_warps=config.attend_warps,
    )
    return selected, sliding


def merge(work: Work, scored: Scored, selected: Partial, sliding: Partial) -> Tensor:
    """o `[T, HQ, DV]`."""
    sizes, config = work.sizes, work.config
    o = work.q.new_empty(*work.of_pairs, sizes.DV)
    merge_kernel[work.of_pairs](
        *(scored.partial, selected, sliding, gates_of(work.call.gate_logits), work.call.lengths, o),
        *(scored.num_shares, constants(sizes), config.shares, config.window_shares),
        num_warps=max(AT_ONCE.value * sizes.PADDED_DV // MERGED_BY_WARP, 1),
    )
    return o


def nsa_decode(call: DecodeCall, config: DecodeConfig | None = None) -> Decoded:
    """o and the chosen blocks; config: other than the default."""
    q = rows_contiguous(call.q)
    work = Work(call, q, sizes_of(call), config or default_config(q, call.pages.k.shape[1]))
    scored = score(work)
    indices = choose(work, scored)
    return Decoded(merge(work, scored, *attend(work, indices)), indices)
