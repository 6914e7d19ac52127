"""Operators compute in the precision that they promise, also inside torch.autocast,
which reaches what an operator calls.
"""

import dataclasses

import pytest
import torch

from tests import cases

CASE = dataclasses.replace(cases.by_name("five"), lengths=(9,))


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_autocast_changes_nothing(operator, backend):
    case = cases.case_for(operator, backend, CASE, calls=3)
    x = cases.make_inputs(case, device=cases.device_of(backend), requires_grad=True)
    o = cases.output(cases.call(operator, case, x, backend))
    do = torch.randn_like(o)
    expected = [o, *cases.gradients(operator, o, x, do)]

    with torch.autocast(cases.device_of(backend), torch.bfloat16):
        assert (
            torch.ones(1, 1, device=o.device) @ torch.ones(1, 1, device=o.device)
        ).dtype == torch.bfloat16
        o = cases.output(cases.call(operator, case, x, backend))
        inside = [o, *cases.gradients(operator, o, x, do)]
        o = cases.output(cases.call(operator, case, x, backend))
    outside = [o, *cases.gradients(operator, o, x, do)]
    for name, a, b, c in zip(
        ("o", *cases.DIFFERENTIABLE[operator]), expected, inside, outside, strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


@pytest.mark.parametrize("backend", cases.backends_of("select_blocks"))
def test_autocast_chooses_the_same_blocks(backend):
    case = cases.case_for("select_blocks", backend, CASE, calls=2)
    x = cases.make_inputs(case, device=cases.device_of(backend))
    lse = cases.call("compressed_attention", case, x)[1]
    expected = cases.select(case, x, lse, backend, return_scores=True)
    with torch.autocast(cases.device_of(backend), torch.bfloat16):
        found = cases.select(case, x, lse, backend, return_scores=True)
    for name, a, b in zip(("block_indices", "scores"), found, expected, strict=True):
        assert torch.equal(a, b), name
