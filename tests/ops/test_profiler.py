"""The online profiler: what it chooses, when it asks again, and what happens to its file."""

import json
import logging
import multiprocessing
import time

import pytest
import torch

from nsa_fsa.ops import profiler

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and no choice in memory."""
    monkeypatch.setenv("NSA_FSA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NSA_FSA_PROFILE", raising=False)
    monkeypatch.setattr(profiler, "_CHOICES", {})
    return tmp_path


def forget(monkeypatch):
    """What a new process starts with."""
    monkeypatch.setattr(profiler, "_CHOICES", {})


def seconds(run):
    """A real clock, in milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Ways:
    """Candidates that take the milliseconds they are named after, and count how often they run."""

    def __init__(self, **milliseconds):
        self.runs = dict.fromkeys(milliseconds, 0)
        self.candidates = {name: lambda name=name, ms=ms: self.run(name, ms) for name, ms in milliseconds.items()}

    def run(self, name, ms):
        self.runs[name] += 1
        if isinstance(ms, Exception):
            raise ms
        time.sleep(ms / 1e3)

    def choose(self, key="key"):
        return profiler.choose(key, self.candidates, CPU, clock=seconds)


def test_the_fastest_is_chosen_and_remembered(monkeypatch):
    ways = Ways(default=30, slow=60, fast=5)
    assert ways.choose() == "fast"
    assert ways.runs == dict(default=1, slow=1, fast=1)
    assert ways.choose() == "fast"
    forget(monkeypatch)
    assert ways.choose() == "fast"
    assert ways.runs == dict(default=1, slow=1, fast=1), "it was timed again although memory or file knew it"
    assert ways.choose("another key") == "fast"
    assert ways.runs == dict(default=2, slow=2, fast=2)


def test_the_default_stays_unless_another_is_clearly_faster(monkeypatch):
    times = iter([100.0, 98.0])
    found = profiler.choose("key", dict(default=print, other=print), CPU, clock=lambda run: next(times))
    assert found == "default"
    times = iter([100.0, 96.0])
    assert profiler.choose("key 2", dict(default=print, other=print), CPU, clock=lambda run: next(times)) == "other"


@pytest.mark.parametrize("value", ["not json", "[1, 2]", '{"key": {"ms": {}}}', '{"key": 3}', "\x00\xff", ""])
def test_a_file_that_cannot_be_read_is_profiled_anew(value, caplog):
    profiler.cache_file(CPU).write_text(value)
    ways = Ways(default=20, fast=1)
    with caplog.at_level(logging.WARNING):
        assert ways.choose() == "fast"
    assert "cannot be read" in caplog.text
    assert json.loads(profiler.cache_file(CPU).read_text())["key"]["choice"] == "fast"


def test_a_choice_that_is_no_candidate_any_more_is_made_anew():
    Ways(default=20, gone=1).choose()
    assert Ways(default=20, new=1).choose() == "new"


def test_a_candidate_that_cannot_run_is_left_out():
    ways = Ways(default=10, impossible=RuntimeError("out of resource: shared memory"), fast=1)
    assert ways.choose() == "fast"
    assert json.loads(profiler.cache_file(CPU).read_text())["key"]["ms"]["impossible"] is None


def test_an_error_of_the_default_is_the_callers():
    with pytest.raises(RuntimeError, match="bad input"):
        Ways(default=RuntimeError("bad input"), other=1).choose()
    assert not profiler.cache_file(CPU).exists()


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


def keep_many(number):
    for i in range(20):
        profiler.choose(f"{number}-{i}", dict(default=int, other=int), CPU, clock=lambda run: 1.0)


def test_several_processes(monkeypatch):
    """The file is whole at every moment, and a key that was found last is there."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=keep_many, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    path = profiler.cache_file(CPU)
    while any(process.is_alive() for process in processes):
        if path.exists():
            json.loads(path.read_text())
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = json.loads(path.read_text())
    assert len(found) >= 20
    assert not list(path.parent.glob("*.tmp"))


def test_known():
    assert profiler.known("key", CPU) is None
    Ways(default=20, fast=1).choose()
    entry = profiler.known("key", CPU)
    assert entry["choice"] == "fast"
    assert entry["ms"]["default"] >= 20 > entry["ms"]["fast"]


def test_file_names_the_versions():
    name = profiler.cache_file(CPU).name
    assert torch.__version__.split("+")[0] in name
    assert "nsa-fsa" in name or "nsa_fsa" in name
