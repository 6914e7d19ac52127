"""The four launches of `nsa_decode`, and the memory between them."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.decode.attend import attend_kernel, merge_kernel
from nsa_fsa.decode.call import DecodeCall, Decoded
from nsa_fsa.decode.choose import SHARES_AT_ONCE, choose_kernel
from nsa_fsa.decode.overlap import overlap
from nsa_fsa.decode.paged import laid_out, page_rows
from nsa_fsa.decode.score import BlockSums, Partial, ScoreTile, Sizes, score_kernel
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.primitives import LOG2_E
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.common.tuning import dot_precision, is_cramped
from nsa_fsa.ops.gated_combine.triton import gates_of

MERGED_BY_WARP = 2048  # numbers of a pair's shares that a warp holds
LISTED_BY_WARP = 1024  # blocks of lists that a warp chooses from at a time


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
    sliding_shares: int = 4  # of the sliding windows
    attend_warps: int = 4
    attend_stages: int = 2


@functools.cache
def num_processors(device: torch.device) -> int:
    """Of a GPU; as an H100's where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def default_config(q: Tensor, v: Tensor, num_new: int) -> DecodeConfig:
    """For queries `[T, HQ, D]` and values `[pages, HKV, rows, DV]`. Depends on no length and no
    batch, as what a sequence gets must not."""
    processors, num_kv_heads = num_processors(q.device), v.shape[1]
    shares = min(max(next_power_of_2(cdiv(2 * processors, num_kv_heads)), 4), 64)
    warps = min(max(next_power_of_2(q.shape[1] // num_kv_heads) // 8, 1), 4)
    config = DecodeConfig(score_shares=shares, choose_warps=warps)
    if num_new > 1:
        # There are more programs, and more shares to add up.
        config = dataclasses.replace(config, score_least=4, shares=4)
    if q.element_size() == 4:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        return dataclasses.replace(config, rows=16, score_warps=4, score_windows=16, keys=16)
    if max(q.shape[2], v.shape[3]) > 128:
        return dataclasses.replace(config, rows=32, score_warps=4, score_windows=32, keys=32)
    if 32 * num_kv_heads <= processors and not is_cramped(q):
        # A program has a multiprocessor to itself, and asks for rows a step ahead. Pages are looked
        # up another step ahead, and Triton takes two stages for a step.
        return dataclasses.replace(config, score_stages=5, score_least=4)
    return config


class Work(NamedTuple):
    """A call, and how its kernels cut it."""

    call: DecodeCall
    q: Tensor
    lengths: Tensor  # like q and the tables with contiguous rows
    table: Tensor
    table_of_states: Tensor
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
    def scale2(self) -> float:
        """Of scores in base 2."""
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
    blocks_of_tile: int
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
        call.dense_below,
        *(page_rows(pages.table, pages.k), page_rows(pages.table_of_states, pages.k_cmp)),
        dot_precision(call.q.dtype),
    )


def score(work: Work) -> Scored:
    """The compressed branch. A sequence is cut alike however many shares the grid has."""
    q, sizes, config, pages = work.q, work.sizes, work.config, work.call.pages
    phases = next_power_of_2(sizes.BLOCK_HOPS)
    blocks = max(config.score_windows // phases, 1)
    # 64 rows take the registers that more stages would need.
    stages = config.score_stages if work.rows < 64 else min(config.score_stages, 2)
    cut = (config.score_shares, config.score_least, stages)
    tile = ScoreTile(work.rows, blocks, phases, *cut)
    tiles = cdiv(work.num_blocks, blocks)
    num_shares = min(config.score_shares, cdiv(tiles, config.score_least))
    own, last, shift = (
        q.new_empty(*work.of_pairs, n, dtype=torch.float32)
        for n in (work.num_blocks, work.num_blocks, tiles)
    )
    finished = q.new_empty(work.of_groups, dtype=torch.int32)
    sums, partial = BlockSums(own, last, shift), work.new_partial(num_shares)

    cache, of_pages, pitches = laid_out(pages.k_cmp, pages.v_cmp, work.table_of_states)
    tiles_of_pairs = cdiv(sizes.NEW * sizes.G, work.rows)
    score_kernel[(work.lengths.shape[0], sizes.HKV * tiles_of_pairs, num_shares)](
        *(heads(q), cache, of_pages, work.lengths, partial, sums, finished),
        *(work.scale2, work.num_blocks),
        *(constants(sizes), constants(pitches), constants(tile)),
        num_warps=max(config.score_warps, work.rows // 16),
        **overlap(q.device),
    )
    return Scored(partial, num_shares, sums, blocks, finished)


def choose(work: Work, scored: Scored) -> Tensor:
    """The blocks of every new token, int32 `[T, HKV, T_sel]`. How many blocks a list is of must not
    depend on how many there are, since the order in which heads are added up does on that."""
    sizes, config = work.sizes, work.config
    listed = max(next_power_of_2(sizes.NUM_SELECTED), 2)
    heads_of_group = next_power_of_2(sizes.G)
    ranked = max(config.ranked // heads_of_group, listed, scored.blocks_of_tile)
    most_lists = cdiv(work.num_blocks, ranked)
    at_once = max(LISTED_BY_WARP * config.choose_warps // listed, 2)
    indices = work.q.new_empty(*work.of_groups, sizes.NUM_SELECTED, dtype=torch.int32)
    lists = work.q.new_empty(*work.of_groups, most_lists, listed, dtype=torch.int64)
    choose_kernel[work.of_groups + (most_lists,)](
        *(scored.sums, scored.partial, work.lengths, lists, scored.finished, indices),
        *(work.num_blocks, scored.num_shares, most_lists, constants(sizes)),
        *(scored.blocks_of_tile, ranked, heads_of_group),
        *(min(next_power_of_2(most_lists), at_once), listed),
        num_warps=config.choose_warps,
        **overlap(work.q.device),
    )
    return indices


def attend(work: Work, indices: Tensor) -> tuple[Partial, Partial]:
    """The selected and the sliding branch."""
    sizes, config, pages = work.sizes, work.config, work.call.pages
    selected, sliding = (work.new_partial(x) for x in (config.shares, config.sliding_shares))
    cache, of_pages, pitches = laid_out(pages.k, pages.v, work.table)
    rows = max(next_power_of_2(sizes.G), 16)
    attend_kernel[work.of_groups + (config.shares + config.sliding_shares,)](
        *(heads(work.q), cache, of_pages, work.lengths, indices, selected, sliding),
        *(work.scale2, constants(sizes), constants(pitches), rows, max(rows, work.rows)),
        *(config.keys, config.shares, config.sliding_shares, config.attend_stages),
        num_warps=config.attend_warps,
        **overlap(work.q.device),
    )
    return selected, sliding


def merge(work: Work, scored: Scored, selected: Partial, sliding: Partial) -> Tensor:
    """o `[T, HQ, DV]`."""
    sizes, config = work.sizes, work.config
    o = work.q.new_empty(*work.of_pairs, sizes.DV)
    merge_kernel[work.of_pairs](
        *(scored.partial, selected, sliding, gates_of(work.call.gate_logits), work.lengths, o),
        *(scored.num_shares, constants(sizes)),
        *(config.score_shares, config.shares, config.sliding_shares),
        num_warps=max(SHARES_AT_ONCE.value * sizes.PADDED_DV // MERGED_BY_WARP, 1),
        **overlap(o.device),
    )
    return o


def nsa_decode(call: DecodeCall, config: DecodeConfig | None = None) -> Decoded:
    """o and the chosen blocks; config: other than the default."""
    q, pages = rows_contiguous(call.q), call.pages
    work = Work(
        *(call, q, rows_contiguous(call.lengths), rows_contiguous(pages.table)),
        *(rows_contiguous(pages.table_of_states), sizes_of(call)),
        config or default_config(q, pages.v, call.num_new),
    )
    scored = score(work)
    indices = choose(work, scored)
    return Decoded(merge(work, scored, *attend(work, indices)), indices)
