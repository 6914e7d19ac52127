"""nsa_llama, nsa_qwen2, nsa_qwen3: checkpoints that load exactly, or not at all."""

import copy
import dataclasses
import functools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import nsa_fsa.integrations.transformers as integration
from nsa_fsa import NSAConfig
from nsa_fsa.config import PRESETS
from nsa_fsa.integrations.transformers import patch_model, unpatch_model
from nsa_fsa.modules import Compressor
from nsa_fsa.modules.compression import LinearPhi
from tests.integrations.families import clip_vision
from tests.integrations.models import (
    FAMILIES,
    LEFT_TO_DENSE,
    VOCAB,
    attentions,
    dense_config,
    dense_model,
    greedy,
    patched_nsa,
    scramble,
    sparse_layers,
    sparse_model,
    tokens,
)

CLASSES = {
    "llama": (
        integration.NSALlamaConfig,
        integration.NSALlamaForCausalLM,
        integration.NSALlamaModel,
    ),
    "qwen2": (
        integration.NSAQwen2Config,
        integration.NSAQwen2ForCausalLM,
        integration.NSAQwen2Model,
    ),
    "qwen3": (
        integration.NSAQwen3Config,
        integration.NSAQwen3ForCausalLM,
        integration.NSAQwen3Model,
    ),
}
IDS = tokens(2, 150)


def output(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False)[0]


def assert_same_model(loaded, saved):
    assert type(loaded) is type(saved)
    assert loaded.config.nsa == saved.config.nsa
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
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]


@pytest.mark.parametrize(
    "nsa",
    [
        dict(
            compress_k="mlp",
            compress_v="gated",
            compress_position_embedding=True,
            compress_hidden_size=12,
        ),
        dict(compress_k="mean", compress_v="linear", compress_rope="before", gate="per_token"),
        dict(window_size=7, num_selected_blocks=3, init_blocks=0, gate_init="dense"),
    ],
    ids=str,
)
def test_settings_round_trip(tmp_path, nsa):
    model = sparse_model(nsa=nsa)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert attentions(loaded)[0].nsa_config == attentions(model)[0].nsa_config
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
    assert_same_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.bfloat16), model
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_what_was_loaded(tmp_path, family):
    """What users do: load a dense checkpoint, patch, save, load;
    and unpatch, which gives the dense checkpoint back.
    """
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
    assert (tmp_path / "again" / "config.json").read_bytes() == (
        tmp_path / "dense" / "config.json"
    ).read_bytes()
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
    assert not {"nsa", "layer_types"} & settings.keys()
    assert again.config.model_type == "llama"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(output(dense), output(unpatch_model(model)))


def test_base_model_from_a_causal_checkpoint(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output(base.eval()), output(model.model))


# --- Sparse, or not at all ------------------------------------------------------------------------


def llava():
    config = transformers.LlavaConfig(
        text_config=dense_config(), vision_config=clip_vision(16, 8, 4), image_token_index=96
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


STOCK = [
    "LlamaForCausalLM",
    "LlamaModel",
    "LlamaForSequenceClassification",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
]


@pytest.mark.parametrize(
    "arguments",
    [{}, dict(attn_implementation="sdpa"), dict(attn_implementation="nsa_fsa")],
    ids=str,
)
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_class_refuses_the_checkpoint(tmp_path, name, arguments):
    """Here with this package imported, and with what users pass to from_pretrained."""
    sparse_model("qwen3" if "Qwen3" in name else "llama", layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(
        Exception, match=r"sparse: import nsa_fsa\.integrations\.transformers, then load with Auto"
    ):
        getattr(transformers, name).from_pretrained(tmp_path, **arguments)


def test_an_auto_class_without_a_sparse_model_refuses(tmp_path):
    """A head that transformers has no Llama with; with others the checkpoint loads."""
    model = sparse_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NSALlamaConfig"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is integration.NSALlamaForSequenceClassification
    assert torch.equal(output(loaded.model), output(model.model))


@pytest.mark.filterwarnings("ignore:attn_implementation=")
@pytest.mark.parametrize("name", [None, "sdpa", "eager"])
def test_a_stock_class_given_the_sparse_config_refuses_to_run(tmp_path, name):
    """In whatever way it is given, and whatever attention it is told to use."""
    model = sparse_model(layers=[1])
    model.save_pretrained(tmp_path)
    stock = transformers.LlamaForCausalLM
    arguments = {} if name is None else dict(attn_implementation=name)
    config = AutoConfig.from_pretrained(tmp_path, **arguments)
    assigned = copy.deepcopy(model.config)
    assigned._attn_implementation = name
    for dense in (
        stock(config),
        stock(assigned),
        stock(integration.NSALlamaConfig(**dense_config().to_dict(), **arguments)),
        stock._from_config(config, **arguments),
        stock.from_pretrained(tmp_path, config=config, **arguments),
        stock.from_pretrained(tmp_path, config=model.config, **arguments),
    ):
        with pytest.raises(RuntimeError, match=r"is dense, but its config.*Fix"):
            dense(IDS)
        if name is not None:
            dense.set_attn_implementation(name)
        with pytest.raises(RuntimeError, match=r"is dense, but its config.*Fix"):
            dense(IDS)


@pytest.mark.filterwarnings("ignore:attn_implementation=")
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_implementation_is_no_matter_for_sparse_layers(tmp_path, name):
    """What users pass to every model, and what a larger model is told for its other parts."""
    model = sparse_model(layers=[1])
    model.save_pretrained(tmp_path / "llama")
    model.set_attn_implementation(name)
    assert_same_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation=name), model
    )
    model = llava_around_a_patched_base()
    model.save_pretrained(tmp_path / "llava")
    kind = transformers.AutoModelForImageTextToText
    loaded = kind.from_pretrained(tmp_path / "llava", attn_implementation=name).eval()
    assert loaded.config.vision_config._attn_implementation == name
    assert torch.equal(output(loaded), output(model))
    model.set_attn_implementation(name)
    assert model.config.vision_config._attn_implementation == name
    assert torch.equal(output(loaded), output(model))


