"""NSAConfig: what it refuses and how it says so, what it fills in,
and the forms it converts from and to.
"""

import copy
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nsa_fsa.config import COMPRESSION_KINDS, PRESETS, NSAConfig, preset
from nsa_fsa.modules.rotary import RotaryEmbedding
from tests.wrong_values import INF, NAN

CONFIGS = Path(__file__).parents[1] / "configs"
# GQA group 4: the common case.
LLAMA_LIKE = dict(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128)

LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
# head_dim 128
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 64, long_factor=[2.0] * 64)
LLAMA3_NUMBERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
ROPES = {
    "default": dict(rope_type="default", rope_theta=10000.0),
    "linear": dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
    "yarn": dict(
        rope_type="yarn", rope_theta=1000000.0, factor=4.0, original_max_position_embeddings=32768
    ),
    "llama3": LLAMA3_ROPE,
}


def without(mapping: dict, key: str) -> dict:
    return {k: v for k, v in mapping.items() if k != key}


# -- what is refused -------------------------------------------------------------------------------

# Every length and count.
SMALLEST = {
    "hidden_size": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 1, "v_head_dim": 1,
    "compress_hidden_size": 1, "kernel_size": 1, "kernel_stride": 1, "block_size": 1,
    "num_selected_blocks": 1, "window_size": 1, "max_position_embeddings": 1, "init_blocks": 0,
    "local_blocks": 0, "dense_below": 0,
}  # fmt: skip

# Not a positive finite number.
UNUSABLE = (0, -0.1, "0.1", NAN, INF, -INF, 10**400, True, [0.1], 1j, np.ones(2), torch.tensor(0.1))

