"""The search for the length from which the core is faster: on made-up ratios, in runs with planted times, as a command."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from nsa_fsa import cli
from nsa_fsa.benchmarking import app as benchmark
from nsa_fsa.benchmarking import crossover, pictures_core, report, results
from nsa_fsa.benchmarking.calls import Calls, Implementation
from nsa_fsa.benchmarking.core import CORE
from nsa_fsa.benchmarking.measure import Timing
from nsa_fsa.benchmarking.running import Prepared, Subject
from nsa_fsa.benchmarking.settings import PASSES, CoreSetting, Necessary
from tests.benchmark.test_window_runs import axes_of, printed
from tests.benchmark.tools import CPU, FakeMeter, open_results, quiet

K = 1024
SETTINGS = [CoreSetting(K, group, num_heads=4, head_dim=8, selection="independent") for group in (1, 4)]
LIMIT = 128 * K
NO_WORK = dict.fromkeys(PASSES, Necessary(1, 1))


# The search itself


@pytest.mark.parametrize(
    ("ratios", "around", "between"),
    [
        ({K: 0.5, 2 * K: 0.9, 4 * K: 1.5, 8 * K: 2.0}, (2 * K, 4 * K), 3 * K),
        ({8 * K: 0.9, 16 * K: 1.5}, (8 * K, 16 * K), 12 * K),
        ({8 * K: 0.9, 9 * K: 1.5, 16 * K: 2.0}, (8 * K, 9 * K), None),  # known to a step
        ({K: 0.5, 2 * K: 1.0}, (2 * K, None), None),  # never: as fast is not faster
        ({K: 1.1, 2 * K: 1.2}, (None, K), None),  # always
        ({K: 0.5, 2 * K: 1.2, 4 * K: 0.9, 8 * K: 1.1}, (4 * K, 8 * K), 6 * K),  # from there on, not once
        ({5 * K: 0.9, 8 * K: 1.1}, (5 * K, 8 * K), 6 * K),  # multiples of 1,024
        ({}, (None, None), None),
    ],
)
def test_where_to_look_next(ratios, around, between):
    assert crossover.bracket(ratios) == around
    assert crossover.middle(ratios) == between


# Whole runs


class Planted(FakeMeter):
    """Takes the milliseconds that a call says."""

    def time(self, function):
        self.calls += 1
        ms = function()
        return Timing(ms, ms, ms, host=0.0)


class Trusting:
    def check(self, **results):
        return {}


class Told(Calls):
    def named(self, name, result):
        return {}


def planted(name, kind, milliseconds):
    """An implementation that takes `milliseconds(setting, pass)`."""

    def prepare(setting):
        return Told(*(lambda p=p: milliseconds(setting, p) for p in PASSES))

    return Implementation(name, f"label of {name}", kind, prepare)


OURS = planted("nsa_fsa", "ours", lambda setting, name: 1.0)


def full(*faster_from):
    """As slow as the core one token before the lengths given (of the first and the second group size), slower from there on."""

    def milliseconds(setting, name):
        start = faster_from[0 if setting.group_size == 1 else -1] + (7 * K if name == "forward" else 0)
        return setting.num_tokens / (start - 1)

    return planted("flash_attn_4", "full", milliseconds)


def search(monkeypatch, folder, against, settings=SETTINGS):
    """The result file of a search, and how often something was timed."""

    def prepare(setting, seed, device):
        full_setting = setting.without_blocks("full")
        return Prepared(
            setting, lambda x: Subject(full_setting if x.kind == "full" else setting, Trusting(), NO_WORK)
        )  # fmt: skip

    monkeypatch.setattr(crossover, "prepare_times", prepare)
    store, meter = open_results(folder, "crossover"), Planted()
    crossover.run(settings, against, meter, store, 0, CPU, quiet(), OURS)
    return store, meter.calls


def found(document):
    return {(x["group_size"], x["pass"]): (x["slower_at"], x["tokens"]) for x in document["crossovers"]}


@pytest.mark.parametrize("planted_at", [(3 * K, 50 * K), (9 * K + 1, 9 * K), (2 * K, 65 * K)])
def test_the_planted_crossover_is_found(monkeypatch, planted_at, tmp_path):
    store, timed = search(monkeypatch, tmp_path, full(*planted_at))
    document = json.loads(store.path.read_text())
    results.validate(document)
    assert document == store.document
    expected = {}
    for group, at in zip((1, 4), planted_at, strict=True):
        for name, later in (("forward", 7 * K), ("forward_backward", 0)):
            tokens = -(-(at + later) // K) * K  # the next multiple
            expected[group, name] = (tokens - K, tokens)
    assert found(document) == expected
    assert timed == len(document["rows"])  # nothing was timed twice
    assert timed <= 2 * 2 * 2 * (len(crossover.LENGTHS) + crossover.MOST_HALVINGS)
    assert {x["against"] for x in document["crossovers"]} == {"flash_attn_4"}
    for entry in document["crossovers"]:
        assert all(int(tokens) % K == 0 for tokens in entry["ratios"])
        start = planted_at[0 if entry["group_size"] == 1 else 1] + (7 * K if entry["pass"] == "forward" else 0)
        assert entry["ratios"] == {t: pytest.approx(int(t) / (start - 1)) for t in entry["ratios"]}


@pytest.mark.parametrize(("planted_at", "expected"), [(1 << 20, (LIMIT, None)), (None, (None, K))])
def test_never_and_always(monkeypatch, planted_at, expected, tmp_path):
    always = planted("flash_attn_4", "full", lambda setting, name: 2.0)
    against = always if planted_at is None else full(planted_at)
    store, timed = search(monkeypatch, tmp_path, against)
    assert set(found(store.document).values()) == {expected}
    assert timed == 2 * 2 * 2 * len(crossover.LENGTHS)  # nothing to halve
    text = printed(report.crossover_table(store.document))
    assert text.count("never, up to 131,072" if expected[0] else "1,024 or fewer") == 4


def test_what_does_not_fit_is_skipped(monkeypatch, tmp_path):
    """The longest lengths, and one that the halving wants."""

    def milliseconds(setting, name):
        if setting.num_tokens in (12 * K, LIMIT // 2, LIMIT):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")
        return setting.num_tokens / (10 * K)

    store, _ = search(monkeypatch, tmp_path, planted("flash_attn_4", "full", milliseconds), SETTINGS[:1])
    assert set(found(store.document).values()) == {(8 * K, 16 * K)}
    left_out = {(e["num_tokens"], e["implementation"]) for e in store.document["not_timed"]}
    assert left_out == {(t, "flash_attn_4") for t in (12 * K, LIMIT // 2, LIMIT)}
    assert all("Tried to allocate 16 GiB" in e["reason"] for e in store.document["not_timed"])


def test_inputs_that_do_not_fit_are_skipped(monkeypatch, tmp_path):
    def prepare(setting, seed, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(crossover, "prepare_times", prepare)
    store = open_results(tmp_path, "crossover")
    crossover.run(SETTINGS[:1], full(K), Planted(), store, 0, CPU, quiet(), OURS)
    assert [e["num_tokens"] for e in store.document["not_timed"]] == list(crossover.LENGTHS)
    monkeypatch.setattr(benchmark, "console", quiet())
    benchmark.show(store)


def test_a_real_search(tmp_path):
    """With the checks, and real calls: the core on the CPU."""
    from nsa_fsa.benchmarking.implementations import sdpa

    against = Implementation("cudnn", "full: cuDNN (SDPA)", "full", lambda inputs: sdpa(inputs, "MATH"))
    setting = CoreSetting(64, 2, 4, 16, 32, 4, selection="independent", dtype="float32")
    store = open_results(tmp_path, "crossover")
    crossover.run([setting], against, FakeMeter(), store, 0, CPU, quiet(), lengths=(64, 128))
    assert store.document["not_timed"] == []
    assert len(store.document["rows"]) == 8
    assert all(row["errors"] for row in store.document["rows"])
    # FakeMeter takes longer every time: the core comes first and is always faster.
    assert set(found(store.document).values()) == {(None, 64)}


def test_comparisons_are_kept_apart(tmp_path):
    """After --merge one file may hold blocks of two shapes and two kinds of full attention."""
    store = open_results(tmp_path, "crossover")
    setting = SETTINGS[0]
    for place, ms in ((setting, 2.0), (dataclasses.replace(setting, block_size=128, num_blocks=8), 4.0)):
        store.add_row("nsa_fsa", "ours", "forward", place, ms=ms)
    for name, ms in (("cudnn", 1.0), ("flash_attn_4", 8.0)):
        store.add_row(name, "full", "forward", setting.without_blocks("full"), ms=ms)
    ratios = {(x["against"], x["block_size"]): x["ratios"] for x in crossover.crossovers(store.document)}
    assert ratios == {
        ("cudnn", 64): {"1024": 0.5}, ("cudnn", 128): {"1024": 0.25},
        ("flash_attn_4", 64): {"1024": 4.0}, ("flash_attn_4", 128): {"1024": 2.0},
    }  # fmt: skip


def test_picture(monkeypatch, tmp_path):
    store, _ = search(monkeypatch, tmp_path, full(3 * K, 50 * K))
    names, panels = axes_of(
        monkeypatch, pictures_core.plot_crossover, store.document, tmp_path / "crossover_gpu", pictures_core
    )
    assert names == ["crossover_gpu_64x16_flash_attn_4_d8.png"]
    panels = dict(panels)
    assert set(panels) == {"forward", "forward + backward"}
    lines = panels["forward + backward"]
    assert {"G = 1", "G = 4"} < set(lines)
    assert lines["G = 1"] == [(t, pytest.approx(t / (3 * K - 1))) for t in (K, 2 * K, 3 * K, *(K << n for n in range(2, 8)))]


# The command


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(benchmark, "console", console := quiet())
    outcome = CliRunner().invoke(cli.app, ["crossover", *arguments, f"--output={tmp_path}"], env={"COLUMNS": "200"})
    return outcome, " ".join((outcome.output + console.file.getvalue()).replace("│", " ").split())


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome, text = run(monkeypatch, tmp_path)
    assert outcome.exit_code == 1
    assert "sees no CUDA GPU" in text
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have one, and whose files are named as if it had none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "need_a_gpu", lambda: None)
    monkeypatch.setattr(benchmark, "CudaMeter", lambda milliseconds: FakeMeter())
    monkeypatch.setattr(torch, "device", lambda name: CPU)


def failing(name, **options):
    def prepare(inputs):
        raise RuntimeError(f"No kernel of {name}\nand more")

    return dataclasses.replace(CORE[name], prepare=prepare, load=lambda: None, **options)


def test_without_full_attention_it_says_so(monkeypatch, gpu, tmp_path):
    for name in ("flash_attn_4", "cudnn"):
        monkeypatch.setitem(CORE, name, failing(name))
    outcome, text = run(monkeypatch, tmp_path, "--heads=4", "--head-dim=16", "--group=2")
    assert outcome.exit_code == 1
    for name in ("flash_attn_4", "cudnn"):
        assert f"{CORE[name].label} cannot run here: RuntimeError: No kernel of {name}" in text
    assert "no full attention here" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("against", "chosen"), [((), "cudnn"), (("--against=flash_attn_4",), None), (("--against=cudnn",), "cudnn")]
)
def test_options_reach_the_search(monkeypatch, gpu, against, chosen, tmp_path):
    calls = []
    monkeypatch.setattr(crossover, "run", lambda *given: calls.append(given))
    monkeypatch.setitem(CORE, "flash_attn_4", failing("flash_attn_4", unsupported=lambda setting: "it is Tuesday"))
    monkeypatch.setitem(CORE, "cudnn", planted("cudnn", "full", lambda setting, name: 1.0))
    options = "--group=2 --group=4 --heads=8 --head-dim=16 --blocks=128x8 --dtype=float16 --seed=3"
    outcome, text = run(monkeypatch, tmp_path, *options.split(), *against)
    assert ("it is Tuesday" in text) == (against != ("--against=cudnn",))
    if chosen is None:
        assert outcome.exit_code == 1
        return
    ((settings, full, _, store, seed, *_),) = calls
    assert settings == [
        CoreSetting(K, g, 8, 16, 128, 8, selection="independent", dtype="float16") for g in (2, 4)
    ]  # fmt: skip
    assert (full.name, seed, store.path.name) == ("cudnn", 3, "crossover_none.json")
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against=magic"], "'magic' is none of flash_attn_4, cudnn"),
        (["--dtype=float64"], "'float64' is none of bfloat16, float16"),
        (["--blocks=64"], "is not of the form 64x16"),
    ],
)
def test_wrong_arguments_are_explained(monkeypatch, arguments, message, tmp_path):
    outcome, text = run(monkeypatch, tmp_path, *arguments)
    assert outcome.exit_code == 2
    assert message in text
