"""Config and model classes of sparse models: "NSA" before the name of the dense class, and "nsa_"
before its `model_type`, for every family that transformers has. They are made when they are asked
for: by `patch_model`, by a checkpoint, or by name, as in `models.NSALlamaForCausalLM`.

They are the transformers classes with NSA attention installed at the end of the constructor. Their
own `model_type` lets checkpoints round-trip, and a transformers that does not know this package
refuse them. What a class reads that was named outright, such as `LlamaForCausalLM`, is refused by
its config: see `_SparseConfig`.
"""

import copy
import functools
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, conversion_mapping
from transformers.initialization import guard_torch_init_functions
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from nsa_fsa.decode.operator import MOST_NEW
from nsa_fsa.integrations.transformers.attention import ATTENTION_NAME, NSAAttention, new_of
from nsa_fsa.integrations.transformers.cache import room_of
from nsa_fsa.integrations.transformers.decoder import can_be_traced, warn_of_frozen_gates
from nsa_fsa.integrations.transformers.layers import attention_layers, sizes_in
from nsa_fsa.integrations.transformers.parts import start_parts
from nsa_fsa.integrations.transformers.settings import (
    COMPRESSORS,
    LEFT_TO_DENSE,
    changed_nsa,
    check_nsa,
    describe,
    settings_of,
)

PACKAGE = "nsa_fsa.integrations.transformers"
# What a file holds as `layer_types`: transformers checks that field in every config, and names what
# it found. (An unknown `attn_implementation` would be refused, too, but may be an argument.)
_FOR_NSA_ONLY = [f"sparse: import {PACKAGE}, then load with AutoModelForCausalLM or AutoModel"]
_KINDS = "dense_layer_types"  # what a file holds as `layer_types` otherwise
_REMOTE_FILE = "modeling_nsa"  # in a checkpoint, for tools that are given its path alone


def _is_for_nsa_only(layer_types: Any) -> bool:
    """Whether a config's `layer_types` is that mark."""
    return str(layer_types).startswith("['sparse")


