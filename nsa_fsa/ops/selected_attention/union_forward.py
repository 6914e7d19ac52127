"""Selected attention, forward, of tiles that go by the unions of their blocks (`unions.py`).

A program takes such tiles in turn. It holds the pairs of a tile and of one KV head, walks the
blocks of the union, and writes o and lse once. A block that a query did not choose is left out by
one number of each pair, which is -inf then, and so costs nothing for each key; only blocks that may
have keys behind a query, which are the last ones, need a mask.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import Heads, constants, heads
from nsa_fsa.ops.common.calls import AttentionResult
from nsa_fsa.ops.common.locate import NeighbourTable
from nsa_fsa.ops.common.primitives import LOG2_E, dot_keys, kernel, load_rows
from nsa_fsa.ops.common.sizes import rows_contiguous, widths
from nsa_fsa.ops.common.windowed_attention.forward import num_multiprocessors
from nsa_fsa.ops.common.windowed_attention.heads import load_keys, store_attended
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.unions import FoundUnions, tile_of_neighbours

PROGRAMS = 8  # a multiprocessor, which run a tile after the other


class UnionShape(NamedTuple):
    """What the kernels know of the call; padded widths are powers of two."""

    G: Any  # query heads of a KV head
    D: Any
    PADDED_D: Any
    DV: Any
    PADDED_DV: Any
    BLOCK_SIZE: Any


class UnionTile(NamedTuple):
    """What a program of the plain kernel works on at a time."""

    PAIRS: Any
    QUERIES: Any  # which are the pairs, and maybe fewer
    KEYS: Any  # of a step
    NUM_STAGES: Any
    PRECISION: Any


class Neighbours(NamedTuple):
    """A tile of neighbouring queries of a KV head, in a kernel."""

    head: Any  # KV head
    first_query: Any  # row
    num_queries: Any
    position: Any  # of the first query
    first_key: Any  # row of the sequence's first key
    num_keys: Any  # of the sequence
    place: Any  # of the tile's first block among all tiles'
    num_blocks: Any
    num_whole: Any  # blocks, the first ones, in which every key lies before every query


@triton.jit
def load_neighbours(tiles, unions, work, num_tiles, capacity):
    """The work-th tile that goes by its union."""
    number = tl.load(unions.work + work)
    head, tile = (number // num_tiles).to(tl.int64), number % num_tiles
    return Neighbours(
        head,
        tl.load(tiles.first_query + tile),
        tl.load(tiles.num_queries + tile),
        tl.load(tiles.position + tile),
        tl.load(tiles.first_key + tile),
        tl.load(tiles.num_keys + tile),
        number.to(tl.int64) * capacity,
        tl.load(unions.num_blocks + number),
        tl.load(unions.num_whole + number),
    )


@triton.jit
def load_chosen(unions, tile, nth, query, QUERIES: tl.constexpr):
    """The nth block of a tile, or the last, and the words with the bits of queries, by their
    numbers in the tile, that say who chose it."""
    WORDS: tl.constexpr = (QUERIES + 31) // 32
    place = tile.place + tl.minimum(nth, tl.maximum(tile.num_blocks - 1, 0))
    any_ = tile.num_blocks > 0
    block = tl.load(unions.blocks + place, mask=any_, other=0)
    if WORDS == 1:
        word = tl.load(unions.bits + place, mask=any_, other=0)
    else:
        word = tl.load(unions.bits + place * WORDS + query // 32, mask=any_, other=0)
    return block, word


@triton.jit
def add_step(state, scores, v_tile, scale, chosen, PRECISION: tl.constexpr):
    """One step of attention, as `online_softmax`, of pairs that chose the step's block or not.

    scores: `[M, N]`, not yet multiplied by the scale, -inf for keys that are not seen.
    """
    acc, maximum, total = state
    raised = tl.maximum(maximum, tl.where(chosen, tl.max(scores, 1) * scale, float("-inf")))
    shift = tl.where(raised == float("-inf"), 0.0, raised)  # a pair that has seen nothing yet
    decay = tl.exp2(maximum - shift)
    offset = tl.where(chosen, -shift, float("-inf"))
    p = tl.exp2(scores * scale + offset[:, None])
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
    return acc, raised, total


@kernel
def union_fwd_kernel(
    q,
    k,
    v,
    tiles,
    unions,
    o_ptr,
    lse_ptr,
    num_tiles,
    capacity,
    num_heads,
    scale,
    SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """o and lse of as many tiles as every program comes to."""

    G: tl.constexpr = SHAPE.G
    STEPS: tl.constexpr = SHAPE.BLOCK_SIZE // TILE.KEYS  # of a block
    pair = tl.arange(0, TILE.PAIRS)
    query, column = pair // G, tl.arange(0, TILE.KEYS)

    for work in range(tl.program_id(0), tl.load(unions.num_work), tl.num_programs(0)):
        tile = load_neighbours(tiles, unions, work, num_tiles, capacity)
        inside = query < tile.num_queries
        row = (tile.first_query + query).to(tl.int64)
        query_head = tile.head * G + pair % G
        q_offset = row * q.stride_t + query_head * q.stride_h
        q_tile = load_rows(q.ptr, q_offset, inside, SHAPE.D, SHAPE.PADDED_D, True)
        k_head = Heads(k.ptr + tile.head * k.stride_h, k.stride_t, k.stride_h)
        v_head = Heads(v.ptr + tile.head * v.stride_h, v.stride_t, v.stride_h)

        acc = tl.zeros([TILE.PAIRS, SHAPE.PADDED_DV], tl.float32)
        maximum = tl.full([TILE.PAIRS], float("-inf"), tl.float32)
        total = tl.zeros([TILE.PAIRS], tl.float32)
        # Of every step these are loaded one step before: Triton would otherwise give the loads of
        # keys, which depend on them, one stage less.
        block, word = load_chosen(unions, tile, 0, query, TILE.QUERIES)
        for step in tl.range(0, tile.num_whole * STEPS, num_stages=TILE.NUM_STAGES):
            following = load_chosen(unions, tile, (step + 1) // STEPS, query, TILE.QUERIES)
            key = tile.first_key + block * SHAPE.BLOCK_SIZE + step % STEPS * TILE.KEYS + column
            k_tile, v_tile = load_keys(k_head, v_head, key, key >= 0, SHAPE, MASKED=False)
            scores = dot_keys(q_tile, k_tile, TILE.PRECISION)
            chosen = ((word >> (query % 32)) & 1) != 0
            state = (acc, maximum, total)
            acc, maximum, total = add_step(state, scores, v_tile, scale, chosen, TILE.PRECISION)
            block, word = following

        # Keys behind the tile's last query may not exist.
        position = tile.position + query
        end = tl.minimum(tile.position + tile.num_queries, tile.num_keys)
        for step in range(tile.num_whole * STEPS, tile.num_blocks * STEPS):
            following = load_chosen(unions, tile, (step + 1) // STEPS, query, TILE.QUERIES)
            key = block * SHAPE.BLOCK_SIZE + step % STEPS * TILE.KEYS + column
            row_of_key = tile.first_key + key
            k_tile, v_tile = load_keys(k_head, v_head, row_of_key, key < end, SHAPE)
            scores = dot_keys(q_tile, k_tile, TILE.PRECISION)
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            chosen = ((word >> (query % 32)) & 1) != 0
            state = (acc, maximum, total)
            acc, maximum, total = add_step(state, scores, v_tile, scale, chosen, TILE.PRECISION)
            block, word = following

        store_attended(
            *(o_ptr, lse_ptr, row, query_head, num_heads, inside, acc, maximum, total, SHAPE)
        )


def hopper() -> Any:
    """The Gluon kernel, imported only where it runs: its interface moves with Triton."""
    from nsa_fsa.ops.selected_attention import union_hopper

    return union_hopper


def union_attention_fwd(
    call: SelectedCall,
    config: tuning.Config,
    found: FoundUnions,
    tensors: tuple[Tensor, Tensor, Tensor],
    result: AttentionResult,
) -> None:
    """Writes o and lse of the queries whose tiles go by their unions.

    tensors: q, k and v as the gather kernel takes them.
    """
    q, k, v = tensors
    num_tiles, num_heads = found.tiles.shape[1], q.shape[1]
    multiprocessors = num_multiprocessors(q) if q.is_cuda else 1
    shape = constants(UnionShape(call.group_size, *widths(q, v), call.blocks.block_size))
    of_tiles = (NeighbourTable(*found.tiles), found.unions, *result)
    sizes = (num_tiles, found.capacity, num_heads, call.scale * LOG2_E)
    most = num_tiles * k.shape[1]

    if config.union_hopper:
        q, k, v = (rows_contiguous(x, True) for x in (q, k, v))
        gluon = hopper()
        rings = (found.num_queries, config.union_stages, config.union_slots, config.union_registers)
        gluon.union_fwd_hopper_kernel[(min(multiprocessors, most),)](
            *(heads(q), heads(k), heads(v), *gluon.head_columns((k, v), gluon.HALF.value)),
            *(*of_tiles, *sizes),
            SHAPE=shape,
            TILE=gluon.union_ring_tile(*rings),
            num_warps=4,
        )
        return

    pairs, _ = tile_of_neighbours(call.group_size, config.union_m)
    keys = min(config.union_keys, call.blocks.block_size)
    precision = tuning.dot_precision(q.dtype)
    tile = UnionTile(pairs, found.num_queries, keys, config.union_stages, precision)
    programs = PROGRAMS * multiprocessors if q.is_cuda else 3
    union_fwd_kernel[(min(programs, most),)](
        *(heads(q), heads(k), heads(v), *of_tiles, *sizes),
        SHAPE=shape,
        TILE=constants(tile),
        num_warps=config.union_warps,
    )
