"""A checkpoint that version 0.1 of this package saved, when layers compressed keys before rotating
them: one layer with the "mlp" compression of keys, one with "weighted"."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import nsa_fsa.integrations.transformers  # noqa: F401

FOLDER = Path(__file__).parent / "checkpoint_0_1"


def test_gives_the_same_logits_and_text():
    expected = load_file(FOLDER / "expected.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    settings = [layer.self_attn.nsa_config for layer in model.model.layers]
    assert [(c.compress_rope, c.compress_k, c.window_size) for c in settings] == [
        ("after", "mlp", 32),
        ("after", "weighted", 24),
    ]
    ids = expected["input_ids"]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, ::7]
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=2e-5)
    greedy = model.generate(ids[:, :100], max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy, expected["greedy"])
