"""A sequence fed through the cache in any chunks gives what one full forward gives."""

import pytest
import torch

from nsa_fsa.cache import NSACache
from nsa_fsa.modules.rotary import RotaryEmbedding
from tests.modules.layers import (
    VARIANTS,
    make_layer,
    make_variant,
    randn,
    rms,
    rms_ratio,
    small_config,
)

LENGTH = 50
# Sums arrive in another order through the buffers: some ulps of numbers up to ten.
CLOSE = {torch.float64: dict(rtol=1e-10, atol=1e-10), torch.float32: dict(rtol=1e-5, atol=1e-5)}

CHUNKS = {
    "at once": [50],
    "one by one": [1] * 50,
    "prefill, then one by one": [37] + [1] * 13,
    "a window minus one": [7] * 7 + [1],  # kernel_size is 8, its stride 4
    "windows": [8] * 6 + [2],
    "strides": [4] * 12 + [2],
    "blocks and a bit": [9] * 5 + [5],
    "mixed": [1, 2, 13, 1, 1, 20, 3, 1, 8],
    "with empty ones": [0, 20, 0, 1, 0, 29, 0],
}
CACHES = {"growing": dict(), "fixed": dict(max_length=50), "fixed, too long": dict(max_length=77)}


def feed(layer, x, chunks, cache=None, mask=None, **per_column):
    """The chunks' outputs side by side. `per_column`: further arguments whose axis 1 is
    split like x's.
    """
    cache = NSACache(layer.config) if cache is None else cache
    outputs, start = [], 0
    for size in chunks:
        columns = slice(start, start + size)
        arguments = {
            name: tuple(y[:, columns] for y in value) for name, value in per_column.items()
        }
        if mask is not None:
            arguments["attention_mask"] = mask[:, columns]
        outputs.append(layer(x[:, columns], cache=cache, **arguments))
        start += size
    assert start == x.shape[1]
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_chunking_equals_one_forward(variant, chunks):
    layer, x = make_variant(variant), randn(2, LENGTH, 24)
    torch.testing.assert_close(feed(layer, x, CHUNKS[chunks]), layer(x), **CLOSE[torch.float64])


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("chunks", ["one by one", "mixed", "at once"])
@pytest.mark.parametrize("variant", ["default", "before-branches"])
def test_every_kind_of_cache(variant, chunks, cache):
    layer, x = make_variant(variant), randn(2, LENGTH, 24)
    state = NSACache(layer.config, **CACHES[cache])
    torch.testing.assert_close(
        feed(layer, x, CHUNKS[chunks], state), layer(x), **CLOSE[torch.float64]
    )
    assert state.num_tokens == LENGTH
    assert state.lengths.tolist() == [LENGTH, LENGTH]


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_random_settings_and_chunks(seed):
    """Window, stride, block and window sizes that the fixed tables do not have,
    in random chunks.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    stride = pick(1, 2, 3, 4, 8)
    kernel_size = stride * pick(1, 2, 3)
    block_size = max(kernel_size, stride * pick(1, 2, 4))
    config = small_config(
        kernel_size=kernel_size,
        kernel_stride=stride,
        block_size=block_size,
        window_size=pick(1, 5, 30),
        compress_k=pick("mean", "linear", "mlp"),
        compress_v=pick("mean", "gated"),
        kv_per_branch=pick(True, False),
        compress_rope=pick("before", "after"),
    )
    chunks = []
    while sum(chunks) < 60:
        chunks.append(min(60 - sum(chunks), pick(1, 1, 2, 5, 11, 17)))
    layer, x = make_layer(config, seed=seed), randn(1, 60, 24, seed=seed)
    torch.testing.assert_close(
        feed(layer, x, chunks), layer(x), **CLOSE[torch.float64], msg=lambda m: f"{config}: {m}"
    )


@torch.no_grad()
@pytest.mark.parametrize("chunks", ["one by one", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32(variant, chunks):
    layer, x = make_variant(variant, torch.float32), randn(2, LENGTH, 24, dtype=torch.float32)
    expected = layer(x)
    actual = feed(layer, x, CHUNKS[chunks])
    scale = rms(expected)
    torch.testing.assert_close(actual / scale, expected / scale, **CLOSE[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", ["one by one", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bit(variant, chunks, dtype):
    """Row 16 of the bars: cached equals full within 2e-3 of the output's scale."""
    layer, x = make_variant(variant, dtype), randn(2, LENGTH, 24, dtype=dtype)
    actual = feed(layer, x, CHUNKS[chunks])
    assert actual.dtype == dtype
    assert rms_ratio(actual, layer(x)) <= 2e-3


