"""The layer in the hands of tools that know nothing of it: adapters, quantizers, offloading,
sharding, export.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nsa_fsa import patch_model
from nsa_fsa.modules import BranchGate, NativeSparseAttention, fused
from tests.model_sizes import model_sizes
from tests.modules.layers import (
    VARIANTS,
    FirstPlusTanhOfLast,
    make_layer,
    make_variant,
    randn,
    small_config,
)

CLOSE = dict(rtol=1e-10, atol=1e-11)  # float64


class Block(nn.Module):
    """A layer inside a model, as tools meet it."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return x + self.attn(x)


# --- The gate is a Linear -------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """What a tool that replaces Linears by isinstance puts in their place:
    it knows what a Linear has, and nothing else.
    """

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
    """PEFT, all-linear: nothing changes at the start, the gate's adapter trains,
    and merging it gives the adapted values.
    """
    peft = pytest.importorskip("peft")
    layer = make_layer(small_config(gate=gate), torch.float32)
    x = randn(1, length, 24, dtype=torch.float32)
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


@pytest.mark.parametrize("names", [("gate", "compress_k", "compress_v"), ("phi",)], ids=" ".join)
@pytest.mark.parametrize("variant", ["default", "branches-gated", "own-modules"])
def test_what_is_new_is_trained_beside_adapters(variant, names):
    """PEFT's modules_to_save, as the whole or of the compressors alone:
    copies that give the same values, and learn.
    """
    peft = pytest.importorskip("peft")
    layer, x = make_variant(variant, torch.float32), randn(1, 45, 24, dtype=torch.float32)
    expected = layer(x)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[*names])
    adapted = peft.get_peft_model(Block(layer), config)
    output = adapted.base_model.model.attn(x)
    torch.testing.assert_close(output, expected)
    assert adapted.base_model.model.attn.compress_k.is_own == (variant == "own-modules")
    output.sum().backward()
    learning = {
        name for name, p in adapted.named_parameters() if p.grad is not None and "lora" not in name
    }
    assert learning
    assert all(any(f"{part}.modules_to_save" in name for name in learning) for part in names)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "names"), [("default", ["logits"]), ("no-rope", ["down", "up"])], ids=str
)
def test_lora_on_the_parameters_of_a_phi(variant, names):
    """PEFT wraps the phi, once for every parameter; merged, it is the phi again."""
    peft = pytest.importorskip("peft")
    layer, x = make_variant(variant), randn(1, 45, 24)
    expected = layer(x)
    targets = [f"compress_v.phi.{name}" for name in names]
    adapted = peft.get_peft_model(
        Block(layer), peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    )
    for attn in (adapted.base_model.model.attn, adapted.merge_and_unload().attn):
        torch.testing.assert_close(attn(x), expected, **CLOSE)
        assert not attn.compress_v.is_own


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor"
)
def test_dynamic_quantization_and_its_skip_list():
    """torch.ao quantizes what is a Linear by type; a quantizer that goes by names leaves the gate
    alone if told "gate".
    """
    model = Block(make_layer(small_config(), torch.float32, gain=1.0))
    x = randn(1, 45, 24, dtype=torch.float32)
    expected = model(x)
    quantized = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {nn.Linear, BranchGate}, dtype=torch.qint8
    )
    assert (quantized(x) - expected).pow(2).mean() < 0.05 * expected.pow(2).mean()
    replace_linears(model, skip=("gate",))
    assert type(model.attn.gate) is BranchGate
    torch.testing.assert_close(model(x), expected)


def test_the_gates_pattern_is_what_transformers_quantizers_skip():
    """Quantizers ask with the module's name, torchao's with the weight's."""
    quantizers_utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    names = [
        f"model.layers.0.{name}" for name in ("self_attn.gate", "mlp.gate_proj", "self_attn.q_proj")
    ]
    for suffix in ("", ".weight"):
        converted = [
            name
            for name in names
            if quantizers_utils.should_convert_module(
                name + suffix, [".*self_attn.gate", "lm_head"]
            )
        ]
        assert converted == names[1:]


# --- Parameters that are elsewhere until their module runs ----------------------------------------


def fused_norm(x, weight, eps):
    return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


@pytest.fixture
def fused_kernels(monkeypatch):
    """As on a GPU, where the layer runs a norm by a kernel that takes its weight."""
    monkeypatch.setattr(
        "nsa_fsa.modules.norm.kernels_for", lambda x: fused.Kernels(None, fused_norm)
    )


def offloaded(model, how, folder, device="cpu"):
    """A model with a submodule `attn` whose parameters are on the CPU or in the folder until they
    run on the device.
    """
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device(device))
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=torch.device(device))
    parts = [f"attn.{name}" for name, part in model.attn.named_children() if [*part.parameters()]]
    device_map = {name: ("disk", "cpu")[i % 2] for i, name in enumerate(parts)}
    return accelerate.dispatch_model(
        model, device_map, main_device=device, offload_dir=folder, force_hooks=True
    )


