"""A layer's decoding step: appending, compressing and attending, as a CUDA graph replays it.

The graph has several layers, as that of a model, each with a cache of its own, and times are those
of one. A layer turns keys back and compresses them by weights of its own, as `NSAConfig` has it by
default, and its step completes a window. Full attention reads a contiguous cache that holds the new
tokens already.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_fsa.benchmarking.cases import Case, Named, Options, Pass
from nsa_fsa.benchmarking.check import WrongResult, compare
from nsa_fsa.benchmarking.implementations import (
    CUDNN,
    FLASH_ATTN_4,
    LAYER_TOLERANCE,
    SDPA_FLASH,
    Function,
    Implementation,
    Layer,
    layer,
)
from nsa_fsa.benchmarking.meter import record
from nsa_fsa.cache import NSACache
from nsa_fsa.decode import Pages, Pooling, append_tokens, nsa_decode
from nsa_fsa.modules.rotary import RotaryEmbedding

Step = Callable[[], Any]
PAGE, CHUNK = 64, 1 << 16  # tokens
REPLAYS = 4096  # of a layer's step, before tokens are taken back
MOST_LAYERS, MOST_BYTES = 8, 16 << 30  # of a graph, and of the caches of all its layers
LEAST_ALIKE = 0.9  # of queries' choices of blocks, the reference's and ours: scores may tie


@dataclass(frozen=True)
class DecodeCase(Case):
    """The next `num_new` tokens of every sequence; `num_tokens` counts them, too."""

    batch_size: int = 1
    num_new: int = 1

    @property
    def layers(self) -> int:
        """Layers of the graph."""
        c = self.config
        token = c.num_kv_heads * (c.head_dim + c.v_head_dim) * self.dtype.itemsize
        fits = MOST_BYTES // (self.batch_size * self.num_tokens * token)
        return max(min(fits, MOST_LAYERS), 1)

    def make(self, name: str) -> Tensor:
        c, number, new = self.config, self.batch_size, self.batch_size * self.num_new
        rows, pages = self.layers * number, -(-self.num_tokens // PAGE)
        heads, states = c.num_kv_heads, PAGE // c.kernel_stride

        if name == "lengths":
            return torch.full((number,), self.num_tokens, dtype=torch.int32, device=self.device)
        if name == "table":  # of every layer's own pages, in any order
            generator = torch.Generator(self.device).manual_seed(self.seed)
            order = torch.randperm(number * pages, generator=generator, device=self.device)
            layer = torch.arange(self.layers, device=self.device)[:, None, None]
            return (layer * (number * pages) + order.view(number, pages)).int()
        if name == "turn":  # cos and sin [2, l, rotary_dim / 2]
            position = torch.arange(c.kernel_size, device=self.device)
            rotary = torch.stack(RotaryEmbedding(c)(position, self.num_tokens, torch.float32))
            return rotary[:, :, : rotary.shape[2] // 2].contiguous()

        shapes = dict(
            q=(new, c.num_heads, c.head_dim),
            gate_logits=(new, c.num_heads, 3),
            new_k=(new, heads, c.head_dim),
            new_v=(new, heads, c.v_head_dim),
            k=(rows * pages, heads, PAGE, c.head_dim),
            v=(rows * pages, heads, PAGE, c.v_head_dim),
            k_cmp=(rows * pages, heads, states, c.head_dim),
            v_cmp=(rows * pages, heads, states, c.v_head_dim),
            full_k=(rows, self.num_tokens, heads, c.head_dim),
            full_v=(rows, self.num_tokens, heads, c.v_head_dim),
            logits_k=(heads, c.kernel_size),
            logits_v=(heads, c.kernel_size),
            x=(number, self.num_tokens, c.hidden_size),
        )

        made = self.normal(name, *shapes[name])
        return made.float() if name.startswith("logits") else made

    def pages(self, layer: int) -> Pages:
        k, v, k_cmp, v_cmp = (self[x] for x in ("k", "v", "k_cmp", "v_cmp"))
        return Pages(k, v, k_cmp, v_cmp, self["table"][layer])

    def full(self, name: str, layer: int) -> Tensor:
        """Contiguous keys or values of a layer, `[B, num_tokens, HKV, D or DV]`."""
        return self[name][layer * self.batch_size : (layer + 1) * self.batch_size]

    def sizes(self, reads_blocks: bool = True) -> dict[str, Any]:
        more = dict(batch_size=self.batch_size, num_new=self.num_new)
        return super().sizes(reads_blocks) | more


def append(case: DecodeCase, layer: int, backend: str = "auto") -> None:
    """Appends the new tokens to a layer's pages."""
    pools = [Pooling(case[name]) for name in ("logits_k", "logits_v")]
    append_tokens(
        *(case["new_k"], case["new_v"], case.pages(layer), case["lengths"]),
        **case.windows,
        pool_k=pools[0],
        pool_v=pools[1],
        turn=case["turn"],
        backend=backend,
    )