@torch.no_grad()
@pytest.mark.parametrize("variant", ["default", "before-branches"])
def test_a_prompt_is_attended_to_as_without_a_cache(variant):
    """In the plain layout, which the kernels that are fast for whole sequences take;
    bit for bit.
    """
    layer = make_variant(variant, torch.float32)
    x = randn(2, LENGTH, 24, dtype=torch.float32)
    records = []
    mask = torch.arange(LENGTH) >= torch.tensor([[0], [13]])
    layer.recorder = records.append
    for arguments in ({}, {"attention_mask": mask}):
        cached = layer(x, cache=NSACache(layer.config), **arguments)
        assert torch.equal(cached, layer(x, **arguments))
    assert all(
        entry.layout.cu_seqlens_q is None and entry.layout.seqused_k is None for entry in records
    )


# --- Padding --------------------------------------------------------------------------------------


def rows_alone(layer, x, mask):
    """Every row without its padding through one full forward, put back;
    0 where there is padding.
    """
    output = torch.zeros_like(x)
    for b in range(len(x)):
        real = mask[b] == 1
        output[b, real] = layer(x[b : b + 1, real])[0]
    return output


# nothing, most, all but one, everything: a row that never has a token.
LEFT_PADDING = [0, 13, 45, 49, 50, 8]


