"""The inverse of block_indices: for every KV head and block, the queries that chose it, ascending.

Two kernels and a bitmap. `mark` reads each query's row of block_indices once: what is out of range, repeated or dense (see
below) is dropped, and each of the others sets one bit per (block, query). `collect` owns one block: it counts and lists the
bits of its row, then looks up in which slot of each query the block stands. A list needs one atomic to get its place, so
where it lies differs from run to run and what it says does not. A block's row has as many words as the longest sequence, for
none but its own sequence's queries can choose it, and begins with that sequence's first: 8,192 sequences of 128 tokens take
0.5 MB a head, and took 3.2 GB as rows of the whole batch. The bitmap is made for as many heads and blocks at a time as fit its
budget.

Measured on an H200, 65,536 tokens, 13 sparse blocks of 64, ms: 1.9 with 64 KV heads (zeroing 0.1, marking 0.9, collecting
0.9), 0.2 with 4. Counting and filling with global atomics, whose order also differs from run to run: 8.4 and 0.7.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_fsa.ops.common.locate import BlockTable, RowTable, locate_blocks, locate_rows
from nsa_fsa.ops.common.primitives import kernel
from nsa_fsa.ops.common.sizes import cdiv, next_power_of_2
from nsa_fsa.ops.selected_attention.call import BlockIndex, IndexCall, num_slots

BITMAP_BYTES = 1 << 29


@triton.jit
def popcount(x):
    """Set bits of each element of a uint32 tensor, int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@kernel
