"""Row 14 of reliability.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import sanitizer_cases

ROOT = Path(__file__).parents[2]
OPERATORS = ROOT / "nsa_fsa" / "ops"
ACCESS = re.compile(r"(?:Read|Write) access at \S+ in (\S+):(\d+)")


def run(*command):
    """What the cases print, under the tool that `command` starts."""
    # PyTorch's allocator hands out parts of larger pieces, between which an access out of bounds
    # would not be one.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "NSA_FSA_PROFILE": "0"}
    result = subprocess.run(
        [*command, sys.executable, "-m", "tests.ops.sanitizer_cases"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, output[-8000:]
    assert f"{len(sanitizer_cases.RUNS)} cases ran" in output
    return output


def hand_over_lines():
    """(file, line) of what compiles to the start and the end of warp specialisation,
    in the kernels written in Gluon.
    """
    found = set()
    for path in OPERATORS.rglob("*hopper*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.startswith("def "):
                # The instructions after a kernel's last statement carry this line.
                name = (path.name, number)
            elif line.startswith("    gl.warp_specialize("):
                found |= {name, (path.name, number)}
    return found


def statistics_lines():
    """(file, line) of the copies of dk and dv's statistics, and of where they are read."""
    path = OPERATORS / "common" / "windowed_attention" / "hopper_backward.py"
    of_ring = r"ring\.(shift|delta)\.index\(stage\)"
    accesses = re.compile(rf"async_copy_global_to_shared\({of_ring}, |{of_ring}\.load")
    return {
        (path.name, n)
        for n, line in enumerate(path.read_text().splitlines(), start=1)
        if accesses.search(line)
    }


def split_races(output):
    """The races that racecheck reports, as lists of accesses (file, line):
    those of the following, and all others.

    Around `warp_specialize`, the first warps write to shared memory which function each of the
    others is to run, and with which arguments. These wait at a hardware barrier (`barrier.sync 1`
    in the PTX) before and after they read it, as the first warps do before and after they write,
    but at other instructions, which racecheck does not take for the same barrier.

    The statistics of dk and dv come by cp.async. Readers wait at an mbarrier at which every thread
    that copies announces its copies (`ARRIVES.LDGSTSBAR` in the SASS); the queries' bulk copies
    announce theirs there too, and then racecheck reports the statistics. It does not where the same
    lines run without bulk copies, and still does where the statistics have an mbarrier of their
    own, a plain arrival comes last, or the bulk copies are announced last.
    """
    reports = [
        [(file, int(line)) for file, line in ACCESS.findall(part)]
        for part in output.split("Race reported between")[1:]
    ]
    allowed = (hand_over_lines(), statistics_lines())
    let_pass = [r for r in reports if r and any(lines.issuperset(r) for lines in allowed)]
    return let_pass, [r for r in reports if r not in let_pass]


def test_what_is_let_pass():
    assert len(statistics_lines()) == 4
    (file, line), other = sorted(hand_over_lines())[0], "compressed_attention_hopper.py"
    race = (
        "Race reported between Read "
        "access at kernel+0x290 in {}:{}\n and Write access at kernel+0x10 in {}:{} [4 hazards]\n"
    )
    theirs, ours = race.format(file, line, file, line), race.format(file, line, other, 1)
    assert split_races(theirs + ours + theirs) == (
        [[(file, line)] * 2] * 2,
        [[(file, line), (other, 1)]],
    )
    copied, read = min(statistics_lines()), max(statistics_lines())
    statistics, mixed = race.format(*read, *copied), race.format(*read, file, line)
    assert split_races(statistics + mixed) == ([[read, copied]], [[read, (file, line)]])
    assert split_races("Race reported between something new") == ([], [[]])


@pytest.mark.gpu
def test_the_cases_run():
    run()


NEEDS_SANITIZER = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH"
    ),
]
# Calls of the driver that fail and are meant to, such as questions about what a GPU can do,
# are no errors of ours. FlashAttention's kernels are PyTorch's.
SANITIZER = (
    "compute-sanitizer",
    "--report-api-errors",
    "no",
    "--print-limit",
    "10000",
    "--kernel-name-exclude",
    "kns=flash",
    "--tool",
)


@pytest.mark.parametrize("tool", [pytest.param("memcheck", marks=NEEDS_SANITIZER)])
def test_no_errors(tool):
    output = run(*SANITIZER, tool, "--error-exitcode", "86")
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    assert summary, output[-8000:]
    assert all("0 errors" in line for line in summary), "\n".join(summary)


@pytest.mark.parametrize("tool", [pytest.param("racecheck", marks=NEEDS_SANITIZER)])
def test_no_races(tool):
    output = run(*SANITIZER, tool)
    let_pass, races = split_races(output)
    assert not races, output[-8000:]
    displayed = [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)]
    assert displayed == [len(let_pass)], output[-8000:]
