"""The file that a run writes, and what it says of code and machine."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from nsa_fsa.benchmarking import results
from nsa_fsa.benchmarking.results import Results, code_version, command_line, machine, versions


def test_every_entry_is_on_disk_at_once(tmp_path):
    store = Results(tmp_path, "bench", {})
    for number in range(3):
        store.add("rows", implementation=number)
        document = json.loads(store.path.read_text())
        assert [row["implementation"] for row in document["rows"]] == list(range(number + 1))
        assert {row["run"] for row in document["rows"]} == {0}
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H200", "nvidia_h200"), ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb")],
)
def test_the_file_is_named_after_the_gpu(gpu, name, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "machine", lambda: dict(gpu=gpu))
    assert Results(tmp_path, "bench", {}).path.name == f"bench_{name}.json"


def test_a_run_says_where_it_comes_from(tmp_path):
    document = Results(tmp_path, "bench", dict(timing="none")).document
    assert (document["schema"], document["benchmark"]) == (1, "bench")
    assert document["code"] == code_version()
    (run,) = document["runs"]
    assert run["date"].endswith("+00:00")
    assert run["method"] == dict(timing="none")
    assert run["machine"] == machine()
    assert run["machine"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert run["machine"]["NSA_FSA_PROFILE"] == "0"  # tests/conftest.py sets it


def test_the_code_is_named():
    version = code_version()
    assert len(version["commit"]) == 40 or version["commit"] == "unknown"
    assert len(version["source_digest"]) == 16


@pytest.fixture
def copied(tmp_path):
    """A folder with a copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(results.PACKAGE, tmp_path / "site" / "nsa_fsa", ignore=ignore)
    return tmp_path / "site"


def test_the_digest_covers_the_code(monkeypatch, copied):
    """Every module of the package; and in a checkout those of benchmarks/, but nothing else."""
    monkeypatch.setattr(results, "PACKAGE", copied / "nsa_fsa")

    def digest():
        return code_version()["source_digest"]

    before = digest()
    (copied / "other.py").write_text("x = 1")
    (copied / "benchmarks").mkdir()  # of some other distribution
    (copied / "benchmarks" / "peers.py").write_text("x = 1")
    assert digest() == before
    for path in ("ops/common/primitives.py", "benchmarking/meter.py"):
        with (copied / "nsa_fsa" / path).open("a") as file:
            file.write("# changed\n")
        assert digest() != before
        before = digest()
    (copied / "pyproject.toml").write_text("")
    assert digest() != before


def test_installed_it_leaves_other_repositories_alone(copied):
    """The commit is not that of whatever repository the installation lies in."""
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a", "--allow-empty"]
    for command in (["init", "-q"], commit):
        subprocess.run(["git", *command], cwd=copied, check=True)
    code = "from nsa_fsa.benchmarking.results import code_version; print(code_version())"
    environment = os.environ | {"PYTHONPATH": str(copied)}
    options = dict(capture_output=True, text=True, cwd=copied.parent, env=environment)
    run = subprocess.run([sys.executable, "-c", code], **options)
    assert "'commit': 'unknown', 'dirty': None" in run.stdout, run.stderr


def test_the_recorded_command_can_be_repeated_anywhere():
    given = ["core", "--output", "/somewhere", "--merge", "--output=/else", "--tokens", "4"]
    recorded = "core --merge --tokens 4"
    assert command_line("/a/benchmarks/__main__.py", *given) == f"python -m benchmarks {recorded}"
    for program in ("/home/me/.venv/bin/nsa-fsa", "/site-packages/nsa_fsa/cli.py", "nsa-fsa.exe"):
        assert command_line(program, "bench", *given) == f"nsa-fsa bench {recorded}"


def test_versions_of_what_is_and_is_not_installed():
    assert versions()["nsa-fsa"]
    assert versions()["torch"]
    assert "no-such-package" not in versions()
