"""Row 13 of reliability.md: nothing piles up, and the workspace keeps to its budget."""

import dataclasses
import time

import pytest
import torch

from nsa_fsa.ops.common.calls import WORKSPACE_BYTES
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from tests.gpu.problems import BACKENDS, RESULTS, assert_rms_close, make_problem
from tests.gpu.test_size import needs

pytestmark = pytest.mark.gpu

MIB = 2**20
LENGTHS = (20_000, 0, 12_768)
BUDGETS = [64 * MIB, 256 * MIB, 1024 * MIB]


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_growth_over_50_steps(backend):
    p = make_problem((1000, 3000), 2, 4)
    assert_no_growth(lambda: p.run(backend))


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


def unaccounted(p):
    """12 bytes a query (where it lies), 8 a query head (statistics), and, below a MiB each,
    some dozen tables.
    """
    return p.q.shape[0] * (12 + 8 * p.q.shape[1]) + 12 * MIB


@pytest.mark.parametrize("workspace_bytes", BUDGETS)
@pytest.mark.parametrize("group_size", [1, 4])
def test_peak_keeps_to_the_budget(group_size, workspace_bytes):
    """Partial results would take 3.5 GiB forward, and more backward, at G = 4."""
    p = make_problem(LENGTHS, 8, group_size)
    p.run("triton_kv_major", workspace_bytes=workspace_bytes)  # loads the kernels
    index, index_peak = extra(lambda: build_block_index(p.index_call()))
    assert index_peak < 512 * MIB + 4 * num_bytes(*index), (
        "the bitmap of block_index has a budget of its own, 512 MiB"
    )
    del index
    (o, lse), peak = extra(lambda: p.forward("triton_kv_major", workspace_bytes=workspace_bytes))
    allowed = workspace_bytes + index_peak + num_bytes(o, lse) + unaccounted(p)
    assert peak <= allowed, f"forward: {peak / MIB:.0f} MiB, allowed are {allowed / MIB:.0f}"
    grads, peak = extra(lambda: torch.autograd.grad(o, (p.q, p.k, p.v), p.do))
    allowed = workspace_bytes + num_bytes(*grads) + unaccounted(p)
    assert peak <= allowed, f"backward: {peak / MIB:.0f} MiB, allowed are {allowed / MIB:.0f}"


# A million tokens of 64 query and 4 key heads, and 100,000 sequences of 16 tokens.
@needs(70)
@pytest.mark.parametrize("workspace_bytes", [256 * MIB, WORKSPACE_BYTES], ids=["small", "default"])
@pytest.mark.parametrize(
    ("lengths", "group_size"), [((2**20,), 16), ((16,) * 100_000, 4)], ids=["million", "short"]
)
def test_peak_keeps_to_the_budget_at_any_size(lengths, group_size, workspace_bytes):
    """What `selected_attention` says is not counted comes on top,
    and 64 MiB for tables and for how memory is cut.
    """
    p = make_problem(lengths, 4, group_size)
    p = dataclasses.replace(p, do=p.q.detach())  # for both to fit
    tokens, num_heads, num_kv_heads = p.q.shape[0], p.q.shape[1], p.k.shape[1]
    blocks = tokens // p.block_size + len(lengths)
    uncounted = tokens * (12 + 8 * num_heads) + blocks * (16 + 36 * num_kv_heads) + 64 * MIB
    table = 2 * p.block_indices.numel()
    before = torch.cuda.memory_allocated()
    (o, _), peak = extra(lambda: p.forward("triton_kv_major", workspace_bytes=workspace_bytes))
    kept = torch.cuda.memory_allocated() - before  # o, the index, and what the backward reads
    allowed = workspace_bytes + kept + table + uncounted
    assert peak <= allowed, f"forward: {peak / MIB:.0f} MiB, allowed are {allowed / MIB:.0f}"
    grads, peak = extra(lambda: torch.autograd.grad(o, (p.q, p.k, p.v), p.do))
    sums = 4 * tokens * (p.k.shape[2] + p.v.shape[2])
    allowed = workspace_bytes + num_bytes(*grads) + max(0, sums - workspace_bytes // 2) + uncounted
    assert peak <= allowed, f"backward: {peak / MIB:.0f} MiB, allowed are {allowed / MIB:.0f}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_size", [1, 3, 4])
def test_budget_does_not_show(backend, group_size):
    """What a query gets is computed alike, bit by bit; what a key gets is summed range by range,
    in another order.
    """
    p = make_problem(LENGTHS, 4, group_size)
    expected = p.run(backend, workspace_bytes=4096 * MIB)
    for budget in BUDGETS:
        for name, a, b in zip(
            RESULTS, p.run(backend, workspace_bytes=budget), expected, strict=True
        ):
            if name in ("dk", "dv"):
                assert_rms_close(f"{name} with {budget / MIB:.0f} MiB", a, b)
            else:
                assert torch.equal(a, b), f"{name} with {budget / MIB:.0f} MiB"
