"""What suites.yaml asks for, and whole runs of it on a CPU, small, with the reference."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import ablations, suites
from benchmarks.inputs import SuiteCase
from benchmarks.published import SuiteResults, read, validate
from benchmarks.suites import IMPLEMENTATIONS
from nsa_fsa.benchmarking.cases import PASSES
from nsa_fsa.benchmarking.implementations import sdpa
from nsa_fsa.benchmarking.runs import Bench
from nsa_fsa.ops.common import tuning
from tests.benchmarking.tools import PAGES, RATES, FakeMeter, case, quiet
from tests.cases import CORE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels can run


def small(name, **changes):
    """The grids of a suite, with sizes for a CPU."""
    sizes = dict(tokens=[96, 128], groups=[1, 4], heads=4, head_dim=[16], dtype="float32")
    sizes |= dict(blocks=["32x4", "64x3"]) | changes
    grids = suites.load()[name]
    return [grid | sizes | dict(tokens=sizes["tokens"][: len(grid["tokens"])]) for grid in grids]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs grids; returns the document, which has no row twice."""
    math = dataclasses.replace(IMPLEMENTATIONS["cudnn"], function=partial(sdpa, backend="MATH"))
    monkeypatch.setitem(IMPLEMENTATIONS, "cudnn", math)

    def run_suite(name, grids, device="cpu", **options):
        results = SuiteResults(tmp_path, name, meter := FakeMeter(), dict(ceilings=RATES, seed=0))
        suites.run(grids, Bench(meter, results, quiet()), device, window_size=40, **options)
        document = json.loads(results.path.read_text())
        validate(document)
        assert meter.calls == len(document["rows"])  # nothing was measured twice
        return document

    return run_suite


def found(document, *names):
    return {tuple(row[name] for name in names) for row in document["rows"]}


# What is asked for


@pytest.mark.parametrize("name", suites.load())
def test_every_implementation_and_pass_is_known(name):
    for grid in suites.load()[name]:
        assert set(grid["implementations"]) <= set(IMPLEMENTATIONS)
        assert set(grid["passes"]) <= set(PASSES)
        assert list(suites.cases(grid, "cpu", 0))


def test_every_implementation_is_in_a_suite():
    grids = [grid for suite in suites.load().values() for grid in suite]
    assert {name for grid in grids for name in grid["implementations"]} == set(IMPLEMENTATIONS)


def test_the_sizes_are_those_of_the_pages():
    """Windows of 32 every 16, 16 blocks of 64, a window of 512, 64 heads of 128, bfloat16."""
    (grid,) = suites.load()["core"]
    cases = list(suites.cases(grid, "cuda", 7))
    lengths = (8192, 12288, 32768, 65536, 131072)
    assert [(x.num_tokens, x.config.group_size) for x in cases] == [
        (tokens, group) for tokens in lengths for group in (1, 4, 16)
    ]
    sizes = dict(PAGES, init_blocks=1, local_blocks=2, selection="independent")
    assert all(sizes.items() <= x.sizes().items() for x in cases)
    assert {(x.seed, x.device) for x in cases} == {(7, "cuda")}


@pytest.mark.parametrize("name", command.QUOTED)
def test_the_command_measures_every_row_that_is_published(name):
    def asks_for(grid, row):
        blocks = f"{row['block_size']}x{row['num_blocks']}"
        halved = grid.get("search") and row["num_tokens"] % 1024 == 0
        implementation = dict(sdpa_cudnn="cudnn").get(row["implementation"], row["implementation"])
        if "computes again" in row.get("variant", ""):
            implementation = "nsa_fsa_recompute"
        ours = ["nsa_fsa"] if grid.get("search") else []
        return (
            (row["num_tokens"] in grid["tokens"] or halved)
            and row["group_size"] in grid["groups"]
            and row["head_dim"] in grid["head_dim"]
            and (blocks in grid["blocks"] or blocks == "0x0")
            and row["selection"] in (*grid["selection"], "full")
            and row["pass"] in grid["passes"]
            and implementation in [*grid["implementations"], *ours]
        )

    grids = suites.load()[name]
    for row in read(name)["rows"]:
        assert any(asks_for(grid, row) for grid in grids), row


# Runs


