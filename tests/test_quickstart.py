"""The quickstart, from beginning to end, on a run too short to learn anything."""

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from nsa_fsa import progress

SCRIPT = Path(__file__).parents[1] / "scripts" / "quickstart.py"


def test_quickstart(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--steps=2",
        "--length=256",
        "--batch-size=1",
        f"--output={tmp_path}",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # the script's own choice is looked at
    environment["OMP_DISPLAY_ENV"] = "TRUE"  # the OpenMP library says what it goes by
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    for expected in ("NSALlamaForCausalLM", "418,432", "424,752", "identical logits"):
        assert expected in " ".join(run.stdout.split())  # the console wraps lines
    # Threads that spin while they wait take from each other what they wait for,
    # once other processes are busy, too.
    assert re.search(r"OMP_NUM_THREADS\s*=\s*'1'", run.stderr)
    # Where there is no terminal.
    assert re.search(r"step 2 of 2: loss dense \d\.\d+, NSA \d\.\d+ \(\d+ s", run.stdout)
    for file in (
        "loss.png",
        "selection_and_gates.png",
        "nsa_llama/config.json",
        "nsa_llama/model.safetensors",
    ):
        assert (tmp_path / file).stat().st_size > 500, file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps"),
        (["--length", "255"], "--length"),
        (["--length", str(10**12)], "1,000,000,000,000 is more than the"),
        (["--batch-size", "0"], "--batch-size"),
        (["--seed", str(2**63)], "--seed"),
        (["--output", __file__], "--output"),
    ],
)
def test_what_is_wrong_is_said_first(arguments, said, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    # as the script would, and undone after the test.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(importlib.import_module("quickstart").main)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert not list(tmp_path.iterdir())


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def training(monkeypatch):
    monkeypatch.setattr(progress, "time", Clock())
    return progress


def run_steps(training, seconds, terminal=False):
    """What is printed of steps that take so long, with a report after the first."""
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=terminal, width=100)
    with training.Steps(len(seconds), console) as steps:
        for number, took in enumerate(seconds):
            training.time.now += took
            steps.advance()
            if number == 0:
                training.time.now += 20  # an evaluation, which is no part of a step
                steps.report("loss 1.000")
    return printed.getvalue()


def test_without_a_terminal_a_line_now_and_then(training):
    lines = run_steps(training, [20] * 5).splitlines()
    assert lines == [
        "step 1 of 5: loss 1.000 (40 s, about 160 s left)",
        "step 3 of 5: loss 1.000 (80 s, about 53 s left)",
        "step 5 of 5: loss 1.000 (120 s, about 0 s left)",
    ]


def test_a_step_far_slower_than_the_first_is_said_once(training):
    said = "other processes are using this machine's cores"
    assert said not in run_steps(training, [1, 2, 3, 1])
    slow = " ".join(run_steps(training, [1, 2, 9, 9, 1, 9]).split())
    assert slow.count(said) == 1
    assert "Step 3 took 9.0 s and the first 1.0 s" in slow


def test_on_a_terminal_a_bar(training):
    assert "step 1 of" not in run_steps(training, [20] * 3, terminal=True)
    assert "3/3" in run_steps(training, [20] * 3, terminal=True)
