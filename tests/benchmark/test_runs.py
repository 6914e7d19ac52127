"""The runs of the benchmark on a CPU, with a meter that needs no GPU: rows, files, tables, pictures and the command line."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from nsa_fsa.benchmarking import app as benchmark
from nsa_fsa.benchmarking import measure, pictures, report, results, selected
from nsa_fsa.benchmarking.calls import Implementation
from nsa_fsa.benchmarking.compressed import COMPRESSED
from nsa_fsa.benchmarking.core import CORE, PARTS
from nsa_fsa.benchmarking.implementations import IMPLEMENTATIONS, ours, sdpa
from nsa_fsa.benchmarking.measure import RESULTS, code_version, source_digest
from nsa_fsa.benchmarking.selection import SELECTION
from tests.benchmark.tools import CPU, DEVICE, SCRIPTS, TINY, FakeMeter, open_results, quiet, reference_calls


def wrong_peer(inputs):
    calls = reference_calls(inputs)
    right = calls.forward
    calls.forward = lambda: right() * 2
    return calls


def failing_backward(inputs):
    calls = reference_calls(inputs)

    def backward():
        raise NotImplementedError("no gradient here")

    calls.backward = calls.forward_backward = backward
    return calls


def import_error():
    raise ImportError("no such package")


def made_up(name, prepare, kind="ours", **options):
    return Implementation(name, f"label of {name}", kind, prepare, **options)


TIMED = [
    made_up("triton_kv_major", functools.partial(ours, backend="triton_kv_major"), facts=lambda inputs, name: {"extra": name}),
    made_up("reference", reference_calls),
    made_up("sdpa_cudnn", functools.partial(sdpa, backend="MATH"), "full"),
    made_up("wrong", wrong_peer, "selected"),
    made_up("forward only", failing_backward, "selected"),
    made_up("missing", reference_calls, "selected", load=import_error),
    made_up("unable", reference_calls, "selected", unsupported=lambda setting: "it is Tuesday"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, on the CPU too: two group sizes, two selections, one head width; Triton kernels by the interpreter."""
    folder = tmp_path_factory.mktemp("results")
    store = open_results(folder)
    settings = [
        dataclasses.replace(TINY, num_tokens=48, num_heads=2, group_size=group, selection=selection)
        for selection in ("random", "realistic")
        for group in (1, 2)
    ]
    passes = ["forward", "backward", "forward_backward"]
    selected.run_times(settings, TIMED, passes, FakeMeter(), store, 0, DEVICE, quiet())
    return store


def test_a_run_records_rows(finished):
    document = json.loads(finished.path.read_text())
    results.validate(document)
    assert document == finished.document
    found = {(r["implementation"], r["pass"], r["group_size"], r["selection"]) for r in document["rows"]}
    passes = ("forward", "backward", "forward_backward")
    selections = ("random", "realistic")
    expected = {(x, p, g, s) for x in ("triton_kv_major", "reference") for p in passes for g in (1, 2) for s in selections}
    expected |= {("sdpa_cudnn", p, g, "full") for p in passes for g in (1, 2)}  # once for both selections
    expected |= {("forward only", "forward", g, s) for g in (1, 2) for s in selections}
    assert found == expected
    for row in document["rows"]:
        assert row["ms_20"] < row["ms"] < row["ms_80"]
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["tflops"] == pytest.approx(row["necessary_tflop"] / row["ms"] * 1e3)
        assert (row["extra_gib"], row["workspace_gib"]) == (3, 1)
        assert max(row["errors"].values()) < 1e-4
        assert row["label"] == f"label of {row['implementation']}"
        assert row.get("extra") == (row["pass"] if row["implementation"] == "triton_kv_major" else None)
    assert len(document["selections"]) == 4
    assert all(0 <= entry["overlap_sparse"] <= entry["overlap_all"] <= 1 for entry in document["selections"])
    run = document["runs"][0]
    assert run["machine"]["torch"] == torch.__version__
    assert run["ceilings"]["matmul_flop_per_s"] == 7e14