def test_the_core_beside_full_attention(run):
    document = run("core", small("core"))
    places = {(p, t, g) for p in PASSES for t in (96, 128) for g in (1, 4)}
    assert found(document, "implementation", "pass", "num_tokens", "group_size", "block_size") == {
        *(("nsa_fsa", *x, b) for x in places for b in (32, 64)),
        *(("cudnn", *x, 0) for x in places),  # once for both shapes of blocks
    }
    assert all(max(row["errors"].values()) < 1e-4 for row in document["rows"])
    assert {x["implementation"] for x in document["not_timed"]} == {"flash_attn_4"}


def test_the_parts_of_the_core(run):
    document = run("core_branches", small("core_branches"))
    reads_blocks = {"nsa_fsa", "select_blocks", "selected_attention"}
    assert found(document, "implementation", "pass", "block_size") == {
        (name, p, b)
        for name in ("nsa_fsa", *CORE)
        for p in (PASSES if name != "select_blocks" else PASSES[:1])
        for b in ((32, 64) if name in reads_blocks else (0,))
    }
    assert document["not_timed"] == []


def test_memory_with_and_without_recompute(run):
    document = run("core_memory", small("core_memory"))
    names = [row["implementation"] for row in document["rows"] if row["pass"] == "forward_backward"]
    assert set(names) == {"nsa_fsa", "nsa_fsa_recompute"}


def test_compressed_attention_and_compression(run):
    document = run("compressed", small("compressed"))
    names = {"compressed_attention", "pool_mean", "pool_weighted", "gather"}
    assert found(document, "implementation", "pass") == {(x, p) for x in names for p in PASSES}
    assert found(document, "block_size") == {(0,)}
    assert {x["implementation"] for x in document["not_timed"]} == {"flex_attention"}


def test_the_choice_of_blocks(run):
    document = run("selection", small("selection"))
    assert found(document, "implementation", "pass", "selection", "block_size") == {
        (name, "forward", keys, b)
        for name in ("compressed_attention", "select_blocks")
        for keys in ("window_means", "independent")
        for b in ((32, 64) if name == "select_blocks" else (0,))
    }
    select = [r for r in document["rows"] if r["implementation"] == "select_blocks"]
    assert all(set(row["errors"]) == {"score_lost"} for row in select)


def test_a_patched_layer_and_the_layer_by_itself(run):
    document = run("patched", small("patched", groups=[4]))
    names = found(document, "implementation", "num_tokens", "group_size", "pass")
    assert names == {
        (layer, tokens, 4, name)
        for layer in ("nsa_layer", "patched_layer")
        for tokens in (96, 128)
        for name in PASSES
    }


def test_selected_attention(run):
    names = ["auto", "cudnn", "fsa"]
    grids = small("selected", implementations=names)
    for grid in grids:  # choices were recorded of other sizes
        grid["selection"] = [x for x in grid["selection"] if x != "recorded"]
    document = run("selected", grids, backend="reference")
    assert found(document, "implementation", "selection", "pass") == {
        *(("auto", x, p) for x in ("random", "realistic") for p in PASSES),
        *(("cudnn", "full", p) for p in PASSES),
    }
    assert {x["implementation"] for x in document["not_timed"]} == {"fsa"}


def test_the_crossover(run):
    grids = small("crossover", tokens=[64, 128], implementations=["cudnn"], blocks=["32x4"])
    document = run("crossover", grids)
    entries = {(x["group_size"], x["pass"]): x for x in document["crossovers"]}
    assert set(entries) == {(g, p) for g in (1, 4) for p in ("forward", "forward_backward")}
    assert {tuple(x["ratios"]) for x in entries.values()} == {("64", "128")}


# Ablations


@pytest.mark.parametrize("by", ablations.ABLATIONS, ids=lambda by: by.name)
def test_ablations_compute_the_same(by, seed):
    """By Triton's interpreter, where there is no GPU."""
    config = case(num_heads=2, num_kv_heads=1, block_size=32, num_selected_blocks=4).config
    x = SuiteCase(config, 40, torch.float32, DEVICE, seed, "random")
    for name, run in by.passes(x).items():
        if name != "forward_backward":
            assert max(by.check(x, name, run()).values()) < 1e-4


