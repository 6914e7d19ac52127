"""What patch_model recognises, what it says of the rest, and classes of a user's own."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from nsa_fsa.integrations.transformers import (
    NSAAttention,
    explain_model,
    layers,
    patch_model,
    register_attention,
    sparse_attention,
    unpatch_model,
)
from tests.integrations import families
from tests.integrations.families import BASE, MIXED, tokens
from tests.integrations.families import family as model_of
from tests.integrations.models import scramble


def refused(config, model, match, **settings):
    made = getattr(transformers, model)(getattr(transformers, config)(**{**BASE, **settings}))
    before = [type(module) for module in made.modules()]
    with pytest.raises(ValueError, match=match):
        patch_model(made, "tiny", verbose=False)
    assert [type(module) for module in made.modules()] == before
    return made


def test_a_soft_cap_is_refused_by_name():
    model = refused("Gemma2Config", "Gemma2ForCausalLM", r"\[1\].*soft cap", head_dim=16, **MIXED)
    assert "model.layers.0.self_attn (Gemma2Attention): stays as it is" in str(explain_model(model))


def test_sinks_are_refused_by_name():
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    refused("GptOssConfig", "GptOssForCausalLM", r"\[1\].*sinks", head_dim=16, **experts)


def test_a_sliding_window_everywhere_leaves_nothing():
    refused("MistralConfig", "MistralForCausalLM", r"(?s)no layer.*window of 32", sliding_window=32)


def test_attention_without_the_interface_is_refused():
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=8
    )
    with pytest.raises(TypeError, match=r"attention interface.*register_attention"):
        patch_model(transformers.FalconForCausalLM(config), "tiny")


def test_the_page_of_families_is_what_happens():
    assert families.PAGE.read_text() == families.table()


def test_a_dry_run_says_so_module_by_module(capsys):
    model = model_of("Gemma3")
    patch_model(model, "tiny", dry_run=True)
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn (Gemma3Attention): stays as it is: it is sliding" in printed
    assert "model.layers.1.self_attn (Gemma3Attention): NSA" in printed
    assert type(model) is transformers.Gemma3ForCausalLM


def test_layers_that_stay_cost_what_they_did():
    """Their module, mask and attention function are the stock model's."""
    model, ids = model_of("Gemma3"), tokens(1, 150)
    dense = model.model.layers[0].self_attn
    patch_model(model, "tiny", verbose=False)
    assert type(dense).__module__.startswith("transformers.")
    seen = []
    dense.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    assert dense.config._attn_implementation == "sdpa"
    assert seen[0].shape == (1, 1, 150, 150)
    assert seen[0].sum() == sum(min(t + 1, 32) for t in range(150))


def test_a_layer_that_turns_out_to_have_a_window_is_refused(monkeypatch):
    model = model_of("Mistral")
    patch_model(model, "tiny", verbose=False)
    for module in model.modules():
        if isinstance(module, NSAAttention):
            module.config.sliding_window = 32
    with pytest.raises(ValueError, match=r"layer 0 asks for a sliding window.*Fix"):
        model(tokens(1, 40))


@pytest.mark.parametrize("name", ["Glm", "HunYuanDenseV1", "DeepseekV3", "Llama4", "Qwen2.5-VL"])
def test_keys_that_cannot_be_turned_back_are_refused(name):
    with pytest.raises(ValueError, match=r'compress_rope="after" is not available.*Fix.*"before"'):
        patch_model(model_of(name), "tiny", compress_rope="after", verbose=False)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "StableLm", "Phi", "Granite"])
