"""The online profiler: times the ways to run an operator once per kind of problem, on the problem itself, and remembers.

This is the FSA paper's appendix E. The fastest candidate is kept in memory and in a JSON file, one per GPU model and set of
versions, so that it is found once per machine. The file is replaced in one step, so several processes may share it; one that
cannot be read is profiled anew. `NSA_FSA_PROFILE=0` turns the profiler off: then the first candidate, a fixed default, runs.
"""

import contextlib
import functools
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import nsa_fsa

logger = logging.getLogger("nsa_fsa")

# What a candidate must gain over the default, which is tried first: below this, timings are noise.
MIN_GAIN = 0.03
REPEATS = 5


def enabled() -> bool:
    """Whether candidates are timed: not if NSA_FSA_PROFILE=0, nor where torch promises the same result in every run."""
    return os.environ.get("NSA_FSA_PROFILE", "1") != "0" and not torch.are_deterministic_algorithms_enabled()


def cache_file(device: torch.device) -> Path:
    """Where the choices for this GPU model and these versions are kept: $NSA_FSA_CACHE_DIR, or the user's cache folder."""
    folder = os.environ.get("NSA_FSA_CACHE_DIR")
    root = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa_fsa"
    return root / file_name(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)


@functools.cache
def file_name(model: str) -> str:
    parts = (model, "nsa_fsa", nsa_fsa.__version__, "torch", torch.__version__)
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)) + ".json"


class Choices:
    """A dictionary of choices, kept in a file as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text())
            return {key: value for key, value in found.items() if isinstance(value["choice"], str)}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): profiling again.", self.path, error)
            return {}

    def keep(self, key: str, choice: str, milliseconds: Mapping[str, float | None]) -> None:
        """Adds a choice; what other processes wrote meanwhile stays."""
        entry = {"choice": choice, "ms": dict(milliseconds), "date": time.strftime("%Y-%m-%d")}
        self.found = self._read() | self.found | {key: entry}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(self.found, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            logger.warning("%s cannot be written (%s): the choice lasts as long as this process.", self.path, error)


_CHOICES: dict[Path, Choices] = {}


def choices_for(device: torch.device) -> Choices:
    path = cache_file(device)
    if path not in _CHOICES:
        _CHOICES[path] = Choices(path)
    return _CHOICES[path]


def time_on_gpu(run: Callable[[], Any]) -> float:
    """Median milliseconds of a few runs after one to warm up."""
    run()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def known(key: str, device: torch.device) -> dict[str, Any] | None:
    """What was measured for problems of this kind: the choice, the milliseconds of every candidate and the date."""
    return choices_for(device).found.get(key) if enabled() else None


def choose(
    key: str,
    candidates: Mapping[str, Callable[[], Any]],
    device: torch.device,
    clock: Callable[[Callable[[], Any]], float] = time_on_gpu,
    recoverable: tuple[type[Exception], ...] = (RuntimeError,),
) -> str:
    """The name of the fastest candidate for problems of this kind; the first one is the default.

    Args:
        key: names the kind of problem.
        candidates: what to run, by name.
        device: the GPU it runs on.
        clock: milliseconds that a candidate takes.
        recoverable: what a candidate that this GPU cannot run may raise.
    """
    default = next(iter(candidates))
    if not enabled() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return default
    choices = choices_for(device)
    if (entry := choices.found.get(key)) is not None and entry["choice"] in candidates:
        return entry["choice"]
    logger.warning(
        "timing %d ways to run %s, once per GPU model (kept in %s; NSA_FSA_PROFILE=0 turns this off) ...",
        len(candidates), key, choices.path,
    )  # fmt: skip
    milliseconds: dict[str, float | None] = {}
    for name, run in candidates.items():
        milliseconds[name] = None
        # A candidate may need more memory than this GPU has; if the default does, that error is the caller's to see.
        with contextlib.nullcontext() if name == default else contextlib.suppress(*recoverable):
            milliseconds[name] = clock(run)
    timed = {name: ms for name, ms in milliseconds.items() if ms is not None}
    best = min(timed, key=timed.__getitem__)
    if timed[best] > (1 - MIN_GAIN) * timed[default]:
        best = default
    choices.keep(key, best, milliseconds)
    logger.warning("... %s: %.2f ms (the default, %s, takes %.2f ms)", best, timed[best], default, timed[default])
    return best
