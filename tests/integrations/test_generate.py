"""model.generate on sequences long enough to be sparse: every way of decoding gives the tokens of
forwards without cache.
"""

import contextlib
import copy
import itertools
import warnings

import pytest
import torch
import transformers
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, QuantizedLayer, StaticLayer

from nsa_fsa.integrations.transformers import patch_model, unpatch_model
from nsa_fsa.integrations.transformers.cache import Hidden
from nsa_fsa.visualization import record
from tests.integrations.models import (
    TINY_REACH,
    attentions,
    dense_model,
    greedy,
    open_only_the_selected_branch,
    output,
    sparse_model,
    tokens,
)
from tests.modules.layers import rms_ratio

PROMPT, NEW = 150, 60  # 210 tokens are 14 blocks, of which a query reads 6
FEW = 20  # where the comparison without cache is slow; two strides and a block boundary still

# How windows are compressed: pooled by the operators of decoding, or by a module of the layer.
POOLED = dict(compress_rope="before")
TURNED = dict(compress_rope="after", compress_v="mean", compress_position_embedding=True)
LEARNED = dict(compress_rope="before", compress_k="gated", compress_v="linear")
LEARNED_AND_TURNED = {**TURNED, "compress_k": "mlp"}

# A partial patch has layers of both kinds in one cache.
MODELS = [("llama", None, POOLED), ("qwen2", None, TURNED), ("qwen3", [1], LEARNED)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{p[1] or 'all'}")
def model(request):
    family, layers, nsa = request.param
    return sparse_model(family, layers=layers, nsa=nsa)


@pytest.fixture(params=["before", "after"])
def nsa(request):
    return dict(compress_rope=request.param)


@pytest.fixture(scope="module")
def expected(model):
    return greedy(model, tokens(2, PROMPT), NEW)


def generate(model, prompt, new=NEW, **arguments):
    return model.generate(prompt, max_new_tokens=new, **{"do_sample": False, **arguments})


def test_the_queries_really_select(model, expected):
    """Otherwise nothing here would test selection: the last queries leave blocks out,
    and not always the same.
    """
    for attention in attentions(model):
        records = []
        if not hasattr(attention, "recorder"):
            continue
        attention.recorder = records.append
        model(expected, use_cache=False)
        attention.recorder = None
        chosen = records[0].block_indices[-TINY_REACH:]
        assert (chosen >= 0).all()
        assert len({tuple(row) for row in chosen.flatten(0, 1)[:, 1:-1].tolist()}) > 10
    # Nor is it one token over and over.
    assert len(set(expected[:, PROMPT:].flatten().tolist())) > 5


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy(model, expected, cache):
    arguments = dict(use_cache=False) if cache is None else dict(cache_implementation=cache)
    assert torch.equal(generate(model, tokens(2, PROMPT), **arguments), expected)


def test_cache_objects_of_the_user(model, expected):
    prompt = tokens(2, PROMPT)
    for cache in (
        DynamicCache(),
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=PROMPT + NEW + 9),
    ):
        assert torch.equal(generate(model, prompt, past_key_values=cache), expected)
        assert cache.get_seq_length() == PROMPT + NEW - 1


@torch.no_grad()
def test_chunked_prefill_through_the_model(model, expected):
    cache, logits = DynamicCache(), []
    for chunk in expected.split([70, 1, 1, 64, 13, 1, 60], dim=1):
        logits.append(model(chunk, past_key_values=cache).logits)
    full = model(expected, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=1e-3, atol=1e-3)


def test_prefill_chunk_size(model, expected):
    assert torch.equal(generate(model, tokens(2, PROMPT), prefill_chunk_size=40), expected)


PADDING = [0, 37, 130]


@pytest.fixture(scope="module")
def rows_alone(model):
    prompt = tokens(len(PADDING), PROMPT, seed=3)
    return [
        greedy(model, prompt[b : b + 1, n:], NEW)[0, PROMPT - n :] for b, n in enumerate(PADDING)
    ]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch_equals_rows_alone(model, rows_alone, cache):
    prompt = tokens(len(PADDING), PROMPT, seed=3)
    mask = (torch.arange(PROMPT) >= torch.tensor(PADDING)[:, None]).long()
    together = generate(model, prompt * mask, attention_mask=mask, cache_implementation=cache)
    for b, alone in enumerate(rows_alone):
        assert torch.equal(together[b, PROMPT:], alone), b


