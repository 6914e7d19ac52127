"""A few new tokens at a time, the fast way: what it gives, when it is taken, how little it
launches, and that a recorded step can be run again.
"""

import copy

import pytest
import torch

from nsa_fsa.cache import NSACache
from nsa_fsa.modules.rotary import RotaryEmbedding
from tests.cache.recording import Recording
from tests.cache.test_cache_operations import assert_continues, fill
from tests.cache.test_cached_forward import CLOSE
from tests.cache.test_modes import Failing
from tests.cases import device_of
from tests.decode.problems import small_shares
from tests.modules.layers import make_layer, make_variant, randn, rms, small_config

FLOAT32, CLOSE = CLOSE[torch.float32], CLOSE[torch.float64]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTLY = {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5}
LAYERS = {
    "weighted": dict(),
    "mean": dict(compress_k="mean", compress_v="mean", gate="per_token"),
    "before": dict(compress_rope="before", o_bias=True),
    "embeddings": dict(compress_position_embedding=True, qk_norm=True),
    "widths": dict(v_head_dim=12, rope_parameters=PARTLY, compress_position_embedding=True),
    "narrow values": dict(v_head_dim=4, compress_k="mean", num_kv_heads=1, scale=0.2),
    "no rope": dict(rope_parameters=None, compress_position_embedding=True),
    "yarn": dict(rope_parameters=YARN, compress_position_embedding=True),
    "llama3": dict(rope_parameters=LLAMA3, compress_v="mean"),
    "windows side by side": dict(kernel_size=4),
    "long windows": dict(kernel_size=12, block_size=12),
}


def layer_of(name, dtype=torch.float64, **changes):
    return make_layer(small_config(**{**LAYERS[name], **changes}), dtype)


def decoded(layer, x, cache, size=1, **arguments):
    """What x gives, fed `size` columns at a time, all of them the fast way."""
    outputs = []
    for chunk in x.split(size, dim=1):
        with Recording() as recording:
            outputs.append(layer(chunk, cache=cache, **arguments))
        assert recording.decodes
    return torch.cat(outputs, dim=1)


# --- What it gives --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_one_forward(name, size):
    """From prompts before the first window, at its end, and after several; buffers grow."""
    layer = layer_of(name)
    for prompt in (1, 8, 29):
        x = randn(2, prompt + 48, 24)
        actual = decoded(layer, x[:, prompt:], fill(layer, x[:, :prompt]), size)
        torch.testing.assert_close(actual, layer(x)[:, prompt:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("weighted", 1), ("before", 3), ("yarn", 2)])
def test_decoding_by_triton(name, size, monkeypatch):
    """Of a prompt that the reference has read."""
    small_shares(monkeypatch)
    device, plain = device_of("triton"), layer_of(name)
    layer, reader = (
        layer_of(name, torch.float32, backend=x).to(device) for x in ("triton", "reference")
    )
    x, new = randn(2, 30 + 3 * size, 24), slice(30, None)
    given = x.float().to(device)
    cache = fill(reader, given[:, :30])
    cache.config = layer.config
    actual, expected = decoded(layer, given[:, new], cache, size).cpu(), plain(x)[:, new]
    scale = rms(expected)
    torch.testing.assert_close(actual.double() / scale, expected / scale, **FLOAT32)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", ["weighted", "before", "yarn"])
def test_decoding_after_a_left_padded_prompt(name, size):
    """Rows of every length, one of which has no token yet."""
    layer, x, padding = layer_of(name), randn(4, 42, 24), [0, 9, 26, 30]
    cache = NSACache(layer.config)
    mask = torch.arange(42) >= torch.tensor(padding)[:, None]
    layer(x[:, :30], cache=cache, attention_mask=mask[:, :30])
    actual = decoded(layer, x[:, 30:], cache, size)
    for b, first in enumerate(padding):
        expected = layer(x[b : b + 1, first:])[0, -12:]
        torch.testing.assert_close(actual[b], expected, **CLOSE)


