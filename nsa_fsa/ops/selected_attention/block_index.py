"""The inverse of block_indices: for every KV head and block, the queries that chose it, ascending.

Two kernels and a bitmap. `mark` reads each query's row of block_indices once: what is out of range,
repeated or dense (see below) is dropped, and each of the others sets one bit per (block, query).
`collect` owns one block: it counts and lists the bits of its row, then looks up in which slot of
each query the block stands. A list needs one atomic to get its place, so where it lies differs from
run to run and what it says does not.

A block's row has as many words as the longest sequence, for none but its own sequence's queries can
choose it, and ends with that sequence's last: 8,192 sequences of 128 tokens take 0.5 MB a head,
and took 3.2 GB as rows of the whole batch. Where queries are the last positions of their sequences,
words count their rows, not those of the keys. The bitmap is made for as many heads and blocks at a
time as fit its budget.

H200, 65,536 tokens, 13 sparse blocks of 64: 1.9 ms with 64 KV heads (zeroing 0.1, marking 0.9,
collecting 0.9), 0.2 with 4. Counting and filling with global atomics, whose order also differs from
run to run: 8.4 and 0.7.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.ops.common.bundles import heads
from nsa_fsa.ops.common.locate import BlockTable, RowTable, locate_blocks, locate_rows
from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2, rows_contiguous
from nsa_fsa.ops.selected_attention.call import BlockIndex, IndexCall, empty_index, num_slots

BITMAP_BYTES = 1 << 29


@triton.jit
def popcount(x):
    """Set bits of each element of a uint32 tensor, int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def first_word(end_query, num_words):
    """The word of query rows with which the bitmap begins for a sequence that ends at a row."""
    return (end_query + 31) // 32 - num_words


