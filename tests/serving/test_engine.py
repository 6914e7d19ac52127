"""Greedy tokens of vLLM against those of transformers' generate, in float32."""

import copy
import inspect
import multiprocessing
import os
import textwrap
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from vllm.config import CompilationMode

from nsa_fsa.decode import reference
from nsa_fsa.integrations.transformers import patch_model
from nsa_fsa.integrations.vllm.attention import PagedNSA
from nsa_fsa.integrations.vllm.names import OPERATOR, CompilationConfig
from nsa_fsa.integrations.vllm.warm_up import small_steps
from nsa_fsa.ops.block_selection import reference as block_selection
from nsa_fsa.ops.common import profiler
from nsa_fsa.ops.selected_attention.operator import FEW_QUERIES
from tests.serving import checkpoints
from tests.serving.engines import PAGE, count, engine, run, tokens_of


@pytest.fixture(scope="module")
def plain(llama):
    with engine(llama.folder) as llm:
        yield llm


@pytest.fixture(scope="module")
def shared(llama):
    """Prompts that begin alike, and what transformers makes of each alone."""
    prompts = checkpoints.make_shared()
    return prompts, checkpoints.continue_greedily(llama.model, prompts)


def test_the_tokens_tell(llama):
    """A dense twin would not pass: what is read matters to nearly every token."""

    other = copy.deepcopy(llama.model)
    patch_model(other, window_size=16, num_selected_blocks=3, verbose=False)
    found = checkpoints.continue_greedily(other, llama.prompts)
    long = [i for i, x in enumerate(llama.prompts) if len(x) > 100]
    assert all(found[i] != llama.expected[i] for i in long)


def test_a_batch_of_all_lengths(llama, plain):
    assert tokens_of(run(plain, llama.prompts)) == llama.expected


def test_the_same_prompts_again_come_from_the_prefix_cache(llama, plain):
    run(plain, llama.prompts)
    outputs = run(plain, llama.prompts)
    assert tokens_of(outputs) == llama.expected
    cached = [x.num_cached_tokens for x in outputs]
    assert cached == [(len(x) - 1) // PAGE * PAGE for x in llama.prompts]


def run_shared(llm, prompts):
    """All at once, over the pages of the first one."""
    llm.reset_prefix_cache()
    run(llm, prompts[:1])
    return run(llm, prompts)


def test_prompts_that_begin_alike_share_pages(plain, shared):
    prompts, expected = shared
    outputs = run_shared(plain, prompts)
    assert tokens_of(outputs) == expected
    assert [x.num_cached_tokens for x in outputs] == [512, 512, 512, 256]


def without_shift(function):
    """Has a compressed token lie where its window begins, not where it is complete."""
    source = textwrap.dedent(inspect.getsource(function))
    assert "hops - 1" in source
    names = dict(function.__globals__)
    exec(source.replace("hops - 1", "0"), names)
    return names[function.__name__]


@pytest.mark.skipif(torch.cuda.is_available(), reason="changes the reference; a GPU runs kernels")
def test_pages_could_not_be_shared_without_the_shift_of_states(llama, plain, shared, monkeypatch):
    for name in ("append_tokens", "nsa_decode"):
        monkeypatch.setattr(reference, name, without_shift(getattr(reference, name)))
    for name in ("_compress_new", "_prefill"):
        monkeypatch.setattr(PagedNSA, name, without_shift(getattr(PagedNSA, name)))
    plain.reset_prefix_cache()
    # What the mutation writes it reads, so that a sequence by itself is right.
    assert tokens_of(run(plain, llama.prompts)) == llama.expected
    prompts, expected = shared
    found = tokens_of(run_shared(plain, prompts))
    assert sum(x != y for x, y in zip(found, expected, strict=True)) >= 2
    plain.reset_prefix_cache()


def test_logprobs(llama, plain):
    """Those of transformers, to the rounding of float32."""
    prompt, expected = llama.prompts[-1], llama.expected[-1]
    (output,) = run(plain, [prompt], logprobs=1)
    found = [
        x[token].logprob for x, token in zip(output.outputs[0].logprobs, expected, strict=True)
    ]
    with torch.no_grad():
        logits = llama.model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(expected)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), wanted, atol=2e-5, rtol=0)


def test_nothing_is_timed_while_requests_wait(llama, plain, monkeypatch):
    """Neither where tokens decode nor where a prompt is read."""
    attend, may_time = PagedNSA.attend, []

    def watched(*args):
        may_time.append(profiler.may_time(torch.device("cpu")))
        return attend(*args)

    monkeypatch.setattr(PagedNSA, "attend", watched)
    run(plain, llama.prompts[-1:])
    assert may_time
    assert not any(may_time)
    assert profiler.may_time(torch.device("cpu"))


def test_kernels_are_compiled_before_requests(llama, plain, monkeypatch):
    """For one sequence and for several, of few new tokens and of many, beside what decodes; and
    the pages of requests are not touched."""
    attend, seen = PagedNSA.attend, []

    def watched(layer, *args):
        seen.append((layer, args[-1]))
        return attend(layer, *args)

    monkeypatch.setattr(PagedNSA, "attend", watched)
    outputs = run(plain, llama.prompts)
    layer = seen[-1][0]
    seen.clear()
    caches = layer.kv_cache, layer.states.kv_cache
    before = [x.clone() for x in caches]
    widths = (layer.q_size, layer.kv_size, layer.kv_size, layer.gate.out_features)
    layer.warm_up(*(torch.randn(700, x) for x in widths))
    found = {
        (len(chunk.sequences), max(x.num_new for x in chunk.sequences) >= FEW_QUERIES)
        for _, batch in seen
        for chunk in batch.chunks
    }
    assert found == {(1, False), (1, True), (2, False), (2, True)}
    assert any(batch.groups and batch.chunks for _, batch in seen)
    assert layer.kv_cache is caches[0]
    assert layer.states.kv_cache is caches[1]
    assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))
    assert tokens_of(run(plain, llama.prompts)) == tokens_of(outputs)