# (overrides of LLAMA_LIKE, the field the message must name, a part of what it must say is allowed).
# The field's value in the message is taken from the overrides, or from LLAMA_LIKE and the defaults
# where another field broke the relation.
REFUSED = [
    # Too small, and not an int: `True` is an int to Python, and 64.0 would become a float length.
    *[
        ({name: value}, name, f"an int >= {minimum}")
        for name, minimum in SMALLEST.items()
        for value in (minimum - 1, -16, 64.0, "64", True, [64], np.ones(2), torch.tensor(64))
    ],
    *[({name: None}, name, "an int >= 1") for name in ("hidden_size", "num_heads", "block_size")],
    # Relations between fields.
    ({"num_kv_heads": 5}, "num_kv_heads", "a divisor of num_heads=32"),
    ({"num_kv_heads": 64}, "num_kv_heads", "a divisor of num_heads=32"),
    ({"num_heads": 24, "num_kv_heads": 7}, "num_kv_heads", "a divisor of num_heads=24"),
    (
        {"head_dim": None, "hidden_size": 4095},
        "head_dim",
        "hidden_size=4095 is not a multiple of num_heads=32",
    ),
    ({"kernel_size": 40}, "kernel_size", "a multiple of kernel_stride=16"),
    ({"kernel_size": 8}, "kernel_size", "a multiple of kernel_stride=16"),
    ({"kernel_stride": 12}, "kernel_size", "a multiple of kernel_stride=12"),
    ({"block_size": 72}, "block_size", "a multiple of kernel_stride=16"),
    ({"kernel_size": 48, "kernel_stride": 24}, "block_size", "a multiple of kernel_stride=24"),
    ({"kernel_size": 128}, "kernel_size", "at most block_size=64"),
    ({"block_size": 16}, "kernel_size", "at most block_size=16"),
    ({"num_selected_blocks": 2}, "num_selected_blocks", "at least init_blocks + local_blocks = 3"),
    ({"init_blocks": 15}, "num_selected_blocks", "at least init_blocks + local_blocks = 17"),
    ({"local_blocks": 16}, "num_selected_blocks", "at least init_blocks + local_blocks = 17"),
    # Numbers that are not lengths.
    *[({"scale": value}, "scale", "a positive finite number") for value in UNUSABLE],
    *[
        ({"qk_norm_eps": value}, "qk_norm_eps", "a positive finite number")
        for value in (None, *UNUSABLE)
    ],
    # Choices: a misspelt one is answered with the list.
    ({"compress_k": "max"}, "compress_k", "one of ('mean', 'weighted', 'linear', 'mlp', 'gated')"),
    ({"compress_v": "Mean"}, "compress_v", "one of ('mean', 'weighted', 'linear', 'mlp', 'gated')"),
    ({"compress_v": None}, "compress_v", "one of ('mean', 'weighted', 'linear', 'mlp', 'gated')"),
    ({"compress_rope": "none"}, "compress_rope", "one of ('after', 'before')"),
    ({"gate": "per_layer"}, "gate", "one of ('per_head', 'per_token')"),
    ({"gate_init": "zeros"}, "gate_init", "one of ('balanced', 'dense')"),
    *[
        ({name: value}, name, "True or False")
        for name in (
            "compress_position_embedding",
            "kv_per_branch",
            "qk_norm",
            "qkv_bias",
            "o_bias",
        )
        for value in (1, "true", None)
    ],
    *[
        (
            {"recompute": value},
            "recompute",
            "a tuple of branches among ('compressed', 'selected', 'sliding')",
        )
        for value in (None, "compressed", True, ("compressed", "window"), (1,))
    ],
    *[({"backend": value}, "backend", "a backend's name") for value in (None, "")],
    *[
        ({name: value}, name, "one of")
        for name in ("compress_k", "compress_v", "compress_rope", "gate", "gate_init")
        for value in (3, ["mean"], np.ones(2), torch.ones(2), {})
    ],
    # RoPE.
    *[
        ({"rope_parameters": {"rope_type": value}}, "rope_parameters", "a rope_type among")
        for value in (None, 3, [], np.ones(2))
    ],
    ({"rope_parameters": "default"}, "rope_parameters", "a dict or None"),
    (
        {"rope_parameters": {"rope_type": "lonrope", "rope_theta": 10000.0}},
        "rope_parameters",
        "a rope_type among",
    ),
    (
        {"rope_parameters": {"rope_type": "longrope"}},
        "rope_parameters",
        "('short_factor', 'long_factor') for 'longrope'",
    ),
    (
        {"rope_parameters": without(ROPES["linear"], "factor")},
        "rope_parameters",
        "the keys ('factor',) for 'linear'",
    ),
    (
        {"rope_parameters": without(ROPES["dynamic"], "factor")},
        "rope_parameters",
        "the keys ('factor',) for 'dynamic'",
    ),
    (
        {"rope_parameters": without(ROPES["yarn"], "factor")},
        "rope_parameters",
        "the keys ('factor',) for 'yarn'",
    ),
    *[
        (
            {"rope_parameters": without(LLAMA3_ROPE, key)},
            "rope_parameters",
            "'original_max_position_embeddings') for 'llama3'",
        )
        for key in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    ],
    (
        {"rope_parameters": {"factor": 2.0}},
        "rope_parameters",
        "a dict with a rope_type where it has ['factor']",
    ),
    (
        {"rope_parameters": {"rope_tehta": 500000.0}},
        "rope_parameters",
        "made of the keys ('rope_type', 'rope_theta'",
    ),
    *[
        (
            {"rope_parameters": {**ROPES["linear"], key: value}},
            "rope_parameters",
            "positive finite numbers",
        )
        for key, values in {
            "rope_theta": ("1e6", None, -1.0, 0),  # YAML reads 1e6, without a point, as text
            "factor": (None, "2", float("inf")),
            "partial_rotary_factor": (0, 2.0, "0.5"),
        }.items()
        for value in values
    ],
    *[
        ({"rope_parameters": {**rope, key: value}}, "rope_parameters", "positive finite numbers")
        for rope, keys in (
            (
                ROPES["yarn"],
                (
                    "original_max_position_embeddings",
                    "attention_factor",
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                ),
            ),
            (
                LLAMA3_ROPE,
                (
                    "original_max_position_embeddings",
                    "low_freq_factor",
                    "high_freq_factor",
                    "rope_theta",
                    "factor",
                ),
            ),
        )
        for key in keys
        for value in UNUSABLE
    ],
    *[
        (
            {"rope_parameters": {**LLAMA3_ROPE, key: None}},
            "rope_parameters",
            "positive finite numbers",
        )
        for key in LLAMA3_NUMBERS
    ],
    *[
        (
            {"rope_parameters": {**LONGROPE, key: value}},
            "rope_parameters",
            f"{key} holds rotary_dim // 2 = 64",
        )
        for key in ("short_factor", "long_factor")
        for value in (1.0, "1.0", None, [1.0] * 63, ["1.0"] * 64, [NAN] * 64)
    ],
    *[
        ({"rope_parameters": {**ROPES["yarn"], "truncate": value}}, "rope_parameters", "truncate")
        for value in ("false", 0)
    ],
    ({"head_dim": 65}, "head_dim", "even (in its rotated part)"),
    (
        {
            "head_dim": 20,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        "head_dim",
        "even (in its rotated part)",
    ),
]


def refused_id(case) -> str:
    overrides, name, _ = case
    return f"{name}:" + ",".join(f"{k}={v!r}" for k, v in overrides.items())[:60]


@pytest.mark.parametrize("case", REFUSED, ids=refused_id)
def test_refuses_and_says_field_value_allowed_and_fix(case):
    overrides, name, allowed = case
    values = {f.name: f.default for f in dataclasses.fields(NSAConfig)} | LLAMA_LIKE | overrides
    with pytest.raises(ValueError, match=r"^NSAConfig\.") as error:
        NSAConfig(**LLAMA_LIKE | overrides)
    expected = (
        rf"NSAConfig\.{name}={re.escape(repr(values[name]))} is not allowed: it must be .+\. "
        r"Fix: \S.+\."
    )
    assert re.fullmatch(expected, str(error.value)), f"{error.value}\ndoes not match\n{expected}"
    assert allowed in str(error.value).split(" it must be ")[1].split(". Fix: ")[0]


def test_every_field_has_a_value_that_is_refused():
    covered = {name for _, name, _ in REFUSED}
    missing = {f.name for f in dataclasses.fields(NSAConfig)} - covered
    assert not missing, f"add a case to REFUSED for each of {sorted(missing)}"


def test_missing_rope_keys_are_named_in_the_fix():
    rope = without(without(LLAMA3_ROPE, "factor"), "high_freq_factor")
    with pytest.raises(ValueError, match=re.escape("Fix: add ['factor', 'high_freq_factor'].")):
        NSAConfig(**LLAMA_LIKE, rope_parameters=rope)


# -- what is accepted: the edge of every relation above --------------------------------------------

ACCEPTED = [
    {},
    {"num_kv_heads": 32},
    {"num_kv_heads": 1},
    {"num_heads": 28, "num_kv_heads": 4, "head_dim": 80},
    {"hidden_size": 4095},  # head_dim is given, so nothing has to divide
    {"v_head_dim": 64},
    {"v_head_dim": 33},  # only queries and keys are rotated
    {"kernel_size": 64},
    {"kernel_size": 16},
    {"block_size": 32},
    {"num_selected_blocks": 3},
    {"init_blocks": 0, "local_blocks": 0, "num_selected_blocks": 1},
    {"window_size": 1},
    {"dense_below": 4096},
    {"scale": 1},
    {"compress_hidden_size": 1},
    {"head_dim": 65, "rope_parameters": None},
    {
        "head_dim": 20,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    {"rope_parameters": without(ROPES["yarn"], "original_max_position_embeddings")},
    {
        "rope_parameters": {
            **ROPES["yarn"],
            "attention_factor": None,
            "mscale": None,
            "truncate": False,
        }
    },
    {"rope_parameters": {**LONGROPE, "rope_theta": 10000.0}},
    {"recompute": ("selected",)},
    {"recompute": ("compressed", "selected", "sliding")},
    {"backend": "a-name-that-only-the-operators-know"},
    *[{"compress_k": kind, "compress_v": kind} for kind in COMPRESSION_KINDS],
    *[{"rope_parameters": rope} for rope in ROPES.values()],
    {"compress_rope": "before", "gate": "per_token", "gate_init": "dense"},
    {
        "compress_position_embedding": True,
        "kv_per_branch": True,
        "qk_norm": True,
        "qkv_bias": True,
        "o_bias": True,
    },
]


@pytest.mark.parametrize("overrides", ACCEPTED, ids=lambda overrides: str(overrides)[:60])
def test_accepts_and_keeps_values(overrides):
    config = NSAConfig(**LLAMA_LIKE | overrides)
    for name, value in (LLAMA_LIKE | overrides).items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "group"),
    [(32, 8, 4), (28, 4, 7), (16, 16, 1), (16, 1, 16), (40, 8, 5)],
)
def test_group_size(num_heads, num_kv_heads, group):
    config = NSAConfig(
        hidden_size=4480, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64
    )
    assert config.group_size == group
    assert isinstance(config.group_size, int)


