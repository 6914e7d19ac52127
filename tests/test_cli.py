"""The command line, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nsa_fsa
from nsa_fsa import NSAConfig, cli
from nsa_fsa.ops import backends

ROOT = Path(__file__).parents[1]
WIDE = {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, arguments, env=WIDE)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def wide_console(monkeypatch):
    monkeypatch.setattr(cli.console, "width", 300)


def test_info_lists_versions_and_every_backend_with_its_reason(monkeypatch):
    impossible = backends.Backend("impossible", lambda: None, unavailable=lambda _: "it needs a machine [from] the future")
    monkeypatch.setitem(backends._BACKENDS, "gated_combine", {"impossible": impossible, **backends._BACKENDS["gated_combine"]})
    printed = run("info")
    assert nsa_fsa.__version__ in printed
    assert torch.__version__.split("+")[0] in printed
    for operator in cli.OPERATORS:
        for name, reason in backends.available(operator).items():
            (line,) = (x for x in printed.splitlines() if f" {operator} " in x and f" {name} " in x)
            assert (" yes " if reason is None else f" no: {reason} ") in line


def test_pictures_are_no_concern_of_info_and_explain(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not importable
    assert "torch" in run("info")
    assert "gated_combine" in run("explain", "--device", "cpu", "--tokens", "64")


def test_bench_has_every_subject():
    printed = run("bench", "--help")
    for subject in ("selected", "selection", "compressed", "core"):
        assert f" {subject} " in printed


def test_info_knows_every_operator():
    parts = {"block_scores", "branch_gradients"}  # of an operator in the table, not operators that a layer calls
    assert set(cli.OPERATORS) | parts == set(backends._BACKENDS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_explain_a_file(path):
    printed = run("explain", "--config", str(path), "--tokens", "4096", "--device", "cpu", "--dtype", "float32")
    assert str(nsa_fsa.explain(NSAConfig.from_yaml(path), 4096, device="cpu", dtype=torch.float32)) in printed


def test_explain_a_preset():
    printed = run("explain", "--preset", "fsa-128x8", "--heads", "16", "--kv-heads", "2", "--head-dim", "64", "--device", "cpu")
    assert "8,192 tokens, 16 query heads of 64, 2 KV heads, bfloat16:" in printed
    config = NSAConfig.from_dict(dict(preset="fsa-128x8", hidden_size=1024, num_heads=16, num_kv_heads=2, head_dim=64))
    assert str(nsa_fsa.explain(config, 8192, device="cpu")) in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "int8"), "allowed are bfloat16, float16, float32, float64"),
        (("--preset", "magic"), "allowed are ('fsa-64x16'"),
        (("--heads", "10", "--kv-heads", "3"), "num_kv_heads"),
        (("--config", "nowhere.yaml"), "does not exist"),
        (("--tokens", "0"), "Invalid value for '--tokens'"),
    ],
)
def test_what_is_wrong_is_said(arguments, said):
    assert said in " ".join(run("explain", *arguments, code=2).replace("│", " ").split())


def test_the_command_itself():
    """As `nsa-fsa` is installed, in a process of its own."""
    command = [sys.executable, "-m", "nsa_fsa.cli", "explain", "--device", "cpu", "--tokens", "64"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "gated_combine: reference" in result.stdout
    (entry,) = (x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("nsa-fsa = "))
    assert entry == 'nsa-fsa = "nsa_fsa.cli:app"'
