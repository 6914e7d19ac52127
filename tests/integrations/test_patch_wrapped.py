"""patch_model and unpatch_model where something stands around a model,
its layers or its weights.
"""

import copy

import accelerate
import peft
import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nsa_fsa.integrations.transformers import NSALlamaForCausalLM, patch_model, unpatch_model
from nsa_fsa.modules import Compressor
from nsa_fsa.modules.gating import BranchGate
from tests.integrations import models

# --- Wrapped models -------------------------------------------------------------------------------


def lora(model, **settings):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **settings))


WRAPPERS = {
    "peft": lora,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "Sequential": lambda model: torch.nn.Sequential(model),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPERS)
def test_unpatching_a_wrapped_model(name):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where DataParallel takes its inputs
    model, ids = models.dense_model().to(device), models.tokens(1, 130).to(device)
    expected = models.output(model, ids)
    patch_model(model, "tiny", verbose=False)
    wrapped = WRAPPERS[name](models.scramble(model))
    if name != "compile":  # which takes 20 seconds for the sparse model
        assert (wrapped(ids)[0] - expected).abs().max() > 1e-3
    assert unpatch_model(wrapped) is wrapped
    assert type(model) is transformers.LlamaForCausalLM
    torch.testing.assert_close(wrapped(ids)[0], expected, rtol=1e-5, atol=1e-5)  # compiled or not


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_patching_a_wrapped_model_is_refused(wrap):
    model = models.dense_model()
    wrapped = wrap(model)
    before = models.snapshot(model)
    with pytest.raises(
        TypeError,
        match=r"cannot be patched.*LlamaForCausalLM inside it before wrapping.*get_peft_model",
    ):
        patch_model(wrapped, "tiny", verbose=False)
    models.assert_same(before, models.snapshot(model))


