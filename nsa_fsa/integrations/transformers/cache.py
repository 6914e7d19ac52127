"""The layer cache that a patched attention puts into a transformers `Cache`."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from nsa_fsa.cache import NSACache
from nsa_fsa.config import NSAConfig


class NSACacheLayer(CacheLayerMixin):
    """An `NSACache` that transformers' generation code can handle:
    beams, assisted decoding, static and dynamic caches.

    Args:
        config: the NSA layer's configuration.
        max_length: None for a dynamic cache, a number of tokens for a static one.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: NSAConfig, max_length: int | None = None) -> None:
        # Without super().__init__(), which assigns the attributes that are properties here.
        self.state = NSACache(config, max_length=max_length)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A copy of the selected branch's rotated keys, 0 at padding: `[B, HKV, tokens so far, D]`.

        None before the first token.
        """
        return self.state.by_column("k")

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """As `keys`, `[B, HKV, tokens so far, DV]`."""
        return self.state.by_column("v")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state allocates its buffers at its first update."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise RuntimeError(
            "a dense layer was given the cache of an NSA layer, which only that layer can fill. "
            "Fix: a new cache, filled by the model as it is now."
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        most = self.state.max_length
        return self.state.num_tokens + query_length if most is None else most, 0

    def get_seq_length(self) -> int:
        return self.state.num_tokens

    def get_max_length(self) -> int:
        return -1 if self.state.max_length is None else self.state.max_length

    def reset(self) -> None:
        self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.reorder(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes `-tokens_to_remove` tokens, at most all.

        A positive number is the length to keep, as older transformers 5.x pass it.
        """
        count, length = int(tokens_to_remove), self.state.num_tokens
        self.state.crop(min(-count, length) if count <= 0 else max(0, length - count))

    def offload(self) -> None:
        raise RuntimeError(
            "NSA layers cannot be offloaded. Fix: a DynamicCache or StaticCache without offloading."
        )

    prefetch = offload


def layer_state(cache: Cache, layer_idx: int, config: NSAConfig) -> NSACache:
    """The NSA state of a layer, put into the cache in the place of a still unused dynamic or
    static layer.

    Raises:
        TypeError: for a kind of layer that NSA cannot stand in for,
            such as a quantized or sliding one.
        ValueError: for an offloaded cache, one that a dense layer has already filled,
            or one of an NSA layer with other settings.
    """
    if getattr(cache, "offloading", False):
        raise ValueError(
            "NSA layers do not support offloaded caches. "
            "Fix: cache_implementation='dynamic' or 'static'."
        )
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, NSACacheLayer):
        if layer.state.config != config:
            raise ValueError(
                f"layer {layer_idx} of the cache was made for other settings than the model "
                f"has now: {layer.state.differences(config)}. Fix: leave out past_key_values, "
                "or pass a new DynamicCache, and feed all tokens again."
            )
        return layer.state
    if type(layer) not in (DynamicLayer, StaticLayer):
        raise TypeError(
            f"layer {layer_idx} of the cache is a {type(layer).__name__}; an NSA layer can replace "
            "a DynamicLayer or a StaticLayer. Fix: cache_implementation='dynamic' or 'static'."
        )
    if layer.is_initialized and layer.get_seq_length() > 0:
        raise ValueError(
            f"layer {layer_idx} of the cache already holds a dense layer's keys and values: "
            "those of a model before it was patched, or the virtual tokens of prefix tuning, "
            "which NSA layers cannot compress. Fix: start with a new cache after patching; "
            "tune prompts (PromptTuningConfig) or LoRA instead of prefixes."
        )
    max_length = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    replacement = NSACacheLayer(config, max_length)
    cache.layers[layer_idx] = replacement
    return replacement.state


def check_in_step(cache: Cache, layer_idx: int, num_columns: int) -> None:
    """Raises RuntimeError if an earlier forward stopped between this NSA layer and the one before.

    num_columns: what the present forward feeds; the layer before has them already.
    """
    before, layer = cache.layers[layer_idx - 1 : layer_idx + 1] if layer_idx else (None, None)
    if not isinstance(before, NSACacheLayer) or not isinstance(layer, NSACacheLayer):
        return
    held, held_before = layer.state.num_tokens, before.state.num_tokens - num_columns
    if held != held_before:
        raise RuntimeError(
            f"layer {layer_idx} of the cache holds {held} tokens where "
            f"the layer before it held {held_before}: an earlier forward raised between them. "
            "Fix: cache.reset(), and feed all tokens again. "
            f"Or keep the {held} tokens that all layers hold, and feed those after them again: "
            f"for layer in cache.layers[:{layer_idx}]: "
            f"layer.crop({held - before.state.num_tokens})."
        )
