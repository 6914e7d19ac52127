"""A cache continued in another mode than it was filled in, after an exception,
or in a copy of itself.
"""

import copy
import pickle

import pytest
import torch

from nsa_fsa.cache import NSACache
from tests.cache.test_cached_forward import CLOSE, feed
from tests.modules.layers import VARIANTS, make_variant, randn, rms, rms_ratio

CLOSE = CLOSE[torch.float64]
GRADIENT_MODES = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}


# --- Modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [dict(), dict(max_length=60)], ids=["growing", "fixed"])
@pytest.mark.parametrize("second", GRADIENT_MODES)
@pytest.mark.parametrize("first", GRADIENT_MODES)
@pytest.mark.parametrize("variant", ["default", "before-branches"])
def test_filled_in_one_mode_and_continued_in_another(variant, first, second, cache):
    """And back: a prompt cache is often filled in inference_mode,
    and generate decodes in no_grad.
    """
    layer, x = make_variant(variant), randn(2, 30, 24)
    state, outputs = NSACache(layer.config, **cache), []
    for mode, start, stop in ((first, 0, 20), (second, 20, 21), (second, 21, 25), (first, 25, 30)):
        with GRADIENT_MODES[mode]():
            outputs.append(layer(x[:, start:stop], cache=state).detach().clone())
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x).detach(), **CLOSE)


@pytest.mark.parametrize("first", ["inference", "no grad"])
def test_gradients_after_a_prompt_without(first):
    layer, x = make_variant("default"), randn(2, 30, 24)
    cache = NSACache(layer.config)
    with GRADIENT_MODES[first]():
        layer(x[:, :20], cache=cache)
    layer(x[:, 20:], cache=cache).sum().backward()
    assert layer.k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("second", ["inference", "no grad"])
@pytest.mark.parametrize(
    "trained", ["q_proj.weight", "k_proj.weight", "gate.weight", "compress_v.phi.logits"]
)
def test_a_backward_after_the_cache_went_on_without_gradients(trained, second):
    """What a pending backward needs is not overwritten, whichever parameter it is for;
    nor by a crop and other tokens.
    """
    layer, x, do = make_variant("default"), randn(2, 30, 24), randn(2, 20, 24, seed=1)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    parameter, cache = layer.get_parameter(trained), NSACache(layer.config)
    output = torch.cat([layer(x[:, :11], cache=cache), layer(x[:, 11:20], cache=cache)], dim=1)
    with GRADIENT_MODES[second]():
        for _ in range(2):
            cache.crop(3)
            layer(x[:, 20:23], cache=cache)
    output.backward(do)
    actual, parameter.grad = parameter.grad, None
    layer(x[:, :20]).backward(do)
    torch.testing.assert_close(
        actual / rms(parameter.grad), parameter.grad / rms(parameter.grad), rtol=0, atol=1e-9
    )


def test_decoding_without_no_grad_copies_nothing_when_nothing_is_trained():
    layer, x = make_variant("default").requires_grad_(False), randn(1, 40, 24)
    cache = NSACache(layer.config, max_length=40)
    layer(x[:, :20], cache=cache)
    addresses = {name: buffer.data_ptr() for name, buffer in cache._buffers.items()}
    for i in range(20, 40):
        layer(x[:, i : i + 1], cache=cache)
    assert {name: buffer.data_ptr() for name, buffer in cache._buffers.items()} == addresses


