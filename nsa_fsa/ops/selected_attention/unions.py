"""Which tiles of neighbouring queries read the union of their blocks, and what these unions are.

Neighbouring queries of a real text choose much the same blocks. A tile of them that attends to
every block that any of its queries chose, with a bit for each query and block as the mask, needs no
block index, no partial results and no merge; it multiplies more than was chosen, though. So a tile
goes by its union where that is small, which `find_unions` finds on the GPU, tile by tile and KV
head by KV head, and what a query gets depends on nothing outside its own tile.

A query's choice usually ascends. Then the union is a merge: each turn takes the lowest block that
any query of the tile has left, and every query that has it goes one on. It ends when there is
nothing left, or more than a tile may have, so that choices at random cost no more than others, and
no length matters. A tile with a choice that does not ascend does not go by its union.

A tile's blocks are those that its queries chose, forced ones among them. Whether it goes by its
union depends on nothing but its queries, so neither on the batch nor on the workspace, from which
the lists are not taken. A tile with a query that sees nothing does not go: its row may hold NaN.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.bundles import heads
from nsa_fsa.ops.common.locate import NeighbourTable, locate_neighbours
from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, rows_contiguous
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import BY_UNION, BlockIndex, IndexCall, SelectedCall

MOST_QUERIES = 128  # of a tile
MOST_HEADS = 64  # of a group
NONE_LEFT = tl.constexpr(0x7FFFFFFF)
GOES_BY_UNION = tl.constexpr(BY_UNION)


class Unions(NamedTuple):
    """What the tiles read that go by their unions, int32. A tile of a KV head has the number
    `head * num_tiles + tile`, and room for as many blocks as a tile may have."""

    blocks: Any  # [HKV, num_tiles, capacity]: numbers inside the sequence, ascending
    bits: Any  # [HKV, num_tiles, capacity, words]: which queries of the tile chose the block
    num_blocks: Any  # [HKV, num_tiles], of tiles that go by their unions, as num_whole
    num_whole: Any  # the first so many lie in front of the own blocks of all queries
    work: Any  # [HKV * num_tiles]: the numbers of these tiles, in any order
    num_work: Any  # [1]: how many there are


@dataclass(frozen=True)
class FoundUnions:
    """How the forward of a call goes by unions."""

    unions: Unions
    tiles: Tensor  # of `locate_neighbours`
    num_queries: int  # of a tile at most, a power of two
    capacity: int
    # int32 [HKV, T]: whether a query's tile goes by its union is bit 30, and the other bits are
    # those of `BlockIndex.num_sparse` if the call has an index, and otherwise 0.
    flags: Tensor


@kernel
def find_unions_kernel(
    indices,
    counts,
    tiles,
    unions,
    flags_ptr,
    num_sparse_ptr,
    num_rows,
    num_tiles,
    capacity,
    NUM_INDICES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program merges the choices of TILES tiles of a head, of QUERIES queries each."""

    WORDS: tl.constexpr = (QUERIES + 31) // 32
    BITS: tl.constexpr = QUERIES // WORDS
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    known = tile < num_tiles
    first_query = tl.load(tiles.first_query + tile, mask=known, other=0)
    num_queries = tl.load(tiles.num_queries + tile, mask=known, other=0)
    first_position = tl.load(tiles.position + tile, mask=known, other=0)
    num_keys = tl.load(tiles.num_keys + tile, mask=known, other=0)

    word, bit = tl.arange(0, WORDS)[None, :, None], tl.arange(0, BITS)[None, None, :]
    nth = word * BITS + bit
    inside = nth < num_queries[:, None, None]  # [TILES, WORDS, BITS]
    row = first_query[:, None, None] + nth
    position = first_position[:, None, None] + nth
    sees = inside & (position >= 0) & (position < num_keys[:, None, None])
    own = tl.where(sees, position // BLOCK_SIZE, -1)

    indices_ptr = indices.ptr + row.to(tl.int64) * indices.stride_t + head * indices.stride_h
    count = tl.where(sees, NUM_INDICES, 0)
    if counts is not None:
        at = row.to(tl.int64) * counts.stride_t + head * counts.stride_h
        count = tl.minimum(tl.load(counts.ptr + at, mask=sees, other=0), count)

    # What counts of a choice that ascends lies together at its beginning.
    length = tl.zeros([TILES, WORDS, BITS], tl.int32)
    last = tl.full([TILES, WORDS, BITS], -1, tl.int32)
    ascends = tl.full([TILES, WORDS, BITS], 1, tl.int32)
    for column in range(NUM_INDICES):
        block = tl.load(indices_ptr + column, mask=column < count, other=-1)
        chosen = (block >= 0) & (block <= own)
        follows = (length == column) & (block > last)
        ascends = tl.where(chosen & ~follows, 0, ascends)
        length += (chosen & follows).to(tl.int32)
        last = tl.where(chosen, block, last)

    own_of_first = tl.min(tl.min(tl.where(sees, own, NONE_LEFT), 2), 1)  # [TILES]
    left = tl.load(indices_ptr, mask=length > 0, other=NONE_LEFT)
    lowest = tl.min(tl.min(left, 2), 1)
    taken = tl.zeros([TILES, WORDS, BITS], tl.int32)
    num_blocks, num_whole = tl.zeros([TILES], tl.int32), tl.zeros([TILES], tl.int32)
    number = head * num_tiles + tile
    place = number * capacity
    one = tl.full([TILES, WORDS, BITS], 1, tl.int32) << bit
    words = tl.arange(0, WORDS)

    step = 0
    while (step < capacity) & (tl.min(lowest, 0) < NONE_LEFT):
        present = lowest < NONE_LEFT
        chosen = (left == lowest[:, None, None]) & present[:, None, None]
        bits = tl.sum(tl.where(chosen, one, 0), 2)  # [TILES, WORDS]
        tl.store(unions.blocks + place, lowest, mask=present)
        tl.store(unions.bits + place[:, None] * WORDS + words, bits, mask=present[:, None])
        num_blocks += present.to(tl.int32)
        num_whole += (lowest < own_of_first).to(tl.int32)

        taken += chosen.to(tl.int32)
        following = tl.load(indices_ptr + taken, mask=chosen & (taken < length), other=NONE_LEFT)
        left = tl.where(chosen, following, left)
        lowest = tl.min(tl.min(left, 2), 1)
        place += 1
        step += 1

    goes = (lowest == NONE_LEFT) & (tl.min(tl.min(ascends, 2), 1) > 0) & (num_queries > 0)
    goes = goes & (tl.max(tl.max((inside & ~sees).to(tl.int32), 2), 1) == 0)
    tl.store(unions.num_blocks + number, num_blocks, mask=goes)
    tl.store(unions.num_whole + number, num_whole, mask=goes)
    num_going = tl.sum(goes.to(tl.int32), 0)
    if num_going > 0:
        first = tl.atomic_add(unions.num_work, num_going, sem="relaxed")
        before = tl.cumsum(goes.to(tl.int32), 0) - goes.to(tl.int32)
        tl.store(unions.work + first + before, number.to(tl.int32), mask=goes)

    at = head * num_rows + row
    flags = tl.zeros([TILES, WORDS, BITS], tl.int32)
    if num_sparse_ptr is not None:
        flags = tl.load(num_sparse_ptr + at, mask=inside, other=0)
    tl.store(
        flags_ptr + at, tl.where(goes[:, None, None], flags | GOES_BY_UNION, flags), mask=inside
    )


@kernel
def keep_others_kernel(
    index,
    flags_ptr,
    kept_ptr,
    num_kept_ptr,
    num_rows,
    num_blocks,
    NUM_SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A program copies the entries of a block whose queries do not go by the unions of their tiles,
    ENTRIES at a time, to the place that the block's have."""
    head = tl.program_id(1).to(tl.int64)
    segment = head * num_blocks + tl.program_id(0)
    total = tl.load(index.num_entries + segment)
    first = head * num_rows * NUM_SLOTS + tl.load(index.first_entry + segment)
    flags_ptr += head * num_rows
    nth = tl.arange(0, ENTRIES)

    num_kept = 0
    for start in range(0, total, ENTRIES):
        inside = start + nth < total
        entry = tl.load(index.entries + first + start + nth, mask=inside, other=0)
        flags = tl.load(flags_ptr + entry // NUM_SLOTS, mask=inside, other=0)
        kept = (inside & ((flags & GOES_BY_UNION) == 0)).to(tl.int32)
        at = first + num_kept + tl.cumsum(kept, 0) - kept
        tl.store(kept_ptr + at, entry, mask=kept > 0)
        num_kept += tl.sum(kept, 0)
    tl.store(num_kept_ptr + segment, num_kept)


def tile_of_neighbours(group_size: int, num_pairs: int) -> tuple[int, int]:
    """Pairs and queries of a tile, both powers of two, for about num_pairs pairs."""
    pairs = max(num_pairs, next_power_of_2(group_size))
    return pairs, min(1 << ((pairs // group_size).bit_length() - 1), MOST_QUERIES)


def most_blocks(call: SelectedCall, config: tuning.Config) -> int:
    """How many blocks the union of a tile may have that goes by it; 0 where none does."""
    if config.union_factor <= 0 or call.num_slots == 0 or call.group_size > MOST_HEADS:
        return 0
    # Bulk copies are of heads that lie together, and copying all keys may cost more than it saves.
    if config.union_hopper and any(x.stride(1) != x.shape[2] for x in (call.k, call.v)):
        return 0
    _, num_queries = tile_of_neighbours(call.group_size, config.union_m)
    return int(min(config.union_factor, num_queries) * call.block_indices.shape[2])


def find_unions(call: SelectedCall, config: tuning.Config) -> FoundUnions | None:
    """Which tiles of a call go by their unions; None where none can."""
    num_rows, num_kv_heads, num_indices = call.block_indices.shape
    if (most := most_blocks(call, config)) == 0:
        return None
    _, num_queries = tile_of_neighbours(call.group_size, config.union_m)
    tiles = locate_neighbours(num_rows, call.sequences, num_queries)
    num_tiles, words = num_kv_heads * tiles.shape[1], cdiv(num_queries, 32)
    capacity = min(most, cdiv(call.sequences.max_seqlen, call.blocks.block_size))

    new = call.block_indices.new_empty
    lists = (new(num_tiles * capacity), new(num_tiles * capacity * words))
    unions = Unions(*lists, new(num_tiles), new(num_tiles), new(num_tiles), new(1).zero_())
    flags = new(num_kv_heads, num_rows)
    counts = None if call.block_counts is None else heads(call.block_counts)
    of_program = max(32 // num_queries, 1)
    find_unions_kernel[(cdiv(tiles.shape[1], of_program), num_kv_heads)](
        *(heads(rows_contiguous(call.block_indices)), counts, NeighbourTable(*tiles), unions),
        *(flags, None if call.index is None else call.index.num_sparse),
        *(num_rows, tiles.shape[1], capacity),
        NUM_INDICES=num_indices,
        BLOCK_SIZE=call.blocks.block_size,
        QUERIES=num_queries,
        TILES=of_program,
        num_warps=1,
    )
    return FoundUnions(unions, tiles, num_queries, capacity, flags)


def index_of_others(call: SelectedCall, found: FoundUnions | None) -> BlockIndex:
    """The block index of the queries that do not go by the unions of their tiles; of a call that
    has an index of all queries its entries, without those of the others."""
    if found is None:
        return build_block_index(IndexCall.of(call)) if call.index is None else call.index
    if call.index is None:
        return build_block_index(IndexCall.of(call), found.flags)
    index, num_rows = call.index, call.q.shape[0]
    kept, num_kept = (x.new_empty(x.shape) for x in (index.entries, index.num_entries))
    num_heads, num_blocks = num_kept.shape
    if num_kept.numel():
        keep_others_kernel[(num_blocks, num_heads)](
            *(index, found.flags, kept, num_kept, num_rows, num_blocks),
            NUM_SLOTS=call.num_slots,
            ENTRIES=1024,
            num_warps=4,
        )
    return index._replace(entries=kept, num_entries=num_kept, num_sparse=found.flags)