def test_keys_that_can_be_turned_back_are_compressed_as_they_were(name):
    """The compressed keys of a first window, whose position is 0, are those of keys that were
    not rotated at all."""
    model, ids = model_of(name), tokens(1, 40)
    patch_model(model, "tiny", compress_rope="after", compress_k="mean", verbose=False)
    made = []
    attention = next(x for x in model.modules() if isinstance(x, NSAAttention))
    attention.compress_k.register_forward_hook(lambda module, args, out: made.append(out[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
        rotary = next(x for x in model.modules() if type(x).__name__.endswith("RotaryEmbedding"))
        rotary.register_forward_hook(lambda module, args, out: (out[0] * 0 + 1, out[1] * 0))
        model(ids, use_cache=False)
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unset", [float("nan"), None], ids=["no numbers", "empty"])
def test_keys_of_weights_that_are_not_set_yet(unset):
    """As where torch's init is off, and in DeepSpeed's ZeRO-3."""
    model = model_of("Llama")
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.k_proj.weight
            weight.data = weight.new_empty(0) if unset is None else weight.fill_(unset).data
    report = patch_model(model, "tiny", compress_rope="after", verbose=False)
    assert report.config.compress_rope == "after"


# --- A class of a user's own ----------------------------------------------------------------------


class OwnAttention(nn.Module):
    """Plain PyTorch: nothing of transformers' interface."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.qkv = nn.Linear(64, 3 * 64, bias=False)
        self.out = nn.Linear(64, 64, bias=False)

    def heads(self, hidden_states):
        qkv = self.qkv(hidden_states).unflatten(-1, (3, 4, 16))
        return qkv.permute(2, 0, 3, 1, 4)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        q, k, v = self.heads(hidden_states)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2)), None


def own_forward(self, hidden_states, attention_mask=None, **kwargs):
    q, k, v = self.heads(hidden_states)
    o, _ = sparse_attention(self, q, k, v, attention_mask, **kwargs)
    return self.out(o.flatten(2)), None


@pytest.fixture
def own_class():
    sizes = dict(hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, v_head_dim=16)
    register_attention(OwnAttention, own_forward, lambda module: sizes)
    yield
    layers.FORWARDS.pop(OwnAttention)
    layers._SIZES_OF.pop(OwnAttention)


def test_a_registered_class(own_class):
    model, ids = model_of("Llama"), tokens(2, 150)
    torch.manual_seed(0)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = OwnAttention(model.config, i)
    with torch.no_grad():
        expected = model(ids[:, :90], use_cache=False).logits
        report = patch_model(model, "tiny", verbose=False)
        assert report.layers == (0, 1)
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.gate.weight)
            layer.self_attn.gate.bias.view(-1, 3).copy_(torch.tensor([-120.0, 40.0, -120.0]))
        found = model(ids[:, :90], use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

        scramble(model)
        padded, mask = ids.clone(), torch.ones_like(ids)
        padded[0, :20] = mask[0, :20] = 0
        alone = model(ids[:1, 20:], use_cache=False).logits
        together = model(padded, attention_mask=mask, use_cache=False).logits[:1, 20:]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    unpatch_model(model)
    assert type(model.model.layers[0].self_attn) is OwnAttention


def test_an_unregistered_class_is_not_recognised():
    model = model_of("Llama")
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = OwnAttention(model.config, i)
    assert "register_attention" in str(explain_model(model))
    with pytest.raises(TypeError, match="register_attention"):
        patch_model(model, "tiny")


# --- A path alone ---------------------------------------------------------------------------------

BY_ITS_PATH = """
import sys, torch, transformers
assert "nsa_fsa" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model(torch.arange(1, 151)[None] % 90 + 1).logits.double().sum().item())
"""


def test_a_path_alone_is_enough_for_other_tools(tmp_path):
    model = model_of("Mistral")
    patch_model(model, "tiny", verbose=False)
    scramble(model).save_pretrained(tmp_path)
    script = (tmp_path / "modeling_nsa.py").read_text()
    assert script == (
        "from nsa_fsa.integrations.transformers import NSAMistralConfig, NSAMistralForCausalLM\n"
    )
    command = [sys.executable, "-c", BY_ITS_PATH, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    name, total = run.stdout.split()
    with torch.no_grad():
        expected = model(torch.arange(1, 151)[None] % 90 + 1).logits.double().sum().item()
    assert name == "NSAMistralForCausalLM"
    assert float(total) == pytest.approx(expected, rel=1e-9)


# --- Classes of one's own, once more --------------------------------------------------------------


class Plain(nn.Module):
    """Attention that calls no interface."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


class Calls(transformers.models.llama.modeling_llama.LlamaAttention):
    """Its forward is another's, with something around it."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_class_that_calls_no_interface_needs_a_forward():
    with pytest.raises(ValueError, match=r"Plain does not call .*forward=.*sparse_attention"):
        register_attention(Plain)
    with pytest.raises(ValueError, match=r"must be a class of nn\.Module"):
        register_attention(nn.Linear(2, 2))


def test_a_class_may_be_registered_again(monkeypatch):
    """As in a notebook, where its forward is mended."""
    monkeypatch.setattr(layers, "FORWARDS", registered := {})
    monkeypatch.setattr("nsa_fsa.integrations.transformers.attention.FORWARDS", registered)
    ran, original = [], transformers.models.llama.modeling_llama.LlamaAttention.forward
    for number in range(2):
        model = model_of("Llama")

        def forward(self, *args, number=number, **kwargs):
            ran.append(number)
            return original(self, *args, **kwargs)

        register_attention(type(model.model.layers[0].self_attn), forward)
        patch_model(model, "tiny", verbose=False)
        model(tokens(1, 20))
    assert ran == [0, 0, 1, 1]


@torch.no_grad()
def test_a_forward_around_a_known_one_is_seen():
    model = model_of("Llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Calls
    assert str(explain_model(model)).count("(Calls): NSA") == 2
    assert patch_model(model, "tiny", verbose=False).layers == (0, 1)
    assert model(tokens(1, 20)).logits.isfinite().all()


@torch.no_grad()
def test_a_decoder_that_takes_nothing_more():
    """Its forward has no **kwargs, by which others hand on what they do not know."""
    model = model_of("Llama").eval()
    decoder = type(model.model)

    class Narrow(decoder):
        def forward(
            self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None
        ):
            return super().forward(
                input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache
            )

    model.model.__class__ = Narrow
    patch_model(model.model, "tiny", verbose=False)
    scramble(model.model)
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    found = model.model(ids, attention_mask=mask, use_cache=False)[0]
    alone = model.model(ids[:1, 9:], use_cache=False)[0]
    torch.testing.assert_close(found[:1, 9:], alone, rtol=1e-4, atol=1e-4)
