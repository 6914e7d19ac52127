"""Every operator alone is checked: what is right is accepted, and what is wrong is refused."""

import dataclasses

import pytest
import torch

from benchmarks.inputs import SuiteCase
from benchmarks.operators import COMPRESSION, LOOP_ORDERS, PARTS, RECOMPUTING, check_selection
from benchmarks.suites import IMPLEMENTATIONS
from nsa_fsa import ops
from nsa_fsa.benchmarking import check
from nsa_fsa.benchmarking.cases import PASSES
from nsa_fsa.benchmarking.check import WrongResult
from tests.benchmarking.tools import FAULTS, SIZES, case, results_of, spoiled

EVERY = [*PARTS, *COMPRESSION, LOOP_ORDERS[0]]
TENSORS = {by.name: (*by.outputs, *(f"d{x}" for x in by.leaves if by.do)) for by in EVERY}


def suite_case(seed, selection="window_means", **sizes):
    return case(kind=SuiteCase, selection=selection, seed=seed, **sizes)


@pytest.fixture(params=[1 << 34, 300 * 64], ids=["all rows", "the last rows"])
def pairs(request, monkeypatch):
    monkeypatch.setattr(check, "PAIRS", request.param)


@pytest.mark.parametrize("by", EVERY, ids=lambda by: by.name)
@pytest.mark.parametrize("sizes", [*SIZES, dict(num_tokens=20)], ids=str)  # shorter than a window
def test_what_is_right_is_accepted(by, sizes, pairs, seed):
    x = suite_case(seed, **sizes)
    passes = by.passes(x)
    assert tuple(passes) == (PASSES if by.do else ("forward",))
    for name, run in passes.items():
        errors = by.check(x, name, run())
        assert errors
        assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [(name, x) for name, tensors in TENSORS.items() for x in tensors if x != "block_indices"],
)
def test_what_is_wrong_is_refused(name, tensor, fault, pairs, seed):
    by, x = IMPLEMENTATIONS[name], suite_case(seed)
    right = results_of(by.passes(x))[tensor]
    wrong = spoiled(right, fault)
    if fault == "nan" and tensor == "pooled":
        wrong = right.index_fill(0, torch.tensor([x.num_windows - 1]), torch.nan)
    with pytest.raises(WrongResult, match=f"^{tensor} differs from the reference"):
        by.check(x, "forward" if tensor in by.outputs else "backward", {tensor: wrong})


@pytest.mark.parametrize("shift", [-16, 16], ids=["one window too many", "one window too few"])
@pytest.mark.parametrize("tensor", TENSORS["compressed_attention"])
def test_windows_that_are_seen_too_early_or_late_are_refused(tensor, shift, seed):
    x, by = suite_case(seed), PARTS[0]
    # Windows that end a stride earlier or later are seen one step sooner or later.
    size = dataclasses.replace(x.config, kernel_size=x.config.kernel_size + shift, block_size=64)
    other = dataclasses.replace(x, config=size)
    other.tensors.update({name: x[name] for name in (*by.leaves, by.do)})
    for name in ("k_cmp", "v_cmp"):  # the last row is then owned, and read
        other.tensors[name] = x[name].detach().nan_to_num(0.5)
    wrong = results_of(by.passes(other))[tensor]
    with pytest.raises(WrongResult, match=f"{tensor} differs"):
        by.check(x, "forward" if tensor in by.outputs else "backward", {tensor: wrong})


@pytest.mark.parametrize("tensor", ["o", "lse", "dk_cmp", "windows", "dk"])
def test_what_no_window_owns_is_compared(tensor, seed):
    """The first query sees nothing; the last compressed row belongs to no window; the last token is
    in no window."""
    name = {"windows": "gather", "dk": "pool_mean"}.get(tensor, "compressed_attention")
    by, x = IMPLEMENTATIONS[name], suite_case(seed)
    wrong = results_of(by.passes(x))[tensor].clone()
    wrong[0 if tensor in ("o", "lse") else -1] = 1.0
    with pytest.raises(WrongResult, match=f"{tensor} differs"):
        by.check(x, "forward" if tensor in by.outputs else "backward", {tensor: wrong})


def test_pooled_rows_without_a_window_may_be_anything(seed):
    by, x = IMPLEMENTATIONS["pool_mean"], suite_case(seed)
    pooled = by.passes(x)["forward"]()["pooled"].clone()
    pooled[x.num_windows :] = torch.nan
    assert by.check(x, "forward", dict(pooled=pooled))["pooled"] < 1e-5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one block fewer", "forced blocks"),
        ("padded with -2", "forced blocks"),
        ("descending", "blocks ascend"),
        ("twice", "blocks ascend"),
        ("the next block", "none is of the future"),
        ("without the first", "forced blocks"),
        ("without its own", "forced blocks"),
        ("int64", "int64"),
        ("one column fewer", r"\(300, 2, 4\)"),
        ("the worst instead of the best", "less than the best"),
    ],
)
def test_a_wrong_choice_of_blocks_is_refused(fault, message, pairs, seed):
    x = suite_case(seed)
    indices = x["block_indices"].clone()
    row = indices[-1, 0]  # query 299, block 9: 0, two free ones, 8 and 9
    assert row[0] == 0
    assert row[-2:].tolist() == [8, 9]
    if fault == "one block fewer":
        row[-1] = -1
    elif fault == "padded with -2":
        x = suite_case(seed, num_tokens=100)  # whose queries have three blocks at most
        indices = x["block_indices"].clone()
        indices[-1, 0, -1] = -2
    elif fault == "descending":
        row[1:3] = row[1:3].flip(0)
    elif fault == "twice":
        row[1] = row[2]
    elif fault == "the next block":
        row[-1] = 10
    elif fault == "without the first":
        indices[-1, 0] = torch.tensor([1, 2, 3, 8, 9])
    elif fault == "without its own":
        indices[-1, 0] = torch.tensor([0, 1, 2, 3, 8])
    elif fault == "int64":
        indices = indices.long()
    elif fault == "one column fewer":
        indices = indices[..., :-1]
    elif fault == "the worst instead of the best":
        where = (x["cu_seqlens"], x.num_tokens)
        tensors, options = (x["q"], x["k_cmp"], x["lse"]), x.windows | x.blocks
        _, scores = ops.select_blocks(*tensors, *where, **options, return_scores=True)
        worst = scores[-1, 0, 1:8].topk(2, largest=False).indices.sort().values + 1
        row[1:3] = worst.int()
    with pytest.raises(WrongResult, match=message):
        check_selection(x, indices)


def test_recompute_is_asked_for(monkeypatch, seed):
    """The branches of the suite for memory are computed again in backward."""
    asked, right = [], ops.nsa_attention
    record = lambda *x, **o: asked.append(o.get("recompute")) or right(*x, **o)  # noqa: E731
    monkeypatch.setattr(ops, "nsa_attention", record)
    x = suite_case(seed)
    RECOMPUTING.passes(x)["forward_backward"]()
    assert asked == [("compressed", "selected", "sliding")]


def test_loop_orders_go_to_their_backends(monkeypatch, seed):
    asked = []
    record = lambda *x, **options: asked.append(options["backend"]) or x[0]  # noqa: E731
    monkeypatch.setattr(ops, "selected_attention", record)
    for by in LOOP_ORDERS:
        by.passes(suite_case(seed))["forward"]()
    assert asked == ["auto", "triton_kv_major", "triton_query_major"]