def test_sampling(model):
    prompt = tokens(2, PROMPT)
    results = []
    for arguments in (
        dict(use_cache=False),
        dict(cache_implementation="dynamic"),
        dict(cache_implementation="static"),
    ):
        torch.manual_seed(5)
        results.append(
            generate(model, prompt, FEW, do_sample=True, temperature=2.0, top_k=20, **arguments)
        )
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    assert not torch.equal(results[0], generate(model, prompt, FEW))


def test_beams(model):
    """Beams are reordered at every step; the prompt is repeated into beams first.
    One row is left-padded.
    """
    prompt = tokens(2, PROMPT)
    mask = torch.ones_like(prompt)
    prompt[1, :33], mask[1, :33] = 0, 0
    beams = dict(num_beams=3, num_return_sequences=2, length_penalty=0.0, attention_mask=mask)
    uncached = generate(model, prompt, FEW, use_cache=False, **beams)
    for cache in ("dynamic", "static"):
        assert torch.equal(
            generate(model, prompt, FEW, cache_implementation=cache, **beams), uncached
        )
    # Not the greedy answer under another name.
    assert not torch.equal(uncached[::2], generate(model, prompt, FEW, attention_mask=mask))


def test_prompt_lookup(model):
    """Guesses n-grams of the prompt, and takes back the wrong ones:
    the cache is cropped at most steps.
    """
    prompt = tokens(1, 30).repeat(1, 5)
    cache = CroppedCache()
    found = generate(model, prompt, FEW, prompt_lookup_num_tokens=5, past_key_values=cache)
    assert torch.equal(found, greedy(model, prompt, FEW))
    assert cache.count > 0


def test_assisted_generation(model, expected):
    """A small model guesses; most guesses are wrong and taken back,
    over window and block boundaries.
    """
    assistant = dense_model("llama", seed=7, num_hidden_layers=1)
    cache, prompt = CroppedCache(), expected[:1, :PROMPT]
    found = generate(model, prompt, assistant_model=assistant, past_key_values=cache)
    assert torch.equal(found, expected[:1])
    assert cache.count > 0


