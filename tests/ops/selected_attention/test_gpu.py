"""Selected attention on a GPU: rows 9, 10, 11 and 13 of reliability.md."""

import dataclasses

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall
from nsa_fsa.sequences import Sequences
from tests.cases import RESULTS
from tests.on_gpu import (
    GIB,
    HEAD_MAJOR,
    MIB,
    assert_no_growth,
    assert_rms_close,
    extra,
    head_major,
    needs,
    num_bytes,
    record,
    sampled_rows,
    starts,
    syncs_forbidden,
)
from tests.ops.selected_attention.problems import (
    BACKENDS,
    alike_selection,
    check_samples,
    make_problem,
    random_selection,
)

pytestmark = pytest.mark.gpu

REPEATED = (1000, 37, 0, 3000, 64)
# 128 takes the kernels written for Hopper where they can run, 96 the plain ones.
SHAPES = [(1, 128), (4, 128), (6, 96)]
RECORDED = (1000, 0, 77, 2000)
RANGES = [2**22, 2**31]  # ranges of queries in turn, and all at once
MEASURED = (20_000, 0, 12_768)
BUDGETS = [64 * MIB, 256 * MIB, 1024 * MIB]


def problem(group_size, head_dim):
    return make_problem(REPEATED, 2, group_size, head_dim=head_dim)


