"""Whole runs of `core` on a CPU, with the reference backend and a meter that needs no GPU: rows, tables, pictures, commands."""

import dataclasses
import functools
import json
import subprocess
import sys

import pytest
import torch
from matplotlib import image
from typer.testing import CliRunner

from nsa_fsa import ops
from nsa_fsa.benchmarking import app as benchmark
from nsa_fsa.benchmarking import core, paper, pictures, pictures_core, report, results
from nsa_fsa.benchmarking.calls import Implementation
from nsa_fsa.benchmarking.core import NSA_FSA, PARTS
from nsa_fsa.benchmarking.implementations import sdpa
from nsa_fsa.benchmarking.settings import PASSES, CoreSetting, necessary_core, necessary_parts
from nsa_fsa.config import BRANCHES
from tests.benchmark.test_window_runs import axes_of, printed
from tests.benchmark.tools import CPU, FakeMeter, open_results, quiet

TINY = CoreSetting(
    96, 1, num_heads=4, head_dim=16, block_size=32, num_blocks=4, selection="independent", dtype="float32", window_size=40
)  # fmt: skip


def wrong(inputs):
    calls = core.core(inputs)
    right = calls.forward
    calls.forward = lambda: right() * 2
    return calls


CUDNN = Implementation("cudnn", "full: cuDNN (SDPA)", "full", functools.partial(sdpa, backend="MATH"))
TIMED = [
    NSA_FSA,
    CUDNN,
    dataclasses.replace(CUDNN, name="flash_attn_4", unsupported=lambda setting: "it is Tuesday"),
    dataclasses.replace(NSA_FSA, name="wrong", prepare=wrong),
]


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Two lengths, two group sizes, two shapes of blocks."""
    store = open_results(tmp_path_factory.mktemp("core"), "core")
    settings = [
        dataclasses.replace(TINY, num_tokens=tokens, group_size=group, block_size=size, num_blocks=number)
        for tokens in (64, 128)
        for size, number in ((32, 4), (64, 3))
        for group in (1, 4)
    ]
    core.run_times(settings, TIMED, list(PASSES), FakeMeter(), store, 0, CPU, quiet())
    return store


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    store = open_results(tmp_path_factory.mktemp("parts"), "core_branches")
    settings = [
        dataclasses.replace(TINY, num_tokens=tokens, group_size=group, block_size=size, num_blocks=number)
        for tokens in (1024, 2048)
        for size, number in ((32, 4), (64, 3))
        for group in (1, 4)
    ]
    meter = FakeMeter()
    core.run_parts(settings, list(PASSES), meter, store, 0, CPU, quiet())
    assert meter.calls == len(store.document["rows"])  # nothing was measured twice
    return store


def find(document, implementation, tokens, group, name="forward", **where):
    (row,) = (
        r
        for r in document["rows"]
        if (r["implementation"], r["num_tokens"], r["group_size"], r["pass"]) == (implementation, tokens, group, name)
        and all(r[key] == value for key, value in where.items())
    )
    return row


# Rows


def test_rows(timed):
    document = json.loads(timed.path.read_text())
    results.validate(document)
    assert document == timed.document
    found = {(r["implementation"], r["pass"], r["num_tokens"], r["group_size"], r["block_size"]) for r in document["rows"]}
    places = [(p, t, g) for p in PASSES for t in (64, 128) for g in (1, 4)]
    assert found == {("nsa_fsa", *x, b) for x in places for b in (32, 64)} | {("cudnn", *x, 0) for x in places}
    row = find(document, "nsa_fsa", 128, 4, "backward", block_size=32)
    assert (row["window_size"], row["kernel_size"], row["kernel_stride"]) == (40, 32, 16)
    assert set(row["errors"]) == {*core.GRADIENTS, "score_lost"}
    assert row["backends"] == dict.fromkeys(PARTS, "reference")
    work = necessary_core(dataclasses.replace(TINY, num_tokens=128, group_size=4))["backward"]
    assert (row["necessary_tflop"], row["necessary_gb"]) == (work.flops / 1e12, work.bytes / 1e9)
    reasons = {e["implementation"]: e["reason"] for e in document["not_timed"]}
    assert set(reasons) == {"wrong", "flash_attn_4"}
    assert "refused: o differs" in reasons["wrong"]
    assert reasons["flash_attn_4"] == "it is Tuesday"


def test_rows_of_parts(parts):
    document = json.loads(parts.path.read_text())
    results.validate(document)
    assert document["not_timed"] == []
    passes = {name: ("forward",) if name == "select_blocks" else PASSES for name in (NSA_FSA.name, *PARTS)}
    knows_blocks = ("nsa_fsa", "select_blocks", "selected_attention")
    found = {(r["implementation"], r["pass"], r["num_tokens"], r["group_size"], r["block_size"]) for r in document["rows"]}
    assert found == {
        (name, p, t, g, b)
        for name in passes
        for p in passes[name]
        for t in (1024, 2048)
        for g in (1, 4)
        for b in ((32, 64) if name in knows_blocks else (0,))
    }
    work = necessary_parts(dataclasses.replace(TINY, num_tokens=2048, group_size=4))
    for name in PARTS:
        row = find(document, name, 2048, 4, **(dict(block_size=32) if name in knows_blocks else {}))
        assert row["floor_ms"] == 1e3 * max(work[name]["forward"].flops / 7e14, work[name]["forward"].bytes / 4e12)
        assert row["of_floor"] == row["floor_ms"] / row["ms"]
        assert (row["kind"], row["backend"]) == ("part", "reference")


# Memory


@pytest.fixture
def recomputed(monkeypatch):
    """What `nsa_attention` was asked to compute again, call by call."""
    asked = []
    right = ops.nsa_attention

    def nsa_attention(*tensors, recompute, **options):
        asked.append(recompute)
        return right(*tensors, **options)

    monkeypatch.setattr(ops, "nsa_attention", nsa_attention)
    return asked


def test_memory(recomputed, tmp_path):
    store = open_results(tmp_path, "core_memory")
    longer = dataclasses.replace(TINY, num_tokens=128)
    core.run_memory([(TINY, ()), (TINY, BRANCHES), (longer, BRANCHES)], FakeMeter(), store, 0, CPU, quiet())
    rows = store.document["rows"]
    again = "computes again: compressed, selected, sliding"
    expected = [(96, "keeps everything"), (96, again), (128, again)]
    assert [(r["num_tokens"], r["variant"], r["pass"]) for r in rows] == [(*x, p) for x in expected for p in PASSES]
    assert set(recomputed) == {(), BRANCHES}
    assert recomputed == sorted(recomputed, key=len)  # one case after the other
    peaks = [r for r in rows if "peak_gib" in r]
    assert [r["pass"] for r in peaks] == ["forward_backward"] * 3
    for row in peaks:
        assert row["peak_gib"] == 3  # of FakeMeter
        assert row["of_full_attention"] == pytest.approx(3 / row["full_attention_gib"])
        assert not row["within_bar"]
    text = printed(report.core_memory_table(store.document))
    assert text.count("missed") == 3
    assert "keeps everything" in text


def test_the_peak_counts_the_inputs(recomputed, tmp_path):
    """Nothing that the measured step needs exists before it."""
    held = []

    class Watching(FakeMeter):
        def memory(self, function):
            result = function()
            held.append(result)
            return super().memory(function)

    core.run_memory([(TINY, BRANCHES)], Watching(), open_results(tmp_path, "core_memory"), 0, CPU, quiet())
    inputs, gradients = held[0]
    assert isinstance(inputs, core.CoreInputs)
    assert [x.shape for x in gradients] == [x.shape for x in inputs.leaves]


def test_what_does_not_fit_is_left_out(monkeypatch, recomputed, tmp_path):
    def make_inputs(setting, *rest):
        if setting.num_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")
        return right(setting, *rest)

    right = core.make_inputs
    monkeypatch.setattr(core, "make_inputs", make_inputs)
    store = open_results(tmp_path, "core_memory")
    cases = [(dataclasses.replace(TINY, num_tokens=128), BRANCHES), (TINY, BRANCHES)]
    core.run_memory(cases, FakeMeter(), store, 0, CPU, quiet())
    (entry,) = store.document["not_timed"]
    assert "Tried to allocate 16 GiB" in entry["reason"]
    assert entry["num_tokens"] == 128
    assert {r["num_tokens"] for r in store.document["rows"]} == {96}


# The paper's table 7


def test_table_7_is_whole():
    places = {(b, g, t) for b in ((64, 16), (128, 8)) for g in (1, 2, 4, 8) for t in (131072, 262144)}
    assert set(paper.TABLE_7) == places
    assert len(paper.TABLE_7) == 16
    assert paper.table_7((64, 16), 1, 131072, "forward") == dict(fsa=0.78, nsa=1.01, full=1.01)
    assert paper.table_7((64, 16), 4, 262144, "forward_backward") == dict(fsa=2.15, nsa=2.70, full=18.76)
    assert paper.table_7((128, 8), 2, 131072, "forward") == dict(fsa=0.38, nsa=0.66, full=0.98)
    assert paper.table_7((128, 8), 8, 262144, "forward_backward") == dict(fsa=1.52, nsa=1.70, full=18.78)
    assert paper.table_7((64, 16), 16, 131072, "forward") is None
    assert paper.table_7((64, 16), 1, 131072, "backward") is None
    # As the paper's text has it: FSA is at most 1.86 and 2.55 times as fast as NSA.
    assert max(row[1] / row[0] for row in paper.TABLE_7.values()) == pytest.approx(1.86, abs=0.02)
    assert max(row[4] / row[3] for row in paper.TABLE_7.values()) == pytest.approx(2.55, abs=0.01)


def test_table_7_beside_ours(monkeypatch, tmp_path):
    # FakeMeter: 1 ms for the first forward, 2 ms for its forward and backward, and so on.
    monkeypatch.setitem(paper.TABLE_7, ((32, 4), 1, 96), (0.002, 0.5, 0.6, 0.001, 0.7, 0.8))
    store = open_results(tmp_path, "core_table7")
    settings = [TINY, dataclasses.replace(TINY, num_tokens=64)]  # the paper has nothing about the second
    core.run_table_7(settings, FakeMeter(), store, 0, CPU, quiet())
    document = json.loads(store.path.read_text())
    results.validate(document)
    assert [(r["num_tokens"], r["pass"], r.get("faster_than_fsa")) for r in document["rows"]] == [
        (96, "forward", True), (96, "forward_backward", False), (64, "forward", None), (64, "forward_backward", None),
    ]  # fmt: skip
    assert document["rows"][0]["paper_s"] == dict(fsa=0.002, nsa=0.5, full=0.6)
    assert "2508.18224" in document["rows"][0]["paper_source"]
    text = printed(report.table_7_table(document))
    assert "faster than FSA in 1 of 2 cells" in text
    assert "yes, 2.0x" in text
    assert "no, 0.5x" in text


# What is shown


def test_tables(timed, parts):
    texts = [printed(table) for table in report.latency_tables(timed.document)]
    assert len(texts) == 2  # two shapes of blocks
    for text in texts:
        assert "The whole core" in text
        assert text.count("full: cuDNN") == 4
        assert text.count("nsa_fsa, whole core") == 4
    text = printed(report.latency_tables(parts.document)[0])
    for implementation in PARTS.values():
        assert text.count(f" {implementation.label} ") == 4


def assert_pictures(paths):
    for path in paths:
        height, width, _ = image.imread(path).shape
        assert min(height, width) > 400


def test_picture_of_latency(timed, monkeypatch, tmp_path):
    names, panels = axes_of(monkeypatch, pictures_core.plot_core, timed.document, tmp_path / "core_gpu", pictures_core)
    assert names == ["core_gpu_32x4_independent_d16.png", "core_gpu_64x3_independent_d16.png"]
    assert [title for title, _ in panels[:6]] == [f"{p}, G = {g}" for p in ("forward", "backward", "speed-up") for g in (1, 4)]
    panels = dict(panels[:6])
    ours = [(t, find(timed.document, "nsa_fsa", t, 4, block_size=32)["ms"]) for t in (64, 128)]
    full = [(t, find(timed.document, "cudnn", t, 4)["ms"]) for t in (64, 128)]
    assert panels["forward, G = 4"] == {"nsa_fsa, whole core": ours, "full: cuDNN (SDPA)": full}
    assert panels["speed-up, G = 4"]["speed-up, forward"] == [
        (t, slow / fast) for (t, slow), (_, fast) in zip(full, ours, strict=True)
    ]
    assert_pictures(tmp_path.glob("*.png"))


def test_the_speedup_is_over_the_fastest():
    def row(implementation, kind, ms):
        return dict(implementation=implementation, kind=kind, ms=ms, num_tokens=64, group_size=1, **{"pass": "forward"})

    rows = [row("cudnn", "full", 8), row("flash_attn_4", "full", 6), row("nsa_fsa", "ours", 2)]
    assert pictures_core.speedups(rows, 1, "forward") == [(64, 3)]
    assert pictures_core.speedups(rows[:2], 1, "forward") == pictures_core.speedups(rows[2:], 1, "forward") == []


def bars_of(monkeypatch, plot, document, stem):
    """The paths that a plot returns, and for every panel its title and its bars: (label, left, bottom, width, height)."""
    panels = []
    finish = pictures_core.finish

    def looked_at(figure, axes, *rest, **options):
        for ax in axes.flat:
            bars = [
                (container.get_label(), *bar.get_bbox().bounds)
                for container in ax.containers
                for bar in container.patches
            ]  # fmt: skip
            panels.append((ax.get_title(), bars))
        return finish(figure, axes, *rest, **options)

    monkeypatch.setattr(pictures_core, "finish", looked_at)
    return [path.name for path in plot(document, stem)], panels


def test_picture_of_parts(parts, monkeypatch, tmp_path):
    names, panels = bars_of(monkeypatch, pictures_core.plot_parts, parts.document, tmp_path / "core_branches_gpu")
    assert names == ["core_branches_gpu_32x4_independent_d16.png", "core_branches_gpu_64x3_independent_d16.png"]
    assert [title for title, _ in panels[:4]] == [f"{p}, {t:,} tokens" for p in ("forward", "backward") for t in (1024, 2048)]
    last = [bar for bar in panels[1][1] if bar[1] > 0.5]  # of G = 4, forward, 2,048 tokens, blocks of 32
    expected = {
        name: find(parts.document, name, 2048, 4, **(dict(block_size=32) if "select" in name else {}))["ms"] for name in PARTS
    }
    assert [
        (name, pytest.approx(ms)) for name, ms in zip((x.label for x in PARTS.values()), expected.values(), strict=True)
    ] == [(bar[0], bar[4]) for bar in last]
    heights = list(expected.values())
    assert [bar[2] for bar in last] == pytest.approx([sum(heights[:i]) for i in range(5)])  # one upon the other
    assert {bar[0] for bar in panels[2][1]} == {x.label for x in PARTS.values()} - {"block selection"}
    assert_pictures(tmp_path.glob("*.png"))


@pytest.mark.parametrize("title", report.TITLES.values())
@pytest.mark.parametrize("width", [7, 9.5, 15])
def test_a_heading_stays_in_its_figure(width, title, tmp_path):
    details = "16 blocks of 64, windows of 32 every 16, independent compressed keys, D=128; 8,192 tokens; numbers: floor / time"
    figure, axes = pictures.pyplot().subplots(1, 1, figsize=(width, 3), dpi=130, squeeze=False, layout="constrained")
    axes[0, 0].plot([1, 2], label="a line")
    pictures.finish(figure, axes, f"{title}, NVIDIA H100 80GB HBM3: {details}", tmp_path / "picture.png")
    lengths = [len(line) for line in figure._suptitle.get_text().splitlines()]
    assert min(lengths) > max(lengths) / 2  # no word stands alone
    heading = figure._suptitle.get_window_extent()
    assert 0 < heading.x0 < heading.x1 < figure.bbox.width
    assert axes[0, 0].get_window_extent().y1 < heading.y0 < heading.y1 <= figure.bbox.height


def test_picture_of_the_floors(parts, monkeypatch, tmp_path):
    names, panels = bars_of(monkeypatch, pictures_core.plot_roofline, parts.document, tmp_path / "core_branches_gpu")
    assert names == [f"core_branches_gpu_roofline_{t}_{b}_independent_d16.png" for b in ("32x4", "64x3") for t in ("1k", "2k")]
    title, bars = panels[0]
    assert title == "forward, G = 1"
    assert len(bars) == 2 * (len(PARTS) + 1)
    document = parts.document
    for place, name in enumerate([*PARTS, "nsa_fsa"][::-1]):
        row = find(document, name, 1024, 1, **(dict(block_size=32) if "select" in name or name == "nsa_fsa" else {}))
        (time, floor) = (bar for bar in bars if abs(bar[2] + bar[4] / 2 - place) < 0.01)
        assert (time[0], time[3]) == ("time", pytest.approx(row["ms"]))
        assert (floor[0], floor[3]) == (f"floor: {pictures_core.bound_of(document, row)} at the measured rate", row["floor_ms"])
    assert_pictures(tmp_path.glob("*.png"))


def test_what_bounds_a_floor():
    document = dict(runs=[dict(ceilings=dict(matmul_flop_per_s=7e14, copy_bytes_per_s=4e12))])
    assert pictures_core.bound_of(document, dict(run=0, necessary_tflop=0.7, necessary_gb=3.9)) == "arithmetic"
    assert pictures_core.bound_of(document, dict(run=0, necessary_tflop=0.7, necessary_gb=4.1)) == "bytes"


@pytest.mark.parametrize("passes", [["forward"], ["forward_backward"]])
def test_half_a_run_is_shown(passes, monkeypatch, tmp_path):
    """Interrupted, or asked for one pass of one setting."""
    monkeypatch.setattr(benchmark, "console", console := quiet())
    for name, run in (
        ("core", lambda *given: core.run_times([TINY], [NSA_FSA], *given)),
        ("core_branches", lambda *given: core.run_parts([TINY], *given)),
    ):
        store = open_results(tmp_path, name)
        run(passes, FakeMeter(), store, 0, CPU, quiet())
        benchmark.show(store)
        assert f"Results: {store.path}" in console.file.getvalue()


def test_every_part_has_a_color():
    assert len(set(pictures_core.PART_COLORS.values())) == len(PARTS) == 5


# The command line


def asked_for(monkeypatch, tmp_path, *arguments):
    """(run, what it is given, the benchmark of its file), on a machine that seems to have a GPU."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # files are named after the GPU
    monkeypatch.setattr(benchmark, "need_a_gpu", lambda: None)
    monkeypatch.setattr(benchmark, "CudaMeter", lambda milliseconds: FakeMeter())
    for name in ("run_times", "run_parts", "run_memory", "run_table_7"):
        monkeypatch.setattr(core, name, lambda *given, name=name: calls.append((name, given)))
    benchmark.app(["core", *arguments, f"--output={tmp_path}"], standalone_mode=False)
    ((name, given),) = calls
    (path,) = tmp_path.glob("*.json")
    path.rename(tmp_path / "done")
    return name, given, path.stem


