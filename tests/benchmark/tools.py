"""What the benchmark's tests share."""

import io
from pathlib import Path

import torch
from rich.console import Console

from nsa_fsa.benchmarking import results
from nsa_fsa.benchmarking.implementations import ours
from nsa_fsa.benchmarking.measure import Memory, Timing
from nsa_fsa.benchmarking.settings import Setting

SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")
# Where Triton's kernels run: interpreted without a GPU, which tests/conftest.py sees to.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = [
    Setting(200, 2, num_heads=4, head_dim=16, block_size=16, num_blocks=5, dtype="float32"),
    Setting(160, 1, num_heads=2, head_dim=8, block_size=32, num_blocks=8, init_blocks=2, local_blocks=1, dtype="float32"),
    Setting(40, 4, num_heads=4, head_dim=8, block_size=64, num_blocks=4, init_blocks=0, local_blocks=1, dtype="float32"),
]
TINY = Setting(96, 2, num_heads=4, head_dim=16, block_size=16, num_blocks=4, dtype="float32")


class FakeMeter:
    """Calls what it is given once, and says that it took one more millisecond every time."""

    def __init__(self):
        self.method = {"timing": "none"}
        self.calls = 0

    def time(self, function):
        function()
        self.calls += 1
        return Timing(float(self.calls), self.calls - 0.5, self.calls + 0.5, host=0.25)

    def memory(self, function):
        function()
        return Memory(3 << 30, 1 << 30)

    def ceilings(self):
        return dict(copy_bytes_per_s=4e12, copy="made up", matmul_flop_per_s=7e14, matmul="made up")


def quiet():
    return Console(file=io.StringIO(), width=200)


def open_results(folder, benchmark="selected", **options):
    return results.Results(folder, benchmark, FakeMeter(), seed=0, peers={}, **options)


def reference_calls(inputs):
    return ours(inputs, "reference")
