"""Patched models in the hands of quantizers, where these are installed."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from nsa_fsa.modules import BranchGate
from tests.integrations.models import attentions, greedy, output, sparse_model, tokens

# --- Quantizers -----------------------------------------------------------------------------------------------------------

GATES = ".*self_attn.gate"  # of the README


def dequantized(linear):
    """The weight that a quantized Linear multiplies by, or a Linear's own."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        return pytest.importorskip("bitsandbytes").functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight if type(weight) is nn.Parameter else weight.dequantize()


def quanto(skipped):
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8", modules_to_not_convert=skipped)


def torchao(name):
    def make(skipped):
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=skipped)

    return make


def bitsandbytes(skipped):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)


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
    """Loaded quantized: the logits, gradients and tokens of a model with the dequantized weights."""
    plain, ids = sparse_model(), tokens(1, 200)
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantizer(skipped), dtype=torch.float32)
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
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), greedy(plain, ids, 3))
    for each in (model, plain):
        each(ids, labels=ids, use_cache=False).loss.backward()
    for found, expected in zip(attentions(model), attentions(plain), strict=True):
        torch.testing.assert_close(found.gate.bias.grad, expected.gate.bias.grad, rtol=1e-3, atol=1e-5)
        if skipped:
            assert type(found.gate) is BranchGate
            torch.testing.assert_close(found.gate.weight.grad, expected.gate.weight.grad, rtol=1e-3, atol=1e-5)
