"""Problems too large for tests/cases.py, made on the GPU, and in float64 what some of their queries
and keys should get.
"""

import dataclasses
from dataclasses import dataclass

import torch

from nsa_fsa import ops
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks
from nsa_fsa.ops.selected_attention.call import IndexCall
from nsa_fsa.sequences import Sequences
from tests.on_gpu import assert_rms_close, sequence_of, starts

BACKENDS = ("triton_kv_major", "triton_query_major")


@dataclass
class Problem:
    """Selected attention on packed sequences. What block_indices promise, they hold."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    block_indices: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    block_size: int
    init_blocks: int
    local_blocks: int

    def arguments(self):
        return dict(
            cu_seqlens=self.cu_seqlens,
            max_seqlen=max(self.lengths),
            block_size=self.block_size,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
            return_lse=True,
        )

    def index_call(self):
        """What makes its block index."""
        sequences = Sequences(self.cu_seqlens, max(self.lengths))
        blocks = Blocks(self.block_size, self.init_blocks, self.local_blocks)
        num_keys = self.k.shape[0]
        return IndexCall(self.block_indices, None, sequences, num_keys, blocks, WORKSPACE_BYTES)

    def forward(self, backend, **extra):
        """o and lse."""
        return ops.selected_attention(
            self.q, self.k, self.v, self.block_indices, **self.arguments(), backend=backend, **extra
        )

    def run(self, backend, **extra):
        """RESULTS."""
        o, lse = self.forward(backend, **extra)
        return [o.detach(), lse, *torch.autograd.grad(o, (self.q, self.k, self.v), self.do)]

    def alone(self, b):
        """Sequence b by itself."""
        start = sum(self.lengths[:b])
        rows = slice(start, start + self.lengths[b])
        parts = {
            name: getattr(self, name).detach()[rows].clone()
            for name in ("q", "k", "v", "do", "block_indices")
        }
        for name in ("q", "k", "v"):
            parts[name].requires_grad_()
        return dataclasses.replace(
            self,
            **parts,
            lengths=self.lengths[b : b + 1],
            cu_seqlens=starts(self.lengths[b : b + 1]),
        )


def random_selection(
    lengths, num_kv_heads, block_size, num_indices, init_blocks, local_blocks, generator
):
    """The forced blocks, then any others up to the query's own, some of them twice:
    int32 `[T, HKV, num_indices]`.
    """
    own = (
        torch.cat([torch.arange(n, device="cuda") for n in lengths])[:, None] // block_size
    )  # [T, 1]
    shape = (sum(lengths), num_kv_heads, num_indices)
    indices = torch.rand(shape, device="cuda", generator=generator).mul_(own[..., None] + 1).int()
    forced = init_blocks + local_blocks
    indices[..., :init_blocks] = torch.arange(init_blocks, device="cuda")
    indices[..., init_blocks:forced] = (own - torch.arange(local_blocks, device="cuda"))[:, None]
    return indices


def alike_selection(
    lengths, num_kv_heads, block_size, num_indices, init_blocks, local_blocks, generator, run=48
):
    """Ascending choices, of which so many neighbours share their free blocks."""
    rows = []
    for length in lengths:
        t = torch.arange(length, device="cuda")
        own, block = t[:, None, None] // block_size, torch.arange(length // block_size + 1).cuda()
        shape = (length // run + 1, num_kv_heads, len(block))
        scores = torch.rand(shape, device="cuda", generator=generator)[t // run]
        forced = (block < init_blocks) | (block > own - local_blocks)
        scores = scores.masked_fill(forced, 2).masked_fill(block > own, -1)
        best, chosen = scores.topk(min(num_indices, len(block)))
        chosen = chosen.masked_fill(best < 0, 1 << 30).sort().values
        chosen = torch.nn.functional.pad(chosen, (0, num_indices - chosen.shape[2]), value=1 << 30)
        rows.append(chosen.masked_fill(chosen == 1 << 30, -1).int())
    return torch.cat(rows)


def make_problem(
    lengths,
    num_kv_heads,
    group_size,
    *,
    head_dim=128,
    dtype=torch.bfloat16,
    block_size=64,
    num_indices=16,
    init_blocks=1,
    local_blocks=2,
    seed=0,
):
    generator = torch.Generator("cuda").manual_seed(seed)
    total = sum(lengths)

    def randn(heads):
        return torch.randn(total, heads, head_dim, dtype=dtype, device="cuda", generator=generator)

    q, k, v = (
        randn(heads).requires_grad_()
        for heads in (num_kv_heads * group_size, num_kv_heads, num_kv_heads)
    )
    blocks = (block_size, num_indices, init_blocks, local_blocks)
    block_indices = random_selection(lengths, num_kv_heads, *blocks, generator)
    return Problem(
        q,
        k,
        v,
        randn(num_kv_heads * group_size),
        block_indices,
        tuple(lengths),
        starts(lengths),
        block_size,
        init_blocks,
        local_blocks,
    )


@torch.no_grad()
def expected_of_query(p, row):
    """o `[HQ, DV]`, lse `[HQ]` and dq `[HQ, D]` of one query, in float64."""
    start, _ = sequence_of(p, row)
    t, num_kv_heads, scale = row - start, p.k.shape[1], p.q.shape[2] ** -0.5
    index = p.block_indices[row].long()  # [HKV, T_sel]
    repeated = (index[:, :, None] == index[:, None, :]).tril(-1).any(-1)
    counts = (index >= 0) & (index <= t // p.block_size) & ~repeated
    position = index[..., None] * p.block_size + torch.arange(p.block_size, device="cuda")
    seen = (counts[..., None] & (position <= t)).flatten(1)  # [HKV, N]
    at = start + position.clamp(0, t).flatten(1)
    head = torch.arange(num_kv_heads, device="cuda")[:, None]
    k, v = p.k[at, head].double(), p.v[at, head].double()  # [HKV, N, D]
    q, do = (x[row].double().unflatten(0, (num_kv_heads, -1)) for x in (p.q, p.do))  # [HKV, G, D]
    s = (q @ k.mT * scale).masked_fill(~seen[:, None], -torch.inf)
    weights = s.softmax(-1)
    dp = do @ v.mT
    ds = weights * (dp - (weights * dp).sum(-1, keepdim=True))
    return (weights @ v).flatten(0, 1), s.logsumexp(-1).flatten(), (ds @ k * scale).flatten(0, 1)


@torch.no_grad()
def expected_of_key(p, row, head, o, lse):
    """dk `[D]` and dv `[DV]` of one key of one KV head, in float64,
    from the o and lse of the queries that see it.
    """
    start, stop = sequence_of(p, row)
    position, group_size, scale = row - start, p.q.shape[1] // p.k.shape[1], p.q.shape[2] ** -0.5
    chosen = (p.block_indices[row:stop, head] == position // p.block_size).any(-1)
    queries = row + chosen.nonzero().flatten()
    heads = slice(head * group_size, (head + 1) * group_size)
    q, do, o, lse = (
        x[:, heads].index_select(0, queries).double() for x in (p.q, p.do, o, lse)
    )  # [M, G, D]
    weights = (q @ p.k[row, head].double() * scale - lse).exp()  # [M, G]
    ds = weights * (do @ p.v[row, head].double() - (do * o).sum(-1))
    return torch.einsum("mg,mgd->d", ds, q) * scale, torch.einsum("mg,mgd->d", weights, do)


def check_samples(p, results, query_rows, keys):
    """Some queries, all of their heads, and some (row, KV head) keys, against float64."""
    o, lse, dq, dk, dv = results
    expected = [
        torch.stack(x) for x in zip(*(expected_of_query(p, row) for row in query_rows), strict=True)
    ]
    assert_rms_close("o", o[query_rows], expected[0], o.dtype)
    # float32, and sums of 128 products of numbers around 1.
    torch.testing.assert_close(lse[query_rows].double(), expected[1], rtol=1e-4, atol=1e-4)
    assert_rms_close("dq", dq[query_rows], expected[2], o.dtype)
    expected = [
        torch.stack(x)
        for x in zip(*(expected_of_key(p, row, head, o, lse) for row, head in keys), strict=True)
    ]
    rows, heads = (list(x) for x in zip(*keys, strict=True))
    assert_rms_close("dk", dk[rows, heads], expected[0], o.dtype)
    assert_rms_close("dv", dv[rows, heads], expected[1], o.dtype)
