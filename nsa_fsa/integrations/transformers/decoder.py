"""What happens before a decoder's layers: a hook looks at the mask, the positions and the cache
once, and hands every layer a `Batch`."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingManager

from nsa_fsa.checks import check_tensor
from nsa_fsa.distributed.context_parallel import check_context_parallel
from nsa_fsa.integrations.transformers import cache
from nsa_fsa.integrations.transformers.attention import NO_WEIGHTS, NSAAttention
from nsa_fsa.integrations.transformers.batch import Batch, find_batch, padding_of
from nsa_fsa.integrations.transformers.steps import find_step
from nsa_fsa.integrations.transformers.turning import like_rotated, positions_of_keys, turns_back
from nsa_fsa.modules.rotary import BY_LENGTH, BY_POSITION
from nsa_fsa.sequences import uniform_layout


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
        mask = padding_of(mask, inputs.shape[0], past or 0, num_new)
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