def test_fills_in_head_dims_and_scale():
    config = NSAConfig(hidden_size=5120, num_heads=40, num_kv_heads=8)
    assert (config.head_dim, config.v_head_dim, config.compress_hidden_size) == (128, 128, 128)
    assert config.scale == 128**-0.5
    # What follows from head_dim follows from the one that was passed,
    # which need not be hidden_size / num_heads.
    config = NSAConfig(hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=128)
    assert (config.head_dim, config.v_head_dim, config.compress_hidden_size, config.scale) == (
        128,
        128,
        128,
        128**-0.5,
    )
    explicit = NSAConfig(**LLAMA_LIKE, v_head_dim=64, compress_hidden_size=256, scale=0.5)
    assert (explicit.v_head_dim, explicit.compress_hidden_size, explicit.scale) == (64, 256, 0.5)


def test_rope_parameters_are_completed_in_a_copy():
    given = {"type": "linear", "factor": 2.0}  # the form before transformers 5
    config = NSAConfig(**LLAMA_LIKE, rope_parameters=given)
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    assert given == {"type": "linear", "factor": 2.0}
    given["factor"] = 4.0
    assert config.rope_parameters["factor"] == 2.0
    assert NSAConfig(**LLAMA_LIKE, rope_parameters={}).rope_parameters == ROPES["default"]
    one, other = NSAConfig(**LLAMA_LIKE), NSAConfig(**LLAMA_LIKE)
    assert one.rope_parameters == ROPES["default"]
    assert one.rope_parameters is not other.rope_parameters