def test_a_run_says_what_it_left_out(finished):
    reasons = {(e["implementation"], e.get("pass")): e["reason"] for e in finished.document["not_timed"]}
    assert "refused: o differs" in reasons["wrong", "forward"]
    assert "refused: o differs" in reasons["wrong", "backward"]
    assert reasons["forward only", "backward"] == "NotImplementedError: no gradient here"
    assert reasons["missing", None] == "import failed: ImportError: no such package"
    assert reasons["unable", None] == "it is Tuesday"
    assert not {"reference", "triton_kv_major", "sdpa_cudnn"} & {name for name, _ in reasons}


def printed(table):
    console = quiet()
    console.print(table)
    return console.file.getvalue()


def test_tables(finished):
    tables = report.latency_tables(finished.document)
    assert len(tables) == 2
    for table, selection in zip(tables, ("random", "realistic"), strict=True):
        text = printed(table)
        assert selection in text
        for label in ("nsa_fsa triton_kv_major", "full: cuDNN", "forward only", "T", "of floor"):
            assert label in text
        assert "wrong" not in text
    left_out = printed(report.left_out_table(finished.document))
    assert "it is Tuesday" in left_out
    assert report.left_out_table(finished.document | {"not_timed": []}) is None


def test_pictures(finished, tmp_path):
    paths = pictures.plot_latency(finished.document, tmp_path / "selected_gpu")
    assert [path.name for path in paths] == ["selected_gpu_16x4_random_d16.png", "selected_gpu_16x4_realistic_d16.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in paths)


def test_every_implementation_has_a_style():
    assert set(pictures.STYLES) == set(IMPLEMENTATIONS | COMPRESSED | SELECTION | CORE | PARTS)
    for together in (IMPLEMENTATIONS, COMPRESSED, SELECTION, CORE, PARTS):
        assert len({(pictures.STYLES[name]["color"], pictures.STYLES[name]["marker"]) for name in together}) == len(together)


def test_ablations(tmp_path):
    store = open_results(tmp_path, "selected_ablations")
    setting = dataclasses.replace(TINY, num_tokens=64, num_heads=2)
    selected.run_ablations([setting], FakeMeter(), store, 0, DEVICE, quiet())
    variants = list(selected.ablations(selected.make_inputs(setting, 0, CPU)))
    assert [(r["variant"], r["pass"]) for r in store.document["rows"]] == [
        (v, p) for v in variants for p in ("forward", "backward")
    ]
    assert store.document["not_timed"] == []
    text = printed(report.ablation_table(store.document))
    for variant in variants:
        assert variant in text
    assert "up to 18.9%" in " ".join(text.split())


def test_one_program_per_tile_means_one_tile():
    inputs = selected.make_inputs(TINY, 0, DEVICE)
    config = selected.ablations(inputs)["without the inner loop: a program per tile"][1]["config"]
    assert (config.fwd_item_rows, config.bwd_item_rows) == (config.fwd_m, config.bwd_m)


def test_memory(tmp_path):
    store = open_results(tmp_path, "selected_memory")
    setting = dataclasses.replace(TINY, num_tokens=64)
    selected.run_memory([setting], [1 << 29, selected.UNLIMITED], FakeMeter(), store, 0, DEVICE, quiet())
    rows = store.document["rows"]
    assert [(r["variant"], r["pass"]) for r in rows] == [(v, p) for v in ("0.5", "unlimited") for p in ("forward", "backward")]
    # entries [HKV, T * slots], two [HKV, blocks], one [HKV, T], and of all heads [3, T] and [4, blocks], int32
    blocks = 64 // 16 + 1
    assert rows[0]["index_gib"] * 2**30 == 4 * (2 * (64 * 1 + 2 * blocks + 64) + 3 * 64 + 4 * blocks)
    assert "unlimited" in printed(report.memory_table(store.document))


def test_the_paper_is_quoted_at_its_settings(monkeypatch, tmp_path):
    monkeypatch.setitem(selected.TABLE_5, (16, 4), {64: 1.88})
    store = open_results(tmp_path, "selected_memory")
    selected.run_memory([dataclasses.replace(TINY, num_tokens=64)], [1 << 29], FakeMeter(), store, 0, DEVICE, quiet())
    assert store.document["rows"][0]["paper_gb"] == 1.88
    assert "2508.18224" in store.document["rows"][0]["paper_source"]
    assert "1.88" in printed(report.memory_table(store.document))


# Files


def add(store, implementation="a", name="forward", setting=TINY, **measured):
    store.add_row(implementation, "ours", name, setting, ms=1.0, **measured)


def test_slug():
    assert results.slug("NVIDIA H200") == "nvidia_h200"
    assert results.slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"


def test_every_row_is_on_disk_at_once(tmp_path):
    store = open_results(tmp_path)
    for number in range(3):
        add(store, f"implementation {number}")
        assert len(json.loads(store.path.read_text())["rows"]) == number + 1
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]