@kernel
def mark_kernel(
    indices,
    counts,
    rows,
    sparse_ptr,
    index,
    bitmap_ptr,
    flags_ptr,
    num_rows,
    init_blocks,
    local_blocks,
    num_words,
    first_head,
    low_block,
    high_block,
    NUM_INDICES: tl.constexpr,
    PADDED_INDICES: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program marks the sparse blocks of a head's queries between low_block and high_block.

    flags_ptr: BY_UNION of the queries that are left out, `[HKV, T]`; None: none are.
    """

    head = (first_head + tl.program_id(1)).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    column = tl.arange(0, PADDED_INDICES)
    own = tl.load(rows.position + row, mask=inside, other=-1) // BLOCK_SIZE
    first_block = tl.load(rows.first_block + row, mask=inside, other=0)

    count = tl.full([ROWS], NUM_INDICES, tl.int32)
    if counts is not None:
        at = row.to(tl.int64) * counts.stride_t + head * counts.stride_h
        count = tl.load(counts.ptr + at, mask=inside, other=0)
    read = inside[:, None] & (column < NUM_INDICES)[None, :] & (column[None, :] < count[:, None])
    at = row.to(tl.int64)[:, None] * indices.stride_t + head * indices.stride_h + column[None, :]
    block = tl.load(indices.ptr + at, mask=read, other=-1)  # [ROWS, PADDED_INDICES]

    chosen = block >= 0
    # Ascending rows, which is what select_blocks gives, cannot repeat a block: most tiles skip the
    # comparison of all pairs.
    before = tl.load(indices.ptr + at - 1, mask=read & (column > 0)[None, :], other=-1)
    ascending = (column == 0)[None, :] | ~chosen | ((before >= 0) & (before < block))
    if tl.min(tl.min(ascending.to(tl.int32), 1), 0) == 0:
        for other in range(0, NUM_INDICES):
            is_earlier = read & (other < column)[None, :]
            other_ptr = indices.ptr + at - column[None, :] + other
            chosen = chosen & (tl.load(other_ptr, mask=is_earlier, other=-1) != block)

    sparse = chosen & (block >= init_blocks) & (block <= own[:, None] - tl.maximum(local_blocks, 1))
    rank = tl.cumsum(sparse.to(tl.int32), 1) - 1
    # There are more only where the caller's promise about forced blocks does not hold.
    sparse = sparse & (rank < NUM_SLOTS)
    has_own = tl.max((chosen & (block == own[:, None])).to(tl.int32), 1)
    at = head * num_rows + row
    flags = has_own << 31
    if flags_ptr is not None:
        by_union = tl.load(flags_ptr + at, mask=inside, other=0)
        sparse = sparse & (by_union == 0)[:, None]
        flags = flags | by_union
    num_sparse = tl.sum(sparse.to(tl.int32), 1)
    tl.store(index.num_sparse + at, num_sparse | flags, mask=inside)
    at = (head * num_rows + row)[:, None] * PADDED_INDICES + column[None, :]
    kept = tl.where(sparse, block, -1).to(sparse_ptr.dtype.element_ty)
    tl.store(sparse_ptr + at, kept, mask=inside[:, None])

    number = first_block[:, None] + block
    end_query = tl.load(rows.end_query + row, mask=inside, other=0)
    word = row // 32 - first_word(end_query, num_words)
    marked = sparse & (number >= low_block) & (number < high_block) & (word >= 0)[:, None]
    first_bit_row = tl.program_id(1).to(tl.int64) * (high_block - low_block)
    word = (first_bit_row + number - low_block) * num_words + word[:, None]
    bit = tl.full([ROWS, PADDED_INDICES], 1, tl.int32) << (row % 32)[:, None]
    tl.atomic_or(bitmap_ptr + word, bit, mask=marked, sem="relaxed")


@triton.jit
def count_bits(bitmap_ptr, start, stop, WORDS: tl.constexpr):
    """Set bits of the words from start to stop."""
    word_of = tl.arange(0, WORDS)
    total = 0
    for first in range(start, stop, WORDS):
        word = tl.load(bitmap_ptr + first + word_of, mask=first + word_of < stop, other=0)
        total += tl.sum(popcount(word.to(tl.uint32, bitcast=True)))
    return total


@triton.jit
def list_bits(bitmap_ptr, start, stop, entries_ptr, WORDS: tl.constexpr):
    """Writes the numbers of the set bits of the words from start to stop, ascending."""
    word_of = tl.arange(0, WORDS)
    listed = 0
    for first in range(start, stop, WORDS):
        word = tl.load(bitmap_ptr + first + word_of, mask=first + word_of < stop, other=0)
        word = word.to(tl.uint32, bitcast=True)
        bits = popcount(word)
        at = listed + tl.cumsum(bits, 0) - bits
        listed += tl.sum(bits)
        most = tl.max(bits)
        while most > 0:  # the lowest bit of every word at once
            lowest = word ^ (word & (word - 1))
            number = (first + word_of) * 32 + popcount(lowest - 1)
            tl.store(entries_ptr + at, number, mask=word != 0)
            word = word & (word - 1)
            at += 1
            most -= 1


@kernel
def collect_kernel(
    blocks,
    sparse_ptr,
    index,
    bitmap_ptr,
    cursor_ptr,
    num_rows,
    num_blocks,
    num_words,
    first_head,
    low_block,
    high_block,
    NUM_SLOTS: tl.constexpr,
    PADDED_INDICES: tl.constexpr,
    WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A program makes the entries of one block, WORDS of the bitmap and ENTRIES at a time."""

    head = first_head + tl.program_id(1)
    block = low_block + tl.program_id(0)
    segment = head * num_blocks + block
    if tl.load(blocks.num_rows + block) == 0:
        tl.store(index.first_entry + segment, 0)
        tl.store(index.num_entries + segment, 0)
        return

    # Only later queries of the same sequence can have chosen this block without owning it.
    number = tl.load(blocks.number + block)
    lowest = first_word(tl.load(blocks.end_query + block), num_words)
    start = tl.maximum(tl.load(blocks.first_query + block) // 32, lowest)
    stop = lowest + num_words
    bit_row = tl.program_id(1).to(tl.int64) * (high_block - low_block) + block - low_block
    bitmap_ptr += bit_row * num_words - lowest

    total = count_bits(bitmap_ptr, start, stop, WORDS)
    place = tl.atomic_add(cursor_ptr + head, total, sem="relaxed")
    tl.store(index.first_entry + segment, place)
    tl.store(index.num_entries + segment, total)
    entries_ptr = index.entries + head.to(tl.int64) * num_rows * NUM_SLOTS + place
    list_bits(bitmap_ptr, start, stop, entries_ptr, WORDS)

    tl.debug_barrier()  # the rows just listed are read back by other threads of this program
    entry = tl.arange(0, ENTRIES)
    column = tl.arange(0, PADDED_INDICES)
    wanted = number.to(sparse_ptr.dtype.element_ty)
    sparse_ptr += head.to(tl.int64) * num_rows * PADDED_INDICES
    for first in range(0, total, ENTRIES):
        inside = first + entry < total
        row = tl.load(entries_ptr + first + entry, mask=inside, other=0)
        at = row.to(tl.int64)[:, None] * PADDED_INDICES + column[None, :]
        found = tl.load(sparse_ptr + at, mask=inside[:, None], other=-1)
        chosen_at = tl.min(tl.where(found == wanted, column[None, :], PADDED_INDICES), 1)
        is_before = (found >= 0) & (column[None, :] < chosen_at[:, None])
        slot = tl.sum(is_before.to(tl.int32), 1)
        tl.store(entries_ptr + first + entry, row * NUM_SLOTS + slot, mask=inside)


class Bitmap(NamedTuple):
    """A bit for every block and query, for some heads and blocks at a time."""

    words: Tensor  # int32 [num_heads * num_blocks * num_words]
    cursor: Tensor  # int32 [HKV]: how many entries of a head are written
    both: Tensor  # these two, which begin as zeros
    num_words: int  # of a block: those of the longest sequence, at whatever bit it ends
    num_heads: int  # at a time
    num_blocks: int


def new_bitmap(call: IndexCall, num_blocks: int) -> Bitmap:
    """A bitmap for as many heads and blocks as fit BITMAP_BYTES and the workspace."""
    num_rows, num_heads, _ = call.block_indices.shape
    num_words = min(cdiv(num_rows, 32), cdiv(call.sequences.max_seqlen, 32) + 1)
    row_bytes, budget = 4 * num_words, min(BITMAP_BYTES, call.workspace_bytes)
    some_blocks = min(max(budget // row_bytes, 1), num_blocks)
    some_heads = min(max(budget // (row_bytes * num_blocks), 1), num_heads)
    room = cdiv(some_heads * some_blocks * num_words, 4) * 4  # the cursor begins at 16 bytes
    both = torch.empty(room + num_heads, dtype=torch.int32, device=call.block_indices.device)
    return Bitmap(both[:room], both[room:], both, num_words, some_heads, some_blocks)


def build_block_index(call: IndexCall, flags: Tensor | None = None) -> BlockIndex:
    """For every KV head and block number the queries that chose it.

    Dense, and so in no list, are the first `init_blocks` and the last `local_blocks` blocks up to
    the query's own, and the query's own block whatever local_blocks is.

    flags: int32 `[HKV, T]`, BY_UNION of queries that are to be in no list either, and 0 of others.
    """
    num_rows, num_heads, num_indices = call.block_indices.shape
    block_size, init_blocks, local_blocks = call.blocks
    row_table = locate_rows(num_rows, call.sequences, block_size)
    block_table = locate_blocks(call.num_keys, call.sequences, block_size)
    index = empty_index(call, row_table, block_table)
    if num_rows == 0 or num_heads == 0:
        return index

    rows, blocks, num_blocks = RowTable(*row_table), BlockTable(*block_table), block_table.shape[1]
    indices = heads(rows_contiguous(call.block_indices))
    counts = None if call.block_counts is None else heads(call.block_counts)

    # The sparse blocks of every query, -1 elsewhere. 16 bits where they do: a row of 16 is then one
    # sector of memory.
    slots, padded = num_slots(num_indices, call.blocks), max(next_power_of_2(num_indices), 2)
    dtype = torch.int16 if cdiv(call.sequences.max_seqlen, block_size) < 2**15 else torch.int32
    sparse = index.entries.new_empty(num_heads, num_rows, padded, dtype=dtype)
    bitmap, cursor, both, num_words, some_heads, some_blocks = new_bitmap(call, num_blocks)
    mark_rows = max(1024 // padded, 16) if padded <= 16 else max(512 // padded, 4)

    of_rows = (num_rows, init_blocks, local_blocks)
    to_mark = (indices, counts, rows, sparse, index, bitmap, flags, *of_rows)
    to_collect = (blocks, sparse, index, bitmap, cursor, num_rows, num_blocks)
    marking = dict(
        NUM_INDICES=num_indices,
        PADDED_INDICES=padded,
        NUM_SLOTS=slots,
        BLOCK_SIZE=block_size,
        ROWS=mark_rows,
        num_warps=4,
    )
    collecting = dict(
        NUM_SLOTS=max(slots, 1), PADDED_INDICES=padded, WORDS=512, ENTRIES=128, num_warps=2
    )
    for head in range(0, num_heads, some_heads):
        count = min(some_heads, num_heads - head)
        for low in range(0, num_blocks, some_blocks):
            high = min(low + some_blocks, num_blocks)
            where = (num_words, head, low, high)
            is_first = head == low == 0
            (both if is_first else bitmap[: count * (high - low) * num_words]).zero_()
            mark_kernel[(cdiv(num_rows, mark_rows), count)](*to_mark, *where, **marking)
            collect_kernel[(high - low, count)](*to_collect, *where, **collecting)
    return index
