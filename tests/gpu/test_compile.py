"""Row 12 of reliability.md with the compiler that users run: the kernels inside a graph that Inductor compiles."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nsa_fsa import ops
from tests.gpu.problems import BACKENDS, RESULTS, make_problem

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_for_every_length(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def layer(q, k, v, block_indices, **arguments):
        # Powers of two: exact, so that whatever Inductor makes of them the bits are the same.
        o, lse = ops.selected_attention(q * 0.5, k, v * 2, block_indices, backend=backend, **arguments)
        return o * 4, lse

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    frames = []
    for lengths in [(300, 0, 77), (500, 20, 64), (1, 3, 1000), (64, 128, 2)]:
        p = make_problem(lengths, 2, 4)
        leaves = (p.q, p.k, p.v)
        results = []
        for function in (compiled, layer):
            o, lse = function(*leaves, p.block_indices, **p.arguments())
            results.append([o, lse, *torch.autograd.grad(o, leaves, p.do)])
        for name, a, b in zip(RESULTS, *results, strict=True):
            assert torch.equal(a, b), f"{name} of {lengths}"
        frames.append(counter.frame_count)
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 3, f"graphs compiled so far, after each length: {frames}"
    assert frames[1] <= 2
