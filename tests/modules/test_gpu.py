"""The layer on a GPU, as training uses it: rows 1, 9, 11 and 12 of reliability.md,
autocast and checkpointing.
"""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from nsa_fsa import NativeSparseAttention, NSAConfig
from nsa_fsa.config import BRANCHES
from tests.modules.layers import make_layer, rms_ratio
from tests.modules.test_other_tools import Block, offloaded, shard_every_module
from tests.on_gpu import needs, record, starts, syncs_forbidden

pytestmark = pytest.mark.gpu

# At most 1,024 tokens a sequence: every block is selected, so that rounding cannot select another.
LENGTHS = (700, 0, 33, 1000, 64)
VARIANTS = {
    "llama": dict(num_heads=8, num_kv_heads=2),
    "qwen3": dict(num_heads=6, num_kv_heads=2, qk_norm=True, compress_k="gated", compress_v="mlp"),
    "branches": dict(
        num_heads=4,
        num_kv_heads=4,
        kv_per_branch=True,
        compress_k="linear",
        compress_v="mean",
        gate="per_token",
    ),
    "recomputing": dict(num_heads=8, num_kv_heads=2, recompute=BRANCHES),
}


def make(variant, dtype=torch.bfloat16, **changes):
    config = NSAConfig(hidden_size=256, head_dim=128, **{**VARIANTS[variant], **changes})
    return make_layer(config, dtype, gain=1.0).cuda()