def test_the_settings_asked_for(monkeypatch, tmp_path):
    def places(settings):
        return [(x.num_tokens, x.block_size, x.num_blocks, x.group_size) for x in settings]

    run, (settings, timed, passes, *_), stem = asked_for(monkeypatch, tmp_path)
    assert (run, stem) == ("run_times", "core_none")
    lengths = (8192, 12288, 32768, 65536, 131072)
    assert places(settings) == [(t, 64, 16, g) for t in lengths for g in (1, 4, 16)]
    assert {(x.num_heads, x.head_dim, x.dtype, x.kernel_size, x.kernel_stride, x.window_size) for x in settings} == {
        (64, 128, "bfloat16", 32, 16, 512)
    }
    assert ([x.name for x in timed], passes) == (["nsa_fsa", "flash_attn_4", "cudnn"], list(PASSES))

    run, (settings, passes, *_), stem = asked_for(monkeypatch, tmp_path, "--branches", "--pass=forward")
    assert (run, stem, passes) == ("run_parts", "core_branches_none", ["forward"])
    assert places(settings) == [(t, 64, 16, g) for t in (8192, 65536) for g in (1, 4, 16)]

    run, (cases, *_), stem = asked_for(monkeypatch, tmp_path, "--memory")
    assert (run, stem) == ("run_memory", "core_memory_none")
    assert [(x.num_tokens, x.num_kv_heads, recompute) for x, recompute in cases] == [
        (131072, 4, ()), (131072, 4, BRANCHES), (1048576, 4, BRANCHES),
    ]  # fmt: skip

    run, (settings, *_), stem = asked_for(monkeypatch, tmp_path, "--table7")
    assert (run, stem) == ("run_table_7", "core_table7_none")
    assert {((b, n), g, t) for t, b, n, g in places(settings)} == set(paper.TABLE_7)

    given = "--tokens=1024 --group=2 --heads=8 --head-dim=64 --blocks=128x8 --implementation=cudnn --seed=3"
    _, (settings, timed, _, _, _, seed, *_), _ = asked_for(monkeypatch, tmp_path, *given.split())
    assert settings == [CoreSetting(1024, 2, 8, 64, 128, 8, selection="independent")]
    assert ([x.name for x in timed], seed) == (["cudnn"], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks=64"], "is not of the form 64x16"),
        (["--implementation=auto"], "'auto' is none of nsa_fsa, flash_attn_4, cudnn"),
        (["--pass=sideways"], "'sideways' is none of forward"),
        (["--branches", "--memory"], "give one"),
        (["--memory", "--table7"], "give one"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    run = CliRunner().invoke(benchmark.app, ["core", *arguments], env={"COLUMNS": "200"})
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["", "--branches", "--memory", "--table7"])
def test_nothing_runs_without_a_gpu(monkeypatch, option, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(benchmark.app, ["core", *option.split(), f"--output={tmp_path}"])
    assert run.exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("option", "benchmarked"), [("", "core"), ("--branches", "core_branches"), ("--memory", "core_memory")]
)
def test_on_a_gpu(option, benchmarked, tmp_path):
    arguments = ["--tokens=2048", "--group=4", "--milliseconds=5", f"--output={tmp_path}", *option.split()]
    command = [sys.executable, "-m", "nsa_fsa.cli", "bench", "core", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    results.validate(document)
    assert path.name.startswith(f"{benchmarked}_")
    passes = {r["pass"] for r in document["rows"] if r["implementation"] == "nsa_fsa"}
    assert passes == set(PASSES), document["not_timed"]
    assert all(0 < row["of_floor"] < 1 for row in document["rows"])