class _SparseConfig:
    """Mixed in before a transformers config class: a file that no other class reads, and a field.

    `nsa` is a dict of `NSAConfig`'s fields or a `preset`, with `layers` (None: all) and
    `per_layer`, a dict by layer of what differs there. While a model has this config, `nsa` says
    what its layers are whenever the config is written or copied, whoever does that, such as a
    larger model. A copy belongs to no model.
    """

    # Beside __dict__, which is compared and written. is_changed: `nsa` is not what the file says.
    __slots__ = ("__dict__", "_dense_attention", "_model", "is_changed")
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
        if (model := self.nsa_model()) is not None:
            self.nsa = describe(model)

    def nsa_of_layer(self, layer: int | None = None) -> dict[str, Any]:
        """What `NSAConfig.from_pretrained_config` takes: of one layer, or of all if alike."""
        self._describe()
        settings = settings_of(self, self.nsa)
        text: Any = self.get_text_config()  # type: ignore[attr-defined]
        first, count = min(settings), text.num_hidden_layers
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
        values = settings[first if layer is None else layer % count]
        for name in COMPRESSORS:
            values.pop(name, None)
        return {**sizes_in(text), **values, **LEFT_TO_DENSE}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own, where an argument takes the place of a field;
        `nsa` changes only the settings that it names: see `changed_nsa`.
        """
        saved, given = config_dict.get("nsa"), kwargs.pop("nsa", None)
        check_nsa(given)
        made = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        if given is not None:
            config = made[0] if isinstance(made, tuple) else made  # return_unused_kwargs
            count = config.get_text_config().num_hidden_layers
            saved_count = config_dict.get("num_hidden_layers", count)
            config.nsa = changed_nsa(saved or {}, given, saved_count, count)
            # The file may name layers that there are no longer.
            if saved and given:
                config.is_changed = "num_hidden_layers" in kwargs or (
                    settings_of(config, saved) != settings_of(config, config.nsa)
                )
        return made

    def to_dict(self) -> dict[str, Any]:
        self._describe()
        return super().to_dict()  # type: ignore[misc]

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        self._describe()
        is_changed = getattr(self, "is_changed", False)
        return vars(self), dict(_dense_attention=self.dense_attention, is_changed=is_changed)

    # A stock class that is given this config would build dense layers: until a sparse model has it,
    # they are told the attention function of sparse ones, which refuses them.
    @property
    def _attn_implementation_internal(self) -> str | None:
        return ATTENTION_NAME if self.nsa_model() is None else self.dense_attention

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        if value != ATTENTION_NAME:
            self._dense_attention = value

    @property
    def dense_attention(self) -> str | None:
        """The attention function of layers left dense; None: the model's default."""
        return getattr(self, "_dense_attention", None)

    def __post_init__(self, **kwargs: Any) -> None:
        check_nsa(self.nsa)
        # A file's is for those who do not know the class yet. Empty, because TRL asks for it.
        kwargs["auto_map"] = {}
        for fields in (kwargs, self.__dict__, *self.__dict__.values()):
            if isinstance(fields, dict) and _is_for_nsa_only(fields.get("layer_types")):
                del fields["layer_types"]
                if (kinds := kwargs.pop(_KINDS, None) or fields.pop(_KINDS, None)) is not None:
                    fields["layer_types"] = kinds
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if (text := self.get_text_config()) is not self:  # type: ignore[attr-defined]
            text._attn_implementation_internal = ATTENTION_NAME

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written into a file."""
        values = super().to_diff_dict()  # type: ignore[misc]
        values.pop("auto_map", None)
        if _can_be_imported(type(self)):
            made = {"AutoConfig": type(self).__name__}
            for cls in values.get("architectures") or ():
                made |= dict.fromkeys(autos_of(type(self), cls), cls)
            values["auto_map"] = {auto: f"{_REMOTE_FILE}.{name}" for auto, name in made.items()}
        text = self.get_text_config()  # type: ignore[attr-defined]
        parts = [
            key
            for key in self.sub_configs  # type: ignore[attr-defined]
            if getattr(self, key, None) is text
        ]
        marked = values[parts[0]] if parts else values
        if marked.get("layer_types"):
            marked[_KINDS] = marked["layer_types"]
        marked["layer_types"] = _FOR_NSA_ONLY
        return values


class _NSAModel:
    """Mixed in before a transformers model class: installs NSA attention, and starts what it adds.

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

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], *args: Any) -> bool:
        """Whether `generate` compiles decoding by itself, which it asks before every run."""
        valid = super()._valid_auto_compile_criteria(model_kwargs, *args)  # type: ignore[misc]
        if (kept := model_kwargs.get("past_key_values", model_kwargs.get("cache"))) is not None:
            _traced_over.pop(kept, None)
        return valid and self._step_is_traced()

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What `generate` runs over a static cache: compiled for a few new tokens. A chunk of a
        prompt runs as it is, for otherwise every chunk would be compiled."""
        compiled = super().get_compiled_call(compile_config)  # type: ignore[misc]

        def call(*args: Any, **kwargs: Any) -> Any:
            new = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            few = all(x.shape[1] <= MOST_NEW for x in new if isinstance(x, Tensor))
            return (compiled if few else self)(*args, **kwargs)  # type: ignore[operator]

        return call

    def create_masks_for_generate(self, attention_mask: Any = None, **kwargs: Any) -> Any:
        """The 2D mask, for a step that is compiled as wide as the cache: what is made of it is made
        in the forward. For more tokens it ends with them, as linear attention reads it."""
        kept = kwargs.get("past_key_values", kwargs.get("cache"))
        room = room_of(kept)
        of_one_token = kwargs["inputs_embeds"].shape[1] == 1
        given = room and of_one_token and isinstance(attention_mask, Tensor)
        if given and self._step_is_traced_over(kept):
            return nn.functional.pad(attention_mask, (0, room - attention_mask.shape[1]))
        return attention_mask

    def _step_is_traced(self) -> bool:
        """Whether a compiled step is right for every length."""
        layers = attention_layers(self).values()  # type: ignore[arg-type]
        decoders = {x.decoder for x in layers if isinstance(x.module, NSAAttention)}
        return all(map(can_be_traced, decoders))

    def _step_is_traced_over(self, kept: Any) -> bool:
        """The same, looked for once for a cache and a run of `generate`: every token asks, and to
        walk through the modules of 32 layers takes 2.3 ms of the host."""
        if kept not in _traced_over:
            _traced_over[kept] = self._step_is_traced()
        return _traced_over[kept]

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing: a checkpoint holds a line that imports this package, and not its files."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class was made, and is made again wherever a copy is unpickled."""
        return new_of, (sparse_class, dense_class_of(type(self))), self.__dict__

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
        text = config.get_text_config()
        if text is not config and text._attn_implementation_internal == ATTENTION_NAME:
            text._attn_implementation_internal = None

        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        config._attn_implementation_internal = (
            # transformers says what None stands for, and refuses what the class does not support.
            self._check_and_adjust_attn_implementation(  # type: ignore[attr-defined]
                config.dense_attention, is_init_check=True
            )
        )
        from nsa_fsa.integrations.transformers.patch import install

        own: dict[str, Any] = dict(compressor_k=compressor_k, compressor_v=compressor_v)
        with guard_torch_init_functions():  # which are off in `from_config` with ZeRO-3
            install(self, own)  # type: ignore[arg-type]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, also where somebody has given the model another config object."""
        self.config.belong_to(self)  # type: ignore[attr-defined]
        result = super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        folder = Path(kwargs.get("save_directory") or args[0])
        if folder.is_dir() and kwargs.get("is_main_process", True):
            self._write_import(folder)
        return result

    def _write_import(self, folder: Path) -> None:
        """The file that lets other tools load a checkpoint which are given its path alone."""
        kinds = (type(self.config), type(self))  # type: ignore[attr-defined]
        names = [x.__name__ for x in kinds if _can_be_imported(x)]
        if _can_be_imported(kinds[0]):
            line = f"from {PACKAGE} import {', '.join(names)}\n"
            (folder / f"{_REMOTE_FILE}.py").write_text(line, encoding="utf-8")
            return
        dense = [dense_class_of(x).__name__ for x in kinds]
        warnings.warn(
            f"{dense[1]} is no class of transformers, so the checkpoint loads only after "
            f"AutoConfig.register(..., {dense[0]}), AutoModelForCausalLM.register({dense[0]}, "
            f"{dense[1]}) and import {PACKAGE}.",
            stacklevel=3,
        )

    def __setstate__(self, state: Any) -> None:
        """A copy of the model has a copy of the config."""
        super().__setstate__(state)  # type: ignore[misc]
        self.config.belong_to(self)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Any:
        """As PyTorch's own; warns where gates are frozen while other parameters train."""
        if mode:
            warn_of_frozen_gates(self.base_model)  # type: ignore[attr-defined]
        return super().train(mode)  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """Starts the parts of layers before transformers would, as it does any Linear."""
        start_parts(self)  # type: ignore[arg-type]
        super().initialize_weights()  # type: ignore[misc]