def nsa_step(case: DecodeCase, layer: int, backend: str = "auto") -> Step:
    c = case.config
    q, gates, pages, lengths = case["q"], case["gate_logits"], case.pages(layer), case["lengths"]
    sizes: Options = case.blocks | dict(window_size=c.window_size, scale=c.scale, backend=backend)

    def step() -> Any:
        append(case, layer, backend)
        return nsa_decode(q, gates, pages, lengths, **case.windows, **sizes)

    return step


def flash_attn_4_step(case: DecodeCase, layer: int) -> Step:
    function = importlib.import_module("flash_attn.cute").flash_attn_func
    q = case["q"].unflatten(0, (case.batch_size, -1))
    k, v = (case.full(name, layer) for name in ("full_k", "full_v"))
    options: dict[str, Any] = dict(causal=True, softmax_scale=case.config.scale)

    def step() -> Tensor:
        o = function(q, k, v, **options)
        return (o[0] if isinstance(o, tuple) else o).flatten(0, 1)

    return step


def sdpa_step(case: DecodeCase, layer: int, backend: str = "CUDNN_ATTENTION") -> Step:
    if case.num_new > 1:
        raise ValueError("its causal mask stands at the first key, not at the last")
    k, v = (case.full(x, layer).transpose(1, 2).contiguous() for x in ("full_k", "full_v"))
    q = case["q"][:, :, None]
    grouped = case.config.group_size > 1

    def step() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return nn.functional.scaled_dot_product_attention(
                q, k, v, scale=case.config.scale, enable_gqa=grouped
            )[:, :, 0]

    return step


def full_step(case: DecodeCase, layer: int) -> Step:
    """In float32, of the first and the last sequence."""
    c, new = case.config, case.num_new

    def step() -> Tensor:
        results = []
        for b in sorted({0, case.batch_size - 1}):
            q = case["q"][b * new : (b + 1) * new].float().unflatten(1, (c.num_kv_heads, -1))
            k, v = (case.full(name, layer)[b].float() for name in ("full_k", "full_v"))
            scores = torch.einsum("thgd,nhd->hgtn", q, k) * (c.scale or c.head_dim**-0.5)
            position = torch.arange(case.num_tokens, device=q.device)
            hidden = position > case.num_tokens - new + position[:new, None]
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            results.append(torch.einsum("hgtn,nhd->thgd", p, v).flatten(1, 2))
        return torch.cat(results)

    return step


def of_ends(case: DecodeCase, x: Tensor) -> Tensor:
    """The rows of the first and the last sequence."""
    ends = sorted({0, case.batch_size - 1})
    return x.unflatten(0, (case.batch_size, -1))[ends].flatten(0, 1)


