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
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, ContinuousBatchingManager

from nsa_fsa.cache import KeyValues
from nsa_fsa.cache.nsa_cache import turn_back
from nsa_fsa.checks import check_tensor
from nsa_fsa.config import NSAConfig
from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.context_parallel import Runs, check_context_parallel
from nsa_fsa.integrations.transformers import cache
from nsa_fsa.integrations.transformers.rotation import with_fused_rotation
from nsa_fsa.integrations.transformers.steps import find_step
from nsa_fsa.integrations.transformers.turning import like_rotated, positions_of_keys, turns_back
from nsa_fsa.modules.branches import SparseBranches, put_back, take
from nsa_fsa.modules.rotary import BY_LENGTH, BY_POSITION
from nsa_fsa.sequences import Packing, Sequences, keep_padding, pack_batch, uniform_layout

ATTENTION_NAME = "nsa_fsa"
READ_IN_FORWARD = (
    "block_size",
    "num_selected_blocks",
    "init_blocks",
    "local_blocks",
    "window_size",
    "dense_below",
    "recompute",
)
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


NO_WEIGHTS = (
    "output_attentions=True is not available: sparse attention has no matrix of weights. "
    "Fix: output_attentions=False; nsa_fsa.visualization.record shows which blocks are read."
)


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
            raise ValueError(NO_WEIGHTS)
        kwargs["nsa_gate_logits"] = self.gate(hidden_states)
        if kwargs.get("nsa_batch") is None and not torch.compiler.is_compiling():
            kwargs["nsa_batch"] = self.__dict__.get("_batch")
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


def sparse_attention_class(dense_class: Any) -> Any:
    """The subclass of an attention class that is sparse."""
    return _sparse_attention_class(dense_class, FORWARDS.get(dense_class))


@functools.cache
def _sparse_attention_class(dense_class: Any, forward: Callable[..., Any] | None) -> Any:
    """forward: what it runs instead of the dense one's."""
    base = with_fused_rotation(dense_class)
    if forward is not None:
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
    if nsa_batch is None:  # the layers of a few models drop what they do not know
        nsa_batch = getattr(attention_mask, "nsa_batch", None)
    if nsa_batch is None:  # the layer was called by itself, or past the hook
        past = key.shape[2] - query.shape[2]
        nsa_batch = find_batch(query.transpose(1, 2), past or None, attention_mask, **kwargs)

    past, rows, layout, columns, real, _, rotation, kept, step, shared_by = nsa_batch
    batch_size, _, length, _ = query.shape
    beside = cache.layer_of(kept, module.layer_idx)

    if step is not None:
        new_q, new_gates = query.transpose(1, 2).flatten(0, 1), nsa_gate_logits.flatten(0, 1)
        arguments = (new_q, (key, value), new_gates, step, nsa_rotation, scaling)
        o = cache.decode(module, beside, *arguments)
        return o.unflatten(0, (batch_size, length)), None

    if key.shape[2] < past + length:
        raise ValueError(
            f"layer {module.layer_idx} was given {key.shape[2]} keys where {past} tokens came "
            f"before these {length}: its cache forgets. "
            "Fix: a DynamicCache or StaticCache whose layers are not sliding."
        )

    # Under autocast a rotation may return float32 where the projections return 16 bits.
    query, key = query.to(value.dtype), key.to(value.dtype)

    turn = None
    if nsa_rotation is not None:
        turn = nsa_rotation if past == 0 and shared_by is None else rotation
        if turn is None:
            raise ValueError(
                'a layer with compress_rope="after" turns keys back, those of a cache and of other '
                "ranks, too, for which it needs what its decoder knows of them. "
                "Fix: call the model, not the layer."
            )
        of_keys = rows if past == 0 else None  # after a past, they are in the order of the keys
        like = nsa_rotation[0]  # FSDP may compute in another dtype than it keeps parameters in
        cos, sin = (take(x.expand(batch_size, -1, -1), of_keys).to(like) for x in turn)
        turn = (cos, sin)

    keep = None
    if beside is not None:
        keep = partial(cache.keep, beside, module, layout=layout, held=past + length)
    real_rows = None if real is None else take(real, rows)
    attention = partial(_attend, module, layout, turn, scaling, real_rows, keep)

    if shared_by is not None:
        local = (x.transpose(1, 2) for x in (query, key, value))
        return module.share(shared_by, attention, *local, nsa_gate_logits), None

    q = take(query.transpose(1, 2), rows)
    # A static cache has an unused end.
    k, v = (x.transpose(1, 2)[:, : past + length] for x in (key, value))
    if past == 0:
        k, v = take(k, rows), take(v, rows)
    else:
        k, v = _real_first(k, columns), _real_first(v, columns)
    o = attention(None, None, q, k, v, take(nsa_gate_logits, rows))  # [T, HQ, DV]
    o = put_back(o, rows, batch_size, length)
    return o if real is None else o * real[..., None, None], None


