"""How many processes `make test-gpu` runs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location(
        "gpu_workers", ROOT / "scripts" / "gpu_workers.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# What cards of these sizes report, in MiB: H200, H100 and A100 of 80 GB, A100 of 40 GB,
# RTX 4090, T4.
@pytest.mark.parametrize(
    ("mib", "cores", "expected"),
    [
        (143_156, 64, 11),
        (81_079, 16, 6),
        (40_326, 16, 3),
        (24_080, 16, 1),
        (14_913, 4, 1),
        (143_156, 4, 4),
        (8_000, 8, 1),
    ],
)
def test_they_follow_the_memory_and_the_cores(script, mib, cores, expected):
    assert script.workers(mib * 2**20, cores) == expected


def test_a_number_that_is_asked_for_counts(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_workers.py", "3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    script.main()
    assert capsys.readouterr().out == "3\n"


def test_without_a_gpu_nothing_is_started():
    """As the Makefile asks, which ends there."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / "gpu_workers.py")]
    asked = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert asked.returncode == 1
    assert asked.stdout == ""
    assert "make test-gpu needs a CUDA GPU" in asked.stderr
    assert "Fix: make test" in asked.stderr


def test_the_makefile_asks():
    recipe = subprocess.run(
        ["make", "--dry-run", "test-gpu", "GPU_WORKERS=3"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    ).stdout
    assert "scripts/gpu_workers.py 3)" in recipe
    assert "pytest -n $workers" in recipe
