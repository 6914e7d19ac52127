"""Swapping Native Sparse Attention into a transformers model, and back out."""

import copy
import gc
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsa_fsa.config import PRESETS, ROPE_TYPES, NSAConfig, attention_fields, with_changes
from nsa_fsa.integrations.transformers.attention import NSAAttention, attach, detach
from nsa_fsa.integrations.transformers.models import (
    DENSE_CLASS,
    SPARSE_CLASS,
    check_nsa,
    is_index,
    make_phi,
    supported_models,
)
from nsa_fsa.modules.compression import Compressor
from nsa_fsa.modules.gating import BranchGate
from nsa_fsa.ops.compression.operator import POOL_BACKENDS

Settings: TypeAlias = NSAConfig | Mapping[str, Any] | str | os.PathLike[str]
COMPRESSORS = ("compressor_k", "compressor_v")
PARTS = ("gate", "compress_k", "compress_v")  # what a layer adds, and learns
# What follows the `name_or_path` of a model that is no longer what is there. PEFT writes it into
# adapters as their base model: whatever loads a base model by it raises an error with this text,
# instead of giving the adapter another one.
CHANGED = ", changed by "
HOW_TO_LOAD = ": load and change it alike, then PeftModel.from_pretrained(model, adapter)"
# Wrappers that keep a list of the parameters they found, and would miss those that
# unpatching drops.
KEEPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` changed, or would change."""

    model_class: str  # before
    patched_class: str  # after: the class whose checkpoints round-trip
    config: NSAConfig  # of the first NSA layer
    layers: tuple[int, ...]  # layers that now have NSA attention
    dense_layers: tuple[int, ...]  # layers left as they were
    new_parameters: int  # in gates and compressors
    total_parameters: int  # of the patched model
    dry_run: bool = False
    already_patched: bool = False
    configs: Mapping[int, NSAConfig] = field(default_factory=dict)  # by layer
    # Parts of layers patched before that do not fit the new settings: "0.compress_k".
    started_anew: tuple[str, ...] = ()

    def __str__(self) -> str:
        c = self.config
        verb = "was already" if self.already_patched else "is now"
        verb = "would become" if self.dry_run else verb
        reach = c.num_selected_blocks * c.block_size
        dense = f"; dense: {_ranges(self.dense_layers)}" if self.dense_layers else ""
        others = tuple(i for i in self.layers if self.configs[i] != c)
        gates = c.gate_init
        if gates == "dense":
            gates += f", so outputs stay close up to {reach} tokens"
        if self.model_class == self.patched_class:
            gates = f"those that fit are kept as they are; new ones start {c.gate_init}"
        version = f"transformers {transformers.__version__}"
        heads = f"{c.num_heads} query, {c.num_kv_heads} KV (group size {c.group_size})"
        lines = [
            f"{self.model_class} {verb} {self.patched_class} ({version})",
            f"  NSA layers: {_ranges(self.layers)}{dense}",
            f"  heads: {heads}, head dim {c.head_dim}",
            f"  each query reads: {c.num_selected_blocks} blocks of {c.block_size} keys = {reach}, "
            f"the last {c.window_size}, and one compressed token per {c.kernel_stride}",
            f"  new parameters: {self.new_parameters:,} of {self.total_parameters:,} "
            f"({self.new_parameters / max(1, self.total_parameters):.2%}); "
            "all others are kept. With LoRA: "
            'modules_to_save=["gate", "compress_k", "compress_v"], or they stay as they are',
            f"  gates: {gates}",
        ]
        if others:
            lines.append(
                f"  layers with other settings than these, which are of layer {self.layers[0]}: "
                f"{_ranges(others)}"
            )
        if self.started_anew:
            lines.append(
                "  learned before, and started anew because the shape changed: "
                f"{', '.join(self.started_anew)}"
            )
        return "\n".join(lines)


@dataclass
class _DenseState:
    """What `unpatch_model` needs besides the dense attention modules,
    which their replacements keep.
    """

    config: Any  # the model's config before patching
    # What the patched model's config held then, to see whether it was changed since.
    sparse_values: dict[str, Any]
    of_sparse_checkpoint: bool = False  # whether the model's checkpoint has the NSA layers


def patch_model(
    model: PreTrainedModel,
    config: Settings | Mapping[int, Settings] | None = None,
    preset: str | None = None,
    layers: int | Iterable[int] | None = None,
    dry_run: bool = False,
    *,
    compressor_k: Callable[[NSAConfig], nn.Module] | None = None,
    compressor_v: Callable[[NSAConfig], nn.Module] | None = None,
    verbose: bool = True,
    **overrides: Any,
) -> PatchReport:
    """Replaces the attention of one Llama, Qwen2 or Qwen3 model by Native Sparse
    Attention, in place.

    The pretrained projections are kept and shared; gates and compressors are added. The instance
    becomes a `NSALlamaForCausalLM` (and so on), so that `save_pretrained` writes a checkpoint that
    loads sparse or not at all. Nothing else changes: not the transformers class, no other model,
    not even one made from the same config object. (A larger model that contains this one gets a
    config that says so.)

    An adapter that PEFT saves names its base model by `name_or_path`, which says from now on that
    the checkpoint there was changed: `AutoPeftModelForCausalLM` refuses it.
    `PeftModel.from_pretrained(model, adapter)` takes whatever model it is given, so give it one
    that was patched alike. PEFT cannot compare vocabularies then, and warns: where it was resized,
    `save_pretrained(adapter, save_embedding_layers=True)`. To have an adapter that loads by itself,
    save the patched model, and train the adapter on what `AutoModelForCausalLM.from_pretrained`
    gives of that.

    A patched model may be patched again: layers that are still dense become sparse, and layers with
    other settings change to them, keeping the gates and compressors that still fit. With the same
    settings nothing happens.

    Args:
        model: a causal LM or base model; `supported_models()` lists the classes.
        config: the NSA settings: an `NSAConfig`, a preset's name, the path of a YAML file, or a
            dict of fields that differ from the preset's; or such settings for single layers,
            `{0: ..., 5: ...}`. Default: the preset, or what the layer has if it is patched.
        preset: "fsa-64x16" (default), "fsa-128x8" or "tiny".
        layers: index or indices of the layers to patch; negative ones count from the end.
            Default: all; of a patched model, those that are patched.
        dry_run: only report what would change.
        compressor_k, compressor_v: makes a layer's own phi from its `NSAConfig`, see
            `NativeSparseAttention`. It is moved to the device and dtype of the layer's projections.
            No file holds such a class, so `from_pretrained` wants it again.
        verbose: print the report.
        overrides: fields of `NSAConfig`, which win over `config` and `preset`: `window_size=64`.

    Returns:
        The report.

    Raises:
        TypeError: for a model class that is not supported, a wrapper around one,
            or a compiled attention module.
        ValueError: for settings that do not fit the model. The model is untouched then.
        RuntimeError: for a transformers version whose attention has another signature.
    """
    if type(model) not in SPARSE_CLASS and type(model) not in DENSE_CLASS:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        known = {**SPARSE_CLASS, **DENSE_CLASS}
        inside = next((type(m).__name__ for m in modules if type(m) in known), None)
        fix = "patch one of those"
        if inside:
            fix = (
                f"patch the {inside} inside it before wrapping, "
                "as in patch_model before get_peft_model"
            )
        raise TypeError(
            f"{type(model).__name__} cannot be patched: "
            f"supported are {', '.join(supported_models())}. Fix: {fix}."
        )
    before = type(model)
    sparse_class = SPARSE_CLASS.get(before, before)
    own = {"compressor_k": compressor_k, "compressor_v": compressor_v}
    for name, make in own.items():
        if make is not None and (not callable(make) or isinstance(make, nn.Module)):
            raise ValueError(
                f"{name} is a {type(make).__name__}; it must be a class or a function that "
                f"makes a layer's own nn.Module from its NSAConfig. Fix: {name}=lambda config: ..."
            )
    settings = _by_layer(model, config, preset, layers, overrides, patched=before in DENSE_CLASS)
    replacements, anew = _build(model, settings, dict.fromkeys(settings, own))

    now = _attentions(model)
    attentions = {**now, **replacements}
    report = PatchReport(
        model_class=before.__name__,
        patched_class=sparse_class.__name__,
        config=attentions[min(attentions)].config,
        layers=tuple(sorted(attentions)),
        dense_layers=tuple(i for i in range(len(_decoder_layers(model))) if i not in attentions),
        new_parameters=_count_new(attentions.values()),
        total_parameters=_count(model)
        + _count_new(replacements.values())
        - _count_new(now[i] for i in replacements if i in now),
        dry_run=dry_run,
        already_patched=not replacements,
        configs={i: attention.config for i, attention in attentions.items()},
        started_anew=anew,
    )
    if replacements and not dry_run:
        first = before in SPARSE_CLASS
        sparse_config = model.config
        if first:
            sparse_config = _convert_config(model.config, sparse_class.config_class)
        _swap(model, sparse_class, sparse_config, replacements)
        _rename(model, changed_by="patch_model")
    if verbose:
        print(report)
    return report


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes `patch_model` in place: the model's own attention modules, class and config come back,
    bit for bit.

    Projections that were trained meanwhile keep their new values, and so does a config that was
    changed (by `resize_token_embeddings`, say); gates and compressors are dropped. A patched model
    inside another (PEFT, torch.compile, DataParallel, a Llava) is unpatched there. Does nothing to
    a model that is not patched.

    Returns:
        The model.

    Raises:
        TypeError: for a patched model in a wrapper that keeps account of its parameters (DDP,
            FSDP), or in a subclass, or with a compiled attention module.
    """
    modules = list(model.modules())
    patched = [m for m in modules if type(m) in DENSE_CLASS]

    def keeps(module: nn.Module) -> bool:
        return not KEEPERS.isdisjoint(cls.__name__ for cls in type(module).__mro__)

    keepers = [type(m).__name__ for m in modules if keeps(m)]
    found = any(isinstance(m, NSAAttention) for m in modules)
    if found and (keepers or not patched):
        raise TypeError(
            f"{(keepers or [type(model).__name__])[0]} cannot be unpatched: "
            "it is not what patch_model made, or it keeps a list of the parameters that would go. "
            "Fix: call unpatch_model with the whole patched model, before wrapping it."
        )
    for inner in patched:
        _check_slots(inner, _attentions(inner))  # type: ignore[arg-type]
    for inner in patched:
        _unpatch(inner)  # type: ignore[arg-type]
    return model


def _unpatch(model: PreTrainedModel) -> None:
    state: _DenseState = model._nsa_dense  # type: ignore[assignment]
    values, before = _lasting_values(model.config), state.sparse_values
    changed = [name for name, value in values.items() if before.get(name) != value]
    slots = _slots(model)
    for i, attention in _attentions(model).items():
        setattr(*slots[i], attention.to_dense())
    detach(model.base_model)
    # The original may serve other models, too.
    dense_config = copy.deepcopy(state.config) if changed else state.config
    for name in changed:
        setattr(dense_config, name, copy.deepcopy(getattr(model.config, name)))
    _rebind_config(model, model.config, dense_config)
    # The dense attention modules still have the original.
    _replace_config(model, state.config, dense_config)
    model.__class__ = DENSE_CLASS[type(model)]
    _rename(model, changed_by="unpatch_model" if state.of_sparse_checkpoint else None)
    del model._nsa_dense


def install(model: PreTrainedModel, own: Mapping[str, Any]) -> None:
    """Gives a newly constructed `nsa_*` model the attention that its config's `nsa`
    field asks for.
    """
    settings = settings_of(model.config)
    own_of: dict[int, dict[str, Any]] = {i: {} for i in settings}
    changed = getattr(model.config, "is_changed", False)
    for name in COMPRESSORS:
        phis = {i: values.pop(name, None) for i, values in settings.items()}
        saved = {i: phi for i, phi in phis.items() if phi is not None}
        if saved and own[name] is None:
            raise ValueError(
                f"the model was saved with a {name} of its own, "
                f"{saved[min(saved)]}, which no file holds. Fix: from_pretrained(..., {name}=...), "
                "a function that makes it from an NSAConfig, as in patch_model."
            )
        changed |= own[name] is not None and not saved
        for i in saved or settings:
            own_of[i][name] = own[name]
    configs = {i: _resolve(model, values) for i, values in settings.items()}
    replacements, _ = _build(model, configs, own_of)
    saved_as = getattr(model.config, "architectures", None) or ()
    _swap(model, type(model), model.config, replacements)
    of_sparse_checkpoint = any(name.startswith("NSA") for name in saved_as)
    model._nsa_dense.of_sparse_checkpoint = of_sparse_checkpoint  # type: ignore[union-attr]
    if changed or not of_sparse_checkpoint:
        _rename(model, changed_by=type(model).__name__)


def settings_of(config: Any) -> dict[int, dict[str, Any]]:
    """What the `nsa` of an `nsa_*` config says of each NSA layer, by index from 0:
    fields of NSAConfig, a preset, and the names of compressors of its own.

    Raises:
        ValueError: for an `nsa` of another form, or layers that there are not.
    """
    check_nsa(config.nsa)
    # The config of a checkpoint alone names an architecture.
    start = "dense" if getattr(config, "architectures", None) else "balanced"
    common = {"gate_init": start, **(config.nsa or {})}
    count, per_layer = config.num_hidden_layers, common.pop("per_layer", None) or {}
    layers = indices_of(common.pop("layers", None), count)
    is_dict = isinstance(per_layer, Mapping)
    if not is_dict or not all(isinstance(values, Mapping) for values in per_layer.values()):
        raise ValueError(
            f"per_layer={per_layer!r} is not allowed in the config's nsa: it must be a dict "
            "by layer of what differs there. Fix: per_layer={0: {'window_size': 64}}, for example."
        )
    differ = of_layers(per_layer, count)
    if dense := sorted(differ.keys() - set(layers)):
        raise ValueError(
            f"per_layer names layers {dense}, which are not among nsa's layers={layers}. "
            "Fix: add or drop them."
        )
    return {i: with_changes(common, differ.get(i, {})) for i in layers}


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """A patched model's layers as they are now, in the form of the config's field `nsa`."""
    layers = {}
    for i, attention in _attentions(model).items():
        layers[i] = attention.config.to_dict()
        for name in COMPRESSORS:
            if (phi := _own_phi(attention, name)) is not None:
                layers[i][name] = f"{type(phi).__module__}.{type(phi).__qualname__}"
    common = layers[min(layers)] if layers else {}
    per_layer = {
        str(i): {
            key: values.get(key)
            for key in {**common, **values}
            if values.get(key) != common.get(key)
        }
        for i, values in layers.items()
        if values != common
    }
    listed = None if len(layers) == len(_decoder_layers(model)) else sorted(layers)
    return {**common, "layers": listed, **({"per_layer": per_layer} if per_layer else {})}


def _attentions(model: PreTrainedModel) -> dict[int, NSAAttention]:
    found = {i: getattr(*slot) for i, slot in enumerate(_slots(model))}
    return {i: attention for i, attention in found.items() if isinstance(attention, NSAAttention)}


def indices_of(layers: Any, count: int) -> list[int]:
    """Layers as sorted indices from 0: of an int, or of anything that holds ints,
    arrays and tensors included.
    """
    if layers is None:
        return list(range(count))

    def index(i: Any) -> int:
        # A mask would be read as 0 and 1.
        if isinstance(i, bool) or "bool" in str(getattr(i, "dtype", "")):
            raise TypeError
        return operator.index(i)

    try:
        try:
            indices = [index(layers)]
        except TypeError:
            indices = [index(i) for i in layers]
    except TypeError:
        indices = []
    if not indices or not all(-count <= i < count for i in indices):
        raise ValueError(
            f"layers={layers!r} must be an index or indices among 0 .. "
            f"{count - 1}, or negative ones that count from the end, and at least one. "
            "Fix: name layers that the model has, or none at all to patch all of them."
        )
    return sorted({i % count for i in indices})


def of_layers(values: Any, count: int) -> dict[int, Any]:
    """`{0: ..., -1: ..., (1, 2): ...}`, or with "0" as JSON has it,
    as a dict with an index from 0 for every layer.
    """
    found: dict[int, Any] = {}
    for key, value in values.items():
        for i in indices_of(int(key) if is_index(key) else key, count):
            if i in found:
                raise ValueError(
                    f"layer {i} is named twice in {list(values)}. Fix: name every layer once."
                )
            found[i] = value
    return found


def _by_layer(
    model: PreTrainedModel,
    config: Any,
    preset: str | None,
    layers: Any,
    overrides: Mapping[str, Any],
    patched: bool,
) -> dict[int, NSAConfig]:
    """The arguments of `patch_model` as one NSAConfig for each layer to be patched."""
    now = {i: attention.config for i, attention in _attentions(model).items()} if patched else {}
    count = len(_decoder_layers(model))
    if isinstance(config, Mapping) and not config:
        raise ValueError(
            "config={} is not allowed: it names no layer and no setting. "
            "Fix: leave it out for the preset or for the settings that the model has, "
            'or name some, as in config=dict(preset="tiny") or config={0: "tiny"}.'
        )
    is_dict = isinstance(config, Mapping)
    if is_dict and all(is_index(key) or not isinstance(key, str) for key in config):
        if layers is not None:
            raise ValueError(
                f"layers={layers!r} and a config for each layer are both given. "
                "Fix: pass one of them."
            )
        given = of_layers(config, count)
    else:
        given = dict.fromkeys(now if layers is None and now else indices_of(layers, count), config)
    return {i: _resolve(model, value, preset, overrides, now.get(i)) for i, value in given.items()}


def _resolve(
    model: PreTrainedModel,
    given: Any,
    preset: str | None = None,
    overrides: Any = None,
    now: NSAConfig | None = None,
) -> NSAConfig:
    """One layer's settings, in whichever form they were given, as an NSAConfig that
    fits the model.
    """
    whole = isinstance(given, (NSAConfig, str, os.PathLike))
    whole = whole or (isinstance(given, Mapping) and "preset" in given)
    if whole and preset is not None:
        raise ValueError(f"preset={preset!r} and config are both given. Fix: pass one of them.")
    if isinstance(given, str) and given in PRESETS:
        given = {"preset": given}
    elif isinstance(given, (str, os.PathLike)):
        if not os.path.isfile(given):
            raise ValueError(
                f"config={given!r} is neither a preset nor a file: allowed are {tuple(PRESETS)}, "
                "the path of a YAML file, a dict or an NSAConfig. Fix: check the spelling."
            )
        given = NSAConfig.from_yaml(os.fspath(given))
    if isinstance(given, NSAConfig):
        given = given.to_dict()
    if not isinstance(given, (Mapping, type(None))):
        raise ValueError(
            f"config={given!r} is not allowed: it must be an NSAConfig, a preset's name, the path "
            'of a YAML file, a dict, or a dict of these by layer. Fix: config="tiny", for example.'
        )
    if unknown := [key for key in given or {} if is_index(key) or not isinstance(key, str)]:
        raise ValueError(
            f"config={given!r} has the keys {unknown} where names of settings must be. "
            "Fix: config={0: ..., 1: ...} for settings by layer, with nothing else beside them."
        )
    values = {"preset": preset, **(given or {}), **(overrides or {})}
    if now is not None and values["preset"] is None:
        values = {**now.to_dict(), **values}
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        # cos and sin of a type that somebody registered come from the model.
        values.setdefault("rope_parameters", None)
    values["preset"] = values["preset"] or "fsa-64x16"
    config = NSAConfig.from_dict({**attention_fields(model.config), **values})
    _check_fit(model, config)
    return config


def _build(
    model: PreTrainedModel, settings: Mapping[int, NSAConfig], own: Mapping[int, Mapping[str, Any]]
) -> tuple[dict[int, NSAAttention], tuple[str, ...]]:
    """New attention modules for the layers that change, and which learned parts start anew.
    The model is untouched.
    """
    replacements, anew, slots = {}, [], _slots(model)
    dense = [i for i in sorted(settings) if not isinstance(getattr(*slots[i]), NSAAttention)]
    _check_slots(model, dense)
    for i, config in sorted(settings.items()):
        attention: Any = getattr(*slots[i])
        before = attention if isinstance(attention, NSAAttention) else None
        if before is None:
            _check_signature(attention)
        elif type(model) in SPARSE_CLASS:
            raise ValueError(
                f"layer {i} is patched already, as a part of a larger model. "
                "Fix: patch or unpatch the whole model."
            )
        elif before.config == config and not any(own[i].values()):
            continue
        factory = _factory(model, attention.q_proj)
        made = {name: make for name, make in own[i].items() if make is not None}
        new: dict[str, Any] = {
            name: make_phi(make, config, **factory) for name, make in made.items()
        }
        if before is not None:
            new = {**{name: _own_phi(before, name) for name in COMPRESSORS}, **new}
        dense_attention = before.to_dense() if before else attention
        replacement = NSAAttention(config, dense_attention, **new, **factory)
        if before is not None:
            anew += _carry_over(i, before, replacement, own[i])
        replacements[i] = replacement
    return replacements, tuple(anew)


def _factory(model: PreTrainedModel, projection: nn.Module) -> dict[str, Any]:
    """Where and in what precision a layer's new parameters are made: as its query projection."""
    weight: Any = getattr(projection, "weight", None)
    # torch.ao has a method of that name, and GPTQ buffers of other names.
    if not isinstance(weight, Tensor):
        tensors = (*projection.parameters(), *projection.buffers())
        device = next((x.device for x in tensors), model.device)
        return dict(device=device, dtype=model.dtype)
    # accelerate brings offloaded weights to the hook's device when they are needed.
    hook = getattr(projection, "_hf_hook", None)
    device = weight.device
    if device.type == "meta" and hook is not None:
        device = hook.execution_device
    packed = not weight.is_floating_point() or weight.element_size() == 1
    return dict(device=device, dtype=model.dtype if packed else weight.dtype)


def _own_phi(attention: NSAAttention, name: str) -> nn.Module | None:
    """A layer's phi for keys or values, if it is not of those that a config can name."""
    compressor: Any = getattr(attention, "compress" + name.removeprefix("compressor"))
    return getattr(compressor, "phi", compressor) if getattr(compressor, "is_own", True) else None


def _carry_over(
    i: int, before: NSAAttention, after: NSAAttention, own: Mapping[str, Any]
) -> list[str]:
    """Gives layer i what its predecessor learned, part by part; returns the parts that do not fit.

    Parts go over as whole modules, with what others put around or on them:
    adapters, hooks that bring offloaded weights.
    """
    anew = []
    phis: dict[str, Any] = {name: _own_phi(before, name) for name in COMPRESSORS}
    # Shapes without what is around them.
    unlearned = NSAAttention(before.config, before.to_dense(), device="meta", **phis)
    for part in PARTS:
        given = own.get(part.replace("compress_", "compressor_")) is not None
        old, new = getattr(before, part), getattr(after, part)
        learned = (old if given else getattr(unlearned, part)).state_dict(keep_vars=True)
        wanted = new.state_dict()
        shapes, needed = ({key: x.shape for key, x in y.items()} for y in (learned, wanted))
        fits = shapes == needed
        if type(old) is not type(new) and (given or not fits):
            raise ValueError(
                f"{part} of layer {i} has to be made anew with these settings, "
                f"but a {type(old).__name__} has taken its place. Fix: merge or unload "
                "the adapter first, or keep the settings that decide the shape."
            )
        devices, here = ({x.device.type for x in y.values()} for y in (learned, wanted))
        offloaded = devices - here == {"meta"}
        # DeepSpeed's ZeRO-3 partitions parameters.
        partitioned = any(getattr(x, "ds_shape", x.shape) != x.shape for x in learned.values())
        if given and (offloaded or partitioned):
            raise ValueError(
                f"{part} of layer {i} is {'offloaded' if offloaded else 'partitioned by ZeRO-3'}, "
                "and cannot be moved into another compressor. "
                f"Fix: leave out {part.replace('compress_', 'compressor_')}, "
                "which keeps the one that is there, "
                f"or patch before {'offloading' if offloaded else 'deepspeed.initialize'}."
            )
        if not fits:
            anew.append(f"{i}.{part}")
        elif given:
            for key, parameter in new.named_parameters():
                # The module gives this to what it loads.
                parameter.requires_grad_(learned[key].requires_grad)
            new.load_state_dict(learned, assign=True)
        else:
            setattr(after, part, old)
    return anew


def _update(attention: NSAAttention, new: NSAAttention) -> None:
    """Gives a layer the settings and parts of one that was built for it."""
    del attention.config  # assigned, it could not differ in what parts are made for
    for name in ("config", "rotary", *PARTS):
        setattr(attention, name, getattr(new, name))
    c = new.config
    for module in attention.modules():  # parts have copies of some settings
        if isinstance(module, BranchGate):
            module.init = c.gate_init
        elif isinstance(module, Compressor):
            module.kernel_size, module.kernel_stride = c.kernel_size, c.kernel_stride
            module.backend = POOL_BACKENDS.or_auto(c.backend)


def _check_fit(model: PreTrainedModel, config: NSAConfig) -> None:
    """Everything that the kept projections and the model's forward pass demand of the
    NSA settings.
    """
    distributed = getattr(model.config, "distributed_config", None)
    tp_size = getattr(distributed, "tp_size", None) or getattr(model, "_tp_size", None) or 1
    if tp_size > 1 or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "the model is tensor-parallel (tp_plan, tp_size), which NSA layers do not support, "
            "or sharded already, and the new parameters would not be. "
            "Fix: load it without tp_plan; patch_model before fully_shard."
        )
    expected = NSAConfig.from_dict({**attention_fields(model.config), "rope_parameters": None})
    widths = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")
    for name in (*widths, "scale", "qk_norm", "qkv_bias", "o_bias"):
        if getattr(config, name) != getattr(expected, name):
            raise ValueError(
                f"NSAConfig.{name}={getattr(config, name)!r} does not fit this model, "
                f"whose projections were made for {getattr(expected, name)!r}. "
                f"Fix: leave {name} out of a dict, a file or the keywords; "
                "for an NSAConfig, NSAConfig.from_pretrained_config(model.config, ...)."
            )
    if config.kv_per_branch:
        raise ValueError(
            "NSAConfig.kv_per_branch=True needs projections of its own, "
            "but patching keeps the pretrained ones: it must be False. "
            "Fix: kv_per_branch=False, or build a model around NativeSparseAttention."
        )
    kinds = getattr(model.config, "layer_types", None) or ()
    sliding = [i for i, kind in enumerate(kinds) if kind != "full_attention"]
    if sliding:
        raise ValueError(
            f"layers {sliding} of this model are not full attention: "
            "allowed is layer_types 'full_attention' throughout. "
            "Fix: use_sliding_window=False in the model's config, if it was trained so."
        )
    if getattr(model.config, "attention_dropout", 0.0):
        raise ValueError(
            f"attention_dropout={model.config.attention_dropout} is not available in NSA: "
            "it must be 0. Fix: model.config.attention_dropout = 0.0."
        )


def _check_signature(attention: nn.Module) -> None:
    found = set(inspect.signature(type(attention).forward).parameters)
    expected = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
    if "cache" in found:  # the name since 5.24
        found.add("past_key_values")
    if not expected <= found:
        raise RuntimeError(
            f"{type(attention).__name__}.forward of transformers "
            f"{transformers.__version__} lacks the parameters {sorted(expected - found)}. "
            "Fix: install a version in the range transformers>=5.17,<6."
        )


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.base_model.layers  # type: ignore[return-value]


def _slots(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Each layer's attention, as the module that holds it and its name there:
    wrappers may be around the layer or around it.
    """

    def slot(layer: nn.Module) -> tuple[nn.Module, str]:
        children = ((m, name, x) for m in layer.modules() for name, x in m.named_children())
        held = ((m, name) for m, name, x in children if "q_proj" in x._modules)
        return next(held, (layer, "self_attn"))

    return [slot(layer) for layer in _decoder_layers(model)]


def _check_slots(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """That these layers' attention can be replaced: what torch.compile returns for a module goes on
    calling that one.
    """
    slots = _slots(model)
    compiled = [i for i in layers if type(slots[i][0]).__name__ == "OptimizedModule"]
    if compiled:
        raise TypeError(
            f"the attention of layers {compiled} is inside an OptimizedModule and cannot "
            "be replaced there. Fix: torch.compile the model or its layers rather than self_attn, "
            "or do so after patching."
        )


def _convert_config(config: Any, config_class: Any) -> Any:
    """A copy of a model config as another class of the same family."""
    converted = config_class.__new__(config_class)
    values = copy.deepcopy(config).__dict__
    values.pop("model_type", None)  # a config read from a file has it as an attribute of its own
    values.pop("_attn_implementation_internal", None)
    converted.__dict__.update(values)
    return converted


def _lasting_values(config: Any) -> dict[str, Any]:
    """A config's fields without those that `save_pretrained` writes into it from the model."""
    values, written = config.to_dict(), ("architectures", "dtype", "nsa")
    return {name: value for name, value in values.items() if name not in written}


def _swap(
    model: PreTrainedModel,
    sparse_class: type[PreTrainedModel],
    sparse_config: Any,
    replacements: dict[int, NSAAttention],
) -> None:
    """The only place that changes a model, and nothing in it can fail half-way."""
    if "_nsa_dense" not in model.__dict__:
        dense_config = model.config
        # Built sparse: the dense config exists only as what unpatching would give.
        if sparse_class is type(model):
            dense_config = _convert_config(model.config, DENSE_CLASS[sparse_class].config_class)
            del dense_config.nsa
            dense_config._attn_implementation = "sdpa"  # transformers' default for these models
        model._nsa_dense = _DenseState(dense_config, _lasting_values(sparse_config))  # type: ignore[assignment]
        attach(model.base_model)
    slots = _slots(model)
    for i, replacement in replacements.items():
        now = getattr(*slots[i])
        if isinstance(now, NSAAttention):
            _update(now, replacement)  # the module stays, with any hooks on it
        else:
            setattr(*slots[i], replacement)
    _rebind_config(model, model.config, sparse_config)
    model.__class__ = sparse_class
    sparse_config.belong_to(model)
    sparse_config.nsa = describe(model)


def _rebind_config(model: PreTrainedModel, old: Any, new: Any) -> None:
    """Every module that refers to the old config object gets the new one;
    the old one itself is not changed.

    A larger model that contains this one, such as a Llava, does not know of it,
    and would write a file that loads dense. Its config becomes a copy with the new one inside.
    """
    if old is new:
        return
    for whole in _models_around(model):  # the largest first: its parts share its config
        for key in whole.config.sub_configs:
            if getattr(whole.config, key, None) is old:
                outer = copy.copy(whole.config)
                setattr(outer, key, new)
                _replace_config(whole, whole.config, outer)
        _replace_config(whole, old, new)


def _models_around(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that contain this one, the largest first, and itself.

    Nothing in PyTorch leads from a module to what contains it, so the garbage collector is
    asked, which does not know of objects that were frozen. A model whose constructor raised has
    no `_modules`.
    """
    others = [x for x in gc.get_objects() if issubclass(type(x), PreTrainedModel)]
    others = [x for x in others if "_modules" in x.__dict__]
    found = [x for x in others if x is not model and any(module is model for module in x.modules())]
    return [*sorted(found, key=lambda x: -len(list(x.modules()))), model]


def _rename(model: PreTrainedModel, changed_by: str | None) -> None:
    """Says in `name_or_path` of the model, its parts and the models around it that they are not
    what is there, or are again.
    """
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    for module in (*parts, *_models_around(model)):
        name = (module.name_or_path or "").partition(CHANGED)[0]
        if name and changed_by:
            name += f"{CHANGED}{changed_by}{HOW_TO_LOAD}"
        module.name_or_path = name


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


def _count_new(attentions: Iterable[NSAAttention]) -> int:
    parts = (getattr(attention, part) for attention in attentions for part in PARTS)
    return sum(_numel(p) for part in parts for p in part.parameters())


def _count(model: PreTrainedModel) -> int:
    """`num_parameters()`, which knows of packed weights, and what ZeRO-3 holds elsewhere."""
    return model.num_parameters() + sum(_numel(p) - p.numel() for p in model.parameters())


def _numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter: DeepSpeed's ZeRO-3 leaves an empty tensor in its place until its
    module runs.
    """
    return getattr(parameter, "ds_numel", parameter.numel())


def _ranges(indices: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return ", ".join(texts) or "none"