# -- a value: frozen, keyword-only, hashable -------------------------------------------------------


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(NSAConfig)])
def test_is_frozen(name):
    config = NSAConfig(**LLAMA_LIKE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(config, name)


def test_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        NSAConfig(4096, 32, 8)


def test_equal_configs_hash_alike_and_any_difference_counts():
    assert NSAConfig(**LLAMA_LIKE) == NSAConfig(**LLAMA_LIKE, v_head_dim=128, scale=128**-0.5)
    assert hash(NSAConfig(**LLAMA_LIKE)) == hash(
        NSAConfig(**LLAMA_LIKE, v_head_dim=128, scale=128**-0.5)
    )
    configs = {str(overrides): NSAConfig(**LLAMA_LIKE | overrides) for overrides in ACCEPTED}
    base = configs["{}"]
    equal = [overrides for overrides, config in configs.items() if config == base]
    # the defaults, left out and spelt out: nothing else may compare equal
    spelt_out = [
        {"compress_k": "weighted", "compress_v": "weighted"},
        {"rope_parameters": ROPES["default"]},
    ]
    assert equal == [str(overrides) for overrides in ({}, *spelt_out)]
    assert len(set(configs.values())) == len(ACCEPTED) - len(spelt_out)


# -- dict, JSON and YAML ---------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", ACCEPTED, ids=lambda overrides: str(overrides)[:60])
def test_round_trips(overrides, tmp_path):
    config = NSAConfig(**LLAMA_LIKE | overrides)
    values = config.to_dict()
    assert set(values) == {f.name for f in dataclasses.fields(NSAConfig)}
    assert NSAConfig.from_dict(values) == config
    assert json.loads(json.dumps(values)) == values
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert NSAConfig.from_yaml(path) == config
    assert NSAConfig.from_yaml(str(path)) == config


def test_to_dict_hands_out_copies():
    config = NSAConfig(**LLAMA_LIKE)
    config.to_dict()["rope_parameters"]["rope_theta"] = 1.0
    assert config == NSAConfig(**LLAMA_LIKE)


def test_from_dict_leaves_its_argument_alone():
    values = {"preset": "tiny", **LLAMA_LIKE}
    NSAConfig.from_dict(values)
    assert values == {"preset": "tiny", **LLAMA_LIKE}


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("num_kv_head", "num_kv_heads"),
        ("windowsize", "window_size"),
        ("rope_params", "rope_parameters"),
        ("gates", "gate"),
    ],
)
def test_unknown_key_suggests_the_nearest(key, suggestion):
    with pytest.raises(
        ValueError, match=f"^NSAConfig has no field '{key}'; did you mean '{suggestion}'\\?$"
    ):
        NSAConfig.from_dict({**LLAMA_LIKE, key: 1})


