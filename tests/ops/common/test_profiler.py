"""The online profiler: what it chooses, when it asks again, and what happens to its file."""

import importlib.metadata
import json
import logging
import multiprocessing
import os
import time

import pytest
import torch

from nsa_fsa.ops.common import profiler
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.operator import selected_key
from nsa_fsa.ops.sliding_window_attention.flash_attention import window_key
from nsa_fsa.sequences import Sequences

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and no choice in memory."""
    monkeypatch.setenv("NSA_FSA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NSA_FSA_PROFILE", raising=False)
    monkeypatch.setattr(profiler, "_KNOWN", {})
    monkeypatch.setattr(profiler, "_TOO_LARGE", set())
    return tmp_path


def forget(monkeypatch):
    """What a new process starts with."""
    monkeypatch.setattr(profiler, "_KNOWN", {})


def seconds(run):
    """A real clock, in milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def start(way):
    return way()


class Ways:
    """Candidates that take the milliseconds they are named after, and count how often they run."""

    def __init__(self, **milliseconds):
        self.runs = dict.fromkeys(milliseconds, 0)
        self.candidates = {
            name: lambda name=name, ms=ms: self.run(name, ms) for name, ms in milliseconds.items()
        }

    def run(self, name, ms):
        self.runs[name] += 1
        if isinstance(ms, Exception):
            raise ms
        time.sleep(ms / 1e3)

    def choose(self, key="key"):
        return profiler.choose(key, self.candidates, start, CPU, clock=seconds)


def test_the_fastest_is_chosen_and_remembered(monkeypatch):
    ways = Ways(default=30, slow=60, fast=5)
    assert ways.choose() == "fast"
    assert ways.runs == dict(default=1, slow=1, fast=1)
    assert ways.choose() == "fast"
    forget(monkeypatch)
    assert ways.choose() == "fast"
    assert ways.runs == dict(default=1, slow=1, fast=1), (
        "it was timed again although memory or file knew it"
    )
    assert ways.choose("another key") == "fast"
    assert ways.runs == dict(default=2, slow=2, fast=2)


def test_the_default_stays_unless_another_is_clearly_faster(monkeypatch):
    times = iter([100.0, 98.0])
    found = profiler.choose(
        "key", dict(default=print, other=print), start, CPU, clock=lambda run: next(times)
    )
    assert found == "default"
    times = iter([100.0, 96.0])
    assert (
        profiler.choose(
            "key 2", dict(default=print, other=print), start, CPU, clock=lambda run: next(times)
        )
        == "other"
    )


def kept(key="key"):
    """What the file of a kind of problem says."""
    return json.loads(profiler.cache_file(key, CPU).read_text())


@pytest.mark.parametrize(
    "value",
    [
        "not json",
        "[1, 2]",
        '{"key": "key", "ms": {}}',
        '{"key": "another", "choice": "default"}',
        "\x00\xff",
        "",
        '{"key": "key", "choice": "fast"}',
        '{"key": "key", "choice": "fast", "ms": {}}',
        '{"key": "key", "choice": "fast", "ms": 1}',
    ],
)
def test_a_file_that_cannot_be_read_is_profiled_anew(value, caplog):
    path = profiler.cache_file("key", CPU)
    path.parent.mkdir()
    path.write_text(value)
    ways = Ways(default=20, fast=1)
    with caplog.at_level(logging.WARNING):
        assert ways.choose() == "fast"
    assert "cannot be read" in caplog.text
    assert kept()["choice"] == "fast"


def test_a_choice_that_is_no_candidate_any_more_is_made_anew():
    Ways(default=20, gone=1).choose()
    assert Ways(default=20, new=1).choose() == "new"


def test_a_candidate_that_cannot_run_is_left_out():
    ways = Ways(default=10, impossible=RuntimeError("out of resource: shared memory"), fast=1)
    assert ways.choose() == "fast"
    assert kept()["ms"]["impossible"] is None