def mark_kernel(
    indices_ptr, counts_ptr, position_ptr, first_key_ptr, first_block_ptr, sparse_ptr, num_sparse_ptr, bitmap_ptr,
    stride_indices_t, stride_indices_h, stride_counts_t, stride_counts_h,
    num_rows, num_words, first_head, low_block, high_block, init_blocks, local_blocks,
    NUM_INDICES: tl.constexpr, PADDED_INDICES: tl.constexpr, NUM_SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_COUNTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = (first_head + tl.program_id(1)).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    column = tl.arange(0, PADDED_INDICES)
    own = tl.load(position_ptr + row, mask=inside, other=-1) // BLOCK_SIZE
    first_block = tl.load(first_block_ptr + row, mask=inside, other=0)

    count = tl.full([ROWS], NUM_INDICES, tl.int32)
    if HAS_COUNTS:
        count = tl.load(counts_ptr + row.to(tl.int64) * stride_counts_t + head * stride_counts_h, mask=inside, other=0)
    read = inside[:, None] & (column < NUM_INDICES)[None, :] & (column[None, :] < count[:, None])
    at = row.to(tl.int64)[:, None] * stride_indices_t + head * stride_indices_h + column[None, :]
    block = tl.load(indices_ptr + at, mask=read, other=-1)  # [ROWS, PADDED_INDICES]

    chosen = block >= 0
    # Ascending rows, which is what select_blocks gives, cannot repeat a block: most tiles skip the comparison of all pairs.
    before = tl.load(indices_ptr + at - 1, mask=read & (column > 0)[None, :], other=-1)
    ascending = (column == 0)[None, :] | ~chosen | ((before >= 0) & (before < block))
    if tl.min(tl.min(ascending.to(tl.int32), 1), 0) == 0:
        for other in range(0, NUM_INDICES):
            earlier = tl.load(indices_ptr + at - column[None, :] + other, mask=read & (other < column)[None, :], other=-1)
            chosen = chosen & (earlier != block)
    sparse = chosen & (block >= init_blocks) & (block <= own[:, None] - tl.maximum(local_blocks, 1))
    rank = tl.cumsum(sparse.to(tl.int32), 1) - 1
    sparse = sparse & (rank < NUM_SLOTS)  # more only where the caller's promise about forced blocks does not hold
    has_own = tl.max((chosen & (block == own[:, None])).to(tl.int32), 1)
    num_sparse = tl.sum(sparse.to(tl.int32), 1)
    tl.store(num_sparse_ptr + head * num_rows + row, num_sparse | (has_own << 31), mask=inside)

    at = (head * num_rows + row)[:, None] * PADDED_INDICES + column[None, :]
    tl.store(sparse_ptr + at, tl.where(sparse, block, -1).to(sparse_ptr.dtype.element_ty), mask=inside[:, None])
    number = first_block[:, None] + block
    word = row // 32 - tl.load(first_key_ptr + row, mask=inside, other=0) // 32
    marked = sparse & (number >= low_block) & (number < high_block) & (word < num_words)[:, None]
    word = (tl.program_id(1).to(tl.int64) * (high_block - low_block) + number - low_block) * num_words + word[:, None]
    bit = tl.full([ROWS, PADDED_INDICES], 1, tl.int32) << (row % 32)[:, None]
    tl.atomic_or(bitmap_ptr + word, bit, mask=marked, sem="relaxed")


@kernel
def collect_kernel(
    bitmap_ptr, sparse_ptr, first_row_ptr, num_block_rows_ptr, block_index_ptr, end_row_ptr,
    entries_ptr, first_entry_ptr, num_entries_ptr, cursor_ptr,
    num_rows, num_words, num_blocks, capacity, first_head, low_block, high_block,
    NUM_SLOTS: tl.constexpr, PADDED_INDICES: tl.constexpr, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.program_id(1)
    block = low_block + tl.program_id(0)
    segment = head * num_blocks + block
    if tl.load(num_block_rows_ptr + block) == 0:
        tl.store(first_entry_ptr + segment, 0)
        tl.store(num_entries_ptr + segment, 0)
        return
    # Only later queries of the same sequence can have chosen this block without owning it.
    first_row = tl.load(first_row_ptr + block)
    first_word = (first_row - tl.load(block_index_ptr + block) * BLOCK_SIZE) // 32  # of the sequence
    start = first_row // 32
    stop = tl.minimum((tl.load(end_row_ptr + block) + 31) // 32, first_word + num_words)
    bitmap_ptr += (tl.program_id(1).to(tl.int64) * (high_block - low_block) + block - low_block) * num_words - first_word
    column = tl.arange(0, WORDS)

    total = 0
    for first in range(start, stop, WORDS):
        word = tl.load(bitmap_ptr + first + column, mask=first + column < stop, other=0)
        total += tl.sum(popcount(word.to(tl.uint32, bitcast=True)))
    place = tl.atomic_add(cursor_ptr + head, total, sem="relaxed")
    tl.store(first_entry_ptr + segment, place)
    tl.store(num_entries_ptr + segment, total)
    entries_ptr += head.to(tl.int64) * capacity + place

    listed = 0
    for first in range(start, stop, WORDS):
        word = tl.load(bitmap_ptr + first + column, mask=first + column < stop, other=0).to(tl.uint32, bitcast=True)
        bits = popcount(word)
        at = listed + tl.cumsum(bits, 0) - bits
        listed += tl.sum(bits)
        most = tl.max(bits)
        while most > 0:  # the lowest bit of every word at once
            lowest = word ^ (word & (word - 1))
            tl.store(entries_ptr + at, (first + column) * 32 + popcount(lowest - 1), mask=word != 0)
            word = word & (word - 1)
            at += 1
            most -= 1

    tl.debug_barrier()  # the rows just listed are read back by other threads of this program
    entry = tl.arange(0, ENTRIES)
    column = tl.arange(0, PADDED_INDICES)
    wanted = tl.load(block_index_ptr + block).to(sparse_ptr.dtype.element_ty)
    sparse_ptr += head.to(tl.int64) * num_rows * PADDED_INDICES
    for first in range(0, total, ENTRIES):
        inside = first + entry < total
        row = tl.load(entries_ptr + first + entry, mask=inside, other=0)
        at = row.to(tl.int64)[:, None] * PADDED_INDICES + column[None, :]
        found = tl.load(sparse_ptr + at, mask=inside[:, None], other=-1)
        chosen_at = tl.min(tl.where(found == wanted, column[None, :], PADDED_INDICES), 1)
        slot = tl.sum(((found >= 0) & (column[None, :] < chosen_at[:, None])).to(tl.int32), 1)
        tl.store(entries_ptr + first + entry, row * NUM_SLOTS + slot, mask=inside)


def build_block_index(call: IndexCall) -> BlockIndex:
    """For every KV head and block number the queries that chose it.

    Dense, and so in no list, are the first `init_blocks` and the last `local_blocks` blocks up to the query's own, and the
    query's own block whatever local_blocks is. The bitmap takes no more than BITMAP_BYTES of the workspace.
    """
    block_indices, block_counts, sequences = call.block_indices, call.block_counts, call.sequences
    block_size, init_blocks, local_blocks = call.blocks
    num_rows, num_heads, num_indices = block_indices.shape
    row_table = locate_rows(num_rows, sequences.cu_seqlens, block_size)
    block_table = locate_blocks(num_rows, sequences.cu_seqlens, block_size)
    num_blocks, slots = block_table.shape[1], num_slots(num_indices, call.blocks)
    device = block_indices.device
    new: dict[str, Any] = dict(dtype=torch.int32, device=device)
    index = BlockIndex(
        torch.empty(num_heads, num_rows * slots, **new),
        torch.empty(num_heads, num_blocks, **new),
        torch.empty(num_heads, num_blocks, **new),
        torch.empty(num_heads, num_rows, **new),
        row_table,
        block_table,
    )
    if num_rows == 0 or num_heads == 0:
        return index
    rows, blocks = RowTable(*row_table), BlockTable(*block_table)
    if block_indices.stride(2) != 1:
        block_indices = block_indices.contiguous()
    padded_indices = max(next_power_of_2(num_indices), 2)
    # The sparse blocks of every query, -1 elsewhere. 16 bits where they do: a row of 16 is then one sector of memory.
    dtype = torch.int16 if cdiv(sequences.max_seqlen, block_size) < 2**15 else torch.int32
    sparse = torch.empty(num_heads, num_rows, padded_indices, dtype=dtype, device=device)
    num_words = min(cdiv(num_rows, 32), cdiv(sequences.max_seqlen, 32) + 1)  # of a sequence, at whatever bit it begins
    bitmap_bytes = min(BITMAP_BYTES, call.workspace_bytes)
    block_step = min(max(bitmap_bytes // (4 * num_words), 1), num_blocks)
    head_step = min(max(bitmap_bytes // (4 * num_words * num_blocks), 1), num_heads)
    bitmap = torch.empty(head_step * block_step * num_words, **new)
    cursor = torch.zeros(num_heads, **new)
    counts_strides = block_counts.stride() if block_counts is not None else (0, 0)
    mark_rows = max(1024 // padded_indices, 16) if padded_indices <= 16 else max(512 // padded_indices, 4)
    for head in range(0, num_heads, head_step):
        heads = min(head_step, num_heads - head)
        for low in range(0, num_blocks, block_step):
            high = min(low + block_step, num_blocks)
            bitmap[: heads * (high - low) * num_words].zero_()
            mark_kernel[(cdiv(num_rows, mark_rows), heads)](
                block_indices, block_counts, *rows, sparse, index.num_sparse, bitmap,
                *block_indices.stride()[:2], *counts_strides,
                num_rows, num_words, head, low, high, init_blocks, local_blocks,
                NUM_INDICES=num_indices, PADDED_INDICES=padded_indices, NUM_SLOTS=slots,
                BLOCK_SIZE=block_size, HAS_COUNTS=block_counts is not None, ROWS=mark_rows, num_warps=4,
            )  # fmt: skip
            collect_kernel[(high - low, heads)](
                bitmap, sparse, *blocks, *index[:3], cursor,
                num_rows, num_words, num_blocks, index.entries.shape[1], head, low, high,
                NUM_SLOTS=max(slots, 1), PADDED_INDICES=padded_indices, BLOCK_SIZE=block_size, WORDS=512,
                ENTRIES=128, num_warps=2,
            )  # fmt: skip
    return index