# Whether a step over a cache is compiled.
_traced_over: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


# --- The classes ----------------------------------------------------------------------------------


@functools.cache
def _make_config_class(dense: Any) -> Any:
    names = dict(
        __module__=PACKAGE,
        __annotations__={"nsa": dict[str, Any] | None},
        model_type=f"nsa_{dense.model_type}",
        nsa=None,
        dense_class=dense,
    )
    return type(f"NSA{dense.__name__}", (_SparseConfig, dense), names)


def sparse_config_class(dense: Any) -> Any:
    """The config class with a field `nsa`, registered where transformers looks for it."""
    made: Any = _make_config_class(dense)
    if _known(made) or not _known(dense):
        return made
    # First, because a model's class asks for its config's.
    AutoConfig.register(made.model_type, made, exist_ok=True)
    _convert_as(dense.model_type, made.model_type)
    for auto in _auto_classes():
        model = auto._model_mapping.get(dense, None)
        if isinstance(model, type) and getattr(model, "config_class", None) is dense:
            auto.register(made, sparse_class(model), exist_ok=True)
    return made


@functools.cache
def _make_sparse_class(dense: Any, config_class: Any) -> Any:
    names = dict(__module__=PACKAGE, dense_class=dense, config_class=config_class)
    made: Any = type(f"NSA{dense.__name__}", (_NSAModel, dense), names)
    # transformers notes in a constructor which outputs a class can record; patched instances never
    # ran that of their class. The registry's own `__setitem__` takes an instance.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(made), made._can_record_outputs)
    _convert_as(dense.__name__, made.__name__)
    return made


