"""A layer's prompt: all at once without a cache, into a cache, and in chunks into a cache."""

from dataclasses import dataclass
from functools import partial

import torch

from nsa_fsa import NSACache
from nsa_fsa.benchmarking.cases import Case, Named, Pass
from nsa_fsa.benchmarking.check import compare
from nsa_fsa.benchmarking.implementations import LAYER_TOLERANCE, Function, Layer, layer


@dataclass(frozen=True)
class Prefill(Layer):
    """A prompt into a cache whose memory is there."""

    chunk: int | None = None  # tokens at a time; None: all

    def passes(self, case: Case, function: Function | None = None) -> dict[str, Pass]:
        module, x = (function or self.function)(case), case["x"]
        cache = NSACache(module.config, max_length=case.num_tokens)
        parts = x.split(self.chunk or case.num_tokens, dim=1)

        @torch.no_grad()
        def forward() -> Named:
            cache.reset()
            return {f"y{i}": module(part, cache=cache) for i, part in enumerate(parts)}

        return dict(forward=forward)

    def check(self, case: Case, name: str, results: Named) -> dict[str, float]:
        """Compares with the layer without a cache, which is checked by itself; where scores tie
        the choice of blocks may differ."""
        with torch.no_grad():
            expected = self.function(case)(case["x"])
        return dict(y=compare("y", torch.cat([*results.values()], 1), expected, LAYER_TOLERANCE))


def prefill(chunk: int | None) -> Prefill:
    """The implementation for chunks of so many tokens."""
    label = "nsa_fsa, into a cache" + (f" by {chunk:,}" if chunk else "")
    name = f"prefill_{chunk}" if chunk else "prefill"
    reference = partial(layer, backend="reference")
    return Prefill(name, label, "layer", layer, reference, (), outputs=("y",), chunk=chunk)