def test_a_sparse_language_model_inside_a_llava(tmp_path):
    """The whole loads sparse, and unpatching the part undoes what was written into the
    whole's config.
    """
    model, other = llava(), llava()
    config = other.config = other.model.config = model.config  # both are made from one config
    expected = output(model)
    patch_model(model.model.language_model, "tiny", verbose=False)
    scramble(model).save_pretrained(tmp_path)
    assert config.text_config.model_type == "llama"  # the other's is as it was
    assert model.config is model.model.config
    assert model.config.text_config is model.model.language_model.config
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded.model.language_model) is integration.NSALlamaModel
    assert torch.equal(output(loaded), output(model))
    assert (output(model) - expected).abs().max() > 1e-3
    assert unpatch_model(model) is model
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path / "dense")
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "dense")
    assert torch.equal(output(loaded), expected)


def test_plain_transformers_refuses_the_checkpoint(tmp_path):
    """Loading it dense would be silently wrong. A new process, in which nobody imports nsa_fsa."""
    model = llava()
    patch_model(model.model.language_model, "tiny", verbose=False)
    model.save_pretrained(tmp_path / "llava")
    sparse_model().save_pretrained(tmp_path / "llama")
    attempts = {
        "llama": ("AutoModelForCausalLM", "LlamaForCausalLM", "LlamaModel"),
        "llava": ("LlavaForConditionalGeneration",),
    }
    code = (
        f"import sys, transformers\nfor folder, names in {attempts!r}.items():\n    "
        "for name in names:\n        try:\n            getattr(transformers, "
        f"name).from_pretrained({str(tmp_path)!r} + '/' + folder)\n            "
        "print(name, 'loaded')\n        except Exception as error:\n            text = str(error)\n"
        "            words = ('nsa_llama', 'import nsa_fsa', 'trust_remote_code=True')\n"
        "            said = any(word in text for word in words)\n"
        "            print()\n            print(name, said, 'nsa_fsa' in sys.modules)\n"
    )
    names = [name for group in attempts.values() for name in group]
    lines = [line for line in in_a_new_process(code) if line.startswith(tuple(names))]
    assert lines == [f"{name} True False" for name in names]


def test_plain_transformers_trusts_the_checkpoint(tmp_path):
    """The code that it holds is a line that imports nsa_fsa, which has to be installed."""
    model = sparse_model(layers=[1])
    model.save_pretrained(tmp_path)
    assert len((tmp_path / "modeling_nsa.py").read_text().splitlines()) == 1
    code = (
        "import transformers\nmodel = transformers.AutoModelForCausalLM.from_pretrained("
        f"{str(tmp_path)!r}, trust_remote_code=True)\nprint(type(model).__name__)\n"
        "from nsa_fsa.integrations.transformers import NSAAttention\n"
        "print([isinstance(x.self_attn, NSAAttention) for x in model.model.layers])"
    )
    assert in_a_new_process(code)[-2:] == ["NSALlamaForCausalLM", "[False, True]"]


def test_a_class_that_nobody_can_import_is_in_no_file(tmp_path):
    """A subclass of a user's own loads by its path as the class that it is a subclass of."""

    class Own(transformers.LlamaForCausalLM):
        pass

    model = sparse_model()
    model.__class__ = integration.models.sparse_class(Own)
    model.save_pretrained(tmp_path)
    line = (tmp_path / "modeling_nsa.py").read_text()
    assert line == "from nsa_fsa.integrations.transformers import NSALlamaConfig\n"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_nsa.NSALlamaConfig"
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is integration.NSALlamaForCausalLM
    assert torch.equal(output(loaded.eval()), output(model))


