"""nsa_llama, nsa_qwen2, nsa_qwen3: checkpoints that load exactly, or not at all."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import nsa_fsa.integrations.transformers as integration
from nsa_fsa import NSAConfig
from nsa_fsa.integrations.transformers import patch_model, unpatch_model
from tests.integrations.models import (
    FAMILIES,
    VOCAB,
    attentions,
    dense_config,
    dense_model,
    scramble,
    sparse_layers,
    sparse_model,
    tokens,
)

CLASSES = {
    "llama": (integration.NSALlamaConfig, integration.NSALlamaForCausalLM, integration.NSALlamaModel),
    "qwen2": (integration.NSAQwen2Config, integration.NSAQwen2ForCausalLM, integration.NSAQwen2Model),
    "qwen3": (integration.NSAQwen3Config, integration.NSAQwen3ForCausalLM, integration.NSAQwen3Model),
}
IDS = tokens(2, 150)


def output(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False)[0]


def assert_same_model(loaded, saved):
    assert type(loaded) is type(saved)
    assert loaded.config.nsa == saved.config.nsa
    assert loaded.config._attn_implementation == "nsa_fsa"
    assert sparse_layers(loaded) == sparse_layers(saved)
    tensors = loaded.state_dict()
    assert list(tensors) == list(saved.state_dict())
    for name, value in saved.state_dict().items():
        assert tensors[name].dtype == value.dtype, name
        assert torch.equal(tensors[name], value), name
    assert torch.equal(output(loaded.eval()), output(saved))


@pytest.mark.parametrize("layers", [None, [1]], ids=["full", "partial"])
@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, base, layers):
    """Through the class itself and through the Auto classes."""
    model = sparse_model(family, base, layers=layers)
    model.save_pretrained(tmp_path)
    for cls in (CLASSES[family][2 if base else 1], AutoModel if base else AutoModelForCausalLM):
        assert_same_model(cls.from_pretrained(tmp_path), model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CLASSES[family][0]
    assert config.model_type == f"nsa_{family}"
    assert config.nsa["layers"] == layers
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize(
    "nsa",
    [
        dict(compress_k="mlp", compress_v="gated", compress_position_embedding=True, compress_hidden_size=12),
        dict(compress_k="mean", compress_v="linear", compress_rope="before", gate="per_token"),
        dict(window_size=7, num_selected_blocks=3, init_blocks=0, gate_init="dense"),
    ],
    ids=str,
)
def test_settings_round_trip(tmp_path, nsa):
    model = sparse_model(nsa=nsa)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert attentions(loaded)[0].config == attentions(model)[0].config
    assert_same_model(loaded, model)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(tmp_path, tied):
    model = sparse_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same_model(loaded, model)


def test_bfloat16_and_sharded(tmp_path):
    sparse_model().save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.bfloat16), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_what_was_loaded(tmp_path, family):
    """What users do: load a dense checkpoint, patch, save, load; and unpatch, which gives the dense checkpoint back."""
    dense_model(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = output(model)
    patch_model(model, preset="tiny", verbose=False)
    assert model.config.model_type == f"nsa_{family}"
    scramble(model).save_pretrained(tmp_path / "sparse")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"), model)
    unpatch_model(model)
    assert model.config.model_type == family
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "dense" / "config.json").read_bytes()
    assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_twice(tmp_path):
    """What was loaded saves to the same, and unpatches to a plain dense model that saves as one."""
    model = sparse_model(layers=[1])
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert_same_model(again, model)

    unpatch_model(again)
    assert type(again) is transformers.LlamaForCausalLM
    assert type(again.config) is transformers.LlamaConfig
    assert not hasattr(again.config, "nsa")
    again.save_pretrained(tmp_path / "dense")
    settings = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert settings["model_type"] == "llama"
    assert "nsa" not in settings
    assert again.config.model_type == "llama"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(output(dense), output(unpatch_model(model)))


def test_base_model_from_a_causal_checkpoint(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output(base.eval()), output(model.model))


def test_plain_transformers_refuses_the_checkpoint(tmp_path):
    """Loading it dense would be silently wrong. A new process, in which nobody imports nsa_fsa."""
    sparse_model().save_pretrained(tmp_path)
    code = (
        "import sys, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
        "print('loaded', type(model).__name__, 'nsa_fsa' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0, done.stdout
    assert "loaded" not in done.stdout
    assert "nsa_llama" in done.stderr


# --- Built directly -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_constructed_with_defaults(family, base):
    config_class, causal, base_class = CLASSES[family]
    values = {k: v for k, v in dense_config(family).to_dict().items() if k not in ("model_type", "architectures")}
    model = (base_class if base else causal)(config_class(**values))
    assert sparse_layers(model) == [0, 1]
    config = attentions(model)[0].config
    assert config == NSAConfig.from_pretrained_config(model.config)
    assert (config.block_size, config.num_selected_blocks, config.gate_init) == (64, 16, "dense")
    assert output(model).shape == (2, 150, 64 if base else VOCAB)
    assert_new_parts_are_at_their_start(model)


def assert_new_parts_are_at_their_start(model):
    """Gates at sigmoid(-6, 6, -6) whatever the input, weighted compressors at the mean: not at transformers' normal init."""
    for i in sparse_layers(model):
        attention = attentions(model)[i]
        assert (attention.gate.weight == 0).all()
        assert torch.equal(attention.gate.bias.view(-1, 3), torch.tensor([-6.0, 6.0, -6.0]).expand(8, 3))
        assert (attention.compress_k.phi.logits == 0).all()
        assert (attention.compress_v.phi.logits == 0).all()


