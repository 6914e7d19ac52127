"""How transformers reaches a sparse layer.

A patched attention module keeps its projections, norms and rotation: only its class is swapped for
a subclass. Its forward adds gate logits to what it hands on, and its config, a copy of the model's,
names this package's attention function, which transformers then calls with queries, rotated keys
and values, those of a cache included. A hook on the decoder (`attach`) looks at the mask and the
positions once, before the layers, and hands every layer a `Batch`.
"""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, ContinuousBatchingManager
from transformers.cache_utils import DynamicLayer

from nsa_fsa.cache import KeyValues
from nsa_fsa.cache.nsa_cache import turn_back
from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.rotation import with_fused_rotation
from nsa_fsa.modules.branches import SparseBranches, put_back, take
from nsa_fsa.sequences import Packing, Sequences, keep_padding, pack_batch

ATTENTION_NAME = "nsa_fsa"
READ_IN_FORWARD = (
    "block_size", "num_selected_blocks", "init_blocks", "local_blocks", "window_size", "recompute",
)  # fmt: skip
# What an attention function may be told beside queries, keys and values, and no branch can do.
NOT_AVAILABLE = {
    "sliding_window": "a sliding window",
    "softcap": "a soft cap of its scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
    "indices": "a choice of keys of its own",
    "block_indices": "a choice of keys of its own",
}


class Batch(NamedTuple):
    """What every layer of a forward needs to know about its batch `[B, S]`."""

    past: int  # columns that the cache held before, padding included
    rows: Tensor | None  # int64 [T], of the flattened batch those with real tokens; None: all
    layout: Sequences  # where the sequences' queries and keys lie
    # int64 [B, past + S], after a past: columns of the keys, of every row the real ones first.
    columns: Tensor | None = None  # None: all are real
    real: Tensor | None = None  # bool [B, S], where torch traces and cannot leave padding out
    packed: bool = False  # whether the sequences are others than the batch's rows
    # After a past, cos and sin [1, past + S, rotary_dim] of `columns`, to turn keys back.
    rotation: tuple[Tensor, Tensor] | None = None


