"""The benchmark's meter, which its other tests replace."""

import time

import pytest
import torch

from nsa_fsa.benchmarking.measure import CudaMeter

pytestmark = pytest.mark.gpu


def test_the_host_is_told_apart():
    """A call that takes 2 ms to launch next to nothing, and 0.5 GiB overwritten with and without such a delay."""
    meter = CudaMeter(milliseconds=5)
    x = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")

    def delayed(function):
        time.sleep(2e-3)
        function()

    small, large = x[:1], meter.time(x.zero_)
    hidden, both = meter.time(lambda: delayed(small.zero_)), meter.time(lambda: delayed(x.zero_))
    assert hidden.low <= hidden.median <= hidden.high < 0.2
    assert hidden.host >= 2
    assert large.host < 0.5
    assert both.median == pytest.approx(large.median, rel=0.2)
