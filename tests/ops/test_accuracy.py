"""Row 1 of reliability.md: outputs and gradients against float64,
measured by what low-precision PyTorch achieves.
"""

import pytest
import torch

from tests import cases
from tests.naive import gradient_floors, naive_call
from tests.oracle import windows

# The bars of reliability.md.
MAX_ERROR_RATIO = {"output": 2, "gradient": 3}
RMS_RATIO = {torch.float16: 0.005, torch.bfloat16: 0.005, torch.float32: 1e-5}

LONG = ("t1000", "t1000_b128", "t2048", "packed_2048")
# Cases that others stand for on a CPU.
SLOW_TO_INTERPRET = {
    ("selected_attention", "triton_query_major"): ("t31_stride1", "t32", "t63", "t64", "nine"),
    ("selected_attention", "triton_kv_major"): ("t1000_b128",),
    ("compressed_attention", "triton"): ("t1000_b128", "packed_2048"),
    ("nsa_attention", "triton"): ("packed_2048",),
    ("gated_combine", "triton"): ("t200_g8", *LONG),
    ("pool_windows", "triton"): LONG,
    ("gather_windows", "triton"): LONG,
}


def check(name, kind, found, naive, expected, cancellation=0.0):
    """found and naive, both in low precision, against expected in float64;
    cancellation: see gradient_floors.
    """
    dtype = found.dtype
    assert found.shape == expected.shape, name
    assert torch.isfinite(found).all(), f"{name} is not finite"
    found, naive = found.double(), naive.double()
    # The rounding floor: storing the result costs half an eps of its size, and so may one
    # intermediate result. Without it a naive computation that happens to be exact, such as
    # attention to a single key, could not be matched.
    if expected.numel():
        error, naive_error = (found - expected).abs().max(), (naive - expected).abs().max()
        bar = (
            MAX_ERROR_RATIO[kind] * naive_error
            + torch.finfo(dtype).eps * expected.abs().max()
            + cancellation
        )
        assert error <= bar, f"{name}: error {error:.3e} above {bar:.3e}"
    check_rms(name, found, expected, dtype, cancellation)


def check_rms(name, found, expected, dtype, cancellation=0.0):
    # The floor matters where the exact gradient is 0, as that of a query which sees a single key:
    # a ratio says nothing there.
    assert (found - expected).norm() <= RMS_RATIO[
        dtype
    ] * expected.norm() + cancellation * expected.numel() ** 0.5, (
        f"{name}: "
        f"RMS ratio {(found - expected).norm() / expected.norm():.3e} above {RMS_RATIO[dtype]}"
    )


@pytest.mark.parametrize("case", cases.CASES, ids=str)
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_accuracy(operator, backend, case):
    if case.name in SLOW_TO_INTERPRET.get((operator, backend), ()):
        cases.on_a_gpu_only(backend, backend)
    case = cases.case_for(operator, backend, case)
    x = cases.make_inputs(case, device=cases.device_of(backend), requires_grad=True)
    extra = dict(return_branches=True) if operator == "nsa_attention" else {}
    result = cases.call(operator, case, x, backend, **extra)
    o = cases.output(result)
    assert o.dtype == case.dtype
    rows = torch.arange(o.shape[0], device=o.device)
    if operator in ("pool_windows", "gather_windows"):  # the other rows are unspecified
        rows = torch.tensor(
            sorted(windows(x.cu_seqlens, **case.windows)), dtype=torch.long, device=o.device
        )
    do = torch.zeros_like(o)
    do[rows] = torch.randn_like(o)[rows]

    exact = x.to(torch.float64, requires_grad=True)
    chosen = None
    if operator == "nsa_attention":
        # In low precision blocks whose scores tie to rounding may be chosen either way. The
        # composition is therefore judged given the operator's own choice, and the choice by its
        # score (block_selection/test_values.py has more on it).
        chosen = result[1].block_indices
        expected, branches = whole_given_selection(case, exact, chosen)
        for name, branch, branch_expected in zip(
            ("o_cmp", "o_slc", "o_swa"), result[1], branches, strict=False
        ):
            check_rms(name, branch.detach().double(), branch_expected.detach(), case.dtype)
        check_selection(case, exact, chosen)
    else:
        expected = cases.output(cases.call(operator, case, exact, "reference"))
    naive = naive_call(operator, case, x, chosen)

    check("o", "output", o[rows].detach(), naive[rows].detach(), expected[rows].detach())
    if operator.endswith("_attention") and operator != "nsa_attention":
        # lse is float32 whatever the inputs are: sums of products of at most 256 terms,
        # rounded at 6e-8 each.
        assert result[1].dtype == torch.float32
        lse_expected = cases.call(operator, case, exact, "reference")[1]
        torch.testing.assert_close(result[1].double(), lse_expected, rtol=1e-5, atol=1e-5)
    grads = (
        cases.gradients(operator, o, x, do),
        cases.gradients(operator, naive, x, do),
        cases.gradients(operator, expected, exact, do.double()),
    )
    floors = gradient_floors(operator, case, exact, do.double())
    for name, *grad in zip(cases.DIFFERENTIABLE[operator], *grads, strict=True):
        check(f"d{name}", "gradient", *grad, floors.get(name, 0.0))


