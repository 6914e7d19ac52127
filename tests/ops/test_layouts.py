"""Row 8 of reliability.md: memory layouts. Strided, sliced and expanded tensors give what their
contiguous copies give.

Equal to rounding in the widest dtype, not bit by bit: torch.matmul and torch.sum, and so the
reference, add in an order that depends on the strides. A value taken from the wrong place would be
wrong by far more.
"""

import functools

import pytest
import torch

from tests import cases
from tests.ops.test_packing import last_queries_of_gapped_buffer

CASE = cases.by_name("five")


def assert_same(found, expected, backend, what="o"):
    rounding = 10 * cases.widest_dtype(backend)[1]
    torch.testing.assert_close(
        found, expected, rtol=rounding, atol=rounding, msg=lambda m: f"{what}: {m}"
    )


def heads_first(x):
    """As if it had been computed as [H, T, ...] and transposed."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(x):
    """A slice of a wider fused tensor, as q, k and v of one projection are."""
    return torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=-1)[
        ..., x.shape[-1] : 2 * x.shape[-1]
    ]


def every_other(x):
    """Stride 2 in the last dimension."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]


def columns(x):
    """The last dimension is the slowest."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


LAYOUTS = [heads_first, sliced, every_other, columns]


@functools.cache
def contiguous(operator, backend):
    """What contiguous tensors give: the inputs, the output, its gradient, and all gradients."""
    x = cases.make_inputs(
        CASE, cases.widest_dtype(backend)[0], device=cases.device_of(backend), requires_grad=True
    )
    o = cases.output(cases.call(operator, CASE, x, backend))
    do = torch.randn_like(o)
    return x, o.detach(), do, cases.gradients(operator, o, x, do)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_strided_inputs(operator, backend, layout):
    """All inputs and the output gradient strided."""
    if layout is not sliced:
        cases.on_a_gpu_only(backend)
    x, o, do, grads = contiguous(operator, backend)
    strided = x.replace(
        **{
            name: layout(value.detach()).requires_grad_()
            for name, value in vars(x).items()
            if cases.is_float(value)
        }
    )
    assert not strided.q.is_contiguous()
    o_strided = cases.output(cases.call(operator, CASE, strided, backend))
    assert_same(o_strided, o, backend)
    grads_strided = cases.gradients(operator, o_strided, strided, layout(do))
    for name, grad, grad_strided in zip(
        cases.DIFFERENTIABLE[operator], grads, grads_strided, strict=True
    ):
        assert_same(grad_strided, grad, backend, f"d{name}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", cases.backends_of("select_blocks"))
def test_strided_selection(backend, layout):
    x = cases.make_inputs(CASE, cases.widest_dtype(backend)[0], device=cases.device_of(backend))
    strided = x.replace(q=layout(x.q), k_cmp=layout(x.k_cmp))
    _, lse = cases.call("compressed_attention", CASE, x)
    result = cases.select(CASE, x, lse, backend, return_scores=True)
    result_strided = cases.select(CASE, strided, heads_first(lse), backend, return_scores=True)
    assert torch.equal(result[0], result_strided[0])
    assert_same(result_strided[1], result[1], backend, "scores")


@pytest.mark.parametrize("backend", cases.backends_of("selected_attention"))
def test_strided_block_indices(backend):
    cases.on_a_gpu_only(backend)
    x = cases.make_inputs(
        CASE, cases.widest_dtype(backend)[0], device=cases.device_of(backend), requires_grad=True
    )
    counts = torch.randint(0, 4, x.block_indices.shape[:2], dtype=torch.int32, device=x.q.device)
    o = cases.output(cases.call("selected_attention", CASE, x, backend, block_counts=counts))
    for layout in LAYOUTS:
        if layout in (sliced, every_other):  # these pad with NaN, which integers do not have
            strided = torch.stack([x.block_indices, x.block_indices + 1], dim=-1)[..., 0]
        else:
            strided = layout(x.block_indices)
        assert not strided.is_contiguous()
        o_strided = cases.output(
            cases.call(
                "selected_attention",
                CASE,
                x.replace(block_indices=strided),
                backend,
                block_counts=heads_first(counts),
            )
        )
        assert_same(o_strided, o, backend)


@pytest.mark.parametrize("backend", cases.backends_of("nsa_attention"))
def test_slices_of_one_fused_projection(backend):
    """q, k and v as views of one [T, HQ + 2 HKV, D] tensor; its gradient is the three
    side by side.
    """
    case = cases.case_for("nsa_attention", backend, cases.by_name("nine"))  # D == DV
    x = cases.make_inputs(
        case, cases.widest_dtype(backend)[0], device=cases.device_of(backend), requires_grad=True
    )
    fused = torch.cat([x.q, x.k, x.v], dim=1).detach().requires_grad_()
    q, k, v = fused.split([case.num_heads, case.num_kv_heads, case.num_kv_heads], dim=1)
    o = cases.call("nsa_attention", case, x, backend)
    o_fused = cases.call("nsa_attention", case, x.replace(q=q, k=k, v=v), backend)
    assert_same(o_fused, o, backend)
    do = torch.randn_like(o)
    (dfused,) = torch.autograd.grad(o_fused, fused, do)
    assert_same(
        dfused, torch.cat(cases.gradients("nsa_attention", o, x, do)[:3], dim=1), backend, "dqkv"
    )


# name, lengths, HKV, G, D, DV, dtype, kernel_size, kernel_stride, block_size, T_sel, init, local,
# window
LARGE = cases.Case(
    *("large", (1500, 37, 2000), 2, 4, 128, 128, torch.bfloat16, 32, 16, 64, 16, 1, 2, 512), seed=0
)


@pytest.mark.gpu
@pytest.mark.parametrize("after_a_past", [False, True], ids=["whole", "after a past"])
@pytest.mark.parametrize(
    ("operator", "backend"), cases.operators_and_backends(*cases.ATTENTIONS, "nsa_attention")
)
def test_halves_of_one_tensor(operator, backend, after_a_past):
    """As keys and values lie in vLLM's pages, whole prompts or chunks of them. Heads of 128 in 16
    bits are what kernels for Hopper take, which copy whole rows."""
    x, extra, rows = cases.make_inputs(LARGE, device=cases.device_of(backend)), {}, slice(None)
    expected = cases.output(cases.call(operator, LARGE, x, backend))
    if after_a_past:
        x, extra, rows, *_ = last_queries_of_gapped_buffer(LARGE, x, [700, 37, 1999], [36, 27, 112])
        x = x.replace(max_seqlen=max(LARGE.lengths))  # gaps do not count
    kv, compressed = torch.cat((x.k, x.v), dim=-1), torch.cat((x.k_cmp, x.v_cmp), dim=-1)
    (k, v), (k_cmp, v_cmp) = (both.chunk(2, dim=-1) for both in (kv, compressed))
    halves = x.replace(q=sliced(x.q), k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp)
    with torch.no_grad():
        found = cases.output(cases.call(operator, LARGE, halves, backend, **extra))
    torch.testing.assert_close(found, expected[rows], rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_output_gradient_of_stride_0(operator, backend):
    """`.sum().backward()` hands the operator an expanded 1; `.sum(0)` expands another dimension."""
    cases.on_a_gpu_only(backend)
    x = cases.make_inputs(
        CASE, cases.widest_dtype(backend)[0], device=cases.device_of(backend), requires_grad=True
    )
    o = cases.output(cases.call(operator, CASE, x, backend))
    one = torch.ones((), dtype=o.dtype, device=o.device)
    for do in (one.expand(o.shape), torch.randn_like(o[:1]).expand(o.shape)):
        wanted = [getattr(x, name) for name in cases.DIFFERENTIABLE[operator]]
        expanded, dense = (
            torch.autograd.grad(o, wanted, grad, retain_graph=True)
            for grad in (do, do.contiguous())
        )
        for name, a, b in zip(cases.DIFFERENTIABLE[operator], expanded, dense, strict=True):
            assert_same(a, b, backend, f"d{name}")
            assert torch.isfinite(a).all()


@pytest.mark.parametrize(
    ("operator", "backend"),
    cases.operators_and_backends("selected_attention", "sliding_window_attention", "nsa_attention"),
)
def test_expanded_keys_and_values(operator, backend):
    """One KV head expanded over two by stride 0; its gradient sums over them."""
    cases.on_a_gpu_only(backend)
    x = cases.make_inputs(
        CASE, cases.widest_dtype(backend)[0], device=cases.device_of(backend), requires_grad=True
    )
    k, v = (t[:, :1].detach().requires_grad_() for t in (x.k, x.v))
    expanded = x.replace(k=k.expand(-1, 2, -1), v=v.expand(-1, 2, -1))
    repeated = x.replace(k=k.repeat(1, 2, 1), v=v.repeat(1, 2, 1))
    o = cases.output(cases.call(operator, CASE, repeated, backend))
    o_expanded = cases.output(cases.call(operator, CASE, expanded, backend))
    assert_same(o_expanded, o, backend)
    do = torch.randn_like(o)
    for a, b in zip(
        torch.autograd.grad(o, (k, v), do), torch.autograd.grad(o_expanded, (k, v), do), strict=True
    ):
        assert_same(b, a, backend)
