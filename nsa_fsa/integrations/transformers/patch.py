"""Swapping Native Sparse Attention into a transformers model, and back out."""

import copy
import gc
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.attention import (
    ATTENTION_NAME,
    NSAAttention,
    sparse_attention_class,
)
from nsa_fsa.integrations.transformers.decoder import attach, detach
from nsa_fsa.integrations.transformers.layers import (
    Layer,
    attention_layers,
    explain_model,
    with_function,
)
from nsa_fsa.integrations.transformers.models import dense_class_of, sparse_class
from nsa_fsa.integrations.transformers.parts import Parts, make_parts, mark_as_initialized
from nsa_fsa.integrations.transformers.report import PatchReport, count, count_parts

# The settings of layers, and the modules that they decide on.
from nsa_fsa.integrations.transformers.settings import (
    COMPRESSORS,
    check_possible,
    describe,
    resolve,
    settings_by_layer,
    settings_of,
    sparse_layers,
)
from nsa_fsa.modules.branches import PARTS
from nsa_fsa.modules.compression import Compressor
from nsa_fsa.modules.gating import BranchGate
from nsa_fsa.ops.compression.operator import POOL_BACKENDS

Settings: TypeAlias = NSAConfig | Mapping[str, Any] | str | os.PathLike[str]
# What follows the `name_or_path` of a model that is no longer what is there. PEFT writes it into
# adapters as their base model, and whatever loads that raises an error with this text.
CHANGED = ", changed by "
HOW_TO_LOAD = ": load and change it alike, then PeftModel.from_pretrained(model, adapter)"
# What transformers' configs call the dropout of attention weights.
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
# Wrappers that keep a list of the parameters they found, and would miss those that go.
KEEPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}


