"""The four launches of `nsa_decode`, and the memory between them."""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_fsa.decode.attend import attend_kernel, merge_kernel
from nsa_fsa.decode.call import DecodeCall, Decoded
from nsa_fsa.decode.paged import page_rows, paged, table_of
from nsa_fsa.decode.score import (
    BlockSums,
    Partial,
    ScoreTile,
    Sizes,
    score_kernel,
    shortlist_kernel,
)
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.primitives import LOG2_E
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, padded_dim, rows_contiguous
from nsa_fsa.ops.common.tuning import dot_precision
from nsa_fsa.ops.gated_combine.triton import gates_of

MERGED_BY_WARP = 2048  # numbers of a pair's shares that a warp holds
MOST_LISTS = 64  # of a query and KV head, all of which every share of it reads


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernels cut their work."""

    score_rows: int = 64  # pairs of a program at most
    score_windows: int = 64  # of a step
    score_shares: int = 32  # of a sequence at most
    score_least: int = 2  # steps of a share
    score_warps: int = 2
    score_stages: int = 2
    ranked: int = 1024  # blocks of all heads together, of a shortlist
    shortlist_warps: int = 4
    keys: int = 64  # of a step
    shares: int = 8  # of the blocks that a query reads
    window_shares: int = 4  # of its window
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
    shares = next_power_of_2(cdiv(2 * num_processors(q.device), num_kv_heads))
    config = DecodeConfig(score_shares=min(max(shares, 4), 32))
    if q.element_size() == 4:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        return dataclasses.replace(config, score_rows=16, score_warps=4, score_windows=16, keys=16)
    if q.shape[2] > 128:
        return dataclasses.replace(config, score_rows=32, score_warps=4, score_windows=32)
    return config


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


def new_partial(call: DecodeCall, shares: int) -> Partial:
    """What the shares of a branch leave, uninitialised."""
    shape = (*call.q.shape[:2], shares)
    of_shares = [call.q.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    o = call.q.new_empty(*shape, call.pages.v.shape[3], dtype=torch.float32)
    return Partial(o, *of_shares)


def nsa_decode(call: DecodeCall, config: DecodeConfig | None = None) -> Decoded:
    """o and the chosen blocks; config: other than the default."""
    q, pages, lengths = rows_contiguous(call.q), call.pages, call.lengths
    config = config or default_config(q, pages.k.shape[1])
    num_tokens, num_kv_heads, sizes = q.shape[0], pages.k.shape[1], sizes_of(call)
    num_blocks, scale = cdiv(pages.capacity, call.blocks.block_size), call.scale * LOG2_E
    table, of_states = table_of(pages.table), table_of(pages.table_of_states)
    size = constants(sizes)

    compressed = new_partial(call, config.score_shares)
    phases = next_power_of_2(sizes.BLOCK_HOPS)
    blocks_of_tile = max(config.score_windows // phases, 1)
    rows = min(max(next_power_of_2(sizes.NEW * sizes.G), 16), config.score_rows)
    tile = constants(
        ScoreTile(
            *(rows, blocks_of_tile, phases),
            *(config.score_shares, config.score_least, config.score_stages),
        )
    )
    pairs = (num_tokens, q.shape[1])
    own, following = (q.new_empty(*pairs, num_blocks, dtype=torch.float32) for _ in range(2))
    tiles = cdiv(num_blocks, blocks_of_tile)
    sums = BlockSums(own, following, q.new_empty(*pairs, tiles, dtype=torch.float32))
    tiles_of_pairs = cdiv(sizes.NEW * sizes.G, rows)
    score_kernel[(config.score_shares, num_kv_heads * tiles_of_pairs, lengths.shape[0])](
        *(heads(q), paged(pages.k_cmp), paged(pages.v_cmp), of_states, lengths),
        *(compressed, sums, scale, num_blocks, size, tile),
        num_warps=max(config.score_warps, rows // 16),
    )

    listed = max(next_power_of_2(sizes.NUM_SELECTED), 2)
    heads_of_group = next_power_of_2(sizes.G)
    least = next_power_of_2(cdiv(num_blocks, MOST_LISTS))
    chunk = max(config.ranked // heads_of_group, listed, least)
    lists = next_power_of_2(cdiv(num_blocks, chunk))
    shortlists = q.new_empty(num_tokens, num_kv_heads, lists, listed, dtype=torch.int64)
    shortlist_kernel[(lists, num_kv_heads, num_tokens)](
        *(sums, compressed, lengths, shortlists, num_blocks, size, tile),
        *(chunk, heads_of_group, listed),
        num_warps=config.shortlist_warps,
    )

    selected, sliding = (new_partial(call, x) for x in (config.shares, config.window_shares))
    indices = q.new_empty(num_tokens, num_kv_heads, sizes.NUM_SELECTED, dtype=torch.int32)
    attend_kernel[(config.shares + config.window_shares, num_kv_heads, num_tokens)](
        *(heads(q), paged(pages.k), paged(pages.v), table, lengths, shortlists, indices),
        *(selected, sliding, scale, size, max(next_power_of_2(sizes.G), 16)),
        *(config.keys, config.shares, config.window_shares, config.attend_stages, lists, listed),
        num_warps=config.attend_warps,
    )

    o = q.new_empty(*pairs, sizes.DV)
    shares = max(config.score_shares, config.shares)
    merge_kernel[pairs](
        *(compressed, selected, sliding, gates_of(call.gate_logits), lengths, o, size),
        *(config.score_shares, config.shares, config.window_shares),
        num_warps=max(shares * sizes.PADDED_DV // MERGED_BY_WARP, 1),
    )
    return Decoded(o, indices)
