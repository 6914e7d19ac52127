"""The benchmark's meter, which its other tests replace."""

import time

import pytest
import torch

from nsa_fsa.benchmarking.meter import CudaMeter

pytestmark = pytest.mark.gpu


def test_the_host_is_told_apart():
    """A call that takes 2 ms to launch next to nothing, and 0.5 GiB overwritten with and without
    such a delay.
    """
    meter = CudaMeter(milliseconds=5)
    x = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")

    def delayed(function):
        time.sleep(2e-3)
        function()

    small, large = x[:1], meter.time(x.zero_)
    hidden, both = meter.time(lambda: delayed(small.zero_)), meter.time(lambda: delayed(x.zero_))
    assert hidden["ms_20"] <= hidden["ms"] <= hidden["ms_80"] < 0.2
    assert hidden["host_ms"] >= 2
    assert large["host_ms"] < 0.5
    assert both["ms"] == pytest.approx(large["ms"], rel=0.2)


def test_memory_is_the_peak_beyond_what_there_was():
    """Two buffers of half a GiB and one GiB, of which the first is gone before the second comes."""
    meter = CudaMeter(milliseconds=5)
    kept = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def call():
        torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
        return torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    assert meter.memory(call) == {"extra_gib": 1.0}
    del kept
