"""What `generate` of transformers takes for a whole model, dense and sparse: until the first token,
and for each further one.

The model has the shape of Llama-3-8B, and random weights. Prompts of a batch are one random prompt,
computed once. Over a static cache `generate` compiles a step by itself; over a dynamic one it
launches kernels one by one, among them those of FlashAttention, which no mask stands against.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from nsa_fsa import NSAConfig, patch_model, unpatch_model
from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.results import Results

LLAMA_3_8B: dict[str, Any] = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=1 << 20,
    rope_parameters=dict(rope_type="default", rope_theta=500000.0),
)
NEW_TOKENS, RUNS = 64, 3
METHOD: dict[str, Any] = dict(
    timing="first_token: wall time of generate with one new token and a dynamic cache, median of "
    f"{RUNS} after one. further_tokens: wall time of {NEW_TOKENS} new tokens less that of 4, each "
    f"the median of {RUNS}, over a static cache with the prompt, divided by their number. "
    "uncompiled_tokens: the same over a dynamic cache"
)


def make_model(device: str = "cuda", **changes: Any) -> Any:
    """The dense model in bfloat16, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_3_8B | changes, dtype=torch.bfloat16)
    with torch.device(device):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def prompt_of(model: Any, tokens: int) -> torch.Tensor:
    generator = torch.Generator(model.device).manual_seed(1)
    vocabulary = model.config.vocab_size
    return torch.randint(vocabulary, (1, tokens), generator=generator, device=model.device)


def seconds_of(run: Callable[[], Any], runs: int = RUNS) -> list[float]:
    times = []
    for _ in range(runs):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - began)
    return times


def row_of(times: list[float]) -> dict[str, Any]:
    """The median of some milliseconds, and all of them."""
    return dict(ms=statistics.median(times), ms_20=min(times), ms_80=max(times), times=times)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def first_token(model: Any, prompt: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """Seconds until there is a first token, with transformers' own dynamic cache."""

    def run() -> None:
        model.generate(prompt.expand(batch_size, -1), max_new_tokens=1, do_sample=False)

    run()
    return row_of([1e3 * x for x in seconds_of(run)])


@torch.no_grad()
def filled_cache(model: Any, prompt: torch.Tensor, batch_size: int, cache: Any) -> Any:
    """The cache, all of whose rows hold the prompt now."""
    one: Any = DynamicCache(config=model.config)
    model(prompt[:, :-1], past_key_values=one, logits_to_keep=1)
    for source, target in zip(one.layers, cache.layers, strict=True):
        k, v = (x.expand(batch_size, -1, -1, -1) for x in (source.keys, source.values))
        target.update(k, v)
        source.keys = source.values = None
    # By which a sparse model compresses all that is there.
    model(prompt[:, -1:].expand(batch_size, -1), past_key_values=cache)
    return cache


def rewind(cache: Any, held: int) -> None:
    if not cache.is_compileable:
        if more := cache.get_seq_length() - held:
            cache.crop(-more)
        return
    for layer in cache.layers:
        layer.cumulative_length.fill_(held)
        if getattr(layer, "compressed", None) is not None:
            layer.compressed.num_columns.fill_(held)


def each_token(model: Any, prompt: torch.Tensor, batch_size: int, cache: Any) -> dict[str, Any]:
    """Milliseconds of a step after the prompt, from what many steps take more than a few."""
    tokens, few = prompt.shape[1], 4
    cache = filled_cache(model, prompt, batch_size, cache)
    more = torch.cat((prompt, prompt[:, :1]), dim=1).expand(batch_size, -1)

    def run(new: int) -> None:
        rewind(cache, tokens)
        options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        model.generate(more, past_key_values=cache, **options)

    began = time.perf_counter()
    run(few)
    run(few)
    compiling = time.perf_counter() - began
    short, long = (seconds_of(partial(run, n)) for n in (few, NEW_TOKENS))
    each = [1e3 * (x - statistics.median(short)) / (NEW_TOKENS - few) for x in long]
    found = row_of(each)
    return found | dict(tokens_per_s=1e3 * batch_size / found["ms"], first_runs_s=compiling)


def further_tokens(model: Any, prompt: torch.Tensor, batch_size: int) -> dict[str, Any]:
    room = prompt.shape[1] + NEW_TOKENS + 2
    static = StaticCache(config=model.config, max_cache_len=room)
    return each_token(model, prompt, batch_size, static)


def uncompiled_tokens(model: Any, prompt: torch.Tensor, batch_size: int) -> dict[str, Any]:
    return each_token(model, prompt, batch_size, DynamicCache(config=model.config))


MEASURED = {x.__name__: x for x in (first_token, further_tokens, uncompiled_tokens)}


@contextmanager
def as_dense(model: Any, attention: str) -> Iterator[str]:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    yield f"dense_{attention}"
    model.set_attn_implementation(before)


@contextmanager
def as_sparse(model: Any) -> Iterator[str]:
    patch_model(model, "fsa-64x16", verbose=False)
    yield "nsa_fsa"
    unpatch_model(model)


def sizes_of(model: Any, tokens: int) -> dict[str, Any]:
    """What a row of results says of the model."""
    config = NSAConfig.from_pretrained_config(model.config, preset="fsa-64x16")
    more = dict(num_layers=model.config.num_hidden_layers, num_new=1, kind="model")
    return Case(config, tokens).sizes() | more


def measure(
    results: Results,
    console: Console,
    lengths: list[int],
    batches: list[int],
    attentions: list[str],
    parts: list[str],
    model: Any,
) -> None:
    """Adds rows of every length, batch and way; one that does not run is left out and says why.

    parts: of MEASURED.
    """
    sizes = {tokens: sizes_of(model, tokens) for tokens in lengths}
    for way in (*(as_dense(model, x) for x in attentions), as_sparse(model)):
        with way as name:
            for tokens in lengths:
                prompt = prompt_of(model, tokens)
                steps = ("further_tokens", "uncompiled_tokens")
                calls = [("first_token", 1), *((x, n) for n in batches for x in steps)]
                for what, batch_size in (x for x in calls if x[0] in parts):
                    where = sizes[tokens] | dict(implementation=name, batch_size=batch_size)
                    where["pass"] = what
                    try:
                        found = MEASURED[what](model, prompt, batch_size)
                    except Exception as error:  # of memory, or of an attention that is not there
                        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                        results.add("not_timed", **where, reason=reason)
                        console.print(
                            f"{name}, {what}, {tokens}: {reason}", style="yellow", markup=False
                        )
                    else:
                        results.add("rows", **where, **found, errors={})
                        said = f"{name}, {what}, {batch_size} x {tokens}: {found['ms']:.4g} ms"
                        console.print(said, markup=False, highlight=False)
                    torch._dynamo.reset()
                    model.__dict__.pop("_compiled_call", None)
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
