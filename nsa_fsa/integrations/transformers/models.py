"""Registered model classes: `nsa_llama`, `nsa_qwen2` and `nsa_qwen3`.

They are the transformers classes with NSA attention installed at the end of the constructor. Their
own `model_type` makes `save_pretrained` / `from_pretrained` round-trip exactly, and makes a
transformers that does not know this package refuse the checkpoint instead of loading it dense. What
a class reads that was named outright, such as `LlamaForCausalLM`, is refused by its config: see
`_SparseConfig`.
"""

import copy
import functools
import operator
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.initialization import guard_torch_init_functions
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from nsa_fsa.config import PRESETS, NSAConfig, with_changes
from nsa_fsa.integrations.transformers.attention import (
    ATTENTION_NAME,
    NSAAttention,
    warn_of_frozen_gates,
)
from nsa_fsa.modules.compression import Compressor, LinearPhi, MLPPhi, PoolPhi
from nsa_fsa.modules.gating import BranchGate

# What a file holds as `layer_types`: transformers checks that field in every config, and names what
# it found. (A value of `attn_implementation` that nobody has registered would be refused, too, but
# `from_pretrained` takes that as an argument.)
_FOR_NSA_ONLY = [
    "sparse: import nsa_fsa.integrations.transformers, "
    "then load with AutoModelForCausalLM or AutoModel"
]


def _is_for_nsa_only(layer_types: Any) -> bool:
    """Whether a config's `layer_types` is that mark."""
    return str(layer_types).startswith("['sparse")


def is_index(key: Any) -> bool:
    """Whether a key is the text of a layer's index, as JSON has it."""
    return isinstance(key, str) and key.removeprefix("-").isdecimal()


def check_nsa(nsa: Any) -> None:
    """Raises ValueError for what a config's field `nsa` cannot be."""
    fix = '{"preset": "fsa-64x16"}, for example'
    if isinstance(nsa, str) and nsa in PRESETS:
        fix = f'{{"preset": "{nsa}"}}'
    elif isinstance(nsa, NSAConfig):
        fix = "config.to_dict()"
    elif isinstance(nsa, Mapping):
        unknown = [key for key in nsa if is_index(key) or not isinstance(key, str)]
        if not unknown:
            return
        per_layer = '{1: {"window_size": 64}}'
        fix = f'{{"preset": "fsa-64x16", "layers": [0, 1], "per_layer": {per_layer}}}, for example'
    elif nsa is None:
        return
    raise ValueError(
        f"nsa={nsa!r} is not allowed: it must be a dict of NSAConfig's fields, with "
        f"`layers` and `per_layer` for what is not the same in all layers, or None. Fix: nsa={fix}."
    )


