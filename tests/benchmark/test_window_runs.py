"""Whole runs of `compressed` and `selection` on a CPU, with the reference backend and a meter that needs no GPU."""

import dataclasses
import functools
import json
import subprocess
import sys

import pytest

from nsa_fsa.benchmarking import app as benchmark
from nsa_fsa.benchmarking import compressed, pictures, report, results, selection
from nsa_fsa.benchmarking.calls import Implementation
from nsa_fsa.benchmarking.compressed import COMPRESSED
from nsa_fsa.benchmarking.selection import SELECTION
from nsa_fsa.benchmarking.settings import PASSES, WindowSetting, necessary_compression
from tests.benchmark.tools import CPU, SCRIPTS, FakeMeter, open_results, quiet

TINY = WindowSetting(
    96, 1, num_heads=4, head_dim=16, block_size=32, num_blocks=3, selection="window_means", dtype="float32"
)  # fmt: skip
COMPRESSING = ("pool_mean", "pool_weighted", "gather")


def scaled(prepare, factor=2):
    """The right calls, but for the forward's first result."""

    def changed(inputs):
        calls = prepare(inputs)
        right = calls.forward
        calls.forward = lambda: (right()[0] * factor, *right()[1:]) if len(calls.outputs) > 1 else right() * factor
        return calls

    return changed