def assert_same_bits(found, expected, what):
    for name, a, b in zip(RESULTS, found, expected, strict=False):
        assert torch.equal(a, b), f"{name}, {what}: {(a != b).sum()} of {a.numel()} differ"


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_forward_in_100_runs(backend, group_size, head_dim):
    p = problem(group_size, head_dim)
    with torch.no_grad():
        first = p.forward(backend)
        for run in range(1, 100):
            assert_same_bits(p.forward(backend), first, f"run {run}")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("workspace_bytes", RANGES, ids=["ranges", "at_once"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_backward_in_20_runs(backend, group_size, head_dim, workspace_bytes):
    p = problem(group_size, head_dim)
    first = p.run(backend, workspace_bytes=workspace_bytes)
    for run in range(1, 20):
        assert_same_bits(p.run(backend, workspace_bytes=workspace_bytes), first, f"run {run}")


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_alone_and_among_others(backend, group_size, head_dim):
    p = problem(group_size, head_dim)
    with torch.no_grad():
        packed = p.forward(backend)
        for b, length in enumerate(REPEATED):
            start = sum(REPEATED[:b])
            assert_same_bits(
                p.alone(b).forward(backend),
                [x[start : start + length] for x in packed],
                f"sequence {b} of {length} tokens",
            )


def test_a_sync_is_noticed():
    """Otherwise the next tests would prove nothing."""
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), syncs_forbidden():
        x.sum().item()


@pytest.mark.parametrize("workspace_bytes", RANGES)
@pytest.mark.parametrize(("group_size", "head_dim"), [(1, 128), (4, 128), (3, 80)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_syncs(backend, group_size, head_dim, workspace_bytes):
    warm, other = (
        make_problem(lengths, 2, group_size, head_dim=head_dim)
        for lengths in (RECORDED, (50, 1400))
    )
    warm.run(backend, workspace_bytes=workspace_bytes)
    with syncs_forbidden():
        warm.run(backend, workspace_bytes=workspace_bytes)
        # other lengths, another number of sequences.
        other.run(backend, workspace_bytes=workspace_bytes)


def test_decoding():
    p = make_problem((300, 500), 2, 4)
    arguments = dict(
        cu_seqlens=p.cu_seqlens,
        max_seqlen=500,
        block_size=64,
        cu_seqlens_q=starts((1, 1)),
        seqused_k=torch.tensor([260, 500], dtype=torch.int32, device="cuda"),
        backend="triton_query_major",
    )
    rows = torch.tensor([259, 799], device="cuda")
    q, indices = p.q.detach()[rows], p.block_indices[rows]
    with torch.no_grad():
        expected = ops.selected_attention(q, p.k, p.v, indices, **arguments)
        with syncs_forbidden():
            found = ops.selected_attention(q, p.k, p.v, indices, **arguments)
        assert torch.equal(found, expected)


# Queries of a chunk: all of a sequence, the last of one, none, a few that lie across two blocks.
CHUNK = (700, 1, 0, 70, 1500)


@pytest.mark.parametrize("workspace_bytes", RANGES, ids=["ranges", "at_once"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_after_a_past(backend, group_size, head_dim, workspace_bytes):
    """What whole sequences give for these queries, over a cache with NaN where it is not in use,
    and without host syncs."""
    lengths, rest = (700, 300, 90, 1000, 5000), 50
    p = make_problem(lengths, 2, group_size, head_dim=head_dim)
    of_lengths, capacities = starts(lengths).tolist(), [n + rest for n in lengths]
    cached = [of_lengths[b] + b * rest + i for b, n in enumerate(lengths) for i in range(n)]
    rows = [of_lengths[b + 1] - n + i for b, n in enumerate(CHUNK) for i in range(n)]
    caches = []
    for x in (p.k, p.v):
        cache = x.new_full((sum(capacities), *x.shape[1:]), torch.nan)
        cache[cached] = x.detach()
        caches.append(cache)
    arguments = p.arguments() | dict(
        cu_seqlens=starts(capacities),
        max_seqlen=max(lengths),
        cu_seqlens_q=starts(CHUNK),
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        backend=backend,
        workspace_bytes=workspace_bytes,
    )
    q, indices = p.q.detach()[rows], p.block_indices[rows]
    with torch.no_grad():
        o, lse = (x[rows] for x in p.forward(backend))
        ops.selected_attention(q, *caches, indices, **arguments)  # loads the kernels
        with syncs_forbidden():
            o_chunk, lse_chunk = ops.selected_attention(q, *caches, indices, **arguments)
    assert_rms_close("o", o_chunk, o)
    # float32, and sums of 128 products of numbers around 1.
    torch.testing.assert_close(lse_chunk, lse, rtol=1e-4, atol=1e-4)

    whole = p.forward(backend)[0]
    do = torch.zeros_like(whole).index_copy(0, torch.tensor(rows, device="cuda"), o)
    expected = torch.autograd.grad(whole, (p.q, p.k, p.v), do)
    leaves = [x.requires_grad_() for x in (q, *caches)]
    o_chunk = ops.selected_attention(*leaves, indices, **arguments)[0]
    dq, dk, dv = torch.autograd.grad(o_chunk, leaves, do[rows])
    assert_rms_close("dq", dq, expected[0][rows])
    unused = torch.ones(sum(capacities), dtype=torch.bool).index_fill(0, torch.tensor(cached), 0)
    for name, x, y in zip(("dk", "dv"), (dk, dv), expected[1:], strict=True):
        assert_rms_close(name, x[cached], y)
        assert (x[unused] == 0).all()


@pytest.mark.parametrize("workspace_bytes", RANGES)
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend, group_size, workspace_bytes):
    """Recorded once; replayed with other values, indices and lengths it gives the same bits as
    running anew.
    """
    p = make_problem(RECORDED, 2, group_size)

    def step():
        return p.run(backend, workspace_bytes=workspace_bytes)

    p.lengths = (sum(RECORDED),)  # as an upper bound, which holds for every way to cut the rows
    graph, recorded = record(step)

    for seed, lengths in ((1, RECORDED), (2, (3000, 77, 0, 0)), (3, (0, 1, 64, 3012))):
        other = make_problem(lengths, 2, group_size, seed=seed)
        with torch.no_grad():
            for name in ("q", "k", "v", "do", "block_indices", "cu_seqlens"):
                getattr(p, name).copy_(getattr(other, name))
        graph.replay()
        replayed = [x.clone() for x in recorded]
        for name, a, b in zip(RESULTS, replayed, step(), strict=True):
            assert torch.equal(a, b), f"{name} of {lengths}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_growth_over_50_steps(backend):
    p = make_problem((1000, 3000), 2, 4)
    assert_no_growth(lambda: p.run(backend))


def unaccounted(p):
    """12 bytes a query (where it lies), 8 a query head (statistics), and, below a MiB each,
    some dozen tables.
    """
    return p.q.shape[0] * (12 + 8 * p.q.shape[1]) + 12 * MIB


@pytest.mark.parametrize("workspace_bytes", BUDGETS)
@pytest.mark.parametrize("group_size", [1, 4])
def test_peak_keeps_to_the_budget(group_size, workspace_bytes):
    """Partial results would take 3.5 GiB forward, and more backward, at G = 4."""
    p = make_problem(MEASURED, 8, group_size)
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
    p = make_problem(MEASURED, 4, group_size)
    expected = p.run(backend, workspace_bytes=4096 * MIB)
    for budget in BUDGETS:
        for name, a, b in zip(
            RESULTS, p.run(backend, workspace_bytes=budget), expected, strict=True
        ):
            if name in ("dk", "dv"):
                assert_rms_close(f"{name} with {budget / MIB:.0f} MiB", a, b)
            else:
                assert torch.equal(a, b), f"{name} with {budget / MIB:.0f} MiB"


def sampled_keys(rows, num_kv_heads):
    """(row, KV head): the sampled rows with a head each, the first and the last head among them."""
    heads = torch.randint(num_kv_heads, (len(rows),)).tolist()
    return [(rows[0], 0), (rows[-1], num_kv_heads - 1), *zip(rows, heads, strict=True)]


@needs(90)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(256, 1), (64, 4)], ids=["G1", "G4"])
@pytest.mark.parametrize(
    ("backend", "workspace_bytes"),
    [("triton_kv_major", 2 * GIB), ("triton_kv_major", 12 * GIB), ("triton_query_major", 2 * GIB)],
    ids=["kv_major", "kv_major_12_gib", "query_major"],
)
def test_offsets_past_2_31(backend, workspace_bytes, num_kv_heads, group_size):
    """q, o and their gradients, and with 12 GiB the partial results too,
    have more elements than an int32 counts.
    """
    lengths = (41_000, 0, 29_000)
    p = make_problem(lengths, num_kv_heads, group_size)
    assert p.q.numel() > 2**31
    rows = sampled_rows(lengths, 24)
    check_samples(
        p, p.run(backend, workspace_bytes=workspace_bytes), rows, sampled_keys(rows, num_kv_heads)
    )


@needs(70)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(64, 1), (4, 16)], ids=["G1", "G16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_heads_past_2_31(backend, num_kv_heads, group_size):
    p = make_problem(HEAD_MAJOR, num_kv_heads, group_size)
    p = dataclasses.replace(
        p, **{name: head_major(getattr(p, name)) for name in ("q", "k", "v", "do")}
    )
    assert p.q.stride(1) * 63 > 2**31
    rows = sampled_rows(HEAD_MAJOR, 24)
    check_samples(p, p.run(backend), rows, sampled_keys(rows, num_kv_heads))


@needs(90)
@pytest.mark.parametrize(
    "lengths", [(2**20,), (700_000, 0, 2**20 - 700_000)], ids=["one", "packed"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_tokens(backend, lengths):
    p = make_problem(lengths, num_kv_heads=2, group_size=4)
    results = p.run(backend)
    for result in results:
        assert torch.isfinite(result).all()
    rows = sampled_rows(lengths, 24)
    check_samples(p, results, rows, sampled_keys(rows, 2))


# 65,536 blocks of 16 keys, more than an int16 numbers; and 130 heads with 2^31 indices and more
# between them.
@needs(90)
@pytest.mark.parametrize(("num_kv_heads", "block_size"), [(2, 16), (130, 64)])
def test_block_index_of_a_million_tokens(num_kv_heads, block_size):
    length, num_indices, init_blocks, local_blocks = 2**20, 16, 1, 2
    slots = num_indices - init_blocks - local_blocks
    generator = torch.Generator("cuda").manual_seed(0)
    indices = random_selection(
        (length,), num_kv_heads, block_size, num_indices, init_blocks, local_blocks, generator
    )
    sequences = Sequences(starts((length,)), length)
    blocks = Blocks(block_size, init_blocks, local_blocks)
    index = build_block_index(IndexCall(indices, None, sequences, length, blocks, WORKSPACE_BYTES))
    entries, first_entry, num_entries, num_sparse, _, _ = index
    own = torch.arange(length, device="cuda") // block_size
    num_blocks = length // block_size
    for head in sorted({0, num_kv_heads // 2, num_kv_heads - 1}):
        of_head = indices[:, head]
        for block in (1, 2, num_blocks // 2 - 1, num_blocks // 2, num_blocks - 4, num_blocks - 3):
            expected = (
                ((of_head == block).any(-1) & (block <= own - local_blocks)).nonzero().flatten()
            )
            first, count = int(first_entry[head, block]), int(num_entries[head, block])
            assert torch.equal(entries[head, first : first + count].long() // slots, expected), (
                head,
                block,
            )
        ordered = of_head.sort(-1).values
        repeated = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        sparse = (ordered >= init_blocks) & (ordered <= (own - local_blocks)[:, None]) & ~repeated
        assert torch.equal(num_sparse[head] & 0x7FFFFFFF, sparse.sum(-1).int()), head
        assert (num_sparse[head] < 0).all(), "every query chose its own block"


# Tiles that go by the unions of their blocks.
UNION_KERNELS = {
    "plain_64": dict(union_hopper=False, union_m=64, union_warps=4),
    "plain_128": dict(union_hopper=False, union_m=128, union_warps=8),
    "hopper": dict(union_hopper=True, union_m=128),
}
UNION_LENGTHS = (1500, 0, 37, 700, 2500)


@pytest.fixture(params=UNION_KERNELS)
def union_kernel(request, monkeypatch):
    """Has the forward go by unions of this factor with one of the kernels, where it can."""
    default = tuning.default_config

    def go(factor, p):
        hopper = request.param == "hopper"
        if hopper and not tuning.runs_hopper(p.q, p.v, p.block_size):
            pytest.skip("the Gluon kernel cannot run this here")
        change = UNION_KERNELS[request.param] | dict(union_factor=factor)
        if hopper:
            change["union_stages"] = 2 if p.q.shape[2] == 128 else 4
        changed = {}

        def make(q, v, block_size):
            config = default(q, v, block_size)
            return changed.setdefault(block_size, dataclasses.replace(config, **change))

        monkeypatch.setattr(tuning, "default_config", make)

    return go


def alike_problem(group_size, head_dim=128, block_size=64, lengths=UNION_LENGTHS, **extra):
    """Neighbours choose alike, and single tiles at random."""
    p = make_problem(lengths, 2, group_size, head_dim=head_dim, block_size=block_size, **extra)
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (2, block_size, p.block_indices.shape[2], p.init_blocks, p.local_blocks, generator)
    alike, alone = (alike_selection(lengths, *shape, run=run) for run in (48, 1))
    at_random = torch.arange(len(alike), device="cuda") // 128 % 4 == 3
    p.block_indices = torch.where(at_random[:, None, None], alone, alike)
    return p


@pytest.mark.parametrize(
    ("group_size", "head_dim", "block_size", "dtype"),
    [
        *((g, 128, 64, torch.bfloat16) for g in (1, 2, 3, 4, 7, 16, 64)),
        *((g, 64, 64, torch.float16) for g in (1, 6)),
        *((g, d, 128, torch.bfloat16) for g, d in ((1, 128), (4, 128), (12, 64))),
        *((g, 96, 32, torch.float16) for g in (1, 4)),
        (4, 256, 16, torch.bfloat16),
        (4, 128, 64, torch.float32),
    ],
)
@pytest.mark.parametrize("factor", [1.5, float("inf")])
def test_union(union_kernel, factor, group_size, head_dim, block_size, dtype):
    """o and lse, with an index and without, against the reference in float64."""
    num_indices = max(1024 // block_size, 8) if head_dim <= 128 else 16
    p = alike_problem(group_size, head_dim, block_size, dtype=dtype, num_indices=num_indices)
    union_kernel(factor, p)
    wide = {name: getattr(p, name).detach().double() for name in ("q", "k", "v", "do")}
    with torch.no_grad():
        expected = dataclasses.replace(p, **wide).forward("reference")
        inferred = p.forward("triton_kv_major")
    for what, (o, lse) in (("inference", inferred), ("training", p.forward("triton_kv_major"))):
        assert_rms_close(f"o, {what}", o, expected[0], dtype)
        close = dict(rtol=1e-4, atol=1e-4)  # float32, and sums of products of numbers around 1
        torch.testing.assert_close(lse.double(), expected[1], **close)


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_the_same_union_in_100_runs(union_kernel, group_size):
    p = alike_problem(group_size)
    union_kernel(2.0, p)
    with torch.no_grad():
        first = p.forward("triton_kv_major")
        for run in range(1, 100):
            assert_same_bits(p.forward("triton_kv_major"), first, f"run {run}")


@pytest.mark.parametrize("group_size", [1, 4])
def test_unions_of_a_sequence_alone_and_among_others(union_kernel, group_size):
    p = alike_problem(group_size)
    union_kernel(2.0, p)
    with torch.no_grad():
        packed = p.forward("triton_kv_major")
        for b, length in enumerate(UNION_LENGTHS):
            start = sum(UNION_LENGTHS[:b])
            alone = p.alone(b).forward("triton_kv_major")
            rows = [x[start : start + length] for x in packed]
            assert_same_bits(alone, rows, f"sequence {b} of {length} tokens")


@pytest.mark.parametrize("group_size", [1, 4])
def test_unions_of_a_chunk_after_a_past(union_kernel, group_size):
    """What whole sequences give for these queries, over a cache with NaN where it is not in use."""
    lengths, chunk, rest = (700, 300, 90, 1000, 5000), (700, 1, 0, 70, 1500), 50
    p = alike_problem(group_size, lengths=lengths)
    union_kernel(float("inf"), p)
    ends, capacities = starts(lengths).tolist(), [n + rest for n in lengths]
    cached = [ends[b] + b * rest + i for b, n in enumerate(lengths) for i in range(n)]
    rows = [ends[b + 1] - n + i for b, n in enumerate(chunk) for i in range(n)]
    caches = []
    for x in (p.k, p.v):
        cache = x.new_full((sum(capacities), *x.shape[1:]), torch.nan)
        cache[cached] = x.detach()
        caches.append(cache)
    arguments = p.arguments() | dict(
        cu_seqlens=starts(capacities),
        max_seqlen=max(lengths),
        cu_seqlens_q=starts(chunk),
        seqused_k=torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        backend="triton_kv_major",
    )
    with torch.no_grad():
        o, lse = (x[rows] for x in p.forward("triton_kv_major"))
        q, indices = p.q.detach()[rows], p.block_indices[rows]
        o_chunk, lse_chunk = ops.selected_attention(q, *caches, indices, **arguments)
    assert_rms_close("o", o_chunk, o)
    torch.testing.assert_close(lse_chunk, lse, rtol=1e-4, atol=1e-4)


def test_unions_without_host_syncs(union_kernel):
    p = alike_problem(4)
    union_kernel(2.0, p)
    with torch.no_grad():
        p.forward("triton_kv_major")
        with syncs_forbidden():
            p.forward("triton_kv_major")


def test_unions_in_a_cuda_graph(union_kernel):
    """Replayed with other choices, it gives the same bits as running anew."""
    p = alike_problem(4)
    union_kernel(2.0, p)
    with torch.no_grad():
        graph, recorded = record(lambda: p.forward("triton_kv_major"))
        p.block_indices.copy_(p.block_indices.flip(1))
        graph.replay()
        replayed = [x.clone() for x in recorded]
        assert_same_bits(replayed, p.forward("triton_kv_major"), "other choices")


@pytest.mark.parametrize("workspace_bytes", [2**22, 2**31])
def test_gradients_beside_unions(union_kernel, workspace_bytes):
    """The backward reads the index of all queries."""
    p = alike_problem(4)
    union_kernel(2.0, p)
    wide = {name: getattr(p, name).detach().double() for name in ("q", "k", "v", "do")}
    for name in ("q", "k", "v"):
        wide[name].requires_grad_()
    expected = dataclasses.replace(p, **wide).run("reference")
    found = p.run("triton_kv_major", workspace_bytes=workspace_bytes)
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        assert_rms_close(name, a, b)
