"""scripts/generate.py as a user runs it, on models that are too small to say anything."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"


@pytest.fixture
def run(monkeypatch):
    """The script with some arguments, on a CPU: what it prints."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    specification = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for beside in ("progress", "shapes"):
        monkeypatch.delitem(sys.modules, beside, raising=False)

    def invoke(*arguments, code=0):
        app = typer.Typer()
        app.command()(module.main)
        module.console = Console(width=200, force_terminal=False)
        found = CliRunner().invoke(app, [str(x) for x in arguments])
        assert found.exit_code == code, found.output
        return found.output

    return invoke


def test_a_prompt_is_continued_sparse_and_dense(run, tmp_path):
    prompt, figures = tmp_path / "prompt.txt", tmp_path / "figures.json"
    prompt.write_text("Dass sie alle einen Anfang haben. " * 10)
    printed = run(
        "--random-init=tiny-demo",
        f"--prompt={prompt}",
        "--new-tokens=6",
        "--preset=tiny",
        "--beside-dense",
        "--chunk=150",
        f"--json={figures}",
    )
    rows = {row["name"]: row for row in json.loads(figures.read_text())["rows"]}
    assert list(rows) == ["nsa_fsa", "dense"]
    for name, row in rows.items():
        assert (row["prompt_tokens"], row["new_tokens"]) == (340, 6)
        assert f"{name}: {row['text']}" in printed
        assert row["first_token_s"] > 0
        assert row["new_tokens_per_s"] > 0
    for said in ("LlamaForCausalLM is now NSALlamaForCausalLM", "new tokens/s"):
        assert said in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give one of --model and --random-init"),
        (("--random-init=tiny-demo",), "there is nothing to continue"),
        (("--random-init=tiny-demo", "--tokens=4", "--preset=magic"), "'magic' is not known"),
        (("--random-init=tiny-demo", "--prompt=nowhere.txt"), "does not exist"),
        (("--random-init=vast", "--tokens=4"), "'vast' is not known: allowed are llama3-8b"),
    ],
)
def test_what_is_wrong_is_said(run, arguments, said):
    assert said in " ".join(run(*arguments, code=2).split())
