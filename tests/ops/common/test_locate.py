"""locate_rows, locate_blocks, locate_runs, locate_tiles and load_tile against loops over the
sequences.
"""

from itertools import accumulate, pairwise

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from nsa_fsa.ops.common.locate import (
    Tile,
    load_tile,
    locate_blocks,
    locate_rows,
    locate_runs,
    locate_tiles,
)
from nsa_fsa.sequences import Sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LENGTHS = [
    (),
    (0,),
    (1,),
    (0, 0, 0),
    (33,),
    (0, 33, 0, 0, 64, 0),
    (16, 16, 32),
    (15, 17, 1, 0, 31),
    (1,) * 40,
    (600, 0, 1, 300),
]


def ints(values):
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def starts(lengths):
    return list(accumulate(lengths, initial=0))


def first_number(b, start, block_size):
    """Where the blocks of sequence b begin in the numbering that all sequences share."""
    return start // block_size + b


def packed(lengths):
    return Sequences(ints(starts(lengths)), max(lengths, default=0))


def cached(capacities, num_queries, used):
    """Sequences whose queries, where their numbers are given, are the last used positions."""
    of_queries = None if num_queries is None else ints(starts(num_queries))
    return packed(capacities)._replace(
        cu_seqlens_q=of_queries, seqused_k=None if used is None else ints(used)
    )


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows(lengths, block_size):
    found = locate_rows(sum(lengths), packed(lengths), block_size)
    expected = [
        (t, start, first_number(b, start, block_size), start + length)
        for b, (start, length) in enumerate(zip(starts(lengths), lengths, strict=False))
        for t in range(length)
    ]
    assert found.T.tolist() == [list(row) for row in expected]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks(lengths, block_size):
    """Every block has a number of its own, and a number that no block owns has no rows."""
    found = locate_blocks(sum(lengths), packed(lengths), block_size)
    owned = {
        first_number(b, start, block_size) + j: [
            first := start + j * block_size,
            min(block_size, stop - first),
            j,
            first,
            stop,
            first,
        ]
        for b, (start, stop) in enumerate(pairwise(starts(lengths)))
        for j in range(-(-(stop - start) // block_size))
    }
    assert len(owned) == sum(-(-n // block_size) for n in lengths)
    numbers = found.T.tolist()
    assert {number: values for number, values in enumerate(numbers) if number in owned} == owned
    assert all(
        num_rows == 0 for number, (_, num_rows, *_) in enumerate(numbers) if number not in owned
    )


CACHED = [
    # rows of the buffer, used ones, queries (None: as many as rows of the buffer)
    ((40, 0, 9), (33, 0, 9), (1, 0, 1)),
    ((40, 0, 9), (33, 0, 9), (33, 0, 4)),
    ((7, 7, 7, 7), (7, 1, 0, 3), (0, 1, 0, 3)),
    ((300, 17, 500), (280, 17, 1), (270, 17, 1)),
    ((5,), (0,), (0,)),
]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("capacities", "used", "num_queries"), CACHED, ids=str)
def test_rows_of_queries_over_a_cache(capacities, used, num_queries, block_size):
    """The queries are the last positions among the used ones."""
    found = locate_rows(sum(num_queries), cached(capacities, num_queries, used), block_size)
    expected = [
        [n - count + i, start, first_number(b, start, block_size), first_query + count]
        for b, (start, n, first_query, count) in enumerate(
            zip(starts(capacities), used, starts(num_queries), num_queries, strict=False)
        )
        for i in range(count)
    ]
    assert found.T.tolist() == expected


# None: the queries share the rows of the keys, and those past the used ones have no position.
LAST = [*CACHED, ((40, 3, 9), (33, 0, 9), None), ((70, 20), (20, 1), (50, 3))]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("capacities", "used", "num_queries"), LAST, ids=str)
def test_blocks_of_a_cache(capacities, used, num_queries, block_size):
    """Only keys in use are in a block, and it knows the queries that lie behind its first key, and
    in which row that position's query is or would be."""
    sequences = cached(capacities, num_queries, used)
    found = locate_blocks(sum(capacities), sequences, block_size).T.tolist()
    of_queries = starts(capacities if num_queries is None else num_queries)
    counts = used if num_queries is None else num_queries
    owned = set()
    for b, (start, n) in enumerate(zip(starts(capacities), used, strict=False)):
        end_query = of_queries[b] + counts[b]
        position = {of_queries[b] + i: n - counts[b] + i for i in range(counts[b])}
        for j in range(-(-n // block_size)):
            first = j * block_size
            behind = [row for row, at in position.items() if at >= first] or [end_query]
            owned.add(number := first_number(b, start, block_size) + j)
            size = min(block_size, n - first)
            query_row = end_query - (n - first)
            assert found[number] == [start + first, size, j, behind[0], end_query, query_row]
    assert all(row[1] == 0 for number, row in enumerate(found) if number not in owned)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("capacities", "used", "num_queries"), LAST, ids=str)
def test_runs_of_queries_that_share_their_own_block(capacities, used, num_queries, block_size):
    """Every query is in one run, also one that stands before every key or has no position."""
    sequences = cached(capacities, num_queries, used)
    counts = capacities if num_queries is None else num_queries
    seen = []
    for first, count, number, first_key, end_key in locate_runs(
        sum(counts), sequences, block_size
    ).T.tolist():
        for row in range(first, first + count):
            seen.append(row)
            b = max(b for b, start in enumerate(starts(counts)[:-1]) if start <= row)
            position = row - starts(counts)[b]
            if num_queries is not None:
                position += used[b] - counts[b]
            assert number == position // block_size
            start = starts(capacities)[b]
            assert first_key == start + number * block_size
            assert end_key == start + min((number + 1) * block_size, used[b])
    assert sorted(seen) == list(range(sum(counts)))


@pytest.mark.parametrize(
    ("lengths", "num_queries"), [((33, 0, 9), (2, 0, 9)), ((300,), (290,))], ids=str
)
def test_rows_of_the_last_queries_of_full_sequences(lengths, num_queries):
    """cu_seqlens_q alone: every row of the keys is used."""
    found = locate_rows(sum(num_queries), cached(lengths, num_queries, None), 16)
    positions = [
        n - count + i for n, count in zip(lengths, num_queries, strict=True) for i in range(count)
    ]
    assert found[0].tolist() == positions


def test_rows_beyond_the_used_ones():
    """seqused_k alone: query rows are key rows, and those past the used ones stand
    before every key.
    """
    capacities, used = (20, 0, 16, 5), (17, 0, 16, 0)
    position, first_key, *_ = locate_rows(sum(capacities), cached(capacities, None, used), 16)
    expected = [
        t if t < n else None for c, n in zip(capacities, used, strict=True) for t in range(c)
    ]
    assert [p if p >= 0 else None for p in position.tolist()] == expected
    assert first_key.tolist() == [
        start for start, c in zip(starts(capacities), capacities, strict=False) for _ in range(c)
    ]


def expected_tiles(lengths, tile_rows, num_queries=None, used=None, of_keys=False):
    """The fields of `Tile` of every tile that exists, the most work first: keys that its first
    query sees, or, of tiles of keys, positions from its first key on. Equal ones in the order of
    their sequences."""
    key_starts = starts(lengths)
    query_starts = starts(lengths if num_queries is None else num_queries)
    found = []
    for b, length in enumerate(lengths):
        queries = query_starts[b + 1] - query_starts[b]
        keys = length if used is None else used[b]
        offset = 0 if num_queries is None else keys - queries
        for j in range(-(-(keys if of_keys else queries) // tile_rows)):
            work = keys - j * tile_rows if of_keys else offset + j * tile_rows
            found.append((work, [j, query_starts[b], queries, offset, key_starts[b], keys]))
    return [tile for _, tile in sorted(found, key=lambda pair: -pair[0])]


OVER_A_CACHE = [(capacities, num_queries, used) for capacities, used, num_queries in CACHED]
TILED = [
    *((lengths, None, None) for lengths in LENGTHS if len(lengths) > 1),
    *OVER_A_CACHE,
    ((33, 0, 9), (2, 0, 9), None),  # full sequences
    ((300,), (290,), None),
    # queries share the rows of the keys, of which some are not used.
    ((20, 0, 16, 5), None, (17, 0, 16, 0)),
    ((20,), None, (20,)),
]


def cut(lengths, tile_rows, num_queries=None, used=None, of_keys=False, max_seqlen=None):
    """What locate_tiles says; by default the bound on the lengths is too high to tell that
    they are alike.
    """
    cached = [None if x is None else ints(x) for x in (num_queries and starts(num_queries), used)]
    sequences = Sequences(
        ints(starts(lengths)), max(lengths) + 1 if max_seqlen is None else max_seqlen, *cached
    )
    num_rows = sum(lengths if num_queries is None else num_queries)
    return locate_tiles(num_rows, sequences, tile_rows, num_keys=sum(lengths) if of_keys else None)


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("tile_rows", [1, 7, 16, 64])
@pytest.mark.parametrize(("lengths", "num_queries", "used"), TILED, ids=str)
def test_tiles(lengths, num_queries, used, tile_rows, of_keys):
    """Every tile once, and numbers that no tile owns, which come last, have no queries."""
    found = cut(lengths, tile_rows, num_queries, used, of_keys)
    expected = expected_tiles(lengths, tile_rows, num_queries, used, of_keys)
    tiles = found.table.T.tolist()
    assert len(tiles) == found.number
    assert tiles[: len(expected)] == expected
    assert all(Tile(*tile).num_queries == 0 for tile in tiles[len(expected) :])


@triton.jit
def load_tiles_kernel(
    tiles_ptr, out_ptr, num_tiles, num_rows, num_sequences, OF_KEYS: tl.constexpr
):
    number = tl.program_id(0)
    tile = load_tile(tiles_ptr, num_tiles, number, num_rows, num_sequences, OF_KEYS)
    out_ptr += number * 6
    tl.store(out_ptr, tile.number)
    tl.store(out_ptr + 1, tile.first_query)
    tl.store(out_ptr + 2, tile.num_queries)
    tl.store(out_ptr + 3, tile.offset)
    tl.store(out_ptr + 4, tile.first_key)
    tl.store(out_ptr + 5, tile.num_keys)


def loaded(tiles, num_rows, of_keys):
    out = torch.full((tiles.number, 6), -7, dtype=torch.int32, device=DEVICE)
    arguments = (tiles.table, out, tiles.number, num_rows, tiles.num_sequences)
    load_tiles_kernel[(tiles.number,)](*arguments, OF_KEYS=of_keys)
    return out.tolist()


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize(("lengths", "num_queries", "used"), [TILED[2], *OVER_A_CACHE], ids=str)
def test_a_table_is_loaded_as_it_is(lengths, num_queries, used, of_keys):
    tiles = cut(lengths, 16, num_queries, used, of_keys)
    assert loaded(tiles, sum(lengths), of_keys) == tiles.table.T.tolist()


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 16, 33, 100])
def test_sequences_of_one_length_need_no_table(length, number, of_keys):
    """Their tiles come in the order that they have in a table."""
    lengths = (length,) * number
    tiles = cut(lengths, 16, of_keys=of_keys, max_seqlen=length)
    assert tiles.table is None
    assert loaded(tiles, length * number, of_keys) == expected_tiles(lengths, 16, of_keys=of_keys)


def test_the_bound_on_one_sequence_does_not_matter():
    assert cut((20,), 16, max_seqlen=10_000).table is None


def test_keys_that_make_no_whole_hop_have_no_tile():
    sequences = Sequences(ints((0, 35, 70)), 35)
    assert locate_tiles(70, sequences, 32, num_keys=64, hop=16).number == 2
    assert locate_tiles(70, sequences, 32, num_keys=64, hop=8).number == 2
    assert locate_tiles(30, Sequences(ints((0, 15, 30)), 15), 32, num_keys=16, hop=16).number == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ((5, 4), None, None),
        ((0, 9), None, None),
        ((9,), (9,), None),
        ((9,), None, (9,)),
        ((9,), (2,), (9,)),
        ((4, 4), (4, 4), None),
    ],
    ids=str,
)
def test_everything_else_needs_one(arguments):
    lengths, *cached = arguments
    assert cut(lengths, 16, *cached, max_seqlen=max(lengths)).table is not None
