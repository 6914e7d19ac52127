"""Kernels are compiled once, whatever the lengths: a training run does not stop for the compiler
at every step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["single", "packed", "decode"])
def test_lengths_that_vary_compile_nothing_anew(kind):
    """In a process of its own, because Triton compiles or interprets as it was told when it
    was imported."""
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(Path(__file__).with_name("variants.py")), kind, "40", "32", "8"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    history = json.loads(run.stdout)
    after_two, after_all = history[1], history[-1]
    assert len(after_all) >= (12 if kind == "decode" else 21), after_all  # nothing slipped past
    gained = {
        name: number - after_two[name]
        for name, number in after_all.items()
        if number > after_two[name]
    }
    assert sum(gained.values()) <= 2, gained
    # Several variants have kernels that are launched several times, for different things: for
    # forward and backward, say.
    assert max(after_all.values()) <= 2, after_all