@torch.no_grad()
def test_decoding_under_a_mask_of_everything_so_far():
    layer, x = layer_of("weighted"), randn(2, 42, 24)
    mask = torch.ones(2, 42, dtype=torch.int64)
    mask[1, :5] = 0
    cache = NSACache(layer.config)
    layer(x[:, :30], cache=cache, attention_mask=mask[:, :30])
    for first, last in ((30, 31), (31, 36), (36, 42)):
        new = x[:, first:last]
        actual = decoded(layer, new, cache, last - first, attention_mask=mask[:, :last])
        torch.testing.assert_close(actual[:1], layer(x[:1, :last])[:, first:], **CLOSE)
        torch.testing.assert_close(actual[1:], layer(x[1:, 5:last])[:, first - 5 :], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["weighted", "before", "embeddings"])
def test_what_generation_does_between_steps(name):
    """Tokens taken back, long chunks, tokens hidden, beams."""
    layer, x = layer_of(name), randn(3, 60, 24)
    cache = fill(layer, x[:, :21])
    decoded(layer, x[:, 21:40], cache)
    cache.crop(7)
    assert_continues(layer, copy.deepcopy(cache), x[:, :33])
    layer(x[:, 33:53], cache=cache)
    decoded(layer, x[:, 53:], cache, 3)
    cache.crop(15)
    index = torch.tensor([2, 0])
    cache.reorder(index)
    cache.repeat_interleave(2)
    history = x[index, :45].repeat_interleave(2, dim=0)
    assert_continues(layer, copy.deepcopy(cache), history)

    mask = torch.ones(4, 48, dtype=torch.int64)
    mask[1, 38:45] = 0
    new = randn(4, 3, 24, seed=5)
    layer(new, cache=cache, attention_mask=mask)
    kept = [torch.cat((history[b, : 38 if b == 1 else 45], new[b])) for b in range(4)]
    assert_continues(layer, cache, kept)


MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad}


@pytest.mark.parametrize("cache", [dict(), dict(max_length=60)], ids=["growing", "fixed"])
@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_decoding_in_other_modes_and_then_with_gradients(first, second, cache):
    layer, x = layer_of("weighted"), randn(2, 50, 24)
    state = NSACache(layer.config, **cache)
    with MODES[first]():
        layer(x[:, :25], cache=state)
        decoded(layer, x[:, 25:31], state)
    with MODES[second]():
        decoded(layer, x[:, 31:40], state, 3)
    new = x[:, 40:].clone().requires_grad_()
    output = torch.cat([layer(part, cache=state) for part in new.split((1, 9), dim=1)], dim=1)
    torch.testing.assert_close(output, layer(x)[:, 40:], **CLOSE)
    with MODES[second]():  # what the backward needs is left as it is
        state.crop(5)
        actual = decoded(layer, x[:, 45:] + 1, state)
    changed = torch.cat((x[:, :45], x[:, 45:] + 1), dim=1)
    torch.testing.assert_close(actual, layer(changed)[:, 45:], **CLOSE)
    output.sum().backward()
    found, new.grad = new.grad, None
    layer(torch.cat((x[:, :40], new), dim=1))[:, 40:].sum().backward()
    torch.testing.assert_close(found / rms(found), new.grad / rms(found), rtol=0, atol=1e-9)


@torch.no_grad()
def test_decoding_under_autocast():
    layer = layer_of("weighted", torch.float32)
    x = randn(2, 40, 24, dtype=torch.float32)
    cache = fill(layer, x[:, :30])
    with torch.autocast("cpu", torch.bfloat16):
        actual = decoded(layer, x[:, 30:], cache)
        full = layer(x)[:, 30:]
    assert actual.dtype == torch.bfloat16
    expected = layer(x)[:, 30:]
    assert rms(actual.float() - expected) <= 2 * rms(full.float() - expected)