def test_a_sparse_assistant(model, expected):
    """The assistant, a slightly different copy, has a cache that is cropped as well."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    cache, prompt = CroppedCache(), expected[:1, :PROMPT]
    found = generate(model, prompt, assistant_model=assistant, past_key_values=cache)
    assert torch.equal(found, expected[:1])
    assert cache.count > 0


def test_an_assistant_that_guesses_many_tokens(nsa):
    """150 at once, nearly all of them wrong."""
    model, prompt = sparse_model(nsa=nsa), tokens(1, 40)
    assistant = dense_model("llama", seed=7, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 150
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0

    def enough(input_ids, scores):
        return torch.tensor([input_ids.shape[1] >= 43])

    cache = CroppedCache()
    found = generate(
        model,
        prompt,
        160,
        assistant_model=assistant,
        stopping_criteria=[enough],
        past_key_values=cache,
    )
    assert torch.equal(found[:, :43], greedy(model, prompt, 3))
    assert cache.most > 128


class CroppedCache(DynamicCache):
    """Counts how often tokens were really taken back, and at most how many."""

    count = most = 0

    def crop(self, *args):
        before = self.get_seq_length()
        super().crop(*args)
        taken_back = before - self.get_seq_length()
        self.count += taken_back > 0
        self.most = max(self.most, taken_back)


def test_contrast_with_batch_selection_and_repetition(nsa):
    """The cache methods that decoding strategies call, against the state they stand for."""
    model = sparse_model(nsa=nsa)
    prompt = tokens(4, PROMPT)
    for change, rows in (
        (lambda c: c.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True, False])), [0, 2]),
        (lambda c: c.reorder_cache(torch.tensor([1, 1, 0, 3])), [1, 1, 0, 3]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda c: c.crop(-9), None),
    ):
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            change(cache)
            history = prompt[:, :-9] if rows is None else prompt[rows]
            new = tokens(len(history), 20, seed=8)
            logits = torch.cat(
                [model(new[:, i : i + 1], past_key_values=cache).logits for i in range(20)], dim=1
            )
            expected = model(torch.cat((history, new), dim=1), use_cache=False).logits[:, -20:]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_reset_of_a_static_cache(nsa):
    model = sparse_model(nsa=nsa)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    for seed in (0, 1):
        prompt = tokens(2, PROMPT, seed=seed)
        assert torch.equal(
            generate(model, prompt, FEW, past_key_values=cache), generate(model, prompt, FEW)
        )
        cache.reset()


CROPPED = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not hasattr(StaticLayer, "crop"), reason="transformers 5.17 cannot crop a static cache"
        ),
    ),
]


@torch.no_grad()
@pytest.mark.parametrize("static", CROPPED, ids=["dynamic", "static"])
def test_crop_back_to_the_prompt(static, nsa):
    """One prompt, several answers of 200 tokens, each taken back."""
    model, prompt = sparse_model(nsa=nsa), tokens(2, 50)
    cache = StaticCache(config=model.config, max_cache_len=260) if static else DynamicCache()
    model(prompt, past_key_values=cache)
    for seed in (1, 2):
        answer = tokens(2, 200, seed=seed)
        logits = model(answer, past_key_values=cache).logits
        expected = model(torch.cat((prompt, answer), dim=1), use_cache=False).logits[:, -200:]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        cache.crop(-200)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_crop_after_a_padded_continuation(side, nsa):
    model, ids, new = sparse_model(nsa=nsa), tokens(2, 60), tokens(2, 9, seed=1)
    mask = torch.ones(2, 69, dtype=torch.int64)
    mask[1, slice(50, 56) if side == "left" else slice(54, 60)] = 0
    cache = DynamicCache()
    model(ids[:, :50], past_key_values=cache)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(
        ids[:, 50:],
        attention_mask=mask[:, :60],
        position_ids=positions[:, 50:60],
        past_key_values=cache,
    )
    cache.crop(-7)
    mask = torch.cat((mask[:, :53], mask[:, 60:]), dim=1)
    ids, positions = torch.cat((ids[:, :53], new), dim=1), (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        new, attention_mask=mask, position_ids=positions[:, 53:], past_key_values=cache
    ).logits
    for b in range(2):
        alone = model(ids[b : b + 1, mask[b] == 1], use_cache=False).logits[0, -9:]
        torch.testing.assert_close(logits[b], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_batched_chat_whose_first_row_ended_early(model, cache):
    """generate feeds padding after an answer that ended; the next turn's mask hides it."""
    cache = (
        DynamicCache()
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=200)
    )
    prompt, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.int64)
    prompt[1, :30], mask[1, :30] = 0, 0
    free = generate(model, prompt, FEW, attention_mask=mask)[0, 100:]
    end = free[4].item()
    answers = generate(
        model,
        prompt,
        FEW,
        attention_mask=mask,
        past_key_values=cache,
        eos_token_id=end,
        pad_token_id=0,
    )
    length = (answers[0, 100:] == end).nonzero()[0].item() + 1
    assert length < FEW - 5  # so that padding was fed
    assert (answers[0, 100 + length :] == 0).all()
    assert (answers[1, 100:] != 0).all()
    turn = torch.cat((answers, tokens(2, 15, seed=5)), dim=1)
    mask = (turn != 0).long()
    actual = generate(model, turn, FEW, attention_mask=mask, past_key_values=cache)[
        :, turn.shape[1] :
    ]
    for b in range(2):
        alone = turn[b : b + 1, mask[b] == 1]
        assert torch.equal(actual[b], greedy(model, alone, FEW)[0, alone.shape[1] :]), b


