"""The cache on a GPU: row 11 of reliability.md, and steps in a CUDA graph."""

import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSACache, NSAConfig
from tests.on_gpu import assert_rms_close, syncs_forbidden

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_layer_with_a_cache():
    """Prefill, a chunk, single tokens with growing buffers, and what generation does to a cache."""
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64)
    layer = NativeSparseAttention(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 900, 256, device="cuda", dtype=torch.bfloat16)
    index = torch.tensor([1, 1], device="cuda")

    def generate():
        cache = NSACache(config)
        layer(x[:, :500], cache=cache)
        layer(x[:, 500:850], cache=cache)
        cache.crop(20)
        cache.crop(300)
        cache.reorder(index)
        for i in range(850, 900):
            layer(x[:, i : i + 1], cache=cache)

    generate()
    with syncs_forbidden():
        generate()


class Loop:
    """Two layers with a cache each; a step reads `token` and leaves `output`."""

    def __init__(self, **settings):
        config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64, **settings)
        torch.manual_seed(0)
        self.layers = [NativeSparseAttention(config, device="cuda") for _ in range(2)]
        self.caches = [NSACache(config, max_length=1024) for _ in range(2)]
        self.token = torch.zeros(3, 1, 256, device="cuda")
        self.output = torch.zeros_like(self.token)

    def feed(self, x):
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = torch.nn.functional.rms_norm(x + layer(x, cache=cache), (256,))
        return x

    def step(self):
        self.output.copy_(self.feed(self.token))

    def run(self, x, step, prompt):
        """What single tokens give after a prompt in caches that are reset."""
        for cache in self.caches:
            cache.reset()
        self.feed(x[:, :prompt])
        found = []
        for token in x[:, prompt:].split(1, dim=1):
            self.token.copy_(token)
            step()
            found.append(self.output.clone())
        return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(compress_rope="before"), dict(compress_position_embedding=True)],
    ids=["default", "before", "embedding"],
)
def test_a_loop_in_a_graph(settings):
    """Replayed it gives what its calls give, over the ends of windows and blocks, and so it does
    after another prompt in the same caches. Calls wait for nothing."""
    loop, x = Loop(**settings), torch.randn(3, 570, 256, device="cuda")
    expected = loop.run(x, loop.step, 500)
    with syncs_forbidden():
        loop.run(x, loop.step, 500)

    graph, held = torch.cuda.CUDAGraph(), loop.caches[0].num_tokens
    with torch.cuda.graph(graph):
        loop.step()
    assert loop.caches[0].num_tokens == held  # nothing has run yet

    def replay():
        for cache in loop.caches:
            cache.advance(1)
        graph.replay()

    assert_rms_close("first", loop.run(x, replay, 500), expected, torch.float32)
    again = loop.run(x[:, :107], replay, 37)
    assert_rms_close("second", again, loop.run(x[:, :107], loop.step, 37), torch.float32)
    for cache in loop.caches:
        assert cache.lengths.tolist() == [cache.num_tokens] * 3
