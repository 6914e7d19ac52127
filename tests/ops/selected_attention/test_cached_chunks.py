"""Chunks of several sequences after their pasts, over keys in a cache, as chunked prefill has them.

The reference in float64 is the judge. Rows of the cache that are not in use hold NaN.
"""

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_fsa import ops
from nsa_fsa.ops.common import triton_backends
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks
from nsa_fsa.ops.selected_attention import operator
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.sequences import Sequences
from tests.cases import backends_of, device_of, on_a_gpu_only, widest_dtype
from tests.guards import guarded, guarded_allocations

NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM = 2, 32, 24
# Of every sequence the tokens before the chunk, the chunk's, and the rows of the cache behind them.
# No past; a past that ends with a block, one token before its end and one behind it; no chunk; a
# chunk inside one block; nothing at all; a chunk over several blocks.
CHUNKS = [
    *((0, 20, 3), (32, 5, 0), (31, 2, 17), (33, 1, 1), (40, 0, 9), (3, 4, 0), (0, 0, 6)),
    (9, 50, 2),
]
FORCED = [(0, 0), (1, 2), (1, 0), (0, 1), (2, 1)]


@dataclass(frozen=True)
class Chunk:
    """Tensors in float64 on the CPU, and a layout."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    block_indices: torch.Tensor
    layout: dict
    blocks: dict

    def run(self, backend, **extra):
        """o, lse, dq, dk and dv in the backend's widest dtype, as float64 on the CPU."""
        device, dtype = device_of(backend), widest_dtype(backend)[0]
        tensors = [
            guarded(x.to(device, dtype))[0].requires_grad_() for x in (self.q, self.k, self.v)
        ]
        layout = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in self.layout.items()
        }
        with guarded_allocations():
            o, lse = ops.selected_attention(
                *tensors,
                guarded(self.block_indices.to(device))[0],
                return_lse=True,
                backend=backend,
                **layout,
                **self.blocks,
                **extra,
            )
            do = torch.linspace(-1, 1, o.numel(), dtype=dtype, device=device).view_as(o)
            gradients = torch.autograd.grad(o, tensors, do)
        return [x.detach().cpu().double() for x in (o, lse, *gradients)]


def make_chunk(group_size=1, forced=(1, 1), free=2, chunks=CHUNKS, block_size=16):
    """Every query has its forced blocks, and any others, some of them twice or out of range."""
    generator = torch.Generator().manual_seed(7)
    init_blocks, local_blocks = forced
    capacities = [past + new + rest for past, new, rest in chunks]
    starts = list(accumulate(capacities, initial=0))
    of_sequences = zip(starts, chunks, strict=False)
    used = [start + i for start, (past, new, _) in of_sequences for i in range(past + new)]
    position = torch.tensor([past + i for past, new, _ in chunks for i in range(new)])
    own, total = position[:, None] // block_size, len(position)

    def randn(rows, heads, width):
        return torch.randn(rows, heads, width, generator=generator, dtype=torch.float64)

    def cache(width):
        x = torch.full((starts[-1], NUM_KV_HEADS, width), torch.nan, dtype=torch.float64)
        x[used] = randn(len(used), NUM_KV_HEADS, width)
        return x

    promised = torch.cat(
        [torch.arange(init_blocks).expand(total, -1), own - torch.arange(local_blocks)], dim=1
    )
    others = torch.randint(-1, 6, (total, NUM_KV_HEADS, free), generator=generator)
    indices = torch.cat([promised[:, None].expand(-1, NUM_KV_HEADS, -1), others], dim=2)

    def ints(values):
        return torch.tensor(list(values), dtype=torch.int32)

    layout = dict(
        cu_seqlens=ints(starts),
        max_seqlen=max(capacities),
        cu_seqlens_q=ints(accumulate((new for _, new, _ in chunks), initial=0)),
        seqused_k=ints(past + new for past, new, _ in chunks),
    )
    blocks = dict(block_size=block_size, init_blocks=init_blocks, local_blocks=local_blocks)
    return Chunk(
        randn(total, NUM_KV_HEADS * group_size, HEAD_DIM),
        cache(HEAD_DIM),
        cache(V_HEAD_DIM),
        indices.int(),
        layout,
        blocks,
    )


