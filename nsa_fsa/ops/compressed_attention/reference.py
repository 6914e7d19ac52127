"""Compressed attention (docs/spec.md, section 2): a query sees the windows that lie in its past."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.ops.common.reference_attention import Chunk, attention, backward_of
from nsa_fsa.ops.common.reference_chunks import chunk_size, query_chunks, sequences_of
from nsa_fsa.ops.compression.reference import num_windows
from nsa_fsa.sequences import Sequences


def chunks(
    q: Tensor, *layout: Any, kernel_size: int, kernel_stride: int, **cached: Any
) -> Iterator[Chunk]:
    """Which compressed tokens each chunk of queries sees: those with `i*s + l - 1 <= t`.

    layout, cached: members of `Sequences`.
    """
    for sequence in sequences_of(Sequences(*layout, **cached)):
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
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *layout: Any, scale: float, **rule: Any
) -> tuple[Tensor, Tensor]:
    """q `[Tq, HQ, D]`, k_cmp `[T // s, HKV, D]`, v_cmp `[T // s, HKV, DV]` -> o `[Tq, HQ, DV]`,
    lse `[Tq, HQ]`. The other arguments are those of `chunks`.
    """
    return attention(q, k_cmp, v_cmp, chunks(q, *layout, **rule), scale)


# Rows that no compressed token owns get 0.
compressed_attention_backward = backward_of(chunks)