@torch.no_grad()
@pytest.mark.usefixtures("fused_kernels")
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded(variant, how, tmp_path):
    model, x = Block(make_variant(variant)), randn(2, 45, 24)
    expected = model(x)
    model = offloaded(model, how, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_checkpoint_spread_over_cpu_and_disk(tmp_path):
    """A patched model, saved and loaded with a device_map: the same logits,
    and the same tokens from a cache.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**model_sizes(32, 32, 2, 4, 2, vocab_size=64))
    model = transformers.LlamaForCausalLM(config).eval()
    patch_model(model, preset="tiny", verbose=False)
    model.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.rotary_emb": "cpu",
    }
    spread = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**places, "model.norm": "disk", "lm_head": "cpu"},
        offload_folder=tmp_path / "offloaded",
    )
    assert spread.model.layers[0].self_attn.gate.weight.is_meta
    tokens = torch.arange(50)[None]
    assert torch.equal(spread(tokens).logits, model(tokens).logits)
    options = dict(max_new_tokens=3, do_sample=False)
    assert torch.equal(spread.generate(tokens, **options), model.generate(tokens, **options))


@pytest.fixture
def mesh():
    """One process, so that nothing is communicated; parameters are DTensors all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard_every_module(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for module in [*model.modules()][::-1]:
        if any(True for _ in module.parameters(recurse=False)):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.usefixtures("fused_kernels")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_sharded_by_itself(variant, mesh):
    """FSDP2, the finest way: forward and backward as without."""
    model, x = Block(make_variant(variant)), randn(2, 45, 24)
    for module in model.modules():
        if isinstance(module, FirstPlusTanhOfLast):  # FSDP2 takes no parameter without an axis
            module.strength = nn.Parameter(module.strength.detach()[None])
    reference = copy.deepcopy(model)
    sharded = shard_every_module(model, mesh)
    for _ in range(2):
        output, expected = sharded(x), reference(x)
        torch.testing.assert_close(output, expected, **CLOSE)
        assert sharded.attn.compress_k.is_own == (variant == "own-modules")
        output.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(sharded.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, **CLOSE, msg=name)


# --- Starting anew --------------------------------------------------------------------------------

STARTS = VARIANTS | {
    "dense gates": dict(gate_init="dense"),
    "dense gates, per token": dict(gate_init="dense", gate="per_token"),
}


def started(variant, **arguments):
    torch.manual_seed(0)
    own = (
        dict(compressor_k=nn.Flatten(), compressor_v=nn.Flatten())
        if variant == "own-modules"
        else {}
    )
    return NativeSparseAttention(small_config(**STARTS[variant]), **own, **arguments)


def is_random(name):
    return name.endswith(("_proj.weight", "_proj.bias", "phi.up", "phi.down"))


def assert_started(layer, expected):
    for name, value in expected.state_dict().items():
        found = layer.state_dict()[name]
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        # Of the same size: a normal or uniform distribution's standard deviation.
        if is_random(name):
            torch.testing.assert_close(found.std(), value.std(), rtol=0.35, atol=0, msg=name)
        else:
            assert torch.equal(found, value), name


@pytest.mark.parametrize("whole", [False, True], ids=["module by module", "the layer"])
@pytest.mark.parametrize("variant", STARTS)
def test_reset_parameters_restores_the_start(variant, whole):
    layer, expected = started(variant), started(variant)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    if whole:
        layer.reset_parameters()
    else:  # as tools do: any order, every module that has it
        for module in [*layer.modules()][::-1]:
            if hasattr(module, "reset_parameters") and module is not layer:
                module.reset_parameters()
    assert_started(layer, expected)


@pytest.mark.parametrize("variant", STARTS)
def test_built_on_meta_sharded_and_reset(variant, mesh):
    model = shard_every_module(Block(started(variant, device="meta")), mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_started(model.attn, started(variant))


# --- Export ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_export_with_a_dynamic_batch_and_length(variant):
    layer = make_variant(variant)
    dynamic = {
        "hidden_states": {
            0: torch.export.Dim("batch", min=1, max=64),
            1: torch.export.Dim("length", min=2, max=4096),
        }
    }
    exported = torch.export.export(
        layer, (randn(2, 45, 24),), dynamic_shapes=dynamic, strict=False
    ).module()
    for shape in ((2, 45), (1, 45), (3, 45), (2, 9), (1, 100), (5, 3)):
        x = randn(*shape, 24, seed=shape[1])
        torch.testing.assert_close(exported(x), layer(x), **CLOSE)


@torch.no_grad()
def test_export_of_a_packed_batch():
    """With as many tokens and sequences as come; at least two of each,
    as torch.export gives one an axis of its own.
    """
    layer, length = make_variant("default"), torch.export.Dim("length", min=8, max=4096)
    dynamic = {
        "hidden_states": {1: length},
        "cu_seqlens": {0: torch.export.Dim("boundaries", min=3, max=4096)},
    }

    def packed(*lengths):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        return (randn(1, sum(lengths), 24),), dict(cu_seqlens=cu_seqlens)

    exported = torch.export.export(
        layer, *packed(20, 25), dynamic_shapes=dynamic, strict=False
    ).module()
    for lengths in ((20, 25), (3, 5), (60, 1, 0, 12)):
        arguments, options = packed(*lengths)
        torch.testing.assert_close(
            exported(*arguments, **options), layer(*arguments, **options), **CLOSE
        )