def test_an_error_of_the_default_is_the_callers():
    with pytest.raises(RuntimeError, match="bad input"):
        Ways(default=RuntimeError("bad input"), other=1).choose()
    assert not profiler.cache_file("key", CPU).exists()


def test_other_errors_are_not_hidden():
    with pytest.raises(TypeError):
        Ways(default=1, broken=TypeError("a mistake in our code")).choose()


@pytest.mark.parametrize("how", ["environment", "deterministic"])
def test_turned_off(how, monkeypatch):
    """Then the default runs, whatever the file says."""
    ways = Ways(default=20, fast=1)
    ways.choose()
    if how == "environment":
        monkeypatch.setenv("NSA_FSA_PROFILE", "0")
        assert ways.choose() == "default"
        assert profiler.known("key", CPU) is None
    else:
        torch.use_deterministic_algorithms(True)
        try:
            assert ways.choose() == "default"
        finally:
            torch.use_deterministic_algorithms(False)
    assert ways.runs == dict(default=1, fast=1)


def test_a_message_says_what_is_timed_and_how_to_turn_it_off(caplog):
    ways = Ways(default=20, fast=1)
    with caplog.at_level(logging.WARNING):
        ways.choose()
        first = caplog.text
        ways.choose()
    assert "timing 2 ways to run key" in first
    assert "NSA_FSA_PROFILE=0" in first
    assert "fast: " in first
    assert caplog.text == first, "the second time is silent"


def test_a_folder_that_cannot_be_written_does_no_harm(folder, monkeypatch, caplog):
    file = folder / "a file"
    file.write_text("")
    monkeypatch.setenv("NSA_FSA_CACHE_DIR", str(file / "below"))
    forget(monkeypatch)
    ways = Ways(default=20, fast=1)
    assert ways.choose() == "fast"
    assert "cannot be written" in caplog.text
    assert ways.choose() == "fast"
    assert ways.runs == dict(default=1, fast=1)


def test_a_default_that_is_too_large_to_be_timed_runs(monkeypatch, caplog):
    """Timed, it needs more memory than in its place in the call.
    It is not tried again and again, nor kept for others.
    """
    ways = Ways(default=torch.OutOfMemoryError("CUDA out of memory"), other=1)
    assert ways.choose() == "default"
    assert "too little memory" in caplog.text
    assert ways.choose() == "default"
    assert ways.runs["default"] == 1
    assert profiler.known("key", CPU) is None
    assert not profiler.cache_file("key", CPU).exists()
    # Nor is it looked for, once an operator and step.
    monkeypatch.setattr(profiler, "cache_file", None)
    assert ways.choose() == "default"


def test_a_file_system_without_hard_links(monkeypatch, caplog):
    def link(*_):
        raise PermissionError("hard links are not supported")

    monkeypatch.setattr(os, "link", link)
    assert Ways(default=20, fast=1).choose() == "fast"
    assert kept()["choice"] == "fast"
    assert "cannot be written" not in caplog.text


def test_while_a_graph_is_captured_what_is_known_runs(monkeypatch):
    """So that the graph holds the kernels that ran in its warm-up; nothing is timed there."""
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    ways = Ways(default=20, fast=1)
    profiler.choose("key", ways.candidates, start, gpu, clock=seconds)
    capturing = True
    assert profiler.choose("key", ways.candidates, start, gpu, clock=seconds) == "fast"
    forget(monkeypatch)
    assert profiler.choose("key", ways.candidates, start, gpu, clock=seconds) == "fast"
    assert profiler.choose("another", ways.candidates, start, gpu, clock=seconds) == "default"
    assert ways.runs == dict(default=1, fast=1)


def test_where_somebody_waits_what_is_known_runs(monkeypatch):
    ways = Ways(default=20, fast=1)
    with profiler.untimed():
        assert ways.choose() == "default"
    assert ways.runs == dict(default=0, fast=0)
    assert ways.choose() == "fast"
    forget(monkeypatch)
    with profiler.untimed():
        assert ways.choose() == "fast"