class _SparseConfig:
    """Mixed in before a transformers config class: a file that no other class reads,
    and a field `nsa` that is a dict.

    `nsa` holds `NSAConfig`'s fields or a `preset`, `layers` (None: all) and `per_layer`,
    a dict by layer of what differs there.

    While a model has this config, `nsa` says what the layers of the model are whenever the config
    is written or copied, whoever does that, such as a larger model. A copy belongs to no model.
    """

    # Beside __dict__, which is compared, copied and written: the model,
    # and whether `nsa` is not what the file says.
    __slots__ = ("__dict__", "_model", "is_changed")
    is_changed: bool
    nsa: dict[str, Any] | None

    def belong_to(self, model: PreTrainedModel) -> None:
        """Makes `model` the one that `nsa` describes."""
        self._model = weakref.ref(model)

    def nsa_model(self) -> PreTrainedModel | None:
        """The model whose config this is, if there is one."""
        model = getattr(self, "_model", lambda: None)()
        return model if model is not None and model.config is self else None

    def _describe(self) -> None:
        from nsa_fsa.integrations.transformers.patch import describe

        if (model := self.nsa_model()) is not None:
            self.nsa = describe(model)

    def nsa_of_layer(self, layer: int | None = None) -> dict[str, Any]:
        """What `nsa` says of one layer, or of all of them where they are alike:
        see `NSAConfig.from_pretrained_config`.
        """
        from nsa_fsa.integrations.transformers.patch import COMPRESSORS, settings_of

        self._describe()
        settings = settings_of(self)
        first, count = min(settings), self.num_hidden_layers  # type: ignore[attr-defined]
        others = [i for i in settings if settings[i] != settings[first]]
        if layer is None and others:
            raise ValueError(
                f"layer=None is not allowed, as the layers {others} have other settings than layer "
                f"{first}: it must be one of {list(settings)}. Fix: layer={first}, for example."
            )
        if layer is not None and layer not in (*settings, *(i - count for i in settings)):
            raise ValueError(
                f"layer={layer!r} is not allowed: it must be the index of a layer with NSA, "
                f"one of {list(settings)}. Fix: layer={first}, for example."
            )
        of_layer = settings[first if layer is None else layer % count]
        return {name: value for name, value in of_layer.items() if name not in COMPRESSORS}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, where an argument takes the place of a field;
        `nsa` changes only the settings that it names.

        It changes them in every layer, or with `per_layer` in one, and a preset stands for its
        fields. `layers` says anew which layers have NSA; what the file says of others is dropped.
        """
        from nsa_fsa.integrations.transformers.patch import indices_of, of_layers, settings_of

        saved, given = config_dict.get("nsa"), kwargs.pop("nsa", None)
        if given is not None:
            check_nsa(given)
            nsa = with_changes(saved or {}, given)
            saved_per_layer = (saved or {}).get("per_layer") or {}
            per_layer = given.get("per_layer") or {}
            if saved_per_layer and isinstance(per_layer, Mapping):
                default = cls.num_hidden_layers  # type: ignore[attr-defined]
                saved_count: int = config_dict.get("num_hidden_layers", default)
                count: int = kwargs.get("num_hidden_layers", saved_count)
                named = {"preset", *with_changes({}, given)}
                merged: dict[int, dict[str, Any]] = {}
                for i, values in of_layers(saved_per_layer, saved_count).items():
                    if i in indices_of(nsa.get("layers"), count):
                        kept = with_changes({}, values).items()
                        merged[i] = {key: value for key, value in kept if key not in named}
                for i, values in of_layers(per_layer, count).items():
                    merged[i] = with_changes(merged.get(i, {}), values)
                nsa["per_layer"] = merged
            config_dict = {**config_dict, "nsa": nsa}
        made = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        if saved and given:
            config = made[0] if isinstance(made, tuple) else made  # return_unused_kwargs

            def explicit(nsa: dict[str, Any]) -> dict[int, dict[str, Any]]:
                config.nsa = nsa
                settings = settings_of(config).items()
                return {i: {**with_changes({}, x), "preset": None} for i, x in settings}

            # The file may name layers that there are no longer.
            fewer = "num_hidden_layers" in kwargs
            config.is_changed = fewer or explicit(saved) != explicit(nsa)
        return made

    def to_dict(self) -> dict[str, Any]:
        self._describe()
        return super().to_dict()  # type: ignore[misc]

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self._describe()
        return dict(self.__dict__), {"is_changed": getattr(self, "is_changed", False)}

    # Every model class gives its layers the attention of this name, and a stock one's refuse to run
    # (`dense_attention`): with another name they would run dense. Another is not refused here: a
    # larger model passes what it is told to all its parts.
    @property
    def _attn_implementation_internal(self) -> str:
        return ATTENTION_NAME

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        if value not in (None, ATTENTION_NAME):
            warnings.warn(
                f"attn_implementation={value!r} changes nothing in a model with NSA layers: "
                f'theirs is "{ATTENTION_NAME}", for dense layers beside them, too.',
                stacklevel=4,
            )

    def __post_init__(self, **kwargs: Any) -> None:
        check_nsa(self.nsa)
        if _is_for_nsa_only(kwargs.get("layer_types")):
            del kwargs["layer_types"]
        fields: dict[str, Any] = self.__dict__
        if _is_for_nsa_only(fields.get("layer_types")):  # Qwen has such a field
            # patch_model takes no others.
            fields["layer_types"] = ["full_attention"] * fields["num_hidden_layers"]
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written into a file."""
        return {**super().to_diff_dict(), "layer_types": _FOR_NSA_ONLY}  # type: ignore[misc]


class NSALlamaConfig(_SparseConfig, LlamaConfig):  # type: ignore[misc]
    """A Llama config with a field `nsa`: `NSAConfig`'s fields, `layers` (None: all)
    and `per_layer`, what differs there.
    """

    model_type = "nsa_llama"
    nsa: dict[str, Any] | None = None


