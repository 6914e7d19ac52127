"""Sliding window attention (docs/spec.md, section 6): query t sees `max(0, t - w + 1) .. t`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_fsa.ops.common.reference_attention import Chunk, attention, backward_of
from nsa_fsa.ops.common.reference_chunks import chunk_size, query_chunks, sequences_of
from nsa_fsa.sequences import Sequences


def chunks(q: Tensor, *layout: Any, window_size: int, **cached: Any) -> Iterator[Chunk]:
    """Which keys each chunk of queries sees; those before the first query's window are not read.

    layout, cached: members of `Sequences`.
    """
    for sequence in sequences_of(Sequences(*layout, **cached)):
        # M queries read M + w - 1 keys, so chunks as long as the window keep the band of visible
        # keys half full.
        size = min(max(window_size, 64), sequence.length)
        size = min(size, chunk_size(q, min(size + window_size, sequence.length)))
        for rows, first, stop in query_chunks(sequence, max(1, size)):
            t = torch.arange(first, stop, device=q.device)[:, None]
            begin = max(0, first - window_size + 1)
            position = torch.arange(begin, stop, device=q.device)
            visible = (position <= t) & (position > t - window_size)
            yield Chunk(
                rows, slice(sequence.k.start + begin, sequence.k.start + stop), visible[:, None]
            )


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *layout: Any, scale: float, **rule: Any
) -> tuple[Tensor, Tensor]:
    """q `[Tq, HQ, D]`, k `[T, HKV, D]`, v `[T, HKV, DV]` -> o `[Tq, HQ, DV]`, lse `[Tq, HQ]`.

    The other arguments are those of `chunks`.
    """
    return attention(q, k, v, chunks(q, *layout, **rule), scale)


sliding_window_attention_backward = backward_of(chunks)