class NSAAttention(SparseBranches):
    """Mixed in before an attention class of transformers. `patch_model` makes a module one."""

    dense_class: type[nn.Module]  # the class that it is mixed in before
    config: Any  # the model's, with this package's attention function
    _nsa_config: NSAConfig

    @property
    def nsa_config(self) -> NSAConfig:
        """The settings of this layer."""
        return self._nsa_config

    @nsa_config.setter
    def nsa_config(self, config: NSAConfig) -> None:
        """Raises ValueError for a config that other modules would be needed for."""
        new, old = config.to_dict(), self._nsa_config.to_dict()
        wrong = [key for key in old if new[key] != old[key] and key not in READ_IN_FORWARD]
        if wrong:
            raise ValueError(
                f"the settings of layer {self.layer_idx} cannot be replaced by others with "
                f"{', '.join(f'{key}={new[key]!r}' for key in wrong)}: its modules are made for "
                f"other values. They may differ in {READ_IN_FORWARD}. "
                "Fix: patch_model(model, ...) with these settings."
            )
        self._nsa_config = config

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the dense class's; there are no attention weights to return."""
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True is not available: sparse attention has no matrix of "
                "weights. Fix: output_attentions=False; nsa_fsa.visualization.record shows which "
                "blocks are read."
            )
        kwargs["nsa_gate_logits"] = self.gate(hidden_states)
        if self.nsa_config.compress_rope == "after":
            # Of the dense class's forward, however it was passed.
            names = [*inspect.signature(self.dense_class.forward).parameters][2:]
            passed = {**dict(zip(names, args, strict=False)), **kwargs}
            kwargs["nsa_rotation"] = passed.get("position_embeddings")
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class was made, and is made again wherever a copy is unpickled."""
        return new_of, (sparse_attention_class, self.dense_class), self.__dict__


# Classes that `register_attention` has registered, and the forwards of their sparse layers.
FORWARDS: dict[type[nn.Module], Callable[..., Any] | None] = {}


@functools.cache
def sparse_attention_class(dense_class: Any) -> Any:
    """The subclass of an attention class that is sparse."""
    base = with_fused_rotation(dense_class)
    if (forward := FORWARDS.get(dense_class)) is not None:
        base = type(dense_class.__name__, (dense_class,), {"forward": forward})
    names = {"__module__": __name__, "dense_class": dense_class}
    return type(f"NSA{dense_class.__name__}", (NSAAttention, base), names)


def new_of(made_class: Callable[[Any], Any], dense_class: Any) -> Any:
    """An instance of the sparse class of a dense one that is yet to be filled."""
    made = made_class(dense_class)
    return made.__new__(made)


def sparse_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    nsa_gate_logits: Tensor | None = None,
    nsa_batch: Batch | None = None,
    nsa_rotation: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls by the name "nsa_fsa".

    query `[B, HQ, S, D]`, key and value `[B, HKV, past + S or more, D or DV]`, rotated, ->
    (`[B, S, HQ, DV]`, None).

    Raises:
        RuntimeError: for a module that `patch_model` has not made sparse.
        ValueError: for what no branch can do, or heads that the layer was not made for.
    """
    if nsa_gate_logits is None:
        raise RuntimeError(
            f"{type(module).__name__} is dense, but its config names the attention implementation "
            f'"{ATTENTION_NAME}". Fix: patch_model(model), which makes its layers sparse.'
        )
    _check_call(module, query, key, value, dropout, kwargs)
    batch_size, _, length, _ = query.shape
    if nsa_batch is None:  # the layers of a few models drop what they do not know
        nsa_batch = getattr(attention_mask, "nsa_batch", None)
    if nsa_batch is None:  # the layer was called by itself, or past the hook
        past = key.shape[2] - length
        nsa_batch = find_batch(query.transpose(1, 2), past or None, attention_mask, **kwargs)
    past, rows, layout, columns, real, _, rotation = nsa_batch
    if key.shape[2] < past + length:
        raise ValueError(
            f"layer {module.layer_idx} was given {key.shape[2]} keys where {past} tokens came "
            f"before these {length}: its cache forgets. "
            "Fix: a DynamicCache or StaticCache whose layers are not sliding."
        )
    q = take(query.transpose(1, 2), rows)
    # A static cache has an unused end.
    k, v = (x.transpose(1, 2)[:, : past + length] for x in (key, value))
    if past == 0:
        k, v, turning = take(k, rows), take(v, rows), nsa_rotation
    else:
        k, v, turning = _real_first(k, columns), _real_first(v, columns), rotation
    cos = sin = None
    if nsa_rotation is not None:
        if turning is None:
            raise ValueError(
                'a layer with compress_rope="after" turns cached keys back, for which it needs '
                "what its decoder knows of them. Fix: call the model, not the layer."
            )
        of_keys = rows if past == 0 else None  # after a past, they are in the order of the keys
        cos, sin = (take(x.expand(batch_size, -1, -1), of_keys) for x in turning)
    # Under autocast a rotation may return float32 where the projections return 16 bits.
    q, k = q.to(v.dtype), k.to(v.dtype)
    k_src = k if cos is None or sin is None else turn_back(k, cos, sin)
    keys = KeyValues(k, v, k, v, k_src, v, cos, sin)
    k_cmp, v_cmp = module.compress(k_src, v, cos, sin, layout)
    gate_logits = take(nsa_gate_logits, rows)
    o = module.mix(q, keys, k_cmp, v_cmp, gate_logits, layout, scaling)  # [T, HQ, DV]
    o = put_back(o, rows, batch_size, length)
    return o if real is None else o * real[..., None, None], None