@torch.no_grad()
@pytest.mark.parametrize("failing", ["k_proj", "gate", "o_proj"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("prompt", [30, 60], ids=["room", "growth"])
def test_a_step_that_raised_can_be_repeated(monkeypatch, failing, size, prompt):
    layer, x = layer_of("weighted"), randn(2, 90, 24)
    cache = fill(layer, x[:, :prompt], [20])
    while prompt == 60 and cache.num_tokens + size + 16 <= cache.capacity:
        layer(x[:, cache.num_tokens : cache.num_tokens + 1], cache=cache)
    held = cache.num_tokens
    with monkeypatch.context() as patch:
        module = layer.get_submodule(failing)
        patch.setattr(module, "forward", Failing(module.forward, 1))
        with pytest.raises(torch.OutOfMemoryError):
            layer(randn(2, size, 24, seed=3), cache=cache)
    assert (cache.num_tokens, cache.lengths.tolist()) == (held, [held, held])
    assert_continues(layer, cache, x[:, :held])


# --- When it is taken -----------------------------------------------------------------------------


def given(start, stop):
    config = small_config()
    cos, sin = RotaryEmbedding(config)(torch.arange(start, stop), stop, torch.float64)
    return dict(position_embeddings=(cos[None], sin[None]))


OTHERWISE = {
    "17 tokens": (dict(), 17, dict()),
    "linear": (dict(compress_k="linear"), 1, dict()),
    "own": (dict(compress_v="mlp"), 1, dict()),
    "branches": (dict(kv_per_branch=True), 1, dict()),
    "dynamic": (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), 1, dict()),
    "padding": (dict(), 2, dict(attention_mask=torch.tensor([[1, 1], [0, 1]]))),
    "cos and sin": (dict(), 1, given(30, 31)),
    "positions": (dict(), 1, dict(position_ids=torch.tensor([[30]]))),
}


@torch.no_grad()
@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_not_decoded_the_fast_way(case):
    changes, size, arguments = OTHERWISE[case]
    layer, x = make_variant("default", **changes), randn(2, 30 + size, 24)
    cache = fill(layer, x[:, :30])
    with Recording() as recording:
        actual = layer(x[:, 30:], cache=cache, **arguments)
    assert not recording.decodes
    torch.testing.assert_close(actual[:1], layer(x[:1])[:, 30:], **CLOSE)


def test_neither_with_gradients_nor_with_a_recorder_nor_without_a_past():
    layer, x = layer_of("weighted"), randn(2, 40, 24)
    cache = NSACache(layer.config)
    with Recording() as first, torch.no_grad():
        layer(x[:, :3], cache=cache)
    with Recording() as with_gradients:
        layer(x[:, 3:4], cache=cache)
    records = []
    layer.recorder = records.append
    with Recording() as recorded, torch.no_grad():
        layer(x[:, 4:5], cache=cache)
    assert len(records) == 1
    assert not any(x.decodes for x in (first, with_gradients, recorded))


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_positions_that_were_given_once(monkeypatch, fails):
    """Nothing is known any more of how far tokens are from each other: here they are three apart;
    not even where that call failed, which may have written cos and sin of its own."""
    layer, x = layer_of("weighted"), randn(2, 60, 24)
    positions = torch.arange(60)[None]
    positions[:, 31:] += 2 * torch.arange(29)
    cache = fill(layer, x[:, :21], max_length=60)
    decoded(layer, x[:, 21:31], cache)
    if fails:
        with monkeypatch.context() as patch:
            patch.setattr(layer.o_proj, "forward", Failing(layer.o_proj.forward, 1))
            with pytest.raises(torch.OutOfMemoryError):
                layer(x[:, 31:33], cache=cache, position_ids=positions[:, 31:33])
        assert_continues(layer, cache, x[:, :31])
        return
    parts = [(31, 33), (33, 34), (34, 60)]
    actual = [layer(x[:, i:j], cache=cache, position_ids=positions[:, i:j]) for i, j in parts]
    expected = layer(x, position_ids=positions)[:, 31:]
    torch.testing.assert_close(torch.cat(actual, dim=1), expected, **CLOSE)
    cache.reset()
    layer(x[:, :21], cache=cache)
    torch.testing.assert_close(decoded(layer, x[:, 21:], cache), layer(x)[:, 21:], **CLOSE)


@torch.no_grad()
def test_given_positions_do_not_matter_where_keys_are_compressed_as_they_are():
    layer, x = layer_of("before"), randn(2, 40, 24)
    positions = 3 * torch.arange(40)[None]
    cache = NSACache(layer.config)
    layer(x[:, :30], cache=cache, position_ids=positions[:, :30])
    actual = decoded(layer, x[:, 30:], cache, 10, position_ids=positions[:, 30:])
    torch.testing.assert_close(actual, layer(x, position_ids=positions)[:, 30:], **CLOSE)


# --- How little it launches, and that it can be recorded ------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("name", "most"), [("weighted", 32), ("before", 48)])
def test_a_step_launches_little(name, most):
    """Without it, it would be 130 operations beside the core."""
    layer, x = layer_of(name, torch.bfloat16), randn(2, 40, 24, dtype=torch.bfloat16)
    cache = fill(layer, x)
    layer(x[:, :1], cache=cache)
    with Recording() as recording:
        layer(x[:, :1], cache=cache)
    assert len(recording.launches) <= most, recording.launches


class Loop:
    """Two layers, a cache for each, and a step that writes its output where its input was."""

    def __init__(self, name, size=1, **cache):
        layer = layer_of(name)
        self.layers = [layer, make_layer(layer.config, seed=1)]
        self.caches = [NSACache(layer.config, **cache) for layer in self.layers]
        self.token = torch.zeros(2, size, 24, dtype=torch.float64)

    def feed(self, x):
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = torch.nn.functional.rms_norm(x + layer(x, cache=cache), (24,))
        return x

    def prompt(self, x):
        size = self.token.shape[1]
        self.token.copy_(self.feed(x)[:, -size:])

    def step(self):
        self.token.copy_(self.feed(self.token))

    def crop(self, removed):
        for cache in self.caches:
            cache.crop(removed)

    def reset(self):
        for cache in self.caches:
            cache.reset()


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["weighted", "before", "embeddings", "no rope"])
def test_a_recorded_step_can_be_run_again(name, size):
    """With nothing but `advance` on the host: at other lengths, over the ends of windows and
    blocks, after tokens were taken back, after a chunk, and after another prompt."""
    again, eager = Loop(name, size, max_length=120), Loop(name, size)
    recording = None
    for prompt, removed in ((20, 0), (17, 0), (40, 5)):
        x = randn(2, prompt, 24, seed=prompt)
        if prompt == 40:
            again.reset()
            eager.reset()
        for loop in (again, eager):
            loop.prompt(x)
        if recording is None:
            for loop in (again, eager):
                loop.step()
            with Recording() as recording:
                again.step()
            eager.step()
        for i in range(8):
            for cache in again.caches:
                cache.advance(size)
            recording.replay()
            eager.step()
            torch.testing.assert_close(again.token, eager.token, **CLOSE)
            if i == 4:
                for loop in (again, eager):
                    loop.crop(removed)
        for one, other in zip(again.caches, eager.caches, strict=True):
            assert one.num_tokens == other.num_tokens
            assert torch.equal(one.lengths, other.lengths)