@dataclass
class _DenseState:
    """What `unpatch_model` needs to know of a model besides what its attention modules keep."""

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
    """Replaces the attention of one model of transformers by Native Sparse Attention, in place.

    Its projections, norms and rotation are kept; gates and compressors are added. The instance
    becomes a `NSALlamaForCausalLM` (and so on), so that `save_pretrained` writes a checkpoint that
    loads sparse or not at all. No other model changes, not even one made from the same config
    object, but that a larger model around this one gets a config that says so.

    An adapter that PEFT saves names its base model by `name_or_path`, which says from now on that
    the checkpoint there was changed: `AutoPeftModelForCausalLM` refuses it, and
    `PeftModel.from_pretrained(model, adapter)` wants a model that was patched alike. PEFT cannot
    compare vocabularies then, and warns: save a resized one with `save_embedding_layers=True`. To
    have an adapter that loads by itself, save the patched model, and train the adapter on what
    `AutoModelForCausalLM.from_pretrained` gives of that.

    A patched model may be patched again: layers that are still dense become sparse, and layers with
    other settings change to them, keeping the gates and compressors that still fit.

    Args:
        model: any model of transformers with a decoder; `explain_model` says which of its layers
            can become sparse. Those that are no full attention stay as they are.
        config: the NSA settings: an `NSAConfig`, a preset's name, the path of a YAML file, or a
            dict of fields that differ from the preset's; or such settings for single layers,
            `{0: ..., 5: ...}`. Default: the preset, or what the layer has if it is patched.
        preset: "fsa-64x16" (default), "fsa-128x8" or "tiny".
        layers: index or indices of the layers to patch; negative ones count from the end.
            Default: all with full attention; of a patched model, those that are patched.
        dry_run: only report what would change.
        compressor_k, compressor_v: makes a layer's own phi from its `NSAConfig`, see
            `NativeSparseAttention`. It is moved to the device and dtype of the layer's projections.
            No file holds such a class, so `from_pretrained` wants it again.
        verbose: print the report.
        overrides: fields of `NSAConfig`, which win over `config` and `preset`: `window_size=64`.

    Returns:
        The report.

    Raises:
        TypeError: for a model without an attention that can become sparse, or a wrapper around one.
        ValueError: for settings that do not fit the model. The model is untouched then.
    """
    found = _layers_of(model)
    patched = "_nsa_dense" in model.__dict__
    patched_class = type(model) if patched else sparse_class(type(model))
    own = {"compressor_k": compressor_k, "compressor_v": compressor_v}
    for name, make in own.items():
        if make is not None and (not callable(make) or isinstance(make, nn.Module)):
            raise ValueError(
                f"{name} is a {type(make).__name__}; it must be a class or a function that "
                f"makes a layer's own nn.Module from its NSAConfig. Fix: {name}=lambda config: ..."
            )
    settings = settings_by_layer(model, found, config, preset, layers, overrides)
    _check_model(model)
    made, anew = make_parts(model, found, settings, dict.fromkeys(settings, own))

    now = sparse_layers(model)
    configs = {i: layer.nsa_config for i, layer in now.items()}
    configs = dict(sorted({**configs, **settings}.items()))
    num_layers = model.config.get_text_config().num_hidden_layers
    new_parameters = count_parts({**now, **made}.values())

    report = PatchReport(
        model_class=type(model).__name__,
        patched_class=patched_class.__name__,
        config=configs[min(configs)],
        layers=tuple(configs),
        dense_layers=tuple(i for i in range(num_layers) if i not in configs),
        new_parameters=new_parameters,
        total_parameters=count(model) - count_parts(now.values()) + new_parameters,
        explanation=explain_model(model),
        modules_to_save=_modules_to_save(found),
        dry_run=dry_run,
        already_patched=not made,
        configs=configs,
        started_anew=anew,
    )

    if made and not dry_run:
        around = _models_around(model)
        _swap(model, around, found, patched_class, made, settings)
        _rename(model, around, changed_by="patch_model")

    if verbose:
        print(report)
    return report


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes `patch_model` in place: the model's attention, class and config are bit for bit again
    what they were.

    Projections that were trained meanwhile keep their new values, and so does a config that was
    changed (by `resize_token_embeddings`, say); gates and compressors are dropped. A patched model
    inside another (PEFT, torch.compile, DataParallel, a Llava) is unpatched there. Does nothing to
    a model that is not patched.

    Returns:
        The model.

    Raises:
        TypeError: for a patched model in a wrapper that keeps account of its parameters (DDP,
            FSDP), or in a subclass.
    """
    modules = list(model.modules())
    patched = [m for m in modules if "_nsa_dense" in m.__dict__ and dense_class_of(type(m))]
    kinds = dict.fromkeys(type(m) for m in modules)
    keepers = [x.__name__ for x in kinds if KEEPERS & {base.__name__ for base in x.__mro__}]
    if any(isinstance(m, NSAAttention) for m in modules) and (keepers or not patched):
        raise TypeError(
            f"{(keepers or [type(model).__name__])[0]} cannot be unpatched: "
            "it is not what patch_model made, or it keeps a list of the parameters that would go. "
            "Fix: call unpatch_model with the whole patched model, before wrapping it."
        )
    for inner in patched:
        _unpatch(inner)  # type: ignore[arg-type]
    return model


def _unpatch(model: PreTrainedModel) -> None:
    state: _DenseState = model._nsa_dense  # type: ignore[assignment]
    values, before = _lasting_values(model.config), state.sparse_values
    changed = [name for name, value in values.items() if before.get(name) != value]
    for attention in sparse_layers(model).values():
        for part in PARTS:
            delattr(attention, part)
        del attention._nsa_config
        attention.config = attention.__dict__.pop("_dense_config")
        _change_class(attention, attention.dense_class)
    for module in model.modules():
        detach(module)
    # The original may serve other models, too.
    dense_config = copy.deepcopy(state.config) if changed else state.config
    for name in changed:
        setattr(dense_config, name, copy.deepcopy(getattr(model.config, name)))
    around = _models_around(model)
    _rebind_config(around, model.config, dense_config)
    model.__class__ = dense_class_of(type(model))
    _rename(model, around, changed_by="unpatch_model" if state.of_sparse_checkpoint else None)
    del model._nsa_dense


def install(model: PreTrainedModel, own: Mapping[str, Any]) -> None:
    """Gives a newly constructed `nsa_*` model the attention that its config's `nsa` asks for."""
    settings = settings_of(model.config, model.config.nsa)
    own_of: dict[int, dict[str, Any]] = {i: {} for i in settings}
    changed = getattr(model.config, "is_changed", False)

    for name in COMPRESSORS:
        phis = {i: values.pop(name, None) for i, values in settings.items()}
        saved = [i for i, phi in phis.items() if phi is not None]
        if saved and own[name] is None:
            raise ValueError(
                f"the model was saved with a {name} of its own, "
                f"{phis[saved[0]]}, which no file holds. Fix: from_pretrained(..., {name}=...), "
                "a function that makes it from an NSAConfig, as in patch_model."
            )
        changed |= own[name] is not None and not saved
        for i in saved or settings:
            own_of[i][name] = own[name]

    layers = attention_layers(model)
    check_possible(layers, settings)
    configs = {i: resolve(layers[i], values) for i, values in settings.items()}
    _check_dropout(model)

    made, _ = make_parts(model, layers, configs, own_of)
    around = _models_around(model)
    _swap(model, around, layers, type(model), made, configs)
    if not torch.empty(0).is_meta:  # what has no memory yet is initialised later
        for parts in made.values():
            mark_as_initialized(parts)

    saved_as = getattr(model.config, "architectures", None) or ()
    of_sparse_checkpoint = any(name.startswith("NSA") for name in saved_as)
    model._nsa_dense.of_sparse_checkpoint = of_sparse_checkpoint  # type: ignore[union-attr]

    if torch.distributed.is_available():
        from nsa_fsa.integrations.transformers.tensor_parallel import extend_plan

        extend_plan(model)
    if changed or not of_sparse_checkpoint:
        _rename(model, around, changed_by=type(model).__name__)


