"""How transformers reaches a patched attention layer, and the layers left dense beside it.

A forward pre-hook on the decoder (`attach`) looks at the mask and the positions once, before the
layers, and hands every layer a `Batch`. A layer that is called without one, by itself or past the
hooks, finds it on its own.
"""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, ContinuousBatchingManager
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.cache import check_in_step, layer_state
from nsa_fsa.modules import NativeSparseAttention
from nsa_fsa.modules.native_sparse_attention import PROJECTIONS
from nsa_fsa.ops import sliding_window_attention
from nsa_fsa.ops.sliding_window_attention import flash_attention
from nsa_fsa.sequences import Packing, Sequences, keep_padding, pack_batch

ATTENTION_NAME = "nsa_fsa"
READ_IN_FORWARD = (
    "block_size",
    "num_selected_blocks",
    "init_blocks",
    "local_blocks",
    "window_size",
    "recompute",
)


class Batch(NamedTuple):
    """What every layer of a forward needs to know about its batch `[B, S]`."""

    packing: Packing
    past: int  # columns that the cache held before, padding included


class NSAAttention(NativeSparseAttention):
    """`NativeSparseAttention` with the forward of transformers' attention modules,
    sharing a dense module's projections.

    Args:
        config: must fit the dense module; `patch_model` checks that.
        dense: the Llama, Qwen2 or Qwen3 attention whose projections (and norms)
            this layer keeps using.
        new: compressors, device and dtype of what is added, as `NativeSparseAttention` takes them.
    """

    def __init__(self, config: NSAConfig, dense: nn.Module, **new: Any) -> None:
        projections = {
            name: getattr(dense, name, nn.Identity().train(dense.training)) for name in PROJECTIONS
        }
        super().__init__(config, dense.layer_idx, projections=projections, **new)  # type: ignore[arg-type]
        self.training = dense.training
        # Not the projections, which are the dense module's.
        for part in (self.gate, self.compress_k, self.compress_v):
            part.train(dense.training)
        self._dense = (dense,)  # in a tuple, so that it is not a submodule

    def __setattr__(self, name: str, value: Any) -> None:
        """As PyTorch's own; a new `config` may change what every forward reads from it,
        not what the modules are made for.

        Raises:
            ValueError: for a config that other modules would be needed for.
        """
        if name == "config" and (old := self.__dict__.get("config")) is not None:
            new, kept = value.to_dict(), old.to_dict()
            wrong = [key for key in kept if new[key] != kept[key] and key not in READ_IN_FORWARD]
            if wrong:
                raise ValueError(
                    f"the config of layer {self.layer_idx} cannot be replaced "
                    f"by one with {', '.join(f'{key}={new[key]!r}' for key in wrong)}: its modules "
                    f"are made for other values. A new config may differ in {READ_IN_FORWARD}. "
                    "Fix: patch_model(model, ...) with these settings."
                )
        super().__setattr__(name, value)

    def to_dense(self) -> nn.Module:
        """The dense module this one replaced, with the projections as they are now."""
        (dense,) = self._dense
        for name in PROJECTIONS:
            if hasattr(dense, name):
                setattr(dense, name, getattr(self, name))
        dense.training = self.training
        return dense

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        nsa_batch: Batch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention signature. Returns (output `[B, S, E]`, None):
        there are no attention weights to return.

        What is `cache` since transformers 5.24 was `past_key_values` before.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True is not available: "
                "sparse attention never has the weights as a matrix. Fix: output_attentions=False; "
                "nsa_fsa.visualization.record shows which blocks are read."
            )
        model_cache = past_key_values if cache is None else cache
        state = None
        if model_cache is not None:
            state = layer_state(model_cache, self.layer_idx or 0, self.config)
            check_in_step(model_cache, self.layer_idx or 0, hidden_states.shape[1])
        if nsa_batch is None:
            past = None if state is None else state.num_tokens
            asked = past is not None
            nsa_batch = find_batch(hidden_states, past, attention_mask, asked=asked, **kwargs)
        packing = nsa_batch.packing
        if packing.packed and state is not None:
            raise ValueError(PACKED_CACHE)
        output = super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=packing,
            cache=state,
        )
        if packing.mask is not None and torch.compiler.is_compiling():  # padding may have been kept
            output = output * packing.mask[:, -output.shape[1] :, None]
        return output, None


