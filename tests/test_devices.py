"""Operators, the layer and models where the caller has not made the tensors' GPU the current one,
or is new to CUDA.
"""

import copy
import dataclasses
import threading

import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSAConfig, patch_model
from nsa_fsa.config import BRANCHES
from nsa_fsa.ops.common import replay
from nsa_fsa.ops.common.backends import Backends
from tests.cases import (
    DIFFERENTIABLE,
    Case,
    call,
    gradients,
    make_inputs,
    operators_and_backends,
    output,
    select,
)

pytestmark = pytest.mark.gpu

CASE = Case(
    "devices", (300, 0, 65), 2, 2, 128, 128, torch.bfloat16, 32, 16, 64, 2, 1, 1, 100, seed=5
)
ON_ITS_GPU = [pair for pair in operators_and_backends() if pair.values[1] != "reference"]
LAYERS = [dict(), dict(qk_norm=True, kv_per_branch=True, recompute=BRANCHES)]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# FlashAttention's backward sums in a fixed order only so.
same_bits = pytest.mark.usefixtures("deterministic_only")


def run_operator(operator, backend, device="cuda"):
    x = make_inputs(CASE, device=device, requires_grad=True)
    o = output(call(operator, CASE, x, backend))
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    return [o.detach(), *gradients(operator, o, x, do)]


def run_selection(device="cuda"):
    x = make_inputs(CASE, device=device)
    _, lse = call("compressed_attention", CASE, x)
    return [select(CASE, x, lse)]


def make_layer(**changes):
    torch.manual_seed(0)
    config = NSAConfig(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=128, **changes)
    return NativeSparseAttention(config, dtype=torch.bfloat16)


def run_layer(layer, device="cuda"):
    layer = copy.deepcopy(layer).to(device)
    x = (
        torch.randn(2, 300, 256, generator=torch.Generator().manual_seed(1))
        .to(device, torch.bfloat16)
        .requires_grad_()
    )
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]


def in_a_new_thread(run):
    """What `run` returns there, or raises."""
    results, errors = [], []

    def body():
        try:
            results.append(run())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            a.cpu(),
            b.cpu(),
            rtol=0,
            atol=0,
            equal_nan=True,
            msg=lambda text, n=number: f"{n}: {text}",
        )


# In the threads nothing but the operator may use CUDA: neither the making of inputs, nor the
# filling of new memory under deterministic algorithms, nor the compiler; and several sequences
# would take a kernel without bulk copies first.
ONE_SEQUENCE = dataclasses.replace(CASE, lengths=(300,))


def twice(run):
    """What `run` returns. A second result is dropped, for the thread to find its memory:
    to ask CUDA for more is to use it.
    """
    result, _ = run(), run()
    return result


@pytest.mark.parametrize(("operator", "backend"), ON_ITS_GPU)
def test_operators_in_a_new_thread(operator, backend):
    x = make_inputs(ONE_SEQUENCE, device="cuda")

    def run():
        return [output(call(operator, ONE_SEQUENCE, x, backend))]

    expected = twice(run)
    assert_same_bits(in_a_new_thread(run), expected)


def test_selection_in_a_new_thread():
    x = make_inputs(ONE_SEQUENCE, device="cuda")
    _, lse = call("compressed_attention", ONE_SEQUENCE, x)

    def run():
        return [select(ONE_SEQUENCE, x, lse)]

    expected = twice(run)
    assert_same_bits(in_a_new_thread(run), expected)


@two_gpus
@same_bits
@pytest.mark.parametrize(("operator", "backend"), ON_ITS_GPU)
def test_operators_on_another_gpu(operator, backend):
    assert torch.cuda.current_device() == 0
    assert_same_bits(run_operator(operator, backend, "cuda:1"), run_operator(operator, backend))
    assert torch.cuda.current_device() == 0


@two_gpus
@same_bits
def test_selection_on_another_gpu():
    assert_same_bits(run_selection("cuda:1"), run_selection())


@two_gpus
@same_bits
@pytest.mark.parametrize("changes", LAYERS, ids=["plain", "norm_branches_recompute"])
def test_the_layer_on_another_gpu(changes):
    layer = make_layer(**changes)
    assert_same_bits(run_layer(layer, "cuda:1"), run_layer(layer))


@two_gpus
@same_bits
def test_a_model_over_two_gpus(monkeypatch):
    """As `device_map="auto"` lays a model out. Once tensors have gone from GPU to GPU either can
    read the other's memory, so that results would be right if the wrong one computed."""
    accelerate = pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(
        torch.bfloat16
    )
    patch_model(model)
    tokens = torch.randint(64, (1, 300), generator=torch.Generator().manual_seed(1))

    def run(model):
        result = model(input_ids=tokens.cuda(), labels=tokens.cuda(), use_cache=False)
        model.zero_grad()
        result.loss.backward()
        return [result.logits.detach(), *(parameter.grad for parameter in model.parameters())]

    places = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "model.rotary_emb": 0,
    }
    expected = run(copy.deepcopy(model).cuda())
    choose, where = Backends.choose, set()
    monkeypatch.setattr(replay, "ENABLED", False)  # a tape chooses no more

    def watched(operator, call, **options):
        where.add((call.device.index, torch.cuda.current_device()))
        return choose(operator, call, **options)

    monkeypatch.setattr(Backends, "choose", watched)
    assert_same_bits(run(accelerate.dispatch_model(model, {**places, "lm_head": 1})), expected)
    assert where == {(0, 0), (1, 1)}


def test_every_operator_is_here():
    assert {pair.values[0] for pair in ON_ITS_GPU} == set(DIFFERENTIABLE)
