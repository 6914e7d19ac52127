"""Which pairs and windows a tile consists of, and who sees what: the plain kernels and those for
Hopper share it. In a kernel SHAPE is the call's `Shape`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.bundles import Heads, Pairs, constants
from nsa_fsa.ops.common.locate import count_windows, load_query_tile
from nsa_fsa.ops.common.sizes import widths
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall


class Shape(NamedTuple):
    """What the kernels know of the call, as constants; padded widths are powers of two."""

    G: Any  # query heads of a KV head
    D: Any  # width of queries and keys
    PADDED_D: Any
    DV: Any  # width of values
    PADDED_DV: Any
    KERNEL_SIZE: Any
    KERNEL_STRIDE: Any
    WINDOW_SIZE: Any  # of the sliding window; 0 for none


class Tile(NamedTuple):
    """What a program of a plain kernel works on at a time."""

    BLOCK_M: Any  # pairs
    BLOCK_N: Any  # windows
    NUM_STAGES: Any
    PRECISION: Any


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
    part: Any  # of the pairs that see the tile


class SeenBy(NamedTuple):
    """The pairs of a sequence that see a tile of windows, counted from its first query."""

    # The first to see the tile's first window; negative where a query before all of them would.
    first: Any
    begin: Any  # of the pairs of a part
    end: Any


def shape_of(call: WindowedCall, q: Tensor, v: Tensor) -> Shape:
    """The constants of a call, of which q `[T, HQ, D]` and v `[T, HKV, DV]` may be some heads."""
    # No number that overflows when it is counted in pairs.
    window_size = min(call.window_size or 0, (1 << 30) // call.group_size)
    return constants(Shape(call.group_size, *widths(q, v), *call.windows, window_size))


@triton.jit
def visible_windows(position, num_keys, num_windows, SHAPE: tl.constexpr):
    """How many compressed tokens a position sees: those of a sequence that ends with it."""
    seen = (position + 1 - SHAPE.KERNEL_SIZE + SHAPE.KERNEL_STRIDE) // SHAPE.KERNEL_STRIDE
    return tl.where(position < num_keys, tl.minimum(tl.maximum(seen, 0), num_windows), 0)


@triton.jit
def is_seen(window, visible, SHAPE: tl.constexpr):
    """Which compressed tokens pairs see, `[pairs, windows]`: the first `visible`, and of these the
    last WINDOW_SIZE if there is a sliding window.
    """
    seen = window[None, :] < visible[:, None]
    if SHAPE.WINDOW_SIZE > 0:
        seen = seen & (window[None, :] >= (visible - SHAPE.WINDOW_SIZE)[:, None])
    return seen


@triton.jit
def query_tile(
    tiles_ptr, num_tiles, nth, num_rows, num_sequences, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The nth tile to be computed, of BLOCK_M pairs, as a `QueryTile`."""
    TILE_QUERIES: tl.constexpr = BLOCK_M // SHAPE.G
    tile = load_query_tile(tiles_ptr, num_tiles, nth, num_rows, num_sequences, TILE_QUERIES)
    position, num_queries, num_keys = tile.offset, tile.num_queries, tile.num_keys
    num_windows = count_windows(num_keys, SHAPE.KERNEL_SIZE, SHAPE.KERNEL_STRIDE)
    last = position + num_queries - 1

    most = visible_windows(tl.minimum(last, num_keys - 1), num_keys, num_windows, SHAPE)
    least = tl.where(last < num_keys, visible_windows(position, num_keys, num_windows, SHAPE), 0)
    first_window = tile.first_key // SHAPE.KERNEL_STRIDE
    return QueryTile(
        tile.first_query, position, num_queries, first_window, num_keys, num_windows, most, least
    )


@triton.jit
def pairs_of_tile(tile, head, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The pairs of a `QueryTile` and a KV head, and how many windows each of them sees."""
    pair = tl.arange(0, BLOCK_M)
    inside = pair < tile.num_queries * SHAPE.G
    position = tile.position + pair // SHAPE.G
    visible = visible_windows(position, tile.num_keys, tile.num_windows, SHAPE)
    return pairs_of(pair, inside, tile.first_query, head, SHAPE.G), visible


@triton.jit
def windows_of_tile(x, tile, head):
    """The compressed tokens of a `QueryTile` and a KV head in x, which is `Heads`."""
    first_window = tile.first_window.to(tl.int64)
    ptr = x.ptr + first_window * x.stride_t + head.to(tl.int64) * x.stride_h
    return Heads(ptr, x.stride_t, x.stride_h)


@triton.jit
def key_tile_work(num_tiles, HEADS: tl.constexpr):
    """What this program of dk and dv takes, as `KeyTileWork`.

    HEADS heads at a time are done, the longest tiles of all of them first: few long ones run at the
    end, and what these read is shared. The last parts come first, because every tile's windows are
    seen by the last queries.
    """
    at = tl.program_id(0) % (num_tiles * HEADS)
    head = tl.program_id(0) // (num_tiles * HEADS) * HEADS + at % HEADS
    return KeyTileWork(at // HEADS, head, tl.num_programs(1) - 1 - tl.program_id(1))


@triton.jit
def pairs_that_see(tile, first_window, part, part_rows, SHAPE: tl.constexpr):
    """The pairs of a part that see a tile's windows from first_window on, as `SeenBy`."""
    G: tl.constexpr = SHAPE.G
    first = (first_window * SHAPE.KERNEL_STRIDE + SHAPE.KERNEL_SIZE - 1 - tile.offset) * G
    begin = tl.maximum(tl.maximum(first, 0), part * part_rows)
    end = tl.minimum(
        tl.minimum(tile.num_queries, tile.num_keys - tile.offset) * G, (part + 1) * part_rows
    )
    return SeenBy(first, begin, end)


@triton.jit
def pairs_of(pair, inside, first_query, head, G: tl.constexpr):
    """The pairs that lie `pair` behind the first one of first_query and the KV head `head`."""
    return Pairs((first_query + pair // G).to(tl.int64), head * G + pair % G, inside)
