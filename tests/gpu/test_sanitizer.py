"""Row 14 of reliability.md."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import sanitizer_cases

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def run(*command):
    # PyTorch's allocator hands out parts of larger pieces, between which an access out of bounds would not be one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "NSA_FSA_PROFILE": "0"}
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.gpu.sanitizer_cases"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    output = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, output[-8000:]
    assert f"{len(sanitizer_cases.RUNS)} cases ran" in output
    return output


def test_the_cases_run():
    run()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_errors(tool):
    # Calls of the driver that fail and are meant to, such as questions about what a GPU can do, are no errors of ours.
    output = run("compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "86")
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    assert summary, output[-8000:]
    assert all("0 errors" in line for line in summary), "\n".join(summary)