def sparse_class(dense: Any) -> Any:
    """The sparse class of a dense one."""
    return _make_sparse_class(dense, sparse_config_class(dense.config_class))


def dense_class_of(sparse: type) -> Any:
    """The dense class that a sparse class was made of, or None."""
    return vars(sparse).get("dense_class")


def _known(config_class: type[PreTrainedConfig]) -> bool:
    """Whether transformers finds this class by its `model_type`."""
    found = _made_when_asked.get(name := config_class.model_type)
    if found is None and name in CONFIG_MAPPING._mapping:
        found = CONFIG_MAPPING[name]
    return found is config_class


def _convert_as(known: str, name: str) -> None:
    """Checkpoints of `name` are converted on reading and writing as those of `known` are."""
    found = conversion_mapping.get_checkpoint_conversion_mapping(known)
    if found is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(name, found, overwrite=True)


def _auto_classes() -> list[Any]:
    """transformers' Auto classes of models."""
    classes = [x for x in vars(modeling_auto).values() if isinstance(x, type)]
    return [x for x in classes if getattr(x, "_model_mapping", None) is not None]


def autos_of(config_class: type, name: str) -> tuple[str, ...]:
    """The names of the Auto classes that make a class of this name of such a config."""
    autos = (x for x in _auto_classes() if config_class in x._model_mapping._extra_content)
    return tuple(x.__name__ for x in autos if x._model_mapping[config_class].__name__ == name)


def class_named(name: str) -> type:
    """`NSALlamaConfig`, `NSALlamaForCausalLM` and so on; raises AttributeError for another name."""
    dense = getattr(transformers, name[3:], None) if name.startswith("NSA") else None
    if isinstance(dense, type) and issubclass(dense, PreTrainedConfig):
        return sparse_config_class(dense)
    is_model = isinstance(dense, type) and issubclass(dense, PreTrainedModel)
    if is_model and isinstance(dense.config_class, type):  # type: ignore[union-attr]
        return sparse_class(dense)
    raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")


def _can_be_imported(cls: type) -> bool:
    """Whether a sparse class is one that this package gives by its name."""
    try:
        return class_named(cls.__name__) is cls
    except AttributeError:
        return False


class _MadeWhenAsked(dict):
    """What others have registered with AutoConfig, and every "nsa_*" that there can be."""

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if not isinstance(key, str) or not key.startswith("nsa_"):
            return False
        dense = key.removeprefix("nsa_")
        known = super().__contains__(dense) or dense in CONFIG_MAPPING._mapping
        return known and not dense.startswith("nsa_")

    def __missing__(self, key: str) -> type[PreTrainedConfig]:
        if key not in self:
            raise KeyError(key)
        return sparse_config_class(CONFIG_MAPPING[key.removeprefix("nsa_")])


_made_when_asked = CONFIG_MAPPING._extra_content = _MadeWhenAsked(CONFIG_MAPPING._extra_content)


_from_json_file: Any = PreTrainedConfig.from_json_file.__func__  # type: ignore[attr-defined]


@functools.wraps(_from_json_file)
def _read_by_any_class(cls: type[PreTrainedConfig], json_file: Any) -> Any:
    """For `PreTrainedConfig` itself, by which the Trainer reads the config of what it resumes from,
    whatever its class; it would refuse the mark.
    """
    values = cls._dict_from_json_file(json_file)
    if cls is PreTrainedConfig and _is_for_nsa_only(values.get("layer_types")):
        return AutoConfig.for_model(**values)
    return _from_json_file(cls, json_file)


PreTrainedConfig.from_json_file = classmethod(_read_by_any_class)  # type: ignore
