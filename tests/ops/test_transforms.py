"""Row 12 of reliability.md: torch.func. Reverse mode is right at every level;
forward mode is refused, not taken for zero.
"""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad

from tests.cases import DIFFERENTIABLE, by_name, call, gradients, make_inputs, output

CASE = by_name("five")


@pytest.fixture(params=DIFFERENTIABLE)
def problem(request):
    """An operator as a function of what it is differentiable in, these tensors,
    a gradient of its output, and theirs.

    Computed by the reference: torch.func meets the operator, whichever backend is behind it.
    """
    operator, backend = request.param, "reference"
    x = make_inputs(CASE, requires_grad=True)
    x = x.replace(
        **{
            name: getattr(x, name).detach().nan_to_num(0).requires_grad_()
            for name in ("k_cmp", "v_cmp")
        }
    )
    o = output(call(operator, CASE, x, backend))
    do = torch.randn_like(o)
    names = DIFFERENTIABLE[operator]

    def function(*tensors):
        return output(
            call(operator, CASE, x.replace(**dict(zip(names, tensors, strict=True))), backend)
        )

    return (
        function,
        [getattr(x, name).detach() for name in names],
        do,
        gradients(operator, o, x, do),
    )


def test_vjp_and_grad(problem):
    function, tensors, do, expected = problem
    _, vjp = torch.func.vjp(function, *tensors)
    found = torch.func.grad(
        lambda *x: (function(*x) * do).sum(), argnums=tuple(range(len(tensors)))
    )(*tensors)
    for a, b, c in zip(vjp(do), found, expected, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_every_sample(problem):
    """vmap over grad, as differential privacy takes it; slow, as nothing here has a batching
    rule of its own.
    """
    function, (first, *others), do, expected = problem
    one = torch.func.grad(lambda x, *rest: (function(x, *rest) * do).sum())
    found = torch.func.vmap(one, (0, *(None for _ in others)))(
        torch.stack((first, 2 * first)), *others
    )
    assert torch.equal(found[0], expected[0])


def test_second_derivatives_are_refused_at_every_level(problem):
    function, (first, *others), *_ = problem
    outside = first.clone().requires_grad_()

    def squared(x):
        return function(x, *others).square().sum()

    def inner(x):
        return torch.func.grad(squared)(x).sum()

    for differentiate in (torch.func.grad(inner), lambda _: inner(outside).backward()):
        with pytest.raises(RuntimeError, match=r"nsa_fsa::\w+_backward has no gradient.*Fix"):
            differentiate(first)


@contextlib.contextmanager
def forward_mode_refused():
    with pytest.raises(
        RuntimeError, match=r"nsa_fsa::\w+ has no forward-mode derivative.*Fix: use reverse mode"
    ):
        yield


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_forward_mode_is_refused(problem):
    function, tensors, *_ = problem
    tangents = tuple(torch.ones_like(x) for x in tensors)
    with forward_mode_refused():
        torch.func.jvp(function, tuple(tensors), tangents)
    with forward_mode_refused():
        torch.func.jacfwd(function)(*tensors)
    with forward_mode_refused():
        torch.func.hessian(lambda *x: function(*x).square().sum())(*tensors)
    with forward_ad.dual_level():
        with forward_mode_refused():
            function(*map(forward_ad.make_dual, tensors, tangents))
        with torch.no_grad(), forward_mode_refused():
            function(*map(forward_ad.make_dual, tensors, tangents))
        assert function(*tensors).shape, "what has no tangent runs"
