"""Row 6 of reliability.md: 200 random problems against tests/oracle.py,
reproducible from the blob that a failure prints.

And 15 for each other backend of selected attention against the reference.
PROPERTY_EXAMPLES=5000 in the environment asks for that many of each kind instead.
"""

import os
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_fsa import ops
from tests import oracle
from tests.cases import backends_of, device_of, on_a_gpu_only, widest_dtype


def examples(number):
    return settings(
        max_examples=int(os.environ.get("PROPERTY_EXAMPLES", number)),
        deadline=None,
        print_blob=True,
    )


FIFTY = examples(50)

CLOSE = dict(rtol=1e-9, atol=1e-10)  # float64, at most some hundred terms


@st.composite
def problems(draw):
    """Sequences, queries (all positions, or the last few over keys with gaps) and sizes;
    everything small.
    """
    lengths = draw(st.lists(st.integers(0, 14), max_size=4))
    stride = draw(st.sampled_from([1, 2, 3, 4]))
    kernel_size = stride * draw(st.integers(1, 3))
    block_size = max(kernel_size, stride * draw(st.integers(1, 4)))
    init_blocks, local_blocks = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    kv_heads, group_size = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    dim, v_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def ints(values):
        return torch.tensor(list(values), dtype=torch.int32)

    if draw(st.booleans()):
        num_queries = [draw(st.integers(0, n)) for n in lengths]
        capacities = [n + draw(st.integers(0, 5)) for n in lengths]
        layout = dict(
            cu_seqlens=ints(accumulate(capacities, initial=0)),
            cu_seqlens_q=ints(accumulate(num_queries, initial=0)),
            seqused_k=ints(lengths),
        )
    else:
        num_queries = capacities = lengths
        layout = dict(
            cu_seqlens=ints(accumulate(lengths, initial=0)), cu_seqlens_q=None, seqused_k=None
        )
    total = sum(capacities)
    starts = layout["cu_seqlens"].tolist()
    used = [starts[b] + i for b, n in enumerate(lengths) for i in range(n)]
    windows = dict(kernel_size=kernel_size, kernel_stride=stride)
    owned = sorted(oracle.windows(starts, **windows, seqused_k=layout["seqused_k"]))

    def with_nan(x, rows):
        result = torch.full_like(x, torch.nan)
        result[rows] = x[rows]
        return result.requires_grad_()

    num_selected = max(1, init_blocks + local_blocks) + draw(st.integers(0, 3))
    return dict(
        q=randn(sum(num_queries), kv_heads * group_size, dim).requires_grad_(),
        k=with_nan(randn(total, kv_heads, dim), used),
        v=with_nan(randn(total, kv_heads, v_dim), used),
        k_cmp=with_nan(randn(total // stride, kv_heads, dim), owned),
        v_cmp=with_nan(randn(total // stride, kv_heads, v_dim), owned),
        weight=randn(kv_heads, kernel_size).requires_grad_(),
        block_indices=torch.randint(
            -2,
            6,
            (sum(num_queries), kv_heads, num_selected),
            generator=generator,
            dtype=torch.int32,
        ),
        layout=layout,
        max_seqlen=max(capacities, default=0) + draw(st.integers(0, 20)),
        owned=owned,
        windows=windows,
        block_size=block_size,
        blocks=dict(
            block_size=block_size,
            num_selected_blocks=num_selected,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
        ),
        window_size=draw(st.integers(1, 20)),
        scale=draw(st.sampled_from([0.1, 1.0, 2.5])),
    )


def compare(found, expected, leaves, rows=slice(None)):
    """Outputs, and gradients with respect to the leaves."""
    torch.testing.assert_close(found[rows], expected[rows], **CLOSE)
    do = torch.zeros_like(expected)
    do[rows] = torch.randn_like(expected[rows])
    grads = torch.autograd.grad(found, leaves, do)
    if expected.requires_grad:
        grads_expected = torch.autograd.grad(
            expected, leaves, do, allow_unused=True, materialize_grads=True, retain_graph=True
        )
    else:  # no query sees any key
        grads_expected = [torch.zeros_like(leaf) for leaf in leaves]
    for grad, grad_expected in zip(grads, grads_expected, strict=True):
        torch.testing.assert_close(grad, grad_expected, **CLOSE)


@given(problems())
@FIFTY
def test_compression_and_compressed_attention(p):
    kv = dict(seqused_k=p["layout"]["seqused_k"], **p["windows"])
    cu_seqlens = p["layout"]["cu_seqlens"]
    for weight in (None, p["weight"]):
        leaves = [p["k"]] if weight is None else [p["k"], weight]
        pooled = ops.pool_windows(p["k"], weight, cu_seqlens, p["max_seqlen"], **kv)
        compare(pooled, oracle.oracle_pool(p["k"], weight, cu_seqlens, **kv), leaves, p["owned"])
    gathered = ops.gather_windows(p["k"], cu_seqlens, p["max_seqlen"], **kv)
    compare(gathered, oracle.oracle_gather(p["k"], cu_seqlens, **kv), [p["k"]])

    tensors = (p["q"], p["k_cmp"], p["v_cmp"])
    common = dict(scale=p["scale"], **p["windows"], **p["layout"])
    o, lse = ops.compressed_attention(
        *tensors, max_seqlen=p["max_seqlen"], return_lse=True, **common
    )
    expected, lse_expected = oracle.oracle_compressed(*tensors, **common)
    torch.testing.assert_close(lse, lse_expected.detach(), **CLOSE)
    compare(o, expected, tensors)


@given(problems())
@FIFTY
def test_selection(p):
    common = dict(scale=p["scale"], **p["windows"], **p["layout"])
    lse = oracle.oracle_compressed(p["q"], p["k_cmp"], p["v_cmp"], **common)[1].detach()
    indices, scores = ops.select_blocks(
        p["q"],
        p["k_cmp"],
        lse,
        max_seqlen=p["max_seqlen"],
        return_scores=True,
        **p["blocks"],
        **common,
    )
    expected = oracle.oracle_block_scores(
        p["q"], p["k_cmp"], p["max_seqlen"], block_size=p["block_size"], **common
    ).detach()
    torch.testing.assert_close(scores, expected, **CLOSE)
    # Equal to rounding, scores may still be ordered differently;
    # from the operator's own scores the choice is exact.
    assert torch.equal(indices, oracle.oracle_select(scores, **p["blocks"], **p["layout"]))


@given(problems())
@FIFTY
def test_selected_attention(p):
    tensors = (p["q"], p["k"], p["v"], p["block_indices"])
    common = dict(block_size=p["block_size"], scale=p["scale"])
    counts = torch.randint(-1, 6, p["block_indices"].shape[:2], dtype=torch.int32)
    for block_counts in (None, 2, counts):
        common["block_counts"] = block_counts
        o, lse = ops.selected_attention(
            *tensors, max_seqlen=p["max_seqlen"], return_lse=True, **common, **p["layout"]
        )
        expected, lse_expected = oracle.oracle_selected(*tensors, **common, **p["layout"])
        torch.testing.assert_close(lse, lse_expected.detach(), **CLOSE)
        compare(o, expected, tensors[:3])


@given(problems())
@FIFTY
def test_sliding_window_and_the_whole(p):
    layout, max_seqlen, scale = p["layout"], p["max_seqlen"], p["scale"]
    q, k, v = tensors = (p["q"], p["k"], p["v"])
    o, lse = ops.sliding_window_attention(
        *tensors,
        max_seqlen=max_seqlen,
        window_size=p["window_size"],
        scale=scale,
        return_lse=True,
        **layout,
    )
    o_swa, lse_expected = oracle.oracle_sliding(
        *tensors, window_size=p["window_size"], scale=scale, **layout
    )
    torch.testing.assert_close(lse, lse_expected.detach(), **CLOSE)
    compare(o, o_swa, tensors)

    gates = torch.randn(
        q.shape[0], q.shape[1] if scale > 1 else 1, 3, dtype=torch.float64, requires_grad=True
    )
    k_cmp, v_cmp = p["k_cmp"], p["v_cmp"]
    o, branches = ops.nsa_attention(
        q, k, v, k_cmp, v_cmp, gates, max_seqlen=max_seqlen, window_size=p["window_size"],
        scale=scale, return_branches=True, **p["windows"], **p["blocks"], **layout,
    )  # fmt: skip
    o_cmp, _ = oracle.oracle_compressed(q, k_cmp, v_cmp, scale=scale, **p["windows"], **layout)
    scores = oracle.oracle_block_scores(
        q, k_cmp, max_seqlen, block_size=p["block_size"], scale=scale, **p["windows"], **layout
    )
    best = oracle.oracle_select(scores.detach(), **p["blocks"], **layout)
    # Scores that tie in exact arithmetic may be ordered by rounding: the choice must score as well
    # as the oracle's, and the oracle then follows it. test_selection judges the choice itself.
    # a last column of 0, where index -1 points.
    padded = torch.nn.functional.pad(scores.detach(), (0, 1))
    chosen = branches.block_indices
    totals = [
        padded.gather(2, indices.long() % padded.shape[2]).sum(-1) for indices in (chosen, best)
    ]
    torch.testing.assert_close(*totals, **CLOSE)
    o_slc, _ = oracle.oracle_selected(
        q, k, v, chosen, block_size=p["block_size"], scale=scale, **layout
    )
    compare(o, oracle.oracle_gated(gates, o_cmp, o_slc, o_swa), (q, k, v, k_cmp, v_cmp, gates))


@st.composite
def kernel_problems(draw):
    """Selected attention as the Triton kernels take it: whole sequences,
    blocks of 16 keys and more, promises that hold.
    """
    lengths = draw(st.lists(st.integers(0, 9), max_size=2)) + [draw(st.integers(1, 35))]
    block_size = draw(st.sampled_from([16, 32]))
    init_blocks = draw(st.integers(0, 2))
    local_blocks = draw(st.integers(0, 2))
    free = draw(st.integers(0, 3))
    kv_heads, group_size = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    dim, v_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    total = sum(lengths)
    t = torch.cat([torch.arange(n) for n in lengths])[:, None]
    own = t // block_size
    promised = torch.cat(
        [torch.arange(init_blocks).expand(total, -1), own - torch.arange(local_blocks)], dim=1
    ).long()
    others = torch.randint(-2, 5, (total, kv_heads, free), generator=generator)
    indices = torch.cat([promised[:, None].expand(-1, kv_heads, -1), others], dim=2)
    counts = draw(st.sampled_from([None, "int", "tensor"]))
    if counts == "int":
        counts = draw(st.integers(promised.shape[1], indices.shape[2] + 1))
    elif counts == "tensor":
        counts = torch.randint(
            promised.shape[1], indices.shape[2] + 2, (total, kv_heads), generator=generator
        ).int()
    else:  # in any order
        indices = indices.gather(2, torch.rand(indices.shape, generator=generator).argsort(2))
    return dict(
        tensors=(
            randn(total, kv_heads * group_size, dim),
            randn(total, kv_heads, dim),
            randn(total, kv_heads, v_dim),
        ),
        block_indices=indices.int(),
        cu_seqlens=torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32),
        max_seqlen=max(lengths) + draw(st.integers(0, 20)),
        block_counts=counts,
        scale=draw(st.sampled_from([0.1, 0.3, 1.0])),
        forced=dict(init_blocks=init_blocks, local_blocks=local_blocks),
        block_size=block_size,
        workspace_bytes=draw(st.sampled_from([1, 20_000, 2**30])),
        do=randn(total, kv_heads * group_size, v_dim),
    )


@pytest.mark.parametrize(
    "backend", [b for b in backends_of("selected_attention") if b.values[0] != "reference"]
)
@given(p=kernel_problems())
@examples(15)
def test_selected_attention_kernels(backend, p):
    on_a_gpu_only(backend)
    device, (dtype, rounding) = device_of(backend), widest_dtype(backend)

    def run(device, dtype, backend):
        q, k, v = (x.to(device, dtype, copy=True).requires_grad_() for x in p["tensors"])
        counts = (
            p["block_counts"].to(device)
            if isinstance(p["block_counts"], torch.Tensor)
            else p["block_counts"]
        )
        o, lse = ops.selected_attention(
            q, k, v, p["block_indices"].to(device), p["cu_seqlens"].to(device), p["max_seqlen"],
            block_size=p["block_size"], block_counts=counts, scale=p["scale"],
            workspace_bytes=p["workspace_bytes"], return_lse=True, backend=backend, **p["forced"],
        )  # fmt: skip
        return [
            x.detach().cpu().double()
            for x in (o, lse, *torch.autograd.grad(o, (q, k, v), p["do"].to(o)))
        ]

    found, expected = run(device, dtype, backend), run("cpu", torch.float64, "reference")
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        # Sums of some hundred products of numbers around 1, so of some size;
        # rounding is relative to that.
        close = 10 * rounding
        size = max(1.0, float(b.nan_to_num(neginf=0).abs().max()))
        torch.testing.assert_close(
            a, b, rtol=close, atol=close * size, msg=lambda m, name=name: f"{name}: {m}"
        )


@st.composite
def window_problems(draw):
    """Windows of sequences of which some rows may be unused; widths on both sides of powers of two,
    every layout of rows.
    """
    lengths = draw(st.lists(st.integers(0, 9), max_size=3)) + [draw(st.integers(1, 40))]
    stride = draw(st.integers(1, 5))
    heads, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 16, 33, 130, 256]))
    kernel_size = stride * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = draw(st.permutations(range(3)))  # of the axes in memory

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = (
        randn(sum(lengths), heads, dim)
        .permute(order)
        .contiguous()
        .permute(*torch.tensor(order).argsort().tolist())
    )
    used = [draw(st.integers(0, n)) for n in lengths] if draw(st.booleans()) else None
    return dict(
        x=x,
        weight=draw(st.sampled_from([None, randn(heads, kernel_size)])),
        cu_seqlens=torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32),
        max_seqlen=max(lengths),
        seqused_k=None if used is None else torch.tensor(used, dtype=torch.int32),
        windows=dict(kernel_size=kernel_size, kernel_stride=stride),
        dpooled=randn(len(x) // stride, heads, dim),
        dwindows=randn(len(x) // stride, heads, kernel_size, dim),
    )


@pytest.mark.parametrize(
    "backend", [b for b in backends_of("pool_windows") if b.values[0] != "reference"]
)
@given(p=window_problems())
@examples(15)
def test_window_kernels(backend, p):
    device, (dtype, rounding) = device_of(backend), widest_dtype(backend)
    owned = sorted(
        oracle.windows(p["cu_seqlens"].tolist(), **p["windows"], seqused_k=p["seqused_k"])
    )

    def run(device, dtype, backend):
        tensors = [
            x if x is None else x.to(device, dtype, copy=True).requires_grad_()
            for x in (p["x"], p["weight"])
        ]
        x, leaves = tensors[0], [t for t in tensors if t is not None]
        used = None if p["seqused_k"] is None else p["seqused_k"].to(device)
        packed = (p["cu_seqlens"].to(device), p["max_seqlen"])
        pooled = ops.pool_windows(
            *tensors, *packed, **p["windows"], seqused_k=used, backend=backend
        )
        gathered = ops.gather_windows(x, *packed, **p["windows"], seqused_k=used, backend=backend)
        grads = (
            *torch.autograd.grad(pooled, leaves, p["dpooled"].to(pooled)),
            *torch.autograd.grad(gathered, x, p["dwindows"].to(x)),
        )
        return [t.detach().cpu().double() for t in (pooled[owned], gathered, *grads)]

    for number, (a, b) in enumerate(
        zip(run(device, dtype, backend), run("cpu", torch.float64, "reference"), strict=True)
    ):
        # Sums of up to some thousand products of numbers around 1;
        # rounding is relative to their size.
        close = 10 * rounding
        size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(
            a,
            b,
            rtol=close,
            atol=close * size,
            msg=lambda m, number=number: f"result {number}: {m}",
        )
