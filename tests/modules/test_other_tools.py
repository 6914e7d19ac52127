"""The layer in the hands of tools that know nothing of it: adapters, quantizers, offloading, sharding, export."""

import copy

import pytest
import torch
from torch import nn

from nsa_fsa.modules import BranchGate
from tests.modules.layers import make_layer, randn, small_config

CLOSE = dict(rtol=1e-10, atol=1e-11)  # float64


class Block(nn.Module):
    """A layer inside a model, as tools meet it."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return x + self.attn(x)


# --- The gate is a Linear -------------------------------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """What a tool that replaces Linears by isinstance puts in their place: it knows what a Linear has, and nothing else."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def replace_linears(module, skip=()):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and name not in skip:
            setattr(module, name, PlainLinear(child))
        else:
            replace_linears(child, skip)


# 4 tokens are as many as there are heads: logits of a wrong shape might be taken for another one.
@torch.no_grad()
@pytest.mark.parametrize("length", [4, 45])
@pytest.mark.parametrize("gate", ["per_head", "per_token"])
def test_replaced_linears_give_the_same_values(gate, length):
    model, x = Block(make_layer(small_config(gate=gate))), randn(1, length, 24)
    expected = model(x)
    replace_linears(model)
    assert isinstance(model.attn.gate, PlainLinear)
    torch.testing.assert_close(model(x), expected, **CLOSE)


@torch.no_grad()
def test_a_gate_returns_what_its_linear_returns():
    """`[..., E] -> [..., 3 H]`, whatever the input's axes."""
    gate, x = BranchGate(24, 4, dtype=torch.float64), randn(2, 5, 24)
    gate.weight.normal_()
    assert torch.equal(gate(x), nn.functional.linear(x, gate.weight, gate.bias))


@pytest.mark.parametrize("length", [4, 45])
@pytest.mark.parametrize("gate", ["per_head", "per_token"])
def test_lora_on_every_linear(gate, length):
    """PEFT, all-linear: nothing changes at the start, the gate's adapter trains, and merging it gives the adapted values."""
    peft = pytest.importorskip("peft")
    layer, x = make_layer(small_config(gate=gate), torch.float32), randn(1, length, 24, dtype=torch.float32)
    expected = layer(x)
    adapted = peft.get_peft_model(Block(layer), peft.LoraConfig(r=2, target_modules="all-linear"))
    attn = adapted.base_model.model.attn
    assert isinstance(attn.gate, peft.tuners.lora.Linear)
    torch.testing.assert_close(attn(x), expected)
    nn.init.normal_(attn.gate.lora_B["default"].weight)
    output = attn(x)
    assert (output - expected).abs().max() > 1e-3
    output.sum().backward()
    assert (attn.gate.lora_A["default"].weight.grad != 0).any()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.attn(x), output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantization_and_its_skip_list():
    """torch.ao quantizes what is a Linear by type; a quantizer that goes by names leaves the gate alone if told "gate"."""
    model, x = Block(make_layer(small_config(), torch.float32, gain=1.0)), randn(1, 45, 24, dtype=torch.float32)
    expected = model(x)
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear, BranchGate}, dtype=torch.qint8)
    assert (quantized(x) - expected).pow(2).mean() < 0.05 * expected.pow(2).mean()
    replace_linears(model, skip=("gate",))
    assert type(model.attn.gate) is BranchGate
    torch.testing.assert_close(model(x), expected)


def test_the_gates_name_is_what_transformers_quantizers_skip():
    quantizers_utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    converted = [
        name
        for name in ("self_attn.gate", "mlp.gate_proj", "self_attn.q_proj")
        if quantizers_utils.should_convert_module(f"model.layers.0.{name}", ["gate"])
    ]
    assert converted == ["mlp.gate_proj", "self_attn.q_proj"]
