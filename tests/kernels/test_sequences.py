"""locate_rows and locate_blocks against loops over the sequences."""

from itertools import accumulate, pairwise

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa.kernels.sequences import locate_blocks, locate_rows

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


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows(lengths, block_size):
    found = locate_rows(sum(lengths), ints(starts(lengths)), block_size)
    expected = [
        (t, start, first_number(b, start, block_size))
        for b, (start, length) in enumerate(zip(starts(lengths), lengths, strict=False))
        for t in range(length)
    ]
    assert found.T.tolist() == [list(row) for row in expected]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks(lengths, block_size):
    """Every block has a number of its own, and a number that no block owns has no rows."""
    found = locate_blocks(sum(lengths), ints(starts(lengths)), block_size)
    owned = {
        first_number(b, start, block_size) + j: [
            start + j * block_size, min(block_size, stop - start - j * block_size), j, stop
        ]
        for b, (start, stop) in enumerate(pairwise(starts(lengths)))
        for j in range(-(-(stop - start) // block_size))
    }  # fmt: skip
    assert len(owned) == sum(-(-n // block_size) for n in lengths)
    numbers = found.T.tolist()
    assert {number: values for number, values in enumerate(numbers) if number in owned} == owned
    assert all(num_rows == 0 for number, (_, num_rows, *_) in enumerate(numbers) if number not in owned)


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
    found = locate_rows(sum(num_queries), ints(starts(capacities)), block_size, ints(starts(num_queries)), ints(used))
    expected = [
        [n - count + i, start, first_number(b, start, block_size)]
        for b, (start, n, count) in enumerate(zip(starts(capacities), used, num_queries, strict=False))
        for i in range(count)
    ]
    assert found.T.tolist() == expected


@pytest.mark.parametrize(("lengths", "num_queries"), [((33, 0, 9), (2, 0, 9)), ((300,), (290,))], ids=str)
def test_rows_of_the_last_queries_of_full_sequences(lengths, num_queries):
    """cu_seqlens_q alone: every row of the keys is used."""
    found = locate_rows(sum(num_queries), ints(starts(lengths)), 16, ints(starts(num_queries)))
    positions = [n - count + i for n, count in zip(lengths, num_queries, strict=True) for i in range(count)]
    assert found[0].tolist() == positions


def test_rows_beyond_the_used_ones():
    """seqused_k alone: query rows are key rows, and those past the used ones stand before every key."""
    capacities, used = (20, 0, 16, 5), (17, 0, 16, 0)
    position, first_key, _ = locate_rows(sum(capacities), ints(starts(capacities)), 16, None, ints(used))
    expected = [t if t < n else None for c, n in zip(capacities, used, strict=True) for t in range(c)]
    assert [p if p >= 0 else None for p in position.tolist()] == expected
    assert first_key.tolist() == [start for start, c in zip(starts(capacities), capacities, strict=False) for _ in range(c)]