def test_what_cannot_be_unpatched_is_refused_by_name(tmp_path):
    """A wrapper that keeps a list of the parameters, a part of a patched model,
    and a class of somebody else's.
    """

    class MyNSA(NSALlamaForCausalLM):
        pass

    model, other = models.sparse_model(), models.sparse_model()
    other.__class__ = MyNSA
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for whole, name in (
            (wrapped, "DistributedDataParallel"),
            (model.model, "LlamaModel"),
            (other, "MyNSA"),
        ):
            before = models.snapshot(model)
            with pytest.raises(
                TypeError,
                match=f"{name} cannot be unpatched.*Fix: call unpatch_model with the whole",
            ):
                unpatch_model(whole)
            models.assert_same(before, models.snapshot(model))
        sharded = models.dense_model()
        torch.distributed.fsdp.fully_shard(
            sharded.model.layers[0], mesh=init_device_mesh("cpu", (1,))
        )
        with pytest.raises(ValueError, match="sharded already"):
            patch_model(sharded, "tiny", verbose=False)
        patch_model(sharded := models.dense_model(), "tiny", verbose=False)
        torch.distributed.fsdp.fully_shard(
            sharded.model.layers[0], mesh=init_device_mesh("cpu", (1,))
        )
        with pytest.raises(TypeError, match="FSDPLlamaDecoderLayer cannot be unpatched"):
            unpatch_model(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_a_base_model_patched_inside_its_causal_model(tmp_path):
    """The causal model's config says so, and the checkpoint loads sparse;
    other models of that config stay as they are.
    """
    config = models.dense_config()
    torch.manual_seed(0)
    model, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    ids, before = models.tokens(1, 130), models.snapshot(other)
    expected = models.output(model, ids)
    patch_model(model.model, "tiny", verbose=False)
    assert model.config is model.model.config
    models.assert_same(before, models.snapshot(other))
    models.scramble(model).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NSALlamaForCausalLM
    assert torch.equal(models.output(loaded, ids), models.output(model, ids))
    assert unpatch_model(model).config is config
    assert torch.equal(models.output(model, ids), expected)


# --- Quantized and offloaded weights --------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """Weights that are packed: as bitsandbytes keeps them, in `weight`, or as GPTQ does,
    in a buffer of another name.
    """

    def __init__(self, linear, name):
        super().__init__()
        self.name, self.scale = name, linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        if name == "weight":
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
        else:
            self.register_buffer(name, packed)

    def forward(self, x):
        return torch.nn.functional.linear(
            x, getattr(self, self.name).to(x.dtype) * self.scale.to(x.dtype)
        )


def pack(model, name="weight"):
    for attention in models.attentions(model):
        for projection in models.PROJECTIONS:
            setattr(attention, projection, Int8Linear(getattr(attention, projection), name))
    return model


CHANGED = {
    "torch.ao": lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}),
    "packed": pack,
    "packed bfloat16": lambda model: pack(model).to(torch.bfloat16),
    "packed elsewhere": lambda model: pack(model, "qweight").to(torch.bfloat16),
    "offloaded": lambda model: accelerate.cpu_offload(model),
}


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:.*quantize_dynamic"
)
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_quantized_and_offloaded_models(change):
    """New parameters are real, in the precision of the rest; with the selected branch alone it is
    the same model.
    """
    model, ids = change(models.dense_model()), models.tokens(1, models.TINY_REACH)
    expected = models.output(model, ids)
    patch_model(model, "tiny", verbose=False)
    gate = models.attentions(model)[0].gate
    assert (gate.weight.dtype, gate.weight.device.type) == (expected.dtype, "cpu")
    models.open_only_the_selected_branch(model)
    tolerance = 1e-1 if expected.dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(models.output(model, ids), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(models.output(unpatch_model(model), ids), expected)


WRAPPED = {
    "modules_to_save": lambda model: lora(
        model, modules_to_save=["self_attn.gate", "compress_k", "compress_v"]
    ),
    "LoRA on the gate": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["gate", "k_proj"])
    ),
    "offloaded": lambda model: accelerate.cpu_offload(model),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_patching_again_keeps_what_is_around_the_layers(wrap):
    """Adapters and offloaded weights go on with the new settings, as a model without them would."""
    model, ids = models.sparse_model(), models.tokens(1, 200)
    plain = copy.deepcopy(model)
    settings = dict(window_size=7, kernel_stride=4, gate_init="dense", backend="reference")
    wrapped = wrap(model)
    if isinstance(wrapped, peft.PeftModel):
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        plain = copy.deepcopy(wrapped).merge_and_unload()
    modules = dict(wrapped.named_modules())
    learned = {name: p for name, p in wrapped.named_parameters() if p.device.type != "meta"}
    report = patch_model(model, **settings, verbose=False)
    patch_model(plain, **settings, verbose=False)
    assert report.started_anew == ()
    parts = [module for module in wrapped.modules() if isinstance(module, (BranchGate, Compressor))]
    assert {getattr(part, "backend", "reference") for part in parts} == {"reference"}
    # Where a reset would start.
    assert {getattr(part, "init", "dense") for part in parts} == {"dense"}
    found = dict(wrapped.named_modules())
    assert [
        name for name in modules if found[name] is not modules[name] and "rotary" not in name
    ] == []
    assert all(dict(wrapped.named_parameters())[name] is p for name, p in learned.items())
    torch.testing.assert_close(
        models.output(wrapped, ids), models.output(plain, ids), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        models.output(unpatch_model(wrapped), ids),
        models.output(unpatch_model(plain), ids),
        rtol=1e-4,
        atol=1e-4,
    )


def wrap_layers(model):
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
    )


def wrap_attention(model):
    for layer in model.model.layers:
        layer.self_attn = checkpoint_wrapper(layer.self_attn)


@pytest.mark.parametrize("wrap", [wrap_layers, wrap_attention])
@pytest.mark.parametrize("first", [True, False], ids=["wrapped first", "patched first"])
def test_wrappers_around_layers_or_attention(wrap, first):
    """Their attributes are the wrapped module's to read, but not to set."""
    model, plain, ids = models.dense_model(), models.dense_model(), models.tokens(1, 200)
    expected = models.output(plain, ids)
    if first:
        wrap(model)
    for either in (plain, model):
        patch_model(either, "tiny", gate_init="balanced", verbose=False)
    if not first:
        wrap(model)
    models.scramble(plain)
    model.load_state_dict(plain.state_dict())  # transparent in names
    assert torch.equal(models.output(model, ids), models.output(plain, ids))
    for either in (plain, model):
        patch_model(either, window_size=9, verbose=False)
    assert torch.equal(models.output(model, ids), models.output(plain, ids))
    assert torch.equal(model.generate(ids, max_new_tokens=3), plain.generate(ids, max_new_tokens=3))
    assert model.config.nsa == plain.config.nsa
    assert type(unpatch_model(model)) is transformers.LlamaForCausalLM
    assert torch.equal(models.output(model, ids), expected)


@torch.no_grad()
def test_a_compiled_attention_module():
    """What torch.compile returned for it runs what is inside, whatever that becomes."""
    torch._dynamo.reset()
    model, plain, ids = models.dense_model(), models.dense_model(), models.tokens(1, 130)
    layer = model.model.layers[1]
    layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    expected = models.output(plain, ids)
    torch.testing.assert_close(models.output(model, ids), expected, rtol=1e-5, atol=1e-5)
    for either in (plain, model):
        report = patch_model(either, "tiny", gate_init="balanced", verbose=False)
        assert report.layers == (0, 1)
        models.scramble(either)
    sparse = models.output(plain, ids)
    assert (sparse - expected).abs().max() > 1e-3
    torch.testing.assert_close(models.output(model, ids), sparse, rtol=1e-5, atol=1e-5)
    unpatch_model(model)
    torch.testing.assert_close(models.output(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_wrapped_part_that_would_start_anew_is_refused():
    model = models.sparse_model()
    wrapped = lora(model, modules_to_save=["self_attn.gate", "compress_v"])
    before, own = models.snapshot(wrapped), lambda config: torch.nn.Identity()
    for part, settings in (
        ("gate", dict(gate="per_token")),
        ("gate", dict(compress_k="linear", gate="per_token")),
        ("compress_v", dict(compress_v="linear")),
        ("compress_v", dict(compressor_v=own)),
    ):
        message = (
            rf"{part} of layer 0 has to be made anew.*ModulesToSaveWrapper.*Fix: merge or unload"
        )
        with pytest.raises(ValueError, match=message):
            patch_model(model, **settings, verbose=False)
    models.assert_same(before, models.snapshot(wrapped))
    assert patch_model(model, compress_k="linear", verbose=False).started_anew == (
        "0.compress_k",
        "1.compress_k",
    )


class Scaled(torch.nn.Module):
    """A compressor of one's own."""

    def __init__(self, config):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, windows):
        return windows.mean(2) * self.scale


def test_a_compressor_given_again():
    """Takes over what its predecessor learned, and whether it still learns;
    of an offloaded one it cannot.
    """
    model = models.dense_model()
    patch_model(model, "tiny", compressor_k=Scaled, verbose=False)
    parameters = [
        attention.compress_k.phi.scale for attention in models.attentions(models.scramble(model))
    ]
    parameters[0].requires_grad_(False)
    before = [p.item() for p in parameters]
    patch_model(model, compressor_k=Scaled, verbose=False, dry_run=True)
    assert [p.requires_grad for p in parameters] == [False, True]
    patch_model(model, window_size=7, compressor_k=Scaled, verbose=False)
    parameters = [attention.compress_k.phi.scale for attention in models.attentions(model)]
    assert [p.item() for p in parameters] == before
    assert [p.requires_grad for p in parameters] == [False, True]
    accelerate.cpu_offload(model)
    with pytest.raises(
        ValueError, match=r"compress_k of layer 0 is offloaded.*Fix: leave out compressor_k"
    ):
        patch_model(model, window_size=9, compressor_k=Scaled, verbose=False)
    patch_model(model, window_size=9, verbose=False)
    assert models.output(model, models.tokens(1, 130)).isfinite().all()
