"""Which new tokens a model decodes by themselves."""

from typing import Any

from torch import Tensor

from nsa_fsa.integrations.transformers import cache
from nsa_fsa.integrations.transformers.turning import (
    make_turn,
    positions_follow,
    turning_of,
    turns_back,
)


def find_step(
    decoder: Any,
    layers: list[Any],
    own: Any,
    past: int,
    lengths: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    mask: Tensor | None,
    position_ids: Any,
    inputs: Tensor,
) -> cache.Step | None:
    """The step of new tokens that a decoder's layers can decode by themselves beside a cache; None:
    they compress all keys.

    Args:
        own: the cache, which holds `past` columns.
        lengths: int32 `[B]`, real tokens with the new ones, after a past.
        rows, columns: as of a `Batch`, None where nothing is padding.
        mask: `[B, past + S]`, or None.
        position_ids: of the new tokens, or None.
        inputs: any tensor `[B, S, ...]` of theirs.
    """
    num_new, turns, follow = inputs.shape[1], turns_back(layers), None
    mask = mask if rows is not None or columns is not None else None
    if turns and mask is not None:
        follow = positions_follow(mask, position_ids, past)
    followed = cache.compare_masks(own, mask, past, follow)
    if past and rows is None and followed and cache.can_decode(layers, own, past, num_new):
        assert lengths is not None
        turning = None
        if turns:
            rotary = decoder.rotary_emb
            turning = turning_of(layers, own.nsa_turn, rotary, position_ids, past, num_new)
        return cache.step_of(lengths, columns, turning)
    if turns:
        cache.keep_turn(own, make_turn(layers, decoder.rotary_emb, inputs.device))
    return None
