"""The benchmark of the whole core: its counts, and what its checks accept and refuse."""

import dataclasses

import pytest
import torch

from nsa_fsa.benchmarking import core
from nsa_fsa.benchmarking.check import WrongResult
from nsa_fsa.benchmarking.check_core import CombineOracle, CoreOracle, WindowOracle
from nsa_fsa.benchmarking.running import checked
from nsa_fsa.benchmarking.settings import (
    PASSES,
    CoreSetting,
    full_attention_bytes,
    necessary_combine,
    necessary_core,
    necessary_parts,
    selected_pairs,
    visible_pairs,
    window_pairs,
)
from nsa_fsa.config import BRANCHES
from tests.benchmark.tools import CPU

TINY = CoreSetting(
    300, 2, num_heads=4, head_dim=16, block_size=32, num_blocks=5, selection="independent", dtype="float32", window_size=40
)  # fmt: skip
SETTINGS = [
    TINY,
    dataclasses.replace(TINY, num_tokens=320, group_size=1, num_heads=2, window_size=512, block_size=64),
    dataclasses.replace(TINY, num_tokens=130, group_size=4, kernel_size=16, kernel_stride=8, init_blocks=2, local_blocks=1),
]
RESULTS = ("o", *core.GRADIENTS)


# Counts


@pytest.mark.parametrize("setting", [*SETTINGS, dataclasses.replace(TINY, num_tokens=20)], ids=str)
def test_selected_pairs_are_those_of_what_is_chosen(setting, seed):
    inputs = core.make_inputs(setting, seed, CPU)
    assert selected_pairs(setting) == visible_pairs(inputs.block_indices, setting.block_size)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_window_pairs(setting):
    assert window_pairs(setting) == setting.num_kv_heads * sum(
        min(t + 1, setting.window_size) for t in range(setting.num_tokens)
    )


@pytest.mark.parametrize("group", [1, 4, 16])
def test_the_known_arithmetic(group):
    """65,536 tokens, 64 heads of 128: TFLOP of every part forward; backward two and a half times, without scores."""
    setting = CoreSetting(65536, group)
    parts = necessary_parts(setting)
    expected = {
        "compressed_attention": 4.4, "select_blocks": 2.2, "selected_attention": 2.2, "sliding_window_attention": 1.1,
        "gated_combine": 0,
    }  # fmt: skip
    for name, tflop in expected.items():
        # To the digit given; selected attention's first 1,024 queries and own blocks see less than 16 whole blocks.
        assert parts[name]["forward"].flops / 1e12 == pytest.approx(tflop, abs=0.1), name
        if "backward" in parts[name]:
            assert parts[name]["backward"].flops == 2.5 * parts[name]["forward"].flops
    assert "backward" not in parts["select_blocks"]
    whole = necessary_core(setting)
    assert whole["forward"].flops == sum(part["forward"].flops for part in parts.values())
    assert whole["forward"].flops / 1e12 == pytest.approx(9.9, abs=0.15)
    assert whole["backward"].flops == 2.5 * (whole["forward"].flops - parts["select_blocks"]["forward"].flops)


def test_necessary_bytes():
    """2 tokens of 2 query heads and 1 KV head of width 4, 16 bits, windows of one token: small enough to count by hand."""
    setting = CoreSetting(2, 2, num_heads=2, head_dim=4, block_size=2, num_blocks=1, kernel_size=1, kernel_stride=1)
    q, k, k_cmp, gates = 2 * 2 * 4 * 2, 2 * 4 * 2, 2 * 4 * 2, 2 * 2 * 3 * 2
    whole, combine = necessary_core(setting), necessary_combine(setting)
    assert whole["forward"].bytes == (q + 2 * k + 2 * k_cmp + gates) + q
    assert whole["backward"].bytes == (q + 2 * k + 2 * k_cmp + gates + q) + (q + 2 * k + 2 * k_cmp + gates)
    assert combine["forward"].bytes == (gates + 3 * q) + q
    assert combine["backward"].bytes == (q + gates + 3 * q) + (gates + 3 * q)
    # q, o, dq, do; k, v, dk, dv; lse
    assert full_attention_bytes(setting) == 4 * q + 4 * k + 2 * 2 * 4