@torch.no_grad()
@pytest.mark.parametrize("chunks", ["mixed", "prefill, then one by one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded(variant, chunks):
    """The mask may be that of the chunk or that of everything so far,
    which is what transformers passes.
    """
    layer, x = make_variant(variant), randn(6, LENGTH, 24)
    mask = (torch.arange(LENGTH) >= torch.tensor(LEFT_PADDING)[:, None]).long()
    expected = rows_alone(layer, x, mask)
    x = x.masked_fill(mask[..., None] == 0, 1e4)
    cache, outputs, start = NSACache(layer.config), [], 0
    for size in CHUNKS[chunks]:
        outputs.append(
            layer(x[:, start : start + size], cache=cache, attention_mask=mask[:, : start + size])
        )
        start += size
    for actual in (torch.cat(outputs, dim=1), feed(layer, x, CHUNKS[chunks], mask=mask)):
        torch.testing.assert_close(actual, expected, **CLOSE[torch.float64])
        assert (actual[mask == 0] == 0).all()


@torch.no_grad()
def test_an_empty_chunk_under_a_mask_of_all_tokens_so_far():
    layer, x = make_variant("default"), randn(2, LENGTH, 24)
    cache = NSACache(layer.config)
    before = layer(x[:, :20], cache=cache, attention_mask=torch.ones(2, 20))
    nothing = layer(x[:, 20:20], cache=cache, attention_mask=torch.ones(2, 20))
    after = layer(x[:, 20:], cache=cache, attention_mask=torch.ones(2, LENGTH))
    torch.testing.assert_close(
        torch.cat((before, nothing, after), dim=1), layer(x), **CLOSE[torch.float64]
    )


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("variant", ["default", "before-branches"])
def test_ragged_chunks(variant, cache):
    """Right-padded prompts, then ragged chunks: every row goes on from its own last real token."""
    layer, x = make_variant(variant), randn(4, LENGTH, 24)
    mask = torch.ones(4, LENGTH)
    for b, columns in (
        (0, [(3, 20), (40, 44)]),
        (1, [(0, 20)]),
        (2, [(19, 20), (31, 32), (20, 22)]),
        (3, [(33, 50)]),
    ):
        for start, stop in columns:
            mask[b, start:stop] = 0
    chunks = [20, 2, 10, 1, 1, 1, 1, 4, 10]
    actual = feed(layer, x, chunks, NSACache(layer.config, **CACHES[cache]), mask=mask)
    torch.testing.assert_close(actual, rows_alone(layer, x, mask), **CLOSE[torch.float64])


# --- Positions ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunks", ["one by one", "mixed"])
@pytest.mark.parametrize("variant", ["default", "before-mlp", "wide-values"])
def test_position_embeddings_given(variant, chunks):
    layer, x = make_variant(variant), randn(2, LENGTH, 24)
    cos, sin = (
        y[None] for y in RotaryEmbedding(layer.config)(torch.arange(LENGTH), LENGTH, torch.float64)
    )
    actual = feed(layer, x, CHUNKS[chunks], position_embeddings=(cos, sin))
    torch.testing.assert_close(actual, layer(x), **CLOSE[torch.float64])


@torch.no_grad()
def test_position_ids_given():
    layer, x = make_variant("default"), randn(2, LENGTH, 24)
    positions = 3 * torch.arange(LENGTH)[None]
    expected = layer(x, position_ids=positions)
    cache = NSACache(layer.config)
    halves = [
        layer(x[:, c], cache=cache, position_ids=positions[:, c])
        for c in (slice(0, 31), slice(31, None))
    ]
    torch.testing.assert_close(torch.cat(halves, dim=1), expected, **CLOSE[torch.float64])
    assert rms_ratio(expected, layer(x)) > 1e-3


# --- Gradients ------------------------------------------------------------------------------------


def chunked_and_full_gradients(layer, x, do, chunks):
    results = []
    for forward in (lambda x: feed(layer, x, chunks), layer):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        forward(inputs).backward(do)
        results.append(
            {"x": inputs.grad}
            | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
        )
    return results


@pytest.mark.parametrize("chunks", ["at once", "mixed", "one by one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_the_cache(variant, chunks):
    layer, x, do = make_variant(variant), randn(2, LENGTH, 24), randn(2, LENGTH, 24, seed=1)
    chunked, full = chunked_and_full_gradients(layer, x, do, CHUNKS[chunks])
    assert set(chunked) == set(full) == {"x", *dict(layer.named_parameters())}
    for name in full:
        scale = rms(full[name])
        torch.testing.assert_close(
            chunked[name] / scale,
            full[name] / scale,
            msg=lambda m, n=name: f"{n}: {m}",
            rtol=0,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    "trained",
    ["q_proj.weight", "k_proj.weight", "compress_k.phi.logits", "gate.weight", "v_proj.weight"],
)
def test_gradients_with_everything_else_frozen(trained):
    """As in parameter-efficient training: some of what the cache holds needs no gradient,
    and is still not overwritten.
    """
    layer, x, do = make_variant("default"), randn(2, LENGTH, 24), randn(2, LENGTH, 24, seed=1)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == trained)
    parameter = layer.get_parameter(trained)
    feed(layer, x, CHUNKS["mixed"]).backward(do)
    chunked, parameter.grad = parameter.grad, None
    layer(x).backward(do)
    scale = rms(parameter.grad)
    torch.testing.assert_close(chunked / scale, parameter.grad / scale, rtol=0, atol=1e-9)


def test_without_grad_nothing_is_recorded():
    layer, x = make_variant("default"), randn(1, 20, 24)
    cache = NSACache(layer.config)
    with torch.no_grad():
        layer(x, cache=cache)
    # What was fed without gradients is a constant.
    output = layer(randn(1, 5, 24, seed=1), cache=cache)
    output.sum().backward()
    assert layer.k_proj.weight.grad.abs().max() > 0
