"""Every way to say what patch_model is to make, of which layers, and what a second call keeps."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from nsa_fsa import NSAConfig
from nsa_fsa.integrations.transformers import patch_model, unpatch_model
from tests.integrations.models import (
    LEFT_TO_DENSE,
    assert_same,
    attentions,
    dense_model,
    output,
    patched_nsa,
    snapshot,
    sparse_layers,
    sparse_model,
    tiny_nsa,
    tokens,
)


def settings_of(model):
    return [attention.nsa_config for attention in attentions(model)]


def yaml_of(config, folder):
    path = folder / f"window_{config.window_size}.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


@pytest.mark.parametrize(
    "form",
    ["name", "path", "text path", "dict", "keywords", "config and keyword", "preset and dict"],
)
def test_every_form_of_the_settings(tmp_path, form):
    """Compressed keys are rotated ones unless somebody says "after", such as a file."""
    model = dense_model()
    compress_rope = "after" if form == "path" else "before"
    arguments = {
        "name": dict(config="tiny", window_size=64),
        "path": dict(
            config=yaml_of(tiny_nsa(model, window_size=64, compress_rope="after"), tmp_path)
        ),
        "text path": dict(config=str(yaml_of(tiny_nsa(model), tmp_path)), window_size=64),
        "dict": dict(config=dict(preset="tiny", window_size=64)),
        "keywords": dict(preset="tiny", window_size=64),
        "config and keyword": dict(config=tiny_nsa(model), window_size=64),
        "preset and dict": dict(config=dict(window_size=64), preset="tiny"),
    }[form]
    patch_model(model, **arguments, verbose=False)
    expected = patched_nsa(model, window_size=64, compress_rope=compress_rope)
    assert settings_of(model) == [expected, expected]


def test_the_yaml_file_of_a_known_model():
    """What configs/ has for Llama 3 8B patches a model of that shape;
    no memory is needed for one on the meta device.
    """
    sizes = dict(
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=1,
        vocab_size=100,
    )
    file = Path(__file__).parents[2] / "configs" / "llama3-8b.yaml"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, head_dim=128))
        patch_model(model, file, verbose=False)
    wanted = dataclasses.replace(NSAConfig.from_yaml(file), **LEFT_TO_DENSE)
    assert settings_of(model) == [wanted]


LAYERS = [
    1,
    -1,
    [-1],
    (1,),
    {1},
    range(1, 2),
    np.array([1]),
    np.int64(1),
    torch.tensor([1]),
    torch.tensor(1),
    iter([1]),
]


@pytest.mark.parametrize(
    "layers",
    LAYERS,
    ids=lambda x: f"{type(x).__name__} {x}" if isinstance(x, int) else type(x).__name__,
)
def test_every_form_of_layers(tmp_path, layers):
    model = dense_model()
    report = patch_model(model, "tiny", layers=layers, verbose=False)
    assert sparse_layers(model) == [1]
    assert report.layers == (1,)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["nsa"]["layers"] == [1]


def test_settings_by_layer():
    """In one call, and in a second one for a layer that is still dense."""
    model, ids = dense_model(num_hidden_layers=3), tokens(1, 200)
    tiny, wide = patched_nsa(model), patched_nsa(model, window_size=64)
    report = patch_model(model, {0: "tiny", -1: dict(preset="tiny", window_size=64)}, verbose=False)
    assert sparse_layers(model) == [0, 2]
    assert report.configs == {0: tiny, 2: wide}
    assert "layers with other settings than these, which are of layer 0: 2" in str(report)
    parts = [attentions(model)[i].gate for i in (0, 2)]
    report = patch_model(model, layers=1, preset="tiny", num_selected_blocks=3, verbose=False)
    assert (report.layers, report.dense_layers, report.started_anew) == ((0, 1, 2), (), ())
    assert [attentions(model)[i].gate for i in (0, 2)] == parts
    assert settings_of(model) == [tiny, patched_nsa(model, num_selected_blocks=3), wide]
    together = dense_model(num_hidden_layers=3)
    patch_model(together, dict(enumerate(settings_of(model))), verbose=False)
    assert torch.equal(output(model, ids), output(together, ids))
    assert type(unpatch_model(model)) is transformers.LlamaForCausalLM
    assert sparse_layers(model) == []


@pytest.mark.parametrize(
    "settings", [{"0": "tiny", "-1": dict(preset="tiny", window_size=64)}, {0: "tiny", "2": "tiny"}]
)
def test_settings_by_layer_with_the_keys_of_json(settings):
    model = dense_model(num_hidden_layers=3)
    patch_model(model, settings, verbose=False)
    assert sparse_layers(model) == [0, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"config=\{\} is not allowed: it names no layer and no setting. Fix: leave it out"),
        (
            {"0": "tiny", "window_size": 64},
            r"has the keys \['0'\] where names of settings must be. Fix: config=\{0: ",
        ),
        (
            {0: "tiny", "window_size": 64},
            r"has the keys \[0\] where names of settings must be. Fix: config=\{0: ",
        ),
        ({"2": "tiny"}, r"layers=2 must be an index.*0 .. 1"),
        ({"0": "tiny", 0: "tiny"}, r"layer 0 is named twice"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [dense_model, sparse_model])
def test_settings_of_neither_form_are_refused(make, settings, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        patch_model(model, settings, verbose=False)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("key", [(0, 2), range(0, 3, 2), (0, -1)], ids=str)
def test_settings_for_several_layers_at_once(key):
    model = dense_model(num_hidden_layers=4 if key == (0, 2) else 3)
    report = patch_model(model, {key: "tiny"}, verbose=False)
    assert report.layers == (0, 2)
    assert sparse_layers(model) == [0, 2]


CHANGES = [
    dict(kernel_size=8, kernel_stride=4),
    dict(kernel_stride=4),
    dict(compress_k="linear"),
    dict(compress_v="mean"),
    dict(gate="per_token"),
    dict(num_kv_heads=4),
    dict(compress_position_embedding=True),
    dict(backend="reference"),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_config_that_does_not_fit_the_modules_is_refused(changes):
    """Assigned to a layer, half of it would run: compressors and gates are made for what they
    were built with.
    """
    model, ids = sparse_model(), tokens(1, 130)
    attention = attentions(model)[0]
    before = attentions(model)[0].nsa_config
    expected = output(model, ids)
    names = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    with pytest.raises(
        ValueError, match=rf"settings of layer 0 cannot be.*{names}.*Fix: patch_model"
    ):
        attention.nsa_config = dataclasses.replace(before, window_size=7, **changes)
    assert attention.nsa_config is before
    assert torch.equal(output(model, ids), expected)
    attention.nsa_config = dataclasses.replace(
        before, window_size=7, num_selected_blocks=3, block_size=32
    )
    assert (output(model, ids) - expected).abs().max() > 1e-3


def test_patching_again_keeps_what_was_learned():
    model, ids = sparse_model(layers=[1]), tokens(1, 200)
    attentions(model)[1].gate.requires_grad_(False)
    learned, before = dict(model.named_parameters()), output(model, ids)
    report = patch_model(model, window_size=64, num_selected_blocks=3, verbose=False)
    assert (report.layers, report.started_anew, report.already_patched) == ((1,), (), False)
    assert report.config == patched_nsa(
        model, window_size=64, num_selected_blocks=3, gate_init="balanced", compress_rope="after"
    )
    for name, parameter in model.named_parameters():
        assert parameter is learned[name], name  # an optimizer goes on with them
        assert parameter.requires_grad == (".gate." not in name)
    assert (output(model, ids) - before).abs().max() > 1e-3
    patch_model(model, window_size=32, num_selected_blocks=6, verbose=False)
    assert torch.equal(output(model, ids), before)


def test_the_report_says_that_gates_are_kept():
    model = dense_model()
    assert "gates: balanced" in str(patch_model(model, "tiny", gate_init="balanced", verbose=False))
    report = str(patch_model(model, gate_init="dense", verbose=False))
    assert "gates: those that fit are kept as they are; new ones start dense" in report
    assert (attentions(model)[0].gate.bias == 0).all()


def test_patching_again_says_what_starts_anew():
    model = sparse_model()
    gates = [attention.gate.weight for attention in attentions(model)]
    report = patch_model(
        model, {1: dict(preset="tiny", kernel_size=8, compress_v="linear")}, verbose=False
    )
    assert report.started_anew == ("1.compress_k", "1.compress_v")
    assert "started anew because the shape changed: 1.compress_k, 1.compress_v" in str(report)
    assert [attention.gate.weight for attention in attentions(model)] == gates
    assert (attentions(model)[1].compress_k.phi.logits == 0).all()
    assert not (attentions(model)[0].compress_k.phi.logits == 0).all()
    assert report.total_parameters == model.num_parameters()
    assert unpatch_model(model).config.model_type == "llama"


def test_patching_again_with_what_does_not_fit_changes_nothing():
    model = sparse_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="num_kv_heads=4 does not fit"):
        patch_model(model, {0: dict(window_size=64), 1: dict(num_kv_heads=4)}, verbose=False)
    patch_model(model, window_size=64, dry_run=True, verbose=False)
    assert_same(before, snapshot(model))


def test_a_part_of_a_patched_model_is_refused():
    model = sparse_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer 0 is patched already.*Fix"):
        patch_model(model.model, preset="tiny", verbose=False)
    assert_same(before, snapshot(model))


def test_what_is_no_model_is_refused():
    with pytest.raises(
        TypeError, match=r"str cannot be patched: it is no model.*Fix: patch a model"
    ):
        patch_model("a/name", "tiny")


@pytest.mark.parametrize("wrong", [torch.nn.Identity(), "mean"], ids=["module", "text"])
@pytest.mark.parametrize("name", ["compressor_k", "compressor_v"])
def test_a_compressor_that_makes_none_is_refused(name, wrong):
    """Every layer has its own, so patch_model wants what makes it,
    where the layer wants the module.
    """
    model = dense_model()
    with pytest.raises(
        ValueError,
        match=rf"{name} is a {type(wrong).__name__}; it must be a class or a function.*Fix",
    ):
        patch_model(model, "tiny", **{name: wrong})
    assert type(model) is transformers.LlamaForCausalLM