@pytest.mark.parametrize("name", ["none", "items", "early", "forced", "workspace"])
def test_ablations_change_what_they_say(name, monkeypatch, seed):
    """What the kernels are told, from inside a call."""
    by = IMPLEMENTATIONS[f"ablation_{name}"]
    told = []

    def selected_attention(q, k, v, *tensors, **options):
        told.append((tuning.default_config(q, v, options["block_size"]), options))
        return q

    monkeypatch.setattr("nsa_fsa.ops.selected_attention", selected_attention)
    x = case(kind=SuiteCase, selection="random", seed=seed)
    by.passes(x)["forward"]()
    ((config, options),) = told
    default = tuning.default_config(x["q"], x["v"], 32)  # again as it was
    one_tile = dict(fwd_item_rows=default.fwd_m, bwd_item_rows=default.bwd_m)
    changes = {"items": one_tile, "early": dict(stop_early=False)}.get(name, {})
    assert config == dataclasses.replace(default, **changes)
    assert (config != default) == (name in ("items", "early"))
    assert options["backend"] == "triton_kv_major"
    forced = (0, 0) if name == "forced" else (1, 2)
    assert (options["init_blocks"], options["local_blocks"]) == forced
    assert ("workspace_bytes" in options) == (name == "workspace")


# The command


def told(*arguments, code=2):
    outcome = CliRunner().invoke(command.app, ["run", *arguments], env={"COLUMNS": "300"})
    assert outcome.exit_code == code, outcome.output
    return " ".join(outcome.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["magic"], "'magic' is not known: allowed are core, crossover"),
        (["core", "--tokens=77"], "nothing of core is left"),
        (["core", "--implementation=fsa"], "nothing of core is left"),
        (["core", "--milliseconds=-1"], "Invalid value for '--milliseconds'"),
        (["core", "--seed=-1"], "Invalid value for '--seed'"),
        (["core", f"--output={__file__}"], "Invalid value for '--output'"),
    ],
)
def test_wrong_arguments_are_explained_before_a_gpu_is_looked_for(arguments, said, monkeypatch):
    monkeypatch.setattr(command, "need_a_gpu", lambda: pytest.fail("the arguments were taken"))
    assert said in told(*arguments)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA GPU" in told("core", f"--output={tmp_path}", code=1)
    assert not list(tmp_path.iterdir())


def test_a_suite_is_narrowed():
    only = dict(tokens=[65536, 8192], groups=None, implementations=["cudnn"])
    (grid,) = command.narrowed("core", only)
    assert (grid["tokens"], grid["groups"], grid["implementations"]) == (
        [8192, 65536],
        [1, 4, 16],
        ["cudnn"],
    )
    grids = command.narrowed("core_memory", dict(tokens=[131072]))
    assert [grid["tokens"] for grid in grids] == [[131072]]


def test_a_command_shows_what_it_measured(monkeypatch, tmp_path):
    """The whole command, on a machine that seems to have a GPU: file, table, picture."""
    monkeypatch.setattr(command, "need_a_gpu", lambda: None)
    monkeypatch.setattr(command, "CudaMeter", FakeMeter)
    monkeypatch.setattr(command.floors, "ceilings", lambda meter: RATES)
    monkeypatch.setattr(command.suites, "run", partial(suites.run, device="cpu"))
    monkeypatch.setitem(command.SUITES, "core", small("core", blocks=["32x4"]))
    monkeypatch.setitem(
        IMPLEMENTATIONS,
        "cudnn",
        dataclasses.replace(IMPLEMENTATIONS["cudnn"], function=partial(sdpa, backend="MATH")),
    )
    monkeypatch.setattr(command, "console", console := quiet())
    monkeypatch.setattr(command.pages, "write", lambda: pytest.fail("this is no H200"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # it names the file after the GPU
    told("core", "--commit=abc", "--tokens=96", f"--output={tmp_path}", code=0)
    assert {path.name for path in tmp_path.iterdir()} == {"core_none.json", "core_none.png"}
    document = read("core", "none", tmp_path)
    assert (document["code"]["commit"], document["code"]["commit_stated_by_hand"]) == ("abc", True)
    assert found(document, "num_tokens") == {(96,)}
    assert (document["runs"][0]["ceilings"], document["runs"][0]["seed"]) == (RATES, 0)
    shown = console.file.getvalue()
    assert "nsa_fsa" in shown
    assert "of_floor" in shown
    assert "core_none.png" in shown


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("suite", "rows"), [("core", 3), ("core_branches", 16), ("selection", 6), ("patched", 6)]
)
def test_on_a_gpu(suite, rows, tmp_path):
    options = ["--tokens=8192", "--group=4", "--milliseconds=5", f"--output={tmp_path}"]
    line = [sys.executable, "-m", "benchmarks", "run", suite, *options]
    outcome = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    validate(document)
    ours = [row for row in document["rows"] if row["kind"] != "full"]
    assert len(ours) == rows, document["not_timed"]