def test_what_is_known_is_found_at_once(monkeypatch):
    """Once an operator and step: neither the environment's folders nor the device are
    looked at again.
    """
    ways = Ways(default=20, fast=1)
    ways.choose()
    monkeypatch.setattr(profiler, "cache_file", None)
    assert ways.choose() == "fast"


def in_processes(work, number, *arguments):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(i, *arguments)) for i in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * number


def keep_many(number):
    for i in range(20):
        profiler.choose(
            f"{number}-{i}", dict(default=int, other=int), start, CPU, clock=lambda run: 1.0
        )


def test_what_several_processes_find_is_all_kept(folder):
    in_processes(keep_many, 4)
    assert {kept(f"{number}-{i}")["choice"] for number in range(4) for i in range(20)} == {
        "default"
    }
    assert not list(folder.rglob("*.tmp"))
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.json")} == {0o666 & ~umask}, (
        "for others to read"
    )


def choose_in_rank(rank, store):
    """Each rank would find another one faster."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    candidates = {"first": lambda: 0, "second": lambda: 1}

    def clock(run):
        return 1.0 if run() == rank else 2.0

    chosen = [
        profiler.choose(key, candidates, start, CPU, clock=clock) for key in ("known", "unknown")
    ]
    assert chosen == ["second", "first"]
    torch.distributed.destroy_process_group()


def test_ranks_time_nothing_and_choose_alike(tmp_path):
    """What the folder knows, or the default."""
    candidates = {"first": lambda: 0, "second": lambda: 1}
    clock = [2.0, 1.0].__getitem__
    profiler.choose("known", candidates, start, CPU, clock=lambda run: clock(run()))
    in_processes(choose_in_rank, 2, tmp_path / "store")
    assert not profiler.cache_file("unknown", CPU).exists()


def test_known():
    assert profiler.known("key", CPU) is None
    Ways(default=20, fast=1).choose()
    entry = profiler.known("key", CPU)
    assert entry["choice"] == "fast"
    assert entry["ms"]["default"] >= 20 > entry["ms"]["fast"]


def test_the_folder_names_the_versions():
    name = profiler.cache_file("key", CPU).parent.name
    assert torch.__version__.split("+")[0] in name
    assert "nsa-fsa" in name or "nsa_fsa" in name
    try:
        assert f"triton-{importlib.metadata.version('triton')}" in name
    except importlib.metadata.PackageNotFoundError:
        assert "triton" not in name


def test_what_tells_kinds_of_problems_apart():
    """Everything that other kernels, or other work for them, come with."""

    def of(
        tokens=1000,
        kv_heads=2,
        dtype=torch.float32,
        direction="forward",
        workspace=2**20,
        sequences=8,
        block_size=64,
        window=512,
        cached=None,
    ):
        """The keys of a problem of selected attention, and of one of the sliding window."""
        q = torch.empty(tokens, 8, 64, dtype=dtype)
        k = torch.empty(cached or tokens, kv_heads, 64, dtype=dtype)
        starts = torch.empty(sequences + 1, dtype=torch.int32)
        layout = Sequences(starts, tokens, None if cached is None else starts)
        shared = (q, k, k, layout, 0.1, workspace, "auto")
        chosen = torch.empty(tokens, kv_heads, 16, dtype=torch.int32)
        selected = SelectedCall(*shared, Blocks(block_size, 1, 2), chosen, None, None)
        sliding = WindowedCall(*shared, Windows(1, 1), window)
        return selected_key(selected, direction), window_key(sliding, direction)

    others = [
        of(direction="backward"),
        of(dtype=torch.float16),
        of(tokens=400),
        of(kv_heads=1),
        of(workspace=2**21),
        of(sequences=9),
        of(block_size=32, window=256),
        of(cached=1000),
        of(cached=5000),
    ]
    for keys in zip(of(), *others, strict=True):
        assert len(set(keys)) == 1 + len(others)
    assert of() == of(tokens=700) == of(sequences=6)
    assert of(cached=5000) == of(cached=8000)
