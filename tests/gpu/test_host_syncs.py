"""Row 11 of reliability.md: nothing waits for the GPU, so a CUDA graph can record everything."""

from contextlib import contextmanager

import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSACache, NSAConfig, ops
from tests.gpu.problems import BACKENDS, RESULTS, make_problem, starts

pytestmark = pytest.mark.gpu

LENGTHS = (1000, 0, 77, 2000)
BUDGETS = [2**22, 2**31]  # ranges of queries in turn, and all at once


@contextmanager
def syncs_forbidden():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def record(run):
    """A CUDA graph of one run, after some on a stream of its own, as PyTorch asks for;
    and what that run returned.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    return graph, recorded


def test_a_sync_is_noticed():
    """Otherwise the next tests would prove nothing."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), syncs_forbidden():
        x.sum().item()


@pytest.mark.parametrize("workspace_bytes", BUDGETS)
@pytest.mark.parametrize(("group_size", "head_dim"), [(1, 128), (4, 128), (3, 80)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(backend, group_size, head_dim, workspace_bytes):
    warm, other = (
        make_problem(lengths, 2, group_size, head_dim=head_dim) for lengths in (LENGTHS, (50, 1400))
    )
    warm.run(backend, workspace_bytes=workspace_bytes)
    with syncs_forbidden():
        warm.run(backend, workspace_bytes=workspace_bytes)
        # other lengths, another number of sequences.
        other.run(backend, workspace_bytes=workspace_bytes)


@torch.no_grad()
def test_a_layer_with_a_cache():
    """Prefill, a chunk, single tokens with growing buffers, and what generation does to a cache."""
    config = NSAConfig(hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=64)
    layer = NativeSparseAttention(config, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 900, 256, device="cuda", dtype=torch.bfloat16)
    index = torch.tensor([1, 1], device="cuda")

    def generate():
        cache = NSACache(config)
        layer(x[:, :500], cache=cache)
        layer(x[:, 500:850], cache=cache)
        cache.crop(20)
        cache.crop(300)
        cache.reorder(index)
        for i in range(850, 900):
            layer(x[:, i : i + 1], cache=cache)

    generate()
    with syncs_forbidden():
        generate()


def test_decoding():
    p = make_problem((300, 500), 2, 4)
    arguments = dict(
        cu_seqlens=p.cu_seqlens, max_seqlen=500, block_size=64, cu_seqlens_q=starts((1, 1)),
        seqused_k=torch.tensor([260, 500], dtype=torch.int32, device="cuda"),
        backend="triton_query_major",
    )  # fmt: skip
    rows = torch.tensor([259, 799], device="cuda")
    q, indices = p.q.detach()[rows], p.block_indices[rows]
    with torch.no_grad():
        expected = ops.selected_attention(q, p.k, p.v, indices, **arguments)
        with syncs_forbidden():
            found = ops.selected_attention(q, p.k, p.v, indices, **arguments)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("workspace_bytes", BUDGETS)
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend, group_size, workspace_bytes):
    """Recorded once; replayed with other values, indices and lengths it gives the same bits as
    running anew.
    """
    p = make_problem(LENGTHS, 2, group_size)

    def step():
        return p.run(backend, workspace_bytes=workspace_bytes)

    p.lengths = (sum(LENGTHS),)  # as an upper bound, which holds for every way to cut the rows
    graph, recorded = record(step)

    for seed, lengths in ((1, LENGTHS), (2, (3000, 77, 0, 0)), (3, (0, 1, 64, 3012))):
        other = make_problem(lengths, 2, group_size, seed=seed)
        with torch.no_grad():
            for name in ("q", "k", "v", "do", "block_indices", "cu_seqlens"):
                getattr(p, name).copy_(getattr(other, name))
        graph.replay()
        replayed = [x.clone() for x in recorded]
        for name, a, b in zip(RESULTS, replayed, step(), strict=True):
            assert torch.equal(a, b), f"{name} of {lengths}"