def test_a_constructed_model_equals_a_patched_one():
    patched = sparse_model()
    built = integration.NSALlamaForCausalLM(patched.config)
    built.load_state_dict(patched.state_dict())
    assert torch.equal(output(built.eval()), output(patched))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_dense_checkpoint_sparse(tmp_path, family):
    """The dense weights, and gates and compressors at their own start."""
    dense = dense_model(family)
    dense.save_pretrained(tmp_path)
    config_class, causal, _ = CLASSES[family]
    values = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    nsa = NSAConfig.from_pretrained_config(dense.config, "tiny").to_dict()
    loaded = causal.from_pretrained(tmp_path, config=config_class(**values, nsa=nsa)).eval()
    assert_new_parts_are_at_their_start(loaded)
    tensors = loaded.state_dict()
    for name, value in dense.state_dict().items():
        assert torch.equal(tensors[name], value), name
    patch_model(dense, preset="tiny", verbose=False)
    assert torch.equal(output(loaded), output(dense))


@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "weighted", "mean"])
def test_every_compressor_starts_as_its_own_module_does(tmp_path, kind):
    """_init_weights must know every new kind of parameter; a dense checkpoint has none of them."""
    dense = dense_model()
    dense.save_pretrained(tmp_path)
    values = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    nsa = NSAConfig.from_pretrained_config(
        dense.config, "tiny", compress_k=kind, compress_v=kind, compress_position_embedding=True
    )
    config = integration.NSALlamaConfig(**values, nsa=nsa.to_dict())
    loaded = integration.NSALlamaForCausalLM.from_pretrained(tmp_path, config=config).eval()
    patch_model(dense, nsa, verbose=False)
    expected = dense.state_dict()
    for name, value in loaded.state_dict().items():
        if kind == "mlp" and name.endswith(("phi.up", "phi.down")):  # random: the right spread, and nothing left out
            assert value.std().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.2), name
        else:
            assert torch.equal(value, expected[name]), name


def test_unknown_setting_in_a_checkpoint(tmp_path):
    """A checkpoint of a newer version: loud, with the name."""
    model = scramble(sparse_model())
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["nsa"]["block_siez"] = 16
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no field 'block_siez'; did you mean 'block_size'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
