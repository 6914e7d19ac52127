"""Gradients of the layer, compilation, memory, and training on every backend."""

import gc

import psutil
import pytest
import torch
from torch.func import functional_call

from nsa_fsa.cache import KeyValues
from nsa_fsa.config import BRANCHES
from nsa_fsa.sequences import Sequences
from tests.cases import backends_of, device_of, on_a_gpu_only
from tests.modules.layers import (
    VARIANTS,
    FirstPlusTanhOfLast,
    make_layer,
    make_variant,
    operations,
    randn,
    small_config,
)

# Few enough numbers for finite differences in every one; still 3 of 4 blocks selected and 6
# compressed tokens.
TINY = dict(
    hidden_size=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    kernel_size=4,
    kernel_stride=2,
    block_size=4,
    window_size=3,
)


def tiny_variant(name):
    own = (
        dict(compressor_k=FirstPlusTanhOfLast(), compressor_v=FirstPlusTanhOfLast())
        if name == "own-modules"
        else {}
    )
    return make_layer(small_config(**{**VARIANTS[name], **TINY}), gain=1.0, **own)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_the_input(variant):
    """Float64, every element. Selection is discrete, but constant within a step of 1e-6 unless
    two scores tie.
    """
    layer = tiny_variant(variant)
    x = randn(1, 14, 6).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_every_parameter(variant):
    """One parameter at a time, along a random direction of it (fast_mode):
    a wrong one cannot hide among the others.
    """
    layer, x = tiny_variant(variant), randn(1, 14, 6)
    for name, parameter in layer.named_parameters():

        def run(value, name=name):
            return functional_call(layer, {name: value}, (x,))

        assert torch.autograd.gradcheck(
            run, (parameter.detach().clone().requires_grad_(),), fast_mode=True
        ), name


def test_gradcheck_of_a_padded_and_a_packed_batch():
    layer, x = tiny_variant("mean-linear"), randn(2, 8, 6).requires_grad_()
    mask = torch.ones(2, 8)
    mask[0, :2] = 0
    mask[1, 7:] = 0
    assert torch.autograd.gradcheck(lambda x: layer(x, attention_mask=mask), (x,))
    cu_seqlens = torch.tensor([0, 7, 7, 9, 16], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: layer(x.view(1, 16, 6), cu_seqlens=cu_seqlens), (x,))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_trained(variant):
    """A non-zero gradient for each; with kv_per_branch for each branch's slice of the
    projections.
    """
    layer = make_variant(variant, torch.float32)
    output = layer(randn(2, 45, 24, dtype=torch.float32))
    output.backward(randn(2, 45, 24, dtype=torch.float32, seed=1))
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-4, name
    c = layer.config
    if c.kv_per_branch:
        for projection, width in (("k_proj", c.head_dim), ("v_proj", c.v_head_dim)):
            slices = layer.get_submodule(projection).weight.grad.unflatten(
                0, (c.num_kv_heads, 3, width)
            )
            assert (slices.abs().amax((2, 3)) > 1e-4).all(), projection


