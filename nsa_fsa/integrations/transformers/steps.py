"""Which new tokens a model decodes by themselves, and a warning where a few of them cannot be."""

import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsa_fsa.decode.operator import MOST_NEW
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
    if past and num_new <= MOST_NEW and not torch.is_grad_enabled():
        _warn(decoder, layers, _obstacle(layers, own, rows is not None, followed))
    return None


class Obstacle(NamedTuple):
    reason: str
    fix: str


def _obstacle(layers: list[Any], own: Any, padded: bool, followed: bool) -> Obstacle | None:
    """Why a few new tokens cannot be decoded by themselves; None: they can from the next ones on.

    padded: whether there is padding among them. followed: whether positions follow one another.
    """
    if padded:
        return Obstacle("some of the new tokens are padding", "new tokens that are all real")
    if not followed:
        return Obstacle(
            "positions are columns of the mask, which hides some between real ones",
            "position_ids that count the real tokens of a row, as generate passes them",
        )
    for module in layers:
        i, layer = module.layer_idx, cache.layer_of(own, module.layer_idx)
        if layer is None:
            held = getattr(own, "layers", ())
            kind = type(held[i] if i < len(held) else own).__name__
            return Obstacle(
                f"layer {i} of the cache is of the class {kind}, which keeps no compressed tokens",
                "a DynamicCache or a StaticCache",
            )
        if layer.keys.dtype != layer.values.dtype:
            return Obstacle(
                f"layer {i} caches keys of {layer.keys.dtype} and values of {layer.values.dtype}, "
                "as under autocast",
                "a model that is loaded in 16 bits, without autocast",
            )
    return None


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn(decoder: nn.Module, layers: list[Any], obstacle: Obstacle | None) -> None:
    """Says once for a decoder what stands in the way. Not where somebody records, who wants to see
    the compressed tokens."""
    if obstacle is None or decoder in _warned or any(x.recorder for x in layers):
        return
    _warned.add(decoder)
    warnings.warn(
        f"{type(decoder).__name__} compresses all cached keys again for a few new tokens, which "
        f"takes time: {obstacle.reason}. Fix: {obstacle.fix}.",
        stacklevel=3,
    )
