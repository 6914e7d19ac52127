"""Where packed rows and blocks lie: the sequence descriptors, looked up once per call instead of in
every kernel.

Blocks of all sequences share one numbering that needs nothing read back from the device: block j of
sequence b has number `cu_seqlens[b] // block_size + b + j`. There is always room, because
`floor(x / n) + ceil(y / n) <= floor((x + y) / n) + 1`; numbers that no block owns have no rows.

The queries that share their own block are a run of rows. Runs are numbered by rows of queries in
the same way, but two numbers are set aside for every sequence instead of one, because the last
queries of a sequence may begin inside a block.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import aligned_rows, cdiv
from nsa_fsa.sequences import Sequences


class RowTable(NamedTuple):
    """Of every query row, int32 `[T]`: the rows of what `locate_rows` returns."""

    # Inside its sequence; of the last queries of a longer sequence where the keys lie in a cache.
    position: Tensor
    first_key: Tensor  # the row of its sequence's first key
    first_block: Tensor  # the number of its sequence's first block
    end_query: Tensor  # the row after its sequence's last query that has a position


class BlockTable(NamedTuple):
    """Of every block number, int32 `[num_blocks]`: the rows of what `locate_blocks` returns."""

    first_row: Tensor  # row of its first key
    # Keys in it: block_size, fewer at the end of a sequence, 0 for a number that no block owns.
    num_rows: Tensor
    number: Tensor  # inside its sequence
    first_query: Tensor  # row of its sequence's first query at or behind its first key
    end_query: Tensor  # the row after its sequence's last query that has a position
    # Row of the query at the position of its first key, or where that would be in front of the
    # sequence's first query.
    query_row: Tensor


class RunTable(NamedTuple):
    """Of every run of queries that share their own block, int32 `[num_runs]`: the rows of what
    `locate_runs` returns."""

    first_query: Tensor
    num_queries: Tensor  # 0 for a number that no run owns
    # Of the own block inside its sequence, less than 0 for queries that stand before every key.
    number: Tensor
    first_key: Tensor  # row of the own block's first key
    end_key: Tensor  # the row after the own block's last key in use


class NeighbourTable(NamedTuple):
    """Of every tile of neighbouring queries, int32 `[num_tiles]`: the rows of what
    `locate_neighbours` returns."""

    first_query: Tensor  # row of the tile's first query
    num_queries: Tensor  # of the tile; 0 for a number that no tile owns
    position: Tensor  # of the first query; less than 0 where it stands before every key
    first_key: Tensor  # the row of the sequence's first key
    num_keys: Tensor  # of the sequence, in use; queries from this position on see nothing


class Tile(NamedTuple):
    """A tile of queries or keys, and its sequence: a column of the table of `locate_tiles`."""

    number: Any  # of the tile inside its sequence
    first_query: Any  # row of the sequence's first query
    num_queries: Any  # of the sequence; 0 for a number that no tile owns
    offset: Any  # position of the sequence's first query
    first_key: Any  # row of the sequence's first key, in tokens
    num_keys: Any  # of the sequence, in tokens


class Tiles(NamedTuple):
    """How sequences are cut into tiles."""

    # int32 [6, number], whose columns are `Tile`s. None for sequences of one length, whose tiles
    # `load_tile` works out: that saves three launches where a kernel takes no longer than the host
    # does to launch it.
    table: Tensor | None
    number: int
    num_sequences: int  # without a table; with one it does not matter, and is 1


class Boundaries(NamedTuple):
    """The tensors of `Sequences`, int32; in a kernel, pointers to them."""

    cu_seqlens: Tensor  # [B + 1], of the keys
    # [B + 1], of queries that are the last positions of their sequences.
    cu_seqlens_q: Tensor | None
    seqused_k: Tensor | None  # [B]


class Extent(NamedTuple):
    """Where a sequence lies, in a kernel."""

    first_key: Any  # row
    num_keys: Any  # in use
    first_query: Any  # row
    end_query: Any  # the row after the last query that has a position
    offset: Any  # position of the first query


@triton.jit
def find_sequence(starts_ptr, value, num_sequences, num_steps, divisor, step: tl.constexpr):
    """The last sequence b with `starts[b] // divisor + b * step <= value`, by bisection.

    Empty sequences end up before it.
    """
    low = value * 0
    high = low + num_sequences
    for _ in range(num_steps):
        middle = (low + high) // 2
        ahead = tl.load(starts_ptr + middle) // divisor + middle * step > value
        high = tl.where(ahead, middle, high)
        low = tl.where(ahead, low, middle)
    return low


@triton.jit
def load_extent(bounds, sequence):
    """Where a sequence lies."""
    first_key = tl.load(bounds.cu_seqlens + sequence)
    if bounds.seqused_k is None:
        num_keys = tl.load(bounds.cu_seqlens + sequence + 1) - first_key
    else:
        num_keys = tl.load(bounds.seqused_k + sequence)
    if bounds.cu_seqlens_q is None:
        first_query, end_query, offset = first_key, first_key + num_keys, first_key * 0
    else:
        first_query = tl.load(bounds.cu_seqlens_q + sequence)
        end_query = tl.load(bounds.cu_seqlens_q + sequence + 1)
        offset = num_keys - (end_query - first_query)
    return Extent(first_key, num_keys, first_query, end_query, offset)


@kernel
def locate_rows_kernel(
    bounds, table, num_rows, num_sequences, num_steps, block_size, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < num_rows
    starts_ptr = bounds.cu_seqlens if bounds.cu_seqlens_q is None else bounds.cu_seqlens_q
    known_row = tl.where(inside, row, 0)
    sequence = find_sequence(starts_ptr, known_row, num_sequences, num_steps, 1, 0)
    extent = load_extent(bounds, sequence)
    position = extent.offset + row - extent.first_query
    # A row past the used ones sees nothing.
    position = tl.where(row < extent.end_query, position, -1)

    tl.store(table.position + row, position, mask=inside)
    tl.store(table.first_key + row, extent.first_key, mask=inside)
    tl.store(table.first_block + row, extent.first_key // block_size + sequence, mask=inside)
    tl.store(table.end_query + row, extent.end_query, mask=inside)


@kernel
def locate_blocks_kernel(
    bounds, table, num_blocks, num_sequences, num_steps, block_size, COLUMNS: tl.constexpr
):
    block = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = block < num_blocks
    known_block = tl.where(inside, block, 0)
    sequence = find_sequence(
        bounds.cu_seqlens, known_block, num_sequences, num_steps, block_size, 1
    )
    extent = load_extent(bounds, sequence)
    index = block - (extent.first_key // block_size + sequence)
    first_position = index * block_size
    num_rows = tl.minimum(tl.maximum(extent.num_keys - first_position, 0), block_size)
    query_row = extent.first_query + first_position - extent.offset
    first_query = tl.maximum(query_row, extent.first_query)

    tl.store(table.first_row + block, extent.first_key + first_position, mask=inside)
    tl.store(table.num_rows + block, num_rows, mask=inside)
    tl.store(table.number + block, index, mask=inside)
    tl.store(table.first_query + block, first_query, mask=inside)
    tl.store(table.end_query + block, extent.end_query, mask=inside)
    tl.store(table.query_row + block, query_row, mask=inside)


@kernel
def locate_runs_kernel(
    bounds, table, num_runs, num_sequences, num_steps, block_size, COLUMNS: tl.constexpr
):
    run = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = run < num_runs
    starts_ptr = bounds.cu_seqlens if bounds.cu_seqlens_q is None else bounds.cu_seqlens_q
    known_run = tl.where(inside, run, 0)
    sequence = find_sequence(starts_ptr, known_run, num_sequences, num_steps, block_size, 2)
    extent = load_extent(bounds, sequence)
    num_rows = tl.load(starts_ptr + sequence + 1) - extent.first_query

    # Division rounds to zero, and the first query may stand before every key: there are at most as
    # many blocks before the first one as `ahead`.
    ahead = num_rows // block_size + 1
    first_number = (extent.offset + ahead * block_size) // block_size - ahead
    number = first_number + run - (extent.first_query // block_size + 2 * sequence)
    position = number * block_size
    first = tl.maximum(position - extent.offset, 0)
    end = tl.minimum(position + block_size - extent.offset, num_rows)
    end_position = tl.minimum(position + block_size, extent.num_keys)

    tl.store(table.first_query + run, extent.first_query + first, mask=inside)
    tl.store(table.num_queries + run, tl.maximum(end - first, 0), mask=inside)
    tl.store(table.number + run, number, mask=inside)
    tl.store(table.first_key + run, extent.first_key + position, mask=inside)
    tl.store(table.end_key + run, extent.first_key + end_position, mask=inside)


@kernel
def locate_neighbours_kernel(
    bounds, table, num_tiles, num_sequences, num_steps, tile_rows, COLUMNS: tl.constexpr
):
    tile = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = tile < num_tiles
    starts_ptr = bounds.cu_seqlens if bounds.cu_seqlens_q is None else bounds.cu_seqlens_q
    known_tile = tl.where(inside, tile, 0)
    sequence = find_sequence(starts_ptr, known_tile, num_sequences, num_steps, tile_rows, 1)
    extent = load_extent(bounds, sequence)
    first = (tile - (extent.first_query // tile_rows + sequence)) * tile_rows
    num_rows = tl.load(starts_ptr + sequence + 1) - extent.first_query
    num_queries = tl.maximum(tl.minimum(num_rows - first, tile_rows), 0)

    tl.store(table.first_query + tile, extent.first_query + first, mask=inside)
    tl.store(table.num_queries + tile, num_queries, mask=inside)
    tl.store(table.position + tile, extent.offset + first, mask=inside)
    tl.store(table.first_key + tile, extent.first_key, mask=inside)
    tl.store(table.num_keys + tile, extent.num_keys, mask=inside)


@kernel
def locate_tiles_kernel(
    bounds,
    tiles_ptr,
    work_ptr,
    num_tiles,
    num_sequences,
    num_steps,
    tile_rows,
    OF_KEYS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The tiles in the order of their sequences, and the work that each of them is, or -1."""
    CACHED: tl.constexpr = bounds.cu_seqlens_q is not None
    number = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = number < num_tiles
    queries_ptr = bounds.cu_seqlens_q if CACHED else bounds.cu_seqlens
    starts_ptr = bounds.cu_seqlens if OF_KEYS else queries_ptr
    known_number = tl.where(inside, number, 0)
    sequence = find_sequence(starts_ptr, known_number, num_sequences, num_steps, tile_rows, 1)
    index = number - (tl.load(starts_ptr + sequence) // tile_rows + sequence)

    first_query = tl.load(queries_ptr + sequence)
    first_key = tl.load(bounds.cu_seqlens + sequence)
    num_queries = tl.load(queries_ptr + sequence + 1) - first_query
    num_keys = tl.load(bounds.cu_seqlens + sequence + 1) - first_key
    if bounds.seqused_k is not None:
        num_keys = tl.load(bounds.seqused_k + sequence)
    offset = num_keys - num_queries if CACHED else num_keys * 0
    owned = index * tile_rows < (num_keys if OF_KEYS else num_queries)

    tl.store(tiles_ptr + number, index, mask=inside)
    tl.store(tiles_ptr + num_tiles + number, first_query, mask=inside)
    tl.store(tiles_ptr + 2 * num_tiles + number, tl.where(owned, num_queries, 0), mask=inside)
    tl.store(tiles_ptr + 3 * num_tiles + number, offset, mask=inside)
    tl.store(tiles_ptr + 4 * num_tiles + number, first_key, mask=inside)
    tl.store(tiles_ptr + 5 * num_tiles + number, num_keys, mask=inside)
    work = num_keys - index * tile_rows if OF_KEYS else offset + index * tile_rows
    tl.store(work_ptr + number, tl.where(owned, work, -1), mask=inside)


@triton.jit
def load_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, OF_KEYS: tl.constexpr):
    """The `number`-th tile as a `Tile`, of those of `locate_tiles`.

    Without a table the num_sequences sequences, of num_rows rows together, are alike. Their tiles
    are in the order that a table has.
    """
    nth = number // num_sequences
    index = nth if OF_KEYS else num_tiles // num_sequences - 1 - nth
    length = num_rows // num_sequences
    start = number % num_sequences * length
    first_query, num_queries, offset, first_key, num_keys = start, length, start * 0, start, length
    if tiles_ptr is not None:  # and no early return: what follows one is compiled too
        tiles_ptr += number
        index, first_query = tl.load(tiles_ptr), tl.load(tiles_ptr + num_tiles)
        num_queries, offset = tl.load(tiles_ptr + 2 * num_tiles), tl.load(tiles_ptr + 3 * num_tiles)
        first_key, num_keys = tl.load(tiles_ptr + 4 * num_tiles), tl.load(tiles_ptr + 5 * num_tiles)
    return Tile(index, first_query, num_queries, offset, first_key, num_keys)