class NSAQwen2Config(_SparseConfig, Qwen2Config):  # type: ignore[misc]
    """A Qwen2 config with a field `nsa`: `NSAConfig`'s fields, `layers` (None: all)
    and `per_layer`, what differs there.
    """

    model_type = "nsa_qwen2"
    nsa: dict[str, Any] | None = None


class NSAQwen3Config(_SparseConfig, Qwen3Config):  # type: ignore[misc]
    """A Qwen3 config with a field `nsa`: `NSAConfig`'s fields, `layers` (None: all)
    and `per_layer`, what differs there.
    """

    model_type = "nsa_qwen3"
    nsa: dict[str, Any] | None = None


class _NSAModel:
    """Mixed in before a transformers model class: installs NSA attention,
    and initialises what it adds.

    The config's `nsa` may hold any of `NSAConfig`'s fields and a `preset`; sizes come from the
    config itself. Gates start "balanced", or "dense" where the config names the architecture of a
    checkpoint. `from_pretrained(..., nsa=dict(...))` changes the settings that it names, in every
    layer, and keeps the others that the checkpoint has.

    Args:
        config: an `NSALlamaConfig` (and so on).
        compressor_k, compressor_v: as of `patch_model`; needed where the model was saved with such.
    """

    _supports_context_parallel = False  # sharding the sequence would cut blocks and windows
    _can_compile_fullgraph = False

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `generate` compiles decoding by itself: not here,
        where the cache counts its tokens on the host.
        """
        return False

    def __init__(
        self,
        config: Any,
        *args: Any,
        compressor_k: Callable[..., Any] | None = None,
        compressor_v: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(config, self.config_class):  # type: ignore[attr-defined]
            needed = self.config_class.__name__  # type: ignore[attr-defined]
            raise ValueError(
                f"{type(self).__name__} needs an {needed}, but got a {type(config).__name__}. "
                f"Fix: {needed}(..., nsa=...), or patch_model(model) with the dense model."
            )
        if config.nsa_model() is not None:  # and goes on saying what that one's layers are
            config = copy.deepcopy(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        from nsa_fsa.integrations.transformers.patch import install

        # `from_config` turns torch.nn.init off where DeepSpeed's ZeRO-3 is on.
        with guard_torch_init_functions():
            install(self, {"compressor_k": compressor_k, "compressor_v": compressor_v})  # type: ignore[arg-type]
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, NSAAttention):
                _mark_as_initialized(module)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refused: every layer has the attention that its config's `nsa` says."""
        if attn_implementation != ATTENTION_NAME:
            raise ValueError(
                "the attention implementation of a model with "
                f'NSA layers cannot become {attn_implementation!r}: it must be "{ATTENTION_NAME}", '
                "for its dense layers, too. Fix: leave it, or unpatch_model(model) first."
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, also where somebody has given the model another config object."""
        self.config.belong_to(self)  # type: ignore[attr-defined]
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __setstate__(self, state: Any) -> None:
        """A copy of the model has a copy of the config."""
        super().__setstate__(state)  # type: ignore[misc]
        self.config.belong_to(self)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Any:
        """As PyTorch's own; warns where gates are frozen while other parameters, such as adapters,
        are to be trained.
        """
        if mode:
            warn_of_frozen_gates(self.base_model)  # type: ignore[attr-defined]
        return super().train(mode)  # type: ignore[misc]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialises what NSA adds and no checkpoint brought, before transformers would do it as
        for any Linear.
        """
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, Compressor):
                _start(module.phi)
            is_ours = isinstance(module, (BranchGate, Compressor, LinearPhi, MLPPhi, PoolPhi))
            if is_ours and not _is_initialized(module):
                loaded = [p for p in module.parameters(recurse=False) if _is_initialized(p)]
                if len(loaded) < len(list(module.parameters(recurse=False))):
                    # A reset writes every parameter of the module.
                    values = [p.clone() for p in loaded]
                    module.reset_parameters()
                    for parameter, value in zip(loaded, values, strict=True):
                        parameter.copy_(value)
                module._is_hf_initialized = True
        super().initialize_weights()  # type: ignore[misc]


def _mark_as_initialized(attention: NSAAttention) -> None:
    """Keeps transformers from initialising what a layer adds as it does any Linear,
    unless it is made without memory.
    """
    if torch.empty(0).is_meta:
        return
    for part in (attention.gate, attention.compress_k, attention.compress_v):
        for module in part.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]