PACKED_CACHE = (
    "a packed batch cannot fill a cache. "
    "Fix: pass neither a cache nor use_cache=True with packed sequences."
)


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
    """Where the real tokens and the sequences of a batch lie, from what transformers' models are
    called with.

    Args:
        like: any tensor `[B, S, ...]` on the batch's device.
        past: columns that the cache holds; None: there is no cache.
        attention_mask: `[B, past + S]`.
        position_ids: `[B or 1, S]`; without a past, a sequence starts wherever they do not go on.
            None where the model counts them itself.
        cu_seq_lens_q, max_length_q: boundaries of the sequences in the flattened batch,
            if the caller knows them.
        asked: whether the cache was asked for, which a packed batch cannot fill;
            one that is there by default is left out.

    Raises:
        ValueError: for a mask that is no padding mask of this batch,
            or that comes beside boundaries.
    """
    (batch_size, length), cached, past = like.shape[:2], past is not None, past or 0
    if cu_seq_lens_q is not None:
        if attention_mask is not None:
            raise ValueError(
                "attention_mask and cu_seq_lens_q are both given. Fix: pass one of them."
            )
        longest = batch_size * length if max_length_q is None else int(max_length_q)
        layout = Sequences(cu_seq_lens_q, longest).check(like.device)
        return Batch(Packing(None, layout, packed=True), past)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; "
            "NSA layers take the 2D padding mask and are causal by themselves. "
            f'Fix: leave config._attn_implementation at "{ATTENTION_NAME}", and pass no 4D mask.'
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; "
            f"it must be [B, past + S] = {(batch_size, past + length)}. "
            "Fix: a column for every token so far, those in the cache included."
        )
    # Whether positions pack a batch is in their values, which a trace cannot see. `generate`
    # passes them with every prompt: beside a cache they bound no sequences then, as in
    # transformers' dense models.
    if past or length == 1 or (asked and torch.compiler.is_compiling()):
        position_ids = None
    if (
        torch.compiler.is_compiling()
        and attention_mask is not None
        and position_ids is None
        and not cached
    ):
        return Batch(keep_padding(attention_mask), past)
    return Batch(pack_batch(batch_size, length, like.device, attention_mask, position_ids), past)


# --- Before the layers ----------------------------------------------------------------------------


def attach(decoder: nn.Module) -> None:
    """Makes every forward of a decoder find its `Batch` once, for all layers;
    doing so again changes nothing.
    """
    detach(decoder)
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    decoder.register_forward_pre_hook(functools.partial(_before_layers, names), with_kwargs=True)


def detach(decoder: nn.Module) -> None:
    """Undoes `attach`."""
    for key, hook in list(decoder._forward_pre_hooks.items()):
        if isinstance(hook, functools.partial) and hook.func is _before_layers:
            del decoder._forward_pre_hooks[key], decoder._forward_pre_hooks_with_kwargs[key]


