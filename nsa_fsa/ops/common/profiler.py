"""The online profiler: times the ways to run an operator once per kind of problem,
on the problem itself, and remembers.

This is the FSA paper's appendix E. The fastest candidate is kept in memory and in a file of its
own, below a folder per GPU model and set of versions, so that it is found once per machine. Of
several processes that time the same kind at once, the first to finish decides for all that share
the folder. The ranks of a job time nothing, for they would time each other's traffic, too: they
take what the folder knows, for example from `nsa-fsa bench`, or the default. So does whoever
serves (`untimed`), for a request would wait for it. `NSA_FSA_PROFILE=0` turns the profiler off:
then the first candidate, a fixed default, runs.
"""

import contextlib
import contextvars
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch

import nsa_fsa
from nsa_fsa.ops.common import replay
from nsa_fsa.ops.common.calls import AttentionCall
from nsa_fsa.ops.common.sizes import next_power_of_2

logger = logging.getLogger("nsa_fsa")

# What a candidate must gain over the default, which is tried first: below this, timings are noise.
MIN_GAIN = 0.03
REPEATS = 5

T = TypeVar("T")


class Record(TypedDict):
    """What was measured for one kind of problem."""

    key: str
    choice: str
    ms: dict[str, float | None]  # of every candidate; None: it cannot run
    date: str


_KNOWN: dict[tuple[torch.device, str], Record] = {}
_TOO_LARGE: set[tuple[torch.device, str]] = set()  # to be timed, in this process
_UNTIMED = contextvars.ContextVar("_UNTIMED", default=False)


def enabled() -> bool:
    """Whether candidates are timed: not if NSA_FSA_PROFILE=0 or under deterministic algorithms."""
    return (
        os.environ.get("NSA_FSA_PROFILE", "1") != "0"
        and not torch.are_deterministic_algorithms_enabled()
    )


@contextlib.contextmanager
def untimed() -> Iterator[None]:
    """Inside, nothing is timed: what is known already is taken, or the default."""
    token = _UNTIMED.set(True)
    try:
        yield
    finally:
        _UNTIMED.reset(token)


def cache_file(key: str, device: torch.device) -> Path:
    """Where a choice is kept: below $NSA_FSA_CACHE_DIR, or the user's cache folder."""
    root: Path | str = os.environ.get("NSA_FSA_CACHE_DIR", "")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nsa_fsa"
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(root, folder_name(model), f"{name}.json")


@functools.cache
def folder_name(model: str) -> str:
    """The folder name for a GPU model and the versions of what its kernels come from."""
    parts = [model, "nsa_fsa", nsa_fsa.__version__, "torch", torch.__version__]
    for package in ("triton", "flash-attn-4"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts += [package, importlib.metadata.version(package)]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))


def _read(path: Path, key: str) -> Record | None:
    try:
        record = json.loads(path.read_text())
        if record["key"] == key and isinstance(record["ms"].get(record["choice"]), (int, float)):
            return record
        error: Exception = ValueError("it is about something else")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as found:
        error = found
    logger.warning("%s cannot be read (%s): profiling again.", path, error)
    return None


def _publish(path: Path, record: Record, candidates: Mapping[str, Any]) -> Record:
    """Writes a record, unless another process has been first; returns the one that holds."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1))
        try:
            os.link(temporary, path)  # in one step, which fails where there is one
        except FileExistsError:
            first = _read(path, record["key"])
            if first is not None and first["choice"] in candidates:
                return first
            os.replace(temporary, path)
        except OSError:  # a file system without hard links: the last one wins
            os.replace(temporary, path)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): the choice lasts as long as this process.", path, error
        )
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return record


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


def may_time(device: torch.device) -> bool:
    """Whether the present time is one for timing: nobody waits, no graph is captured, and no other
    rank is there to be disturbed, or to choose otherwise."""
    if _UNTIMED.get():
        return False
    distributed = torch.distributed
    in_job = distributed.is_available() and distributed.is_initialized()
    if in_job and distributed.get_world_size() > 1:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def known(key: str, device: torch.device) -> Record | None:
    """What was measured for problems of this kind, if anything."""
    if not enabled():
        return None
    record = _KNOWN.get((device, key))
    if record is None and (record := _read(cache_file(key, device), key)) is not None:
        _KNOWN[device, key] = record
    return record


def problem_key(operator: str, direction: str, call: AttentionCall, own: str) -> str:
    """The kind of problem that is remembered: tokens, sequences and KV heads count in
    powers of two, and so do the keys where they are not the tokens.

    own: what else of the call matters to this operator.
    """
    num_tokens, _, head_dim = call.q.shape
    num_sequences = call.sequences.cu_seqlens.shape[0] - 1
    keys = "" if call.sequences.shares_rows else f" K<={next_power_of_2(call.k.shape[0])}"
    dtype = str(call.q.dtype).removeprefix("torch.")
    if call.q.dtype == torch.float32:
        dtype += "(tf32)" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "(ieee)"
    return (
        f"{operator} {direction} G={call.group_size} HKV<={next_power_of_2(call.k.shape[1])} "
        f"D={head_dim} DV={call.v.shape[2]} {dtype} {own} T<={next_power_of_2(num_tokens)}{keys} "
        f"B<={next_power_of_2(num_sequences)} workspace={call.workspace_bytes}"
    )


def choose(
    key: str,
    candidates: Mapping[str, T],
    run: Callable[[T], Any],
    device: torch.device,
    clock: Callable[[Callable[[], Any]], float] = time_on_gpu,
    recoverable: tuple[type[Exception], ...] = (RuntimeError,),
) -> str:
    """The name of the fastest candidate for problems of this kind; the first one is the default.

    Args:
        key: names the kind of problem.
        candidates: the ways to run it, by name.
        run: runs one of them.
        device: the GPU it runs on.
        clock: milliseconds that a candidate takes.
        recoverable: what a candidate that this GPU cannot run may raise.
    """
    default = next(iter(candidates))
    if (device, key) in _TOO_LARGE:
        return default
    if (record := known(key, device)) is not None and record["choice"] in candidates:
        return record["choice"]
    if not enabled() or not may_time(device):
        return default

    replay.refuse("candidates are timed")
    path = cache_file(key, device)
    logger.warning(
        "timing %d ways to run %s, once per GPU model "
        "(kept in %s; NSA_FSA_PROFILE=0 turns this off) ...",
        *(len(candidates), key, path.parent),
    )
    milliseconds: dict[str, float | None] = {}
    for name, candidate in candidates.items():
        milliseconds[name] = None
        # A candidate may need more memory than this GPU has. The default, timed, may too, although
        # it then runs: beside what is timed there are gradients that the call itself adds to. Any
        # other error of the default is the caller's to see.
        with contextlib.suppress(torch.OutOfMemoryError, *(() if name == default else recoverable)):
            milliseconds[name] = clock(functools.partial(run, candidate))

    default_ms = milliseconds[default]
    if default_ms is None:
        _TOO_LARGE.add((device, key))
        logger.warning("... %s, as there is too little memory left to time it", default)
        return default

    best_ms, best = min((ms, name) for name, ms in milliseconds.items() if ms is not None)
    choice = best if best_ms <= (1 - MIN_GAIN) * default_ms else default
    record = Record(key=key, choice=choice, ms=milliseconds, date=time.strftime("%Y-%m-%d"))
    record = _KNOWN[device, key] = _publish(path, record, candidates)
    choice = record["choice"]
    found = (choice, record["ms"][choice], default, default_ms)
    logger.warning("... %s: %.2f ms (the default, %s, takes %.2f ms)", *found)
    return choice
