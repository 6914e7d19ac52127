"""Compressed attention on a GPU: rows 1, 5, 9, 10, 11 and 13 of reliability.md at lengths that
only a GPU runs.
"""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from nsa_fsa import ops, reference
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES
from tests import on_gpu
from tests.cases import RESULTS

pytestmark = pytest.mark.gpu

LENGTHS = (1000, 37, 0, 3000, 64)
# G, D, DV. Heads of 64 and 128, for keys and values alike, take the kernels written for Hopper
# where these can run.
HOPPER = [(g, d, d) for d in (64, 128) for g in (1, 3, 4, 5, 16, 64)]
PLAIN = [
    (4, 96, 96),
    (1, 128, 64),
    (3, 64, 128),
    (5, 80, 80),
    (2, 256, 256),
    (64, 96, 32),
    (16, 192, 128),
]
SHAPES = [(1, 128, 128), (4, 128, 128), (5, 64, 64), (6, 96, 96)]


@dataclass
class Problem:
    """Compressed attention on packed sequences. Compressed keys and values are NaN in rows that no
    window owns.
    """

    q: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    do: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    kernel_size: int
    kernel_stride: int
    cu_seqlens_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    workspace_bytes: int = WORKSPACE_BYTES

    def arguments(self):
        names = ("cu_seqlens", "cu_seqlens_q", "seqused_k", "workspace_bytes")
        windows = dict(kernel_size=self.kernel_size, kernel_stride=self.kernel_stride)
        given = {name: getattr(self, name) for name in names}
        return dict(max_seqlen=max(self.lengths), return_lse=True, **windows, **given)

    def leaves(self):
        return self.q, self.k_cmp, self.v_cmp

    def forward(self, backend="triton"):
        """o and lse."""
        return ops.compressed_attention(*self.leaves(), **self.arguments(), backend=backend)

    def run(self, backend="triton"):
        """RESULTS."""
        o, lse = self.forward(backend)
        return [o.detach(), lse, *torch.autograd.grad(o, self.leaves(), self.do)]

    def rows(self, b):
        """Of sequence b: its tokens, and its windows among the compressed rows."""
        start, length = sum(self.lengths[:b]), self.lengths[b]
        first = start // self.kernel_stride
        number = max(0, (length - self.kernel_size) // self.kernel_stride + 1)
        return slice(start, start + length), slice(first, first + number)

    def alone(self, b):
        """Sequence b by itself."""
        tokens, _ = self.rows(b)
        first = tokens.start // self.kernel_stride
        compressed = slice(first, first + self.lengths[b] // self.kernel_stride)
        parts = dict(q=tokens, do=tokens, k_cmp=compressed, v_cmp=compressed)
        parts = {name: getattr(self, name).detach()[rows].clone() for name, rows in parts.items()}
        length = self.lengths[b : b + 1]
        return dataclasses.replace(
            self, **parts, lengths=length, cu_seqlens=on_gpu.starts(length)
        ).differentiable()

    def double(self):
        names = ("q", "k_cmp", "v_cmp", "do")
        return dataclasses.replace(
            self, **{name: getattr(self, name).detach().double() for name in names}
        ).differentiable()

    def differentiable(self):
        for x in self.leaves():
            x.requires_grad_()
        return self


def owned_windows(p):
    tokens = torch.empty(sum(p.lengths), 0, device="cuda")
    return reference.window_rows(tokens, p.cu_seqlens, p.kernel_size, p.kernel_stride, p.seqused_k)[
        1
    ]


def make(
    lengths,
    num_kv_heads,
    group_size,
    head_dim=128,
    v_dim=None,
    *,
    dtype=torch.bfloat16,
    windows=(32, 16),
    seed=0,
    num_queries=None,
    used=None,
):
    """num_queries, used: of every sequence's `lengths` rows of keys,
    how many last queries there are and rows that count.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(rows, heads, width):
        return torch.randn(rows, heads, width, dtype=dtype, device="cuda", generator=generator)

    num_heads, v_dim = num_kv_heads * group_size, head_dim if v_dim is None else v_dim
    num_rows = sum(lengths if num_queries is None else num_queries)
    num_windows = sum(lengths) // windows[1]
    p = Problem(
        randn(num_rows, num_heads, head_dim),
        randn(num_windows, num_kv_heads, head_dim),
        randn(num_windows, num_kv_heads, v_dim),
        randn(num_rows, num_heads, v_dim),
        tuple(lengths),
        on_gpu.starts(lengths),
        *windows,
        None if num_queries is None else on_gpu.starts(num_queries),
        None if used is None else torch.tensor(used, dtype=torch.int32, device="cuda"),
    )
    for x in (p.k_cmp, p.v_cmp):
        x[~owned_windows(p)] = torch.nan
    return p.differentiable()


def assert_same_bits(found, expected, what, names=RESULTS):
    for name, a, b in zip(names, found, expected, strict=True):
        assert torch.equal(a, b), f"{name}, {what}: {(a != b).sum()} of {a.numel()} differ"


# Row 1: against float64.


def check(p):
    dtype, (o, lse, *grads) = p.q.dtype, p.run()
    o_expected, lse_expected, *grads_expected = p.double().run("reference")
    on_gpu.assert_rms_close("o", o, o_expected, dtype)
    # float32, and sums of at most 256 products of numbers around 1.
    torch.testing.assert_close(lse.double(), lse_expected, rtol=1e-4, atol=1e-4)
    sees_nothing = lse_expected == -torch.inf
    assert torch.equal(lse == -torch.inf, sees_nothing)
    assert (o[sees_nothing] == 0).all()
    for name, a, b in zip(("dq", "dk", "dv"), grads, grads_expected, strict=True):
        assert a.dtype == dtype
        on_gpu.assert_rms_close(name, a, b, dtype)
    assert (grads[0][sees_nothing] == 0).all()
    for grad in grads[1:]:
        assert (grad[~owned_windows(p)] == 0).all()


@pytest.mark.parametrize("lengths", [(2500,), (1500, 0, 37, 2000, 31, 300)], ids=["one", "packed"])
@pytest.mark.parametrize("shape", HOPPER + PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(dtype, shape, lengths):
    check(make(lengths, 2, *shape, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(1, 128, 128), (3, 80, 96), (16, 64, 64), (4, 256, 256)], ids=str
)
def test_float32_against_float64(shape):
    check(make((1000, 0, 37, 1200), 2, *shape, dtype=torch.float32))


@pytest.mark.parametrize(
    "windows", [(16, 16), (64, 16), (64, 64), (12, 4), (2, 1), (1, 1), (7, 7)], ids=str
)
@pytest.mark.parametrize("shape", [(4, 128, 128), (3, 64, 64), (2, 96, 80)], ids=str)
def test_windows(shape, windows):
    check(make((1500, 0, 37, 2000, 31, 300), 1, *shape, windows=windows))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8, 24, 40])
@pytest.mark.parametrize("shape", [(2, 128, 128), (2, 96, 96)], ids=str)
def test_any_number_of_heads(shape, num_kv_heads):
    """Programs take 16 heads, or what divides their number, at a time;
    few heads have their rows cut into parts.
    """
    check(make((1500, 0, 700), num_kv_heads, *shape))


# (rows of the buffer, last queries or None for as many, used rows or None for all)
CACHED = [
    ((3000, 0, 37, 1500), (1, 0, 5, 1500), (2800, 0, 30, 1500)),
    ((3000, 100, 500), (1, 1, 1), (2999, 33, 31)),
    ((3000, 0, 37, 1500), (2000, 0, 37, 1), None),
    ((3000, 0, 37, 1500), None, (2800, 0, 30, 0)),
    ((3000,), (130,), (2900,)),
]


@pytest.mark.parametrize(("lengths", "num_queries", "used"), CACHED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_last_queries(shape, lengths, num_queries, used):
    """As in decoding, with gradients too."""
    check(make(lengths, 2, *shape, num_queries=num_queries, used=used))


# Row 9: the same bits in every run, in company and alone.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_repeatable_forward(shape):
    p = make(LENGTHS, 2, *shape)
    with torch.no_grad():
        first = p.forward()
        for run in range(1, 100):
            assert_same_bits(p.forward(), first, f"run {run}", RESULTS[:2])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_repeatable_backward(shape):
    p = make(LENGTHS, 2, *shape)
    first = p.run()
    for run in range(1, 20):
        assert_same_bits(p.run(), first, f"run {run}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sequence_alone_and_among_others(shape):
    """What a query gets is the same bit by bit; what a key gets is summed in parts,
    whose number depends on the batch.
    """
    p = make(LENGTHS, 2, *shape)
    o, lse, dq, dk, dv = p.run()
    # Judged together: of a sequence with a single window dk is exactly 0, and found are roundings.
    sums = dict(dk=[], dv=[])
    for b, length in enumerate(LENGTHS):
        tokens, windows = p.rows(b)
        *found, dk_alone, dv_alone = p.alone(b).run()
        assert_same_bits(
            found,
            [x[tokens] for x in (o, lse, dq)],
            f"sequence {b} of {length} tokens",
            RESULTS[:3],
        )
        for name, alone, packed in (("dk", dk_alone, dk), ("dv", dv_alone, dv)):
            sums[name].append((alone[: windows.stop - windows.start], packed[windows]))
    for name, pairs in sums.items():
        on_gpu.assert_rms_close(name, *(torch.cat(x) for x in zip(*pairs, strict=True)))


def check_nan_stays(p, spoiled, assert_equal):
    """assert_equal(found, expected, name, names) of lists of tensors:
    what other sequences get with NaN in one, and without.
    """
    expected = p.run()
    tokens, windows = p.rows(spoiled)
    with torch.no_grad():
        for name, rows in (("q", tokens), ("do", tokens), ("k_cmp", windows), ("v_cmp", windows)):
            getattr(p, name)[rows] = torch.nan
    found = p.run()
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        rows = windows if name in ("dk", "dv") else tokens
        if name != "lse" and windows.stop > windows.start:
            assert a[rows].isnan().any(), f"{name}: NaN was not there"
        assert_equal(
            [a[: rows.start], a[rows.stop :]],
            [b[: rows.start], b[rows.stop :]],
            name,
            ("before", "after"),
        )


@pytest.mark.parametrize("spoiled", range(len(LENGTHS)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_stays_in_its_sequence(shape, spoiled):
    check_nan_stays(make(LENGTHS, 2, *shape), spoiled, assert_same_bits)


# Row 10: more than 2^31 elements, and a million tokens. Samples are judged in float64.


@torch.no_grad()
def expected_of_query(p, row, head):
    """o `[DV]`, lse and dq `[D]` of one query of one head, in float64."""
    start, _ = on_gpu.sequence_of(p, row)
    seen = max(0, (row - start + 1 - p.kernel_size) // p.kernel_stride + 1)
    windows = slice(start // p.kernel_stride, start // p.kernel_stride + seen)
    kv_head, scale = head // (p.q.shape[1] // p.k_cmp.shape[1]), p.q.shape[2] ** -0.5
    k, v = (x[windows, kv_head].double() for x in (p.k_cmp, p.v_cmp))  # [n, D]
    q, do = p.q[row, head].double(), p.do[row, head].double()
    s = k @ q * scale
    weights = s.softmax(0)
    dp = v @ do
    return weights @ v, s.logsumexp(0), (weights * (dp - weights @ dp)) @ k * scale


@torch.no_grad()
def expected_of_window(p, b, window, kv_head, o, lse):
    """dk `[D]` and dv `[DV]` of window number `window` of sequence b, in float64,
    from the o and lse of who sees it.
    """
    tokens, windows = p.rows(b)
    group_size, scale = p.q.shape[1] // p.k_cmp.shape[1], p.q.shape[2] ** -0.5
    rows = slice(tokens.start + window * p.kernel_stride + p.kernel_size - 1, tokens.stop)
    heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
    k, v = (x[windows.start + window, kv_head].double() for x in (p.k_cmp, p.v_cmp))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for at in torch.arange(rows.start, rows.stop).split(2**17):  # 512 MiB of each tensor in float64
        part = slice(int(at[0]), int(at[-1]) + 1)
        q, do, o_seen, lse_seen = (
            x[part, heads].double() for x in (p.q, p.do, o, lse)
        )  # [M, G, D]
        weights = (q @ k * scale - lse_seen).exp()  # [M, G]
        ds = weights * (do @ v - (do * o_seen).sum(-1))
        dk += torch.einsum("mg,mgd->d", ds, q) * scale
        dv += torch.einsum("mg,mgd->d", weights, do)
    return dk, dv


def check_samples(p, results, number=24):
    """First, last and random queries and windows of the sequences, of the first,
    the last and a random head.
    """
    o, lse, dq, dk, dv = results
    for x in (o, dq, dk, dv):
        assert torch.isfinite(x).all()
    num_heads, num_kv_heads = p.q.shape[1], p.k_cmp.shape[1]
    rows = on_gpu.sampled_rows(p.lengths, number)
    queries = [
        (row, head)
        for row in rows
        for head in (0, num_heads - 1, int(torch.randint(num_heads, ())))
    ]
    expected = [
        torch.stack(x)
        for x in zip(*(expected_of_query(p, *query) for query in queries), strict=True)
    ]
    at, heads = (list(x) for x in zip(*queries, strict=True))
    on_gpu.assert_rms_close("o", o[at, heads], expected[0])
    # float32, and sums of 128 products of numbers around 1.
    torch.testing.assert_close(lse[at, heads].double(), expected[1], rtol=1e-4, atol=1e-4)
    on_gpu.assert_rms_close("dq", dq[at, heads], expected[2])

    for b in range(len(p.lengths)):
        _, windows = p.rows(b)
        count = windows.stop - windows.start
        if count == 0:
            continue
        sampled = sorted(
            {0, min(1, count - 1), count - 1, *torch.randint(count, (number // 4,)).tolist()}
        )
        keys = [
            (i, head)
            for i in sampled
            for head in {0, num_kv_heads - 1, int(torch.randint(num_kv_heads, ()))}
        ]
        expected = [
            torch.stack(x)
            for x in zip(*(expected_of_window(p, b, *key, o, lse) for key in keys), strict=True)
        ]
        at, heads = [windows.start + i for i, _ in keys], [head for _, head in keys]
        on_gpu.assert_rms_close(f"dk of sequence {b}", dk[at, heads], expected[0])
        on_gpu.assert_rms_close(f"dv of sequence {b}", dv[at, heads], expected[1])


def test_samples_are_judged_like_everything():
    """The samples' float64 against the reference's, at a length where both can be had."""
    p = make((300, 0, 200), 2, 3, 64)
    check_samples(p, p.double().run("reference"))


@on_gpu.needs(60)
@pytest.mark.parametrize(
    ("num_kv_heads", "group_size", "head_dim"),
    [(256, 1, 128), (64, 4, 128), (344, 1, 96)],
    ids=["G1", "G4", "plain"],
)
def test_offsets_past_2_31(num_kv_heads, group_size, head_dim):
    """q, o and their gradients have more elements than an int32 counts."""
    p = make((41_000, 0, 29_000), num_kv_heads, group_size, head_dim)
    assert p.q.numel() > 2**31
    check_samples(p, p.run())


@on_gpu.needs(60)
@pytest.mark.parametrize("head_dim", [128, 96])
def test_windows_past_2_31(head_dim):
    """With a window at every token the compressed keys and values, and their gradients,
    have as many.
    """
    p = make((41_000, 0, 29_000), 2**31 // (70_000 * head_dim) + 1, 1, head_dim, windows=(2, 1))
    assert p.k_cmp.numel() > 2**31
    check_samples(p, p.run(), number=12)


@on_gpu.needs(40)
@pytest.mark.parametrize("head_dim", [128, 96])
@pytest.mark.parametrize(
    "lengths", [(2**20,), (700_000, 0, 2**20 - 700_000)], ids=["one", "packed"]
)
def test_a_million_tokens(lengths, head_dim):
    p = make(lengths, 1, 4, head_dim)
    check_samples(p, p.run())


@pytest.mark.parametrize("fewer", [1, 0], ids=["two_passes", "one_pass"])
def test_where_one_pass_begins(fewer):
    p = make((tuning.CompressedConfig().one_pass_tokens - fewer, 300), 2, 4, 128)
    check_samples(p, p.run())


# Row 11: nothing waits for the GPU, so a CUDA graph can record everything.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_host_syncs(shape):
    sizes = [dict(lengths=lengths) for lengths in ((1000,), LENGTHS, (50, 1400))]
    sizes += [dict(lengths=c, num_queries=n, used=u) for c, n, u in CACHED]
    problems = [
        make(num_kv_heads=2, group_size=shape[0], head_dim=shape[1], v_dim=shape[2], **size)
        for size in sizes
    ]
    for p in problems[:2]:  # one sequence, and several
        p.run()
    with on_gpu.syncs_forbidden():
        for p in problems:
            p.run()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_graph(shape):
    """Recorded once; replayed with other values and lengths it gives the same bits as
    running anew.
    """
    lengths = (1000, 0, 77, 2000)
    p = make(lengths, 2, *shape)
    p.lengths = (sum(lengths),)  # as an upper bound, which holds for every way to cut the rows
    graph, recorded = on_gpu.record(p.run)

    for seed, others in ((1, lengths), (2, (3000, 77, 0, 0)), (3, (0, 1, 64, 3012))):
        other = make(others, 2, *shape, seed=seed)
        with torch.no_grad():
            for name in ("q", "k_cmp", "v_cmp", "do", "cu_seqlens"):
                getattr(p, name).copy_(getattr(other, name))
        graph.replay()
        replayed = [x.clone() for x in recorded]
        assert_same_bits(replayed, p.run(), f"{others}")
        # What a query gets does not depend on max_seqlen either.
        assert_same_bits(replayed[:3], other.run()[:3], f"{others}, anew", RESULTS[:3])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_graph_of_decoding(shape):
    """One query a sequence, over a cache that grows between replays."""
    p = make((3000, 500, 37), 2, *shape, num_queries=(1, 1, 1), used=(1000, 500, 31))
    with torch.no_grad():
        p.forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = p.forward()
        for used in ((1000, 500, 31), (3000, 16, 37), (33, 1, 32)):
            other = make((3000, 500, 37), 2, *shape, num_queries=(1, 1, 1), used=used, seed=used[0])
            for name in ("q", "k_cmp", "v_cmp", "seqused_k"):
                getattr(p, name).copy_(getattr(other, name))
            graph.replay()
            assert_same_bits(recorded, other.forward(), f"{used}", RESULTS[:2])


@pytest.mark.parametrize("cramped", [False, True], ids=["", "99_kib"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [1, 4, 64])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_plain_tiles(head_dim, group_size, dtype, cramped, monkeypatch):
    """Those that tuning chooses on other GPUs, on this one; as selected attention's."""
    if cramped and head_dim <= 128:
        pytest.skip("these tiles do not depend on the shared memory")
    config = tuning._compressed_config(dtype, head_dim, head_dim, group_size, False, cramped)
    monkeypatch.setattr(tuning, "compressed_config", lambda *_: config)
    check(make(LENGTHS, 2, group_size, head_dim, dtype=dtype))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_gradient_that_is_one_row_many_times(dim):
    """o.sum(0) and o.sum(1) have such. Bulk copies of the kernels for Hopper take strides of 0,
    although no manual says so.
    """
    p = make(LENGTHS, 2, 4, 128, 128)
    row = p.do.narrow(dim, 0, 1).clone()
    found = []
    for do in (row.expand(p.do.shape), row.expand(p.do.shape).contiguous()):
        o, _ = p.forward()
        found.append(torch.autograd.grad(o, p.leaves(), do))
    for name, a, b in zip(RESULTS[2:], *found, strict=True):
        assert torch.equal(a, b), name


# Row 13: nothing piles up, and the workspace is bounded.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_growth_over_50_steps(shape):
    p = make((1000, 3000), 2, *shape)
    on_gpu.assert_no_growth(p.run)


def partial_sums_bound(p):
    """Bytes that sums of dk and dv may take before they are added: float32, in so many parts that
    there are `dkdv_programs` programs, each of which writes a tile of `dkdv_n` windows, at most;
    rounding that number up adds one part at most, which is as large as dk and dv are in float32.
    Tiles of 128 windows of 128 wide heads make that 132 MiB and twice the size of dk and dv; where
    there are many heads or long sequences, there are no parts."""
    config = tuning.compressed_config(p.q, p.v_cmp, p.q.shape[1] // p.k_cmp.shape[1])
    tile = config.dkdv_n * (p.k_cmp.shape[2] + p.v_cmp.shape[2]) * 4
    return config.dkdv_programs * tile + 4 * (p.k_cmp.numel() + p.v_cmp.numel())


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize(
    "shape", [(1, 128, 128), (4, 128, 128), (16, 64, 64), (4, 96, 96)], ids=str
)
def test_peak(shape, num_kv_heads):
    """Beside the results: tables of tiles, statistics of 8 bytes a query head, and bounded partial
    sums. Weights of every query and window would take more than 128 MiB a head here."""
    p = make((20_000, 0, 12_768), num_kv_heads, *shape)
    p.run()  # loads the kernels
    (o, lse), peak = on_gpu.extra(p.forward)
    allowed = on_gpu.num_bytes(o, lse) + 2 * on_gpu.MIB
    assert peak <= allowed, (
        f"forward: {peak / on_gpu.MIB:.1f} MiB, allowed are {allowed / on_gpu.MIB:.1f}"
    )
    grads, peak = on_gpu.extra(lambda: torch.autograd.grad(o, p.leaves(), p.do))
    allowed = (
        on_gpu.num_bytes(*grads)
        + 8 * p.q.shape[0] * p.q.shape[1]
        + partial_sums_bound(p)
        + 4 * on_gpu.MIB
    )
    assert peak <= allowed, (
        f"backward: {peak / on_gpu.MIB:.1f} MiB, allowed are {allowed / on_gpu.MIB:.1f}"
    )


@on_gpu.needs(70)
@pytest.mark.parametrize(("num_kv_heads", "group_size"), [(64, 1), (4, 16)], ids=["G1", "G16"])
def test_heads_past_2_31_are_no_other_heads(num_kv_heads, group_size, deterministic_only):
    """Compressed attention, selection and gates get bit by bit what they get of tensors laid out
    token by token.
    """
    layout, windows = (
        (on_gpu.starts(on_gpu.HEAD_MAJOR), max(on_gpu.HEAD_MAJOR)),
        dict(kernel_size=32, kernel_stride=16),
    )
    generator = torch.Generator("cuda").manual_seed(0)
    total, heads = sum(on_gpu.HEAD_MAJOR), num_kv_heads * group_size

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    q, do = randn(total, heads, 128).requires_grad_(), randn(total, heads, 128)
    k, v = (randn(total // 16, num_kv_heads, 128).requires_grad_() for _ in range(2))
    found = []
    for place in (lambda x: x, on_gpu.head_major):
        leaves = [place(x) for x in (q, k, v)]
        o, lse = ops.compressed_attention(
            *leaves, *layout, **windows, return_lse=True, backend="triton"
        )
        grads = torch.autograd.grad(o, leaves, place(do))
        indices = ops.select_blocks(
            leaves[0].detach(),
            leaves[1].detach(),
            lse,
            *layout,
            **windows,
            block_size=64,
            num_selected_blocks=8,
            backend="triton",
        )
        found.append([x.sum(0, dtype=torch.float64) for x in (o.detach(), lse, *grads)] + [indices])
        del o, lse, grads, leaves
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