def test_padding_receives_no_gradient():
    layer, x = make_variant("default"), randn(2, 30, 24).requires_grad_()
    mask = torch.ones(2, 30)
    mask[0, :11] = 0
    mask[1, 25:] = 0
    layer(x, attention_mask=mask).backward(randn(2, 30, 24, seed=1))
    assert (x.grad[mask == 0] == 0).all()
    assert (x.grad[mask == 1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("scale", [30.0, 1e-3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_extreme_inputs(variant, scale):
    """Inputs x30, equal tokens, one huge token: finite output and gradients wherever float64's are,
    which they all are.
    """
    layer = make_variant(variant, torch.float32)
    equal = randn(1, 1, 24, dtype=torch.float32).expand(1, 45, 24)
    one_huge = randn(1, 45, 24, dtype=torch.float32)
    one_huge[0, 20] *= 1e3
    for x in (scale * randn(1, 45, 24, dtype=torch.float32), scale * equal, one_huge):
        x = x.clone().requires_grad_()
        output = layer(x)
        output.sum().backward()
        assert torch.isfinite(output).all()
        assert torch.isfinite(x.grad).all()


# --- Compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_equals_eager(variant):
    """fullgraph: one graph break would raise. aot_eager traces forward and backward through the
    fake operators.
    """
    torch._dynamo.reset()
    layer, x, do = make_variant(variant), randn(2, 45, 24), randn(2, 45, 24, seed=1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(function):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        output = function(inputs)
        output.backward(do)
        return [output, inputs.grad, *(p.grad for p in layer.parameters())]

    for actual, expected in zip(run(compiled), run(layer), strict=True):
        # Tracing may reorder sums, by which float64 changes in its last digits.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_no_recompilation_after_the_second_length():
    torch._dynamo.reset()
    layer = make_variant("default", torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def step(length):
        x = randn(2, length, 24, dtype=torch.float32).requires_grad_()
        output = compiled(x)
        output.sum().backward()
        torch.testing.assert_close(output, layer(x), rtol=1e-4, atol=1e-4)

    step(45)
    step(61)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (37, 64, 100, 45, 9):
            step(length)


# --- Memory ---------------------------------------------------------------------------------------


def test_memory_does_not_grow_over_50_steps():
    layer = make_variant("default", torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    x = randn(2, 256, 24, dtype=torch.float32)
    process = psutil.Process()

    def live_tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for step in range(55):
        optimizer.zero_grad()
        layer(x).pow(2).mean().backward()
        optimizer.step()
        if step == 4:
            tensors, memory = live_tensors(), process.memory_info().rss
    # One tensor per step would be 50; other tests' garbage may come and go.
    assert live_tensors() - tensors < 25
    # A step's activations (q, k, v, three branch outputs: 2 * 256 * 7 * 32 floats) are 0.46 MB:
    # kept, they would be 23 MB.
    assert process.memory_info().rss - memory < 12e6


@pytest.mark.parametrize("recompute", [("compressed",), ("selected", "sliding"), BRANCHES], ids=str)
def test_recompute_saves_branches_and_changes_nothing(recompute):
    """The bytes that autograd keeps are fewer by the branches' outputs,
    and every gradient has the same bits.
    """

    def run(config):
        layer, kept = make_layer(config), {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x = randn(2, 45, 24).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = layer(x)
        output.backward(randn(2, 45, 24, seed=1))
        return sum(kept.values()), [output, x.grad, *(p.grad for p in layer.parameters())]

    config = small_config(recompute=recompute)
    less, found = run(config)
    all_kept, expected = run(small_config())
    # float64
    assert all_kept - less == len(recompute) * 90 * config.num_heads * config.v_head_dim * 8
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# --- Training on every backend --------------------------------------------------------------------


def training_losses(backend, steps=100):
    """Losses of a two-layer residual network learning four sequences by heart;
    three tokens in a row tell what comes next.
    """
    device = device_of(backend)
    torch.manual_seed(0)
    config = small_config(
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        kernel_size=16,
        kernel_stride=8,
        block_size=16,
        backend=backend,
    )
    layers = torch.nn.ModuleList(
        make_layer(config, torch.float32, seed=i, gain=1.0) for i in range(2)
    ).to(device)
    embed, head = torch.nn.Embedding(20, 32).to(device), torch.nn.Linear(32, 20).to(device)
    optimizer = torch.optim.AdamW(
        [*layers.parameters(), *embed.parameters(), *head.parameters()], lr=3e-3
    )
    tokens = (
        torch.randint(20, (4, 24), generator=torch.Generator().manual_seed(0))
        .repeat(1, 3)
        .to(device)
    )
    losses = []
    for _ in range(steps):
        hidden = embed(tokens[:, :-1])
        for layer in layers:
            hidden = hidden + layer(torch.nn.functional.rms_norm(hidden, (32,)))
        loss = torch.nn.functional.cross_entropy(
            head(hidden).flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.fixture(scope="module")
def reference_losses():
    return training_losses("reference")


def test_training_on_the_reference_learns(reference_losses):
    """The loss falls from above ln(20) = 3.0, that of guessing, to half of it."""
    assert reference_losses[0] > 3.0
    assert reference_losses[-5:].mean() < 1.5


@pytest.mark.parametrize(
    "backend",
    [backend for backend in backends_of("nsa_attention") if backend.values[0] != "reference"],
)
def test_training_tracks_the_reference(backend, reference_losses):
    if device_of(backend) == "cpu":
        pytest.skip("100 steps take Triton's interpreter hours: on a GPU only")
    # Row 16 of the bars.
    torch.testing.assert_close(training_losses(backend), reference_losses, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["default", "branches-gated"])
def test_no_gradient_is_copied_into_zeros(name):
    """As that of a part of a tensor would be."""
    names = operations(make_variant(name)(randn(1, 40, 24)))
    assert "SqueezeBackward1" in names or "UnbindBackward0" in names
    assert not names & {"SelectBackward0", "SliceBackward0"}


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("backend", backends_of("nsa_attention"))
def test_queries_may_be_some_runs_of_the_keys(backend, own):
    """As where ranks share a KV head: outputs and gradients of runs, a rank's each, are together
    those of all queries."""
    on_a_gpu_only(backend, "triton")
    sizes = dict(num_heads=2, num_kv_heads=1, head_dim=16, block_size=16, window_size=20)
    layer = make_variant("default", **sizes, backend=backend).to(device_of(backend))
    dtype = torch.float64 if backend == "reference" else torch.float32
    shapes = [(50, 2, 16), *[(50, 1, 16)] * (4 if own else 2), *[(12, 1, 16)] * 2, (50, 6)]
    device = device_of(backend)
    tensors = [
        randn(*shape, seed=i).to(device, dtype).requires_grad_() for i, shape in enumerate(shapes)
    ]
    q, k, v, *k_and_v_swa, k_cmp, v_cmp, gate_logits = tensors
    keys = KeyValues(k, v, *(k_and_v_swa or (k, v)), k, v)
    cu_seqlens = torch.tensor([0, 17, 17, 50], dtype=torch.int32, device=device)
    do = randn(50, 2, 16, seed=9).to(device, dtype)

    def gradients(runs, rows):
        mixed = (q[rows], keys, k_cmp, v_cmp, gate_logits[rows], Sequences(cu_seqlens, 33))
        o = layer.mix(*mixed, runs=runs)
        return o.detach(), torch.autograd.grad(o, tensors, do[rows])

    o, expected = gradients(None, slice(None))
    first, last = [*range(10), *range(40, 50)], slice(10, 40)
    o_first, of_first = gradients(((0, 10), (40, 50)), first)
    o_last, of_last = gradients(((10, 40),), last)
    close = dict(rtol=0, atol=1e-12 if backend == "reference" else 1e-4)
    torch.testing.assert_close(o_first, o[first], **close)
    torch.testing.assert_close(o_last, o[last], **close)
    for x, y, z in zip(of_first, of_last, expected, strict=True):
        torch.testing.assert_close(x + y, z, **close)