@pytest.fixture(scope="module")
def attended(tmp_path_factory):
    """Two lengths, two group sizes; ours, a peer that has no lse, one that is wrong, and the three ways to compress."""
    store = open_results(tmp_path_factory.mktemp("compressed"), "compressed")
    settings = [
        dataclasses.replace(TINY, num_tokens=tokens, group_size=group).without_blocks("independent")
        for tokens in (64, 96)
        for group in (1, 4)
    ]
    prepare = functools.partial(compressed.attention, backend="reference")

    def without_lse(inputs):
        calls = prepare(inputs)
        right = calls.forward
        calls.forward, calls.outputs = lambda: right()[0], ("o",)
        return calls

    timed = [
        compressed.attention_implementation("reference"),
        Implementation("flex_attention", "a peer", "peer", without_lse),
        Implementation("wrong", "wrong", "peer", scaled(prepare)),
        *compressed.compression_implementations("reference"),
    ]
    compressed.run(settings, timed, list(PASSES), FakeMeter(), store, 0, CPU, quiet())
    return store


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Two lengths, two group sizes, two shapes of blocks, two kinds of keys."""
    store = open_results(tmp_path_factory.mktemp("selection"), "selection")
    settings = [
        dataclasses.replace(TINY, num_tokens=tokens, group_size=group, block_size=size, num_blocks=number, selection=keys)
        for tokens in (128, 256)
        for keys in ("window_means", "independent")
        for group in (1, 4)
        for size, number in ((32, 4), (64, 3))
    ]
    meter = FakeMeter()
    selection.run(settings, selection.selection_implementations("reference"), meter, store, 0, CPU, quiet())
    assert meter.calls == len(store.document["rows"])  # nothing was measured twice
    return store


def test_compressed_rows(attended):
    document = json.loads(attended.path.read_text())
    results.validate(document)
    assert document == attended.document
    found = {(r["implementation"], r["pass"], r["num_tokens"], r["group_size"]) for r in document["rows"]}
    names = ("compressed_attention", "flex_attention", *COMPRESSING)
    assert found == {(x, p, t, g) for x in names for p in PASSES for t in (64, 96) for g in (1, 4)}
    for row in document["rows"]:
        assert (row["kernel_size"], row["kernel_stride"], row["block_size"]) == (32, 16, 0)
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert max(row["errors"].values()) < 1e-4
        if row["implementation"] in COMPRESSING:
            assert row["tflops"] is None  # no matrix product
            assert (row["kind"], row["backend"]) == ("compression", "reference")
        else:
            assert row["tflops"] == pytest.approx(row["necessary_tflop"] / row["ms"] * 1e3)
    weighted = next(r for r in document["rows"] if (r["implementation"], r["pass"]) == ("pool_weighted", "backward"))
    setting = dataclasses.replace(TINY, num_tokens=64)
    assert weighted["necessary_gb"] * 1e9 == pytest.approx(necessary_compression(setting, weighted=True)["backward"].bytes)


def test_compressed_leaves_out(attended):
    reasons = {(e["implementation"], e.get("pass")): e["reason"] for e in attended.document["not_timed"]}
    assert "refused: o differs" in reasons["wrong", "forward"]
    assert "mask_mod" in reasons["flash_attn_4_strided", None]
    assert {name for name, _ in reasons} == {"wrong", "flash_attn_4_strided"}


def test_selection_rows(chosen):
    document = json.loads(chosen.path.read_text())
    results.validate(document)
    rows = document["rows"]
    assert {r["pass"] for r in rows} == {"forward"}
    select = [r for r in rows if r["implementation"] == "select_blocks"]
    attention = [r for r in rows if r["implementation"] == "compressed_attention"]
    assert len(select) == 16
    assert len(attention) == 8  # once for both shapes of blocks
    assert {(r["block_size"], r["num_blocks"]) for r in select} == {(32, 4), (64, 3)}
    assert {r["block_size"] for r in attention} == {0}
    assert all(set(r["errors"]) == {"score_lost"} and r["tflops"] > 0 for r in select)
    assert document["not_timed"] == []


def test_a_backend_that_is_missing_is_named(tmp_path):
    store = open_results(tmp_path, "selection")
    selection.run([TINY], selection.selection_implementations("magic"), FakeMeter(), store, 0, CPU, quiet())
    assert store.document["rows"] == []
    reasons = {e["implementation"]: e["reason"] for e in store.document["not_timed"]}
    assert reasons == {x: f"{x} has no backend 'magic'" for x in ("compressed_attention", "select_blocks")}


@pytest.mark.parametrize("passes", [["forward"], ["backward"]])
def test_only_the_passes_asked_for(passes, tmp_path):
    store = open_results(tmp_path, "compressed")
    timed = [compressed.attention_implementation("reference"), *compressed.compression_implementations("reference")]
    called = []

    def prepare(inputs):
        calls = compressed.attention(inputs, "reference")
        calls.forward_backward = lambda: called.append("forward_backward")
        return calls

    timed[0] = dataclasses.replace(timed[0], prepare=prepare)
    compressed.run([TINY], timed, passes, FakeMeter(), store, 0, CPU, quiet())
    assert called == []  # not even to check it
    assert {r["pass"] for r in store.document["rows"]} == set(passes)
    assert len(store.document["rows"]) == 4


def test_rows_of_other_windows_stand_beside_each_other(tmp_path):
    store = open_results(tmp_path, "compressed")
    for size in (32, 64, 32):
        store.add_row("a", "ours", "forward", dataclasses.replace(TINY, kernel_size=size), ms=1.0)
    results.validate(store.document)
    assert [r["kernel_size"] for r in store.document["rows"]] == [64, 32]


# What is shown


def printed(table):
    console = quiet()
    console.print(table)
    return console.file.getvalue()


def test_compressed_table(attended):
    (table,) = report.latency_tables(attended.document)
    text = printed(table)
    assert "Compressed attention" in text
    assert "windows of 32 every 16" in text
    for name in ("compressed attention", "flex_attention", "pooling, mean", "pooling, weighted", "gathering windows"):
        assert name in text
    assert "wrong" not in text


def test_selection_table_has_the_ratio(chosen):
    tables = report.selection_tables(chosen.document)
    assert len(tables) == 4  # two shapes, two kinds of keys
    for row in chosen.document["rows"]:
        row["ms"] = 8.0 if row["implementation"] == "select_blocks" else 5.0
    text = printed(report.selection_tables(chosen.document)[0])
    assert "4 blocks of 32" in text
    assert text.count("1.60") == 4  # two lengths, two group sizes


def axes_of(monkeypatch, plot, document, stem, module=pictures):
    """The paths that a plot returns, and for every panel its title and {label or colour: points}."""
    panels = []
    finish = module.finish

    def looked_at(figure, axes, *rest, **options):
        for ax in axes.flat:
            lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}
            panels.append((ax.get_title(), lines))
        return finish(figure, axes, *rest, **options)

    monkeypatch.setattr(module, "finish", looked_at)
    paths = plot(document, stem)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    return [path.name for path in paths], panels


def milliseconds(document, implementation, tokens, group, name="forward", **where):
    return next(
        r["ms"]
        for r in document["rows"]
        if (r["implementation"], r["num_tokens"], r["group_size"], r["pass"]) == (implementation, tokens, group, name)
        and all(r[key] == value for key, value in where.items())
    )


def test_compressed_pictures(attended, monkeypatch, tmp_path):
    document, stem = attended.document, tmp_path / "compressed_gpu"
    names, panels = axes_of(monkeypatch, pictures.plot_latency, document, stem)
    assert names == ["compressed_gpu_independent_d16.png"]
    assert [title for title, _ in panels] == [f"{p}, {t} tokens" for p in ("forward", "backward") for t in (64, 96)]
    assert all(len(lines) == 5 for _, lines in panels)
    names, panels = axes_of(monkeypatch, pictures.plot_compressed_growth, document, stem)
    assert names == ["compressed_gpu_growth_independent_d16.png"]
    panels = dict(panels[-2:])
    assert set(panels) == {"G = 1", "G = 4"}
    expected = [(t, milliseconds(document, "compressed_attention", t, 4, "backward") * 1e3 * 1024 / t) for t in (64, 96)]
    assert panels["G = 4"]["compressed attention, backward"] == expected
    assert len(panels["G = 4"]) == 6  # ours, the peer and the floor, of two passes; compression is not there


def test_selection_pictures(chosen, monkeypatch, tmp_path):
    document, stem = chosen.document, tmp_path / "selection_gpu"
    names, panels = axes_of(monkeypatch, pictures.plot_selection_latency, document, stem)
    assert names == [f"selection_gpu_{keys}_d16.png" for keys in ("independent", "window_means")]
    labels = {"compressed attention", "block selection, 4 blocks of 32", "block selection, 3 blocks of 64"}
    assert all(set(lines) == labels for _, lines in panels)
    panels.clear()
    names, panels = axes_of(monkeypatch, pictures.plot_selection_growth, document, stem)
    assert names == [f"selection_gpu_growth_{keys}_d16.png" for keys in ("independent", "window_means")]
    above, below = panels[:2], panels[2:4]  # of independent keys: times, and ratios
    assert [title for title, _ in above] == ["G = 1", "G = 4"]
    assert set(above[0][1]) == labels
    ratios = [
        (t, milliseconds(document, "select_blocks", t, 4, block_size=64, selection="independent") / base)
        for t in (128, 256)
        for base in [milliseconds(document, "compressed_attention", t, 4, selection="independent")]
    ]
    assert ratios in below[1][1].values()
    assert len(below[1][1]) == 3  # two shapes of blocks, and the line at 1


def test_pictures_of_half_a_run(tmp_path):
    """An interrupted run shows what it has: no compressed attention, a single length, one pass."""
    store = open_results(tmp_path, "selection")
    implementations = selection.selection_implementations("reference")
    selection.run([TINY], implementations[1:], FakeMeter(), store, 0, CPU, quiet())
    benchmark.show(store)
    assert len(list(tmp_path.glob("*.png"))) == 2
    store = open_results(tmp_path, "compressed")
    setting = dataclasses.replace(TINY, num_tokens=64).without_blocks("independent")
    compressed.run(
        [setting], compressed.compression_implementations("reference"), ["forward"], FakeMeter(), store, 0, CPU, quiet()
    )
    benchmark.show(store)
    assert (tmp_path / f"{store.path.stem}_independent_d16.png").exists()
    assert not list(tmp_path.glob("compressed_*growth*"))  # which is of attention
    store = open_results(tmp_path, "compressed")
    attention = [compressed.attention_implementation("reference")]
    compressed.run([setting], attention, ["forward_backward"], FakeMeter(), store, 0, CPU, quiet())
    benchmark.show(store)
    assert len(store.document["rows"]) == 1


# The command line


def asked_for(monkeypatch, tmp_path, *arguments):
    """What a command passes on to its run, on a machine that seems to have a GPU."""
    calls = []
    monkeypatch.setattr(benchmark, "need_a_gpu", lambda: None)
    monkeypatch.setattr(benchmark, "CudaMeter", lambda milliseconds: FakeMeter())
    monkeypatch.setattr(compressed, "run", lambda *given: calls.append(given))
    monkeypatch.setattr(selection, "run", lambda *given: calls.append(given))
    benchmark.app([*arguments, f"--output={tmp_path}"], standalone_mode=False)
    return calls[0]


def test_the_default_settings(monkeypatch, tmp_path):
    settings, timed, passes, *_ = asked_for(monkeypatch, tmp_path, "compressed")
    lengths = (8192, 32768, 65536, 131072, 262144)
    assert [(x.num_tokens, x.group_size) for x in settings] == [(t, g) for t in lengths for g in (1, 4, 16)]
    assert {(x.num_heads, x.head_dim, x.dtype, x.kernel_size, x.kernel_stride) for x in settings} == {
        (64, 128, "bfloat16", 32, 16)
    }
    assert [x.name for x in timed] == list(COMPRESSED)
    assert passes == list(PASSES)
    settings, timed, *_ = asked_for(monkeypatch, tmp_path, "selection")
    assert len(settings) == 5 * 3 * 2 * 2
    assert {(x.block_size, x.num_blocks, x.init_blocks, x.local_blocks) for x in settings} == {(64, 16, 1, 2), (128, 8, 1, 2)}
    assert {x.selection for x in settings} == {"window_means", "independent"}
    assert [x.name for x in timed] == list(SELECTION)


def test_options_reach_the_run(monkeypatch, tmp_path):
    given = "--tokens=1024 --group=2 --heads=8 --head-dim=64 --seed=3"
    settings, timed, passes, _, _, seed, *_ = asked_for(
        monkeypatch, tmp_path, "compressed", *given.split(), "--pass=backward", "--implementation=gather"
    )
    assert settings == [WindowSetting(1024, 2, 8, 64).without_blocks("independent")]
    assert ([x.name for x in timed], passes, seed) == (["gather"], ["backward"], 3)
    settings, timed, _, _, seed, *_ = asked_for(
        monkeypatch, tmp_path, "selection", *given.split(), "--blocks=32x4", "--keys=independent"
    )
    assert settings == [WindowSetting(1024, 2, 8, 64, 32, 4, selection="independent")]
    assert seed == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("command", "rows"), [("compressed", 15), ("selection", 6)])
def test_on_a_gpu(command, rows, tmp_path):
    arguments = ["--tokens=2048", "--group=4", "--milliseconds=5", f"--output={tmp_path}"]
    run = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark.py"), command, *arguments], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    results.validate(document)
    assert len(document["rows"]) == rows, document["not_timed"]
    assert all(0 < row["of_floor"] < 1 for row in document["rows"])
