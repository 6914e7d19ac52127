"""Row 2 of reliability.md: which blocks are chosen."""

import pytest
import torch

from nsa_fsa import ops
from tests import oracle
from tests.cases import (
    CASES,
    SMALL_CASES,
    backends_of,
    by_name,
    call,
    case_for,
    device_of,
    make_inputs,
    select,
    widest_dtype,
)


def own_blocks(case):
    """The number of every packed query's own block, `[T]`."""
    return torch.cat([torch.arange(n) for n in case.lengths]) // case.block_size


def choose(case, x, backend, **extra):
    """Compressed attention's lse and the selection that follows from it, as nsa_attention does."""
    return select(case, x, call("compressed_attention", case, x)[1], backend, **extra)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_what_holds_for_every_selection(backend, case):
    """Count, order, padding, causality and forced blocks, in the case's own dtype."""
    case = case_for("select_blocks", backend, case)
    x = make_inputs(case, device=device_of(backend))
    indices = choose(case, x, backend).cpu()
    assert indices.dtype == torch.int32
    assert indices.shape == (sum(case.lengths), case.num_kv_heads, case.num_selected_blocks)

    own = own_blocks(case)[:, None, None]
    valid = indices >= 0
    slot = torch.arange(case.num_selected_blocks)
    assert torch.equal(valid, (slot < (own + 1)).expand_as(valid)), (
        "min(T_sel, own + 1) entries, then only padding"
    )
    assert (indices[~valid] == -1).all()
    assert (indices <= own).all(), "a future block"
    both = valid[..., 1:]
    assert (indices.diff(dim=-1)[both] > 0).all(), "ascending, without repetition"
    for forced in (*range(case.init_blocks), *(own[:, :, 0] - n for n in range(case.local_blocks))):
        forced = torch.as_tensor(forced).expand(len(own), 1)
        exists = ((forced >= 0) & (forced <= own[:, :, 0])).expand(-1, case.num_kv_heads)
        assert (indices == forced[..., None]).any(-1)[exists].all(), "a forced block is missing"


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_same_sets_as_the_oracle_where_scores_are_separated(backend, case):
    dtype, _ = widest_dtype(backend)
    x = make_inputs(case, dtype, device=device_of(backend))
    indices, scores = choose(case, x, backend, return_scores=True)
    cpu = make_inputs(case, torch.float64)
    layout = dict(cu_seqlens=cpu.cu_seqlens)
    expected_scores = oracle.oracle_block_scores(
        cpu.q,
        cpu.k_cmp,
        cpu.max_seqlen,
        block_size=case.block_size,
        scale=case.scale,
        **case.windows,
        **layout,
    )
    # Weights are at most 1, G heads with at most l / s overlapping windows of weight <= B_K /
    # s are summed.
    tolerance = (
        dict(rtol=1e-10, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    )
    torch.testing.assert_close(scores.cpu().double(), expected_scores, **tolerance)
    expected = oracle.oracle_select(expected_scores, **case.blocks, **layout)

    # Where the last chosen and the first rejected score are closer than rounding,
    # either choice is right.
    eligible = torch.arange(expected_scores.shape[2]) <= own_blocks(case)[:, None, None]
    ranked = expected_scores.masked_fill(~eligible, -1).sort(-1).values
    gap = ranked.diff(dim=-1).masked_fill(ranked[..., :-1] < 0, torch.inf)
    # Exact zeros tie exactly, and are decided by number.
    zero_ties = (ranked[..., 1:] == 0) & (ranked[..., :-1] == 0)
    separated = ((gap > 1e-6) | zero_ties).all(-1)
    if expected_scores.shape[2] > 1:
        assert separated.float().mean() > 0.9  # random scores: the test is about nearly every query
    assert torch.equal(indices.cpu()[separated], expected[separated])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_low_precision_choices_score_as_well_as_the_oracles(backend, case):
    """The bar of reliability.md, 0.5%, and applied to the freely chosen blocks alone:
    forced ones would hide an error.
    """
    case = case_for("select_blocks", backend, case)
    indices = choose(case, make_inputs(case, device=device_of(backend)), backend).cpu().long()
    best, scores = choose(case, make_inputs(case, torch.float64), "reference", return_scores=True)
    best = best.long()
    own = own_blocks(case)[:, None, None]

    def free_score(chosen):
        free = (chosen >= case.init_blocks) & (chosen <= own - case.local_blocks)
        return torch.where(free, scores.gather(2, chosen.clamp(min=0)), 0).sum(-1)

    assert (free_score(indices) >= 0.995 * free_score(best)).all()


@pytest.mark.parametrize("num_selected_blocks", [1, 2, 5, 7, 8, 40])
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_ties_go_to_the_lowest_block(backend, num_selected_blocks):
    """All-zero keys make all weights equal; with one window per block the scores are one and
    the same float.
    """
    T, HQ, HKV, D, size = 160, 4, 2, 16, 8
    device = device_of(backend)
    q, k_cmp = torch.randn(T, HQ, D, device=device), torch.zeros(T // size, HKV, D, device=device)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    sizes = dict(kernel_size=size, kernel_stride=size)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, cu_seqlens, T, return_lse=True, **sizes)
    for init_blocks, local_blocks in [(0, 0), (0, 1), (1, 0)]:
        blocks = dict(
            block_size=size,
            num_selected_blocks=num_selected_blocks,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
        )
        indices = ops.select_blocks(
            q, k_cmp, lse, cu_seqlens, T, backend=backend, **sizes, **blocks
        ).cpu()
        for t in range(T):
            own = t // size
            # The own block scores 0 until its window is complete, so it comes last.
            complete = (t + 1) // size
            order = sorted(oracle.forced_blocks(own, init_blocks, local_blocks))
            order += [j for j in [*range(complete), *range(complete, own + 1)] if j not in order]
            expected = sorted(order[:num_selected_blocks])
            expected += [-1] * (num_selected_blocks - len(expected))
            assert indices[t].tolist() == [expected] * HKV, f"t={t}"


@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_blocks_that_score_nothing_tie_too(backend):
    """All weight lies on block 5 and exp underflows to exactly 0 elsewhere:
    blocks 0 and 1 fill the free places.
    """
    T, D, size, device = 80, 8, 8, device_of(backend)
    q, k_cmp = torch.ones(T, 1, D, device=device), torch.zeros(T // size, 1, D, device=device)
    k_cmp[5] = 1e3
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    sizes = dict(kernel_size=size, kernel_stride=size)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, cu_seqlens, T, return_lse=True, **sizes)
    blocks = dict(block_size=size, num_selected_blocks=3, init_blocks=0, local_blocks=0)
    indices = ops.select_blocks(q, k_cmp, lse, cu_seqlens, T, backend=backend, **blocks, **sizes)
    assert indices[-1, 0].tolist() == [0, 1, 5]


@pytest.mark.parametrize("backend", ["reference"])
def test_overlap_weights(backend):
    """For (32, 16, 64) block j is overlapped by windows 4j-1 .. 4j+3,
    with weights 1, 2, 2, 2, 1.
    """
    T, D, num_blocks, device = 256, 64, 4, device_of(backend)
    sizes = dict(kernel_size=32, kernel_stride=16)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    expected = torch.zeros(T // 16, num_blocks)
    for j in range(num_blocks):
        for window, weight in zip(range(4 * j - 1, 4 * j + 4), (1, 2, 2, 2, 1), strict=True):
            if window >= 0:
                expected[window, j] = weight
    for window in range(15):
        q, k_cmp = torch.ones(T, 1, D, device=device), torch.zeros(T // 16, 1, D, device=device)
        k_cmp[window] = 1e3  # the last query gives this window a weight of exactly 1
        _, lse = ops.compressed_attention(q, k_cmp, k_cmp, cu_seqlens, T, return_lse=True, **sizes)
        _, scores = ops.select_blocks(
            q,
            k_cmp,
            lse,
            cu_seqlens,
            T,
            block_size=64,
            num_selected_blocks=4,
            return_scores=True,
            backend=backend,
            **sizes,
        )
        assert torch.equal(scores[-1, 0].cpu(), expected[window]), f"window {window}"


@pytest.mark.parametrize("head", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_every_head_of_the_group_counts(backend, head):
    """Only one head attends to block 5; the others look at block 1,
    which the free place would go to without that head.
    """
    T, G, D, size, device = 80, 4, 8, 8, device_of(backend)
    q, k_cmp = torch.zeros(T, G, D, device=device), torch.zeros(T // size, 1, D, device=device)
    k_cmp[1, 0, 0], k_cmp[5, 0, 1] = 100.0, 100.0
    q[:, :, 0] = 1.0
    q[:, head] = torch.eye(D, device=device)[1]
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    sizes = dict(kernel_size=size, kernel_stride=size)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, cu_seqlens, T, return_lse=True, **sizes)
    indices, scores = ops.select_blocks(
        q, k_cmp, lse, cu_seqlens, T, block_size=size, num_selected_blocks=2, init_blocks=0,
        local_blocks=0, return_scores=True, backend=backend, **sizes,
    )  # fmt: skip
    # G - 1 heads give block 1 their whole weight and one gives it to block 5;
    # what exp(-35) leaves for others is no matter.
    torch.testing.assert_close(scores[-1, 0, [1, 5]].cpu(), torch.tensor([G - 1.0, 1.0]))
    assert indices[-1, 0].tolist() == [1, 5]


@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_every_head_uses_its_own_lse(backend):
    """A head with large scores counts no more than one with small scores:
    each head's weights sum to 1.
    """
    T, G, D, size, device = 64, 3, 8, 8, device_of(backend)
    q = torch.randn(T, G, D, device=device) * torch.tensor([0.1, 1.0, 10.0], device=device)[:, None]
    k_cmp = torch.randn(T // size, 1, D, device=device)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=device)
    sizes = dict(kernel_size=size, kernel_stride=size)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, cu_seqlens, T, return_lse=True, **sizes)
    _, scores = ops.select_blocks(
        q,
        k_cmp,
        lse,
        cu_seqlens,
        T,
        block_size=size,
        num_selected_blocks=3,
        return_scores=True,
        backend=backend,
        **sizes,
    )
    sees_a_window = torch.arange(T) >= size - 1
    # Float32 weights that sum to 1 per head.
    torch.testing.assert_close(
        scores.sum(-1)[:, 0].cpu(), sees_a_window * float(G), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_scale(backend, scale):
    """The softmax scale reaches the scores: it equals scaled queries."""
    case = by_name("nine")
    x = make_inputs(case, widest_dtype(backend)[0], device=device_of(backend))
    _, lse = call("compressed_attention", case, x, scale=scale * case.scale)
    scaled = x.replace(q=x.q * scale)
    _, found = select(case, x, lse, backend, scale=scale * case.scale, return_scores=True)
    _, expected = select(
        case, scaled, call("compressed_attention", case, scaled)[1], backend, return_scores=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_lse_in_float64_with_narrower_queries(backend):
    """lse may be float32 or float64, whatever q is."""
    case = by_name("nine")
    x = make_inputs(case, torch.float32, device=device_of(backend))
    _, lse = call("compressed_attention", case, x)
    assert torch.equal(select(case, x, lse.double(), backend), select(case, x, lse, backend))


@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_rows_past_the_used_ones_select_nothing(backend):
    """seqused_k alone: query rows are key rows, and those past the used ones belong to
    no sequence.
    """
    case, used = by_name("empty_ends"), (0, 20, 0, 0, 64, 0)
    x = make_inputs(case, torch.float32, device=device_of(backend))
    extra = dict(seqused_k=torch.tensor(used, dtype=torch.int32, device=x.q.device))
    _, lse = call("compressed_attention", case, x, **extra)
    indices = select(case, x, lse, backend, **extra).cpu()
    is_used = torch.cat([torch.arange(n) < m for n, m in zip(case.lengths, used, strict=True)])
    assert (indices[~is_used] == -1).all()
    assert torch.equal(indices[is_used], select(case, x, lse, backend).cpu()[is_used])


@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_selection_carries_no_gradient(backend):
    case = by_name("nine")
    x = make_inputs(case, torch.float32, device=device_of(backend), requires_grad=True)
    indices, scores = choose(case, x, backend, return_scores=True)
    assert not indices.requires_grad
    assert not scores.requires_grad
