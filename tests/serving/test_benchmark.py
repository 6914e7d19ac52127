"""`python -m benchmarks serving`, with a tiny model on the CPU."""

import asyncio
import dataclasses
import math

import pytest
from rich.console import Console

from benchmarks import serving
from benchmarks.engine import Part, Plan, measure_parts
from benchmarks.published import SuiteResults, validate
from tests.benchmarks.tiny import tiny_model

MODEL = tiny_model((256, 256, 2, 8, 2), vocab_size=512, positions=2048, spread=0.1)
PARTS = (
    Part("first_token", 300),
    Part("agreement", 200, 2),
    Part("decode", 100, 3),
    Part("decode", 200, 10**6),
    Part("load", 200, rate=2.0),
)
ENGINE = dict(max_model_len=512, block_size=64, enforce_eager=True, max_num_seqs=8)
PLAN = Plan(PARTS, ENGINE, 512, new_tokens=24, runs=2, shortest=20, seconds=4, limit=60)


class Clock:
    method = serving.METHOD


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function of the plan that returns the document."""
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)

    def measure(plan, names=serving.IMPLEMENTATIONS):
        about = dict(ceilings={}, seed=0)
        results = SuiteResults(tmp_path / "results", "serving", Clock(), about)
        serving.measure(results, Console(), MODEL, plan, names, tmp_path / "checkpoints")
        validate(results.document)
        return results.document

    return measure


@pytest.mark.slow
def test_both_models_are_measured(run):
    document = run(PLAN)
    rows = {(x["implementation"], x["pass"]): x for x in document["rows"]}
    assert {*rows} == {
        (name, kind)
        for name in serving.IMPLEMENTATIONS
        for kind in ("first_token", "decode", "load")
    }
    for (_, kind), row in rows.items():
        assert row["ms"] > 0
        assert row["engine"]["cache_tokens"] > 2000
        if kind == "first_token":
            assert len(row["times"]) == PLAN.runs
        if kind == "decode":
            assert row["steps"] >= 8
            assert math.isclose(row["tokens_per_s"], 3e3 / row["ms"])
            assert row["with_prefill_tokens_per_s"] < row["tokens_per_s"]
        if kind == "load":
            assert row["requests"] > 1
            assert row["failed"] == row["unfinished"] == 0
            assert row["ms_99"] >= row["ms"]
            assert row["between_tokens_ms_99"] >= row["between_tokens_ms"] > 0
    # In float32 both compute the same, so that only a wrong branch would choose another token.
    for entry in document["agreement"]:
        assert entry["positions"] == 48
        assert entry["clear_positions"] > 5
        assert entry["agreement"] == 1
    assert len(document["agreement"]) == 2
    reasons = [x["reason"] for x in document["not_timed"]]
    assert len(reasons) == 2
    assert all("do not fit into caches" in x for x in reasons)
    assert (serving.table(document)["times as fast"] > 0).all()


@pytest.mark.slow
def test_an_engine_that_does_not_start(run):
    plan = dataclasses.replace(PLAN, engine=ENGINE | dict(kv_cache_dtype="fp8"))
    document = run(plan, ["nsa_fsa"])
    assert not document["rows"]
    assert [x["pass"] for x in document["not_timed"]] == [x.kind for x in PARTS]
    assert all(x["reason"].startswith("its engine did not start") for x in document["not_timed"])


class Hanging:
    """An engine that answers no more."""

    async def generate(self, *request):
        await asyncio.sleep(60)
        yield


def test_every_part_keeps_to_its_limit():
    parts = (Part("first_token", 9), Part("agreement", 9, 2), Part("load", 30, rate=30.0))
    said = []
    plan = Plan(parts, {}, 512, shortest=20, seconds=0.3, limit=0.3)
    asyncio.run(measure_parts(Hanging(), plan, said.append))
    assert [x["begun"] for x in said[::2]] == [x["part"] for x in said[1::2]] == [*parts]
    first, second, load = (x["found"]["reason"] for x in said[1::2])
    assert first == second == "TimeoutError: it took more than 0.3 s"
    assert "had an answer: late" in load