def test_a_family_of_a_users_own_says_how_its_checkpoint_loads(tmp_path):
    class ToyConfig(transformers.LlamaConfig):
        model_type = "toy_family"

    class Toy(transformers.LlamaForCausalLM):
        config_class = ToyConfig

    model = Toy(ToyConfig(**dense_config().to_diff_dict())).eval()
    patch_model(model, "tiny", verbose=False)
    with pytest.warns(UserWarning, match=r"Toy is no class of transformers.*AutoConfig\.register"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_nsa.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_what_others_ask_a_config(tmp_path):
    """TRL asks for its `auto_map`, and AutoConfig for names that there are not."""
    sparse_model().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).auto_map == {}
    for name in ("NSAPreTrainedModel", "NSAPreTrainedConfig", "NSANothing"):
        assert not hasattr(integration, name) or name == "NSAPreTrainedConfig"
    with pytest.raises(ValueError, match="nsa_nsa_llama"):
        AutoConfig.for_model("nsa_nsa_llama")


def test_a_llava_of_different_layers_loads_with_other_settings(tmp_path):
    model = llava()
    settings = {0: dict(window_size=16), 1: dict(window_size=24)}
    patch_model(model, {i: {"preset": "tiny", **x} for i, x in settings.items()}, verbose=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, nsa=dict(num_selected_blocks=5)
    )
    configs = [x.self_attn.nsa_config for x in loaded.model.language_model.layers]
    assert [(x.window_size, x.num_selected_blocks) for x in configs] == [(16, 5), (24, 5)]


