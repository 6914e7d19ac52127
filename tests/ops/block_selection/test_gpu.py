"""Rows 2, 9, 10, 11 and 13 of reliability.md for select_blocks, at sizes that only a GPU runs. The
lse is any: what a query chooses follows from its own, and so does what is expected of it."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from nsa_fsa import ops
from tests.on_gpu import extra, needs, record, sampled_rows, sequence_of, starts, syncs_forbidden

pytestmark = pytest.mark.gpu

MIB = 2**20
FSA = [(64, 16), (128, 8)]  # block size and blocks a query, as in the FSA paper


@dataclass
class Selection:
    """Queries, compressed keys and lse of packed sequences."""

    q: torch.Tensor
    k_cmp: torch.Tensor
    lse: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    block_size: int = 64
    num_selected_blocks: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    kernel_size: int = 32
    kernel_stride: int = 16

    def run(self, **changed):
        names = (
            "block_size",
            "num_selected_blocks",
            "init_blocks",
            "local_blocks",
            "kernel_size",
            "kernel_stride",
        )
        arguments = (
            dict(max_seqlen=max(self.lengths), **{name: getattr(self, name) for name in names})
            | changed
        )
        return ops.select_blocks(
            self.q, self.k_cmp, self.lse, self.cu_seqlens, backend="triton", **arguments
        )

    def alone(self, b):
        """Sequence b by itself."""
        start, length, stride = sum(self.lengths[:b]), self.lengths[b], self.kernel_stride
        rows = slice(start, start + length)
        compressed = slice(start // stride, start // stride + length // stride)
        return dataclasses.replace(
            self,
            q=self.q[rows].clone(),
            k_cmp=self.k_cmp[compressed].clone(),
            lse=self.lse[rows].clone(),
            lengths=(length,),
            cu_seqlens=starts((length,)),
        )


def make(lengths, num_kv_heads, group_size, *, head_dim=128, dtype=torch.bfloat16, seed=0, **sizes):
    generator = torch.Generator("cuda").manual_seed(seed)
    total, options = sum(lengths), dict(device="cuda", generator=generator)
    q = torch.randn(total, num_kv_heads * group_size, head_dim, dtype=dtype, **options)
    k_cmp = torch.randn(
        total // sizes.get("kernel_stride", 16), num_kv_heads, head_dim, dtype=dtype, **options
    )
    lse = torch.rand(q.shape[:2], **options) * 2 + 7
    return Selection(q, k_cmp, lse, tuple(lengths), starts(lengths), **sizes)


def scores_of(p, rows):
    """Scores `[M, HKV, num_blocks]` of some queries of one sequence, in float64, and the queries'
    own blocks `[M]`."""
    start, _ = sequence_of(p, int(rows[0]))
    last, stride = int(rows[-1]) - start, p.kernel_stride
    n, num_blocks = (last + 1 - p.kernel_size) // stride + 1, last // p.block_size + 1
    t = rows - start
    scores = torch.zeros(
        len(rows), p.k_cmp.shape[1], num_blocks, dtype=torch.float64, device="cuda"
    )
    if n > 0:
        k = p.k_cmp[start // stride : start // stride + n].double()  # [n, HKV, D]
        q = p.q[rows].double().unflatten(1, (k.shape[1], -1))  # [M, HKV, G, D]
        s = torch.einsum("mhgd,nhd->mhgn", q, k) * p.q.shape[2] ** -0.5
        weights = (
            (s - p.lse[rows].double().unflatten(1, (k.shape[1], -1))[..., None]).exp_().sum(2)
        )  # [M, HKV, n]
        window = torch.arange(n, device="cuda")
        weights.masked_fill_((window * stride + p.kernel_size - 1 > t[:, None])[:, None], 0)
        for unit in range(p.kernel_size // stride):
            block = (window + unit) // (p.block_size // stride)
            scores.index_add_(
                2, block.clamp(max=num_blocks - 1), weights.masked_fill(block >= num_blocks, 0)
            )
    return scores, t // p.block_size


def assert_rules_and_scores(p, indices, rows):
    """Count, order, forced blocks and causality exactly; the freely chosen blocks within 0.5% of
    the best, query by query."""
    scores, own = scores_of(p, rows)
    indices, own = indices[rows], own[:, None, None]
    places = p.num_selected_blocks
    slot = torch.arange(places, device="cuda")
    valid = indices >= 0
    assert torch.equal(valid, (slot <= own).expand_as(valid))
    assert (indices[~valid] == -1).all()
    assert (indices <= own).all(), "a future block"
    assert (indices.diff(dim=-1)[valid[..., 1:]] > 0).all(), "ascending, without repetition"
    for forced in (*range(p.init_blocks), *(own - n for n in range(p.local_blocks))):
        forced = torch.as_tensor(forced, device="cuda")
        found = (indices == forced).any(-1)
        assert (found | ((forced < 0) | (forced > own)).expand_as(indices)[..., 0]).all(), (
            "a forced block is missing"
        )

    block = torch.arange(scores.shape[2], device="cuda")
    free = ((block >= p.init_blocks) & (block <= own - p.local_blocks)).expand_as(scores)
    scores = torch.where(free, scores, 0)
    best = scores.topk(min(places - p.init_blocks - p.local_blocks, scores.shape[2])).values.sum(-1)
    found = scores.gather(2, indices.clamp(min=0).long()).mul(valid).sum(-1)
    chosen_all = (own < places)[..., 0]
    assert (chosen_all | (found >= 0.995 * best)).all(), (
        f"{(found / best).masked_fill(chosen_all, 1).min()}"
    )


@pytest.mark.parametrize(("block_size", "num_selected_blocks"), FSA)
@pytest.mark.parametrize("group_size", [1, 3, 4, 16])
def test_choices(group_size, block_size, num_selected_blocks):
    p = make((8192,), 2, group_size, block_size=block_size, num_selected_blocks=num_selected_blocks)
    indices = p.run()
    for rows in torch.arange(8192, device="cuda").split(256):
        assert_rules_and_scores(p, indices, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("group_size", "head_dim", "sizes"),
    [
        (5, 80, dict(block_size=64, num_selected_blocks=11)),
        (2, 64, dict(block_size=32, num_selected_blocks=32, init_blocks=0, local_blocks=1)),
        (1, 256, dict(block_size=64, num_selected_blocks=4, init_blocks=0, local_blocks=0)),
        (20, 64, dict(block_size=48, num_selected_blocks=7)),
        (4, 32, dict(block_size=16, num_selected_blocks=64, kernel_size=16)),
        (1, 128, dict(block_size=32, num_selected_blocks=5, kernel_size=4, kernel_stride=1)),
    ],
    ids=str,
)
def test_other_sizes(group_size, head_dim, sizes, dtype):
    lengths = (1500, 0, 37, 700)
    p = make(lengths, 2, group_size, head_dim=head_dim, dtype=dtype, **sizes)
    indices = p.run()
    first = 0
    for length in filter(None, lengths):
        for rows in torch.arange(first, first + length, device="cuda").split(256):
            assert_rules_and_scores(p, indices, rows)
        first += length


def test_float32_chooses_exactly():
    """Scores tell apart what float32 does: sets equal the float64 ones wherever these are apart by
    more than rounding."""
    p = make((4096,), 2, 4, dtype=torch.float32)
    indices = p.run()
    for rows in torch.arange(2048, 4096, device="cuda").split(256):
        scores, own = scores_of(p, rows)
        block, own = torch.arange(scores.shape[2], device="cuda"), own[:, None, None]
        free = ((block >= 1) & (block <= own - 2)).expand_as(scores)
        best = scores.masked_fill(~free, -1).sort(-1, descending=True)
        apart = best.values[..., 12] > best.values[..., 13] * (1 + 1e-5)
        assert apart.float().mean() > 0.9
        assert torch.equal(
            indices[rows][..., 1:14][apart].long(), best.indices[..., :13].sort(-1).values[apart]
        )


LENGTHS = (1000, 37, 0, 3000, 64)


@pytest.mark.parametrize(("group_size", "head_dim"), [(1, 128), (4, 128), (6, 96)])
def test_same_bits_in_every_run(group_size, head_dim):
    p = make(LENGTHS, 2, group_size, head_dim=head_dim)
    first = p.run()
    for run in range(1, 100):
        assert torch.equal(p.run(), first), f"run {run}"


@pytest.mark.parametrize(("group_size", "head_dim"), [(1, 128), (4, 128), (6, 96)])
def test_a_sequence_alone_and_among_others(group_size, head_dim):
    """Also beside a neighbour so long that keys take 64 bits."""
    p = make(LENGTHS, 2, group_size, head_dim=head_dim)
    for max_seqlen in (max(LENGTHS), 2**20):
        packed = p.run(max_seqlen=max_seqlen)
        for b, length in enumerate(LENGTHS):
            start = sum(LENGTHS[:b])
            assert torch.equal(p.alone(b).run(), packed[start : start + length]), (
                f"sequence {b} of {length} tokens"
            )


@needs(90)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(256, 1), (64, 4)], ids=["G1", "G4"])
def test_offsets_past_2_31(num_kv_heads, group_size):
    p = make((41_000, 0, 29_000), num_kv_heads, group_size)
    assert p.q.numel() > 2**31
    indices = p.run()
    for row in sampled_rows(p.lengths, 24):
        assert_rules_and_scores(p, indices, torch.tensor([row], device="cuda"))


@needs(40)
@pytest.mark.parametrize(
    "lengths", [(2**20,), (700_000, 0, 2**20 - 700_000)], ids=["one", "packed"]
)
def test_a_million_tokens(lengths):
    """With keys of 64 bits, which number 2,048 steps."""
    p = make(lengths, 1, 4)
    indices = p.run()
    for row in sampled_rows(lengths, 24):
        assert_rules_and_scores(p, indices, torch.tensor([row], device="cuda"))


@pytest.mark.parametrize(("group_size", "head_dim"), [(1, 128), (4, 128), (3, 80)])
def test_nothing_waits_for_the_gpu(group_size, head_dim):
    warm, other = (
        make(lengths, 2, group_size, head_dim=head_dim) for lengths in (LENGTHS, (50, 1400))
    )
    warm.run()
    with syncs_forbidden():
        warm.run()
        other.run()


def test_cuda_graph():
    """Recorded once; replayed with other values and lengths it gives the same bits as
    running anew."""
    p = make(LENGTHS, 2, 4)
    p.lengths = (sum(LENGTHS),)  # as an upper bound, which holds for every way to cut the rows
    graph, recorded = record(p.run)
    for seed, lengths in ((1, LENGTHS), (2, (4000, 101, 0, 0, 0)), (3, (0, 1, 64, 3036, 1000))):
        other = make(lengths, 2, 4, seed=seed)
        for name in ("q", "k_cmp", "lse", "cu_seqlens"):
            getattr(p, name).copy_(getattr(other, name))
        graph.replay()
        replayed = recorded.clone()
        assert torch.equal(replayed, p.run()), lengths


@pytest.mark.parametrize("group_size", [1, 4])
def test_memory_does_not_grow_with_the_number_of_blocks(group_size):
    """Beyond the result there is only the table of tiles; scores of every query and block would
    take 512 MiB here."""
    p = make((20_000, 12_768), 8, group_size)
    p.run()
    indices, peak = extra(p.run)
    assert peak <= indices.numel() * 4 + 2 * MIB, f"{peak / MIB:.0f} MiB"
