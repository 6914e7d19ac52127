"""A mask of everything so far that hides tokens which the cache holds:
obeyed as if they had never been fed, or refused.
"""

import pytest
import torch

from nsa_fsa.cache import NSACache
from tests.cache.test_cached_forward import CLOSE
from tests.modules.layers import make_variant, randn

CLOSE = CLOSE[torch.float64]
ENDS = [30, 21, 30, 12, 0]  # of 30 columns, where each row's tokens end that count


def feed_all(layer, x, cache, mask, chunks):
    """The chunks' outputs side by side, each under the mask of everything so far."""
    outputs, start = [], cache.num_tokens
    for size in chunks:
        columns = slice(start, start + size)
        outputs.append(layer(x[:, columns], cache=cache, attention_mask=mask[:, : columns.stop]))
        start += size
    return torch.cat(outputs, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[20], [2] + [1] * 18, [5, 1, 14]], ids=str)
@pytest.mark.parametrize("fed_masked", [False, True])
@pytest.mark.parametrize("variant", ["default", "before-branches", "branches-gated"])
def test_rows_that_ended_early(variant, fed_masked, chunks):
    """Batched chat: the padding after a row's answer was fed as if it were text,
    and is hidden from the next turn on.

    Row 2 is left-padded. fed_masked: the padding was not fed as text, which must come to the same.
    """
    layer, x = make_variant(variant), randn(5, 50, 24)
    mask = torch.ones(5, 50, dtype=torch.int64)
    mask[2, :7] = 0
    fed = mask.clone()
    for b, end in enumerate(ENDS):
        mask[b, end:30] = 0
    cache = NSACache(layer.config)
    layer(x[:, :30], cache=cache, attention_mask=(mask if fed_masked else fed)[:, :30])
    actual = feed_all(layer, x, cache, mask, chunks)
    for b in range(5):
        expected = layer(x[b : b + 1, mask[b] == 1])[0, -20:]
        torch.testing.assert_close(actual[b], expected, msg=lambda m, b=b: f"row {b}: {m}", **CLOSE)
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("removed", [1, 6, 17, 20])
def test_crop_after_hiding(removed):
    layer, x = make_variant("default"), randn(2, 50, 24)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, 15:30] = 0
    cache = NSACache(layer.config, rollback=3)
    layer(x[:, :30], cache=cache)
    layer(x[:, 30:35], cache=cache, attention_mask=mask[:, :35])
    cache.crop(removed)
    mask[:, 35 - removed :] = 1
    actual = feed_all(layer, x, cache, mask, [8, 1, 1])
    for b in range(2):
        real = mask[b, : 45 - removed] == 1
        expected = layer(x[b : b + 1, : 45 - removed][:, real])[0, -10:]
        torch.testing.assert_close(actual[b], expected, msg=lambda m, b=b: f"row {b}: {m}", **CLOSE)


REFUSED = {  # what the mask says of (row, column), and the error
    "hidden in the middle": (
        [(1, 10, 0), (1, 11, 0), (2, 3, 0)],
        r"attention_mask\[1, 10\] is 0, "
        r"but the cache holds a token there.*Fix: crop the cache to 10 col",
    ),
    "hidden at the start": ([(2, 0, 0)], r"attention_mask\[2, 0\] is 0, but.*to 0 columns"),
    "padding shown": (
        [(0, 4, 1)],
        r"attention_mask\[0, 4\] is not 0, but the cache holds no token there.*Fix",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_obeyed_is_refused_and_changes_nothing(case):
    layer, x = make_variant("default"), randn(3, 40, 24)
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :6] = 0
    cache = NSACache(layer.config)
    layer(x[:, :20], cache=cache, attention_mask=mask[:, :20])
    wrong, message = mask.clone(), REFUSED[case][1]
    for row, column, value in REFUSED[case][0]:
        wrong[row, column] = value
    with pytest.raises(ValueError, match=message):
        layer(x[:, 20:22], cache=cache, attention_mask=wrong[:, :22])
    assert (cache.num_tokens, cache.lengths.tolist()) == (20, [14, 20, 20])
    actual = feed_all(layer, x, cache, mask, [2] + [1] * 18)
    for b in range(3):
        expected = layer(x[b : b + 1, mask[b] == 1])[0, -20:]
        torch.testing.assert_close(actual[b], expected, msg=lambda m, b=b: f"row {b}: {m}", **CLOSE)


@torch.no_grad()
def test_a_full_cache_is_refused_before_anything_is_hidden():
    layer, x = make_variant("default"), randn(1, 40, 24)
    cache = NSACache(layer.config, max_length=30)
    layer(x[:, :29], cache=cache)
    mask = torch.ones(1, 31)
    mask[0, 20:29] = 0
    with pytest.raises(ValueError, match="2 more tokens do not fit"):
        layer(x[:, 29:31], cache=cache, attention_mask=mask)
    assert cache.lengths.tolist() == [29]


@torch.no_grad()
def test_a_mask_that_hides_nothing_is_not_compared(monkeypatch):
    """`generate` passes a mask of ones in every call: only where it or the cache has padding is
    there something to compare.
    """
    layer, x, looks = make_variant("default"), randn(2, 40, 24), []
    hide = NSACache.hide
    monkeypatch.setattr(
        NSACache, "hide", lambda cache, mask: (looks.append(mask), hide(cache, mask))
    )
    plain, mask = NSACache(layer.config), torch.ones(2, 40, dtype=torch.int64)
    feed_all(layer, x, plain, mask, [20, 5, 15])
    assert not looks
    padded = mask.clone()
    padded[0, :3] = 0
    cache = NSACache(layer.config)
    feed_all(layer, x, cache, padded, [20, 5, 15])
    assert len(looks) == 2
    cache.reset()
    feed_all(layer, x, cache, mask, [20, 20])
    assert len(looks) == 2