def _attend(
    module: NSAAttention,
    layout: Sequences,
    turn: tuple[Tensor, Tensor] | None,
    scaling: float | None,
    real: Tensor | None,
    keep: Callable[[Tensor, Tensor], None] | None,
    heads: slice | None,
    runs: Runs | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
) -> Tensor:
    """Packed queries, rotated keys and values of some KV heads (None: all) -> `[T, HQ, DV]`.

    turn: cos and sin of the keys, which are turned back before they are compressed; None: they are
    compressed as they are. keep: what the compressed tokens are handed to. runs: as of `mix`.
    """
    cos, sin = turn or (None, None)
    k_src = k if cos is None or sin is None else turn_back(k, cos, sin)
    keys = KeyValues(k, v, k, v, k_src, v, cos, sin)
    k_cmp, v_cmp = module.compress(k_src, v, cos, sin, layout, heads)
    if keep is not None:
        keep(k_cmp, v_cmp)
    return module.mix(q, keys, k_cmp, v_cmp, gate_logits, layout, scaling, real, runs)


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
    if others.get("is_causal") is False:
        raise ValueError(
            "is_causal=False is not available: NSA layers are causal. "
            "Fix: leave it out, or unpatch_model(model)."
        )
    if dropout:
        raise ValueError(
            f"attention dropout of {dropout} is not available in NSA: it must be 0. "
            "Fix: model.config.attention_dropout = 0.0 before the model is built."
        )

    found = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    sizes = (c.num_heads, c.num_kv_heads, c.head_dim, c.v_head_dim)
    ranks = c.num_kv_heads // max(key.shape[1], 1)  # of tensor parallelism
    if (ranks * found[0], ranks * found[1], *found[2:]) != sizes:
        raise ValueError(
            f"layer {module.layer_idx} was given heads (query heads, KV heads, widths of keys and "
            f"values) of {found}, and was made for {sizes}. Tensor parallelism splits it by whole "
            "KV heads alone. Fix: save the patched model, and load it with "
            "DistributedConfig(tp_size=...); or shard it with FSDP."
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
        attention_mask = _padding_of(attention_mask, batch_size, past, length)
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


def _padding_of(mask: Tensor, batch_size: int, past: int, length: int) -> Tensor:
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


# --- Before the layers ----------------------------------------------------------------------------


def can_be_traced(decoder: nn.Module) -> bool:
    """Whether one trace of a decoder's step is right for every length: what its layers need is
    handed on to them, and the mask is read by nobody else."""
    parameters = inspect.signature(type(decoder).forward).parameters.values()
    hands_on = any(x.kind is x.VAR_KEYWORD for x in parameters)
    layers = [x for x in decoder.modules() if isinstance(x, NSAAttention)]
    decodes = all(cache.decodes(x) and cache.reads_nothing_back(x) for x in layers)
    return hands_on and decodes and not _reads_mask_itself(decoder)


def attach(decoder: nn.Module, indices: Collection[int]) -> None:
    """Makes every forward of a decoder find its `Batch` once, for all layers.

    indices: of its layers with attention, sparse or not.
    """
    detach(decoder)
    parameters = inspect.signature(type(decoder).forward).parameters
    names = tuple(parameters)[1:]
    takes_more = any(x.kind is x.VAR_KEYWORD for x in parameters.values())
    before = functools.partial(
        _before_layers, names, indices, takes_more, _reads_mask_itself(decoder)
    )
    decoder.register_forward_pre_hook(before, with_kwargs=True)
    decoder.register_forward_hook(_after_layers, always_call=True)


def detach(decoder: nn.Module) -> None:
    """Undoes `attach`."""
    for hooks, with_more in (
        (decoder._forward_pre_hooks, decoder._forward_pre_hooks_with_kwargs),
        (decoder._forward_hooks, decoder._forward_hooks_always_called),
    ):
        for key, hook in list(hooks.items()):
            if getattr(hook, "func", hook) in (_before_layers, _after_layers):
                del hooks[key], with_more[key]


def _reads_mask_itself(decoder: nn.Module) -> bool:
    """Whether a decoder makes more of its mask than what its layers are handed, as where it
    counts positions by it."""
    code = getattr(inspect.unwrap(type(decoder).forward), "__code__", None)
    parts = (type(x).forward for x in decoder.children() if not isinstance(x, nn.ModuleList))
    return "cumsum" in getattr(code, "co_names", ()) or any(
        "attention_mask" in inspect.signature(forward).parameters for forward in parts
    )


def _after_layers(decoder: Any, args: Any, output: Any) -> None:
    """Takes away what `_before_layers` gave layers that are not handed it."""
    if not torch.compiler.is_compiling():
        for module in decoder.modules():
            module.__dict__.pop("_batch", None)


def _before_layers(
    names: tuple[str, ...],
    indices: Collection[int],
    takes_more: bool,
    reads_mask: bool,
    decoder: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[()], dict[str, Any]]:
    """names: of the forward's arguments. indices: of layers with attention. takes_more: whether it
    hands others on. reads_mask: whether it needs its mask itself."""
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
    kwargs.pop("context_parallel", None)  # what layers need of it is in their `Batch`
    if inputs is None:
        return (), kwargs  # the model's own error names the arguments

    if given.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        raise ValueError(NO_WEIGHTS)

    if isinstance(mask := given.get("attention_mask"), dict):  # as for a static cache
        mask = mask.get("full_attention")
        if mask is None:
            raise ValueError(
                f"attention_mask has the masks {list(given['attention_mask'])}, and none for "
                '"full_attention". Fix: pass the 2D mask.'
            )
    if mask is not None:
        check_tensor("attention_mask", mask, "[B, past + S]")

    kept = given.get("past_key_values", given.get("cache"))
    own = getattr(kept, "self_attention_cache", kept)
    step = None
    if own is not None and _reads_nothing_back() and (mask is None or mask.ndim == 2):
        position_ids, rotary = given.get("position_ids"), getattr(decoder, "rotary_emb", None)
        arguments = (mask, inputs.shape[1], position_ids, rotary)
        step = cache.traced_step(layers, own, *arguments)

    if step is not None:
        layout = uniform_layout(inputs.shape[0], inputs.shape[1], inputs.device)
        batch = Batch(0, None, layout, kept=own, step=step)
    elif "context_parallel" in given:
        batch = _look_at_part(decoder, layers, inputs, given)
    else:
        batch = _look_at(decoder, layers, indices, kept, mask, inputs, given)

    if batch.packed or batch.context_parallel is not None:
        kwargs["use_cache"] = False  # on by default, and nobody could read it

    if len(layers) == decoder.config.num_hidden_layers and not reads_mask:
        # Nobody reads this mask: at one of four dimensions transformers stops before it looks at
        # positions and waits for the GPU.
        done = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)
        done.nsa_batch = batch  # type: ignore[attr-defined]
        kwargs["attention_mask"] = done

    if not torch.compiler.is_compiling():  # for layers that are not handed what they do not know
        for layer in layers:
            layer.__dict__["_batch"] = batch

    return (), {**kwargs, "nsa_batch": batch} if takes_more else kwargs


