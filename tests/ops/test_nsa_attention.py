"""nsa_attention on a GPU: rows 1, 9, 10, 11 and 13 of reliability.md for the whole core,
with the backends that users get.
"""

from dataclasses import dataclass

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.config import BRANCHES
from nsa_fsa.ops.sliding_window_attention.flash_attention import FLASH_ATTN_4
from tests import on_gpu
from tests.naive import sequence_and_position

pytestmark = pytest.mark.gpu

RESULTS = ("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgate", "dk_swa", "dv_swa")
WINDOWS = dict(kernel_size=32, kernel_stride=16)
SIZES = dict(**WINDOWS, block_size=64, num_selected_blocks=16, window_size=512)
LENGTHS = (1000, 37, 0, 2000, 64)
# Group size and width; 96 has no kernels written for Hopper.
SHAPES = [(1, 128), (4, 128), (16, 64), (3, 96)]


@dataclass
class Core:
    """Inputs of nsa_attention: k_cmp and v_cmp are any numbers. With `own`,
    the window has keys and values of its own.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    leaves: list[torch.Tensor]  # q, k, v, k_cmp, v_cmp, gate_logits, and with own k_swa, v_swa
    do: torch.Tensor

    def call(self, **extra):
        q, k, v, k_cmp, v_cmp, gates, *own = self.leaves
        more = dict(zip(("k_swa", "v_swa"), own, strict=False))
        packed = (self.cu_seqlens, max(self.lengths))
        return ops.nsa_attention(q, k, v, k_cmp, v_cmp, gates, *packed, **SIZES, **more, **extra)

    def run(self, **extra):
        """RESULTS."""
        o = self.call(**extra)
        return [o.detach(), *torch.autograd.grad(o, self.leaves, self.do)]

    def alone(self, b):
        """Sequence b by itself; its compressed rows are those of the batch."""
        start, length = sum(self.lengths[:b]), self.lengths[b]
        rows = slice(start, start + length)
        compressed = slice(start // 16, start // 16 + length // 16)
        taken = [
            x.detach()[compressed if i in (3, 4) else rows].clone()
            for i, x in enumerate(self.leaves)
        ]
        leaves = [x.requires_grad_() for x in taken]
        return Core((length,), on_gpu.starts((length,)), leaves, self.do[rows].clone())


def make_core(
    lengths, num_kv_heads, group_size, head_dim=128, dtype=torch.bfloat16, own=False, seed=0
):
    generator = torch.Generator("cuda").manual_seed(seed)
    total, num_heads = sum(lengths), num_kv_heads * group_size

    def randn(rows, heads, width=head_dim):
        return torch.randn(rows, heads, width, dtype=dtype, device="cuda", generator=generator)

    rows = (total, total, total, total // 16, total // 16)
    leaves = [randn(n, num_kv_heads if i else num_heads) for i, n in enumerate(rows)] + [
        randn(total, num_heads, 3)
    ]
    leaves += [randn(total, num_kv_heads) for _ in range(2 * own)]
    return Core(
        tuple(lengths),
        on_gpu.starts(lengths),
        [x.requires_grad_() for x in leaves],
        randn(total, num_heads),
    )


def assert_same_bits(found, expected, what):
    for name, a, b in zip(RESULTS, found, expected, strict=False):
        assert torch.equal(a, b), f"{name}, {what}: {(a != b).sum()} of {a.numel()} differ"


def separately(core, block_indices, dense_below=0):
    """RESULTS from the branches one by one, and from full attention where queries are dense, in
    float64 by the reference, with blocks that are given.
    """
    leaves = [x.detach().double().requires_grad_() for x in core.leaves]
    q, k, v, k_cmp, v_cmp, gates, *own = leaves
    k_swa, v_swa = own or (k, v)
    packed, reference = (core.cu_seqlens, max(core.lengths)), dict(backend="reference")
    o_cmp = ops.compressed_attention(q, k_cmp, v_cmp, *packed, **WINDOWS, **reference)
    o_slc = ops.selected_attention(
        q, k, v, block_indices, *packed, block_size=SIZES["block_size"], **reference
    )
    o_swa = ops.sliding_window_attention(
        q, k_swa, v_swa, *packed, window_size=SIZES["window_size"], **reference
    )
    o = ops.gated_combine(gates, o_cmp, o_slc, o_swa, **reference)
    if dense_below:
        full = ops.sliding_window_attention(q, k, v, *packed, window_size=dense_below, **reference)
        _, position = sequence_and_position(core.cu_seqlens)
        o = torch.where((position < dense_below)[:, None, None], full, o)
    return [o.detach(), *torch.autograd.grad(o, leaves, core.do.double())]


@pytest.mark.parametrize("recompute", [(), BRANCHES], ids=["keep", "recompute"])
@pytest.mark.parametrize("own", [False, True], ids=["shared_kv", "own_kv"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_against_float64(dtype, group_size, head_dim, own, recompute):
    core = make_core(LENGTHS, 2, group_size, head_dim, dtype, own)
    with torch.no_grad():
        _, branches = core.call(return_branches=True)
    expected = separately(core, branches.block_indices)
    for name, a, b in zip(RESULTS, core.run(recompute=recompute), expected, strict=False):
        on_gpu.assert_rms_close(name, a, b, dtype)


@pytest.mark.parametrize("own", [False, True], ids=["shared_kv", "own_kv"])
@pytest.mark.parametrize("dense_below", [64, 1500, 2000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_queries(dtype, dense_below, own):
    """Which are looked for without a look at the device."""
    core = make_core(LENGTHS, 2, 4, dtype=dtype, own=own)
    with torch.no_grad():
        _, branches = core.call(return_branches=True)
    expected = separately(core, branches.block_indices, dense_below)
    for name, a, b in zip(RESULTS, core.run(dense_below=dense_below), expected, strict=False):
        if b.any():
            on_gpu.assert_rms_close(name, a, b, dtype)
        else:
            assert not a.any(), name
    with on_gpu.syncs_forbidden():
        core.run(dense_below=dense_below)


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
def test_the_same_forward_in_100_runs(group_size, head_dim):
    core = make_core(LENGTHS, 2, group_size, head_dim)
    with torch.no_grad():
        first = core.call()
        for run in range(1, 100):
            assert_same_bits([core.call()], [first], f"run {run}")


@pytest.mark.parametrize("workspace_bytes", [2**22, 2**31], ids=["ranges", "at_once"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
def test_the_same_backward_with_deterministic_algorithms(
    deterministic_only, group_size, head_dim, workspace_bytes
):
    core = make_core(LENGTHS, 2, group_size, head_dim)
    first = core.run(workspace_bytes=workspace_bytes)
    for run in range(1, 20):
        assert_same_bits(core.run(workspace_bytes=workspace_bytes), first, f"run {run}")


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
def test_a_sequence_alone_and_among_others(group_size, head_dim):
    core = make_core(LENGTHS, 2, group_size, head_dim)
    with torch.no_grad():
        packed = core.call()
        for b, length in enumerate(LENGTHS):
            start = sum(LENGTHS[:b])
            assert_same_bits(
                [core.alone(b).call()],
                [packed[start : start + length]],
                f"sequence {b} of {length} tokens",
            )


@pytest.mark.parametrize("recompute", [(), BRANCHES], ids=["keep", "recompute"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
def test_no_host_syncs(group_size, head_dim, recompute):
    warm, other = (make_core(lengths, 2, group_size, head_dim) for lengths in (LENGTHS, (50, 1400)))
    warm.run(recompute=recompute)
    other.run(recompute=recompute)
    with on_gpu.syncs_forbidden():
        warm.run(recompute=recompute)
        other.run(recompute=recompute)


@pytest.mark.parametrize("group_size", [1, 4])
def test_cuda_graph(deterministic_only, group_size):
    """Recorded once; replayed with other values and lengths it gives the same bits as
    running anew.
    """
    core = make_core(LENGTHS, 2, group_size)
    core.lengths = (sum(LENGTHS),)  # as an upper bound, which holds for every way to cut the rows
    graph, recorded = on_gpu.record(core.run)
    for seed, lengths in ((1, LENGTHS), (2, (3000, 101, 0, 0, 0)), (3, (0, 1, 64, 3036, 0))):
        other = make_core(lengths, 2, group_size, seed=seed)
        with torch.no_grad():
            for a, b in zip(
                (*core.leaves, core.do, core.cu_seqlens),
                (*other.leaves, other.do, other.cu_seqlens),
                strict=True,
            ):
                a.copy_(b)
        graph.replay()
        replayed = [x.clone() for x in recorded]
        assert_same_bits(replayed, core.run(), str(lengths))


@pytest.mark.parametrize("recompute", [(), BRANCHES], ids=["keep", "recompute"])
def test_no_growth_over_50_steps(recompute):
    core = make_core((1000, 3000), 2, 4)
    on_gpu.assert_no_growth(lambda: core.run(recompute=recompute))


@on_gpu.needs(90)
@pytest.mark.skipif(
    FLASH_ATTN_4.missing() is not None, reason="the bounds hold with flash-attn 4 alone"
)
@pytest.mark.parametrize("recompute", [(), BRANCHES], ids=["keep", "recompute"])
def test_peak_at_131072_tokens(recompute):
    """64 query and 4 key heads of 128. Full attention's own tensors:
    q, k, v, o, their gradients, and lse.
    """
    core = make_core((131_072,), 4, 16)
    q, k, v = core.leaves[:3]
    full = 2 * on_gpu.num_bytes(q, q, k, v) + 4 * q.shape[0] * q.shape[1]
    core.run(recompute=recompute)  # loads the kernels
    results, more = on_gpu.extra(lambda: core.run(recompute=recompute))
    # The inputs were there before: q, k, v and the gradient of o.
    # What only NSA reads and returns is counted as ours.
    peak = more + on_gpu.num_bytes(*core.leaves, core.do)
    assert all(torch.isfinite(x).all() for x in results)
    assert peak <= (1.5 if recompute else 2.0) * full, (
        f"{peak / on_gpu.MIB:.0f} MiB, full attention's tensors {full / on_gpu.MIB:.0f}"
    )


@on_gpu.needs(70)
@pytest.mark.parametrize(
    "workspace_bytes", [256 * on_gpu.MIB, 2048 * on_gpu.MIB], ids=["small", "default"]
)
@pytest.mark.parametrize("lengths", [(2**20,), (16,) * 100_000], ids=["million", "short"])
def test_peak_keeps_to_the_budget_at_any_size(lengths, workspace_bytes):
    """Of 16 query and 4 key heads: with 64 the branches alone would fill an 80 GB card.

    On top come what the forward keeps, what `selected_attention` says is not counted, of every
    branch, and 64 MiB; in the backward the sums of one KV head of compressed attention, which it
    does at least, and FlashAttention's own float32 sums of dq beside the window's gradients.
    """
    core = make_core(lengths, 4, 4)
    core.do = core.leaves[0].detach()
    (q, k), tokens = core.leaves[:2], sum(lengths)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    blocks = tokens // 64 + len(lengths)
    uncounted = (
        tokens * (12 + 3 * 8 * num_heads) + blocks * (16 + 36 * num_kv_heads) + 64 * on_gpu.MIB
    )
    before = torch.cuda.memory_allocated()
    o, peak = on_gpu.extra(lambda: core.call(workspace_bytes=workspace_bytes))
    kept = torch.cuda.memory_allocated() - before
    allowed = workspace_bytes + kept + 2 * tokens * num_kv_heads * 16 + uncounted
    assert peak <= allowed, (
        f"forward: {peak / on_gpu.MIB:.0f} MiB, allowed are {allowed / on_gpu.MIB:.0f}"
    )
    grads, peak = on_gpu.extra(lambda: torch.autograd.grad(o, core.leaves, core.do))
    one_head = 4 * tokens * 128 * num_heads // num_kv_heads + 4 * 16 * (tokens // 16) * 2 * 128
    flash = 4 * q.numel() + on_gpu.num_bytes(q, k, k)
    allowed = max(workspace_bytes, one_head, flash) + on_gpu.num_bytes(*grads) + uncounted
    # Of selected attention, as documented.
    allowed += max(0, 4 * tokens * 2 * 128 - workspace_bytes // 2)
    assert peak <= allowed, (
        f"backward: {peak / on_gpu.MIB:.0f} MiB, allowed are {allowed / on_gpu.MIB:.0f}"
    )


@torch.no_grad()
def expected_of_query(core, row, block_indices):
    """o `[HQ, DV]` of one query of a single sequence, in float64,
    with blocks that are given `[HKV, T_sel]`.
    """
    q, k, v, k_cmp, v_cmp, gates = (x.detach() for x in core.leaves)
    num_kv_heads = k.shape[1]
    scale = q.shape[2] ** -0.5
    head = torch.arange(k.shape[1], device="cuda")[:, None]
    q = q[row].double().unflatten(0, (num_kv_heads, -1))

    def attend(keys, values, at, seen):
        """at, seen: rows of keys `[HKV or 1, N]`, and which of them count."""
        s = (q @ keys[at, head].double().mT * scale).masked_fill(~seen[:, None], -torch.inf)
        return (s.softmax(-1) @ values[at, head].double()).flatten(0, 1)

    def every(start, stop):
        at = torch.arange(start, stop, device="cuda")[None]
        return at, torch.ones_like(at, dtype=torch.bool)

    of_blocks = (block_indices.long()[..., None] * 64 + torch.arange(64, device="cuda")).flatten(1)
    seen = (of_blocks >= 0) & (of_blocks <= row)
    selected = attend(k, v, of_blocks.clamp(0, row), seen)
    sliding = attend(k, v, *every(max(0, row - SIZES["window_size"] + 1), row + 1))
    visible = max(0, (row - 31) // 16 + 1)
    compressed = attend(k_cmp, v_cmp, *every(0, visible)) if visible else torch.zeros_like(selected)
    branches = torch.stack((compressed, selected, sliding), -1)
    return (branches * gates[row].double().sigmoid()[:, None]).sum(-1)


@on_gpu.needs(120)
def test_a_million_tokens():
    """48 query and 3 key heads of 128: 6 * 2^30 numbers in q. Sampled queries against float64."""
    core = make_core((2**20,), 3, 16)
    with torch.no_grad():
        o, branches = core.call(return_branches=True)
        rows = on_gpu.sampled_rows(core.lengths, 24)
        expected = torch.stack(
            [expected_of_query(core, row, branches.block_indices[row]) for row in rows]
        )
    on_gpu.assert_rms_close("o", o[rows], expected)
    del o, branches
    for name, result in zip(RESULTS, core.run(recompute=BRANCHES), strict=False):
        assert torch.isfinite(result).all(), name