def test_small_steps_are_those_that_can_come():
    steps = list(small_steps(64, 512, 400, torch.device("cpu")))
    assert [x.num_tokens for x in steps] == [20, 52]
    assert all(int(x.batch.chunks[0].pages.max()) < x.num_pages for x in steps)


def test_chunked_prompts(llama):
    """Chunks end anywhere in a window and a page, and come in one step with tokens that decode."""
    with engine(llama.folder, max_num_batched_tokens=90, max_num_seqs=8) as llm:
        assert tokens_of(run(llm, llama.prompts)) == llama.expected


def test_larger_pages(llama):
    with engine(llama.folder, block_size=128) as llm:
        outputs = run(llm, llama.prompts)
        assert tokens_of(outputs) == llama.expected
        assert tokens_of(run(llm, llama.prompts)) == llama.expected


def test_preempted_sequences(llama):
    prompts, expected = llama.prompts[-3:] * 3, llama.expected[-3:] * 3
    options = dict(num_gpu_blocks_override=18, enable_prefix_caching=False)
    with engine(llama.folder, **options) as llm:
        assert tokens_of(run(llm, prompts)) == expected
        assert count(llm, "num_preemptions") > 0


def speculate(folder, prompts):
    """What is generated, and how many tokens were guessed and accepted."""
    guess = dict(method="ngram", num_speculative_tokens=5, prompt_lookup_min=1, prompt_lookup_max=3)
    with engine(folder, speculative_config=guess) as llm:
        found = tokens_of(run(llm, prompts))
        names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
        return found, *(count(llm, name) for name in names)


@pytest.mark.slow
def test_speculative_tokens(make_served):
    """Guessed from what came before; what is rejected leaves no trace in the pages. In a process of
    its own, because no other engine starts in one where vLLM 0.32 has imported numba."""
    served = make_served(words=5)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, drafted, accepted = pool.submit(speculate, served.folder, served.prompts).result()
    assert found == served.expected
    assert 20 < accepted < drafted - 20


@pytest.mark.slow
def test_compiled(llama):
    with engine(llama.folder, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        assert OPERATOR in CompilationConfig._attention_ops  # where graphs are cut on a GPU
        assert tokens_of(run(llm, llama.prompts)) == llama.expected


def run_on_two_ranks(folder, prompts):
    with engine(folder, tensor_parallel_size=2) as llm:
        return tokens_of(run(llm, prompts))


@pytest.mark.slow
def test_tensor_parallel(make_served, monkeypatch):
    """Each rank has a KV head, its compressors and its gates. In a process of its own, whose ranks
    are bound to a core each."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    served = make_served(compress_k="gated", compress_v="mlp")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(run_on_two_ranks, served.folder, served.prompts).result()
    assert found == served.expected


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_families(family, make_served):
    served = make_served(family)
    with engine(served.folder) as llm:
        assert tokens_of(run(llm, served.prompts)) == served.expected


SETTINGS = {
    "mean": dict(compress_k="mean", compress_v="mean", compress_position_embedding=False),
    "mean_before": dict(compress_k="mean", compress_v="mean", compress_rope="before"),
    "linear": dict(compress_k="linear", compress_v="linear"),
    "mlp": dict(compress_k="mlp", compress_v="mlp", compress_rope="before"),
    "gated": dict(compress_k="gated", compress_v="weighted"),
    "one_gate": dict(gate="per_token", block_size=32, num_selected_blocks=4),
    "one_layer": dict(layers=[1]),
    "dense_below": dict(dense_below=150),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_choice_of_blocks_is_left_to_rounding(name, make_served, monkeypatch):
    """Between the last block that is chosen and the best one that is not there is more than
    float32 rounds, of which vLLM and transformers may make different things."""
    found, choose = [], block_selection.select_blocks

    def watched(*args, **sizes):
        chosen = choose(*args, **sizes)
        arguments = inspect.signature(choose).bind(*args, **sizes).arguments
        names = inspect.signature(block_selection.block_scores).parameters
        scores = block_selection.block_scores(**{x: arguments.get(x) for x in names})
        own = torch.arange(len(chosen))[:, None, None] // arguments["block_size"]
        block = torch.arange(scores.shape[2])
        free = (block >= arguments["init_blocks"]) & (block <= own - arguments["local_blocks"])
        taken = (chosen[..., None] == block).any(2)
        last = scores.masked_fill(~(free & taken), torch.inf).amin(2)
        best = scores.masked_fill(~free | taken, 0).amax(2)
        found.append(((last - best) / best)[best > 1e-3])
        return chosen

    monkeypatch.setattr(block_selection, "select_blocks", watched)
    served = make_served(**SETTINGS[name])
    found.clear()
    with torch.no_grad():
        for prompt in served.prompts:
            served.model(torch.tensor([prompt]))
    assert torch.cat(found).min() > 2e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, make_served):
    served = make_served(**SETTINGS[name])
    with engine(served.folder, max_num_batched_tokens=256) as llm:
        assert tokens_of(run(llm, served.prompts)) == served.expected
        assert tokens_of(run(llm, served.prompts)) == served.expected  # of cached prefixes
