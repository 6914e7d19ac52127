"""The inputs of a case, and the passes of a function."""

import pytest
import torch

from nsa_fsa.benchmarking.cases import PASSES, passes_of
from tests.benchmarking.tools import case


def test_inputs_are_random_numbers_of_the_right_shape(seed):
    x = case(seed=seed)
    assert x["q"].shape == x["do"].shape == (300, 4, 16)
    assert x["k"].shape == x["v"].shape == (300, 2, 16)
    assert x["k_cmp"].shape == x["v_cmp"].shape == (18, 2, 16)
    assert x["gate_logits"].shape == (300, 4, 3)
    assert x["x"].shape == x["dy"].shape == (1, 300, 64)
    assert x["cu_seqlens"].tolist() == [0, 300]
    for name in ("q", "k", "v", "do", "gate_logits", "x"):
        assert x[name].std().item() == pytest.approx(1, abs=0.15)
    assert not torch.equal(x["k"], x["v"])


def test_values_may_have_a_width_of_their_own():
    x = case(v_head_dim=8)
    assert [x[name].shape[2] for name in ("k", "v", "v_cmp", "do")] == [16, 8, 8, 8]


def test_inputs_depend_on_seed_and_name_alone(seed):
    first, second, other = case(seed=seed), case(seed=seed), case(seed=seed + 1)
    second["v"]  # made before k
    assert torch.equal(first["k"], second["k"])
    assert not torch.equal(first["k"], other["k"])


def test_rows_without_a_window_are_poisoned(seed):
    x = case(seed=seed)
    assert x.num_windows == 17
    assert all(x[name][17:].isnan().all() for name in ("k_cmp", "v_cmp"))
    assert all(x[name][:17].isfinite().all() for name in ("k_cmp", "v_cmp"))
    assert case(20).num_windows == 0


def test_passes_are_those_of_autograd(seed):
    a, b, do = (torch.randn(5, 3) for _ in range(3))
    passes = passes_of(lambda: (a * b**2, a + b), dict(a=a, b=b), do, ("o", "other"))
    assert tuple(passes) == PASSES
    outputs = passes["forward"]()
    assert list(outputs) == ["o", "other"]
    assert not outputs["o"].requires_grad
    for name in ("backward", "backward", "forward_backward"):  # the backward more than once
        found = passes[name]()
        assert torch.allclose(found["da"], b**2 * do)
        assert torch.allclose(found["db"], 2 * a * b * do)


def test_without_a_gradient_there_is_a_forward_alone():
    x = torch.ones(2)
    passes = passes_of(lambda: 2 * x, dict(x=x), None)
    assert list(passes) == ["forward"]
    assert not x.requires_grad


def test_the_backward_alone_does_not_run_the_forward_again():
    calls, x = [], torch.ones(2)
    passes = passes_of(lambda: calls.append(1) or 2 * x, dict(x=x), torch.ones(2))
    passes["backward"]()
    passes["backward"]()
    assert len(calls) == 1
