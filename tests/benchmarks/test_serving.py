"""What the benchmark of serving does without an engine; tests/serving/ has the rest."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks import serving
from benchmarks.__main__ import app
from benchmarks.engine import MEASURED, Part, Plan
from tests.benchmarks.tiny import tiny_model

MODEL = tiny_model((64, 64, 1, 4, 2), vocab_size=64, positions=512, spread=0.2)
PLAN = Plan((Part("agreement", 40, 2), Part("load", 64, rate=0.5)), dict(max_model_len=64), 64)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    PLAN.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == PLAN


def test_prompts_are_the_same_for_every_engine():
    first, second = PLAN.prompts(PLAN.parts[0])
    assert [first, second] == PLAN.prompts(PLAN.parts[0])
    assert first != second
    assert len(first) == len(second) == 40


def test_parts():
    parts = serving.parts_of([*MEASURED], ["65536x8"], 4096, [0.5, 2.0], 1024)
    kinds = ["first_token", "agreement", "agreement", "decode", "load", "load"]
    assert [x.kind for x in parts] == kinds
    assert parts[3] == Part("decode", 65536, 8)
    assert [x.where()["variant"] for x in parts[-2:]] == ["0.5/s", "2/s"]
    assert serving.parts_of(["load"], [], 1, [1.0], 64) == (Part("load", 64, rate=1.0),)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--case", "7", "'7' is no case"),
        ("--part", "warm", "['warm'] is not known: allowed are first_token"),
        ("--implementation", "sparse", "['sparse'] is not known: allowed are nsa_fsa, dense"),
        ("--dtype", "half", "['half'] is not known: allowed are bfloat16, float32"),
        ("--engine", "[]", "'[]' is no object"),
        ("--engine", "eager", "'eager' is no object"),
    ],
)
def test_the_command_refuses(option, value, said):
    result = CliRunner().invoke(app, ["serving", option, value], env=dict(COLUMNS="200"))
    assert result.exit_code == 2
    assert said in result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("checkpoints")
    MODEL.make(where)
    return where


def test_both_checkpoints_have_the_same_weights(folder):
    dense, sparse = (
        AutoModelForCausalLM.from_pretrained(folder / x, dtype=torch.float32).state_dict()
        for x in ("dense", "nsa_fsa")
    )
    assert {*dense} < {*sparse}
    assert all(torch.equal(x, sparse[name]) for name, x in dense.items())


def test_checkpoints_are_written_once(folder):
    before = (folder / "dense" / "model.safetensors").stat().st_mtime_ns
    MODEL.make(folder)
    assert (folder / "dense" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", serving.IMPLEMENTATIONS)
def test_agreement(folder, name):
    """With what the model generates, and with what it would not."""
    prompts = PLAN.prompts(PLAN.parts[0])
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        answers.append(out[0, len(prompt) :].tolist())
    right = serving.compare(MODEL, folder / name, prompts, answers)
    assert right["agreement"] == right["agreement_anywhere"] == 1
    assert right["agreement_of_transformers"] == 1  # whose dtype is float32, too
    assert 0 < right["clear_positions"] <= right["positions"] == 16
    others = [[(x + 1) % 64 for x in answer] for answer in answers]
    wrong = serving.compare(MODEL, folder / name, prompts, others)
    assert wrong["agreement_anywhere"] < 0.5
    assert wrong["agreement"] < 0.5


def test_agreement_of_a_model_in_16_bits(folder, monkeypatch):
    """The judge's weights are those that are served, and its arithmetic is exact."""
    prompts, answers = PLAN.prompts(PLAN.parts[0]), [[1] * 8] * 2
    model, read, found = dataclasses.replace(MODEL, dtype=torch.bfloat16), serving.read, {}

    def watched(*args):
        found[args[-1]] = read(*args)
        return found[args[-1]]

    monkeypatch.setattr(serving, "read", watched)
    compared = serving.compare(model, folder / "dense", prompts, answers)
    exact, rounded = found[torch.float32], found[torch.bfloat16]
    assert exact.values.shape == (16, 2)
    assert 0 < (exact.values - rounded.values).abs().max() < 0.2
    clear = exact.values[:, 0] - exact.values[:, 1] > serving.GAP
    assert compared["clear_positions"] == clear.sum()
    same = exact.indices[:, 0] == rounded.indices[:, 0]
    assert compared["agreement_of_transformers"] == same[clear].float().mean()


def test_table():
    """Of a median and its ratio."""
    rows = [
        PLAN.parts[1].where() | dict(implementation=name, ms=ms, tokens_per_s=1.0)
        for name, ms in (("dense", 3.0), ("nsa_fsa", 2.0))
    ]
    found = serving.table(dict(rows=rows))
    assert found["times as fast"].tolist() == [1.5]
    assert "times as fast" not in serving.table(dict(rows=rows[:1]))
