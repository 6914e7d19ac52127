"""Patched models in the hands of quantizers and of DeepSpeed's ZeRO-3,
where these are installed.
"""

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from nsa_fsa.integrations.transformers import NSALlamaForCausalLM, patch_model
from nsa_fsa.modules import BranchGate
from tests.integrations.models import attentions, dense_model, greedy, output, sparse_model, tokens

# --- Quantizers -----------------------------------------------------------------------------------

GATES = ".*self_attn.gate"  # of the README


def dequantized(linear):
    """The weight that a quantized Linear multiplies by, or a Linear's own."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        return pytest.importorskip("bitsandbytes").functional.dequantize_4bit(
            weight.data, weight.quant_state
        )
    return weight if type(weight) is nn.Parameter else weight.dequantize()


def quanto(skipped):
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8", modules_to_not_convert=skipped)


def torchao(name):
    def make(skipped):
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(
            getattr(quantization, name)(), modules_to_not_convert=skipped
        )

    return make


def bitsandbytes(skipped):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped
    )


QUANTIZERS = {
    "quanto int8": quanto,
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "bitsandbytes nf4": bitsandbytes,
}


@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize("skipped", [None, [GATES, "lm_head"]], ids=["default", "not the gates"])
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_quantized_checkpoint(quantizer, skipped, tmp_path):
    """Loaded quantized: the logits, gradients and tokens of a model with the
    dequantized weights.
    """
    plain, ids = sparse_model(), tokens(1, 200)
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantizer(skipped), dtype=torch.float32
    )
    parts = dict(model.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            weight = dequantized(parts[name])
            is_quantized = weight is not parts[name].weight
            if skipped:
                assert is_quantized == (not name.endswith((".self_attn.gate", "lm_head"))), name
            with torch.no_grad():
                module.weight.copy_(weight)
    torch.testing.assert_close(output(model, ids), output(plain, ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, do_sample=False), greedy(plain, ids, 3)
    )
    for each in (model, plain):
        each(ids, labels=ids, use_cache=False).loss.backward()
    for found, expected in zip(attentions(model), attentions(plain), strict=True):
        torch.testing.assert_close(
            found.gate.bias.grad, expected.gate.bias.grad, rtol=1e-3, atol=1e-5
        )
        if skipped:
            assert type(found.gate) is BranchGate
            torch.testing.assert_close(
                found.gate.weight.grad, expected.gate.weight.grad, rtol=1e-3, atol=1e-5
            )


# --- Weights that nobody initialises in a constructor ---------------------------------------------

KINDS = ["linear", "mlp", "gated", "weighted"]


def assert_started(model, expected):
    """Gates and compressors as a new model has them; random ones with the same spread."""
    expected = expected.state_dict()
    for name, value in model.state_dict().items():
        if any(part in name for part in (".gate.", ".compress_k.", ".compress_v.")):
            if name.endswith(("phi.up", "phi.down")):
                torch.testing.assert_close(
                    value.std(), expected[name].std(), rtol=0.3, atol=0, msg=name
                )
            else:
                assert torch.equal(value, expected[name]), name


def new_config(kind):
    config = sparse_model(
        nsa=dict(compress_k=kind, compress_v=kind, compress_position_embedding=True)
    ).config
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_where_torchs_init_is_off(kind):
    """As `from_config` does with ZeRO-3: constructors without torch.nn.init,
    then transformers initialises every module.
    """
    initialization = pytest.importorskip("transformers.initialization")
    config = new_config(kind)
    with initialization.no_init_weights():
        model = NSALlamaForCausalLM(config)
    model.apply(model._initialize_weights)
    assert_started(model, NSALlamaForCausalLM(config))


# --- DeepSpeed's ZeRO-3 ---------------------------------------------------------------------------

ZERO3 = dict(
    train_micro_batch_size_per_gpu=1,
    gradient_clipping=0.0,
    zero_allow_untested_optimizer=True,
    # Every parameter, however small.
    zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0),
)


@pytest.fixture
def deepspeed(monkeypatch):
    """DeepSpeed in one process on the CPU: parameters are partitioned all the same."""
    for name, value in dict(DS_ACCELERATOR="cpu", LOCAL_RANK="0", RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    module = pytest.importorskip("deepspeed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module.init_distributed("gloo")
    yield module
    module.comm.destroy_process_group()


def partition(deepspeed, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, config=ZERO3, optimizer=optimizer)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_zero3(kind, deepspeed):
    """Logits, a step and tokens as without."""
    nsa = dict(compress_k=kind, compress_v=kind, compress_position_embedding=True)
    plain, ids = sparse_model(nsa=nsa), tokens(1, 200)
    model = sparse_model(nsa=nsa)
    engine = partition(deepspeed, model)
    assert all(p.numel() == 0 for p in model.parameters())
    assert torch.equal(output(engine, ids), output(plain, ids))
    engine.backward(engine(ids, labels=ids, use_cache=False).loss)
    engine.step()
    plain(ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(plain.parameters(), lr=1e-3).step()
    torch.testing.assert_close(output(engine, ids), output(plain, ids), rtol=1e-3, atol=1e-4)
    found = engine.module.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, greedy(plain, ids, 3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_zero3_from_a_config(kind, deepspeed):
    from transformers.integrations import HfDeepSpeedConfig

    config = new_config(kind)
    expected = NSALlamaForCausalLM(config)
    enabled = HfDeepSpeedConfig(ZERO3)  # while it lives
    model = AutoModelForCausalLM.from_config(config)
    del enabled
    assert all(p.numel() == 0 for p in model.parameters())
    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        assert_started(model, expected)


@pytest.mark.filterwarnings("ignore")
def test_patching_what_zero3_has_partitioned(deepspeed):
    """The report counts whole parameters, and a compressor's learned values are not lost
    without a word.
    """

    def flat(config):
        return nn.Sequential(
            nn.Flatten(2), nn.Linear(config.kernel_size * config.head_dim, config.head_dim)
        )

    expected = patch_model(dense_model(), "tiny", verbose=False)
    model = dense_model()
    partition(deepspeed, model)
    report = patch_model(model, "tiny", verbose=False)
    assert (report.new_parameters, report.total_parameters) == (
        expected.new_parameters,
        expected.total_parameters,
    )

    model = dense_model()
    patch_model(model, "tiny", compressor_k=flat, verbose=False)
    partition(deepspeed, model)
    with pytest.raises(
        ValueError,
        match=r"compress_k of layer 0 is partitioned by ZeRO-3.*Fix: leave out compressor_k",
    ):
        patch_model(model, compressor_k=flat, window_size=7, verbose=False)
    assert attentions(model)[0].nsa_config.window_size != 7