def _reads_nothing_back() -> bool:
    """Whether what is on the device stays unknown: torch traces, or records a CUDA graph."""
    return torch.compiler.is_compiling() or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def _look_at(
    decoder: Any,
    layers: list[NSAAttention],
    indices: Collection[int],
    kept: Any,
    mask: Tensor | None,
    inputs: Tensor,
    given: dict[str, Any],
) -> Batch:
    """The batch of one forward. kept: its cache, if it has one; given: its arguments."""
    own, past = getattr(kept, "self_attention_cache", kept), None
    if kept is not None:
        past = int(kept.get_seq_length(layers[0].layer_idx))
        _check_in_step(own, indices)
    elif given.get("use_cache", getattr(decoder.config, "use_cache", False)):
        past = 0

    num_new = inputs.shape[1]
    if mask is not None and mask.ndim == 4:
        mask = _padding_of(mask, inputs.shape[0], past or 0, num_new)
    if mask is not None and mask.ndim == 2 and mask.shape[1] == cache.room_of(own):
        mask = mask[:, : (past or 0) + num_new]

    asked = kept is not None or bool(given.get("use_cache"))
    batch = find_batch(inputs, past, asked=asked, **{**given, "attention_mask": mask})
    if batch.packed and asked:
        raise ValueError(
            "a packed batch cannot fill a cache. "
            "Fix: pass neither a cache nor use_cache=True with packed sequences."
        )

    past, rows, layout, columns, real, packed, *_ = batch
    position_ids = given.get("position_ids")
    # PyTorch 2.11's compiler loses what `_replace` returns between two graphs.
    beside = None if torch.compiler.is_compiling() else own

    step = rotation = None
    if beside is not None:
        at_hand = (batch.layout.seqused_k, rows, columns)
        step = find_step(decoder, layers, beside, past, *at_hand, mask, position_ids, inputs)
    if step is None and past and turns_back(layers):
        positions = positions_of_keys(columns, mask, position_ids, past, inputs)
        rotation = decoder.rotary_emb(like_rotated(layers, inputs.device), position_ids=positions)

    return Batch(past, rows, layout, columns, real, packed, rotation, beside, step)