def check(backend, chunk, **extra):
    """The chunk's output and gradients against the reference's, to ten times the backend's
    rounding, as sums over a query's keys are elsewhere; gradients, whose numbers are of different
    sizes, in units of the largest."""
    rounding = 10 * widest_dtype(backend)[1]
    results = zip(chunk.run(backend, **extra), chunk.run("reference"), strict=True)
    for i, (found, expected) in enumerate(results):
        unit = 1 if i < 2 else expected.abs().max().clamp(min=1)
        torch.testing.assert_close(found / unit, expected / unit, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("forced", FORCED, ids=str)
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_chunks_after_their_pasts(backend, group_size, forced):
    if forced != (1, 2):
        on_a_gpu_only(backend)
    check(backend, make_chunk(group_size, forced))


# As ranges of some queries of one head, and as one head at a time: partial results of a query take
# about 800 bytes with four sparse blocks.
@pytest.mark.parametrize("workspace_bytes", [1, 30_000, 80_000])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_a_small_workspace_does_not_show(backend, workspace_bytes):
    on_a_gpu_only(backend)
    check(backend, make_chunk(forced=(1, 0), free=4), workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("given", ["cu_seqlens_q", "seqused_k"])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_either_descriptor_alone(backend, given):
    """Queries at the end of full sequences; and queries in the rows of the keys, of which those
    behind the ones in use see nothing."""
    on_a_gpu_only(backend)
    if given == "cu_seqlens_q":
        chunk = make_chunk(chunks=[(past, new, 0) for past, new, _ in CHUNKS])
        del chunk.layout["seqused_k"]
    else:
        chunk = make_chunk(chunks=[(0, sum(of_sequence), 0) for of_sequence in CHUNKS])
        unused = torch.cat([torch.arange(sum(x)) >= x[0] + x[1] for x in CHUNKS])
        chunk.k[unused] = chunk.v[unused] = torch.nan
        chunk.layout["seqused_k"] = torch.tensor([x + y for x, y, _ in CHUNKS], dtype=torch.int32)
        del chunk.layout["cu_seqlens_q"]
    check(backend, chunk)


@pytest.mark.parametrize(
    ("few_queries", "order"), [(10, "triton_kv_major"), (11, "triton_query_major")]
)
def test_few_queries_after_a_past_go_query_by_query(monkeypatch, few_queries, order):
    """21 queries of 2 sequences are 10 to each, and a half."""
    if device_of("triton") != "cpu":
        pytest.skip("on a GPU the profiler chooses among the orders that are tried")
    monkeypatch.setattr(operator, "FEW_QUERIES", few_queries)
    chunk = make_chunk(chunks=[(20, 19, 3), (0, 2, 0)])
    for found, expected in zip(chunk.run("triton"), chunk.run(order), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("num_queries", "cached", "by_blocks"),
    [(4 * 256, True, True), (4 * 256 - 1, True, False), (4, False, True)],
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_goes_by_blocks_on_a_gpu(backend, num_queries, cached, by_blocks):
    """Four sequences: of whole ones any number of queries, after a past many."""
    bf16, int32 = torch.bfloat16, torch.int32
    with FakeTensorMode(), triton_backends.assuming((9, 0)):
        q, k, indices, starts, used = (
            torch.empty(shape, dtype=dtype, device="cuda")
            for shape, dtype in (
                ((num_queries, 4, 64), bf16),
                ((4096 if cached else num_queries, 2, 64), bf16),
                ((num_queries, 2, 8), int32),
                (5, int32),
                (4, int32),
            )
        )
        sequences = Sequences(starts, 1024, *((starts, used) if cached else ()))
        shared = (sequences, 0.1, WORKSPACE_BYTES, backend, Blocks(64, 1, 2))
        call = SelectedCall(q, k, k, *shared, indices, None, None)
        assert operator.wants_index(call) == by_blocks