@torch.no_grad()
def test_advance_refuses_what_does_not_fit():
    layer, x = layer_of("weighted"), randn(2, 20, 24)
    cache = fill(layer, x, max_length=24)
    cache.advance(3)
    with pytest.raises(ValueError, match="2 more tokens do not fit: the cache holds 23 of 24"):
        cache.advance(2)
    assert cache.num_tokens == 23
    with pytest.raises(ValueError, match="num_columns=-1 must be an int >= 0"):
        cache.advance(-1)
    for other in (fill(layer, x), NSACache(layer.config, max_length=24)):
        with pytest.raises(ValueError, match=r"buffers of fixed size\. Fix: NSACache\(config, max"):
            other.advance(1)


def addresses(cache):
    """Of all that a CUDA graph of a step may read."""
    tensors = cache._buffers | {"turn": cache._turn, "lengths": cache._lengths}
    return {name: x.data_ptr() for name, x in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_fixed_cache_keeps_its_memory_when_it_is_reset(batch_size):
    """For as many sequences."""
    layer, x = layer_of("weighted"), randn(batch_size, 40, 24)
    mask = torch.ones(2, 30)
    mask[0, :9] = 0
    cache = NSACache(layer.config, max_length=60)
    layer(randn(2, 30, 24, seed=1), cache=cache, attention_mask=mask)
    before = addresses(cache)
    cache.reset()
    assert cache.lengths.tolist() == []
    layer(x[:, :21], cache=cache)
    decoded(layer, x[:, 21:], cache)
    assert (addresses(cache) == before) == (batch_size == 2)
    cache.crop(3)
    assert_continues(layer, cache, x[:, :37])