@torch.no_grad()
def test_a_prompt_cached_in_inference_mode(model, expected):
    """And continued from a copy, as transformers' guide to caches does, and itself."""
    prompt, cache = expected[:, :PROMPT], DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt[:, :-1], past_key_values=cache)
    for continued in (copy.deepcopy(cache), cache):
        assert torch.equal(
            generate(model, prompt, FEW, past_key_values=continued), expected[:, : PROMPT + FEW]
        )


@torch.no_grad()
def test_autocast_for_the_prompt_only(model, expected):
    cache = DynamicCache()
    with torch.autocast("cpu", torch.bfloat16):
        model(expected[:, :PROMPT], past_key_values=cache)
    actual = model(expected[:, PROMPT:], past_key_values=cache).logits
    assert actual.dtype == torch.float32
    full = model(expected, use_cache=False).logits[:, PROMPT:]
    assert rms_ratio(actual, full) < 0.1  # the prompt's keys have 8 bits


class Unchanged(QuantizedLayer):
    """A quantized layer whose quantization loses nothing."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


def test_a_quantized_cache(model, expected):
    cache = Cache(layers=[Unchanged(residual_length=16) for _ in range(2)])
    assert torch.equal(generate(model, tokens(2, PROMPT), past_key_values=cache), expected)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_goes_from_a_dense_model_to_its_sparse_one_and_back(static):
    """Within reach of the selected branch alone, it is the dense model throughout."""
    model, ids = dense_model(), tokens(2, TINY_REACH)
    expected = output(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=120) if static else DynamicCache()
    found = [model(ids[:, :60], past_key_values=cache).logits]
    patch_model(model, "tiny", verbose=False)
    open_only_the_selected_branch(model)
    found += [model(ids[:, i : i + 10], past_key_values=cache).logits for i in (60, 70)]
    unpatch_model(model)
    found.append(model(ids[:, 80:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_of_other_settings(nsa):
    """What `generate` returned, continued after the model was patched again.

    One layer alone, because the second layer's keys depend on what the first one saw.
    """
    model, ids = sparse_model(num_hidden_layers=1, nsa=nsa), tokens(1, PROMPT)
    result = generate(model, ids, return_dict_in_generate=True)
    before = greedy(model, result.sequences, FEW)
    patch_model(model, window_size=8, num_selected_blocks=5, verbose=False)
    expected = greedy(model, result.sequences, FEW)
    found = generate(model, result.sequences, FEW, past_key_values=result.past_key_values)
    assert torch.equal(found, expected)
    assert not torch.equal(before, expected)


@torch.no_grad()
@pytest.mark.parametrize("history", [0, 30])
@pytest.mark.parametrize("static", [False, True])
def test_a_forward_that_raised_half_way(monkeypatch, static, history, nsa):
    """The cache has gone on, and nothing else: reset, or cropped to what it held, it is good."""
    model, ids = sparse_model(nsa=nsa), tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache()
    if history:
        model(ids[:, :history], past_key_values=cache)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(attentions(model)[1].o_proj, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, history:], past_key_values=cache)
    if static:
        cache.reset()
    else:
        cache.crop(history - 40)
    start = 0 if static else history
    logits = model(ids[:, start:], past_key_values=cache).logits
    expected = model(ids, use_cache=False).logits[:, start:]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


# --- Compiled -------------------------------------------------------------------------------------


def compiled(model, prompt, new=FEW, **arguments):
    """What a static cache gives where `generate` compiles steps by itself, as on a GPU."""
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    if "past_key_values" not in arguments:
        arguments["cache_implementation"] = "static"
    return generate(model, prompt, new, compile_config=config, **arguments)


def num_graphs():
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


@pytest.fixture
def counted():
    """Graphs are made anew, and counted from 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Squashed(torch.nn.Module):
    """A compressor of the user's own."""

    def forward(self, windows):
        return windows.tanh().mean(2)


KINDS = {
    "pooled, one layer": dict(layers=[1], **POOLED),
    "turned": TURNED,
    "own and learned": dict(compressor_k=lambda config: Squashed(), **LEARNED),
    "learned and turned": LEARNED_AND_TURNED,
}