def test_unknown_key_that_resembles_nothing_lists_the_fields():
    with pytest.raises(
        ValueError,
        match=r"^NSAConfig has no field 'zzz'; known fields: hidden_size, num_heads, .*, backend",
    ):
        NSAConfig.from_dict({**LLAMA_LIKE, "zzz": 1})


def test_every_head_has_keys_of_its_own_unless_told_otherwise():
    config = NSAConfig(hidden_size=256, num_heads=4)
    assert (config.num_kv_heads, config.group_size) == (4, 1)
    assert (
        NSAConfig.from_dict({"preset": "tiny", "hidden_size": 256, "num_heads": 4}).num_kv_heads
        == 4
    )


@pytest.mark.parametrize("value", [None, [1, 2], "tiny", 3, [("hidden_size", 64)]], ids=str)
def test_from_dict_of_something_else(value):
    with pytest.raises(ValueError, match=r"must be a mapping of NSAConfig fields to values.*Fix"):
        NSAConfig.from_dict(value)


@pytest.mark.parametrize(
    "missing", [["hidden_size"], ["num_heads"], ["hidden_size", "num_heads"]], ids=str
)
def test_missing_keys_are_named(missing):
    values = {k: v for k, v in LLAMA_LIKE.items() if k not in missing}
    with pytest.raises(ValueError, match=re.escape(f"NSAConfig needs {missing}. Fix: add them")):
        NSAConfig.from_dict(values)


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n"], ids=["empty", "list", "text"])
def test_yaml_that_is_no_mapping_is_refused(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*must be a mapping"):
        NSAConfig.from_yaml(path)


# -- presets ---------------------------------------------------------------------------------------


# The FSA paper evaluates (block size, selected blocks) = (64, 16) and (128, 8), with NSA's windows:
# l = 32, s = 16, w = 512.
@pytest.mark.parametrize(
    ("name", "block_size", "num_selected_blocks", "kernel_size", "kernel_stride", "window_size"),
    [
        ("fsa-64x16", 64, 16, 32, 16, 512),
        ("fsa-128x8", 128, 8, 32, 16, 512),
        ("tiny", 16, 6, 16, 8, 32),
    ],
)
def test_presets(name, block_size, num_selected_blocks, kernel_size, kernel_stride, window_size):
    config = NSAConfig.from_dict({"preset": name, **LLAMA_LIKE})
    assert (config.block_size, config.num_selected_blocks) == (block_size, num_selected_blocks)
    assert (config.kernel_size, config.kernel_stride, config.window_size) == (
        kernel_size,
        kernel_stride,
        window_size,
    )
    assert config == NSAConfig(**LLAMA_LIKE, **preset(name))


def test_every_preset_is_tested_above_and_settles_the_same_fields():
    assert set(PRESETS) == {"fsa-64x16", "fsa-128x8", "tiny"}
    assert len({frozenset(values) for values in PRESETS.values()}) == 1


def test_the_default_is_the_first_preset():
    assert NSAConfig(**LLAMA_LIKE) == NSAConfig.from_dict({"preset": "fsa-64x16", **LLAMA_LIKE})


def test_explicit_keys_win_over_the_preset():
    config = NSAConfig.from_dict({"preset": "fsa-128x8", **LLAMA_LIKE, "num_selected_blocks": 12})
    assert (config.block_size, config.num_selected_blocks) == (128, 12)


def test_unknown_preset_lists_the_known():
    message = (
        "preset='fsa-32x32' is not known: allowed are ('fsa-64x16', 'fsa-128x8', 'tiny'). Fix: "
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        preset("fsa-32x32")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        NSAConfig.from_dict({"preset": "fsa-32x32", **LLAMA_LIKE})


def test_preset_hands_out_copies():
    preset("tiny")["block_size"] = 999
    assert preset("tiny")["block_size"] == 16


# -- Hugging Face configs --------------------------------------------------------------------------

SMALL = dict(
    hidden_size=256,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=32,
)
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
HF_CASES = [
    *[(family, {}) for family in FAMILIES],
    *[(family, {"attention_bias": True}) for family in ("llama", "qwen3")],
    *[(family, {"rms_norm_eps": 1e-5, "max_position_embeddings": 40960}) for family in FAMILIES],
    *[(family, {"rope_parameters": rope}) for family in FAMILIES for rope in ROPES.values()],
    ("llama", {"head_dim": 64}),
    ("qwen3", {"head_dim": 64}),
    ("llama", {"num_key_value_heads": 8}),
    # transformers reads this as one KV head for each query head.
    ("llama", {"num_key_value_heads": None}),
]


@pytest.mark.parametrize(
    ("family", "changes"), HF_CASES, ids=lambda x: x if isinstance(x, str) else str(x)[:60]
)
def test_from_pretrained_config_describes_the_models_own_attention(family, changes):
    hf_config = FAMILIES[family](**{**SMALL, **changes})
    config = NSAConfig.from_pretrained_config(hf_config)
    # The model's modules say what its weights are; no memory is needed for that.
    with torch.device("meta"):
        attention = (
            transformers.AutoModelForCausalLM.from_config(hf_config).model.layers[0].self_attn
        )

    assert attention.q_proj.in_features == config.hidden_size
    assert attention.q_proj.out_features == config.num_heads * config.head_dim
    assert attention.k_proj.out_features == config.num_kv_heads * config.head_dim
    assert attention.v_proj.out_features == config.num_kv_heads * config.v_head_dim
    assert attention.o_proj.in_features == config.num_heads * config.v_head_dim
    assert attention.head_dim == config.head_dim
    assert attention.scaling == config.scale
    assert attention.num_key_value_groups == config.group_size
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert (projection.bias is not None) == config.qkv_bias
    assert (attention.o_proj.bias is not None) == config.o_bias
    assert hasattr(attention, "q_norm") == hasattr(attention, "k_norm") == config.qk_norm
    if config.qk_norm:
        assert attention.q_norm.variance_epsilon == config.qk_norm_eps

    assert config.qk_norm_eps == changes.get("rms_norm_eps", 1e-6)
    assert config.max_position_embeddings == hf_config.max_position_embeddings
    assert config.rope_parameters == hf_config.rope_parameters
    assert config.rope_parameters == changes.get("rope_parameters", config.rope_parameters)
    assert config.gate_init == "dense"
    assert config.block_size == 64
    assert config.num_selected_blocks == 16


def test_from_pretrained_config_shares_no_dict_with_the_model():
    hf_config = transformers.LlamaConfig(**SMALL)
    config = NSAConfig.from_pretrained_config(hf_config)
    hf_config.rope_parameters["rope_theta"] = 1.0
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_from_pretrained_config_preset_and_overrides():
    hf_config = transformers.Qwen3Config(**SMALL)
    config = NSAConfig.from_pretrained_config(hf_config, preset="fsa-128x8")
    assert (config.block_size, config.num_selected_blocks) == (128, 8)
    config = NSAConfig.from_pretrained_config(
        hf_config, preset="tiny", num_selected_blocks=4, gate_init="balanced", qk_norm=False
    )
    assert (config.block_size, config.num_selected_blocks, config.gate_init, config.qk_norm) == (
        16,
        4,
        "balanced",
        False,
    )
    with pytest.raises(ValueError, match="did you mean 'window_size'"):
        NSAConfig.from_pretrained_config(hf_config, windw_size=64)
    with pytest.raises(ValueError, match="preset='huge' is not known"):
        NSAConfig.from_pretrained_config(hf_config, preset="huge")


def test_from_pretrained_config_reads_the_rope_scaling_of_older_checkpoints():
    hf_config = transformers.Qwen2Config(
        **SMALL,
        rope_theta=1000000.0,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    )
    rope = NSAConfig.from_pretrained_config(hf_config).rope_parameters
    assert {k: rope[k] for k in ROPES["yarn"]} == ROPES["yarn"]


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "type": "longrope",
    "short_factor": [1 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
HF_ROPES = [
    {},
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": YARN},
    # Both in public checkpoints.
    {"rope_theta": 5e5, "rope_scaling": {**YARN, "attn_factor": 1.0, "finetuned": True}},
    {
        "rope_theta": 5e5,
        "rope_scaling": {**YARN, "attention_factor": None, "mscale": 0.7, "mscale_all_dim": 1.0},
    },
    {
        "rope_theta": 5e5,
        "rope_scaling": {
            **YARN,
            "mscale": 0,
            "mscale_all_dim": 0.0,
            "beta_slow": 0,
            "truncate": False,
        },
    },
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {**LONG, "factor": 2.0}, "original_max_position_embeddings": 64},
    {"rope_scaling": {**LONG, "original_max_position_embeddings": 64}},
    {"partial_rotary_factor": 0.5},
    {
        "rope_parameters": {
            "rope_type": "proportional",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        }
    },
]


@pytest.mark.parametrize("old_form", [False, True], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("rope", HF_ROPES, ids=str)
def test_from_pretrained_config_rotates_as_transformers_does(rope, old_form):
    """Against transformers' own rotary module, below and beyond the original length;
    the older form as a plain object.
    """
    sizes = dict(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128
    )
    hf_config = transformers.LlamaConfig(**sizes, **copy.deepcopy(rope))
    given = (
        SimpleNamespace(model_type="llama", rms_norm_eps=1e-6, **sizes, **rope)
        if old_form
        else hf_config
    )
    rotary = RotaryEmbedding(NSAConfig.from_pretrained_config(given))
    theirs = LlamaRotaryEmbedding(hf_config)
    for length in (50, 200):
        found = rotary(torch.arange(length), length, torch.float32)
        for mine, expected in zip(
            found, theirs(torch.zeros(1), torch.arange(length)[None]), strict=True
        ):
            # Angles in float32, as in test_rotary.
            torch.testing.assert_close(mine, expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("hf_config", "model_type"),
    [
        (transformers.GPT2Config(), "gpt2"),
        (transformers.MistralConfig(), "mistral"),
        (transformers.Qwen2MoeConfig(), "qwen2_moe"),
        (SimpleNamespace(hidden_size=64), None),
    ],
    ids=lambda x: repr(x) if isinstance(x, str | None) else type(x).__name__,
)
def test_from_pretrained_config_refuses_other_models(hf_config, model_type):
    message = (
        f"model_type={model_type!r} is not supported: "
        "allowed are 'llama', 'qwen2' and 'qwen3'. Fix: "
    )
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        NSAConfig.from_pretrained_config(hf_config)


# -- configs/ --------------------------------------------------------------------------------------

# The attention of each pretrained model, as its own config.json has it.
PRETRAINED = {
    "llama3-8b.yaml": transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "qwen3-14b.yaml": transformers.Qwen3Config(
        hidden_size=5120, num_attention_heads=40, num_key_value_heads=8,
        max_position_embeddings=40960, rms_norm_eps=1e-6, head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen2.5-32b.yaml": transformers.Qwen2Config(
        hidden_size=5120, num_attention_heads=40, num_key_value_heads=8,
        max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_in_configs_loads(path):
    config = NSAConfig.from_yaml(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values.pop("preset") in PRESETS
    for name, value in values.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("name", PRETRAINED)
def test_configs_of_pretrained_models_equal_what_patching_them_would_use(name):
    assert NSAConfig.from_yaml(CONFIGS / name) == NSAConfig.from_pretrained_config(PRETRAINED[name])


def test_tiny_demo_is_grouped_like_a_large_model_and_trains_from_scratch():
    config = NSAConfig.from_yaml(CONFIGS / "tiny-demo.yaml")
    assert (config.group_size, config.head_dim, config.block_size, config.gate_init) == (
        4,
        16,
        16,
        "balanced",
    )