def in_a_new_process(code):
    """What it prints, line by line."""
    settings = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, "-c", code], check=True, **settings)
    return done.stdout.splitlines()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_older_versions(tmp_path, family):
    """Their config.json has no field that only we read."""
    model = sparse_model(family, layers=[1])
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    if family == "llama":
        del settings["layer_types"]
    else:
        settings["layer_types"] = ["full_attention"] * 2
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_that_were_set_to_full_attention(tmp_path, family):
    """By hand, against what the class would fill in."""
    settings = dict(
        use_sliding_window=True,
        sliding_window=32,
        max_window_layers=1,
        layer_types=["full_attention"] * 2,
    )
    model = sparse_model(family, **settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert unpatch_model(loaded).config.layer_types == ["full_attention"] * 2


# --- What runs is what is saved -------------------------------------------------------------------


def test_settings_changed_while_training(tmp_path):
    model = sparse_model()
    first, second = attentions(model)
    first.nsa_config = dataclasses.replace(first.nsa_config, num_selected_blocks=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [attention.nsa_config for attention in attentions(loaded)] == [
        first.nsa_config,
        second.nsa_config,
    ]
    assert_same_model(loaded, model)


def llama_around_a_patched_base():
    model = dense_model()
    patch_model(model.model, "tiny", gate_init="balanced", verbose=False)
    return scramble(model)


def llava_around_a_patched_base():
    model = llava()
    patch_model(model.model.language_model, "tiny", gate_init="balanced", verbose=False)
    return scramble(model)


def of_another_config_object():
    model = sparse_model()
    model.config = copy.deepcopy(model.config)
    return model


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "how", [lambda model: model, copy.deepcopy, pickled], ids=["itself", "deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "make",
    [
        sparse_model,
        of_another_config_object,
        llama_around_a_patched_base,
        llava_around_a_patched_base,
    ],
)
def test_settings_changed_while_training_whoever_saves(tmp_path, make, how):
    """A larger model knows nothing of its sparse part, and a copy must not follow its original."""
    original = make()
    model = how(original)
    sparse = [module for module in model.modules() if isinstance(module, integration.NSAAttention)]
    sparse[0].nsa_config = dataclasses.replace(sparse[0].nsa_config, num_selected_blocks=3)
    for saved, count in [(model, 3), (original, 3 if model is original else 6)]:
        saved.save_pretrained(tmp_path)
        kind = (
            transformers.AutoModelForImageTextToText
            if hasattr(saved.model, "language_model")
            else AutoModelForCausalLM
        )
        loaded = kind.from_pretrained(tmp_path).eval()
        configs = [
            module.nsa_config
            for module in loaded.modules()
            if isinstance(module, integration.NSAAttention)
        ]
        assert [config.num_selected_blocks for config in configs] == [count, 6]
        assert torch.equal(output(loaded), output(saved))


def test_models_made_from_the_config_of_another(tmp_path):
    """Each has its own settings from then on, and starts with those that the other has now."""
    first = sparse_model()
    attentions(first)[1].nsa_config = dataclasses.replace(
        attentions(first)[1].nsa_config, window_size=7
    )
    second = integration.NSALlamaForCausalLM(first.config)
    assert [attention.nsa_config.window_size for attention in attentions(second)] == [32, 7]
    attentions(second)[0].nsa_config = dataclasses.replace(
        attentions(second)[0].nsa_config, window_size=9
    )
    for model, windows in ((first, [32, 7]), (second, [9, 7])):
        model.config.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        assert [attention.nsa_config.window_size for attention in attentions(loaded)] == windows


def test_settings_by_layer_round_trip(tmp_path):
    model = dense_model(num_hidden_layers=4)
    patch_model(
        model,
        {0: "tiny", 1: dict(preset="tiny", window_size=8, compress_k="linear"), 3: "tiny"},
        verbose=False,
    )
    scramble(model).save_pretrained(tmp_path)
    nsa = json.loads((tmp_path / "config.json").read_text())["nsa"]
    assert nsa["per_layer"] == {"1": {"window_size": 8, "compress_k": "linear"}}
    assert nsa["layers"] == [0, 1, 3]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    prompt = IDS[:1, :120]
    assert torch.equal(
        loaded.generate(prompt, max_new_tokens=5, do_sample=False), greedy(model, prompt, 5)
    )


@pytest.mark.parametrize("key", [1, "1", -1, "-1"])
def test_settings_by_layer_of_a_config(tmp_path, key):
    nsa = dict(preset="tiny", per_layer={key: dict(window_size=3)})
    model = integration.NSALlamaForCausalLM(
        integration.NSALlamaConfig(**dense_config().to_dict(), nsa=nsa)
    ).eval()
    assert [attention.nsa_config.window_size for attention in attentions(model)] == [32, 3]
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_preset_of_one_layer_stands_for_its_fields():
    nsa = dict(window_size=64, gate="per_token", per_layer={1: dict(preset="tiny", init_blocks=0)})
    model = integration.NSALlamaForCausalLM(
        integration.NSALlamaConfig(**dense_config().to_dict(), nsa=nsa)
    )
    first, second = configs(model)
    assert (first.window_size, first.block_size, first.gate) == (64, 64, "per_token")
    assert second == dataclasses.replace(first, **{**PRESETS["tiny"], "init_blocks": 0})


@pytest.mark.parametrize(
    ("nsa", "message"),
    [
        (dict(per_layer={9: dict(window_size=3)}), "layers=9 must be an index.*0 .. 1"),
        (dict(per_layer={"first": dict(window_size=3)}), "layers='first' must be an index.*0 .. 1"),
        (
            dict(per_layer={0: dict(window_size=3)}, layers=[1]),
            r"per_layer names layers \[0\].*layers=\[1\].*Fix",
        ),
        (
            dict(per_layer={1: dict(window_size=3), "-1": dict(window_size=5)}),
            r"layer 1 is named twice.*Fix",
        ),
        (dict(per_layer=[dict(window_size=3)]), r"per_layer=\[.* is not allowed.*Fix: per_layer="),
        (dict(per_layer={0: 3}), r"per_layer=\{0: 3\} is not allowed.*Fix: per_layer="),
    ],
    ids=str,
)
def test_settings_of_no_layer_are_refused(nsa, message):
    config = integration.NSALlamaConfig(**dense_config().to_dict(), nsa=dict(preset="tiny", **nsa))
    with pytest.raises(ValueError, match=message):
        integration.NSALlamaForCausalLM(config)


def test_a_model_that_lost_its_sparse_layers(tmp_path):
    """Its file says so when it is loaded, and the model can be unpatched."""
    model = sparse_model(layers=[0])
    model.model.layers[0].self_attn = copy.deepcopy(model.model.layers[1].self_attn)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers=\[\] must be.*at least one"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(unpatch_model(model)) is transformers.LlamaForCausalLM


class LastToken(torch.nn.Module):
    """A compressor of one's own: the window's last token, scaled."""

    def __init__(self, config):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((config.num_kv_heads, 1), 1.5))

    def forward(self, windows):
        return windows[:, :, -1] * self.scale


@pytest.mark.parametrize("how", ["argument", "by hand", "for one layer"])
def test_a_compressor_of_ones_own(tmp_path, how):
    """No file holds a class: refused, unless it is given again."""
    model = dense_model()
    patch_model(
        model,
        "tiny",
        gate_init="balanced",
        compressor_k=LastToken if how == "argument" else None,
        verbose=False,
    )
    for attention in attentions(model)[: {"argument": 0, "by hand": 2, "for one layer": 1}[how]]:
        c = attention.nsa_config
        attention.compress_k = Compressor(c, LastToken(c), c.head_dim)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"compressor_k of its own, tests.*LastToken.*Fix: from_pretrained\("
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, compressor_k=LastToken)
    assert_same_model(loaded, model)
    patch_model(loaded, window_size=8, verbose=False)  # and it stays where other settings change
    assert type(attentions(loaded)[0].compress_k.phi) is LastToken


class Blend(torch.nn.Module):
    """A compressor of one's own whose parts start in four ways: a number, torch's own start,
    a buffer, and one not saved.
    """

    def __init__(self, config):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor([0.25, 0.75]))
        self.map = torch.nn.Linear(config.head_dim, config.head_dim)
        self.register_buffer("scale", torch.tensor(1.5))
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)

    def forward(self, windows):
        mixed = self.share[0] * windows[:, :, 0] + self.share[1] * windows[:, :, -1]
        return self.map(mixed) * self.scale + self.offset