def assert_greedy(model, sequence, mask, new=FEW):
    """Checks what follows a prompt with this mask by one forward without a cache."""
    mask = pad_ones(mask, new)
    arguments = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with torch.no_grad():
        logits = model(sequence, use_cache=False, **arguments).logits[:, -new - 1 : -1]
    assert torch.equal(logits.argmax(-1), sequence[:, -new:])


def test_chunks_of_a_prompt_are_not_compiled(counted):
    model = sparse_model(nsa=dict(compress_rope="before")).eval()
    prompt = tokens(2, PROMPT)
    found = compiled(model, prompt, prefill_chunk_size=40)
    assert_greedy(model, found, torch.ones_like(prompt))
    assert num_graphs() == 1


def test_tokens_do_not_walk_through_the_model(monkeypatch):
    model, walks = sparse_model(nsa=POOLED).eval(), []
    decide = type(model)._step_is_traced
    monkeypatch.setattr(type(model), "_step_is_traced", lambda x: walks.append(x) or decide(x))
    for new in (2, FEW):
        walks.clear()
        prompt = tokens(2, PROMPT)
        mask = torch.ones_like(prompt)
        mask[0, :5] = 0  # transformers 5.24 leaves out a mask that hides nothing
        generate(model, prompt, new, cache_implementation="static", attention_mask=mask)
        assert len(walks) <= 2  # whether to compile, and whether a mask is as wide as the cache


@pytest.mark.parametrize("recorded", [False, True])
def test_a_run_after_a_recorded_one_is_one_graph(recorded, counted):
    """What a recorder kept from being compiled is compiled once nobody records."""
    model, prompt = sparse_model(nsa=POOLED).eval(), tokens(2, PROMPT)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 60)
    with record(model) if recorded else contextlib.nullcontext():
        begun = generate(model, prompt, 4, past_key_values=cache, attention_mask=mask)
    found = compiled(model, begun, past_key_values=cache, attention_mask=pad_ones(mask, 4))
    assert_greedy(model, found, pad_ones(mask, 4))
    assert num_graphs() == 1


def model_of(layers=None, compressor_k=None, **nsa):
    model = sparse_model(layers=layers, nsa=nsa).eval()
    if compressor_k is not None:
        patch_model(model, compressor_k=compressor_k, verbose=False)
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_compiled_step_is_one_graph_for_all_lengths(kind, counted):
    """And the one with padding gives what other steps and forwards without cache do."""
    model, prompt = model_of(**kind), tokens(2, 100)
    mask = torch.ones_like(prompt)
    mask[1, :21] = 0
    found = compiled(model, prompt * mask, attention_mask=mask)
    assert num_graphs() == 1
    for cache in ("dynamic", "static"):
        arguments = dict(attention_mask=mask, cache_implementation=cache)
        assert torch.equal(generate(model, prompt * mask, FEW, **arguments), found)
    assert_greedy(model, found, mask)


def test_a_static_cache_is_used_again_without_another_graph(counted):
    """One graph where rows are padded and one where they are not."""
    model = sparse_model(nsa=POOLED).eval()
    patch_model(model, {1: LEARNED_AND_TURNED}, verbose=False)
    new = 9  # one window more at least
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + new)
    for seed, graphs in ((0, 1), (1, 1), (2, 2), (3, 2)):
        prompt = tokens(3, PROMPT - 7 * seed, seed=seed)
        mask = torch.ones_like(prompt)
        if seed >= 2:
            mask[1, : 31 + seed] = mask[2, :5] = 0
        cache.reset()
        found = compiled(model, prompt * mask, new, attention_mask=mask, past_key_values=cache)
        assert_greedy(model, found, mask, new)
        assert num_graphs() == graphs
    # Steps that are not compiled go on with what the graph has compressed.
    expected = greedy(model, found, 3, attention_mask=pad_ones(mask, new))
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + new + 3)
    arguments = dict(attention_mask=mask, past_key_values=cache)
    sequence = compiled(model, prompt * mask, new, **arguments)
    arguments["attention_mask"] = pad_ones(mask, new)
    assert torch.equal(generate(model, sequence, 3, **arguments), expected)