def _check_call(
    module: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, others: dict[str, Any]
) -> None:
    """Raises ValueError for what the layer of a model cannot be asked for."""
    c: NSAConfig = module.nsa_config
    if wanted := [NOT_AVAILABLE[x] for x in NOT_AVAILABLE if others.get(x) is not None]:
        raise ValueError(
            f"{type(module).__name__} of layer {module.layer_idx} asks for {wanted[0]}, "
            "which NSA layers do not have. Fix: leave it dense: patch_model(model, layers=...)."
        )
    if dropout:
        raise ValueError(
            f"attention dropout of {dropout} is not available in NSA: it must be 0. "
            "Fix: model.config.attention_dropout = 0.0 before the model is built."
        )
    found = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    sizes = (c.num_heads, c.num_kv_heads, c.head_dim, c.v_head_dim)
    if found != sizes:
        raise ValueError(
            f"layer {module.layer_idx} was given heads (query heads, KV heads, widths of keys and "
            f"values) of {found}, and was made for {sizes}. An NSA layer cannot be split "
            "over ranks by tensor parallelism. Fix: replicate it, or shard it with FSDP."
        )


def _real_first(x: Tensor, columns: Tensor | None) -> Tensor:
    """`[B, K, H, D]` -> `[B * K, H, D]`, of every row the real columns first."""
    if columns is not None:
        x = x[torch.arange(x.shape[0], device=x.device)[:, None], columns]
    return x.flatten(0, 1)


# --- What a batch is like -------------------------------------------------------------------------


def find_batch(
    like: Tensor,
    past: int | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    asked: bool = False,
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

    Raises:
        ValueError: for a mask that is no padding mask of this batch, or comes beside boundaries.
    """
    (batch_size, length), cached, past = like.shape[:2], past is not None, past or 0
    if cu_seq_lens_q is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seq_lens_q are both given. Fix: pass one.")
        longest = batch_size * length if max_length_q is None else int(max_length_q)
        layout = Sequences(cu_seq_lens_q, longest).check(like.device)
        return Batch(past, None, layout, packed=True)
    if attention_mask is not None and attention_mask.ndim == 4:
        attention_mask = _padding_of(attention_mask, past, length)
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
        columns = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        lengths = mask.sum(1, dtype=torch.int32)
    return Batch(past, rows, Sequences(key_starts, total, starts, lengths), columns)


def _padding_of(mask: Tensor, past: int, length: int) -> Tensor:
    """The `[B, past + S]` mask that a 4D one says as much as; raises ValueError for any other."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible[:, 0, :, : past + length]
    padding = visible[:, -1]
    column = torch.arange(past + length, device=mask.device)
    expected = (column <= column[past:, None]) & padding[:, None]
    if torch.compiler.is_compiling():  # where values cannot be looked at
        return padding
    # What padding sees is nobody's business.
    if mask.shape[1] != 1 or (padding[:, past:, None] & (visible != expected)).any():
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and is not causal, as where the tokens "
            "of an image see each other: NSA layers are causal by themselves. "
            "Fix: pass the 2D mask; with images, a model that reads them causally."
        )
    return padding


# --- Before the layers ----------------------------------------------------------------------------


def attach(decoder: nn.Module) -> None:
    """Makes every forward of a decoder find its `Batch` once, for all layers."""
    detach(decoder)
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    decoder.register_forward_pre_hook(functools.partial(_before_layers, names), with_kwargs=True)


def detach(decoder: nn.Module) -> None:
    """Undoes `attach`."""
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if isinstance(hook, functools.partial) and hook.func is _before_layers:
            del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]


