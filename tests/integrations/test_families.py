"""Every family: what patch_model promises, for many of transformers' models."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from nsa_fsa.integrations.transformers import (
    NSAAttention,
    explain_model,
    patch_model,
    unpatch_model,
)
from nsa_fsa.integrations.transformers.layers import attention_layers
from nsa_fsa.integrations.transformers.models import sparse_class, sparse_config_class
from tests.integrations.families import FAMILIES, ROUTED_FAMILIES, family, tokens
from tests.integrations.models import errors_of_layers, scramble

REACH = 96  # keys that a query of the preset "tiny" selects: longer sequences are really sparse


def sparse(name):
    """The family's model, patched, with random gates and compressors."""
    model = family(name)
    patch_model(model, "tiny", verbose=False)
    return scramble(model)


def exact(name):
    """The same in float64."""
    model = sparse(name).double()
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"  # the others have no float64
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, NSAAttention)]


def output(model, ids, **arguments):
    """Logits, or the hidden states of a base model, without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments)[0]


def generates(name):
    return hasattr(FAMILIES[name](), "generate") and "," not in name


def assert_near(a, b, relative):
    assert (a - b).abs().max() <= relative * b.abs().max()


every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_starts_dense_and_comes_back_dense(name):
    model, ids = family(name), tokens(2, REACH - 6)
    before, expected = copy.deepcopy(model.state_dict()), output(model, ids)
    classes = [type(module) for module in model.modules()]
    report = patch_model(model, "tiny", verbose=False)
    assert report.layers, report
    if name not in ROUTED_FAMILIES:
        assert_near(output(model, ids), expected, 0.05)
    for layer in layers(model):
        torch.nn.init.zeros_(layer.gate.weight)
        with torch.no_grad():  # sigmoid(40) is 1 in float32
            layer.gate.bias.view(-1, 3).copy_(torch.tensor([-120.0, 40.0, -120.0]))
    assert_near(output(model, ids), expected, 1e-5)
    unpatch_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(output(model, ids), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(x, before[key]) for key, x in after.items())


@every_family
def test_equals_an_independent_nsa(name, monkeypatch):
    """On queries, keys and values of the model's own projections, norms and rotation."""
    model, ids = exact(name), tokens(2, 150)
    errors = errors_of_layers(monkeypatch)
    output(model, ids)
    assert len(errors) == len(layers(model))
    assert max(errors) < 1e-9


@pytest.mark.parametrize("name", [name for name in FAMILIES if generates(name)])
def test_generates_with_a_cache_as_without(name):
    model, ids = sparse(name), tokens(2, 120)
    options = dict(max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)

    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :17] = mask[0, :17] = 0
    alone = model.generate(ids[:1, 17:], **options)[0]
    for kind in (None, "static"):
        options["cache_implementation"] = kind
        together = model.generate(padded, attention_mask=mask, **options)
        assert torch.equal(together[0, 17:], alone)
        assert torch.equal(together[1], expected[1])


@every_family
def test_padded_as_alone(name):
    model, ids = exact(name), tokens(2, 130)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :20] = mask[0, :20] = 0
    # As `generate` counts them. Without, the others are off by a rotation of all tokens of a row;
    # HunYuan has weights between the rotation and the scores.
    absolute = name in ("GPT2", "HunYuanDenseV1")
    counted = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0)) if absolute else {}
    found = output(model, padded, attention_mask=mask, **counted)
    of_tokens = found.shape[1:2] == ids.shape[1:]
    assert_near(found[:1, 20:] if of_tokens else found[:1], output(model, ids[:1, 20:]), 1e-4)
    assert_near(found[1:], output(model, ids[1:]), 1e-4)


def has_linear_layers(name):
    return name == "Qwen3Next"  # which go on from one packed sequence to the next


@pytest.mark.parametrize(
    "name", [x for x in FAMILIES if "sequences" not in x and not has_linear_layers(x)]
)
def test_packed_as_separate(name):
    model, ids = exact(name), tokens(2, 130)
    packed = torch.cat((ids[:1, :110], ids[1:]), 1)
    positions = torch.cat((torch.arange(110), torch.arange(130)))[None]
    if name.endswith("-VL"):  # of text, and of text, height and width
        positions = positions.expand(4, 1, -1)
    found = output(model, packed, position_ids=positions)
    assert_near(found[:, :110], output(model, ids[:1, :110]), 1e-4)
    assert_near(found[:, 110:], output(model, ids[1:]), 1e-4)