def pad_ones(mask, number):
    return torch.nn.functional.pad(mask, (0, number), value=1)


@torch.no_grad()
def test_what_a_compiled_step_cannot_do_is_refused(counted):
    """Positions that count real tokens are no columns where the mask hides some between them."""
    model = sparse_model(nsa=TURNED).eval()
    step = torch.compile(model, backend="eager", fullgraph=True)
    cache, ids = StaticCache(config=model.config, max_cache_len=90), tokens(2, 70)
    mask = torch.zeros(2, 90, dtype=torch.int64)
    mask[:, :61] = 1
    mask[1, 30:50] = 0
    arguments = dict(attention_mask=mask, past_key_values=cache)
    model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
    step(ids[:, 60:61], position_ids=torch.tensor([[60], [40]]), **arguments)
    mask[:, 61] = 1
    with pytest.raises(RuntimeError, match=r"positions are columns.*Fix: position_ids"):
        step(ids[:, 61:62], position_ids=torch.tensor([[61], [61]]), **arguments)
    arguments["position_ids"] = torch.tensor([[61], [41]])
    mask[1, 20:23] = 0
    with pytest.raises(RuntimeError, match="hides other tokens than when the static cache"):
        step(ids[:, 61:62], **arguments)
    mask[1, 20:23] = 1
    dense = unpatch_model(copy.deepcopy(model))
    dense(ids[:, 61:62], past_key_values=cache)
    with pytest.raises(RuntimeError, match="whose windows have not been compressed"):
        step(ids[:, 62:63], **arguments)
    assert num_graphs() == 1


# --- Refused --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
def test_a_cache_out_of_step(monkeypatch, layers, nsa):
    """Layer 1 raised before it fed the cache; a repeated call would feed layer 0 twice."""
    model, ids, cache = sparse_model(layers=layers, nsa=nsa), tokens(2, 40), DynamicCache()
    model(ids[:, :30], past_key_values=cache)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(attentions(model)[1].q_proj, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, 30:], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [40, 30]
    with pytest.raises(RuntimeError, match=r"layer 1 .* holds 30 tokens where .* 40.*Fix"):
        model(ids[:, 30:], past_key_values=cache)


@torch.no_grad()
def test_a_cache_that_forgets(nsa):
    """A sliding cache drops keys that a compressed or a selected block may need."""
    model, ids = sparse_model(nsa=nsa), tokens(1, 30)
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=16) for _ in range(2)])
    model(ids[:, :25], past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 .*its cache forgets.*Fix: a DynamicCache"):
        model(ids[:, 25:], past_key_values=cache)


# --- Compressed tokens beside a cache -------------------------------------------------------------


@pytest.fixture
def compressed(monkeypatch):
    """A function that makes a model's layers say how many keys they compress themselves."""

    def watch(model):
        sizes = []
        for attention in attentions(model):
            original = attention.compress
            monkeypatch.setattr(
                attention, "compress", lambda k, *x, f=original: (sizes.append(len(k)), f(k, *x))[1]
            )
        return sizes

    return watch


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)


def model_of_ways(first, second):
    """Two layers that compress in ways of their own, with cos and sin that are scaled."""
    model = sparse_model(nsa=first, rope_parameters=YARN).eval()
    patch_model(model, {1: second}, verbose=False)
    return model