def make_phi(
    make: Callable[[NSAConfig], nn.Module], config: NSAConfig, **factory: Any
) -> nn.Module:
    """A compressor of the user's own, on the device and in the dtype of what is added beside it.

    In a model that is made without memory, as in `from_pretrained`, it keeps the values that it is
    made with, and which of its tensors are one: transformers puts unset memory in the place of what
    no checkpoint has, and places and casts the rest.
    """
    if not torch.empty(0).is_meta:
        phi = make(config)
        # What is none is refused where it is used.
        return phi.to(**factory) if isinstance(phi, nn.Module) else phi
    with torch.device("cpu"):
        phi = make(config)
    start: dict[int, tuple[list[str], torch.Tensor]] = {}
    for found in (phi.named_parameters, phi.named_buffers):
        for name, x in found(remove_duplicate=False):
            start.setdefault(id(x), ([], x.detach().clone()))[0].append(name)
    phi._nsa_start = list(start.values())  # type: ignore[assignment]
    return phi


def _start(phi: nn.Module) -> None:
    """Gives such a compressor the values that it was made with, where no checkpoint
    brought others.
    """
    start = phi.__dict__.pop("_nsa_start", None)
    if start is None:
        return
    for names, value in start:
        tensors = [operator.attrgetter(name)(phi) for name in names]
        if all(_is_initialized(x) for x in tensors):
            continue
        kept = next((x for x in tensors if _is_initialized(x)), None)
        if kept is None:
            kept = tensors[0].copy_(value)
        for name in names:
            holder, _, own_name = name.rpartition(".")
            setattr(phi.get_submodule(holder), own_name, kept)
    for module in phi.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def _is_initialized(x: nn.Module | torch.Tensor) -> bool:
    """Whether transformers marked it as loaded or initialised."""
    return getattr(x, "_is_hf_initialized", False)


class NSALlamaModel(_NSAModel, LlamaModel):
    config_class = NSALlamaConfig


class NSALlamaForCausalLM(_NSAModel, LlamaForCausalLM):
    config_class = NSALlamaConfig


class NSAQwen2Model(_NSAModel, Qwen2Model):
    config_class = NSAQwen2Config


class NSAQwen2ForCausalLM(_NSAModel, Qwen2ForCausalLM):
    config_class = NSAQwen2Config


class NSAQwen3Model(_NSAModel, Qwen3Model):
    config_class = NSAQwen3Config


class NSAQwen3ForCausalLM(_NSAModel, Qwen3ForCausalLM):
    config_class = NSAQwen3Config


SPARSE_CLASS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    LlamaModel: NSALlamaModel,
    LlamaForCausalLM: NSALlamaForCausalLM,
    Qwen2Model: NSAQwen2Model,
    Qwen2ForCausalLM: NSAQwen2ForCausalLM,
    Qwen3Model: NSAQwen3Model,
    Qwen3ForCausalLM: NSAQwen3ForCausalLM,
}
DENSE_CLASS = {sparse: dense for dense, sparse in SPARSE_CLASS.items()}

for _dense, _sparse in SPARSE_CLASS.items():
    _config: Any = _sparse.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _auto = AutoModelForCausalLM if _dense.__name__.endswith("ForCausalLM") else AutoModel
    _auto.register(_config, _sparse, exist_ok=True)
    # transformers notes in a constructor which outputs a class can record; patched instances never
    # ran that of their class. The registry's own `__setitem__` takes an instance.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(_sparse), _sparse._can_record_outputs)


def _read_by_any_class(from_json_file: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedConfig.from_json_file`, for this class itself: the Trainer reads the config of
    what it resumes from so, of whatever model, and the mark would be refused. It gets the config of
    the file's own class."""

    @functools.wraps(from_json_file)
    def read(cls: type[PreTrainedConfig], json_file: Any) -> Any:
        values = cls._dict_from_json_file(json_file)
        if cls is PreTrainedConfig and _is_for_nsa_only(values.get("layer_types")):
            return AutoConfig.for_model(**values)
        return from_json_file(cls, json_file)

    return read


_from_json_file: Any = PreTrainedConfig.from_json_file
PreTrainedConfig.from_json_file = classmethod(_read_by_any_class(_from_json_file.__func__))  # type: ignore


def supported_models() -> tuple[str, ...]:
    """Names of the transformers classes that `patch_model` can patch."""
    return tuple(cls.__name__ for cls in SPARSE_CLASS)