@pytest.mark.parametrize("missing", [None, "share", "map.weight", "map.bias", "scale"])
def test_what_a_checkpoint_lacks_of_a_compressor_of_ones_own_starts_as_it_is_made(
    tmp_path, missing
):
    """Of a dense checkpoint that is all of it."""
    path, dense = tmp_path / "model.safetensors", dense_model(num_hidden_layers=1)
    torch.manual_seed(0)
    expected = Blend(NSAConfig.from_pretrained_config(dense.config, "tiny")).state_dict()
    dense.save_pretrained(tmp_path)
    kept = {}
    if missing is not None:
        patch_model(dense, "tiny", gate_init="balanced", compressor_k=Blend, verbose=False)
        scramble(dense).save_pretrained(tmp_path)
        kept = {
            name: value
            for name, value in load_file(path).items()
            if not name.endswith(f"compress_k.phi.{missing}")
        }
        assert len(kept) == len(load_file(path)) - 1
        save_file(kept, path, metadata={"format": "pt"})
    torch.manual_seed(0)
    nsa = dict(preset="tiny") if missing is None else None
    loaded = integration.NSALlamaForCausalLM.from_pretrained(tmp_path, nsa=nsa, compressor_k=Blend)
    phi = attentions(loaded)[0].compress_k.phi
    for name, value in expected.items():
        was = kept.get(f"model.layers.0.self_attn.compress_k.phi.{name}", value)
        assert torch.equal(phi.state_dict()[name], was), name
    assert phi.offset == 0.5
    pickle.dumps(loaded)  # nothing of how it was made stays


def test_a_compressor_of_ones_own_has_the_dtype_of_the_model(tmp_path):
    """Its class learns nothing of the model but the NSAConfig."""
    dense_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    patch_model(model, "tiny", compressor_k=Blend, verbose=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, compressor_k=Blend)
    for found in (model, loaded):
        phi = attentions(found)[0].compress_k.phi
        assert {x.dtype for x in (*phi.parameters(), *phi.buffers())} == {torch.bfloat16}
    assert_same_model(loaded, model)


class Tied(torch.nn.Module):
    """A compressor of one's own with one parameter under two names."""

    def __init__(self, config):
        super().__init__()
        self.first, self.second = (
            torch.nn.Linear(config.head_dim, config.head_dim, bias=False) for _ in range(2)
        )
        self.second.weight = self.first.weight

    def forward(self, windows):
        return self.second(self.first(windows[:, :, -1]))


class FromNumpy(torch.nn.Module):
    """A compressor of one's own whose tensors have memory even where others are made without."""

    def __init__(self, config):
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.from_numpy(np.linspace(0, 1, config.kernel_size, dtype=np.float32))
        )
        self.register_buffer(
            "offset", torch.from_numpy(np.full(1, 0.5, dtype=np.float32)), persistent=False
        )

    def forward(self, windows):
        return torch.einsum("nhld,l->nhd", windows, self.weight) + self.offset


def one_for_all_layers(kind):
    """Makes the same module every time."""
    return functools.lru_cache(maxsize=None)(lambda config: kind(config))


def made_before(kind):
    phi = kind(NSAConfig.from_pretrained_config(dense_config(), "tiny"))
    return lambda config: phi


@pytest.mark.parametrize("kind", [Tied, FromNumpy, Blend])
@pytest.mark.parametrize(
    "how", [None, one_for_all_layers, made_before], ids=["each", "one", "before"]
)
def test_a_compressor_of_ones_own_starts_as_it_is_made_however_it_is_made(tmp_path, kind, how):
    dense_model(num_hidden_layers=2 if how else 1).save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = kind(NSAConfig.from_pretrained_config(dense_config(), "tiny"))
    torch.manual_seed(0)
    make = kind if how is None else how(kind)
    loaded = integration.NSALlamaForCausalLM.from_pretrained(
        tmp_path, nsa=dict(preset="tiny"), compressor_k=make
    )
    phis = [attention.compress_k.phi for attention in attentions(loaded)]
    assert all(phi is phis[0] for phi in phis)
    for found in ("named_parameters", "named_buffers"):
        of_phi, of_expected = (dict(getattr(phi, found)()) for phi in (phis[0], expected))
        assert of_phi.keys() == of_expected.keys()  # what is tied has one name
        for name, value in of_expected.items():
            assert torch.equal(of_phi[name], value), name


class OnTopOfLast(torch.nn.Module):
    """A compressor of one's own with a built-in one inside."""

    def __init__(self, config):
        super().__init__()
        self.inside = LinearPhi(config.num_kv_heads, config.kernel_size, config.head_dim)

    def forward(self, windows):
        return windows[:, :, -1] + self.inside(windows)