def _look_at_part(
    decoder: Any, layers: list[NSAAttention], inputs: Tensor, given: dict[str, Any]
) -> Batch:
    """The batch of one forward whose sequences several ranks share. given: its arguments, of this
    rank's tokens, and of all ranks' `cu_seq_lens_q`."""
    cp = given["context_parallel"]
    kept = given.get("past_key_values", given.get("cache", given.get("use_cache") or None))
    check_context_parallel(cp, given.get("attention_mask"), kept)

    dense = {*range(decoder.config.num_hidden_layers)} - {x.layer_idx for x in layers}
    if dense:
        raise ValueError(
            f"the layers {sorted(dense)} of {type(decoder).__name__} have no NSA, and with "
            "context_parallel each of them would take a rank's part of a sequence for the whole of "
            "it. Fix: patch_model without layers=..., or leave context_parallel out."
        )

    kinds = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
    kinds = {*kinds.values()} if isinstance(kinds, dict) else {kinds}
    if wrong := kinds & {*BY_LENGTH}:
        raise ValueError(
            f"rope_type={wrong.pop()!r} is not available with context_parallel: it rotates by the "
            "longest position of a batch, of which a rank sees its own. "
            "Fix: one of the types " + ", ".join(BY_POSITION) + "."
        )

    position_ids = given.get("position_ids")
    if position_ids is None or position_ids.ndim != 2:
        raise ValueError(
            "context_parallel needs position_ids [B or 1, S] of this rank's tokens, which the model"
            " would count from 0 on every rank. Fix: ContextParallel.shard, which cuts them, too."
        )

    batch, rotation = find_batch(inputs, None, **given), None
    if turns_back(layers):
        positions = cp.gather(position_ids)
        rotation = decoder.rotary_emb(like_rotated(layers, inputs.device), position_ids=positions)
    return Batch(0, None, batch.layout, packed=batch.packed, rotation=rotation, context_parallel=cp)


def _check_in_step(kept: Any, indices: Collection[int]) -> None:
    """Raises RuntimeError if an earlier forward stopped between two layers."""
    layers = {i: kept.layers[i] for i in indices if i < len(kept.layers)}
    held = {i: x.get_seq_length() for i, x in layers.items() if type(x) in cache.DYNAMIC}
    if len(set(held.values())) > 1:
        first = next(iter(held))
        i = next(i for i in held if held[i] != held[first])
        raise RuntimeError(
            f"layer {i} of the cache holds {held[i]} tokens where the layers before it hold "
            f"{held[first]}: an earlier forward raised between them. "
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
            "with the prompts padded on the left; or for many requests, save_pretrained and "
            "nsa-fsa serve, as docs/serving.md says."
        )
    _make_manager(self, model, *args, **kwargs)


ContinuousBatchingManager.__init__ = _refuse_nsa_layers  # type: ignore[method-assign]
AttentionInterface.register(ATTENTION_NAME, sparse_attention)
