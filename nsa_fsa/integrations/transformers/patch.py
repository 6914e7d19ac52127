"""Swapping Native Sparse Attention into a transformers model, and back out."""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.attention import ATTENTION_NAME, NSAAttention
from nsa_fsa.integrations.transformers.models import DENSE_CLASS, SPARSE_CLASS, supported_models


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` changed, or would change."""

    model_class: str  # before
    patched_class: str  # after: the class whose checkpoints round-trip
    config: NSAConfig
    layers: tuple[int, ...]  # layers that now have NSA attention
    dense_layers: tuple[int, ...]  # layers left as they were
    new_parameters: int  # in gates and compressors
    total_parameters: int  # of the patched model
    dry_run: bool = False
    already_patched: bool = False

    def __str__(self) -> str:
        c = self.config
        verb = "would become" if self.dry_run else "was already" if self.already_patched else "is now"
        reach = c.num_selected_blocks * c.block_size
        dense = f"; dense: {_ranges(self.dense_layers)}" if self.dense_layers else ""
        return "\n".join(
            (
                f"{self.model_class} {verb} {self.patched_class} (transformers {transformers.__version__})",
                f"  NSA layers: {_ranges(self.layers)}{dense}",
                f"  heads: {c.num_heads} query, {c.num_kv_heads} KV (group size {c.group_size}), head dim {c.head_dim}",
                f"  each query reads: {c.num_selected_blocks} blocks of {c.block_size} keys = {reach}, the last "
                f"{c.window_size}, and one compressed token per {c.kernel_stride}",
                f"  new parameters: {self.new_parameters:,} of {self.total_parameters:,} "
                f"({self.new_parameters / max(1, self.total_parameters):.2%}); all others are kept",
                f"  gates: {c.gate_init}" + (f", so outputs stay close up to {reach} tokens" if c.gate_init == "dense" else ""),
            )
        )


@dataclass
class _DenseState:
    """What `unpatch_model` needs besides the dense attention modules, which their replacements keep."""

    config: Any  # the model's config before patching
    sparse_values: dict[str, Any]  # what the patched model's config held then, to see whether it was changed since


def patch_model(
    model: PreTrainedModel,
    config: NSAConfig | None = None,
    preset: str | None = None,
    layers: Iterable[int] | None = None,
    dry_run: bool = False,
    *,
    verbose: bool = True,
) -> PatchReport:
    """Replaces the attention of one Llama, Qwen2 or Qwen3 model by Native Sparse Attention, in place.

    The pretrained projections are kept and shared; gates and compressors are added. The instance becomes a
    `NSALlamaForCausalLM` (and so on), so that `save_pretrained` writes a checkpoint that loads sparse or not at all.
    Nothing else changes: not the transformers class, no other model, not even one made from the same config object.
    Patching a patched model with the same settings does nothing.

    Args:
        model: a causal LM or base model; `supported_models()` lists the classes.
        config: the NSA settings; default: `NSAConfig.from_pretrained_config(model.config, preset)`.
        preset: "fsa-64x16" (default), "fsa-128x8" or "tiny"; not together with `config`.
        layers: indices of the layers to patch; default all.
        dry_run: only report what would change.
        verbose: print the report.

    Returns:
        The report.

    Raises:
        TypeError: for a model class that is not supported.
        ValueError: for settings that do not fit the model. The model is untouched then.
        RuntimeError: for a transformers version whose attention has another signature.
    """
    if type(model) in DENSE_CLASS:
        return _already_patched(model, config, preset, layers, verbose)
    if type(model) not in SPARSE_CLASS:
        hint = "call patch_model before get_peft_model" if hasattr(model, "peft_config") else "patch one of those"
        raise TypeError(
            f"{type(model).__name__} cannot be patched: supported are {', '.join(supported_models())}. Fix: {hint}."
        )
    if config is None:
        config = NSAConfig.from_pretrained_config(model.config, preset)
    elif preset is not None:
        raise ValueError(f"preset={preset!r} and config are both given. Fix: pass one of them.")
    sparse_class = SPARSE_CLASS[type(model)]
    replacements = _build(model, config, layers)

    report = _report(model, sparse_class.__name__, config, replacements, dry_run=dry_run)
    if not dry_run:
        sparse_config = _convert_config(model.config, sparse_class.config_class)
        sparse_config.nsa = {**config.to_dict(), "layers": None if layers is None else sorted(replacements)}
        _swap(model, sparse_class, sparse_config, replacements)
    if verbose:
        print(report)
    return report


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `patch_model` in place: the model's own attention modules, class and config come back, bit for bit.

    Projections that were trained meanwhile keep their new values, and so does a config that was changed (by
    `resize_token_embeddings`, say); gates and compressors are dropped. Does nothing to a model that is not patched.

    Returns:
        The model.
    """
    if type(model) not in DENSE_CLASS:
        return model
    state: _DenseState = model._nsa_dense  # type: ignore[assignment]
    for layer in _decoder_layers(model):
        if isinstance(layer.self_attn, NSAAttention):
            layer.self_attn = layer.self_attn.to_dense()
    changed = [name for name, value in _lasting_values(model.config).items() if state.sparse_values.get(name) != value]
    dense_config = copy.deepcopy(state.config) if changed else state.config  # the original may serve other models, too
    for name in changed:
        setattr(dense_config, name, copy.deepcopy(getattr(model.config, name)))
    _rebind_config(model, model.config, dense_config)
    model.__class__ = DENSE_CLASS[type(model)]
    del model._nsa_dense
    return model


def install(model: PreTrainedModel) -> None:
    """Gives a newly constructed `nsa_*` model the attention that its config's `nsa` field asks for."""
    settings = dict(model.config.nsa or {})
    layers = settings.pop("layers", None)
    config = NSAConfig.from_dict(settings) if settings else NSAConfig.from_pretrained_config(model.config)
    replacements = _build(model, config, layers)
    model.config.nsa = {**config.to_dict(), "layers": layers}
    _swap(model, type(model), model.config, replacements)


def _build(model: PreTrainedModel, config: NSAConfig, layers: Iterable[int] | None) -> dict[int, NSAAttention]:
    """New attention modules by layer, with everything checked and the model untouched."""
    decoder_layers = _decoder_layers(model)
    wanted = range(len(decoder_layers)) if layers is None else sorted(set(layers))
    unknown = [i for i in wanted if not 0 <= i < len(decoder_layers)]
    if unknown or not wanted:
        raise ValueError(
            f"layers={list(wanted)} must be among 0 .. {len(decoder_layers) - 1}, and at least one. "
            "Fix: leave layers out to patch all of them."
        )
    _check_fit(model, config)
    for i in wanted:
        if isinstance(decoder_layers[i].self_attn, NSAAttention):
            raise ValueError(
                f"layer {i} is patched already, as a part of a larger model. Fix: patch or unpatch the whole model."
            )
        _check_signature(decoder_layers[i].self_attn)  # type: ignore[arg-type]
    return {i: NSAAttention(config, decoder_layers[i].self_attn) for i in wanted}  # type: ignore[arg-type]


def _check_fit(model: PreTrainedModel, config: NSAConfig) -> None:
    """Everything that the kept projections and the model's forward pass demand of the NSA settings."""
    expected = NSAConfig.from_pretrained_config(model.config)
    for name in (
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "v_head_dim",
        "scale",
        "qk_norm",
        "qkv_bias",
        "o_bias",
    ):
        if getattr(config, name) != getattr(expected, name):
            raise ValueError(
                f"NSAConfig.{name}={getattr(config, name)!r} does not fit this model, whose projections need "
                f"{getattr(expected, name)!r}. Fix: NSAConfig.from_pretrained_config(model.config, ...)."
            )
    if config.kv_per_branch:
        raise ValueError(
            "NSAConfig.kv_per_branch=True needs projections of its own, but patching keeps the pretrained ones: it must be "
            "False. Fix: kv_per_branch=False, or build a model around NativeSparseAttention."
        )
    sliding = [i for i, kind in enumerate(getattr(model.config, "layer_types", None) or ()) if kind != "full_attention"]
    if sliding:
        raise ValueError(
            f"layers {sliding} of this model are not full attention: allowed is layer_types 'full_attention' throughout. "
            "Fix: use_sliding_window=False in the model's config, if it was trained so."
        )
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(
            f"attention_dropout={model.config.attention_dropout} is not available in NSA: it must be 0. "
            "Fix: model.config.attention_dropout = 0.0."
        )


def _check_signature(attention: nn.Module) -> None:
    found = set(inspect.signature(type(attention).forward).parameters)
    expected = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
    if "cache" in found:  # the name since 5.24
        found.add("past_key_values")
    if not expected <= found:
        raise RuntimeError(
            f"{type(attention).__name__}.forward of transformers {transformers.__version__} lacks the parameters "
            f"{sorted(expected - found)}. Fix: install a version in the range transformers>=5.17,<6."
        )


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.base_model.layers  # type: ignore[return-value]


def _convert_config(config: Any, config_class: Any) -> Any:
    """A copy of a model config as another class of the same family."""
    converted = copy.deepcopy(config)
    converted.__class__ = config_class
    converted.__dict__.pop("model_type", None)  # a config read from a file has it as an attribute of its own
    return converted


def _lasting_values(config: Any) -> dict[str, Any]:
    """A config's fields without those that `save_pretrained` writes into it from the model."""
    return {name: value for name, value in config.to_dict().items() if name not in ("architectures", "dtype", "nsa")}


def _swap(
    model: PreTrainedModel, sparse_class: type[PreTrainedModel], sparse_config: Any, replacements: dict[int, NSAAttention]
) -> None:
    """The only place that changes a model, and nothing in it can fail half-way."""
    dense_config = model.config
    if sparse_class is type(model):  # built sparse: the dense config exists only as what unpatching would give
        dense_config = _convert_config(model.config, DENSE_CLASS[sparse_class].config_class)
        del dense_config.nsa
        if dense_config._attn_implementation == ATTENTION_NAME:  # the config came from a patched model, not from a file
            dense_config._attn_implementation = "sdpa"  # transformers' default for these models
    for i, replacement in replacements.items():
        _decoder_layers(model)[i].self_attn = replacement
    sparse_config._attn_implementation = ATTENTION_NAME
    model._nsa_dense = _DenseState(dense_config, _lasting_values(sparse_config))  # type: ignore[assignment]
    _rebind_config(model, model.config, sparse_config)
    model.__class__ = sparse_class


def _rebind_config(model: nn.Module, old: Any, new: Any) -> None:
    """Every submodule that refers to the old config object gets the new one; the old one itself is not changed."""
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


def _report(
    model: PreTrainedModel, patched_class: str, config: NSAConfig, attentions: dict[int, NSAAttention], **flags: bool
) -> PatchReport:
    added = sum(
        p.numel()
        for attention in attentions.values()
        for part in (attention.gate, attention.compress_k, attention.compress_v)
        for p in part.parameters()
    )
    is_patched = flags.get("already_patched", False)
    return PatchReport(
        model_class=type(model).__name__,
        patched_class=patched_class,
        config=config,
        layers=tuple(sorted(attentions)),
        dense_layers=tuple(i for i in range(len(_decoder_layers(model))) if i not in attentions),
        new_parameters=added,
        total_parameters=model.num_parameters() + (0 if is_patched else added),
        **flags,
    )


def _already_patched(
    model: PreTrainedModel, config: NSAConfig | None, preset: str | None, layers: Iterable[int] | None, verbose: bool
) -> PatchReport:
    attentions = {i: x.self_attn for i, x in enumerate(_decoder_layers(model)) if isinstance(x.self_attn, NSAAttention)}
    current = next(iter(attentions.values())).config
    wanted = config or (NSAConfig.from_pretrained_config(model.config, preset) if preset else current)
    if wanted != current or (layers is not None and sorted(set(layers)) != sorted(attentions)):
        raise ValueError("the model is already patched with other settings. Fix: unpatch_model(model) first.")
    report = _report(model, type(model).__name__, current, attentions, already_patched=True)
    if verbose:
        print(report)
    return report


def _ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
