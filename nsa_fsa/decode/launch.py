"""The four launches of `nsa_decode`, and the memory between them."""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_fsa.decode.attend import attend_kernel, merge_kernel
from nsa_fsa.decode.call import DecodeCall, Decoded
from nsa_fsa.decode.choose import AT_ONCE, choose_kernel
from nsa_fsa.decode.paged import page_rows, paged, table_of, units_of
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

    # What a sequence's shares are does not depend on how many there can be.
    phases = next_power_of_2(sizes.BLOCK_HOPS)
    blocks_of_tile = max(config.score_windows // phases, 1)
    tiles = cdiv(num_blocks, blocks_of_tile)
    rows = min(max(next_power_of_2(sizes.NEW * sizes.G), 16), config.rows)
    tile = constants(
        ScoreTile(
            *(rows, blocks_of_tile, phases),
            *(config.score_shares, config.score_least, config.score_stages),
        )
    )
    score_shares = min(config.score_shares, cdiv(tiles, config.score_least))
    compressed = new_partial(call, score_shares)
    pairs, of_groups = (num_tokens, q.shape[1]), (num_tokens, num_kv_heads)
    own, last = (q.new_empty(*pairs, num_blocks, dtype=torch.float32) for _ in range(2))
    sums = BlockSums(own, last, q.new_empty(*pairs, tiles, dtype=torch.float32))
    finished = q.new_empty(of_groups, dtype=torch.int32)
    tiles_of_pairs = cdiv(sizes.NEW * sizes.G, rows)
    score_kernel[(score_shares, num_kv_heads * tiles_of_pairs, lengths.shape[0])](
        *(heads(q), paged(pages.k_cmp), paged(pages.v_cmp), of_states, lengths),
        *(compressed, sums, finished, scale, num_blocks),
        *(size, constants(units_of(pages.k_cmp, pages.v_cmp)), tile),
        num_warps=max(config.score_warps, rows // 16),
    )

    listed = max(next_power_of_2(sizes.NUM_SELECTED), 2)
    heads_of_group = next_power_of_2(sizes.G)
    least = next_power_of_2(cdiv(num_blocks * listed, MOST_LISTED))
    chunk = max(config.ranked // heads_of_group, listed, least, blocks_of_tile)
    lists = next_power_of_2(cdiv(num_blocks, chunk))
    indices = q.new_empty(*of_groups, sizes.NUM_SELECTED, dtype=torch.int32)
    choose_kernel[(cdiv(num_blocks, chunk), num_kv_heads, num_tokens)](
        *(sums, compressed, lengths, q.new_empty(*of_groups, lists, listed, dtype=torch.int64)),
        *(finished, indices, num_blocks, score_shares, size, tile),
        *(chunk, heads_of_group, lists, listed),
        num_warps=config.choose_warps,
    )

    selected, sliding = (new_partial(call, x) for x in (config.shares, config.window_shares))
    rows_of_group = max(heads_of_group, 16)
    attend_kernel[(config.shares + config.window_shares, num_kv_heads, num_tokens)](
        *(heads(q), paged(pages.k), paged(pages.v), table, lengths, indices, selected, sliding),
        *(scale, size, constants(units_of(pages.k, pages.v))),
        *(rows_of_group, max(rows_of_group, rows), config.keys),
        *(config.shares, config.window_shares, config.attend_stages),
        num_warps=config.attend_warps,
    )

    o = q.new_empty(*pairs, sizes.DV)
    merge_kernel[pairs](
        *(compressed, selected, sliding, gates_of(call.gate_logits), lengths, o, score_shares),
        *(size, config.shares, config.window_shares),
        num_warps=max(AT_ONCE.value * sizes.PADDED_DV // MERGED_BY_WARP, 1),
    )
    return Decoded(o, indices)