def test_merge_joins_runs_of_the_same_code(tmp_path):
    first = open_results(tmp_path)
    add(first, "a")
    add(first, "b")
    first.leave_out("c", "not installed")
    first.leave_out("d", "no backward", **{"pass": "backward"}, **dataclasses.asdict(TINY))
    second = open_results(tmp_path, merge=True)
    add(second, "b", tflops=5)
    add(second, "c")
    add(second, "d")  # its forward: the reason about the backward stays
    document = json.loads(second.path.read_text())
    results.validate(document)
    assert [(r["implementation"], r["run"]) for r in document["rows"]] == [("a", 0), ("b", 1), ("c", 1), ("d", 1)]
    assert document["rows"][1]["tflops"] == 5
    assert len(document["runs"]) == 2
    assert [e["implementation"] for e in document["not_timed"]] == ["d"]


def test_without_merge_a_run_starts_afresh(tmp_path):
    add(open_results(tmp_path), "a")
    assert open_results(tmp_path).document["rows"] == []


@pytest.mark.parametrize("what", ["commit", "source_digest"])
def test_merge_refuses_other_code(monkeypatch, tmp_path, what):
    add(open_results(tmp_path), "a")
    monkeypatch.setattr(results, "code_version", lambda stated: code_version(stated) | {what: "another"})
    with pytest.raises(results.CannotMerge, match="another"):
        open_results(tmp_path, merge=True)


def test_merge_refuses_another_gpu(tmp_path):
    store = open_results(tmp_path)
    store.document["gpu"] = "another"
    store.write()
    with pytest.raises(results.CannotMerge, match="another"):
        open_results(tmp_path, merge=True)


@pytest.mark.parametrize("part", ["runs", "rows", "selections", "not_timed"])
def test_validate_misses_nothing(finished, part):
    for name in results.REQUIRED[part]:
        document = json.loads(json.dumps(finished.document))
        del document[part][0][name]
        with pytest.raises(ValueError, match=name):
            results.validate(document)


def test_validate_refuses_a_row_twice(finished):
    document = json.loads(json.dumps(finished.document))
    document["rows"].append(document["rows"][0])
    with pytest.raises(ValueError, match="twice"):
        results.validate(document)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_published_results_are_whole(path):
    document = json.loads(path.read_text())
    results.validate(document)
    assert document["rows"]
    assert not document["code"]["dirty"], "measured code that no commit has"


def test_the_code_is_named():
    assert code_version()["commit"] not in ("", "stated")
    version = code_version("stated")
    assert version == dict(commit="stated", commit_stated_by_hand=True, dirty=None, source_digest=source_digest())


def test_the_recorded_command_can_be_repeated_anywhere():
    given = ["selected", "--output", "/somewhere", "--merge", "--output=/else", "--group", "4"]
    recorded = "selected --merge --group 4"
    assert results.command_line(["scripts/benchmark.py", *given]) == f"python scripts/benchmark.py {recorded}"
    for installed in ("/home/me/.venv/bin/nsa-fsa", "/site-packages/nsa_fsa/cli.py", "nsa-fsa.exe"):
        assert results.command_line([installed, "bench", *given]) == f"nsa-fsa bench {recorded}"


