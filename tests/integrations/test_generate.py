"""model.generate on sequences long enough to be sparse: every way of decoding gives the tokens of
forwards without cache.
"""

import copy
import re

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from nsa_fsa.integrations.transformers import NSACacheLayer, patch_model
from tests.integrations.models import (
    TINY_REACH,
    attentions,
    dense_model,
    greedy,
    sparse_model,
    tokens,
)
from tests.modules.layers import rms_ratio

PROMPT, NEW = 150, 60  # 210 tokens are 14 blocks, of which a query reads 6
FEW = 20  # where the comparison without cache is slow; two strides and a block boundary still

# A partial patch has layers of both kinds in one cache.
MODELS = [("llama", None), ("qwen2", None), ("qwen3", [1])]


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: f"{p[0]}-{p[1] or 'all'}")
def model(request):
    family, layers = request.param
    return sparse_model(family, layers=layers)


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
        kinds = [isinstance(layer, NSACacheLayer) for layer in cache.layers]
        assert kinds == [hasattr(attention, "gate") for attention in attentions(model)]
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
    crops = CountCrops(lambda: generate(model, prompt, FEW, prompt_lookup_num_tokens=5))
    assert torch.equal(crops.result, greedy(model, prompt, FEW))
    assert crops.count > 0


def test_assisted_generation(model, expected):
    """A small model guesses; most guesses are wrong and taken back,
    over window and block boundaries.
    """
    assistant = dense_model("llama", seed=7, num_hidden_layers=1)
    crops = CountCrops(lambda: generate(model, expected[:1, :PROMPT], assistant_model=assistant))
    assert torch.equal(crops.result, expected[:1])
    assert crops.count > 0


def test_a_sparse_assistant(model, expected):
    """The assistant's cache is cropped as well. A second model guesses for the first:
    a slightly different copy of it.
    """
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    crops = CountCrops(lambda: generate(model, expected[:1, :PROMPT], assistant_model=assistant))
    assert torch.equal(crops.result, expected[:1])
    assert crops.count > 0