def _layers_of(model: Any) -> dict[int, Layer]:
    if isinstance(model, PreTrainedModel) and (found := attention_layers(model)):
        return found
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inside = [type(m).__name__ for m in modules if isinstance(m, PreTrainedModel)]
    fix = "patch a model of transformers, or register_attention(...) your own class of attention"
    if inside and not isinstance(model, PreTrainedModel):
        fix = f"patch the {inside[0]} inside it before wrapping, and before get_peft_model"
    raise TypeError(
        f"{type(model).__name__} cannot be patched: it is no model of transformers, or it has no "
        f"causal self-attention that calls transformers' attention interface. Fix: {fix}."
    )


def _modules_to_save(layers: dict[int, Layer]) -> tuple[str, ...]:
    """A mixture of experts has a "gate" of its own, so the attention's name comes before ours."""
    names = (layer.name.rpartition(".")[2] for layer in layers.values())
    return (*dict.fromkeys(f"{name}.gate" for name in names), "compress_k", "compress_v")


def _check_model(model: PreTrainedModel) -> None:
    """Raises ValueError for what no model with NSA layers can be."""
    distributed = getattr(model.config, "distributed_config", None)
    tp_size = getattr(distributed, "tp_size", None) or getattr(model, "_tp_size", None) or 1
    if tp_size > 1 or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "the model is tensor-parallel (tp_size) or sharded already, and the new parameters "
            "would not be. Fix: patch_model before fully_shard; for tensor parallelism patch_model "
            "and save_pretrained, and load that with DistributedConfig(tp_size=...)."
        )
    _check_dropout(model)


def _check_dropout(model: PreTrainedModel) -> None:
    """Raises ValueError for a dropout of attention weights."""
    text = model.config.get_text_config()
    for name in DROPOUTS:
        if value := getattr(text, name, 0.0):
            raise ValueError(
                f"{name}={value} is not available in NSA: it must be 0. "
                f"Fix: model.config.{name} = 0.0, before the model is built."
            )


def _convert_config(config: Any, config_class: Any) -> Any:
    """A copy of a model config as another class of the same family."""
    converted = config_class.__new__(config_class)
    # What belongs to other models, such as the text model inside, keeps its own config.
    memo = {id(x): x for key in config.sub_configs if (x := getattr(config, key, None)) is not None}
    values = copy.deepcopy(config, memo).__dict__
    attention = values.pop("_attn_implementation_internal", None)  # no attribute of a sparse one
    values.pop("model_type", None)  # a config read from a file has it as an attribute of its own
    converted.__dict__.update(values)
    converted._attn_implementation_internal = getattr(config, "dense_attention", attention)
    return converted


def _name_dense_attention(model: PreTrainedModel, config: Any) -> None:
    """Layers left dense need a function of their own, also where the model's config named ours."""
    if config.dense_attention is None:
        found = model._check_and_adjust_attn_implementation(None, is_init_check=True)
        config._attn_implementation_internal = found


def _lasting_values(config: Any) -> dict[str, Any]:
    """A config's fields without those that `save_pretrained` writes into it from the model."""
    values, written = config.to_dict(), ("architectures", "dtype", "nsa")
    return {name: value for name, value in values.items() if name not in written}


