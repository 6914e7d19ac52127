"""The NSA settings of each layer of a model, in the forms in which they are given and saved."""

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from nsa_fsa.config import PRESETS, NSAConfig, with_changes
from nsa_fsa.integrations.transformers.attention import NSAAttention
from nsa_fsa.integrations.transformers.layers import (
    SIZES,
    Layer,
    check_rotation,
    explain_model,
    sizes_of,
)

COMPRESSORS = ("compressor_k", "compressor_v")
# What a layer made of a dense one leaves to that: its projections, norms and rotation.
LEFT_TO_DENSE: dict[str, Any] = dict(
    rope_parameters=None,
    max_position_embeddings=131072,
    qk_norm=False,
    qk_norm_eps=1e-6,
    qkv_bias=False,
    o_bias=False,
)


def names_layers(key: Any) -> bool:
    """Whether a key of a dict names layers, not a setting; JSON has the text of an index."""
    return not isinstance(key, str) or key.removeprefix("-").isdecimal()


def check_nsa(nsa: Any) -> None:
    """Raises ValueError for what a config's field `nsa` cannot be."""
    if nsa is None or (isinstance(nsa, Mapping) and not any(map(names_layers, nsa))):
        return
    per_layer = '{1: {"window_size": 64}}'
    fix = f'{{"preset": "fsa-64x16", "layers": [0, 1], "per_layer": {per_layer}}}, for example'
    if isinstance(nsa, str) and nsa in PRESETS:
        fix = f'{{"preset": "{nsa}"}}'
    elif isinstance(nsa, NSAConfig):
        fix = "config.to_dict()"
    raise ValueError(
        f"nsa={nsa!r} is not allowed: it must be a dict of NSAConfig's fields, with "
        f"`layers` and `per_layer` for what is not the same in all layers, or None. Fix: nsa={fix}."
    )


def settings_of(config: Any, nsa: Any) -> dict[int, dict[str, Any]]:
    """What an `nsa` says of each NSA layer of a model with this config, by index from 0: fields of
    NSAConfig, those of presets included, and the names of compressors of its own.
    """
    check_nsa(nsa)
    # The config of a checkpoint alone names an architecture.
    of_dense = dict(gate_init="dense", compress_rope="before")
    new = dict(gate_init="balanced", compress_rope="after")
    start = of_dense if getattr(config, "architectures", None) else new
    common = with_changes(start, nsa or {})
    text = config.get_text_config()
    differ = _by_layer(common.pop("per_layer", None), text.num_hidden_layers)
    listed, kinds = common.pop("layers", None), getattr(text, "layer_types", None)
    if listed is None and kinds:
        listed = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    layers = indices_of(listed, text.num_hidden_layers)
    if dense := sorted(differ.keys() - set(layers)):
        raise ValueError(
            f"per_layer names layers {dense}, which are not among nsa's layers={layers}. "
            "Fix: add or drop them."
        )
    settings = {i: with_changes(common, differ.get(i, {})) for i in layers}
    return {i: {k: x for k, x in y.items() if k != "preset"} for i, y in settings.items()}


def changed_nsa(
    saved: Mapping[str, Any], given: Mapping[str, Any], saved_count: int, count: int
) -> dict[str, Any]:
    """The `nsa` of a file with changes, in every layer or with `per_layer` in one.

    A preset stands for its fields. `layers` says anew which layers have NSA; what the file says of
    others is dropped. The counts are of the layers in the file and now.
    """
    nsa = with_changes(saved, given)
    if saved_per_layer := _by_layer(saved.get("per_layer"), saved_count):
        named = {"preset", *with_changes({}, given)}
        layers = indices_of(nsa.get("layers"), count)
        nsa["per_layer"] = per_layer = {
            i: {key: x for key, x in with_changes({}, values).items() if key not in named}
            for i, values in saved_per_layer.items()
            if i in layers
        }
        for i, values in _by_layer(given.get("per_layer"), count).items():
            per_layer[i] = with_changes(per_layer.get(i, {}), values)
    return nsa


def _by_layer(per_layer: Any, count: int) -> dict[int, dict[str, Any]]:
    """What an `nsa` says of single layers, by index from 0."""
    per_layer = per_layer or {}
    is_dict = isinstance(per_layer, Mapping)
    if not is_dict or not all(isinstance(values, Mapping) for values in per_layer.values()):
        raise ValueError(
            f"per_layer={per_layer!r} is not allowed in the config's nsa: it must be a dict "
            "by layer of what differs there. Fix: per_layer={0: {'window_size': 64}}, for example."
        )
    return of_layers(per_layer, count)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """A patched model's layers as they are now, in the form of the config's field `nsa`."""
    layers: dict[int, dict[str, Any]] = {}
    for i, attention in sparse_layers(model).items():
        layers[i] = attention.nsa_config.to_dict()
        for name in COMPRESSORS:
            if (phi := own_phi(attention, name)) is not None:
                layers[i][name] = f"{type(phi).__module__}.{type(phi).__qualname__}"
    common = layers[min(layers)] if layers else {}
    per_layer = {}
    for i, values in layers.items():
        names = [x for x in {**common, **values} if values.get(x) != common.get(x)]
        if names:
            per_layer[str(i)] = {name: values.get(name) for name in names}
    whole = len(layers) == model.config.get_text_config().num_hidden_layers
    listed = None if whole else sorted(layers)
    return {**common, "layers": listed, **({"per_layer": per_layer} if per_layer else {})}


