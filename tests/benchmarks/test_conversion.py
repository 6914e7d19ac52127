"""`python -m benchmarks conversion`: a report of every setting, beside one twin."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import conversion
from nsa_fsa.training import report
from tests.integrations.models import dense_model

ROOT = Path(__file__).parents[2]
NAMES = ("16 x 64", "first and last layer dense")


@pytest.fixture
def folder(tmp_path):
    dense_model(vocab_size=256, num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path


def run(folder, *more, code=0):
    arguments = (
        *(folder / "dense", "--text", ROOT / "docs" / "spec.md"),
        *("--held-out", ROOT / "docs" / "concepts.md", "--steps", 8, "--length", 320),
        *("--precision", "fp32", "--models", folder / "models", "--output", folder / "out", *more),
    )
    arguments = ("conversion", "--checkpoint", *arguments)
    environment = {"COLUMNS": "200", "TERM": "dumb"}
    found = CliRunner().invoke(command.app, [*map(str, arguments)], env=environment)
    assert found.exit_code == code, found.output
    return found.output


def test_every_setting_is_converted_and_compared_with_one_twin(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    asked = []
    ask = report.answer
    monkeypatch.setattr(
        report, "answer", lambda question, *x: asked.append(question) or ask(question, *x)
    )
    run(folder, *(x for name in NAMES for x in ("--setting", name)), "--commit", "abc")
    assert {x.dense for x in asked} == {str(folder / "models" / "twin" / "model")}

    files = {x.name for x in (folder / "out").iterdir()}
    assert files == {"16_x_64.json", "first_and_last_layer_dense.json"}
    documents = [
        json.loads((folder / "out" / f"{conversion.file_of(x)}.json").read_text()) for x in NAMES
    ]
    assert [len(x["layers"]) for x in documents] == [3, 1]
    assert all(x["code"]["commit"] == "abc" for x in documents)

    table = conversion.table(folder / "out")
    assert list(table.setting) == list(NAMES)
    for line, document in zip(table.itertuples(index=False), documents, strict=True):
        assert line[1] == f"{document['loss'][-1]['gap']:+.4f}"
        assert line[3] == f"{document['mass']:.1%}"


def test_an_unknown_setting_is_refused(folder):
    assert "'17 x 64' is not known: allowed are 16 x 64," in " ".join(
        run(folder, "--setting", "17 x 64", code=2).replace("│", " ").split()
    )
    assert not (folder / "models").exists()
