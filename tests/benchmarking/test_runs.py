"""Whole runs on a CPU: what is checked, timed, recorded and left out; and the crossover."""

import dataclasses
import json
import sys

import pytest
import torch

from nsa_fsa.benchmarking import runs
from nsa_fsa.benchmarking.cases import PASSES
from nsa_fsa.benchmarking.implementations import FLASH_ATTN_4, NSA_CORE, NSA_LAYER
from nsa_fsa.benchmarking.runs import LENGTHS, bracket, middle
from tests.benchmarking.test_check import MATH
from tests.benchmarking.tools import FakeMeter, bench_in, case, changed

K = 1024
LIMIT = 128 * K


@pytest.fixture
def bench(tmp_path):
    return bench_in(tmp_path)


def on_disk(bench):
    return json.loads(bench.results.path.read_text())


# One case


def test_a_row_says_what_was_measured(bench):
    x = case(seed=3)
    times = bench.measure(x, NSA_CORE, PASSES, variant="a fact")
    document = on_disk(bench)
    assert [row["pass"] for row in document["rows"]] == list(PASSES)
    assert times == {row["pass"]: row["ms"] for row in document["rows"]}
    for row in document["rows"]:
        assert (row["implementation"], row["kind"], row["run"]) == ("nsa_fsa", "ours", 0)
        assert (row["num_tokens"], row["group_size"], row["num_heads"]) == (300, 2, 4)
        assert (row["block_size"], row["num_blocks"], row["head_dim"]) == (32, 5, 16)
        assert (row["kernel_size"], row["kernel_stride"], row["window_size"]) == (32, 16, 40)
        assert (row["dtype"], row["selection"]) == ("float32", "independent")
        assert row["variant"] == "a fact"
        assert row["ms_20"] < row["ms"] < row["ms_80"]
        assert (row["extra_gib"], row["host_ms"]) == (3.0, 0.25)
        assert max(row["errors"].values()) < 1e-5
        assert row["label"] == NSA_CORE.label
    assert document["not_timed"] == []


def test_full_attention_knows_no_blocks(bench):
    bench.measure(case(), MATH, ["forward"])
    (row,) = on_disk(bench)["rows"]
    assert (row["block_size"], row["num_blocks"], row["selection"]) == (0, 0, "full")
    assert row["version"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_only_the_passes_asked_for_are_run(bench):
    called = []

    class Watching(type(NSA_CORE)):
        def check(self, case, name, results):
            called.append(name)
            return {}

    by = Watching(**{x.name: getattr(NSA_CORE, x.name) for x in dataclasses.fields(NSA_CORE)})
    bench.measure(case(), by, ["backward"])
    assert called == ["forward", "backward"]  # a wrong forward would take the backward with it
    assert [row["pass"] for row in on_disk(bench)["rows"]] == ["backward"]


def doubled(case, *tensors):
    return 2 * NSA_CORE.function(case, *tensors)


def without_backward(case, *tensors):
    return NSA_CORE.function(case, *tensors).detach()


def unable(case, *tensors):
    raise ValueError("it is Tuesday\nand more")


def too_large(case, *tensors):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (doubled, "WrongResult: o differs from the reference"),
        (unable, "ValueError: it is Tuesday"),
        (too_large, "OutOfMemoryError: CUDA out of memory. Tried to allocate 16 GiB"),
    ],
)
def test_a_forward_that_fails_takes_all_passes_with_it(bench, function, reason):
    assert bench.measure(case(), changed(NSA_CORE, function=function), PASSES) == {}
    document = on_disk(bench)
    assert document["rows"] == []
    (entry,) = document["not_timed"]
    assert entry["reason"].startswith(reason)
    assert "and more" not in entry["reason"]
    assert (entry["implementation"], entry["num_tokens"]) == ("nsa_fsa", 300)
    assert reason in bench.console.file.getvalue()


def test_a_backward_that_fails_leaves_the_forward(bench):
    by = changed(NSA_CORE, function=without_backward)
    assert list(bench.measure(case(), by, PASSES)) == ["forward"]
    document = on_disk(bench)
    assert [row["pass"] for row in document["rows"]] == ["forward"]
    assert [entry["pass"] for entry in document["not_timed"]] == ["backward", "forward_backward"]
    assert all("does not require grad" in entry["reason"] for entry in document["not_timed"])


