"""What the tests of the benchmarks share: a meter that needs no GPU, and small cases."""

import dataclasses
import io

import torch
from rich.console import Console

from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.runs import Bench
from nsa_fsa.config import NSAConfig

RATES = dict(copy_bytes_per_s=4e12, copy="made up", matmul_flop_per_s=7e14, matmul="made up")


class FakeMeter:
    """Calls what it is given once, and says that it took one more millisecond every time."""

    def __init__(self, milliseconds=0.0):
        self.method, self.calls = dict(timing="none"), 0

    def time(self, call):
        call()
        self.calls += 1
        return dict(ms=self.calls, ms_20=self.calls - 0.5, ms_80=self.calls + 0.5, host_ms=0.25)

    def memory(self, call):
        call()
        return dict(extra_gib=3.0)


def quiet():
    return Console(file=io.StringIO(), width=200)


def bench_in(folder, name="bench", meter=None):
    meter = meter or FakeMeter()
    return Bench(meter, Results(folder, name, meter.method), quiet())


def config(**changes):
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=16, block_size=32, num_selected_blocks=5)
    sizes |= dict(window_size=40) | changes
    return NSAConfig(hidden_size=sizes["num_heads"] * sizes["head_dim"], **sizes)


def case(num_tokens=300, dtype=torch.float32, seed=0, kind=Case, selection="independent", **sizes):
    """On the CPU; sizes: of the config."""
    return kind(config(**sizes), num_tokens, dtype, "cpu", seed, selection)


# Those that the pages quote.
PAGES = dict(
    num_heads=64,
    head_dim=128,
    block_size=64,
    num_blocks=16,
    kernel_size=32,
    kernel_stride=16,
    window_size=512,
    dtype="bfloat16",
)
# Sizes that differ in every way: groups, blocks, windows, forced blocks, a ragged end.
SIZES = [
    dict(),
    dict(num_tokens=320, num_heads=2, block_size=64, window_size=512),
    dict(
        num_tokens=130,
        num_kv_heads=1,
        kernel_size=16,
        kernel_stride=8,
        init_blocks=2,
        local_blocks=1,
    ),
]


def results_of(passes):
    """Outputs and gradients."""
    return passes["forward"]() | (passes["forward_backward"]() if len(passes) > 1 else {})


def spoiled(x, fault):
    """A wrong result: scaled by 2%, with one number that is none, or with a head of another."""
    x = x.detach().clone()
    if fault == "scaled":
        x *= 1.02
    elif fault == "nan":
        x[-1] = torch.nan
    elif fault == "one head swapped":
        x[:, 0] = x[:, -1]
    return x


FAULTS = ("scaled", "nan", "one head swapped")


def changed(implementation, **fields):
    """Another implementation that is held to the same."""
    return dataclasses.replace(implementation, **fields)
