"""Selected attention (docs/spec.md, section 5): query t sees position p iff p's block was selected and p <= t."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_fsa.reference.attention import Chunk, attention, attention_backward
from nsa_fsa.reference.sequences import chunk_size, query_chunks, sequences


def chunks(
    q: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    block_counts: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Iterator[Chunk]:
    """Which keys each chunk of queries sees. Indices may repeat, be unsorted, negative or out of range."""
    slot = torch.arange(block_indices.shape[2], device=q.device)
    for sequence in sequences(cu_seqlens, cu_seqlens_q, seqused_k):
        for rows, first, stop in query_chunks(sequence, chunk_size(q, sequence.length)):
            t = torch.arange(first, stop, device=q.device)
            num_blocks = -(-stop // block_size)
            index = block_indices[rows].long()  # [M, HKV, T_sel]
            valid = (index >= 0) & (index <= (t // block_size)[:, None, None])
            if block_counts is not None:
                valid &= slot < block_counts[rows][..., None]
            # A set of blocks, so duplicates collapse; what is not valid lands in a spare column that is then dropped.
            selected = torch.zeros(*index.shape[:2], num_blocks + 1, dtype=torch.bool, device=q.device)
            selected.scatter_(2, torch.where(valid, index, num_blocks), True)
            visible = selected[..., :num_blocks].repeat_interleave(block_size, dim=2)[..., :stop]
            causal = torch.arange(stop, device=q.device) <= t[:, None]
            yield Chunk(rows, slice(sequence.k.start, sequence.k.start + stop), visible & causal[:, None])


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    block_size: int,
    block_counts: Tensor | None = None,
    init_blocks: int = 0,
    local_blocks: int = 0,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q `[Tq, HQ, D]`, k `[T, HKV, D]`, v `[T, HKV, DV]`, block_indices `[Tq, HKV, T_sel]` -> o `[Tq, HQ, DV]`, lse.

    `init_blocks` and `local_blocks` are promises about the indices that only faster backends make use of.
    """
    plan = chunks(q, block_indices, cu_seqlens, block_size, block_counts, cu_seqlens_q, seqused_k)
    return attention(q, k, v, plan, scale)


def selected_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    block_size: int,
    block_counts: Tensor | None = None,
    init_blocks: int = 0,
    local_blocks: int = 0,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k and v."""
    plan = chunks(q, block_indices, cu_seqlens, block_size, block_counts, cu_seqlens_q, seqused_k)
    return attention_backward(do, q, k, v, lse, plan, scale, delta)