@triton.jit
def load_query_tile(
    tiles_ptr, num_tiles, number, num_rows, num_sequences, TILE_QUERIES: tl.constexpr
):
    """The same for tiles of TILE_QUERIES queries. first_query, num_queries and offset are those of
    the tile itself instead of its sequence: the number may be 0 or less.
    """
    tile = load_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, False)
    first = tile.number * TILE_QUERIES
    num_queries = tl.minimum(tile.num_queries - first, TILE_QUERIES)
    first_query, position = tile.first_query + first, tile.offset + first
    return Tile(tile.number, first_query, num_queries, position, tile.first_key, tile.num_keys)


@triton.jit
def count_windows(num_keys, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """How many compressed tokens a sequence of num_keys tokens has."""
    return tl.maximum(num_keys - KERNEL_SIZE + KERNEL_STRIDE, 0) // KERNEL_STRIDE


def max_num_blocks(num_rows: int, num_sequences: int, block_size: int) -> int:
    """How many block numbers a packed batch needs at most."""
    return num_rows // block_size + num_sequences


def locate_rows(num_rows: int, sequences: Sequences, block_size: int) -> Tensor:
    """`[4, num_rows]`, read as `RowTable(*found)`, of so many queries."""
    return _located(locate_rows_kernel, RowTable, num_rows, sequences, block_size)


def locate_blocks(num_rows: int, sequences: Sequences, block_size: int) -> Tensor:
    """`[6, num_blocks]`, read as `BlockTable(*found)`, of a batch of `num_rows` keys."""
    number = max_num_blocks(num_rows, sequences.cu_seqlens.shape[0] - 1, block_size)
    return _located(locate_blocks_kernel, BlockTable, number, sequences, block_size)


def locate_runs(num_rows: int, sequences: Sequences, block_size: int) -> Tensor:
    """`[5, num_runs]`, read as `RunTable(*found)`, of a batch of `num_rows` queries."""
    number = num_rows // block_size + 2 * (sequences.cu_seqlens.shape[0] - 1)
    return _located(locate_runs_kernel, RunTable, number, sequences, block_size)


def locate_neighbours(num_rows: int, sequences: Sequences, tile_rows: int) -> Tensor:
    """`[5, num_tiles]`, read as `NeighbourTable(*found)`: every sequence's queries, of which there
    are num_rows in all, in tiles of tile_rows neighbours from its first one on. So a tile belongs
    to one sequence, and is the same in any company."""
    number = max_num_blocks(num_rows, sequences.cu_seqlens.shape[0] - 1, tile_rows)
    return _located(locate_neighbours_kernel, NeighbourTable, number, sequences, tile_rows)


def _located(
    locate_kernel: Any,
    kind: type[RowTable | BlockTable | RunTable | NeighbourTable],
    number: int,
    sequences: Sequences,
    size: int,
) -> Tensor:
    """A table of a kind, of `number` columns, which the kernel fills. size: of blocks or tiles."""
    cu_seqlens, _, cu_seqlens_q, seqused_k = sequences
    num_sequences = cu_seqlens.shape[0] - 1
    rows, columns = len(kind._fields), 256
    found = aligned_rows(rows, number, dtype=torch.int32, device=cu_seqlens.device)
    if number:
        locate_kernel[(cdiv(number, columns),)](
            *(Boundaries(cu_seqlens, cu_seqlens_q, seqused_k), kind(*found)),
            *(number, num_sequences, num_sequences.bit_length(), size),
            COLUMNS=columns,
        )
    return found


def locate_tiles(
    num_rows: int, sequences: Sequences, tile_rows: int, num_keys: int | None = None, hop: int = 1
) -> Tiles:
    """Cuts sequences into tiles of `tile_rows` queries, or keys.

    Tiles with the most work come first: those of the last queries, which see the most keys, or of
    the first keys, which are seen by the most queries.

    Args:
        num_rows: rows of the packed queries.
        num_keys: rows of the packed keys, where these are cut and not the queries.
        hop: successive keys that make one row of what is read, such as a window; fewer make none.
    """
    of_keys = num_keys is not None
    cu_seqlens, _, cu_seqlens_q, seqused_k = sequences
    num_sequences = cu_seqlens.shape[0] - 1
    length = sequences.common_length(num_rows)
    if length is not None:
        number = num_sequences * cdiv(length // hop * hop, tile_rows)
        return Tiles(None, number, num_sequences)

    num_cut = num_rows if num_keys is None else num_keys
    num_tiles = max_num_blocks(num_cut, num_sequences, tile_rows)
    table = torch.empty(6, num_tiles, dtype=torch.int32, device=cu_seqlens.device)
    work = torch.empty(num_tiles, dtype=torch.int32, device=cu_seqlens.device)

    if num_tiles and num_sequences:
        of_program = 128
        locate_tiles_kernel[(cdiv(num_tiles, of_program),)](
            *(Boundaries(cu_seqlens, cu_seqlens_q, seqused_k), table, work),
            *(num_tiles, num_sequences, num_sequences.bit_length(), tile_rows),
            OF_KEYS=of_keys,
            TILES=of_program,
        )
        table = table.index_select(1, work.sort(descending=True, stable=True).indices)
    return Tiles(table, num_tiles, 1)