def test_what_is_not_installed_is_left_out(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert bench.measure(case(), FLASH_ATTN_4, PASSES) == {}
    assert "flash_attn" in on_disk(bench)["not_timed"][0]["reason"]


def test_a_layer_is_timed_with_its_parameters(bench, monkeypatch):
    gradients = []
    check = lambda self, case, name, results: gradients.append([*results]) or {}  # noqa: E731
    monkeypatch.setattr(type(NSA_LAYER), "check", check)
    bench.measure(case(), NSA_LAYER, PASSES)
    assert gradients[0] == ["y"]
    assert {"dx", "dq_proj.weight", "dgate.weight"} <= set(gradients[1])
    assert len(on_disk(bench)["rows"]) == 3


# The search for the crossover


@pytest.mark.parametrize(
    ("ratios", "around", "between"),
    [
        ({K: 0.5, 2 * K: 0.9, 4 * K: 1.5, 8 * K: 2.0}, (2 * K, 4 * K), 3 * K),
        ({8 * K: 0.9, 16 * K: 1.5}, (8 * K, 16 * K), 12 * K),
        ({8 * K: 0.9, 9 * K: 1.5, 16 * K: 2.0}, (8 * K, 9 * K), None),  # known to a step
        ({K: 0.5, 2 * K: 1.0}, (2 * K, None), None),  # never: as fast is not faster
        ({K: 1.1, 2 * K: 1.2}, (None, K), None),  # always
        ({K: 0.5, 2 * K: 1.2, 4 * K: 0.9, 8 * K: 1.1}, (4 * K, 8 * K), 6 * K),  # from there on
        ({5 * K: 0.9, 8 * K: 1.1}, (5 * K, 8 * K), 6 * K),  # multiples of 1,024
        ({}, (None, None), None),
    ],
)
def test_where_to_look_next(ratios, around, between):
    assert bracket(ratios) == around
    assert middle(ratios) == between


class Planted(FakeMeter):
    """Takes the milliseconds that a call returns."""

    def time(self, call):
        self.calls += 1
        return dict(ms=call(), ms_20=0, ms_80=0, host_ms=0)

    def memory(self, call):
        return dict(extra_gib=0)


class Told(type(NSA_CORE)):
    """Takes `function(case, pass)` milliseconds, and is always right."""

    def passes(self, case, function=None):
        return {name: lambda name=name: self.function(case, name) for name in PASSES}

    def check(self, case, name, results):
        return {}


def told(milliseconds, like=NSA_CORE):
    fields = {x.name: getattr(like, x.name) for x in dataclasses.fields(like)}
    return Told(**fields | dict(function=milliseconds))


def slower_from(start):
    """As fast as the core one token before `start`, 7K tokens later in the forward; then slower."""

    def milliseconds(case, name):
        return case.num_tokens / (start - 1 + (7 * K if name == "forward" else 0))

    return told(milliseconds, MATH)


@pytest.fixture
def search(monkeypatch, tmp_path):
    """The entries of a search by pass, its document, and how often something was timed."""

    def run(full, **sizes):
        monkeypatch.setattr(runs, "NSA_CORE", told(lambda case, name: 1.0))
        bench = bench_in(tmp_path, "crossover", meter := Planted())
        bench.crossover(case(K, **sizes), full)
        document = on_disk(bench)
        return {x["pass"]: x for x in document["crossovers"]}, document, meter.calls

    return run


@pytest.mark.parametrize("start", [2 * K, 3 * K, 9 * K, 9 * K + 1, 50 * K, 65 * K])
def test_the_planted_crossover_is_found(search, start):
    entries, document, timed = search(slower_from(start))
    for name, later in (("forward", 7 * K), ("forward_backward", 0)):
        tokens = -(-(start + later) // K) * K  # the next multiple
        assert (entries[name]["slower_at"], entries[name]["tokens"]) == (tokens - K, tokens)
        ratios = {int(x): y for x, y in entries[name]["ratios"].items()}
        assert list(ratios) == sorted(ratios)
        assert ratios == {x: pytest.approx(x / (start + later - 1)) for x in ratios}
        assert all(x % K == 0 for x in ratios)
        assert (entries[name]["against"], entries[name]["group_size"]) == ("cudnn", 2)
    assert timed == len(document["rows"])
    places = {(r["implementation"], r["pass"], r["num_tokens"]) for r in document["rows"]}
    assert len(places) == timed


def test_never_and_always(search):
    entries, _, timed = search(slower_from(1 << 20))
    assert {(x["slower_at"], x["tokens"]) for x in entries.values()} == {(LIMIT, None)}
    assert timed == 2 * 2 * len(LENGTHS)  # nothing to halve
    entries, *_ = search(told(lambda case, name: 2.0, MATH))
    assert {(x["slower_at"], x["tokens"]) for x in entries.values()} == {(None, K)}


def test_what_does_not_fit_is_skipped(search):
    """The longest lengths, and one that the halving wants."""

    def milliseconds(case, name):
        if case.num_tokens in (12 * K, LIMIT // 2, LIMIT):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return case.num_tokens / (10 * K)

    entries, document, _ = search(told(milliseconds, MATH))
    assert {(x["slower_at"], x["tokens"]) for x in entries.values()} == {(8 * K, 16 * K)}
    assert {x["num_tokens"] for x in document["not_timed"]} == {12 * K, LIMIT // 2, LIMIT}


def test_a_real_search(tmp_path):
    """With the checks, and real calls."""
    bench = bench_in(tmp_path, "crossover")
    bench.crossover(case(64), MATH, (64, 128))
    document = on_disk(bench)
    assert document["not_timed"] == []
    assert len(document["rows"]) == 8
    assert all(row["errors"] for row in document["rows"])
    # FakeMeter takes longer every time: the core comes first and is always faster.
    assert {(x["slower_at"], x["tokens"]) for x in document["crossovers"]} == {(None, 64)}
