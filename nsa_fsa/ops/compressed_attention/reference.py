"""Compressed attention (docs/spec.md, section 2): query t sees compressed token i iff its window
lies in the past.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_fsa.ops.common.calls import Windows
from nsa_fsa.ops.common.reference_attention import Chunk, attention, attention_backward
from nsa_fsa.ops.common.reference_chunks import chunk_size, query_chunks, sequences
from nsa_fsa.ops.compression.reference import num_windows
from nsa_fsa.sequences import Sequences


def chunks(q: Tensor, layout: Sequences, windows: Windows) -> Iterator[Chunk]:
    """Which compressed tokens each chunk of queries sees: those with `i*s + l - 1 <= t`."""
    kernel_size, kernel_stride = windows
    for sequence in sequences(layout.cu_seqlens, layout.cu_seqlens_q, layout.seqused_k):
        first_token = sequence.k.start // kernel_stride
        n = num_windows(sequence.length, kernel_size, kernel_stride)
        for rows, first, stop in query_chunks(sequence, chunk_size(q, n)):
            n_seen = num_windows(stop, kernel_size, kernel_stride)
            t = torch.arange(first, stop, device=q.device)
            window_end = torch.arange(n_seen, device=q.device) * kernel_stride + kernel_size - 1
            yield Chunk(
                rows, slice(first_token, first_token + n_seen), (window_end <= t[:, None])[:, None]
            )


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q `[Tq, HQ, D]`, k_cmp `[T // s, HKV, D]`, v_cmp `[T // s, HKV, DV]` -> o `[Tq, HQ, DV]`,
    lse `[Tq, HQ]`.
    """
    layout = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    walk = chunks(q, layout, Windows(kernel_size, kernel_stride))
    return attention(q, k_cmp, v_cmp, walk, scale)


def compressed_attention_backward(
    do: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor | None,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to q, k_cmp and v_cmp; rows that no compressed token owns get 0."""
    layout = Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    walk = chunks(q, layout, Windows(kernel_size, kernel_stride))
    return attention_backward(do, q, k_cmp, v_cmp, o, lse, walk, scale, delta)