@torch.no_grad()
@pytest.mark.parametrize("autocast", [(True, False), (False, True), (True, False, True)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_on_and_off(variant, autocast):
    """As DynamicCache, which promotes. Judged against float32, as far off as the same layer under
    autocast throughout.
    """
    layer, x = make_variant(variant, torch.float32, gain=1.0), randn(2, 50, 24, dtype=torch.float32)
    expected, cache, outputs = layer(x), NSACache(layer.config), []
    with torch.autocast("cpu", torch.bfloat16):
        bound = 2 * rms_ratio(layer(x), expected)
    for on, columns in zip(autocast, (slice(0, 30), slice(30, 45), slice(45, 50)), strict=False):
        for chunk in (
            slice(columns.start, columns.stop - 3),
            *(slice(columns.stop - i, columns.stop - i + 1) for i in (3, 2, 1)),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                outputs.append(layer(x[:, chunk], cache=cache))
    actual = torch.cat([output.float() for output in outputs], dim=1)
    assert 0 < rms_ratio(actual, expected[:, : actual.shape[1]]) <= bound


@torch.no_grad()
def test_another_dtype():
    """A model cast after its prompt was cached: as with DynamicCache the cache becomes as wide
    as the widest.
    """
    layer, x = make_variant("default", torch.float32), randn(1, 40, 24)
    cache = NSACache(layer.config)
    layer(x[:, :30].float(), cache=cache)
    layer.double()
    actual = layer(x[:, 30:], cache=cache)
    assert actual.dtype == torch.float64
    expected = layer(x)[:, 30:]
    torch.testing.assert_close(
        actual / rms(expected), expected / rms(expected), rtol=1e-5, atol=1e-5
    )


# --- Exceptions -----------------------------------------------------------------------------------


class Failing:
    """In the place of a callable: raises at its n-th call, as if memory ran out."""

    def __init__(self, function, call):
        self.function, self.call, self.calls = function, call, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.call:
            raise torch.OutOfMemoryError("out of memory")
        return self.function(*args, **kwargs)


FAILURES = [
    *(
        (module, "forward", 1)
        for module in ("k_proj", "compress_k", "compress_v", "gate", "o_proj")
    ),
    # Buffers; where one needs no growth, the last is the output.
    *((None, "new_zeros", call) for call in (1, 4, 8)),
    *((None, "index_put_", call) for call in (1, 4, 6, 7)),  # everything that is written
]


@torch.no_grad()
@pytest.mark.parametrize("history", [0, 20, 100], ids=["empty", "short", "long"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f"{f[0] or ''}.{f[1]}-{f[2]}")
def test_a_call_that_raised_can_be_repeated(monkeypatch, failure, history):
    """Wherever it stopped: all buffers are new or have to grow."""
    name, method, call = failure
    layer, x = make_variant("wide-values"), randn(2, history + 29, 24)
    mask = torch.ones(2, history + 29)
    mask[1, history : history + 4] = 0
    cache = NSACache(layer.config, rollback=3)
    layer(x[:, :history], cache=cache, attention_mask=mask[:, :history])
    lengths = cache.lengths.tolist()
    with monkeypatch.context() as patch:
        place = torch.Tensor if name is None else layer.get_submodule(name)
        failing = Failing(getattr(place, method), call)
        patch.setattr(
            place, method, (lambda *a, **k: failing(*a, **k)) if name is None else failing
        )
        with pytest.raises(torch.OutOfMemoryError):
            layer(
                x[:, history : history + 20],
                cache=cache,
                attention_mask=mask[:, history : history + 20],
            )
    assert cache.num_tokens == history
    assert cache.lengths.tolist() == lengths
    actual = [
        layer(x[:, c], cache=cache, attention_mask=mask[:, c])
        for c in (
            slice(history, history + 20),
            *(slice(i, i + 1) for i in range(history + 20, history + 29)),
        )
    ]
    for b, start in enumerate((0, 4)):
        real = mask[b] == 1
        expected = layer(x[b : b + 1, real])[0, -29 + start :]
        torch.testing.assert_close(torch.cat(actual, dim=1)[b, start:], expected, **CLOSE)


# --- Copies ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("cache", [dict(), dict(max_length=60)], ids=["growing", "fixed"])
def test_a_prompt_continued_twice(cache, copied):
    layer, x = make_variant("default"), randn(2, 30, 24)
    prompt = NSACache(layer.config, **cache)
    layer(x, cache=prompt)
    for seed in (1, 2):
        new = randn(2, 12, 24, seed=seed)
        actual = feed(layer, new, [4] + [1] * 8, copied(prompt))
        torch.testing.assert_close(actual, layer(torch.cat((x, new), dim=1))[:, 30:], **CLOSE)


@torch.no_grad()
def test_a_batch_without_rows():
    layer = make_variant("default")
    cache = NSACache(layer.config)
    assert feed(layer, torch.zeros(0, 12, 24, dtype=torch.float64), [9, 1, 2], cache).shape == (
        0,
        12,
        24,
    )
    cache.crop(2)
    assert cache.num_tokens == 10