def test_an_assistant_that_guesses_many_tokens():
    """150 at once, nearly all of them wrong; transformers asks the cache for that before the
    first forward.
    """
    model, prompt = sparse_model(), tokens(1, 40)
    assistant = dense_model("llama", seed=7, num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 150
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0

    def enough(input_ids, scores):
        return torch.tensor([input_ids.shape[1] >= 43])

    crops = CountCrops(
        lambda: generate(model, prompt, 160, assistant_model=assistant, stopping_criteria=[enough])
    )
    assert torch.equal(crops.result[:, :43], greedy(model, prompt, 3))
    assert crops.most > 128


class CountCrops:
    """Runs something, counting how often an NSA cache layer really took tokens back,
    and at most how many.
    """

    def __init__(self, run):
        self.count, self.most, original = 0, 0, NSACacheLayer.crop

        def crop(layer, tokens_to_remove):
            self.count += tokens_to_remove != 0
            self.most = max(self.most, -tokens_to_remove)
            original(layer, tokens_to_remove)

        NSACacheLayer.crop = crop
        try:
            self.result = run()
        finally:
            NSACacheLayer.crop = original


def test_contrast_with_batch_selection_and_repetition():
    """The cache methods that decoding strategies call, against the state they stand for."""
    model = sparse_model()
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


CROPS = [
    (-5, 25),
    (0, 30),
    (-30, 0),
    (-40, 0),
    (22, 22),
    (30, 30),
    (40, 30),
    (torch.tensor(-5), 25),
]


@torch.no_grad()
@pytest.mark.parametrize(("argument", "kept"), CROPS)
def test_crop_arguments(argument, kept):
    """transformers removes a negative number; older versions of 5.x pass, as a positive one,
    the length to keep.
    """
    model, ids = sparse_model(), tokens(1, 30)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    for layer in cache.layers:
        layer.crop(argument)
    assert cache.get_seq_length() == kept
    new = tokens(1, 9, seed=1)
    expected = model(torch.cat((ids[:, :kept], new), dim=1), use_cache=False).logits[:, -9:]
    torch.testing.assert_close(
        model(new, past_key_values=cache).logits, expected, rtol=1e-3, atol=1e-3
    )


def test_reset_of_a_static_cache():
    model = sparse_model()
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    for seed in (0, 1):
        prompt = tokens(2, PROMPT, seed=seed)
        assert torch.equal(
            generate(model, prompt, FEW, past_key_values=cache), generate(model, prompt, FEW)
        )
        cache.reset()


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_crop_back_to_the_prompt(static):
    """One prompt, several answers of 200 tokens, each taken back."""
    model, prompt = sparse_model(), tokens(2, 50)
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
def test_crop_after_a_padded_continuation(side):
    model, ids, new = sparse_model(), tokens(2, 60), tokens(2, 9, seed=1)
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


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_keys_and_values_as_transformers_lays_them_out(static):
    """Those of the first layer, which do not depend on attention, are the dense model's."""
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = 0
    caches = []
    for model in (dense_model(), sparse_model()):
        cache = (
            StaticCache(config=model.config, max_cache_len=50)
            if static
            else DynamicCache(config=model.config)
        )
        for chunk in (slice(0, 30), slice(30, 33), slice(33, 34)):
            model(
                tokens(2, 40)[:, chunk], attention_mask=mask[:, : chunk.stop], past_key_values=cache
            )
        if hasattr(cache.layers[0], "crop"):  # transformers 5.17's StaticLayer has none
            cache.layers[0].crop(-1)
        caches.append(cache.layers[0])
    for name in ("keys", "values"):
        dense, sparse = (getattr(layer, name)[:, :, :33] for layer in caches)
        real = mask[:, None, :33, None]
        torch.testing.assert_close(sparse, dense * real, rtol=1e-5, atol=1e-5)
        assert getattr(NSACacheLayer(attentions(sparse_model())[0].config), name) is None


# --- Refused --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_full_static_cache():
    model = sparse_model()
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(tokens(1, 15), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"6 more tokens do not fit: the cache holds 15 of 20.*Fix"
    ):
        model(tokens(1, 6), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("way_out", ["reset", "crop"])
@pytest.mark.parametrize("history", [0, 30])
@pytest.mark.parametrize("static", [False, True])
def test_a_forward_that_raised_half_way(monkeypatch, static, history, way_out):
    """The layers before the one that ran out of memory have gone on;
    a repeated call would feed them twice.
    """
    model, ids = sparse_model(), tokens(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=90) if static else DynamicCache()
    if history:
        model(ids[:, :history], past_key_values=cache)

    def out_of_memory(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(attentions(model)[1].compress_v, "forward", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            model(ids[:, history:], past_key_values=cache)
    with pytest.raises(
        RuntimeError, match=rf"layer 1 .* holds {history} tokens where .* 40.*Fix: cache.reset\(\)"
    ) as error:
        model(ids[:, history:], past_key_values=cache)
    if way_out == "reset":
        cache.reset()
    else:
        exec(
            re.search(r"for layer in .*: layer.crop\(-\d+\)", str(error.value)).group(),
            {"cache": cache},
        )
    start = cache.get_seq_length()
    assert start == (0 if way_out == "reset" else history)
    logits = model(ids[:, start:], past_key_values=cache).logits
    torch.testing.assert_close(
        logits, model(ids, use_cache=False).logits[:, start:], rtol=1e-3, atol=1e-3
    )


def test_a_cache_of_other_settings():
    """What `generate` returned, continued after the model was patched again."""
    model, ids = sparse_model(), tokens(1, 20)
    result = generate(model, ids, return_dict_in_generate=True)
    patch_model(model, window_size=8, num_selected_blocks=5, verbose=False)
    found = (
        r"layer 0 of the cache .*num_selected_blocks=6 \(layer: 5\), window_size=32 \(layer: 8\)\. "
        r"Fix: leave out past_key"
    )
    with pytest.raises(ValueError, match=found):
        generate(model, result.sequences, past_key_values=result.past_key_values)
    generate(model, result.sequences, past_key_values=DynamicCache())


@torch.no_grad()
def test_a_cache_filled_by_a_dense_model():
    dense, cache = dense_model(), DynamicCache()
    dense(tokens(1, 15), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"layer 0 of the cache already holds a dense layer's keys.*Fix"
    ):
        sparse_model()(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_a_sparse_cache_in_a_dense_model():
    cache = DynamicCache()
    sparse_model()(tokens(1, 15), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"given the cache of an NSA layer.*Fix: a new cache"):
        dense_model()(tokens(1, 1), past_key_values=cache)


def test_offloaded_caches():
    with pytest.raises((ValueError, RuntimeError), match="offload"):
        generate(sparse_model(), tokens(1, 20), past_key_values=DynamicCache(offloading=True))


@torch.no_grad()
def test_other_kinds_of_cache_layers():
    """Such as a sliding one, which forgets what NSA must keep."""
    model = sparse_model()
    sliding = transformers.cache_utils.DynamicSlidingWindowLayer(sliding_window=16)
    cache = transformers.cache_utils.Cache(layers=[sliding, sliding])
    with pytest.raises(
        TypeError,
        match=r"DynamicSlidingWindowLayer.*can replace a DynamicLayer or a StaticLayer.*Fix",
    ):
        model(tokens(1, 20), past_key_values=cache)
