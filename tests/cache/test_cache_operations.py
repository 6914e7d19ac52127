"""What generation does to a cache: beams reordered and repeated, tokens taken back, buffers full;
and that errors are safe.
"""

import copy

import pytest
import torch

from nsa_fsa.cache import NSACache
from tests.cache.test_cached_forward import CLOSE
from tests.modules.layers import make_layer, make_variant, randn, rms_ratio, small_config

CLOSE = CLOSE[torch.float64]
VARIANTS = ["default", "before-branches", "branches-gated", "own-modules"]


def fill(layer, x, chunks=(), **cache):
    """A cache that has been fed x, in these chunks and the rest at once."""
    state, start = NSACache(layer.config, **cache), 0
    for size in (*chunks, x.shape[1] - sum(chunks)):
        layer(x[:, start : start + size], cache=state)
        start += size
    return state


def assert_continues(layer, cache, history, steps=9, seed=9):
    """Fed on one by one, over more than a window and a block, the cache gives what the histories
    in full give.

    history: the tokens that every row should now hold, `[B, S, E]` or a list of `[S, E]`.
    """
    new = randn(len(history), steps, 24, seed=seed)
    actual = torch.cat([layer(new[:, i : i + 1], cache=cache) for i in range(steps)], dim=1)
    if isinstance(history, torch.Tensor):
        expected = layer(torch.cat((history, new), dim=1))[:, history.shape[1] :]
        torch.testing.assert_close(actual, expected, **CLOSE)
        return
    for b, row in enumerate(history):
        expected = layer(torch.cat((row, new[b]))[None])[0, len(row) :]
        torch.testing.assert_close(actual[b], expected, msg=lambda m, b=b: f"row {b}: {m}", **CLOSE)


