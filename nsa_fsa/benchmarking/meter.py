"""The meter: how long a call takes on the GPU and on the host, and how much memory; and calls in a
CUDA graph."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[[], Any]
R = TypeVar("R")


def record(run: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
    """A CUDA graph of one run, after some on a stream of its own, as PyTorch asks for;
    and what that run returned.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    return graph, recorded


class CudaMeter:
    """Keeps the host's time out of the GPU's: a model has work queued on the GPU when it calls an
    operator, so the meter keeps the GPU busy until the call has been launched."""

    FILLER_BYTES = 1 << 30  # many times the L2 cache; H200: overwritten in about 0.25 ms
    MOST_FILLS = 16
    LONG_MS = 200.0  # the host hardly touches the time of longer calls, and they vary little

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.method = dict(
            timing="CUDA events; before every run the GPU overwrites the L2 cache, for longer than "
            "the host takes to launch the run; median, 20% and 80% quantiles of at least 5 runs; 7 "
            "untimed calls before. host: until the call returns, GPU idle; median of 5. Calls "
            f"longer than {self.LONG_MS:.0f} ms: 3 runs, 3 untimed before, host once",
            milliseconds_per_measurement=milliseconds,
            memory="torch.cuda.max_memory_allocated beyond what was allocated before the call",
        )

    def time(self, call: Call) -> dict[str, float]:
        """Milliseconds, as a row of results has them."""
        call()
        torch.cuda.synchronize()
        hosts = []
        for _ in range(5):
            began = time.perf_counter()
            call()
            hosts.append(1e3 * (time.perf_counter() - began))
            torch.cuda.synchronize()
            if 1e3 * (time.perf_counter() - began) > self.LONG_MS:
                break
        host = statistics.median(hosts)
        filler = torch.empty(self.FILLER_BYTES, dtype=torch.uint8, device="cuda")
        fill = statistics.median(self._timed(filler.zero_, 5, 0, filler))
        # A call that itself waits for the GPU gains nothing from more fills.
        fills = min(math.ceil(2 * host / fill), self.MOST_FILLS)
        (length,) = self._timed(call, 1, fills, filler)
        runs = max(3 if length > self.LONG_MS else 5, int(self.milliseconds / length))
        times = torch.tensor(self._timed(call, runs, fills, filler))
        low, median, high = times.quantile(torch.tensor((0.2, 0.5, 0.8))).tolist()
        return dict(ms=median, ms_20=low, ms_80=high, host_ms=host)

    def _timed(self, call: Call, runs: int, fills: int, filler: Tensor) -> list[float]:
        """Milliseconds on the GPU of every run."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, end in events:
            for _ in range(fills):
                filler.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def memory(self, call: Call) -> dict[str, float]:
        """GiB at the peak, beyond what was allocated before the call."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return dict(extra_gib=(torch.cuda.max_memory_allocated() - before) / 2**30)
