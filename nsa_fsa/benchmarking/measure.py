"""The meter: how long, how much memory, and what the chip can do at best; and a description of the machine."""

import hashlib
import importlib.metadata
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import nsa_fsa

PACKAGE = Path(nsa_fsa.__file__).resolve().parent
ROOT = PACKAGE.parent
CHECKOUT = (ROOT / "scripts" / "benchmark.py").exists()  # else installed among other packages
RESULTS = ROOT / "docs" / "results" if CHECKOUT else Path("nsa_fsa_results")
GIB = 2**30
QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Timing:
    """Milliseconds: on the GPU the median and the quantiles at 20% and 80%; on the host the median, until the call returns."""

    median: float
    low: float
    high: float
    host: float


@dataclass(frozen=True)
class Memory:
    """Bytes: `extra` at the peak beyond what was there before the call; `workspace` of it gone when the call returns."""

    extra: int
    workspace: int


class Meter(Protocol):
    """What the benchmark asks of a device; tests bring one that needs no GPU."""

    method: dict[str, Any]

    def time(self, function: Callable[[], Any]) -> Timing: ...

    def memory(self, function: Callable[[], Any]) -> Memory: ...

    def ceilings(self) -> dict[str, Any]: ...


class CudaMeter:
    """CUDA events and PyTorch's allocator."""

    FILLER_BYTES = 1 << 30  # many times the L2 cache; about 0.25 ms on an H200
    MOST_FILLS = 16
    LONG_MS = 200.0  # calls whose time the host's does not touch, and that vary little
    LEAST_LONG_RUNS = 3

    def __init__(self, milliseconds: float, least_runs: int = 5) -> None:
        self.milliseconds, self.least_runs = milliseconds, least_runs
        self.method = dict(
            timing="CUDA events; before every run the GPU overwrites the L2 cache, for longer than the host takes to launch the"
            " run; median, 20% and 80% quantiles; seven untimed calls before. host: until the call returns, GPU idle; "
            f"median of five. Calls longer than {self.LONG_MS:.0f} ms: three untimed before, host once, at least "
            f"{self.LEAST_LONG_RUNS} runs",
            milliseconds_per_measurement=milliseconds,
            least_runs=least_runs,
            memory="torch.cuda.max_memory_allocated beyond what was allocated before the call; workspace: what of it is freed "
            "when the call returns",
        )

    def time(self, function: Callable[[], Any]) -> Timing:
        """Without the time on the host: a small kernel's median would otherwise be that of Python and of a busy machine.

        A model has work queued on the GPU when it calls an operator; so does this.
        """
        function()
        torch.cuda.synchronize()
        hosts = []
        for _ in range(5):
            began = time.perf_counter()
            function()
            hosts.append(1e3 * (time.perf_counter() - began))
            torch.cuda.synchronize()
            if 1e3 * (time.perf_counter() - began) > self.LONG_MS:
                break
        host = statistics.median(hosts)
        filler = torch.empty(self.FILLER_BYTES, dtype=torch.uint8, device="cuda")
        fill = statistics.median(self._timed(filler.zero_, 5))
        fills = min(math.ceil(2 * host / fill), self.MOST_FILLS)  # a call that waits for the GPU gains nothing from more

        def fill_caches() -> None:
            for _ in range(fills):
                filler.zero_()

        (length,) = self._timed(function, 1, before=fill_caches)
        runs = max(self.LEAST_LONG_RUNS if length > self.LONG_MS else self.least_runs, int(self.milliseconds / length))
        low, median, high = (
            torch.tensor(self._timed(function, runs, before=fill_caches)).quantile(torch.tensor(QUANTILES)).tolist()
        )
        return Timing(median, low, high, host)

    def _timed(self, function: Callable[[], Any], runs: int, before: Callable[[], None] = lambda: None) -> list[float]:
        """Milliseconds on the GPU of every run."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            before()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def memory(self, function: Callable[[], Any]) -> Memory:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del result
        return Memory(peak - before, peak - after)

    def ceilings(self) -> dict[str, Any]:
        """Bytes a second of a large copy (read plus written), and operations a second of a large bfloat16 product."""
        size, width = 1 << 31, 8192
        return dict(
            copy_bytes_per_s=2e3 * size / self._copy_ms(size),
            copy=f"device to device, {size / 2**30:.0f} GiB read and written",
            matmul_flop_per_s=2e3 * width**3 / self._matmul_ms(width),
            matmul=f"bfloat16, {width} x {width} x {width}, normal random numbers",
        )

    def _copy_ms(self, size: int) -> float:
        source, target = torch.empty(2, size, dtype=torch.uint8, device="cuda")
        return self.time(lambda: target.copy_(source)).median

    def _matmul_ms(self, width: int) -> float:
        a, b = torch.randn(2, width, width, dtype=torch.bfloat16, device="cuda")
        return self.time(lambda: a @ b).median


def _output(*command: str) -> str | None:
    """What a command prints, or None if it cannot run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def source_digest() -> str:
    """Identifies the code that was measured, with or without git: sha256 of the package, of which the benchmark is a part."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def code_version(stated: str | None = None) -> dict[str, Any]:
    """The commit, whether the tree differs from it, and the digest of the sources.

    stated: the commit, where the tree has no git, or git there knows an older one, as in a copy of the files alone; whether
    the tree differs is then unknown, and the digest is what tells. An installed package may lie in someone else's repository.
    """
    ask_git = CHECKOUT and not stated
    commit = stated or (_output("git", "rev-parse", "HEAD") if ask_git else None)
    changes = _output("git", "status", "--porcelain", "--", ".", ":!docs/results") if ask_git else None
    return dict(
        commit=commit or "unknown",
        commit_stated_by_hand=stated is not None,
        dirty=None if changes is None else bool(changes),
        source_digest=source_digest(),
    )


def package_version(name: str) -> str | None:
    if name == "nsa-fsa":  # also where it is run from its source tree, not installed
        return nsa_fsa.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The GPU and what runs on it."""
    gpu = torch.cuda.is_available()
    return dict(
        gpu=torch.cuda.get_device_name() if gpu else "none",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0") if gpu else None,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if gpu else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=package_version("triton"),
        nsa_fsa=package_version("nsa-fsa"),
    )
