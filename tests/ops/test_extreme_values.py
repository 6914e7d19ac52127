"""Row 15 of reliability.md: large scores. Finite wherever the oracle is,
and as close to it as low-precision PyTorch.
"""

import dataclasses
import math

import pytest
import torch

from nsa_fsa.ops.gated_combine.operator import BRANCH_GRADIENTS, BranchesCall
from tests import cases
from tests.naive import gradient_floors, naive_call

OPERATORS = ("compressed_attention", "selected_attention", "sliding_window_attention")
SCALED = ("q", "k", "v", "k_cmp", "v_cmp")


def times_30(x):
    for name in SCALED:
        setattr(x, name, getattr(x, name) * 30)


def equal_keys(x):
    x.k[:] = x.k[:1].clone()
    x.k_cmp[:] = torch.where(x.k_cmp.isnan(), x.k_cmp, x.k[:1])


def huge_key(x):
    """One key of every sequence's first ten outweighs all others,
    for the queries that point its way; the rest ignore it.
    """
    size = {torch.float32: 1e4, torch.bfloat16: 1e3, torch.float16: 1e3}[x.k.dtype]
    x.k[3] *= size
    x.k_cmp[1] *= size


def all_zero(x):
    for name in SCALED:
        setattr(x, name, torch.where(getattr(x, name).isnan(), getattr(x, name), 0))


@pytest.mark.parametrize("change", [times_30, equal_keys, huge_key, all_zero])
@pytest.mark.parametrize(
    "case",
    [cases.by_name(name) for name in ("t65", "t127", "t127_d192", "empty_ends", "t1000")],
    ids=str,
)
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends(*OPERATORS))
def test_extreme_values(operator, backend, case, change):
    check_extreme_values(operator, backend, cases.case_for(operator, backend, case), change)


def check_extreme_values(operator, backend, case, change):
    x = cases.make_inputs(case, device=cases.device_of(backend))
    change(x)
    x = x.to(case.dtype, requires_grad=True)
    exact = x.to(torch.float64, requires_grad=True)
    result = cases.call(operator, case, x, backend)
    o, expected = result[0], cases.call(operator, case, exact, "reference")[0]
    naive = naive_call(operator, case, x)
    do = torch.randn_like(o)
    found = [o, *cases.gradients(operator, o, x, do)]
    expected = [expected, *cases.gradients(operator, expected, exact, do.double())]
    naive = [naive, *cases.gradients(operator, naive, x, do)]

    assert not result[1].isnan().any()
    largest_lse = torch.where(result[1] == -torch.inf, 0, result[1]).abs().max()
    floors = gradient_floors(operator, case, exact, do.double(), largest_lse)
    for name, a, b, c in zip(
        ("o", *cases.DIFFERENTIABLE[operator]), found, expected, naive, strict=True
    ):
        largest = torch.finfo(a.dtype).max
        assert torch.isfinite(a[b.abs() < largest]).all(), f"{name} is not finite"
        # The bars of test_accuracy.py. Their RMS bar does not apply: a softmax of scores in the
        # thousands multiplies the rounding of the scores, and PyTorch in the same precision is what
        # can be asked for.
        bar = (2 if name == "o" else 3) * (c.double() - b).abs().nan_to_num(torch.inf).max()
        bar += torch.finfo(a.dtype).eps * b.abs().max() + floors.get(name, 0)
        error = (a.double() - b).abs().max()
        assert error <= bar, (
            f"{name if name == 'o' else 'd' + name}: error {error:.3e} above {bar:.3e}"
        )


# name, lengths, HKV, G, D, DV, dtype, kernel_size, kernel_stride, block_size, T_sel, init, local,
# window, seed
LONG_CASES = [
    cases.Case(
        "hopper", (3000, 0, 200), 1, 4, 128, 128, torch.bfloat16, 32, 16, 64, 16, 1, 2, 512, 50
    ),
    cases.Case("hopper_f16", (2048,), 2, 1, 64, 64, torch.float16, 32, 16, 128, 8, 1, 2, 512, 51),
    cases.Case("plain", (1500, 700), 1, 3, 96, 80, torch.bfloat16, 32, 16, 32, 16, 1, 2, 512, 52),
]


@pytest.mark.gpu
@pytest.mark.parametrize("change", [times_30, equal_keys, huge_key, all_zero])
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
@pytest.mark.parametrize(
    ("operator", "backend"),
    [
        ("compressed_attention", "triton"),
        *(("selected_attention", backend) for backend in ("triton_kv_major", "triton_query_major")),
    ],
)
def test_extreme_values_of_long_sequences(operator, backend, case, change):
    check_extreme_values(operator, backend, case, change)


@pytest.mark.parametrize("logit", [-torch.inf, torch.inf])
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends("nsa_attention"))
def test_a_gate_that_is_closed_for_good(operator, backend, logit):
    """A logit of -inf leaves a branch out, gradients too, as one does that is as good as that;
    inf takes all of it.
    """
    case = cases.case_for(
        operator, backend, dataclasses.replace(cases.by_name("five"), lengths=(3, 13))
    )
    results = []
    for value in (logit, math.copysign(1e4, logit)):
        x = cases.make_inputs(case, device=cases.device_of(backend), requires_grad=True)
        for branch in range(3):
            x.gate_logits.data[branch::5, :, branch] = value
        o = cases.call(operator, case, x, backend)
        results.append([o, *cases.gradients(operator, o, x, torch.ones_like(o))])
    for name, a, b in zip(("o", *cases.DIFFERENTIABLE[operator]), *results, strict=True):
        assert torch.isfinite(a).all(), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", cases.backends_of("gated_combine"))
@pytest.mark.parametrize("logit", [-torch.inf, torch.inf, -1e4, 0.0])
def test_no_nan_among_gated_statistics(backend, logit):
    """Also where a kernel would hide it behind a mask."""
    device = cases.device_of(backend)
    o = torch.randn(6, 2, 8, device=device)
    lse = torch.randn(6, 2, device=device)
    lse[:3] = -torch.inf
    gates = torch.full((6, 2, 3), logit, device=device)
    call = BranchesCall(o, (o,) * 3, (lse,) * 3, gates, backend)
    found = BRANCH_GRADIENTS.choose(call).forward(call)
    for values in found:
        assert not any(x.isnan().any() for x in values)


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends("nsa_attention"))
@pytest.mark.parametrize("change", [times_30, equal_keys, huge_key, all_zero])
def test_the_whole_stays_finite(operator, backend, change):
    for name in ("t65", "t127_d192", "empty_ends"):
        case = cases.case_for(operator, backend, cases.by_name(name))
        x = cases.make_inputs(case, device=cases.device_of(backend))
        change(x)
        x = x.to(case.dtype, requires_grad=True)
        x.gate_logits.data *= 1e3  # sigmoids of exactly 0 and 1
        o = cases.call(operator, case, x, backend)
        assert torch.isfinite(o).all()
        for name, grad in zip(
            cases.DIFFERENTIABLE[operator],
            cases.gradients(operator, o, x, torch.ones_like(o)),
            strict=True,
        ):
            assert torch.isfinite(grad).all(), f"d{name}"
