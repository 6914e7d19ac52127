"""Block divergence in Triton, on the host: what is computed in which order, chunk by chunk.

Results of pairs by block are larger than all other tensors, so queries are taken in chunks whose
results fit the workspace. A chunk is a range of rows, whatever sequences these belong to: every
kernel is launched for all tiles, and tiles outside of the chunk do nothing.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.ops.block_divergence.call import Divergence, DivergenceCall, DivergenceGradients
from nsa_fsa.ops.block_divergence.compare import Rule, compare_kernel, grade_kernel, subtract_kernel
from nsa_fsa.ops.block_divergence.gradients import (
    Graded,
    divergence_dk_kernel,
    divergence_dq_kernel,
)
from nsa_fsa.ops.block_divergence.weigh import (
    BlockTile,
    Joined,
    Logs,
    RowTile,
    Shape,
    block_tile,
    join_heads_kernel,
    shape_of,
    weigh_blocks_kernel,
)
from nsa_fsa.ops.common.bundles import constants, heads
from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.common.locate import Tiles, locate_rows, locate_tiles
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, rows_contiguous
from nsa_fsa.ops.common.tuning import fields, is_cramped, padded_width

TOKENS = Windows(1, 1)  # the windows of dense attention
ALIGNED_ROWS = 16  # A chunk has room for a multiple of so many queries.


@dataclass(frozen=True)
class TileSizes:
    """How the kernels cut their work: tiles of m pairs and n keys or windows."""

    weigh_m: int = 128
    weigh_n: int = 64
    weigh_warps: int = 8
    weigh_stages: int = 3
    dq_m: int = 64
    dq_n: int = 32
    dq_warps: int = 8
    dq_stages: int = 2
    dk_m: int = 64
    dk_n: int = 64
    dk_warps: int = 8
    dk_stages: int = 2
    rows: int = 32  # queries, or pairs, of the kernels that read results by block
    blocks: int = 16  # of a step of these

    # Queries are cut into parts for dk until there are so many programs, or until a part has no
    # more pairs than dk_part_pairs.
    dk_programs: int = 1056
    dk_part_pairs: int = 2048


class Side(NamedTuple):
    """Dense attention, or compressed attention."""

    k: Tensor
    lse: Tensor
    shape: Shape


class Chunk(NamedTuple):
    """Some query rows."""

    first_row: int
    end_row: int


class Inputs(NamedTuple):
    """What all chunks of a call share."""

    call: DivergenceCall
    sizes: TileSizes
    q: Tensor
    dense: Side
    compressed: Side
    rule: Rule
    positions: Tensor  # int32 [T], of every query in its sequence; -1 for none
    num_blocks: int  # of the longest sequence

    @property
    def num_kv_heads(self) -> int:
        return self.dense.k.shape[1]

    @property
    def row_tile(self) -> RowTile:
        return constants(RowTile(self.sizes.rows, self.sizes.blocks))

    def tiles(self, num_pairs: int) -> Tiles:
        """Tiles of so many pairs."""
        num_queries = num_pairs // self.call.group_size
        return locate_tiles(self.q.shape[0], self.call.sequences, num_queries)


class Workspace(NamedTuple):
    """What a chunk's kernels hand on: room for `rows` queries."""

    rows: int
    logs: Logs
    joined: Joined


def tile_sizes(q: Tensor, group_size: int) -> TileSizes:
    """The default for queries `[T, HQ, D]`; `make resources` shows that none spills."""
    width = padded_width(q, q)
    return _tile_sizes(q.dtype, width, next_power_of_2(group_size), is_cramped(q))


@functools.cache
def _tile_sizes(dtype: torch.dtype, width: int, group: int, cramped: bool) -> TileSizes:
    if dtype == torch.float32:
        # Without the matrix unit a thread holds whole rows of both factors of a product.
        m = max(16, group)  # a tile has whole groups
        return TileSizes(
            **fields("weigh", (m, 8, 2), n=16),
            **fields("dq", (m, 8, 2), n=16),
            **fields("dk", (16, 8, 2), n=16),
        )
    m = 128 if width <= 128 else 64
    return TileSizes(
        **fields("weigh", (max(m, group), 8, 3 if width <= 128 else 2), n=64),
        **fields("dq", (max(64, group), 8, 2), n=16 if width > 128 and cramped else 32),
        **fields("dk", (32, 8, 2), n=64 if width <= 128 else 32),
    )


