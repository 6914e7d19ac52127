"""Which rows and windows a tile consists of, and who sees what: the plain kernels and those for
Hopper share it.

In a kernel WINDOWS is the call's `Windows`, as a constant, and G the number of query heads
of a KV head.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.locate import load_tile
from nsa_fsa.ops.common.primitives import load_rows
from nsa_fsa.ops.common.sizes import padded_dim


class Shape(NamedTuple):
    """The heads as constants of the kernels; padded widths are powers of two."""

    G: int  # query heads of a KV head
    D: int  # width of queries and keys
    PADDED_D: int
    DV: int  # width of values
    PADDED_DV: int


class QueryTile(NamedTuple):
    """Neighbouring queries of one sequence, and what they see."""

    first_query: Any  # row of the first
    position: Any  # of the first, inside its sequence
    num_queries: Any  # none for a number that no tile owns
    first_window: Any  # row of the sequence's first compressed token
    num_keys: Any  # of the sequence, in tokens
    num_windows: Any  # compressed tokens of the sequence
    most: Any  # windows that some of the queries see
    least: Any  # windows that all of them see


class KeyTileWork(NamedTuple):
    """What one program of dk and dv takes."""

    tile: Any  # of windows, numbered in the order in which `load_tile` counts
    head: Any  # KV head
    part: Any  # of the rows that see the tile


class SeenBy(NamedTuple):
    """The (query, head) pairs of a sequence that see a tile of windows; they are counted from the
    sequence's first query.
    """

    # The first to see the tile's first window; negative where a query before all of them would.
    first: Any
    begin: Any  # of the pairs of a part
    end: Any


class Rows(NamedTuple):
    """(query, head) pairs of one KV head."""

    query: Any  # row of q, int64
    head: Any  # of the query heads, int64
    inside: Any  # whether there is such a row


def shape_of(q: Tensor, v: Tensor) -> Shape:
    """The heads of q `[T, HQ, D]` and v `[T, HKV, DV]`."""
    (num_heads, head_dim), (num_kv_heads, v_dim) = q.shape[1:], v.shape[1:]
    return Shape(
        num_heads // num_kv_heads, head_dim, padded_dim(head_dim), v_dim, padded_dim(v_dim)
    )


def window_constant(window_size: int | None, group_size: int) -> int:
    """What kernels take as WINDOW: 0 for none, and no number that overflows when it is
    counted in rows.
    """
    return min(window_size or 0, (1 << 30) // group_size)


@triton.jit
def count_windows(num_keys, WINDOWS: tl.constexpr):
    """How many compressed tokens a sequence has."""
    return tl.maximum(
        (num_keys - WINDOWS.kernel_size + WINDOWS.kernel_stride) // WINDOWS.kernel_stride, 0
    )


@triton.jit
def visible_windows(position, num_keys, num_windows, WINDOWS: tl.constexpr):
    """How many compressed tokens a position sees: those that a sequence would have
    which ended here.
    """
    seen = (position + 1 - WINDOWS.kernel_size + WINDOWS.kernel_stride) // WINDOWS.kernel_stride
    return tl.where(position < num_keys, tl.minimum(tl.maximum(seen, 0), num_windows), 0)


@triton.jit
def is_seen(window, visible, WINDOW: tl.constexpr):
    """Which compressed tokens rows see, `[rows, windows]`: the first `visible`, and with a WINDOW
    the last so many of these.
    """
    seen = window[None, :] < visible[:, None]
    if WINDOW > 0:
        seen = seen & (window[None, :] >= (visible - WINDOW)[:, None])
    return seen


@triton.jit
def query_tile(
    tiles_ptr,
    num_tiles,
    number,
    num_rows,
    num_sequences,
    WINDOWS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
):
    """The tile that is the `number`-th to be computed, as a `QueryTile`."""
    ALIKE: tl.constexpr = tiles_ptr is None
    tile = load_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, False, ALIKE)
    first = tile.number * TILE_QUERIES
    num_queries = tl.minimum(tile.num_queries - first, TILE_QUERIES)
    num_keys, num_windows = tile.num_keys, count_windows(tile.num_keys, WINDOWS)
    position = tile.offset + first
    last = position + num_queries - 1

    most = visible_windows(tl.minimum(last, num_keys - 1), num_keys, num_windows, WINDOWS)
    least = tl.where(last < num_keys, visible_windows(position, num_keys, num_windows, WINDOWS), 0)
    return QueryTile(
        tile.first_query + first,
        position,
        num_queries,
        tile.first_key // WINDOWS.kernel_stride,
        num_keys,
        num_windows,
        most,
        least,
    )


@triton.jit
def key_tile_work(num_tiles, HEADS: tl.constexpr):
    """What this program of dk and dv takes, as `KeyTileWork`.

    HEADS heads at a time are done, the longest tiles of all of them first: few long ones run at the
    end, and what these read is shared. The last parts come first, because every tile's windows are
    seen by the last rows.
    """
    at = tl.program_id(0) % (num_tiles * HEADS)
    head = tl.program_id(0) // (num_tiles * HEADS) * HEADS + at % HEADS
    return KeyTileWork(at // HEADS, head, tl.num_programs(1) - 1 - tl.program_id(1))


@triton.jit
def rows_that_see(tile, first_window, part, part_rows, WINDOWS: tl.constexpr, G: tl.constexpr):
    """The rows of a part that see some of a tile's windows, of which first_window is the first,
    as `SeenBy`.
    """
    first = (first_window * WINDOWS.kernel_stride + WINDOWS.kernel_size - 1 - tile.offset) * G
    begin = tl.maximum(tl.maximum(first, 0), part * part_rows)
    end = tl.minimum(
        tl.minimum(tile.num_queries, tile.num_keys - tile.offset) * G, (part + 1) * part_rows
    )
    return SeenBy(first, begin, end)


@triton.jit
def rows_of(row, inside, first_query, head, G: tl.constexpr):
    """The (query, head) pairs that lie `row` pairs after the first of the KV head
    `head`, as `Rows`.
    """
    return Rows((first_query + row // G).to(tl.int64), head * G + row % G, inside)


@triton.jit
def load_heads(x, rows, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """The rows of x, which is `Heads`: `[M, PADDED_DIM]`."""
    at = rows.query * x.stride_t + rows.head * x.stride_h
    return load_rows(x.ptr, at, rows.inside, DIM, PADDED_DIM, True)
