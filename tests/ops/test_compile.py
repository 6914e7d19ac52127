"""Row 12 of reliability.md with the compiler that users run: the kernels inside a graph that
Inductor compiles.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nsa_fsa import ops
from tests.cases import RESULTS
from tests.ops.compressed_attention.test_gpu import make as make_compressed
from tests.ops.selected_attention.problems import BACKENDS, make_problem

pytestmark = pytest.mark.gpu

LENGTHS = [(300, 0, 77), (500, 20, 64), (1, 3, 1000), (64, 128, 2)]


def check_frames(frames):
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 3, f"graphs compiled so far, after each length: {frames}"
    assert frames[1] <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_for_every_length(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def layer(q, k, v, block_indices, **arguments):
        # Powers of two: exact, so that whatever Inductor makes of them the bits are the same.
        o, lse = ops.selected_attention(
            q * 0.5, k, v * 2, block_indices, backend=backend, **arguments
        )
        return o * 4, lse

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    frames = []
    for lengths in LENGTHS:
        p = make_problem(lengths, 2, 4)
        leaves = (p.q, p.k, p.v)
        results = []
        for function in (compiled, layer):
            o, lse = function(*leaves, p.block_indices, **p.arguments())
            results.append([o, lse, *torch.autograd.grad(o, leaves, p.do)])
        for name, a, b in zip(RESULTS, *results, strict=True):
            assert torch.equal(a, b), f"{name} of {lengths}"
        frames.append(counter.frame_count)
    check_frames(frames)


@pytest.mark.parametrize("shape", [(4, 128, 128), (3, 96, 80)], ids=str)
def test_the_compressed_branch_is_one_graph_for_every_length(shape):
    """Pooling, compressed attention and selection. common/test_registration.py has each alone,
    and gather_windows, with heads so narrow that no kernel written for Hopper runs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    sizes = dict(kernel_size=32, kernel_stride=16, backend="triton")

    def layer(q, k, v, weight, cu_seqlens, max_seqlen):
        k_cmp = ops.pool_windows(k, weight, cu_seqlens, max_seqlen, **sizes)
        v_cmp = ops.pool_windows(v, None, cu_seqlens, max_seqlen, **sizes)
        packed = (cu_seqlens, max_seqlen)
        o, lse = ops.compressed_attention(
            q * 0.5, k_cmp, v_cmp * 2, *packed, return_lse=True, **sizes
        )
        indices = ops.select_blocks(
            q * 0.5, k_cmp, lse, *packed, block_size=64, num_selected_blocks=6, **sizes
        )
        return o * 4, lse, indices

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    frames = []
    for lengths in LENGTHS:
        # Of windows of one token each, for their keys and values to be those of tokens.
        p = make_compressed(lengths, 2, *shape, windows=(1, 1))
        weight = torch.rand(2, 32, device="cuda", requires_grad=True)
        results = []
        for function in (compiled, layer):
            o, lse, indices = function(*p.leaves(), weight, p.cu_seqlens, max(lengths))
            results.append([o, lse, indices, *torch.autograd.grad(o, (*p.leaves(), weight), p.do)])
        for name, a, b in zip(
            ("o", "lse", "block_indices", "dq", "dk", "dv", "dweight"), *results, strict=True
        ):
            assert torch.equal(a, b), f"{name} of {lengths}"
        frames.append(counter.frame_count)
    check_frames(frames)