# --- Beams ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 8, 11, 30, 32])  # before, at and between window boundaries
@pytest.mark.parametrize("variant", VARIANTS)
def test_reorder(variant, length):
    layer, x = make_variant(variant), randn(4, length, 24)
    index = torch.tensor([2, 0, 2, 3])
    cache = fill(layer, x, [2])
    cache.reorder(index)
    assert_continues(layer, cache, x[index])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_beam_search(variant):
    """Prompts repeated into beams, then one token and one reordering at a time."""
    layer, prompt = make_variant(variant), randn(2, 13, 24)
    cache = fill(layer, prompt)
    cache.repeat_interleave(3)
    history = prompt.repeat_interleave(3, dim=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(17):
        token = randn(6, 1, 24, seed=step)
        output = layer(token, cache=cache)
        history = torch.cat((history, token), dim=1)
        torch.testing.assert_close(output, layer(history)[:, -1:], **CLOSE)
        index = torch.randint(3, (6,), generator=generator) + torch.tensor([0, 0, 0, 3, 3, 3])
        cache.reorder(index)
        history = history[index]
    assert_continues(layer, cache, history)


@torch.no_grad()
def test_reorder_changes_the_batch_size():
    layer, x = make_variant("default"), randn(3, 21, 24)
    cache = fill(layer, x)
    cache.reorder(torch.tensor([2]))
    assert cache.lengths.tolist() == [21]
    assert_continues(layer, cache, x[2:])
    cache.reorder(torch.zeros(5, dtype=torch.int64))
    assert cache.lengths.tolist() == [30] * 5


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_reorder_of_rows_of_different_length(variant):
    """Lengths and open windows differ between rows, and must move with them."""
    layer, x = make_variant(variant), randn(4, 30, 24)
    padding = torch.tensor([0, 9, 26, 30])
    mask = torch.arange(30) >= padding[:, None]
    cache = NSACache(layer.config)
    layer(x, cache=cache, attention_mask=mask)
    index = torch.tensor([3, 1, 0, 2, 1])
    cache.reorder(index)
    assert cache.lengths.tolist() == [0, 21, 30, 4, 21]
    assert_continues(layer, cache, [x[b, padding[b] :] for b in index])


@torch.no_grad()
def test_a_reordered_cache_does_not_share_memory():
    """Beams that descend from one row must not write into each other."""
    layer, x = make_variant("default"), randn(1, 20, 24)
    cache = fill(layer, x)
    cache.repeat_interleave(2)
    cache.reorder(torch.tensor([0, 0]))
    assert_continues(layer, cache, x.expand(2, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("index", [torch.tensor([-1, 0]), torch.tensor([True, False, True])])
def test_reorder_by_what_indexes_a_tensor(index):
    layer, x = make_variant("default"), randn(3, 21, 24)
    cache = fill(layer, x)
    cache.reorder(index)
    assert_continues(layer, cache, x[index])


@torch.no_grad()
def test_beams_of_an_empty_cache():
    """As in transformers, there is nothing to reorder or repeat yet."""
    layer, cache = make_variant("default"), NSACache(small_config())
    cache.reorder(torch.tensor([1, 0]))
    cache.repeat_interleave(3)
    assert_continues(layer, cache, randn(2, 0, 24))


# --- Taking tokens back ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("removed", [*range(14), 20, 29])
@pytest.mark.parametrize("variant", ["default", "before-branches"])
def test_crop(variant, removed):
    """Any number of tokens: within a window, across window boundaries,
    back before the first window.
    """
    layer, x = make_variant(variant), randn(2, 30, 24)
    cache = fill(layer, x, [25, 3])
    cache.crop(removed)
    assert cache.num_tokens == 30 - removed
    assert cache.lengths.tolist() == [30 - removed] * 2
    assert_continues(layer, cache, x[:, : 30 - removed])


@torch.no_grad()
@pytest.mark.parametrize("removed", [1, 6, 14])
@pytest.mark.parametrize("chunks", [(), (1,) * 29], ids=["at once", "one by one"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_crop_after_any_feeding(variant, chunks, removed):
    layer, x = make_variant(variant), randn(2, 30, 24)
    cache = fill(layer, x, chunks)
    cache.crop(removed)
    assert_continues(layer, cache, x[:, : 30 - removed])


@torch.no_grad()
@pytest.mark.parametrize("rollback", [0, 1, 3, 4, 9])
def test_crop_always_reaches_back_rollback_tokens(rollback):
    """At every length, with one-by-one feeding, which trims the open window the most."""
    layer, x = make_variant("mean-linear"), randn(1, 34, 24)
    cache = NSACache(layer.config, rollback=rollback)
    for i in range(34):
        layer(x[:, i : i + 1], cache=cache)
        if i < max(rollback, 8):
            continue
        cropped = copy.deepcopy(cache)
        cropped.crop(rollback)
        history, new = x[:, : i + 1 - rollback], randn(1, 9, 24, seed=i)
        expected = layer(torch.cat((history, new), dim=1))[:, -9:]
        torch.testing.assert_close(layer(new, cache=cropped), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_speculative_decoding(variant):
    """Draft some tokens, take some back, again and again, in a growing and a fixed cache with a
    short rollback.
    """
    layer, history = make_variant(variant), randn(2, 11, 24)
    for cache in (
        fill(layer, history, rollback=5),
        fill(layer, history, rollback=5, max_length=100),
    ):
        kept = history
        for round in range(12):
            draft = randn(2, 5, 24, seed=round)
            output = layer(draft, cache=cache)
            longer = torch.cat((kept, draft), dim=1)
            torch.testing.assert_close(output, layer(longer)[:, -5:], **CLOSE)
            accepted = (0, 3, 5, 1, 4, 2)[round % 6]
            cache.crop(5 - accepted)
            kept = longer[:, : longer.shape[1] - 5 + accepted]
        assert_continues(layer, cache, kept)


@torch.no_grad()
@pytest.mark.parametrize("removed", [1, 5, 9, 20])
@pytest.mark.parametrize("variant", VARIANTS)
def test_crop_of_a_left_padded_batch(variant, removed):
    """A row of four tokens loses them all, and then padding; it starts again at position 0."""
    layer, x = make_variant(variant), randn(4, 30, 24)
    padding = [0, 9, 26, 30]
    cache = NSACache(layer.config)
    layer(x, cache=cache, attention_mask=torch.arange(30) >= torch.tensor(padding)[:, None])
    cache.crop(removed)
    rows = [x[b, min(p, 30 - removed) : 30 - removed] for b, p in enumerate(padding)]
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert_continues(layer, cache, rows)


@torch.no_grad()
def test_crop_everything_is_reset():
    layer, x = make_variant("default"), randn(2, 30, 24)
    cache = fill(layer, x)
    cache.crop(30)
    assert cache.is_empty
    assert_continues(layer, cache, randn(3, 0, 24))  # also with another batch size


@torch.no_grad()
@pytest.mark.parametrize("rollback", [0, 9])
@pytest.mark.parametrize("variant", ["default", "before-branches", "wide-values", "branches-gated"])
def test_crop_beyond_the_rollback(variant, rollback):
    """Twice, the second time beyond what the first left exact, then less than `rollback`."""
    layer, x = make_variant(variant), randn(2, 60, 24)
    cache = fill(layer, x, (1,) * 20, rollback=rollback)
    for removed, kept in ((15, 45), (20, 25), (min(3, rollback), 25 - min(3, rollback))):
        cache.crop(removed)
        assert_continues(layer, copy.deepcopy(cache), x[:, :kept])


@torch.no_grad()
@pytest.mark.parametrize("rope", ["default", "yarn", "dynamic"])
def test_crop_beyond_the_rollback_turns_back_any_rotation(rope):
    """YaRN scales what it rotates; "dynamic" rotates what comes after 16 tokens otherwise than what
    came before.
    """
    layer = make_layer(
        small_config(
            rope_parameters={"rope_type": rope, "factor": 4.0},
            max_position_embeddings=16,
            compress_v="linear",
        ),
        dtype=torch.float64,
    )
    x, new = randn(1, 40, 24), randn(1, 9, 24, seed=1)
    cropped = fill(layer, x, [10], rollback=0)
    cropped.crop(12)
    exact = fill(layer, x, [10], rollback=12)
    exact.crop(12)
    torch.testing.assert_close(layer(new, cache=cropped), layer(new, cache=exact), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["default", "mean-linear", "wide-values"])
def test_crop_in_16_bits(variant):
    """Within the rollback nothing is rounded, or as much as without the crop. Beyond, the keys of
    the last window are, once, and the bound is that of row 16; every block is selected there,
    because a choice between near-ties may fall otherwise."""
    for removed, bound, changes in ((5, 0.0, {}), (30, 2e-3, dict(num_selected_blocks=8))):
        layer = make_variant(variant, torch.bfloat16, **changes)
        x = randn(2, 60, 24, dtype=torch.bfloat16)
        cropped = fill(layer, x, rollback=9)
        cropped.crop(removed)
        never_longer = fill(layer, x[:, : 60 - removed])
        new = randn(2, 20, 24, dtype=torch.bfloat16, seed=1)
        assert rms_ratio(layer(new, cache=cropped), layer(new, cache=never_longer)) <= bound, (
            removed
        )


CONTINUATIONS = {  # the mask of five columns, fed after 30 without padding
    "left": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "anywhere": [[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]],
}


@torch.no_grad()
@pytest.mark.parametrize("whole_mask", [False, True])
@pytest.mark.parametrize("removed", [1, 3, 5, 9])
@pytest.mark.parametrize("padding", CONTINUATIONS)
def test_crop_after_a_padded_continuation(padding, removed, whole_mask):
    """Every row loses the real tokens among the last columns, and no other."""
    layer, x = make_variant("default"), randn(3, 35, 24)
    mask = torch.cat(
        (torch.ones(3, 30, dtype=torch.int64), torch.tensor(CONTINUATIONS[padding])), dim=1
    )
    cache = fill(layer, x[:, :30])
    layer(x[:, 30:], cache=cache, attention_mask=mask if whole_mask else mask[:, 30:])
    cache.crop(removed)
    kept = [row[m[: 35 - removed] == 1] for row, m in zip(x[:, : 35 - removed], mask, strict=True)]
    assert cache.lengths.tolist() == [len(row) for row in kept]
    assert_continues(layer, cache, kept)


@torch.no_grad()
@pytest.mark.parametrize("removed", [-1, 31, 1000])
def test_crop_of_an_impossible_number(removed):
    layer, x = make_variant("default"), randn(1, 30, 24)
    cache = fill(layer, x)
    with pytest.raises(
        ValueError, match=f"num_removed={removed} must be an int from 0 to the 30 tokens held"
    ):
        cache.crop(removed)
    assert_continues(layer, cache, x)


# --- Fixed size, batch size, config ---------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("too_many", [1, 5])
def test_a_full_cache_raises_and_changes_nothing(too_many):
    layer, x = make_variant("default"), randn(2, 20, 24)
    cache = fill(layer, x, max_length=34)
    with pytest.raises(
        ValueError, match=f"{14 + too_many} more tokens do not fit: the cache holds 20 of 34.*Fix"
    ):
        layer(randn(2, 14 + too_many, 24), cache=cache)
    assert cache.num_tokens == 20
    assert cache.lengths.tolist() == [20, 20]
    assert_continues(layer, cache, x, steps=14)
    with pytest.raises(ValueError, match="1 more tokens do not fit: the cache holds 34 of 34"):
        layer(randn(2, 1, 24), cache=cache)
    cache.crop(3)
    assert_continues(
        layer, cache, torch.cat((x, randn(2, 14, 24, seed=9)[:, :11]), dim=1), steps=3, seed=10
    )


@torch.no_grad()
def test_a_fixed_cache_is_allocated_once():
    layer, x = make_variant("default"), randn(2, 60, 24)
    cache = NSACache(layer.config, max_length=60)
    layer(x[:, :1], cache=cache)
    addresses = {name: buffer.data_ptr() for name, buffer in cache._buffers.items()}
    for i in range(1, 60):
        layer(x[:, i : i + 1], cache=cache)
    assert {name: buffer.data_ptr() for name, buffer in cache._buffers.items()} == addresses


@torch.no_grad()
def test_a_growing_cache_reallocates_rarely():
    """Doubling: 300 single tokens cost a handful of copies, not 300;
    and what is kept of the latest stays short.
    """
    layer, x = make_variant("mean-linear", torch.float32), randn(1, 300, 24, dtype=torch.float32)
    cache, capacities = NSACache(layer.config, rollback=10), set()
    for i in range(300):
        layer(x[:, i : i + 1], cache=cache)
        capacities.add(cache.capacity)
    assert len(capacities) <= 6
    assert cache.capacity < 2 * 300 + 32
    assert cache._buffers["recent"].shape[1] == 10 + 8 + 1


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_another_batch_size_is_refused(batch_size):
    layer, x = make_variant("default"), randn(2, 20, 24)
    cache = fill(layer, x)
    with pytest.raises(
        ValueError, match=f"batch has {batch_size} sequences but the cache holds 2.*Fix: reset"
    ):
        layer(randn(batch_size, 1, 24), cache=cache)
    assert_continues(layer, cache, x)


@torch.no_grad()
def test_another_config_is_refused():
    layer, x = make_variant("default"), randn(2, 20, 24)
    cache = fill(layer, x)
    other = make_variant("default", window_size=9)
    with pytest.raises(
        ValueError,
        match=r"other settings: window_size=6 \(layer: 9\)\. Fix: .*NSACache\(attn.config\)",
    ):
        other(x, cache=cache)
    assert_continues(layer, cache, x)
    layer(x, cache=NSACache(small_config()))  # an equal config is as good as the same one


@torch.no_grad()
def test_a_mask_that_does_not_fit_changes_nothing():
    layer, x = make_variant("default"), randn(2, 20, 24)
    cache = fill(layer, x)
    with pytest.raises(ValueError, match=r"\(2, 9\).*\(2, 4\) or \[B, past \+ S\] = \(2, 24\)"):
        layer(randn(2, 4, 24), cache=cache, attention_mask=torch.ones(2, 9))
    assert_continues(layer, cache, x)


@torch.no_grad()
@pytest.mark.parametrize("max_length", [None, 60])
def test_reset(max_length):
    layer, x = make_variant("default"), randn(2, 30, 24)
    cache = fill(layer, x, max_length=max_length)
    cache.reset()
    assert cache.is_empty
    assert cache.num_tokens == 0
    assert cache.lengths.tolist() == []
    assert_continues(layer, cache, randn(5, 0, 24))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 0),
        ("max_length", 2.5),
        ("max_length", True),
        ("rollback", -1),
        ("rollback", "all"),
    ],
)
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be an int >= "):
        NSACache(small_config(), **{name: value})


def test_what_is_no_cache_argument_is_refused():
    with pytest.raises(
        ValueError, match=r"config='tiny' must be an NSAConfig\. Fix: NSACache\(attn\.config\)"
    ):
        NSACache("tiny")
    cache = NSACache(small_config())
    with pytest.raises(
        ValueError, match=r"index=\[1, 0\] must be a tensor, int64 \[new B\] or bool \[B\]\. Fix"
    ):
        cache.reorder([1, 0])
    for removed in (0.5, "1", None, True, torch.tensor(0)):
        with pytest.raises(ValueError, match=r"num_removed=.* must be an int from 0 to"):
            cache.crop(removed)


def test_an_empty_cache():
    cache = NSACache(small_config())
    assert cache.is_empty
    assert cache.num_tokens == 0
    cache.crop(0)
    cache.reset()
    with pytest.raises(
        ValueError, match="num_removed=1 must be an int from 0 to the 0 tokens held"
    ):
        cache.crop(1)