def sparse_layers(model: Any) -> dict[int, NSAAttention]:
    """The NSA layers of a model, by index."""
    found = (module for module in model.modules() if isinstance(module, NSAAttention))
    return dict(sorted((x.layer_idx or 0, x) for x in found))


def own_phi(attention: NSAAttention, name: str) -> Any:
    """A layer's phi for keys or values, if it is not of those that a config can name."""
    compressor: Any = getattr(attention, name.replace("compressor", "compress"))
    return getattr(compressor, "phi", compressor) if getattr(compressor, "is_own", True) else None


def indices_of(layers: Any, count: int) -> list[int]:
    """Layers as sorted indices from 0: of an int, or of whatever holds ints, tensors included."""
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
            f"layers={layers!r} must be an index or indices among 0 .. {count - 1}, or negative "
            "ones that count from the end, and at least one. "
            "Fix: name layers that the model has, or none at all to patch all of them."
        )
    return sorted({i % count for i in indices})


def of_layers(values: Any, count: int) -> dict[int, Any]:
    """What `{0: ..., (1, -1): ...}`, or "0" as JSON has it, says of layers, by index from 0."""
    found: dict[int, Any] = {}
    for key, value in values.items():
        if isinstance(key, str) and names_layers(key):
            key = int(key)
        for i in indices_of(key, count):
            if i in found:
                raise ValueError(f"layer {i} is named twice in {list(values)}. Fix: name it once.")
            found[i] = value
    return found


def settings_by_layer(
    model: PreTrainedModel,
    found: dict[int, Layer],
    config: Any,
    preset: str | None,
    layers: Any,
    overrides: Mapping[str, Any],
) -> dict[int, NSAConfig]:
    """The arguments of `patch_model`, as an NSAConfig for each layer that they name."""
    now = {i: attention.nsa_config for i, attention in sparse_layers(model).items()}
    count = model.config.get_text_config().num_hidden_layers
    if isinstance(config, Mapping) and not config:
        raise ValueError(
            "config={} is not allowed: it names no layer and no setting. Fix: leave it out for the "
            'preset or the settings that the model has, or name some: config={0: "tiny"}.'
        )
    if isinstance(config, Mapping) and all(map(names_layers, config)):
        if layers is not None:
            raise ValueError(
                f"layers={layers!r} and a config for each layer are both given. Fix: pass one."
            )
        given = of_layers(config, count)
    elif layers is not None:
        given = dict.fromkeys(indices_of(layers, count), config)
    else:
        full = [i for i, layer in found.items() if layer.is_full]
        given = dict.fromkeys(now or full, config)
    if not given:
        raise ValueError(f"no layer of the model can become sparse. {explain_model(model)}")
    check_possible(found, given)
    return {i: resolve(found[i], y, preset, overrides, now.get(i)) for i, y in given.items()}


def check_possible(found: dict[int, Layer], named: Iterable[int]) -> None:
    """Raises ValueError for layers that cannot become sparse."""
    possible = [i for i in found if not found[i].why_not]
    if refused := [i for i in named if i not in possible]:
        i = refused[0]
        why = found[i].why_not if i in found else "it is no causal self-attention that is known"
        fix = f"name others, as in layers={possible}" if possible else "none"
        raise ValueError(
            f"the attention of layers {refused} cannot become sparse: of layer {i}, {why}. "
            f"explain_model(model) says so of every module. Fix: {fix}."
        )


def resolve(
    layer: Layer,
    given: Any,
    preset: str | None = None,
    overrides: Any = None,
    now: NSAConfig | None = None,
) -> NSAConfig:
    """One layer's settings, in whichever form they were given, as an NSAConfig that fits it."""
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

    if unknown := [key for key in given or {} if names_layers(key)]:
        raise ValueError(
            f"config={given!r} has the keys {unknown} where names of settings must be. "
            "Fix: config={0: ..., 1: ...} for settings by layer, with nothing else beside them."
        )

    values = {"preset": preset, **(given or {}), **(overrides or {})}
    if now is not None and values["preset"] is None:
        values = {**now.to_dict(), **values}
    values["preset"] = values["preset"] or "fsa-64x16"

    fixed = sizes_of(layer.module)
    start = dict(gate_init="dense", compress_rope="before")
    config = NSAConfig.from_dict({**start, **fixed, **values})

    for name in (*SIZES, "scale"):
        fitting = fixed.get(name)
        if fitting is not None and getattr(config, name) != fitting:
            raise ValueError(
                f"NSAConfig.{name}={getattr(config, name)!r} does not fit layer "
                f"{layer.module.layer_idx} of this model, which was made for {fitting!r}. "
                f"Fix: leave {name} out of a dict, a file or the keywords; "
                "for an NSAConfig, NSAConfig.from_pretrained_config(model.config, ...)."
            )

    if config.kv_per_branch:
        raise ValueError(
            "NSAConfig.kv_per_branch=True needs projections of its own, and patching keeps the "
            "model's: it must be False. Fix: kv_per_branch=False, or a model of your own around "
            "NativeSparseAttention."
        )

    check_rotation(layer, config)
    return dataclasses.replace(config, **LEFT_TO_DENSE)
