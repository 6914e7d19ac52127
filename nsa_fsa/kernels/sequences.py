"""Where packed rows and blocks lie: the sequence descriptors, looked up once per call instead of in every kernel.

Blocks of all sequences share one numbering that needs nothing read back from the device: block j of sequence b has number
`cu_seqlens[b] // block_size + b + j`. There is always room, because `floor(x / n) + ceil(y / n) <= floor((x + y) / n) + 1`;
numbers that no block owns have no rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_fsa.kernels.sizes import cdiv


class Rows(NamedTuple):
    """Of every query row, int32 `[T]`: the rows of what `locate_rows` returns."""

    position: Tensor  # inside its sequence; of the last queries of a longer sequence where the keys lie in a cache
    first_key: Tensor  # the row of its sequence's first key
    first_block: Tensor  # the number of its sequence's first block


class Blocks(NamedTuple):
    """Of every block number, int32 `[num_blocks]`: the rows of what `locate_blocks` returns."""

    first_row: Tensor  # row of its first key
    num_rows: Tensor  # keys in it: block_size, fewer at the end of a sequence, 0 for a number that no block owns
    number: Tensor  # inside its sequence
    end_row: Tensor  # the row after its sequence's last


@triton.jit
def find_sequence(starts_ptr, value, num_sequences, num_steps, divisor, step: tl.constexpr):
    """The last sequence b with `starts[b] // divisor + b * step <= value`, by bisection (empty sequences end up before it)."""
    low = value * 0
    high = low + num_sequences
    for _ in range(num_steps):
        middle = (low + high) // 2
        ahead = tl.load(starts_ptr + middle) // divisor + middle * step > value
        high = tl.where(ahead, middle, high)
        low = tl.where(ahead, low, middle)
    return low


@triton.jit
def locate_rows_kernel(
    cu_seqlens_ptr, cu_seqlens_q_ptr, seqused_k_ptr, position_ptr, first_key_ptr, first_block_ptr,
    num_rows, num_sequences, num_steps, block_size, CACHED: tl.constexpr, HAS_USED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    starts_ptr = cu_seqlens_q_ptr if CACHED else cu_seqlens_ptr
    sequence = find_sequence(starts_ptr, tl.where(inside, row, 0), num_sequences, num_steps, 1, 0)
    first_key = tl.load(cu_seqlens_ptr + sequence)
    if CACHED:
        end = tl.load(cu_seqlens_q_ptr + sequence + 1)
        position = tl.load(seqused_k_ptr + sequence) - (end - row)
    else:
        position = row - first_key
        if HAS_USED:  # a row past the used ones sees nothing
            position = tl.where(position < tl.load(seqused_k_ptr + sequence), position, -1)
    tl.store(position_ptr + row, position, mask=inside)
    tl.store(first_key_ptr + row, first_key, mask=inside)
    tl.store(first_block_ptr + row, first_key // block_size + sequence, mask=inside)


@triton.jit
def locate_blocks_kernel(
    cu_seqlens_ptr, first_row_ptr, num_rows_ptr, index_ptr, end_row_ptr,
    num_blocks, num_sequences, num_steps, block_size, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    sequence = find_sequence(cu_seqlens_ptr, tl.where(inside, block, 0), num_sequences, num_steps, block_size, 1)
    start, end = tl.load(cu_seqlens_ptr + sequence), tl.load(cu_seqlens_ptr + sequence + 1)
    index = block - (start // block_size + sequence)
    first_row = start + index * block_size
    tl.store(first_row_ptr + block, first_row, mask=inside)
    tl.store(num_rows_ptr + block, tl.minimum(tl.maximum(end - first_row, 0), block_size), mask=inside)
    tl.store(index_ptr + block, index, mask=inside)
    tl.store(end_row_ptr + block, end, mask=inside)


def max_num_blocks(num_rows: int, num_sequences: int, block_size: int) -> int:
    """How many block numbers a packed batch needs at most."""
    return num_rows // block_size + num_sequences


def locate_rows(
    num_rows: int, cu_seqlens: Tensor, block_size: int, cu_seqlens_q: Tensor | None = None, seqused_k: Tensor | None = None
) -> Tensor:
    """`[3, num_rows]`, read as `Rows(*found)`; cu_seqlens_q and seqused_k as in `ops.Layout`."""
    num_sequences = cu_seqlens.shape[0] - 1
    found = torch.empty(3, num_rows, dtype=torch.int32, device=cu_seqlens.device)
    if num_rows:
        cached = cu_seqlens_q is not None
        if cached and seqused_k is None:
            seqused_k = cu_seqlens.diff()
        locate_rows_kernel[(cdiv(num_rows, 256),)](
            cu_seqlens, cu_seqlens_q, seqused_k, *found, num_rows, num_sequences, num_sequences.bit_length(), block_size,
            CACHED=cached, HAS_USED=seqused_k is not None, ROWS=256,
        )  # fmt: skip
    return found


def locate_blocks(num_rows: int, cu_seqlens: Tensor, block_size: int) -> Tensor:
    """`[4, num_blocks]`, read as `Blocks(*found)`, for a packed batch of `num_rows` keys."""
    num_sequences = cu_seqlens.shape[0] - 1
    num_blocks = max_num_blocks(num_rows, num_sequences, block_size)
    found = torch.empty(4, num_blocks, dtype=torch.int32, device=cu_seqlens.device)
    if num_blocks:
        locate_blocks_kernel[(cdiv(num_blocks, 256),)](
            cu_seqlens, *found, num_blocks, num_sequences, num_sequences.bit_length(), block_size, BLOCKS=256
        )
    return found
