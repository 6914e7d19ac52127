"""build_block_index against loops over the queries."""

from collections import defaultdict
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall, num_slots
from nsa_fsa.sequences import Sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
LENGTHS = (40, 0, 17, 3, 0, 33)


def build(
    block_indices,
    block_counts,
    lengths,
    block_size,
    forced,
    max_seqlen=None,
    workspace_bytes=WORKSPACE_BYTES,
):
    cu_seqlens = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=DEVICE)
    longest = max(lengths, default=0) if max_seqlen is None else max_seqlen
    indices, counts = (None if x is None else x.to(DEVICE) for x in (block_indices, block_counts))
    blocks, sequences = Blocks(block_size, *forced), Sequences(cu_seqlens, longest)
    call = IndexCall(indices, counts, sequences, sum(lengths), blocks, workspace_bytes)
    index = build_block_index(call)
    return [x.cpu() for x in index]


def chosen(block_indices, block_counts, lengths, block_size, forced):
    """By (head, row): the number that the row's block 0 has, its own block,
    and the sets of all and of sparse chosen blocks.
    """
    init_blocks, local_blocks = forced
    found, row = {}, 0
    for b, (start, length) in enumerate(zip(accumulate(lengths, initial=0), lengths, strict=False)):
        for t in range(length):
            own = t // block_size
            for head in range(block_indices.shape[1]):
                entries = block_indices[row, head].tolist()
                if block_counts is not None:
                    entries = entries[: max(0, int(block_counts[row, head]))]
                blocks = {j for j in entries if 0 <= j <= own}
                sparse = {j for j in blocks if init_blocks <= j <= own - max(local_blocks, 1)}
                found[head, row] = (start // block_size + b, own, blocks, sparse)
            row += 1
    return found


def check(index, block_indices, block_counts, lengths, block_size, forced):
    """The index says what the indices say; where they hold more sparse blocks than were promised,
    a part of it.
    """
    entries, first_entry, num_entries, num_sparse, *_ = index
    slots = num_slots(block_indices.shape[2], Blocks(block_size, *forced))
    expected = chosen(block_indices, block_counts, lengths, block_size, forced)
    for head in range(block_indices.shape[1]):
        segments = sorted(
            (first, count)
            for first, count in zip(
                first_entry[head].tolist(), num_entries[head].tolist(), strict=True
            )
            if count
        )
        ends = [first + count for first, count in segments]
        assert all(end <= first for end, (first, _) in zip(ends, segments[1:], strict=False)), (
            "lists overlap"
        )
        assert all(first >= 0 for first, _ in segments)
        assert max(ends, default=0) <= entries.shape[1]

        listed, used_slots = defaultdict(list), defaultdict(list)
        for number, (first, count) in enumerate(
            zip(first_entry[head].tolist(), num_entries[head].tolist(), strict=True)
        ):
            for entry in entries[head, first : first + count].tolist():
                listed[number].append(entry // slots)
                used_slots[entry // slots].append(entry % slots)
        for number, rows in listed.items():
            assert rows == sorted(set(rows)), f"block {number}: {rows} do not ascend"

        by_row = defaultdict(set)
        for number, rows in listed.items():
            for row in rows:
                by_row[row].add(number - expected[head, row][0])
        for row in range(block_indices.shape[0]):
            _, own, blocks, sparse = expected[head, row]
            found = by_row[row]
            assert (
                found == sparse
                if len(sparse) <= slots
                else (found < sparse and len(found) == slots)
            ), (head, row)
            assert sorted(used_slots[row]) == list(range(len(found))), (
                "each sparse block of a query has a slot of its own"
            )
            flags = int(num_sparse[head, row])
            assert (flags & INT_MAX, flags < 0) == (len(found), own in blocks), (head, row)


def random_indices(
    lengths, num_heads, width, values=(INT_MIN, -1, 0, 0, 1, 1, 2, 2, 3, 4, 2**28, INT_MAX)
):
    """Unsorted, repeated, out of range."""
    return torch.tensor(values, dtype=torch.int32)[
        torch.randint(len(values), (sum(lengths), num_heads, width))
    ]


@pytest.mark.parametrize("forced", [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_any_indices(width, forced):
    indices = random_indices(LENGTHS, 2, width)
    check(build(indices, None, LENGTHS, 16, forced), indices, None, LENGTHS, 16, forced)


@pytest.mark.parametrize("forced", [(0, 0), (1, 1)], ids=str)
def test_block_counts(forced):
    indices = random_indices(LENGTHS, 2, 4)
    values = torch.tensor([INT_MIN, -1, 0, 1, 2, 3, 4, 5, INT_MAX], dtype=torch.int32)
    counts = values[torch.randint(len(values), indices.shape[:2])]
    check(build(indices, counts, LENGTHS, 16, forced), indices, counts, LENGTHS, 16, forced)


def test_the_same_blocks_in_any_order():
    """Duplicates collapse: three times block 1 and once block 0 is both of them once."""
    lengths = (60,)
    indices = torch.tensor([1, 0, 1, 1], dtype=torch.int32).expand(60, 1, 4).clone()
    index = build(indices, None, lengths, 16, (0, 0))
    check(index, indices, None, lengths, 16, (0, 0))
    assert index[2].tolist() == [[44, 28, 0, 0]]  # the queries beyond blocks 0 and 1


@pytest.mark.parametrize("workspace_bytes", [1, 100, 1000], ids=str)
def test_passes_do_not_show(workspace_bytes):
    """A bitmap for one block of one head at a time, for some blocks of a head,
    and for some heads.
    """
    indices = random_indices(LENGTHS, 3, 4)
    found = build(indices, None, LENGTHS, 16, (1, 1), workspace_bytes=workspace_bytes)
    check(found, indices, None, LENGTHS, 16, (1, 1))


@pytest.mark.parametrize("workspace_bytes", [1000, 2**20], ids=str)
def test_many_sequences(workspace_bytes):
    """They begin at any bit of a word, and are as long as max_seqlen or shorter."""
    lengths = (*torch.randint(70, (40,)).tolist(), 96, 31, 1, 64, 96)
    indices = random_indices(lengths, 2, 3, values=(-1, 0, 1, 2, 3, 4, 5))
    found = build(indices, None, lengths, 16, (0, 1), workspace_bytes=workspace_bytes)
    check(found, indices, None, lengths, 16, (0, 1))


@pytest.mark.parametrize("max_seqlen", [40, 2**15 * 16 - 16, 2**15 * 16, 2**30])
def test_tables_of_either_width(max_seqlen):
    """max_seqlen is an upper bound, and decides whether block numbers are kept in 16 or 32 bits."""
    indices = random_indices(LENGTHS, 1, 3)
    check(build(indices, None, LENGTHS, 16, (0, 0), max_seqlen), indices, None, LENGTHS, 16, (0, 0))


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (16,), (0, 17, 0)], ids=str)
@pytest.mark.parametrize("width", [0, 2])
def test_nearly_nothing(lengths, width):
    indices = random_indices(lengths, 2, width, values=(-1, 0, 1))
    index = build(indices, None, lengths, 16, (0, 0))
    if sum(lengths):  # otherwise there is nobody to ask what it says
        check(index, indices, None, lengths, 16, (0, 0))


def test_more_queries_than_one_read_of_the_bitmap():
    """17,000 queries, many more than a program looks at together;
    a few of them chose block 0, and a few one other.
    """
    length, block_size = 17_000, 128
    t = torch.arange(length)
    own = t // block_size
    first = torch.where((t % 32 == 31) | (t % 32 == 0) | (t > 16_900), 0, -1)
    second = torch.where(torch.rand(length) < 0.1, torch.randint(2**30, (length,)) % (own + 1), -1)
    indices = torch.stack([second, first], dim=1).int()[:, None]
    entries, first_entry, num_entries, num_sparse, *_ = build(
        indices, None, (length,), block_size, (0, 0)
    )
    sparse = torch.stack([second, first.masked_fill(second == 0, -1)])
    sparse[(sparse == own)] = -1
    assert torch.equal(num_sparse[0] & INT_MAX, (sparse >= 0).sum(0).int())
    for block in range(int(own[-1]) + 1):
        at = int(first_entry[0, block])
        rows = entries[0, at : at + int(num_entries[0, block])] // 2
        assert rows.tolist() == (sparse == block).any(0).nonzero().flatten().tolist(), block
