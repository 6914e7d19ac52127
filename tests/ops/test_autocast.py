"""Operators compute in the precision that they promise, also inside torch.autocast,
which reaches what an operator calls.
"""

import dataclasses

import pytest
import torch

from tests.cases import (
    DIFFERENTIABLE,
    backends_of,
    by_name,
    call,
    case_for,
    device_of,
    gradients,
    make_inputs,
    operators_and_backends,
    output,
    select,
)

CASE = dataclasses.replace(by_name("five"), lengths=(9,))


@pytest.mark.parametrize(("operator", "backend"), operators_and_backends())
def test_autocast_changes_nothing(operator, backend):
    case = case_for(operator, backend, CASE, calls=3)
    x = make_inputs(case, device=device_of(backend), requires_grad=True)
    o = output(call(operator, case, x, backend))
    do = torch.randn_like(o)
    expected = [o, *gradients(operator, o, x, do)]

    with torch.autocast(device_of(backend), torch.bfloat16):
        assert (
            torch.ones(1, 1, device=o.device) @ torch.ones(1, 1, device=o.device)
        ).dtype == torch.bfloat16
        o = output(call(operator, case, x, backend))
        inside = [o, *gradients(operator, o, x, do)]
        o = output(call(operator, case, x, backend))
    outside = [o, *gradients(operator, o, x, do)]
    for name, a, b, c in zip(
        ("o", *DIFFERENTIABLE[operator]), expected, inside, outside, strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_autocast_chooses_the_same_blocks(backend):
    case = case_for("select_blocks", backend, CASE, calls=2)
    x = make_inputs(case, device=device_of(backend))
    lse = call("compressed_attention", case, x)[1]
    expected = select(case, x, lse, backend, return_scores=True)
    with torch.autocast(device_of(backend), torch.bfloat16):
        found = select(case, x, lse, backend, return_scores=True)
    for name, a, b in zip(("block_indices", "scores"), found, expected, strict=True):
        assert torch.equal(a, b), name
