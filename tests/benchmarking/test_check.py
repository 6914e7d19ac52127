"""What is timed is right: the checks accept what is, and refuse what is not."""

import dataclasses
from functools import partial

import pytest
import torch

from nsa_fsa.benchmarking import check
from nsa_fsa.benchmarking.cases import PASSES
from nsa_fsa.benchmarking.check import WrongResult
from nsa_fsa.benchmarking.implementations import CUDNN, NSA_CORE, NSA_LAYER, core, layer, sdpa
from tests.benchmarking.tools import FAULTS, SIZES, case, changed, results_of, spoiled

MATH = changed(CUDNN, function=partial(sdpa, backend="MATH"))
RESULTS = [(NSA_CORE, x) for x in ("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgate_logits")]
RESULTS += [(MATH, x) for x in ("o", "dq", "dk", "dv")]


@pytest.fixture(params=[1 << 34, 300 * 64], ids=["all rows", "the last rows"])
def pairs(request, monkeypatch):
    monkeypatch.setattr(check, "PAIRS", request.param)


@pytest.mark.parametrize("by", [NSA_CORE, MATH, NSA_LAYER], ids=lambda by: by.name)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_right_is_accepted(by, sizes, pairs, seed):
    x = case(seed=seed, **sizes)
    passes = by.passes(x)
    assert tuple(passes) == PASSES
    for name in PASSES:
        errors = by.check(x, name, passes[name]())
        outputs = set(by.outputs) if name == "forward" else {f"d{leaf}" for leaf in by.leaves}
        assert outputs <= set(errors)
        assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("by", [NSA_CORE, MATH], ids=lambda by: by.name)
def test_16_bits_are_held_to_float32(by, seed):
    """The reference gets the same numbers in float32, so an error is that of 16-bit arithmetic."""
    x = case(seed=seed, dtype=torch.bfloat16)
    passes = by.passes(x)
    errors = by.check(x, "forward", passes["forward"]())
    errors |= by.check(x, "backward", passes["backward"]())
    assert min(errors.values()) > 1e-4
    assert max(errors.values()) < 0.01


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("by", "name"), RESULTS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_what_is_wrong_is_refused(by, name, fault, pairs, seed):
    x = case(seed=seed)
    wrong = spoiled(results_of(by.passes(x))[name], fault)
    with pytest.raises(WrongResult, match=f"^{name} differs from the reference"):
        by.check(x, "forward" if name in by.outputs else "backward", {name: wrong})


@pytest.mark.parametrize(
    "other",
    [
        dict(window_size=39),
        dict(num_selected_blocks=4),
        dict(init_blocks=0),
        dict(local_blocks=1),
        dict(kernel_size=16),
    ],
    ids=str,
)
def test_another_attention_is_refused(other, seed):
    """A key of the window less, a block less, blocks that are not forced, windows half as long."""
    x = case(seed=seed)
    wrong = changed(NSA_CORE, function=partial(core, **other))
    with pytest.raises(WrongResult, match="o differs"):
        wrong.check(x, "forward", wrong.passes(x)["forward"]())


def test_sparse_attention_is_not_full_attention(seed):
    x = case(seed=seed)
    with pytest.raises(WrongResult, match="o differs"):
        MATH.check(x, "forward", NSA_CORE.passes(x)["forward"]())


def test_a_query_that_sees_nothing_has_an_infinite_lse():
    infinite = torch.tensor([-torch.inf, 1.0])
    assert check.compare("lse", infinite, infinite) == 0
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, 1.0])):
        with pytest.raises(WrongResult, match="lse differs"):
            check.compare("lse", wrong, infinite)


def test_the_last_rows_are_a_case_of_their_own(monkeypatch, seed):
    monkeypatch.setattr(check, "PAIRS", 300 * 64)
    part = check.parts_of(x := case(seed=seed))[-1]
    assert (part.head, part.rows) == (1, 64)
    inputs = part.inputs("q", "k", "k_cmp")
    assert torch.equal(inputs["q"], x["q"][-64:, 2:])
    assert torch.equal(inputs["k"], x["k"][:, 1:])
    assert inputs["k_cmp"].shape == (18, 1, 16)
    assert inputs.layout["cu_seqlens_q"].tolist() == [0, 64]
    assert torch.equal(part.result(x["v"]), x["v"][-64:, 1:])
    # Windows up to the 13th end before the first of these queries.
    seen_before = [i for i in range(18) if i * 16 + 31 < 300 - 64]
    assert torch.equal(part.result(x["k_cmp"]).isnan(), x["k_cmp"][len(seen_before) :, 1:].isnan())


# Layers


def test_the_check_of_a_layer_sees_every_parameter(seed):
    x = case(seed=seed)
    errors = NSA_LAYER.check(x, "backward", {})
    assert set(errors) == {"dx", *(f"d{name}" for name, _ in layer(x).named_parameters())}


@pytest.mark.parametrize("name", PASSES)
def test_another_layer_is_refused(name, seed):
    """A window of half its length."""

    def wrong(x):
        return layer(dataclasses.replace(x, config=dataclasses.replace(x.config, window_size=20)))

    by = changed(NSA_LAYER, function=wrong)
    with pytest.raises(WrongResult, match="differs from the reference"):
        by.check(case(seed=seed), name, {})


def test_a_layer_is_compared_where_every_block_is_chosen(seed, monkeypatch):
    lengths = []
    by = changed(NSA_LAYER, function=lambda x: lengths.append(x.num_tokens) or layer(x))
    by.check(case(seed=seed), "forward", {})
    assert lengths == [5 * 32]


def test_a_layer_keeps_its_settings(seed):
    x = case(seed=seed)
    x = dataclasses.replace(x, config=dataclasses.replace(x.config, backend="reference"))
    assert layer(x).config == x.config