def whole_given_selection(case, x, block_indices):
    """nsa_attention in float64 with the selection given: output and branches."""
    x = x.replace(block_indices=block_indices)
    branches = [
        cases.output(cases.call(f"{b}_attention", case, x, "reference"))
        for b in ("compressed", "selected", "sliding_window")
    ]
    gated = x.replace(**dict(zip(("o_cmp", "o_slc", "o_swa"), branches, strict=True)))
    return cases.call("gated_combine", case, gated, "reference"), branches


def check_selection(case, x, block_indices):
    """The chosen blocks' summed float64 score is within 0.5% of the best possible."""
    lse = cases.call("compressed_attention", case, x, "reference")[1].detach()
    best, scores = cases.select(case, x, lse, "reference", return_scores=True)
    assert torch.equal(block_indices >= 0, best >= 0)

    def total(indices):
        return torch.where(indices >= 0, scores.gather(2, indices.long().clamp(min=0)), 0).sum(-1)

    assert (total(block_indices) >= 0.995 * total(best)).all()


@pytest.mark.parametrize(
    ("operator", "backend"), cases.operators_and_backends(*cases.ATTENTIONS, "nsa_attention")
)
def test_scale(operator, backend):
    """A softmax scale other than the default reaches every branch, forward and backward:
    it equals scaled queries.

    Scaled by a power of 2, which rounds nothing."""
    case = cases.case_for(operator, backend, cases.by_name("five"), calls=2)
    dtype, rounding = cases.widest_dtype(backend)
    close = dict(rtol=rounding, atol=rounding)
    close_grads = dict(rtol=10 * rounding, atol=10 * rounding)
    x = cases.make_inputs(case, dtype, device=cases.device_of(backend), requires_grad=True)
    found = cases.output(cases.call(operator, case, x, backend, scale=4 * case.scale))
    do = torch.randn_like(found)
    scaled = x.replace(q=(x.q.detach() * 4).requires_grad_())
    expected = cases.output(cases.call(operator, case, scaled, backend))
    torch.testing.assert_close(found, expected, **close)
    grads = cases.gradients(operator, found, x, do)
    grads_scaled = cases.gradients(operator, expected, scaled, do)
    torch.testing.assert_close(grads[0], grads_scaled[0] * 4, **close_grads)
    torch.testing.assert_close(grads[1:], grads_scaled[1:], **close_grads)


@pytest.mark.parametrize("backend", cases.backends_of("nsa_attention"))
def test_keys_and_values_of_the_sliding_branch(backend):
    """k_swa and v_swa, where given, replace k and v in the sliding branch and nowhere else."""
    case = cases.case_for("nsa_attention", backend, cases.by_name("nine"))
    x = cases.make_inputs(case, torch.float32, device=cases.device_of(backend), requires_grad=True)
    k_swa, v_swa = (torch.randn_like(t).requires_grad_() for t in (x.k, x.v))
    o, branches = cases.call(
        "nsa_attention", case, x, backend, k_swa=k_swa, v_swa=v_swa, return_branches=True
    )
    plain = cases.call("nsa_attention", case, x, backend, return_branches=True)[1]
    own = cases.output(cases.call("sliding_window_attention", case, x.replace(k=k_swa, v=v_swa)))
    assert torch.equal(branches.o_swa, own)
    for field in ("o_cmp", "o_slc", "block_indices"):
        assert torch.equal(getattr(branches, field), getattr(plain, field))
    expected = cases.call(
        "gated_combine", case, x.replace(o_cmp=plain.o_cmp, o_slc=plain.o_slc, o_swa=own), backend
    )
    assert torch.equal(o, expected)
    for a, b in zip(
        *(torch.autograd.grad(out.sum(), (k_swa, v_swa)) for out in (o, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)