def make_input(lengths=LENGTHS, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x, dy = (
        torch.randn(1, sum(lengths), 256, device="cuda", generator=generator).to(dtype)
        for _ in range(2)
    )
    return x.requires_grad_(), dy, dict(cu_seqlens=starts(lengths), max_seqlen=max(lengths))


def run(layer, x, dy, packed, call=None):
    """Output, and the gradients of the input and of every parameter, by name."""
    x.grad = None
    layer.zero_grad()
    y = (layer if call is None else call)(x, **packed)  # a compiled layer has no truth value
    y.backward(dy)
    return dict(
        y=y.detach(),
        dx=x.grad,
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
    )


def assert_same_bits(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def by_reference(layer, dtype):
    """The same layer in plain PyTorch, in some dtype."""
    plain = (
        NativeSparseAttention(dataclasses.replace(layer.config, backend="reference"))
        .cuda()
        .to(dtype)
    )
    plain.load_state_dict(layer.state_dict())
    return plain


def in_float64(layer, x, dy, packed):
    return run(
        by_reference(layer, torch.float64),
        x.detach().double().requires_grad_(),
        dy.double(),
        packed,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_float64(variant, dtype):
    """Row 1: at most 2 (output) or 3 (gradients) times as wrong as the same layer of plain PyTorch
    in the same dtype.
    """
    layer, problem = make(variant, dtype), make_input(dtype=dtype)
    exact = in_float64(layer, *problem)
    found, plainly = run(layer, *problem), run(by_reference(layer, dtype), *problem)
    for name, expected in exact.items():
        error, allowed = (rms_ratio(x[name], expected) for x in (found, plainly))
        floor = torch.finfo(dtype).eps / 4  # of rounding the result itself
        assert error <= (2 if name == "y" else 3) * allowed + floor, (
            f"{name}: {error:.2e}, plain PyTorch {allowed:.2e}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_and_checkpointed(variant, deterministic_only):
    """The same bits in 10 steps, with and without gradient checkpointing."""
    layer, problem = make(variant), make_input()
    expected = run(layer, *problem)
    for _ in range(10):
        assert_same_bits(run(layer, *problem), expected)
    for use_reentrant in (False, True):

        def call(x, use_reentrant=use_reentrant, **packed):
            return checkpoint(functools.partial(layer, **packed), x, use_reentrant=use_reentrant)

        assert_same_bits(run(layer, *problem, call=call), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_host_syncs(variant):
    layer = make(variant)
    problems = [make_input(), make_input((50, 900), seed=1)]
    for problem in problems:
        run(layer, *problem)
    with syncs_forbidden():
        for problem in problems:
            run(layer, *problem)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    """float32 parameters under autocast: 16 bits out, float32 gradients,
    as close as the layer in 16 bits is.
    """
    layer = make(variant, torch.float32)
    x, dy, packed = make_input(dtype=torch.float32)

    def call(x, **packed):
        with torch.autocast("cuda", torch.bfloat16):
            return layer(x, **packed)

    found = run(layer, x, dy.bfloat16(), packed, call=call)
    low = run(
        copy.deepcopy(layer).bfloat16(),
        x.detach().bfloat16().requires_grad_(),
        dy.bfloat16(),
        packed,
    )
    exact = in_float64(layer, x, dy.bfloat16(), packed)
    assert found["y"].dtype == torch.bfloat16
    for name, expected in exact.items():
        if name != "y":
            assert found[name].dtype == torch.float32, name
        error, allowed = (rms_ratio(x[name], expected) for x in (found, low))
        assert error <= (2 if name == "y" else 3) * allowed, (
            f"{name}: {error:.2e}, in bfloat16 {allowed:.2e}"
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_graph_for_every_length(variant):
    """torch.compile with Inductor, forward and backward; nothing is compiled after the
    second length.

    Below some hundred rows Inductor takes other tiles, for which it compiles again by itself.
    """
    torch._dynamo.reset()
    layer, counter, frames = make(variant), CompileCounterWithBackend("inductor"), []
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in (LENGTHS, (500, 20, 264), (1, 3, 1000), (640, 128, 32)):
        problem = make_input(lengths)
        exact = in_float64(layer, *problem)
        found, eager = run(layer, *problem, call=compiled), run(layer, *problem)
        for name, expected in exact.items():
            error, allowed = (rms_ratio(x[name], expected) for x in (found, eager))
            # Each rounds where the other does not; and of a bias with three numbers the ratio is a
            # matter of chance.
            assert error <= 2 * allowed + 2**-6, (
                f"{name} of {lengths}: {error:.2e}, eager {allowed:.2e}"
            )
        frames.append(counter.frame_count)
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 3, f"graphs compiled so far, after each length: {frames}"
    assert frames[1] <= 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_in_a_cuda_graph(variant, deterministic_only):
    """Forward, backward and AdamW, recorded once: after five replays with new data the parameters
    have the same bits as after five steps without a graph."""
    layers = [make(variant), make(variant)]
    optimizers = [
        torch.optim.AdamW(layer.parameters(), lr=1e-3, capturable=True) for layer in layers
    ]
    x, dy, packed = make_input()
    # As an upper bound, which holds for every way to cut the rows.
    packed["max_seqlen"] = sum(LENGTHS)

    def step(i):
        optimizers[i].zero_grad(set_to_none=False)
        layers[i](x, **packed).backward(dy)
        optimizers[i].step()

    graph, _ = record(lambda: step(0))
    for _ in range(3):
        step(1)  # what the first layer did before; recording runs nothing
    for seed, lengths in enumerate(
        (LENGTHS, (1000, 400, 0, 0, 397), (0, 1, 64, 932, 800), (33, 700, 64, 1000, 0), LENGTHS)
    ):
        new_x, new_dy, new_packed = make_input(lengths, seed=seed)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
            packed["cu_seqlens"].copy_(new_packed["cu_seqlens"])
        graph.replay()
        step(1)
        for (name, a), b in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
            assert torch.equal(a, b), f"{name} after step {seed + 1}"


def test_padded_equals_packed_equals_alone():
    """Forward and backward of a padded batch, of the same sequences packed,
    and of each by itself.
    """
    lengths = (700, 33, 1000, 64)
    layer = make("llama")
    x, dy, packed = make_input(lengths)
    expected = run(layer, x, dy, packed)
    rows = [slice(sum(lengths[:b]), sum(lengths[: b + 1])) for b in range(len(lengths))]

    padded, dy_padded = (
        torch.full((len(lengths), 1000, 256), 0.5, dtype=torch.bfloat16, device="cuda")
        for _ in range(2)
    )
    mask = torch.zeros(len(lengths), 1000, dtype=torch.int64, device="cuda")
    # On the left and on the right.
    places = [slice(0, n) if b % 2 else slice(1000 - n, 1000) for b, n in enumerate(lengths)]
    for b, (place, of_batch) in enumerate(zip(places, rows, strict=True)):
        padded[b, place], dy_padded[b, place], mask[b, place] = (
            x.detach()[0, of_batch],
            dy[0, of_batch],
            1,
        )
    found = run(layer, padded.requires_grad_(), dy_padded, dict(attention_mask=mask))
    for b, (place, of_batch) in enumerate(zip(places, rows, strict=True)):
        alone_x = x.detach()[:, of_batch].clone().requires_grad_()
        alone = run(layer, alone_x, dy[:, of_batch], {})
        for name in ("y", "dx"):
            # Matrix products of other shapes round differently: bfloat16 has 2^-9.
            for what, value in (("padded", found[name][b, place]), ("alone", alone[name][0])):
                assert rms_ratio(value, expected[name][0, of_batch]) < 2**-8, (
                    f"{name}, {what}, sequence {b}"
                )
        assert (found["y"][b][mask[b] == 0] == 0).all()
        assert (found["dx"][b][mask[b] == 0] == 0).all()
    for name in expected:
        if name not in ("y", "dx"):
            assert rms_ratio(found[name], expected[name]) < 2**-7, name


@needs(40)
def test_a_million_tokens():
    """The first of them as if there were no others, and every gradient finite."""
    layer = make("qwen3")
    x, dy, _ = make_input((2**20,))
    found = run(layer, x, dy, {})
    assert all(torch.isfinite(value).all() for value in found.values())
    with torch.no_grad():
        alone = layer(x[:, :1000])
    # Matrix products of other shapes round differently.
    assert rms_ratio(found["y"][:, :1000], alone) < 2**-8


def assert_same(found, expected, variant):
    """The same bits; but one kernel normalises only where it may read the weight,
    and rounds elsewhere than nn.RMSNorm.
    """
    assert rms_ratio(found, expected) <= 0.01
    if variant != "qwen3":
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded(variant, how, tmp_path):
    model, (x, _, packed) = Block(make(variant)), make_input()
    expected = model.attn(x, **packed)
    model = offloaded(model.cpu(), how, tmp_path, device=0)
    assert_same(model.attn(x, **packed), expected, variant)


@pytest.fixture
def mesh():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_sharded_by_itself(variant, mesh):
    layer, (x, dy, packed) = make(variant), make_input()
    plain = copy.deepcopy(layer)
    layer = shard_every_module(layer, mesh)
    found, expected = layer(x, **packed), plain(x, **packed)
    assert_same(found, expected, variant)
    found.backward(dy)
    expected.backward(dy)
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        assert rms_ratio(p.grad.full_tensor(), q.grad) <= 0.02