def test_a_compressor_with_a_built_in_inside(tmp_path):
    """It is not what the config names: refused like every other,
    and never loaded as the plain kind.
    """
    model = dense_model()
    patch_model(model, "tiny", gate_init="balanced", compressor_v=OnTopOfLast, verbose=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"compressor_v of its own, tests.*OnTopOfLast.*Fix: from_pretrained\("
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(
        AutoModelForCausalLM.from_pretrained(tmp_path, compressor_v=OnTopOfLast), model
    )


# --- Built directly -------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_constructed_with_defaults(family, base):
    config_class, causal, base_class = CLASSES[family]
    values = {
        k: v
        for k, v in dense_config(family).to_dict().items()
        if k not in ("model_type", "architectures")
    }
    model = (base_class if base else causal)(config_class(**values))
    assert sparse_layers(model) == [0, 1]
    config = attentions(model)[0].nsa_config
    new = dict(gate_init="balanced", compress_rope="after")
    alone = NSAConfig.from_pretrained_config(dense_config(family), **new)
    assert config == dataclasses.replace(alone, **LEFT_TO_DENSE)
    assert (config.block_size, config.num_selected_blocks, config.gate_init) == (64, 16, "balanced")
    assert output(model).shape == (2, 150, 64 if base else VOCAB)
    assert_new_parts_are_at_their_start(model, 0.0)


def assert_new_parts_are_at_their_start(model, gate=6.0):
    """Gates at sigmoid(-gate, gate, -gate) whatever the input, weighted compressors at the mean:
    not transformers' normal.
    """
    for i in sparse_layers(model):
        attention = attentions(model)[i]
        assert (attention.gate.weight == 0).all()
        assert torch.equal(
            attention.gate.bias.view(-1, 3), torch.tensor([-gate, gate, -gate]).expand(8, 3)
        )
        assert (attention.compress_k.phi.logits == 0).all()
        assert (attention.compress_v.phi.logits == 0).all()


def test_from_scratch():
    """Sizes come from the model's own config, the preset fills in the rest,
    and every gate starts at 1/2.
    """
    config = integration.NSALlamaConfig(
        **dense_config().to_dict(), nsa=dict(preset="tiny", window_size=64, layers=[-1])
    )
    model = integration.NSALlamaForCausalLM(config)
    assert sparse_layers(model) == [1]
    expected = patched_nsa(model, window_size=64, gate_init="balanced", compress_rope="after")
    assert attentions(model)[1].nsa_config == expected
    assert type(AutoModelForCausalLM.from_config(config)) is integration.NSALlamaForCausalLM


# --- From a config to its NSAConfig ---------------------------------------------------------------


def test_the_config_of_a_patched_model_gives_the_settings_of_its_layers(tmp_path):
    model = sparse_model(nsa=dict(window_size=7, compress_k="linear", gate="per_token"), layers=[1])
    (config,) = (attentions(model)[i].nsa_config for i in sparse_layers(model))
    model.save_pretrained(tmp_path)
    for hf_config in (model.config, AutoConfig.from_pretrained(tmp_path)):
        assert NSAConfig.from_pretrained_config(hf_config) == config
        assert NSAConfig.from_pretrained_config(hf_config, layer=-1) == config
        changed = NSAConfig.from_pretrained_config(hf_config, "fsa-128x8", num_selected_blocks=9)
        assert changed == dataclasses.replace(
            config, **{**PRESETS["fsa-128x8"], "num_selected_blocks": 9}
        )
    # and it is what runs now.
    attentions(model)[1].nsa_config = dataclasses.replace(config, window_size=9)
    assert NSAConfig.from_pretrained_config(model.config).window_size == 9
    for layer in (0, 2, -2, "1"):
        with pytest.raises(
            ValueError, match=rf"layer={layer!r} is not allowed.*one of \[1\].*Fix: layer=1"
        ):
            NSAConfig.from_pretrained_config(model.config, layer=layer)


def test_layers_with_different_settings_have_to_be_named():
    model = dense_model(num_hidden_layers=4)
    patch_model(model, {0: "tiny", 2: dict(preset="tiny", window_size=8), 3: "tiny"}, verbose=False)
    for i in (0, 2, 3):
        assert (
            NSAConfig.from_pretrained_config(model.config, layer=i)
            == attentions(model)[i].nsa_config
        )
    with pytest.raises(
        ValueError, match=r"the layers \[2\] have other settings.*one of \[0, 2, 3\]. Fix: layer=0"
    ):
        NSAConfig.from_pretrained_config(model.config)
    with pytest.raises(
        ValueError, match=r"layer=0 is not allowed with a LlamaConfig, which is dense.*Fix"
    ):
        NSAConfig.from_pretrained_config(unpatch_model(model).config, layer=0)


@pytest.mark.parametrize(
    "nsa",
    [None, dict(preset="tiny"), dict(preset="tiny", window_size=64, gate_init="dense")],
    ids=str,
)
def test_a_config_gives_the_settings_of_the_model_that_it_makes(nsa):
    config = integration.NSALlamaConfig(**dense_config().to_dict(), nsa=nsa)
    before = NSAConfig.from_pretrained_config(config)
    model = integration.NSALlamaForCausalLM(config)
    assert before == attentions(model)[0].nsa_config
    assert NSAConfig.from_pretrained_config(model.config) == before


def test_the_config_of_a_sparse_model_inside_a_llava():
    model = llava_around_a_patched_base()
    language_model = model.model.language_model
    assert (
        NSAConfig.from_pretrained_config(model.config.text_config)
        == attentions(language_model)[0].nsa_config
    )
    with pytest.raises(
        ValueError, match=r"model_type='llava' is not supported.*Fix: pass its text_config"
    ):
        NSAConfig.from_pretrained_config(model.config)


def test_a_compressor_of_ones_own_is_no_setting():
    model = dense_model()
    patch_model(model, "tiny", compressor_k=LastToken, verbose=False)
    assert NSAConfig.from_pretrained_config(model.config) == attentions(model)[0].nsa_config


# --- Settings given to from_pretrained ------------------------------------------------------------


def configs(model):
    return [attentions(model)[i].nsa_config for i in sparse_layers(model)]


@pytest.mark.parametrize("of", ["model", "auto class", "config"])
def test_settings_given_to_from_pretrained_change_only_themselves(tmp_path, of):
    model = dense_model(num_hidden_layers=3)
    own = dict(preset="tiny", compress_k="linear", gate_init="balanced")
    patch_model(
        model, {0: own, 2: {**own, "window_size": 8, "num_selected_blocks": 4}}, verbose=False
    )
    scramble(model).save_pretrained(tmp_path)
    nsa = dict(window_size=64)
    if of == "config":
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, config=AutoConfig.from_pretrained(tmp_path, nsa=nsa)
        )
    else:
        cls = integration.NSALlamaForCausalLM if of == "model" else AutoModelForCausalLM
        loaded = cls.from_pretrained(tmp_path, nsa=nsa)
    assert sparse_layers(loaded) == [0, 2]
    assert configs(loaded) == [
        dataclasses.replace(config, window_size=64) for config in configs(model)
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert configs(AutoModelForCausalLM.from_pretrained(tmp_path, nsa={})) == configs(model)
    assert configs(AutoModelForCausalLM.from_pretrained(tmp_path, nsa=None)) == configs(model)
    one = AutoModelForCausalLM.from_pretrained(
        tmp_path, nsa=dict(per_layer={2: dict(window_size=16)})
    )
    assert [config.window_size for config in configs(one)] == [32, 16]


def test_settings_given_for_one_layer_keep_what_that_layer_and_others_have(tmp_path):
    model = dense_model(num_hidden_layers=3)
    own = dict(preset="tiny", gate_init="balanced")
    patch_model(
        model,
        {0: own, 1: {**own, "window_size": 8}, 2: {**own, "compress_k": "linear"}},
        verbose=False,
    )
    patch_model(model, layers=[2], compressor_v=LastToken, verbose=False)
    scramble(model).save_pretrained(tmp_path)
    nsa = dict(num_selected_blocks=5, per_layer={-1: dict(window_size=16)})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, nsa=nsa, compressor_v=LastToken)
    first, second, third = (
        dataclasses.replace(config, num_selected_blocks=5) for config in configs(model)
    )
    assert configs(loaded) == [first, second, dataclasses.replace(third, window_size=16)]
    assert [type(x.compress_v.phi).__name__ for x in attentions(loaded)] == [
        "PoolPhi",
        "PoolPhi",
        "LastToken",
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sparse_layers(
        AutoModelForCausalLM.from_pretrained(tmp_path, nsa=dict(layers=[0, -2]))
    ) == [0, 1]
    fewer = AutoModelForCausalLM.from_pretrained(
        tmp_path, num_hidden_layers=2, nsa=dict(layers=[-1])
    )
    assert configs(fewer) == configs(model)[1:2]


def test_settings_given_win_over_a_preset_of_one_layer():
    values = dict(
        **dense_config().to_dict(), nsa=dict(preset="fsa-64x16", per_layer={0: dict(preset="tiny")})
    )
    config = integration.NSALlamaConfig.from_dict(values, nsa=dict(window_size=64))
    windows = [
        (c.window_size, c.block_size) for c in configs(integration.NSALlamaForCausalLM(config))
    ]
    assert windows == [(64, 16), (64, 64)]


def test_a_preset_given_to_from_pretrained_stands_for_its_fields(tmp_path):
    model = sparse_model(
        nsa=dict(kernel_size=32, kernel_stride=16, block_size=64, gate="per_token")
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, nsa=dict(preset="fsa-64x16", window_size=100)
    )
    expected = dataclasses.replace(
        attentions(model)[0].nsa_config, **{**PRESETS["fsa-64x16"], "window_size": 100}
    )
    assert configs(loaded) == [expected, expected]


def test_settings_that_are_none_are_refused_by_from_pretrained(tmp_path):
    sparse_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no field 'window'; did you mean 'window_size'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, nsa=dict(window=64))
    with pytest.raises(
        ValueError, match=r"nsa='tiny' is not allowed.*Fix: nsa=\{\"preset\": \"tiny\"\}"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, nsa="tiny")


