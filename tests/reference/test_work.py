"""What the reference computes and holds follows what queries see,
not the square of the length nor the size of a block.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nsa_fsa import ops, reference
from nsa_fsa.ops.selected_attention import reference as selected_attention
from tests.cases import by_name, gradients, make_inputs
from tests.reference.test_against_oracle import CLOSE, run_backward, run_oracle, run_reference

MIB = 2**20


@pytest.mark.parametrize("case", [by_name(name) for name in ("t31_stride1", "nine")], ids=str)
def test_going_by_block_does_not_show(case, monkeypatch):
    """As long sequences do, here short ones for the oracle."""
    monkeypatch.setattr(selected_attention, "QUERIES_PER_KEY", 0)
    x = make_inputs(case, torch.float64, requires_grad=True)
    result, expected = (run("selected_attention", case, x) for run in (run_reference, run_oracle))
    do = torch.randn_like(result[0])
    grads = gradients("selected_attention", expected[0], x, do)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for found in (
        gradients("selected_attention", result[0], x, do),
        run_backward("selected_attention", case, x, do, result),
    ):
        for a, b in zip(found, grads, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


class Products(TorchFunctionMode):
    """Counts the multiplications of matrix products."""

    number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            self.number += result.numel() * args[0].shape[-1]
        return result


LENGTH, HEADS, KV_HEADS, WIDTH, BLOCK_SIZE, WINDOW_SIZE = 2048, 4, 2, 16, 32, 128


@pytest.mark.parametrize(
    ("operator", "seen", "sizes"),
    [
        ("selected_attention", 4 * BLOCK_SIZE, dict(block_size=BLOCK_SIZE)),
        ("sliding_window_attention", WINDOW_SIZE, dict(window_size=WINDOW_SIZE)),
    ],
)
def test_work_follows_what_is_seen(operator, seen, sizes):
    """At most twice what the keys that are seen take, at a length where all keys of the past would
    be eight times as many.
    """
    q, do = torch.randn(2, LENGTH, HEADS, WIDTH)
    k, v = torch.randn(2, LENGTH, KV_HEADS, WIDTH)
    blocks_so_far = (torch.arange(LENGTH) // BLOCK_SIZE + 1)[:, None, None]
    indices = (torch.rand(LENGTH, KV_HEADS, 4) * blocks_so_far).int()
    where = (torch.tensor([0, LENGTH], dtype=torch.int32), LENGTH)
    if operator == "selected_attention":
        where = (indices, *where)
    one_product = LENGTH * seen * HEADS * WIDTH
    with Products() as forward:
        o, lse = getattr(reference, operator)(q, k, v, *where, scale=1.0, **sizes)
    with Products() as backward:
        getattr(reference, f"{operator}_backward")(do, q, k, v, o, lse, *where, scale=1.0, **sizes)
    assert 0.5 * 2 * one_product < forward.number <= 2 * 2 * one_product
    assert 0.5 * 5 * one_product < backward.number <= 2 * 5 * one_product


@pytest.mark.parametrize("block_size", [2**31, 2**40])
def test_a_block_larger_than_memory_is_one_that_holds_all(block_size):
    case = by_name("empty_ends")
    x = make_inputs(case)
    windows = dict(scale=case.scale, **case.windows)
    _, lse = run_reference("compressed_attention", case, x)

    def run(block_size):
        scored = dict(**windows, block_size=block_size)
        chosen = dict(scored, num_selected_blocks=2, init_blocks=1, local_blocks=1)
        packed = (x.cu_seqlens, x.max_seqlen)
        indices = reference.select_blocks(x.q, x.k_cmp, lse, *packed, **chosen)
        scores = reference.block_scores(x.q, x.k_cmp, lse, *packed, **scored)
        o, lse_slc = reference.selected_attention(
            x.q, x.k, x.v, indices, *packed, scale=case.scale, block_size=block_size
        )
        return indices, scores, o, lse_slc

    for a, b in zip(run(block_size), run(128), strict=True):
        torch.testing.assert_close(a, b)


def test_a_window_larger_than_memory_is_none():
    """The mean over 2^40 tokens, of which there are 50: no window, forward and backward."""
    x = torch.randn(50, 2, 4, requires_grad=True)
    sizes = dict(kernel_size=2**40, kernel_stride=2**4)
    packed = (torch.tensor([0, 20, 50], dtype=torch.int32), 30)
    pooled = ops.pool_windows(x, None, *packed, **sizes, backend="reference")
    assert pooled.shape == (3, 2, 4)
    assert (torch.autograd.grad(pooled.sum(), x)[0] == 0).all()


ONE_QUERY = """
import resource
import torch
from nsa_fsa import reference

torch.set_num_threads(1)
T = 2**17
q, k_cmp, lse = torch.randn(1, 4, 32), torch.randn(T // 16, 1, 32), torch.full((1, 4), 10.0)
layout = (torch.tensor([0, T]), T)
sizes = dict(kernel_size=32, kernel_stride=16, block_size=64, num_selected_blocks=16)
sizes |= dict(init_blocks=1, local_blocks=2)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
last = dict(scale=1.0, cu_seqlens_q=torch.tensor([0, 1]), seqused_k=torch.tensor([T]))
assert reference.select_blocks(q, k_cmp, lse, *layout, **sizes, **last).shape == (1, 1, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"),
    reason="ru_maxrss counts in other units on other systems",
)
def test_one_query_does_not_hold_windows_times_blocks():
    """Of 8,191 windows and 2,048 blocks, as a decode step at 131,072 tokens has:
    a table of both took 512 MiB.
    """
    result = subprocess.run(
        [sys.executable, "-c", ONE_QUERY], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100, f"{result.stdout} MiB"
