"""A patched transformers model on a GPU: how often its forward waits, its dense layers,
and a cache that is kept elsewhere.
"""

import itertools
import warnings

import pytest
import torch

import nsa_fsa
from tests.model_sizes import model_sizes
from tests.on_gpu import GIB, needs, syncs_forbidden

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")

LENGTH, PADDING = 2048, 1100
WAITS = {"plain": 0, "boundaries given": 0, "padded": 1, "packed by positions": 1}


def make_model(layers, num_layers=4, dtype=torch.bfloat16, **nsa):
    sizes = dict(
        vocab_size=128, hidden_size=512, intermediate_size=512, num_hidden_layers=num_layers
    )
    heads = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=LENGTH)
    model = transformers.LlamaForCausalLM(config).to("cuda", dtype)
    nsa_fsa.patch_model(model, preset="fsa-64x16", layers=layers, verbose=False, **nsa)
    return model


def batch_of(kind):
    ids = torch.randint(128, (1, LENGTH), device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in (1000, 48, 1000)])[None]
    if kind == "boundaries given":
        ends = torch.tensor([0, 1000, 1048, LENGTH], dtype=torch.int32, device="cuda")
        return dict(input_ids=ids, position_ids=positions, cu_seq_lens_q=ends, max_length_q=1000)
    if kind == "padded":
        mask = torch.arange(LENGTH, device="cuda") >= PADDING
        return dict(input_ids=ids, attention_mask=mask[None].long())
    return dict(input_ids=ids, position_ids=positions) if "packed" in kind else dict(input_ids=ids)


def step(model, batch):
    model(**batch, use_cache=False).logits.float().sum().backward()


def waits(model, batch):
    """How often a step waits for the GPU, once kernels are compiled and chosen."""
    step(model, batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return len([w for w in found if "synchronizing" in str(w.message)])


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=str)
@pytest.mark.parametrize("kind", WAITS)
def test_a_forward_waits_once_at_most(kind, layers):
    """Beside what transformers waits for to make the mask of dense layers."""
    model, batch = make_model(layers).train(), batch_of(kind)
    if WAITS[kind] == 0 and layers is None:
        step(model, batch)
        with syncs_forbidden():
            step(model, batch)
        return
    found = waits(model, batch)
    of_dense_layers = 0 if layers is None else waits(nsa_fsa.unpatch_model(model), batch)
    assert found == WAITS[kind] + of_dense_layers


@torch.no_grad()
def test_an_offloaded_cache():
    model = make_model(None, num_layers=3).eval()
    ids = torch.randint(1, 128, (2, 300), device="cuda")
    found = [
        model.generate(ids, max_new_tokens=9, do_sample=False, past_key_values=cache)
        for cache in (transformers.DynamicCache(), transformers.DynamicCache(offloading=True))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", WAITS)
@torch.no_grad()
def test_sequences_together_equal_each_alone(kind):
    """One dense layer beside one sparse, which reads every block of at most 1,024 tokens:
    rounding cannot choose others.
    """
    model, batch = make_model([1], num_layers=2).eval(), batch_of(kind)
    cuts = {"plain": (0, LENGTH), "padded": (PADDING, LENGTH)}.get(kind, (0, 1000, 1048, LENGTH))
    logits = model(**batch, use_cache=False).logits[0].float()
    for start, stop in itertools.pairwise(cuts):
        alone = model(batch["input_ids"][:, start:stop], use_cache=False).logits[0].float()
        # bfloat16 through two layers
        assert (logits[start:stop] - alone).norm() < 0.02 * alone.norm(), (start, stop)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_generate_compiles_a_step_over_a_static_cache(dtype):
    """Where kernels decode, into a CUDA graph, padded too; the reference would read lengths."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_model(None, num_layers=2, dtype=dtype).eval()
    ids = torch.randint(1, 128, (2, 700), device="cuda")
    options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)
    for padding in (0, 90):
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        expected = model.generate(ids * mask, attention_mask=mask, **options)
        options["attention_mask"] = mask
        for _ in range(2):
            found = model.generate(ids * mask, cache_implementation="static", **options)
            assert torch.equal(found, expected)
        del options["attention_mask"]
        graphs = (1 + (padding > 0)) * (dtype == torch.float32)
        assert counters["stats"].get("unique_graphs", 0) == graphs
    assert not counters["inductor"]["cudagraph_skips"]
    assert not counters["graph_break"]


TURNED = dict(compress_rope="after", compress_position_embedding=True)
LEARNED = dict(compress_k="mlp", compress_v="gated")


@torch.no_grad()
@pytest.mark.parametrize(
    "nsa", [TURNED, LEARNED, {**TURNED, **LEARNED}], ids=["turned", "learned", "both"]
)
def test_steps_of_every_compression_wait_for_nothing(nsa):
    """And are one CUDA graph beside a static cache; windows of 32 tokens end at every 16th."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = make_model(None, num_layers=2, dtype=torch.float32, **nsa).eval()
    ids = torch.randint(1, 128, (2, 740), device="cuda")
    whole, cache = model(ids, use_cache=False).logits, transformers.DynamicCache()
    model(ids[:, :700], past_key_values=cache)
    found = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(700, 720)]
    with syncs_forbidden():
        found += [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(720, 740)]
    torch.testing.assert_close(torch.cat(found, 1), whole[:, 700:], rtol=1e-3, atol=1e-3)

    options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **options)
    for _ in range(2):
        found = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(found, expected)
    assert counters["stats"].get("unique_graphs", 0) == 1
    assert not counters["inductor"]["cudagraph_skips"]
    assert not counters["graph_break"]


@needs(40)
@torch.no_grad()
def test_a_million_tokens_in_chunks():
    """A layer of Llama-3-8B: beside weights and cache 3 GiB at most, and the first tokens are as if
    there were no others."""
    length, chunk = 1 << 20, 16384
    sizes = model_sizes(4096, 14336, 1, 32, 8, vocab_size=128, max_position_embeddings=length)
    config = transformers.LlamaConfig(**sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    nsa_fsa.patch_model(model, preset="fsa-64x16", verbose=False)
    ids = torch.randint(128, (1, length), device="cuda")
    expected = model(ids[:, :chunk], use_cache=False).logits
    weights = torch.cuda.memory_allocated() - ids.nbytes - expected.nbytes
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    torch.cuda.reset_peak_memory_stats()
    for n in range(0, length, chunk):
        found = model(ids[:, n : n + chunk], past_key_values=cache, logits_to_keep=chunk).logits
        if n == 0:
            assert (found - expected).norm() < 2**-8 * expected.norm()
    assert torch.isfinite(found).all()
    kept = length * 8 * 128 * 2 * 2 * (1 + 1 / 16)  # keys and values, and compressed ones
    assert torch.cuda.max_memory_allocated() < weights + kept + 3 * GIB
