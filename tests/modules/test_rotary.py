"""RoPE: every type against transformers' own LlamaRotaryEmbedding,
and applied as transformers applies it.
"""

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from nsa_fsa import NSACache, NSAConfig
from nsa_fsa.modules.rotary import RotaryEmbedding, apply_rotary
from tests.modules.layers import make_layer, randn, small_config

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, other base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn, all settings": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0,
        "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0,
        "attention_factor": 0.9,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def pair(rope, max_position_embeddings=256, head_dim=32):
    """Our rotary embedding and transformers'."""
    ours = NSAConfig(
        hidden_size=4 * head_dim,
        num_heads=4,
        num_kv_heads=2,
        rope_parameters=dict(rope),
        max_position_embeddings=max_position_embeddings,
    )
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=dict(rope),
        max_position_embeddings=max_position_embeddings,
    )
    return RotaryEmbedding(ours), LlamaRotaryEmbedding(theirs)


# 700: beyond max_position_embeddings.
@pytest.mark.parametrize("length", [40, 256, 700], ids="length{}".format)
@pytest.mark.parametrize("name", ROPES)
def test_cos_and_sin_are_transformers(name, length):
    rotary, theirs = pair(ROPES[name])
    positions = torch.arange(length)
    cos, sin = rotary(positions, length, torch.float32)
    expected_cos, expected_sin = theirs(torch.zeros(1, dtype=torch.float32), positions[None])
    # Both compute angles in float32; position * frequency may differ in its last bit,
    # at most 700 * 2**-24.
    torch.testing.assert_close(cos, expected_cos[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, expected_sin[0], rtol=0, atol=1e-4)


def test_the_types_differ():
    """That the comparison above can tell: no two types give the same angles at length 700."""
    angles = {
        name: pair(rope)[0](torch.arange(700), 700, torch.float32)[1]
        for name, rope in ROPES.items()
    }
    names = list(angles)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert (angles[first] - angles[second]).abs().max() > 0.1, (first, second)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("name", ROPES)
def test_dtype(name, dtype):
    rotary, _ = pair(ROPES[name])
    cos, sin = rotary(torch.arange(50), 50, dtype)
    assert cos.dtype == sin.dtype == dtype
    # Angles are computed in float32 or wider whatever the dtype is, so only the last
    # rounding shows. The scaled types' frequencies come from transformers in float32: 50 *
    # 2**-24 of an angle.
    reference = rotary(torch.arange(50), 50, torch.float64)
    for x, exact in zip((cos, sin), reference, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_float64_is_not_float32():
    """The types computed here are exact in float64: cos^2 + sin^2 and doubled angles,
    where float32 would be off by 1e-7.
    """
    for name in ("default", "linear"):
        rotary, _ = pair(ROPES[name])
        cos, sin = rotary(torch.arange(0, 2000, 7), 2000, torch.float64)
        cos2, _ = rotary(torch.arange(0, 4000, 14), 4000, torch.float64)
        torch.testing.assert_close(cos2, cos**2 - sin**2, rtol=0, atol=1e-11)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_applied_as_transformers_applies_it(head_dim):
    x = randn(50, 3, head_dim, dtype=torch.float32)
    rotary, _ = pair(ROPES["default"], head_dim=head_dim)
    cos, sin = rotary(torch.arange(50), 50, torch.float32)
    expected, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None]
    )
    assert torch.equal(apply_rotary(x, cos, sin), expected[0].transpose(0, 1))


def test_partial_rotation_leaves_the_rest():
    x = randn(10, 2, 8)
    config = small_config(rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5})
    cos, sin = RotaryEmbedding(config)(torch.arange(10), 10, torch.float64)
    assert cos.shape == (10, 4)
    rotated = apply_rotary(x, cos, sin)
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    assert torch.equal(rotated[..., :4], apply_rotary(x[..., :4].contiguous(), cos, sin))


@torch.no_grad()
@pytest.mark.parametrize("rope", ["before", "after"])
@pytest.mark.parametrize("name", ROPES)
def test_layer_given_transformers_cos_and_sin(name, rope):
    """A layer that computes its own positions equals one that is given transformers',
    for every type.
    """
    config = small_config(
        rope_parameters=ROPES[name], compress_rope=rope, max_position_embeddings=32
    )
    theirs = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=32,
            num_attention_heads=4,
            rope_parameters=dict(ROPES[name]),
            max_position_embeddings=32,
        )
    )
    layer, x = make_layer(config), randn(2, 45, 24)
    given = layer(x, position_embeddings=theirs(x, torch.arange(45)[None]))
    torch.testing.assert_close(given, layer(x), rtol=1e-4, atol=1e-4)  # their angles are float32


@torch.no_grad()
def test_dynamic_angles_of_a_cached_sequence():
    """Up to the model's length a sequence fed in parts equals one fed at once. Beyond,
    tokens keep the angles that they came with: those that transformers gives a sequence fed
    in the same parts."""
    rotary, theirs = pair(ROPES["dynamic"], max_position_embeddings=32)
    for start, end in ((0, 20), (20, 33), (33, 34), (34, 80)):
        positions = torch.arange(start, end)
        _, sin = rotary(positions, end, torch.float32)
        torch.testing.assert_close(
            sin, theirs(torch.zeros(1), positions[None])[1][0], rtol=0, atol=1e-4
        )

    layer = make_layer(small_config(rope_parameters=ROPES["dynamic"], max_position_embeddings=32))
    x = randn(1, 45, 24)
    for length in (32, 45):
        cache = NSACache(layer.config)
        parts = torch.cat(
            [layer(part, cache=cache) for part in x[:, :length].split(15, dim=1)], dim=1
        )
        assert torch.allclose(parts, layer(x[:, :length])) == (length == 32)
