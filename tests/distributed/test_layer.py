"""A layer whose sequences two and four processes share: its outputs and gradients are those of one
process."""

import math
import sys

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from nsa_fsa.distributed import ContextParallel
from nsa_fsa.modules.rotary import RotaryEmbedding
from nsa_fsa.sequences import cu_seqlens_from_lengths
from nsa_fsa.visualization import record
from tests.distributed.processes import on_ranks, printed_by, say, summed
from tests.modules.layers import VARIANTS, make_variant, randn

HEADS = dict(num_heads=8, num_kv_heads=4)
# KV heads that several ranks share, by the number of ranks.
FEWER = {2: (1, 3), 4: (1, 2)}
CASES = {name: {} for name in VARIANTS if name != "own-modules"}
CASES["recomputed"] = dict(recompute=("compressed", "selected", "sliding"))
ON_FOUR = ("mean-linear", "branches-gated")
# Lengths of packed sequences, 96 tokens together, or rows of so many tokens.
PACKED = {"one": [96], "cut by ranks": [37, 3, 0, 50, 6], "short": [5] * 9 + [51]}
ROWS = (2, 48)


@pytest.mark.slow
def test_equals_one_process(tmp_path):
    printed = printed_by("tests.distributed.test_layer", "compare", tmp_path)
    of_two = [*CASES, "1 heads", "3 heads", "compiled"]
    of_four = [*ON_FOUR, "1 heads", "2 heads"]
    assert printed == [*(f"2 {name}" for name in of_two), *(f"4 {name}" for name in of_four)]


def test_what_cannot_be_shared_is_refused(tmp_path):
    printed = printed_by("tests.distributed.test_layer", "refuse", tmp_path)
    of_record, of_own, of_mask, of_cache = printed
    assert "layer 7 cannot be recorded while 2 ranks of context_parallel share 3 KV" in of_record
    assert "FirstPlusTanhOfLast, cannot be split" in of_own
    assert "attention_mask is not available with context_parallel" in of_mask
    assert "a cache is not available with context_parallel" in of_cache


def test_one_rank_computes_what_none_does(one_rank):
    layer, x = make_variant("default"), randn(2, 40, 24)
    assert torch.equal(layer(x, context_parallel=ContextParallel(one_rank)), layer(x))


def test_a_group_is_asked_for(one_rank):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    assert ContextParallel(mesh["cp"]).size == 1
    for wrong in (mesh, None, 2, [0]):
        with pytest.raises(ValueError, match=r"must be a process group.*Fix: mesh"):
            ContextParallel(wrong)


# --- In each of the processes ---------------------------------------------------------------------


def compare():
    size = distributed.get_world_size()
    for name in CASES if size == 2 else ON_FOUR:
        variant = name if name in VARIANTS else "default"
        layer = make_variant(variant, **HEADS, **CASES[name])
        for lengths in PACKED.values():
            cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
            packed = dict(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
            check(layer, (1, 96), groups=4 // size, **packed)
        check(layer, ROWS)
        if layer.rotary is not None:
            position_ids = torch.arange(48) + torch.tensor([[3], [11]])
            check(layer, ROWS, position_ids=position_ids)
            rotation = RotaryEmbedding(layer.config)(position_ids[0], 100, torch.float64)
            check(layer, ROWS, position_embeddings=[x[None] for x in rotation])
        say(size, name)
    for number, name in zip(FEWER[size], ON_FOUR, strict=True):
        layer = make_variant(name, num_heads=2 * number, num_kv_heads=number)
        for lengths in PACKED.values():
            cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
            check(layer, (1, 96), cu_seqlens=cu_seqlens, max_seqlen=max(lengths))
        check(layer, ROWS, groups=number // math.gcd(number, size))
        say(size, f"{number} heads")
    if size == 2:
        check_compiled(make_variant("default", **HEADS))


def check(layer, shape, groups=1, **arguments):
    cp = ContextParallel(distributed.group.WORLD, groups=groups)
    x, do = randn(*shape, 24, seed=1), randn(*shape, 24, seed=2)
    expected, expected_gradients = outcome(layer, x, do, **arguments)
    if "position_ids" in arguments:
        arguments["position_ids"] = cp.part(arguments["position_ids"])
    if "position_embeddings" in arguments:
        arguments["position_embeddings"] = [*map(cp.part, arguments["position_embeddings"])]
    o, gradients = outcome(layer, cp.part(x), cp.part(do), context_parallel=cp, **arguments)
    assert_close(cp.gather(o), expected, expected.abs().max(), "o")
    dx, *of_parameters = gradients
    largest = max(y.abs().max() for y in expected_gradients)
    assert_close(cp.gather(dx), expected_gradients[0], largest, "dx")
    names = [name for name, _ in layer.named_parameters()]
    for name, y, z in zip(names, of_parameters, expected_gradients[1:], strict=True):
        assert_close(summed(y), z, largest, name)


def check_compiled(layer):
    """In one graph, exchanges included."""
    cp = ContextParallel(distributed.group.WORLD, groups=2)
    x, do = (cp.part(randn(*ROWS, 24, seed=seed)) for seed in (1, 2))
    expected, expected_gradients = outcome(layer, x, do, context_parallel=cp)
    layer.compile(backend="aot_eager", fullgraph=True)
    o, gradients = outcome(layer, x, do, context_parallel=cp)
    for y, z in zip((o, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    say("2 compiled")


def outcome(layer, x, do, **arguments):
    """The output, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    o = layer(x, **arguments)
    return o.detach(), torch.autograd.grad(o, [x, *layer.parameters()], do)


def assert_close(actual, expected, largest, what):
    error = (actual - expected).abs().max() / largest
    assert error < 1e-12, f"{what}: {error}"


def recorded(layer, x, cp):
    with record(layer):
        layer(x, context_parallel=cp)


def refuse():
    cp = ContextParallel(distributed.group.WORLD)
    x = randn(1, 20, 24)
    three = make_variant("default", num_heads=6, num_kv_heads=3)
    three.layer_idx = 7
    layer = make_variant("default")
    attempts = (
        lambda: recorded(three, x, cp),
        lambda: make_variant("own-modules")(x, context_parallel=cp),
        lambda: layer(x, context_parallel=cp, attention_mask=torch.ones(1, 20)),
        lambda: layer(x, context_parallel=cp, cache=object()),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"Fix: ") as error:
            attempt()
        say(error.value)


if __name__ == "__main__":
    function = {x.__name__: x for x in (compare, refuse)}[sys.argv[1]]
    for size in (2, 4) if function is compare else (2,):
        on_ranks(function, size, sys.argv[2])