def inputs_of(call: DivergenceCall, sizes: TileSizes | None) -> Inputs:
    (kernel_size, kernel_stride), (block_size, init, local) = call.windows, call.blocks
    q, k, k_cmp = (rows_contiguous(x) for x in (call.q, call.k, call.k_cmp))
    max_seqlen = min(call.sequences.max_seqlen, k.shape[0])
    # A block that is longer than every sequence is as good as one that just holds them.
    hops = next_power_of_2(cdiv(max_seqlen, kernel_stride) + kernel_size // kernel_stride)
    block_size = min(block_size, hops * kernel_stride)

    dense = Side(k, call.lse.float(), shape_of(q, k, TOKENS, block_size))
    compressed = Side(k_cmp, call.lse_cmp.float(), shape_of(q, k_cmp, call.windows, block_size))
    hops_of = (kernel_size // kernel_stride, block_size // kernel_stride)
    rule = Rule(block_size, kernel_stride, *hops_of, init, local, call.free_only, call.group_size)
    positions = locate_rows(q.shape[0], call.sequences, block_size)[0]
    sizes = sizes or tile_sizes(q, call.group_size)
    num_blocks = cdiv(max_seqlen, block_size)
    return Inputs(call, sizes, q, dense, compressed, constants(rule), positions, num_blocks)


def workspace_of(inputs: Inputs, num_bytes: int, numbers_per_pair: int = 0) -> Workspace:
    """As much as num_bytes allow, but room for a few queries at least, and at most for all.

    numbers_per_pair: that the caller makes besides, for every pair of the chunk.
    """
    num_rows, num_heads = inputs.q.shape[:2]
    num_kv_heads, group_size = inputs.num_kv_heads, inputs.call.group_size
    numbers = inputs.num_blocks * (2 * num_heads + 2 * num_kv_heads) + numbers_per_pair * num_heads
    most = max(num_bytes // (4 * numbers) // ALIGNED_ROWS * ALIGNED_ROWS, ALIGNED_ROWS)
    rows = cdiv(cdiv(num_rows, cdiv(num_rows, most)), ALIGNED_ROWS) * ALIGNED_ROWS

    def new(of_row: int) -> Tensor:
        shape = (2, num_kv_heads, inputs.num_blocks, rows * of_row)
        return inputs.q.new_empty(shape, dtype=torch.float32)

    return Workspace(rows, Logs(*new(group_size)), Joined(*new(1)))


def chunks_of(inputs: Inputs, workspace: Workspace) -> Iterator[Chunk]:
    num_rows = inputs.q.shape[0]
    for first_row in range(0, num_rows, workspace.rows):
        yield Chunk(first_row, min(first_row + workspace.rows, num_rows))


def weigh_blocks(
    inputs: Inputs, side: Side, logs: Tensor, tiles: Tiles, workspace: Workspace, chunk: Chunk
) -> None:
    """Writes what the chunk's pairs give to blocks."""
    sizes, q, group_size = inputs.sizes, inputs.q, inputs.call.group_size
    overlapping = int(side.shape.BLOCK_HOPS) + int(side.shape.WINDOW_HOPS) - 1
    tile = block_tile(overlapping, q, sizes.weigh_m, sizes.weigh_n, sizes.weigh_stages)
    weigh_blocks_kernel[(tiles.number, inputs.num_kv_heads)](
        *(heads(q), heads(side.k), heads(side.lse), logs, tiles.table),
        *(inputs.call.scale, inputs.num_blocks, workspace.rows * group_size, *chunk),
        *(tiles.number, q.shape[0], tiles.num_sequences),
        SHAPE=side.shape,
        TILE=tile,
        num_warps=sizes.weigh_warps,
    )


def join_heads(inputs: Inputs, workspace: Workspace, chunk: Chunk) -> None:
    """Writes what the chunk's queries and KV heads give to blocks."""
    sizes = inputs.sizes
    num_rows = chunk.end_row - chunk.first_row
    grid = (cdiv(num_rows, sizes.rows), cdiv(inputs.num_blocks, sizes.blocks), inputs.num_kv_heads)
    join_heads_kernel[grid](
        *(workspace.logs, workspace.joined, inputs.positions),
        *(inputs.num_blocks, workspace.rows, *chunk),
        COMPRESSED=inputs.compressed.shape,
        DENSE=inputs.dense.shape,
        TILE=inputs.row_tile,
    )


def joined_chunks(inputs: Inputs, workspace: Workspace) -> Iterator[Chunk]:
    """Every chunk in turn, with what its queries and KV heads give to blocks in the workspace."""
    tiles = inputs.tiles(inputs.sizes.weigh_m)
    for chunk in chunks_of(inputs, workspace):
        sides = (inputs.dense, inputs.compressed)
        for side, logs in zip(sides, workspace.logs, strict=True):
            weigh_blocks(inputs, side, logs, tiles, workspace, chunk)
        join_heads(inputs, workspace, chunk)
        yield chunk


def block_divergence(call: DivergenceCall, sizes: TileSizes | None = None) -> Divergence:
    """The divergence, the mass and the recall, each float32 `[T, HKV]`.

    sizes: other than the default.
    """
    shape = (call.q.shape[0], call.k.shape[1])
    if call.q.shape[0] == 0 or call.k.shape[0] == 0:
        zeros = call.q.new_zeros(shape, dtype=torch.float32)
        return Divergence(zeros, zeros.clone(), torch.full_like(zeros, torch.nan))
    results = Divergence(*(call.q.new_empty(shape, dtype=torch.float32) for _ in range(3)))

    inputs = inputs_of(call, sizes)
    workspace = workspace_of(inputs, call.workspace_bytes)
    indices = rows_contiguous(call.block_indices)
    for chunk in joined_chunks(inputs, workspace):
        num_rows = chunk.end_row - chunk.first_row
        compare_kernel[(cdiv(num_rows, inputs.sizes.rows), shape[1])](
            *(workspace.joined, inputs.positions, heads(indices), *results),
            *(indices.shape[2], inputs.num_blocks, workspace.rows, *chunk),
            RULE=inputs.rule,
            TILE=inputs.row_tile,
        )
    return results


class KeyCut(NamedTuple):
    """Programs of dk: a tile of windows of a head, and a part of a chunk's queries."""

    tile: BlockTile
    tiles: Tiles  # of whole blocks
    num_tiles: int  # of windows
    num_parts: int


def cut_keys(inputs: Inputs, num_bytes: int) -> KeyCut:
    """The programs of dk, whose sums take at most num_bytes or are those of a single part."""
    call, sizes, (k_cmp, _, shape) = inputs.call, inputs.sizes, inputs.compressed
    tile = block_tile(int(shape.BLOCK_HOPS), inputs.q, sizes.dk_m, sizes.dk_n, sizes.dk_stages)
    kernel_stride, num_windows = call.windows.kernel_stride, k_cmp.shape[0]
    tiles = locate_tiles(
        inputs.q.shape[0],
        call.sequences,
        int(tile.BLOCKS) * int(shape.BLOCK_HOPS) * kernel_stride,
        num_keys=num_windows * kernel_stride,
        hop=kernel_stride,
    )
    num_tiles = tiles.number * int(tile.PIECES)
    wanted = cdiv(sizes.dk_programs, max(num_tiles * inputs.num_kv_heads, 1))
    enough = cdiv(inputs.q.shape[0] * call.group_size, sizes.dk_part_pairs)
    fitting = num_bytes // max(4 * k_cmp.numel(), 1)
    return KeyCut(tile, tiles, num_tiles, max(min(wanted, enough, fitting), 1))


def block_divergence_backward(
    call: DivergenceCall, do: Tensor, sizes: TileSizes | None = None
) -> DivergenceGradients:
    """Gradients of q and k_cmp from the divergence's, `[T, HKV]`; see `block_divergence`."""
    q, k_cmp = call.q, call.k_cmp
    if q.shape[0] == 0 or call.k.shape[0] == 0:
        return DivergenceGradients(q.new_zeros(q.shape), k_cmp.new_zeros(k_cmp.shape))
    dq = q.new_empty(q.shape)

    inputs = inputs_of(call, sizes)
    cut = cut_keys(inputs, call.workspace_bytes // 4)
    sums = k_cmp.new_zeros((cut.num_parts, *k_cmp.shape), dtype=torch.float32)
    left = call.workspace_bytes - sums.nbytes
    workspace = workspace_of(inputs, left, numbers_per_pair=1)
    delta = sums.new_empty(inputs.num_kv_heads, workspace.rows, call.group_size)
    do, tiles = do.float().contiguous(), inputs.tiles(inputs.sizes.dq_m)
    for chunk in joined_chunks(inputs, workspace):
        grade_blocks(inputs, workspace, chunk, do, delta)
        graded = Graded(*workspace.joined, delta)
        launch_dq(inputs, graded, tiles, workspace, chunk, dq)
        launch_dk(inputs, graded, cut, workspace, chunk, sums)
    return DivergenceGradients(dq, sums.sum(0).to(k_cmp.dtype))


def grade_blocks(
    inputs: Inputs, workspace: Workspace, chunk: Chunk, do: Tensor, delta: Tensor
) -> None:
    """Writes gradients of block scores over the chunk's mass, and what softmax subtracts."""
    rows, group_size = inputs.sizes.rows, inputs.call.group_size
    num_rows, num_kv_heads = chunk.end_row - chunk.first_row, inputs.num_kv_heads
    sizes = (inputs.num_blocks, workspace.rows, *chunk)
    constants = dict(RULE=inputs.rule, TILE=inputs.row_tile)
    grade_kernel[(cdiv(num_rows, rows), num_kv_heads)](
        *(workspace.joined, inputs.positions, do, *sizes), **constants
    )
    subtract_kernel[(cdiv(num_rows * group_size, rows), num_kv_heads)](
        *(workspace.joined, workspace.logs.compressed, inputs.positions, delta, *sizes), **constants
    )


def launch_dq(
    inputs: Inputs, graded: Graded, tiles: Tiles, workspace: Workspace, chunk: Chunk, dq: Tensor
) -> None:
    """Writes dq of the chunk's queries."""
    q, (k_cmp, lse, shape), sizes = inputs.q, inputs.compressed, inputs.sizes
    divergence_dq_kernel[(tiles.number, inputs.num_kv_heads)](
        *(heads(q), heads(k_cmp), heads(lse), graded, dq, tiles.table),
        *(inputs.call.scale, inputs.num_blocks, q.shape[1], workspace.rows, *chunk),
        *(tiles.number, q.shape[0], tiles.num_sequences),
        SHAPE=shape,
        TILE=block_tile(int(shape.BLOCK_HOPS), q, sizes.dq_m, sizes.dq_n, sizes.dq_stages),
        num_warps=sizes.dq_warps,
    )


def launch_dk(
    inputs: Inputs, graded: Graded, cut: KeyCut, workspace: Workspace, chunk: Chunk, sums: Tensor
) -> None:
    """Adds dk of the chunk's queries to the sums of every part."""
    q, (k_cmp, lse, shape), sizes = inputs.q, inputs.compressed, inputs.sizes
    tile, tiles, num_tiles, num_parts = cut
    divergence_dk_kernel[(num_tiles, inputs.num_kv_heads, num_parts)](
        *(heads(q), heads(k_cmp), heads(lse), graded, sums, tiles.table),
        *(inputs.call.scale, inputs.num_blocks, workspace.rows),
        *(cdiv(chunk.end_row - chunk.first_row, num_parts), *chunk, sums.stride(0)),
        *(tiles.number, q.shape[0], tiles.num_sequences),
        SHAPE=shape,
        TILE=tile,
        num_warps=sizes.dk_warps,
    )