def _swap(
    model: PreTrainedModel,
    around: list[PreTrainedModel],
    layers: dict[int, Layer],
    patched_class: Any,
    made: Mapping[int, Parts],
    settings: Mapping[int, NSAConfig],
) -> None:
    """The only place that changes a model, and nothing in it can fail half-way."""
    dense_config: Any = model.config
    sparse_config: Any = model.config

    if "_nsa_dense" not in model.__dict__:
        if patched_class is type(model):  # built sparse
            dense_class = dense_class_of(patched_class)
            dense_config = _convert_config(sparse_config, dense_class.config_class)
            del dense_config.nsa
        else:
            sparse_config = _convert_config(dense_config, patched_class.config_class)
            _name_dense_attention(model, sparse_config)
        model._nsa_dense = _DenseState(  # type: ignore[assignment]
            dense_config, _lasting_values(sparse_config)
        )

    _rebind_config(around, model.config, sparse_config)
    for i, parts in made.items():
        attention = layers[i].module
        for part in PARTS:
            setattr(attention, part, getattr(parts, part))
        attention._nsa_config = settings[i]
        if hasattr(attention, "attention_dropout"):  # 0 in the config, which may have changed
            attention.attention_dropout = 0.0
        if not isinstance(attention, NSAAttention):
            own_class: Any = type(attention)
            _change_class(attention, sparse_attention_class(own_class))
            attention._dense_config = attention.config
            attention.config = with_function(attention.config, ATTENTION_NAME)
        _update(attention, settings[i])

    for decoder in {x.decoder for x in layers.values() if isinstance(x.module, NSAAttention)}:
        attach(decoder, tuple(i for i, x in layers.items() if x.decoder is decoder))

    model.__class__ = patched_class
    sparse_config.belong_to(model)
    sparse_config.nsa = describe(model)


def _change_class(module: Any, cls: Any) -> None:
    """Also where accelerate has put a forward of its own around the old class's."""
    old = module.__dict__.get("_old_forward")
    if isinstance(old, types.MethodType) and old.__self__ is module:
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module)
    module.__class__ = cls


def _update(attention: NSAAttention, c: NSAConfig) -> None:
    """Gives the parts of a layer that were kept the settings of which they have copies."""
    for part in PARTS:
        for module in getattr(attention, part).modules():
            if isinstance(module, BranchGate):
                module.init = c.gate_init
            elif isinstance(module, Compressor):
                module.kernel_size, module.kernel_stride = c.kernel_size, c.kernel_stride
                module.backend = POOL_BACKENDS.or_auto(c.backend)


def _rebind_config(around: list[PreTrainedModel], old: Any, new: Any) -> None:
    """Gives every module of these models that refers to the old config object the new one.

    A larger model that contains this one, such as a Llava, does not know of it, and would write a
    file that loads dense: its config becomes a copy with the new one inside.
    """
    if old is new:
        return
    for whole in around:  # the largest first: its parts share its config
        for key in whole.config.sub_configs:
            if getattr(whole.config, key, None) is old:
                outer = copy.copy(whole.config)
                setattr(outer, key, new)
                _replace_config(whole, whole.config, outer)
        _replace_config(whole, old, new)


def _models_around(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that contain this one, the largest first, and itself.

    Nothing in PyTorch leads from a module to what contains it, so the garbage collector is asked,
    which knows some 100,000 objects: their few types first. A model whose constructor raised has no
    `_modules`.
    """
    known = gc.get_objects()
    types_of_known = {id(x): x for x in map(type, known)}
    classes = {i for i, x in types_of_known.items() if issubclass(x, PreTrainedModel)}
    models = [x for x in known if id(type(x)) in classes and "_modules" in x.__dict__]
    wholes = [x for x in models if x is not model and any(part is model for part in x.modules())]
    return [*sorted(wholes, key=lambda x: -len(list(x.modules()))), model]


def _rename(model: PreTrainedModel, around: list[PreTrainedModel], changed_by: str | None) -> None:
    """Says in `name_or_path` of the model, and of those in and around it, what became of them."""
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    for module in (*parts, *around):
        name = (module.name_or_path or "").partition(CHANGED)[0]
        if name and changed_by:
            name += f"{CHANGED}{changed_by}{HOW_TO_LOAD}"
        module.name_or_path = name


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new
