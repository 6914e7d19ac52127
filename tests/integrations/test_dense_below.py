"""dense_below in patched models: texts that are no longer get the dense model's logits, and longer
ones its attention in their first tokens, however they are fed."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from nsa_fsa import NSAConfig
from nsa_fsa.integrations.transformers import NSAAttention, patch_model, unpatch_model
from tests.integrations.families import family
from tests.integrations.families import tokens as tokens_of
from tests.integrations.models import (
    attentions,
    dense_model,
    errors_of_layers,
    greedy,
    scramble,
    sparse_model,
    tokens,
)
from tests.integrations.test_generate import compiled

# One with a layer that has a window, and one with values of another width.
NAMES = ("Llama", "Qwen3", "Gemma3", "DeepseekV3")
LENGTH = 130  # the preset "tiny" chooses 96 keys, and of these windows and gates would be others


def exact(name, dense_below):
    """The model in float64, with random gates and compressors, and its dense self."""
    model = family(name).double()
    for module in model.modules():
        if hasattr(config := getattr(module, "config", None), "_experts_implementation"):
            config._experts_implementation = "eager"  # the others have no float64
    patch_model(model, "tiny", dense_below=dense_below, verbose=False)
    scramble(model)
    return model, unpatch_model(copy.deepcopy(model))


def logits(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, use_cache=False, **arguments).logits


def assert_near(a, b, relative=1e-9):
    assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_is_the_dense_model_up_to_that_length(name):
    model, dense = exact(name, LENGTH)
    ids = tokens_of(2, LENGTH)
    assert_near(logits(model, ids), logits(dense, ids))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :40] = mask[0, :40] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert_near(found[0, 40:], logits(dense, ids[:1, 40:])[0])
    assert_near(found[1], logits(dense, ids[1:])[0])


@pytest.mark.parametrize("name", NAMES[2:])
def test_equals_an_independent_nsa(name, monkeypatch):
    model, _ = exact(name, 110)
    errors = errors_of_layers(monkeypatch)
    logits(model, tokens_of(2, LENGTH))
    assert max(errors) < 1e-9


@pytest.mark.parametrize("name", NAMES[2:])
def test_gradients_are_those_of_the_dense_model(name):
    model, dense = exact(name, LENGTH)
    ids, found = tokens_of(1, LENGTH), {}
    for x in (model, dense):
        x.zero_grad()
        x.train()(ids, labels=ids, use_cache=False).loss.backward()
    found = {key: p.grad for key, p in model.named_parameters()}
    for key, p in dense.named_parameters():
        torch.testing.assert_close(found.pop(key), p.grad, rtol=1e-7, atol=1e-10)
    assert found
    for key, grad in found.items():  # of gates and compressors
        assert torch.equal(grad, torch.zeros_like(grad)), key


@torch.no_grad()
def test_packed_as_separate():
    model, _ = exact("Llama", 100)
    ids = tokens_of(2, LENGTH)
    packed = torch.cat((ids[:1, :70], ids[1:], ids[:1, :5]), 1)
    positions = torch.cat((torch.arange(70), torch.arange(LENGTH), torch.arange(5)))[None]
    found = logits(model, packed, position_ids=positions)
    assert_near(found[:, :70], logits(model, ids[:1, :70]))
    assert_near(found[:, 70:200], logits(model, ids[1:]))
    assert_near(found[:, 200:], logits(model, ids[:1, :5]))


@torch.no_grad()
@pytest.mark.parametrize("compress_rope", ["before", "after"])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_cached_as_uncached(static, compress_rope):
    """From dense queries to others, in chunks and by single tokens, back by a crop and on again."""
    model = sparse_model(nsa=dict(dense_below=110, compress_rope=compress_rope)).double()
    ids = tokens(2, LENGTH)
    expected = logits(model, ids)
    cache = DynamicCache()
    if static:
        cache = StaticCache(config=model.config, max_cache_len=LENGTH)

    # RoPE is float32, and "after" turns keys back by it where new tokens are few.
    relative = 1e-9 if compress_rope == "before" else 1e-6

    def feed(start, *sizes):
        for size in sizes:
            stop = start + size
            found = model(ids[:, start:stop], past_key_values=cache).logits
            assert_near(found, expected[:, start:stop], relative)
            start = stop

    feed(0, 60, 35, 10, 1, 1, 4, 1, 18)
    if not static:
        cache.crop(103 - LENGTH)
        feed(103, 1, 3, 10, 13)


@torch.no_grad()
def test_generates_with_a_cache_as_without():
    """Left-padded rows, one of which is dense for longer; also in one compiled graph for all."""
    model, ids = sparse_model(nsa=dict(dense_below=100)), tokens(2, 98)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    new = 12
    found = compiled(model, ids * mask, new, attention_mask=mask)
    for row, hidden in ((0, 6), (1, 0)):
        assert torch.equal(found[row, hidden:], greedy(model, ids[row : row + 1, hidden:], new)[0])


def test_can_be_changed_in_a_patched_model(tmp_path):
    """And is saved; a config from before there was such a number has none."""
    model, ids = sparse_model(), tokens(2, LENGTH)
    sparse = logits(model, ids)
    for layer in attentions(model):
        layer.nsa_config = NSAConfig.from_dict({**layer.nsa_config.to_dict(), "dense_below": 110})
    found = logits(model, ids)
    assert (found[:, :110] - sparse[:, :110]).abs().max() > 0.1
    assert "below position 110: all keys" in str(patch_model(model, dense_below=110))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert all(x.nsa_config.dense_below == 110 for x in attentions(loaded))
    assert torch.equal(logits(loaded, ids), found)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, nsa=dict(dense_below=0)).eval()
    assert torch.equal(logits(loaded, ids), sparse)
    values = attentions(model)[0].nsa_config.to_dict()
    del values["dense_below"]
    assert NSAConfig.from_dict(values).dense_below == 0


def test_layers_may_differ():
    """A layer that is dense throughout, beside one that is sparse throughout."""
    dense, ids = dense_model(), tokens(1, LENGTH)
    models = [copy.deepcopy(dense) for _ in range(2)]
    patch_model(models[0], {0: dict(preset="tiny", dense_below=LENGTH), 1: "tiny"}, verbose=False)
    patch_model(models[1], "tiny", layers=[1], verbose=False)
    assert isinstance(attentions(models[0])[0], NSAAttention)
    assert_near(*(logits(x, ids) for x in models), 1e-5)
