"""Random histories of a cache: chunks, padding on either side and between, crops, hidden tokens,
beams and copies.

After each step every row must give what its real tokens alone give in one full forward, in float64.
"""

import copy

import pytest
import torch

from nsa_fsa.cache import NSACache
from tests.cache.test_cached_forward import CLOSE
from tests.modules.layers import VARIANTS, make_variant

CLOSE = CLOSE[torch.float64]


class History:
    """A cache beside the columns that were fed to it."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = make_variant(list(VARIANTS)[seed % len(VARIANTS)], seed=seed)
        longest = self.pick(None, 200)
        self.cache = NSACache(
            self.layer.config, max_length=longest, rollback=self.pick(0, 1, 5, 128)
        )
        self.x = torch.zeros(3, 0, 24, dtype=torch.float64)
        self.mask = torch.zeros(3, 0, dtype=torch.bool)

    def pick(self, *choices):
        return choices[torch.randint(len(choices), (), generator=self.generator)]

    def feed(self):
        past, length = self.mask.shape[1], self.pick(1, 1, 2, 3, 8, 13, 21)
        x = torch.randn(len(self.x), length, 24, generator=self.generator, dtype=torch.float64)
        share = self.pick(0.0, 0.3, 0.8) if self.pick(True, False) else 0.0
        mask = torch.rand(len(self.x), length, generator=self.generator) >= share
        if length > 1 and past and self.pick(True, False):  # hide the last few columns of some rows
            for b in range(len(self.x)):
                self.mask[b, past - self.pick(0, 0, 1, min(past, 12)) :] = False
            argument = torch.cat((self.mask, mask), dim=1)
        else:
            argument = None if mask.all() else self.pick(mask, torch.cat((self.mask, mask), dim=1))
        self.x, self.mask = torch.cat((self.x, x), dim=1), torch.cat((self.mask, mask), dim=1)
        output = self.layer(x, cache=self.cache, attention_mask=argument)
        for b in range(len(self.x)):
            real = self.mask[b]
            expected = torch.zeros(past + length, 24, dtype=torch.float64)
            expected[real] = self.layer(self.x[b : b + 1, real])[0]
            torch.testing.assert_close(
                output[b], expected[past:], msg=lambda m, b=b: f"row {b}: {m}", **CLOSE
            )

    def crop(self):
        removed = min(self.mask.shape[1], self.pick(0, 1, 2, 7, 15, 40))
        self.cache.crop(removed)
        self.keep(columns=self.mask.shape[1] - removed)

    def reorder(self):
        index = torch.randint(len(self.x), (self.pick(1, 2, 3, 4),), generator=self.generator)
        self.cache.reorder(index)
        self.keep(rows=index)

    def repeat(self):
        if len(self.x) < 3:
            self.cache.repeat_interleave(2)
            self.keep(rows=torch.arange(len(self.x)).repeat_interleave(2))

    def copy(self):
        self.cache = copy.deepcopy(self.cache)

    def keep(self, rows=slice(None), columns=None):
        self.x, self.mask = self.x[rows, :columns], self.mask[rows, :columns]

    def step(self):
        name = self.pick("feed", "feed", "feed", "crop", "crop", "reorder", "repeat", "copy")
        if self.mask.shape[1] > 150:
            name = "crop"
        print(name)
        getattr(self, name)()
        assert self.cache.num_tokens == self.mask.shape[1]
        if not self.cache.is_empty:
            assert self.cache.lengths.tolist() == self.mask.sum(1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(24))
def test_random_history(seed):
    history = History(seed)
    for _ in range(20):
        history.step()
