"""Selected attention (docs/spec.md, section 5): query t sees position p iff p's block was
selected and p <= t.

In long sequences a block's keys meet the queries that selected it, as in Flash Sparse Attention:
the work follows what was selected. Where that is much of the sequence, or the queries are few, all
keys meet all queries under a mask.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.ops.common.reference_attention import Chunk, attention, backward_of
from nsa_fsa.ops.common.reference_chunks import chunk_size, most_queries, query_chunks, sequences

# How many times as many queries as selected keys it takes to go by block. Forward and backward
# on one core are 1.4 times as fast by block from 2 times on (2,048 tokens, blocks of 64), 2.0
# from 4 on (4,096), 3 from 8 on (8,192); where it is about few and small blocks (1,024 tokens,
# blocks of 16), 0.9.
QUERIES_PER_KEY = 4


def chunks(
    q: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    block_size: int,
    block_counts: Tensor | None = None,
    init_blocks: int = 0,
    local_blocks: int = 0,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Iterator[Chunk]:
    """Which keys each chunk of queries sees, of block_indices `[Tq, HKV, T_sel]`, which may repeat,
    be unsorted, negative or out of range. Only faster backends make use of what `init_blocks` and
    `local_blocks` promise.
    """
    num_kv_heads, num_indices = block_indices.shape[1:]

    for sequence in sequences(cu_seqlens, cu_seqlens_q, seqused_k):
        # On a CPU alone: a GPU would wait for who chose each block to be read back.
        num_queries = sequence.q.stop - sequence.q.start
        many_queries = QUERIES_PER_KEY * num_indices * block_size <= num_queries
        by_block = many_queries and q.device.type == "cpu"
        if by_block:
            size = chunk_size(q[:, : q.shape[1] // num_kv_heads], block_size)
            size = min(size, most_queries(num_kv_heads * -(-sequence.length // block_size)))
        else:
            size = chunk_size(q, sequence.length)

        for rows, first, stop in query_chunks(sequence, size):
            t = torch.arange(first, stop, device=q.device)
            counts = None if block_counts is None else block_counts[rows]
            selected = selected_blocks(
                block_indices[rows], counts, t // block_size, -(-stop // block_size)
            )
            position = torch.arange(stop, device=q.device)
            if not by_block:
                visible = selected[..., position // block_size] & (position <= t[:, None])[:, None]
                yield Chunk(rows, slice(sequence.k.start, sequence.k.start + stop), visible)
                continue

            for head, block in selected.any(0).nonzero().tolist():
                queries = selected[:, head, block].nonzero().flatten()
                begin, end = block * block_size, min((block + 1) * block_size, stop)
                visible = position[begin:end] <= t[queries, None]
                keys = slice(sequence.k.start + begin, sequence.k.start + end)
                yield Chunk(rows.start + queries, keys, visible[:, None], slice(head, head + 1))


def selected_blocks(indices: Tensor, counts: Tensor | None, own: Tensor, num_blocks: int) -> Tensor:
    """Whether each query selected each of the first num_blocks blocks: bool `[M, HKV, num_blocks]`.

    Args:
        indices: `[M, HKV, T_sel]`.
        counts: how many of them count, `[M, HKV]`; None for all.
        own: the numbers of the queries' own blocks, `[M]`.
        num_blocks: more than any of these numbers.
    """
    index = indices.long()
    valid = (index >= 0) & (index <= own[:, None, None])
    if counts is not None:
        valid &= torch.arange(index.shape[2], device=index.device) < counts[..., None]
    # A set of blocks: duplicates collapse, and what is not valid lands in a spare column.
    selected = index.new_zeros(*index.shape[:2], num_blocks + 1, dtype=torch.bool)
    selected.scatter_(2, torch.where(valid, index, num_blocks), True)
    return selected[..., :num_blocks]


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, *layout: Any, scale: float, **rule: Any
) -> tuple[Tensor, Tensor]:
    """q `[Tq, HQ, D]`, k `[T, HKV, D]`, v `[T, HKV, DV]` -> o `[Tq, HQ, DV]`, lse `[Tq, HQ]`.

    The block indices and all other arguments are those of `chunks`.
    """
    return attention(q, k, v, chunks(q, *layout, **rule), scale)


selected_attention_backward = backward_of(chunks)