class Decoding(Implementation):
    """`function` and `reference` take a case and a layer, and return a step."""

    def repeats(self, case: Any) -> int:
        return case.layers

    def passes(self, case: Any, function: Function | None = None) -> dict[str, Pass]:
        make, layers = function or self.function, range(case.layers)
        replay, results = captured([make(case, layer) for layer in layers], case.device)

        def forward() -> Named:
            replay()
            return dict(o=results[-1])

        return dict(forward=forward)

    def check(self, case: Any, name: str, results: Named) -> dict[str, float]:
        last = case.layers - 1
        found, expected = results["o"], self.reference(case, last)()
        if isinstance(expected, Tensor):
            return dict(o=compare("o", of_ends(case, found), expected))
        # Where scores tie to rounding another block is as good, and gives other numbers.
        ours = self.function(case, last)().block_indices
        alike = (ours == expected.block_indices).all(-1)  # [T, HKV]
        if alike.float().mean() < LEAST_ALIKE:
            raise WrongResult(f"of {alike.numel()} choices of blocks {int(alike.sum())} are right")
        shape = (case.config.num_kv_heads, -1)
        found, expected = (x.unflatten(1, shape)[alike] for x in (found, expected.o))
        return dict(o=compare("o", found, expected))


def captured(steps: list[Step], device: str) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays a CUDA graph of steps, and a list whose last member is the last one's output;
    where there is no GPU, the steps themselves."""
    results: list[Tensor] = []

    def run() -> None:
        for step in steps:
            found = step()
            results.append(found if isinstance(found, Tensor) else found.o)

    if device != "cuda":
        return run, results
    graph, _ = record(run)
    return graph.replay, results[-1:]


class LayerDecoding(Layer):
    """A whole layer's step, with its projections, into an `NSACache` that has the context."""

    def passes(self, case: Any, function: Function | None = None) -> dict[str, Pass]:
        module, x, new = (function or self.function)(case), case["x"], case.num_new
        held = case.num_tokens - new
        cache = NSACache(module.config, max_length=case.num_tokens + REPLAYS * new)
        with torch.no_grad():
            for part in x[:, :held].split(CHUNK, dim=1):
                module(part, cache=cache)
            token = x[:, held:].contiguous()
            step = partial(module, token, cache=cache)
            replay, results = captured([step], case.device)

        @torch.no_grad()
        def forward() -> Named:
            if case.device == "cuda":
                if cache.num_tokens + new > cache.max_length:
                    cache.crop(cache.num_tokens - held)
                cache.advance(new)
            replay()
            return dict(y=results[-1])

        return dict(forward=forward)

    def check(self, case: Any, name: str, results: Named) -> dict[str, float]:
        """Compares the first step after so few tokens that every block is chosen."""
        few = case.config.block_size * case.config.num_selected_blocks
        case = dataclasses.replace(case, num_tokens=min(case.num_tokens, few))
        module, x = self.function(case), case["x"]
        with torch.no_grad():
            cache = NSACache(module.config)
            module(x[:, : -case.num_new], cache=cache)
            found = module(x[:, -case.num_new :], cache=cache)
            expected = self.reference(case)(x)[:, -case.num_new :]
        return dict(y=compare("y", found, expected, LAYER_TOLERANCE))


NSA_DECODE = Decoding(
    "nsa_decode", "nsa_fsa, decoding", "ours", nsa_step, partial(nsa_step, backend="reference"), ()
)

LAYER_DECODE = LayerDecoding.of("layer_decode", "nsa_fsa, a layer's step", layer)


def step_of(full: Implementation, step: Function) -> Decoding:
    """Full attention of new tokens, as who computes it of all."""
    others: Options = dict(reads_blocks=full.reads_blocks, distribution=full.distribution)
    return Decoding(full.name, full.label, full.kind, step, full_step, (), **others)


SDPA = step_of(CUDNN, sdpa_step)
FULL_DECODING = [
    step_of(FLASH_ATTN_4, flash_attn_4_step),
    SDPA,
    step_of(SDPA_FLASH, partial(sdpa_step, backend="FLASH_ATTENTION")),
]