def _before_layers(
    names: tuple[str, ...], decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    layers = [module for module in decoder.modules() if isinstance(module, NSAAttention)]
    if not layers:
        raise RuntimeError(
            f"{type(decoder).__name__} has no NSA layer: its attention "
            "was replaced after patching. Fix: unpatch_model(model), which makes it dense."
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warn_of_frozen_gates(decoder)
    given = {name: x for name, x in kwargs.items() if x is not None}
    inputs = given.get("inputs_embeds", given.get("input_ids"))
    if inputs is None:
        return (), kwargs  # the model's own error names the arguments
    cache, past = given.get("past_key_values", given.get("cache")), None
    if cache is not None:
        past = int(cache.get_seq_length(layers[0].layer_idx))
        _check_in_step(cache)
    elif given.get("use_cache", decoder.config.use_cache):
        past = 0
    asked = cache is not None or bool(given.get("use_cache"))
    if isinstance(mask := given.get("attention_mask"), dict):  # as for a static cache
        mask = mask["full_attention"]
    batch = find_batch(inputs, past, asked=asked, **{**given, "attention_mask": mask})
    if batch.packed:
        if asked:
            raise ValueError(
                "a packed batch cannot fill a cache. "
                "Fix: pass neither a cache nor use_cache=True with packed sequences."
            )
        kwargs["use_cache"] = False  # on by default, and nobody could read it
    if batch.past and any(x.nsa_config.compress_rope == "after" for x in layers):
        past, rows, layout, columns, real, packed, _ = batch
        # What counts is how far apart two keys of a window are, so the first token may be at 0.
        like: Any = layers[0].gate.weight
        position_ids = torch.arange(layout.max_seqlen, device=like.device)[None]
        rotation = decoder.rotary_emb(like, position_ids=position_ids)
        # PyTorch 2.11's compiler loses what `_replace` returns between two graphs.
        batch = Batch(past, rows, layout, columns, real, packed, rotation)
    if len(layers) == decoder.config.num_hidden_layers:
        # Nobody reads this mask: at one of four dimensions transformers stops before it looks at
        # positions and waits for the GPU.
        done = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)
        done.nsa_batch = batch  # type: ignore[attr-defined]
        kwargs["attention_mask"] = done
    return (), {**kwargs, "nsa_batch": batch}


def _check_in_step(cache: Any) -> None:
    """Raises RuntimeError if an earlier forward stopped between two layers."""
    held = [x.get_seq_length() for x in cache.layers if type(x) is DynamicLayer]
    if len(set(held)) > 1:
        i = next(i for i in range(1, len(held)) if held[i] != held[0])
        raise RuntimeError(
            f"layer {i} of the cache holds {held[i]} tokens where the layers before it hold "
            f"{held[0]}: an earlier forward raised between them. "
            "Fix: a new cache, and feed all tokens again."
        )


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_frozen_gates(decoder: nn.Module) -> None:
    """Says once for a decoder that its gates are frozen while others of its parameters train."""
    attentions = (module for module in decoder.modules() if isinstance(module, NSAAttention))
    if (
        decoder in _warned
        or any(p.requires_grad for attention in attentions for p in attention.gate.parameters())
        or not any(p.requires_grad for p in decoder.parameters())
    ):
        return
    _warned.add(decoder)
    warnings.warn(
        "the gates of the NSA layers are frozen while other parameters train: they stay as they "
        "are, which after patch_model may be nearly closed. Fix: with LoRA, "
        "modules_to_save=report.modules_to_save, of the report that patch_model returns.",
        stacklevel=3,
    )


_make_manager: Any = ContinuousBatchingManager.__init__


@functools.wraps(_make_manager)
def _refuse_nsa_layers(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The constructor of transformers' manager, through which every way to continuous batching
    leads: the last that happens in the caller's thread, where an error is not only logged. Its
    model may be a stock one with a patched model inside.
    """
    if any(isinstance(module, NSAAttention) for module in model.modules()):
        raise NotImplementedError(
            "continuous batching (generate_batch) is not available with NSA layers: "
            "their cache has no pages. Fix: model.generate(input_ids, attention_mask=mask), "
            "with the prompts padded on the left."
        )
    _make_manager(self, model, *args, **kwargs)


ContinuousBatchingManager.__init__ = _refuse_nsa_layers  # type: ignore[method-assign]
AttentionInterface.register(ATTENTION_NAME, sparse_attention)