def test_memory_is_held_to_the_bars():
    """131,072 tokens, 64 query and 4 KV heads of 128: 8.53 GiB of full attention."""
    setting = CoreSetting(131072, 16)
    full = full_attention_bytes(setting)
    assert full / 2**30 == pytest.approx(4 * 2 + 4 * 0.125 + 0.03125)
    for recompute, bar in (((), 2), (BRANCHES, 1.5)):
        at, beyond = (core.memory_facts(setting, recompute, int(bar * full) + more) for more in (0, 1))
        assert (at["of_full_attention"], at["within_bar"], at["bar"]) == (bar, True, bar)
        assert not beyond["within_bar"]
        assert at["peak_gib"] == pytest.approx(bar * at["full_attention_gib"])
        assert at["recompute"] == list(recompute)


# The check


def results_of(calls):
    return calls.named("forward", calls.forward()) | calls.named("backward", calls.forward_backward())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_check_accepts_the_core(setting, seed):
    inputs = core.make_inputs(setting, seed, CPU)
    calls = core.core(inputs, backend="reference")
    errors = checked(calls, CoreOracle(inputs))
    assert set(errors) == set(PASSES), calls.not_timed
    assert set(errors["forward"]) == {"o", "score_lost"}
    assert set(errors["backward"]) == set(errors["forward_backward"]) == {*core.GRADIENTS, "score_lost"}
    assert max(error for each in errors.values() for error in each.values()) < 1e-5


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("fault", ["scaled", "nan", "one head swapped"])
def test_the_check_refuses_what_is_wrong(name, fault, seed):
    inputs = core.make_inputs(TINY, seed, CPU)
    wrong = results_of(core.core(inputs))[name].detach().clone()
    if fault == "scaled":
        wrong *= 1.02
    elif fault == "nan":
        wrong[0] = torch.nan
    else:
        wrong[:, 0] = wrong[:, -1]
    with pytest.raises(WrongResult, match=name):
        CoreOracle(inputs).check(**{name: wrong})


@pytest.mark.parametrize("option", ["window_size", "num_selected_blocks", "init_blocks", "kernel_size"])
def test_the_check_refuses_another_attention(option, seed):
    """A window of one key less, one block less, a first block that is not forced, windows half as long."""
    inputs = core.make_inputs(TINY, seed, CPU)
    other = {"window_size": 39, "num_selected_blocks": 4, "init_blocks": 0, "kernel_size": 16}[option]
    with pytest.raises(WrongResult, match="o differs"):
        CoreOracle(inputs).check(o=core.core(inputs, **{option: other}).forward())


def test_the_check_refuses_a_selection_that_breaks_the_rules(seed):
    inputs = core.make_inputs(TINY, seed, CPU)
    o = core.core(inputs).forward()
    inputs.block_indices[-1, 0] = inputs.block_indices[-1, 0].flip(0)
    with pytest.raises(WrongResult, match="ascending order"):
        CoreOracle(inputs).check(o=o)


@pytest.mark.parametrize(("prepare", "oracle"), [(core.sliding_window, WindowOracle), (core.gated_combine, CombineOracle)])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_parts_without_a_benchmark_of_their_own(prepare, oracle, setting, seed):
    inputs = core.make_inputs(setting, seed, CPU)
    calls, check = prepare(inputs), oracle(inputs)
    errors = checked(calls, check)
    assert set(errors) == set(PASSES), calls.not_timed
    assert set(errors["backward"]) == set(calls.gradients)
    assert max(error for each in errors.values() for error in each.values()) < 1e-5
    for name, result in results_of(calls).items():
        with pytest.raises(WrongResult, match=f"{name} differs"):
            check.check(**{name: 1.02 * result.detach()})


def test_inputs_are_random_numbers_of_the_right_shape(seed):
    inputs = core.make_inputs(TINY, seed, CPU)
    assert inputs.q.shape == inputs.do.shape == (300, 4, 16)
    assert inputs.k.shape == inputs.v.shape == (300, 2, 16)
    assert inputs.k_cmp.shape == inputs.v_cmp.shape == (18, 2, 16)
    assert inputs.gate_logits.shape == (300, 4, 3)
    assert inputs.k_cmp[17:].isnan().all()  # which no window owns
    assert all(x.requires_grad and x.is_leaf for x in inputs.leaves)
    assert not torch.equal(inputs.k, inputs.v)