WAYS = {
    "pooled": (POOLED, POOLED, 0),
    "turned": (TURNED, TURNED, 0),
    "learned": (LEARNED, LEARNED, 2),
    "both": (LEARNED_AND_TURNED, dict(kernel_size=8, **TURNED, compress_k="weighted"), 1),
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_steps_compress_only_what_they_complete(compressed, make, padded, ways):
    *settings, num_learned = ways
    model, ids = model_of_ways(*settings), tokens(2, 110)
    cache = DynamicCache() if make == "dynamic" else StaticCache(model.config, max_cache_len=110)
    mask = torch.ones_like(ids)
    mask[0, : 17 * padded] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = dict(attention_mask=mask, position_ids=positions, past_key_values=DynamicCache())
    whole = model(ids, **arguments).logits
    sizes, found = compressed(model), []
    ends = [0, 60, 61, 64, 65, 81, 98, 99, 101, 110]
    for start, stop in itertools.pairwise(ends):
        rows = slice(start, stop)
        arguments = dict(attention_mask=mask[:, :stop], position_ids=positions[:, rows])
        found.append(model(ids[:, rows], past_key_values=cache, **arguments).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], rtol=1e-4, atol=1e-4)
    # Prompts and long chunks compress all keys. A few tokens compress none where the operator pools
    # them, and otherwise the keys of as many windows as they may complete.
    expected = []
    for size in (120 - 17 * padded, 32, 32, 32, 64, 2 * 98, 32, 32, 64):
        expected += [size] * (num_learned if size <= 64 else 2)
    assert sizes == expected
    held = [layer.compressed for layer in cache.layers]
    assert [x.num_columns for x in held] == [110, 110]


@pytest.mark.parametrize("nsa", [POOLED, LEARNED_AND_TURNED], ids=["pooled", "both"])
@torch.no_grad()
def test_what_is_done_to_a_cache_is_done_to_its_compressed_tokens(compressed, nsa):
    model, ids = sparse_model(nsa=nsa).eval(), tokens(3, 80)
    cache = DynamicCache()
    model(ids[:, :60], past_key_values=cache)
    rows = torch.tensor([2, 0, 2])
    cache.reorder_cache(rows)
    cache.crop(-9)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 5]))
    copied = copy.deepcopy(cache)
    chosen = ids[torch.tensor([2, 0, 2])]
    expected = model(chosen, use_cache=False).logits[:, 51:]
    sizes = compressed(model)
    for held in (cache, copied):
        found = [model(chosen[:, n : n + 1], past_key_values=held).logits for n in range(51, 80)]
        torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert set(sizes) == ({3 * 16} if "compress_k" in nsa else set())
    cache.reset()
    assert cache.layers[0].compressed is None


@torch.no_grad()
def test_positions_that_do_not_follow_one_another(compressed):
    """Columns hidden between real ones leave a gap where positions are columns, and none where they
    count real tokens. Where positions of new tokens jump, cached ones are taken to precede them."""
    model, ids = sparse_model(nsa=TURNED).eval(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, 55:58] = 0
    column, counted = torch.arange(70)[None], mask.cumsum(1) - 1
    sizes = compressed(model)
    for positions, slow in ((None, True), (column, True), (counted, False)):
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, found = DynamicCache(), []
        sizes.clear()
        for start, stop in ((0, 60), *((n, n + 1) for n in range(60, 70))):
            arguments = dict(attention_mask=mask[:, :stop], past_key_values=cache)
            if positions is not None:
                arguments["position_ids"] = positions[:, start:stop]
            found.append(model(ids[:, start:stop], **arguments).logits[:, -1:])
        torch.testing.assert_close(torch.cat(found, 1), whole[:, 59:], rtol=1e-4, atol=1e-4)
        assert len(sizes) == 2 * (11 if slow else 1)

    model, cache = sparse_model(nsa=dict(compress_rope="after")).eval(), DynamicCache()
    model(ids[:, :60], past_key_values=cache)
    twin = copy.deepcopy(cache)
    for n in range(60, 70):
        arguments = dict(position_ids=torch.tensor([[n + 5]]))
        for layer in twin.layers:
            layer.compressed = None
        found, expected = (
            model(ids[:, n : n + 1], past_key_values=x, **arguments).logits for x in (cache, twin)
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_steps_that_compress_all_keys_say_so_once():
    model, ids = sparse_model(nsa=POOLED).eval(), tokens(2, 64)

    def said(cache=None, model=model, stops=(60, 61, 62, 63, 64), **arguments):
        start, cache = 0, DynamicCache() if cache is None else cache
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for stop in stops:
                given = {name: x[:, :stop] for name, x in arguments.items()}
                model(ids[:, start:stop], past_key_values=cache, **given)
                start = stop
        return [str(x.message) for x in found if "compresses all cached keys" in str(x.message)]

    # What steps do by themselves, what is no step, and where somebody looks.
    assert said() == said(StaticCache(model.config, max_cache_len=64)) == []
    quantized = [Cache(layers=[Unchanged(residual_length=16) for _ in range(2)]) for _ in range(4)]
    assert said(quantized[0], stops=(40, 64)) == []
    attentions(model)[0].recorder = [].append
    assert said(quantized[1]) == []
    attentions(model)[0].recorder = None
    with torch.enable_grad():
        assert said(quantized[2]) == []
    (message,) = said(quantized[3])
    assert "layer 0 of the cache is of the class Unchanged" in message
    assert "Fix: a DynamicCache or a StaticCache" in message
    assert said(Cache(layers=[Unchanged(residual_length=16) for _ in range(2)])) == []

    mask = torch.ones_like(ids)
    mask[1, 61] = 0
    other = copy.deepcopy(model)
    (message,) = said(model=other, stops=(60, 63, 64), attention_mask=mask)
    assert "some of the new tokens are padding" in message
    turned = sparse_model(nsa=TURNED).eval()
    (message,) = said(model=turned, stops=(62, 63, 64), attention_mask=mask)
    assert "positions are columns" in message


@torch.no_grad()
def test_steps_under_autocast_say_why_they_compress_all_keys():
    """Where a model leaves its keys in float32 and its values not."""
    model, ids = sparse_model("qwen3", nsa=POOLED).eval(), tokens(1, 30)
    cache = DynamicCache()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :29], past_key_values=cache)
        keys, values = cache.layers[0].keys.dtype, cache.layers[0].values.dtype
        if keys == values:
            pytest.skip(f"transformers {transformers.__version__} leaves both in {keys}")
        with pytest.warns(UserWarning, match=r"torch.float32 and values of torch.bfloat16.*Fix"):
            model(ids[:, 29:], past_key_values=cache)


