"""What tests on a GPU share: how results are compared, what a run takes, and who has the memory."""

import time
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch

from nsa_fsa.benchmarking.meter import record as record

MIB, GIB = 2**20, 2**30
# Row 1 of reliability.md.
RMS_RATIO = {torch.float16: 0.005, torch.bfloat16: 0.005, torch.float32: 1e-5}


def starts(lengths):
    return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device="cuda")


def sequence_of(p, row):
    """First row and row after the last of the sequence that a row belongs to."""
    bounds = [*accumulate(p.lengths, initial=0)]
    b = next(b for b in range(len(p.lengths)) if bounds[b] <= row < bounds[b + 1])
    return bounds[b], bounds[b + 1]


def assert_rms_close(name, found, expected, dtype=torch.bfloat16):
    ratio = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert ratio <= RMS_RATIO[dtype], f"{name}: RMS ratio {ratio:.2e}"


def needs(gib):
    """Skips unless the GPU has that much memory; one worker runs all of these tests,
    since no two of them fit at once.
    """
    total = (
        torch.cuda.get_device_properties("cuda").total_memory if torch.cuda.is_available() else 0
    )
    skips = pytest.mark.skipif(total < gib * GIB, reason=f"needs a GPU with {gib} GiB of memory")
    return lambda test: pytest.mark.xdist_group("memory")(skips(test))


def sampled_rows(lengths, number):
    """First, last and random rows of the sequences."""
    ends = torch.tensor(lengths).cumsum(0)
    rows = {0, 1, *(int(end) - 1 for end in ends), *(int(end) for end in ends[:-1])}
    return sorted(rows | set(torch.randint(int(ends[-1]), (number,)).tolist()))


@contextmanager
def syncs_forbidden():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_no_growth(run, steps=50):
    """Nothing that `steps` runs allocate outlives them."""

    def left_after(steps):
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
        # The thread that ran the last backward may still hold its gradients when the caller
        # already has them.
        time.sleep(0.2)
        return torch.cuda.memory_allocated()

    before = left_after(3)
    assert left_after(steps) == before


def extra(run):
    """What `run` returns, and the most memory that was in use meanwhile beyond what was before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def num_bytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


HEAD_MAJOR = (150_000, 0, 120_000)  # x 64 heads x 128: the offset of the last head is past 2^31


def head_major(x):
    """The same numbers, laid out head by head: `[heads, T, D]` in memory."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(x.requires_grad)