def test_the_digest_covers_the_package(monkeypatch, tmp_path):
    """Every module of it, the benchmark's own among them, and nothing else."""
    before, copy = source_digest(), tmp_path / "nsa_fsa"
    shutil.copytree(measure.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(measure, "PACKAGE", copy)
    assert source_digest() == before
    (tmp_path / "other.py").write_text("x = 1")
    assert source_digest() == before
    for path in ("ops/common/primitives.py", "benchmarking/measure.py"):
        with (copy / path).open("a") as file:
            file.write("# changed\n")
        assert source_digest() != before
        before = source_digest()


def test_installed_it_leaves_other_repositories_alone(tmp_path):
    """Results go to the current directory, and the commit is not that of whatever repository the installation lies in."""
    site = tmp_path / "site"
    shutil.copytree(measure.PACKAGE, site / "nsa_fsa", ignore=shutil.ignore_patterns("__pycache__"))
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a", "--allow-empty"]):
        subprocess.run(["git", *command], cwd=site, check=True)
    code = "from nsa_fsa.benchmarking.measure import RESULTS, code_version; print(RESULTS, code_version())"
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    expected = dict(commit="unknown", commit_stated_by_hand=False, dirty=None, source_digest=source_digest())
    assert run.stdout.strip() == f"nsa_fsa_results {expected}", run.stderr


def test_without_matplotlib_there_are_tables(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not importable
    monkeypatch.setattr(benchmark, "console", console := quiet())
    benchmark.show(finished)
    text = console.file.getvalue()
    assert 'No pictures: they need matplotlib. Fix: pip install "nsa-fsa[plot]"' in text
    assert "Picture:" not in text
    assert "Selected attention" in text


# The command line


@pytest.mark.parametrize("program", [[str(SCRIPTS / "benchmark.py")], ["-m", "nsa_fsa.cli", "bench"]], ids=["script", "cli"])
def test_without_a_gpu_it_says_so(program, tmp_path):
    """As a user meets it."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "200"}
    command = [sys.executable, *program, "selected", f"--output={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 1
    text = " ".join(run.stdout.split())
    assert "cannot run here: PyTorch" in text
    assert "sees no CUDA GPU" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["selected --memory", "selected --ablations", "compressed", "selection"])
def test_no_command_runs_without_a_gpu(monkeypatch, command, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(benchmark.app, [*command.split(), f"--output={tmp_path}"])
    assert run.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_it_refuses_interpreted_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(benchmark, "console", console := quiet())
    assert CliRunner().invoke(benchmark.app, ["selected"]).exit_code == 1
    assert "TRITON_INTERPRET is set" in console.file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["selected", "--blocks=64"], "is not of the form 64x16"),
        (["selected", "--selection=best"], "'best' is none of random, realistic"),
        (["selected", "--implementation=magic"], "'magic' is none of auto"),
        (["selected", "--pass=sideways"], "'sideways' is none of forward"),
        (["selected", "--memory", "--ablations"], "two runs"),
        (["compressed", "--implementation=auto"], "'auto' is none of compressed_attention"),
        (["compressed", "--pass=sideways"], "'sideways' is none of forward"),
        (["selection", "--keys=best"], "'best' is none of window_means, independent"),
        (["selection", "--blocks=64"], "is not of the form 64x16"),
        (["selection", "--implementation=pool_mean"], "'pool_mean' is none of compressed_attention, select_blocks"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    run = CliRunner().invoke(benchmark.app, arguments, env={"COLUMNS": "200"})
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    command = [
        sys.executable, str(SCRIPTS / "benchmark.py"), "selected", "--tokens=2048", "--group=4", "--blocks=64x16",
        "--milliseconds=5", "--implementation=triton_kv_major", "--implementation=sdpa_flash", f"--output={tmp_path}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    results.validate(document)
    assert len(document["rows"]) == 9, document["not_timed"]  # three passes; two selections, and full attention once
    assert all(0 < row["of_floor"] < 1 for row in document["rows"])
