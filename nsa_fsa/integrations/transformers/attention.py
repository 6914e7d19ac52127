"""How transformers reaches a sparse layer.

A patched attention module keeps its projections, norms and rotation: only its class is swapped for
a subclass. Its forward adds gate logits to what it hands on, and its config, a copy of the model's,
names this package's attention function, which transformers then calls with queries, rotated keys
and values, those of a cache included. What all layers need to know of a batch is found once, before
them (`decoder`).
"""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nsa_fsa.cache import KeyValues
from nsa_fsa.cache.nsa_cache import turn_back
from nsa_fsa.config import NSAConfig
from nsa_fsa.distributed.context_parallel import Runs
from nsa_fsa.integrations.transformers import cache
from nsa_fsa.integrations.transformers.batch import Batch, find_batch
from nsa_fsa.integrations.transformers.rotation import with_fused_rotation
from nsa_fsa.modules.branches import SparseBranches, put_back, take
from nsa_fsa.sequences import Sequences

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


AttentionInterface.register(ATTENTION_NAME, sparse_attention)