def _before_layers(
    names: tuple[str, ...], decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    name = decoder.config._attn_implementation  # type: ignore[union-attr]
    if name != ATTENTION_NAME:
        raise ValueError(
            f"the config of {type(decoder).__name__} is a {type(decoder.config).__name__} "
            f"with the attention implementation {name!r}; a model with NSA layers needs the config "
            f'that it was patched or built with, whose implementation is "{ATTENTION_NAME}". '
            "Fix: assign that config to the model and to its decoder again."
        )
    # It may be wrapped.
    first = next((module for module in decoder.modules() if isinstance(module, NSAAttention)), None)
    if first is None:
        raise RuntimeError(
            f"{type(decoder).__name__} has no NSA layer: its attention "
            "was replaced after patching. Fix: unpatch_model(model), which makes it dense."
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warn_of_frozen_gates(decoder)
    inputs = kwargs.get("inputs_embeds")
    inputs = kwargs.get("input_ids") if inputs is None else inputs
    if inputs is None:
        return (), kwargs  # the model's own error names the arguments
    cache = kwargs.get("past_key_values")
    cache = kwargs.get("cache") if cache is None else cache
    use_cache = kwargs.get("use_cache")
    past = 0 if (decoder.config.use_cache if use_cache is None else use_cache) else None  # type: ignore[union-attr]
    if cache is not None:
        past = layer_state(cache, first.layer_idx or 0, first.config).num_tokens
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # by layer type, as `generate` prepares it for a static cache
        mask = mask["full_attention"]
    asked = cache is not None or bool(use_cache)
    batch = find_batch(inputs, past, asked=asked, **{**kwargs, "attention_mask": mask})
    if batch.packing.packed:
        if asked:
            raise ValueError(PACKED_CACHE)
        kwargs["use_cache"] = False  # on by default, and nobody could read it
    # Nobody reads this mask: at one of four dimensions transformers stops before it looks at
    # positions and waits for the GPU.
    done = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=inputs.device)
    return (), {**kwargs, "attention_mask": done, "nsa_batch": batch}


_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_frozen_gates(decoder: nn.Module) -> None:
    """Says once for a decoder that its gates are frozen while other parameters of it,
    such as adapters, are to be trained.
    """
    attentions = (module for module in decoder.modules() if isinstance(module, NSAAttention))
    if (
        decoder in _warned
        or any(p.requires_grad for attention in attentions for p in attention.gate.parameters())
        or not any(p.requires_grad for p in decoder.parameters())
    ):
        return
    _warned.add(decoder)
    warnings.warn(
        "the gates of the NSA layers are frozen while other parameters train: "
        "they stay as they are, which after patch_model may be nearly closed. "
        'Fix: with LoRA, modules_to_save=["gate", "compress_k", "compress_v"].',
        stacklevel=3,
    )


def _refuse_continuous_batching(make_manager: Callable[..., None]) -> Callable[..., None]:
    """The constructor of transformers' manager, through which every way to continuous batching
    leads, for other models.

    It is the last that happens in the caller's thread: in the manager's own an error is only
    logged, and every output empty. The model in the manager may be a stock one with a patched
    model inside.
    """

    @functools.wraps(make_manager)
    def init(self: ContinuousBatchingManager, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(module, NSAAttention) for module in model.modules()):
            raise NotImplementedError(
                "continuous batching (generate_batch) is not available with NSA layers: "
                "their cache has no pages. Fix: model.generate(input_ids, attention_mask=mask), "
                "with the prompts padded on the left."
            )
        make_manager(self, model, *args, **kwargs)

    return init


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The 2D padding mask `[B, tokens so far]`, or None when there is no padding:
    never anything of size S x S.
    """
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    mask = flash_attention_mask(*sizes, attention_mask=attention_mask, **kwargs)
    if mask is None and kv_length != q_offset + q_length:
        # A static cache is longer than what it holds; only a mask can tell a dense layer how
        # long that is.
        shape = (batch_size, int(q_offset) + q_length)
        mask = torch.ones(shape, dtype=torch.bool, device=kwargs.get("device"))
    return mask


# --- Layers left dense ----------------------------------------------------------------------------


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    nsa_batch: Batch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention for the layers that a partial patch left dense,
    at the cost that they had before.

    query `[B, HQ, S, D]`, key and value `[B, HKV, past + S or more, D]` -> (`[B, S, HQ, D]`, None).
    Only queries after a past need a mask of their number times that of the keys, as in
    transformers' own SDPA.

    Raises:
        RuntimeError: for a layer that its config wants sparse.
    """
    sparse = (getattr(module.config, "nsa", {"layers": ()}) or {}).get("layers")
    if sparse is None or module.layer_idx in sparse:
        raise RuntimeError(
            f"layer {module.layer_idx} is dense, but its config, a {type(module.config).__name__}, "
            "has NSA there. Fix: build or load the model with AutoModelForCausalLM or AutoModel."
        )
    length = query.shape[2]
    if nsa_batch is None:
        past = (key.shape[2] if attention_mask is None else attention_mask.shape[1]) - length
        nsa_batch = find_batch(query.transpose(1, 2), past, attention_mask, **kwargs)
    (rows, layout, mask, packed, _), past = nsa_batch
    # A static cache has an unused end.
    key, value = key[:, :, : past + length], value[:, :, : past + length]
    if past == 0 and (packed or rows is not None):
        q, k, v = (_take(x.transpose(1, 2), rows) for x in (query, key, value))
        o = _packed_attention(module, q, k, v, layout, scaling, dropout)
        if rows is not None:
            o = o.new_zeros(query.shape[0] * length, *o.shape[1:]).index_copy(0, rows, o)
        return o.unflatten(0, (query.shape[0], length)), None
    visible = None
    if past > 0 and (length > 1 or mask is not None):
        column = torch.arange(past + length, device=query.device)
        visible = (column <= column[past:, None])[None, None]  # [1, 1, S, past + S]
        if mask is not None:
            # A padded query sees nothing, which softmax would turn into NaN;
            # its own position is as good as anything.
            visible = visible & mask[:, None, None] | (column == column[past:, None])
    options: dict[str, Any] = dict(dropout=dropout, scaling=scaling)
    return sdpa_attention_forward(module, query, key, value, visible, **options)


def _packed_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Sequences,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """q `[T, HQ, D]`, k and v `[T, HKV, D]` -> `[T, HQ, D]`: FlashAttention where it runs,
    else sequence by sequence.
    """
    flash = q.is_cuda and q.dtype in flash_attention.DTYPES and not dropout
    if torch.compiler.is_compiling() or flash:
        window_size = max(1, layout.max_seqlen)
        return sliding_window_attention(
            q, k, v, *layout[:2], window_size=window_size, scale=scaling
        )
    parts = []
    options: dict[str, Any] = dict(dropout=dropout, scaling=scaling)
    lengths = layout.cu_seqlens.diff().tolist()
    for sequence in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        if len(sequence[0]) > 0:
            q_, k_, v_ = (x.transpose(0, 1)[None] for x in sequence)
            o, _ = sdpa_attention_forward(module, q_, k_, v_, None, **options)
            parts.append(o[0])
    return torch.cat(parts) if parts else q


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    """`[B, S, ...]` -> the packed rows `[T, ...]`."""
    return x.flatten(0, 1) if rows is None else x.flatten(0, 1).index_select(0, rows)


ContinuousBatchingManager.__init__ = _refuse_continuous_batching(ContinuousBatchingManager.__init__)  # type: ignore[method-assign]
AttentionInterface.register(ATTENTION_NAME, dense_attention)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
