"""Row 13 of reliability.md: memory."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from tests import cases

MIB = 2**20


def resident(device):
    """Bytes of memory in use: of the GPU, or of this process, as PyTorch does not count what it
    allocates on the CPU.
    """
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="reads /proc/self/statm, which this system lacks"
)
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_no_growth_over_50_steps(operator, backend):
    device = cases.device_of(backend)
    case = cases.case_for(operator, backend, cases.by_name("t1000_b128"), calls=55)
    x = cases.make_inputs(case, device=device, requires_grad=True)

    def step():
        o = cases.output(cases.call(operator, case, x, backend))
        results = [o, *cases.gradients(operator, o, x, torch.ones_like(o))]
        return sum(result.numel() * result.element_size() for result in results)

    for _ in range(5):  # caches and allocator arenas fill up
        size = step()
    before = resident(device)
    for _ in range(50):
        step()
    # What a leak of every step's output and gradients would cost, at least 25 MiB for each
    # operator. An allocator that gives memory back late moves by a few MiB, so half of it tells
    # the two apart.
    leak = 50 * size
    assert leak > 25 * MIB
    growth = resident(device) - before
    assert growth < leak / 2, (
        f"{growth / MIB:.1f} MiB more; a leak of all results would be {leak / MIB:.1f}"
    )


LONG = """
import resource
import torch
from nsa_fsa import ops

torch.manual_seed(0)
torch.set_num_threads(1)
T, HQ, HKV, D, s = 16384, 4, 2, 32, 16
shapes = [(T, HQ, D), (T, HKV, D), (T, HKV, D), (T // s, HKV, D), (T // s, HKV, D)]
tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
gates = torch.randn(T, HQ, 3, requires_grad=True)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cu_seqlens = torch.tensor([0, T], dtype=torch.int32)
o = ops.nsa_attention(
    *tensors, gates, cu_seqlens, T, kernel_size=32, kernel_stride=s, block_size=64,
    num_selected_blocks=16, window_size=512, backend="reference",
)
o.sum().backward()
assert all(torch.isfinite(x.grad).all() for x in tensors)
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_reference_at_16384_tokens_stays_under_a_gibibyte():
    """Dense scores alone would be 4 heads x 16384^2 x 4 bytes = 4 GiB;
    the reference works through them in chunks.

    At most about five buffers of 2^24 float32 are alive at a time
    (nsa_fsa/ops/common/reference_chunks.py), 320 MiB, beside the inputs, outputs and gradients, 60
    MiB; PyTorch itself is in `base`.
    """
    result = subprocess.run(
        [sys.executable, "-c", LONG], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    base, peak = (int(kib) * 1024 for kib in result.stdout.split())
    if torch.version.cuda is None:  # the libraries of a CUDA build alone take more than a GiB
        assert peak < 2048 * MIB, f"peak {peak / MIB:.0f} MiB"
    assert peak - base < 1024 * MIB, f"workspace {(peak - base) / MIB:.0f} MiB"