@every_family
def test_every_part_learns(name):
    """With gradient checkpointing as without."""
    model, ids = sparse(name).train(), tokens(2, 150)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)  # of the dropout that some have elsewhere
        model(ids, use_cache=False)[0].float().square().mean().backward()
        parts = [part for x in layers(model) for part in (x.gate, x.compress_k, x.compress_v)]
        gradients.append([p.grad.clone() for part in parts for p in part.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert_near(checkpointed, plain, 1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "base" not in name])
def test_the_trainer_takes_the_step_of_a_plain_loop(name, tmp_path):
    model, ids = sparse(name).train(), tokens(2, 130)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if "answers" in name:
        labels = dict(start_positions=torch.tensor([3, 70]), end_positions=torch.tensor([9, 128]))
    else:
        classes = ids % 2
        classes[:, 0] = -100  # nothing predicts it, but of some models the Trainer counts it
        labels = dict(labels=classes[:, 1] if "sequences" in name else classes)
    batch = dict(input_ids=ids, **labels)
    plain = copy.deepcopy(model)
    plain(**batch, use_cache=False).loss.backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(
        model,
        arguments,
        train_dataset=[{key: x[i] for key, x in batch.items()} for i in range(2)],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
    ).train()
    for layer, expected, before in zip(*map(layers, (model, plain, sparse(name))), strict=True):
        assert not torch.equal(layer.gate.weight, before.gate.weight)
        for key, x in layer.named_parameters():
            torch.testing.assert_close(x, expected.get_parameter(key), rtol=1e-4, atol=1e-6)


# PEFT takes Llama 4's router for a linear layer, which returns two tensors.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "Llama4"])
def test_adapters_on_every_linear_layer(name):
    model, ids = family(name), tokens(2, 130)
    report = patch_model(model, "tiny", verbose=False)
    expected = output(scramble(model), ids)
    adapters = LoraConfig(target_modules="all-linear", modules_to_save=list(report.modules_to_save))
    adapted = get_peft_model(model, adapters)
    assert_near(output(adapted, ids), expected, 1e-5)
    adapted(ids, use_cache=False)[0].float().square().mean().backward()
    for layer in layers(adapted):
        assert layer.gate.modules_to_save["default"].weight.grad.abs().max() > 0
    trained = [key for key, p in adapted.named_parameters() if p.requires_grad]
    assert not [key for key in trained if "lora" not in key and "att" not in key], trained


@every_family
def test_saves_and_loads(name, tmp_path):
    model, ids = sparse(name), tokens(2, 150)
    model.save_pretrained(tmp_path)
    dense = type(model).dense_class
    remote = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    autos = [getattr(transformers, key) for key in remote if key != "AutoConfig"]
    own_class = not dense.__module__.startswith("transformers.")
    assert bool(autos) != own_class
    for loader in (type(model), *autos):
        loaded = loader.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(model)
        assert torch.equal(output(loaded, ids), output(model, ids))
    assert own_class or type(transformers.AutoConfig.from_pretrained(tmp_path)) is type(
        model.config
    )
    with pytest.raises(Exception, match="sparse: import nsa_fsa"):
        dense.from_pretrained(tmp_path)
    unpatch_model(loaded)
    assert type(loaded) is dense


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Qwen3Next", "Cohere2", "Mixtral", "Llava"])
def test_from_scratch(name):
    """Made of a config alone, with gates at 1/2, in the layers with full attention."""
    dense = family(name)
    config_class = sparse_config_class(type(dense.config))
    nsa = dict(preset="tiny", compress_rope="before")
    model = sparse_class(type(dense))(config_class(**dense.config.to_dict(), nsa=nsa)).eval()
    expected = [i for i, layer in attention_layers(dense).items() if not layer.why_not]
    assert [x.layer_idx for x in layers(model)] == expected
    assert all((x.gate.bias == 0).all() for x in layers(model))
    assert output(model, tokens(2, 130)).isfinite().all()


def test_what_stays_dense_is_said():
    text = str(explain_model(family("Gemma3")))
    assert "model.layers.0.self_attn (Gemma3Attention): stays as it is: it is sliding" in text
    assert text.endswith("model.layers.1.self_attn (Gemma3Attention): NSA")