def test_a_dense_checkpoint_loaded_sparse_starts_dense(tmp_path):
    """As patch_model would make it."""
    dense_model().save_pretrained(tmp_path)
    loaded = integration.NSALlamaForCausalLM.from_pretrained(tmp_path, nsa=dict(preset="tiny"))
    assert attentions(loaded)[0].nsa_config == patched_nsa(loaded)
    assert_new_parts_are_at_their_start(loaded)


def test_what_is_no_sparse_config_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"NSALlamaForCausalLM needs an NSALlamaConfig, but got a LlamaConfig. Fix: ",
    ):
        integration.NSALlamaForCausalLM(dense_config())
    with pytest.raises(ValueError, match=r"nsa=\['tiny'\] is not allowed.*a dict.*Fix"):
        integration.NSALlamaConfig(nsa=["tiny"])
    with pytest.raises(
        ValueError, match=r"nsa='tiny' is not allowed.*a dict.*Fix: nsa=\{\"preset\": \"tiny\"\}"
    ):
        integration.NSALlamaConfig(nsa="tiny")
    with pytest.raises(
        ValueError, match=r"nsa=NSAConfig\(.*is not allowed.*a dict.*Fix: nsa=config.to_dict\(\)"
    ):
        integration.NSALlamaConfig(nsa=NSAConfig(hidden_size=64, num_heads=8))
    for key in (0, "0"):
        with pytest.raises(
            ValueError, match=r"nsa=\{'?0'?: .*is not allowed.*`per_layer`.*Fix: .*per_layer"
        ):
            integration.NSALlamaConfig(nsa={key: dict(preset="tiny")})
    config = integration.NSALlamaConfig(**dense_config().to_dict())
    config.nsa = "tiny"
    with pytest.raises(ValueError, match=r"nsa='tiny' is not allowed.*Fix"):
        integration.NSALlamaForCausalLM(config)
    sparse_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "nsa": [1, 2]}))
    with pytest.raises(ValueError, match=r"nsa=\[1, 2\] is not allowed.*Fix"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


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
    values = {
        k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")
    }
    nsa = NSAConfig.from_pretrained_config(dense.config, "tiny")
    config = config_class(**values, nsa=nsa.to_dict())
    loaded = causal.from_pretrained(tmp_path, config=config).eval()
    assert_new_parts_are_at_their_start(loaded)
    tensors = loaded.state_dict()
    for name, value in dense.state_dict().items():
        assert torch.equal(tensors[name], value), name
    patch_model(dense, nsa, verbose=False)
    assert torch.equal(output(loaded), output(dense))


@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "weighted", "mean"])
def test_every_compressor_starts_as_its_own_module_does(tmp_path, kind):
    """_init_weights must know every new kind of parameter; a dense checkpoint has none of them."""
    dense = dense_model()
    dense.save_pretrained(tmp_path)
    values = {
        k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")
    }
    nsa = NSAConfig.from_pretrained_config(
        dense.config, "tiny", compress_k=kind, compress_v=kind, compress_position_embedding=True
    )
    config = integration.NSALlamaConfig(**values, nsa=nsa.to_dict())
    loaded = integration.NSALlamaForCausalLM.from_pretrained(tmp_path, config=config).eval()
    patch_model(dense, nsa, verbose=False)
    expected = dense.state_dict()
    for name, value in loaded.state_dict().items():
        # Random: the right spread, and nothing left out.
        if kind == "mlp" and name.endswith(("phi.up", "phi.down")):
            assert value.std().item() == pytest.approx(value.shape[1] ** -0.5, rel=0.2), name
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["linear", "mlp", "gated", "weighted"])
@pytest.mark.parametrize("start", ["balanced", "dense"])
def test_a_missing_parameter_starts_and_the_others_are_loaded(tmp_path, kind, start):
    """Whichever one of NSA's parameters a checkpoint lacks: also those beside it in the
    same module.
    """
    nsa = dict(compress_k=kind, compress_v=kind, compress_position_embedding=True, gate_init=start)
    model = sparse_model(num_hidden_layers=1, nsa=nsa)
    model.save_pretrained(tmp_path)
    fresh = integration.NSALlamaForCausalLM(model.config).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    added = [
        name
        for name in tensors
        if any(part in name for part in (".gate.", ".compress_k.", ".compress_v."))
    ]
    assert len(added) == (2 + 2 * 3 if kind in ("mlp", "gated") else 2 + 2 * 2)
    for missing in added:
        kept = {name: value for name, value in tensors.items() if name != missing}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
        if missing.endswith((".up", ".down")):  # random
            assert loaded[missing].std().item() == pytest.approx(
                loaded[missing].shape[1] ** -0.5, rel=0.2
            ), missing
        else:
            assert torch.equal(loaded[missing], fresh[missing]), missing
        for name, value in kept.items():
            assert torch.equal(loaded[name], value), f"{name}, beside {missing}"


def test_weights_that_were_loaded_are_not_initialised_again(tmp_path):
    """As in a dense model: also in a copy, whose parameters nothing marks."""
    model = sparse_model()
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path))
    loaded.init_weights()
    assert_same_model(loaded, model)


def test_unknown_setting_in_a_checkpoint(tmp_path):
    """A checkpoint of a newer version: loud, with the name."""
    model = scramble(sparse_model())
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["nsa"]["block_siez"] = 16
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no field 'block_siez'; did you mean 'block_size'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
