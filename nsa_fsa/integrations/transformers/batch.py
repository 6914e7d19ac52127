"""What every layer of a forward needs to know of its batch: where the real tokens and the sequences
lie, found from what models are called with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.context_parallel import check_context_parallel
from nsa_fsa.integrations.transformers import cache
from nsa_fsa.sequences import Packing, Sequences, keep_padding, pack_batch, uniform_layout


class Batch(NamedTuple):
    """What every layer of a forward needs to know about its batch `[B, S]`."""

    past: int  # columns that the cache held before, padding included
    rows: Tensor | None  # int64 [T], of the flattened batch those with real tokens; None: all
    layout: Sequences  # where the sequences' queries and keys lie
    # int64 [B, past + S], after a past: columns of the keys, of every row the real ones first.
    columns: Tensor | None = None  # None: all are real
    real: Tensor | None = None  # bool [B, S], where torch traces and cannot leave padding out
    packed: bool = False  # whether the sequences are others than the batch's rows
    # Cos and sin to turn keys back: after a past [B or 1, past + S, rotary_dim], of `columns`; and
    # where ranks share sequences, of all their tokens.
    rotation: tuple[Tensor, Tensor] | None = None
    # The cache of transformers, where compressed tokens may lie beside it.
    kept: Any = None
    step: cache.Step | None = None  # set where compressed tokens are all there, and new ones few
    # The ranks that share the sequences: B, `layout` and `rotation` are of all ranks' tokens then.
    context_parallel: ContextParallel | None = None


def find_batch(
    like: Tensor,
    past: int | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    asked: bool = False,
    context_parallel: ContextParallel | None = None,
    **_: Any,
) -> Batch:
    """Where the real tokens and the sequences of a batch lie, from what models are called with.

    Args:
        like: any tensor `[B, S, ...]` on the batch's device.
        past: columns that the cache holds; None: there is no cache.
        attention_mask: `[B, past + S]`, or 4D if it says no more than that would.
        position_ids: `[B or 1, S]`; without a past, a sequence starts wherever they do not go on.
        cu_seq_lens_q, max_length_q: boundaries of the sequences in the flattened batch, if known.
        asked: whether the cache was asked for, which a packed batch cannot fill; one that is there
            by default is left out.
        context_parallel: the ranks that share the sequences, of whose tokens this rank has S; they
            are the batch's rows, or those of `cu_seq_lens_q`.

    Raises:
        ValueError: for a mask that is no padding mask of this batch, or comes beside boundaries.
    """
    (batch_size, length), cached, past = like.shape[:2], past is not None, past or 0
    if context_parallel is not None:
        check_context_parallel(context_parallel, attention_mask, past or None)
        length *= context_parallel.size

    if cu_seq_lens_q is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seq_lens_q are both given. Fix: pass one.")
        longest = batch_size * length if max_length_q is None else int(max_length_q)
        layout = Sequences(cu_seq_lens_q, longest).check(like.device)
        return Batch(past, None, layout, packed=True, context_parallel=context_parallel)

    if context_parallel is not None:
        layout = uniform_layout(batch_size, length, like.device)
        return Batch(0, None, layout, context_parallel=context_parallel)

    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = padding_of(attention_mask, batch_size, past, length)
    if attention_mask is not None and attention_mask.shape != (batch_size, past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; "
            f"it must be [B, past + S] = {(batch_size, past + length)}. "
            "Fix: a column for every token so far, those in the cache included."
        )

    compiling = torch.compiler.is_compiling()
    # Whether positions pack a batch is in their values, which a trace cannot see, and `generate`
    # passes them with every prompt: beside a cache they bound no sequences then.
    if past or length == 1 or (asked and compiling):
        position_ids = None
    if position_ids is not None and position_ids.ndim == 3:  # of text, height and width
        position_ids = position_ids[0] if position_ids.shape[0] == 4 else None

    if compiling and attention_mask is not None and position_ids is None and not cached:
        packing = keep_padding(attention_mask)
    else:
        packing = pack_batch(batch_size, length, like.device, attention_mask, position_ids)
    return _beside(packing, past, length)


def _beside(packing: Packing, past: int, length: int) -> Batch:
    """New tokens, and after a past all keys, which a cache holds column by column."""
    rows, layout, mask, packed, padded = packing
    if past == 0:
        real = mask if mask is not None and torch.compiler.is_compiling() else None
        return Batch(0, rows, layout, real=real, packed=packed)
    starts = layout.cu_seqlens
    total = past + length
    key_starts = torch.arange(len(starts), dtype=torch.int32, device=starts.device) * total
    columns, lengths = None, torch.full_like(starts[1:], total)
    if mask is not None and padded:
        columns = cache.real_first(mask)
        lengths = mask.sum(1, dtype=torch.int32)
    return Batch(past, rows, Sequences(key_starts, total, starts, lengths), columns)


def padding_of(mask: Tensor, batch_size: int, past: int, length: int) -> Tensor:
    """The `[B, past + S]` mask that a 4D one says as much as; raises ValueError for any other."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.shape[0] == 1:
        visible = visible.expand(batch_size, -1, -1, -1)
    visible = visible[:, 0, :, : past + length]
    padding = visible[:, -1]
    column = torch.arange(past + length, device=mask.device)
    expected = (column <= column[past:, None]) & padding[:, None]
    # What padding sees is nobody's business, but that it is padding: transformers lets it see what
    # real tokens do, or everything.
    sees_all = ~padding[:, past:] & visible.all(-1)
    is_padding_mask = ((visible == expected).all(-1) | sees_all).all()
    reason = (
        f"attention_mask has shape {tuple(mask.shape)} and is not causal with padding, as "
        "where sequences are packed, or the tokens of an image see each other. "
        "Fix: pass the 2D mask; where packed, position_ids; with images, a model that reads them "
        "causally."
    )
    if torch.compiler.is_compiling():  # where values cannot be looked at
        torch._assert_async(is_padding_mask, reason)
    elif mask.shape[1] != 1 or not is_padding_mask:
        raise ValueError(reason)
    return padding
