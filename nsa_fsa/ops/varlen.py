"""Packed sequences without device-to-host syncs: who a row belongs to, and packing of padded batches.

Everything here is tensor arithmetic on the device except `pack_padded`, whose result size only the mask knows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Where the sequences of a packed batch lie; the arguments that every operator takes.

    Without a cache only `cu_seqlens` and `max_seqlen` are set, and queries and keys share their rows. With one, keys lie in
    a buffer: sequence b begins at row `cu_seqlens[b]`, only its first `seqused_k[b]` rows count, and its queries, rows
    `cu_seqlens_q[b] : cu_seqlens_q[b + 1]` of q, are its last positions.
    """

    cu_seqlens: Tensor  # int32 [B + 1]
    max_seqlen: int  # an upper bound on the number of keys of one sequence
    cu_seqlens_q: Tensor | None = None  # int32 [B + 1]
    seqused_k: Tensor | None = None  # int32 [B]


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """Lengths `[B]` -> int32 `[B + 1]` starting with 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def sequence_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """The sequence that each of `num_rows` packed rows belongs to, int64 `[num_rows]`."""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def positions(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """Each packed row's position inside its own sequence, int64 `[num_rows]`."""
    return torch.arange(num_rows, device=cu_seqlens.device) - cu_seqlens[sequence_ids(cu_seqlens, num_rows)]


def uniform_layout(batch_size: int, length: int, device: torch.device) -> Layout:
    """The layout of a `[B, S]` batch without padding."""
    return Layout(torch.arange(batch_size + 1, dtype=torch.int32, device=device) * length, length)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Boundaries of the sequences in a packed `[B, S]` batch: a new one starts where positions do not go up by one.

    Reads the number of sequences back from the device.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    rows = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(rows, (0, 1), value=position_ids.numel()).int()


def pack_padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """A padding mask `[B, S]` (non-zero: a real token) -> rows of the real tokens in the flattened batch, and cu_seqlens.

    Reads the number of real tokens back from the device.
    """
    mask = mask.bool()
    return mask.flatten().nonzero().flatten(), cu_seqlens_from_lengths(mask.sum(1))