def assert_compresses_anew(sparse, token, cache):
    """The next token is as without what the cache has compressed."""
    found = sparse(token, past_key_values=cache).logits
    for layer in cache.layers:
        layer.crop(-1)
        layer.compressed = None
    expected = sparse(token, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_compressed_tokens_of_other_keys_are_not_read(padded):
    """Where a dense model has gone on with the cache, or a mask hides what it did not hide, or the
    layers have other compressors now."""
    sparse = sparse_model(nsa=dict(compress_rope="before")).eval()
    dense, ids, cache = copy.deepcopy(sparse), tokens(2, 80), DynamicCache()
    unpatch_model(dense)
    sparse(ids[:, :60], past_key_values=cache)
    twin = copy.deepcopy(cache)
    for held in (cache, twin):
        dense(ids[:, 60:70], past_key_values=held)
    for layer in twin.layers:
        layer.compressed = None
    found, expected = (sparse(ids[:, 70:71], past_key_values=x).logits for x in (cache, twin))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    cache = DynamicCache()
    sparse(ids[:, :70], past_key_values=cache)
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        layer.compressed = None
    mask = torch.ones(2, 71, dtype=torch.int64)
    mask[1, 5:30] = 0
    # Once where nothing was hidden, and once where something else was.
    for held in (cache, twin):
        held.nsa_hidden = Hidden(torch.ones(2, 70, dtype=torch.bool)) if padded else None
    arguments = dict(attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1)
    found, expected = (
        sparse(ids[:, 70:71], past_key_values=x, **arguments).logits for x in (cache, twin)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    patch_model(sparse, kernel_size=8, kernel_stride=8, verbose=False)
    more = tokens(2, 30, seed=2)
    cache = DynamicCache()
    sparse(more[:, :20], past_key_values=cache)
    patch_model(sparse, kernel_size=16, kernel_stride=8, verbose=False)
    assert_compresses_anew(sparse, more[:, 20:21], cache)

    # The same compressors, of keys that are not turned back any more.
    patch_model(sparse, compress_rope="after", verbose=False)
    cache = DynamicCache()
    sparse(more[:, :28], past_key_values=cache)
    patch_model(sparse, compress_rope="before", verbose=False)
    assert_compresses_anew(sparse, more[:, 28:29], cache)
