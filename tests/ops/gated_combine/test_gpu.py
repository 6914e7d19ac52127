"""gated_combine on a GPU: rows 1, 9, 10, 11 and 13 of reliability.md."""

import pytest
import torch

from nsa_fsa import ops
from tests.on_gpu import (
    assert_no_growth,
    assert_rms_close,
    extra,
    needs,
    num_bytes,
    syncs_forbidden,
)

pytestmark = pytest.mark.gpu

RESULTS = ("o", "dgate", "do_cmp", "do_slc", "do_swa")
# Query heads, gates, width of values.
SHAPES = [(64, 64, 128), (64, 1, 128), (7, 7, 80), (3, 1, 96)]


def make(num_tokens, num_heads, num_gates, dim, dtype=torch.bfloat16, seed=0):
    """gate_logits, three branches and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, dtype=dtype, device="cuda", generator=generator)

    leaves = [
        randn(num_tokens, num_gates, 3),
        *(randn(num_tokens, num_heads, dim) for _ in range(3)),
    ]
    return [x.requires_grad_() for x in leaves], randn(num_tokens, num_heads, dim)


def run(leaves, do, backend="triton"):
    o = ops.gated_combine(*leaves, backend=backend)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype):
    leaves, do = make(3001, *shape, dtype=dtype)
    exact = run([x.detach().double().requires_grad_() for x in leaves], do.double(), "reference")
    for name, a, b in zip(RESULTS, run(leaves, do), exact, strict=True):
        assert_rms_close(name, a, b, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_in_100_runs_and_without_a_sync(shape):
    leaves, do = make(1000, *shape)
    expected = run(leaves, do)
    with syncs_forbidden():
        runs = [run(leaves, do) for _ in range(100)]
    for found in runs:
        for name, a, b in zip(RESULTS, found, expected, strict=True):
            assert torch.equal(a, b), name


def test_memory():
    """Nothing beside the results, where every head has its gate; nothing piles up."""
    leaves, do = make(20_000, 16, 16, 128)
    run(leaves, do)  # loads the kernels
    results, used = extra(lambda: run(leaves, do))
    # Which the allocator may leave unused at the end of a large block.
    assert used <= num_bytes(*results) + 2**20
    assert_no_growth(lambda: run(leaves, do))


@needs(48)
def test_offsets_past_2_31():
    """2^31 + 2^20 numbers a branch: the last rows are those of the same rows alone."""
    num_tokens, tail = 2**18 + 128, 100
    leaves, do = make(num_tokens, 64, 64, 128)
    found = run(leaves, do)
    expected = run(
        [x.detach()[-tail:].clone().requires_grad_() for x in leaves], do[-tail:].clone()
    )
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        assert torch.equal(a[-tail:], b), name
