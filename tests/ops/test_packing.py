"""Row 5 of reliability.md: packed sequences, and queries that are only the last positions of
their sequences.
"""

import dataclasses
import functools
import math
import re
from itertools import accumulate, pairwise

import pytest
import torch

from tests import cases
from tests.oracle import windows

PER_TOKEN = ("q", "k", "v", "gate_logits", "o_cmp", "o_slc", "o_swa", "block_indices")
PER_COMPRESSED_TOKEN = ("k_cmp", "v_cmp")
COMPRESSED_OUTPUT = ("pool_windows", "gather_windows")


def rows_of(case, b):
    """Token rows and compressed rows of sequence b."""
    start, stop = list(pairwise(accumulate(case.lengths, initial=0)))[b]
    first = start // case.kernel_stride
    return slice(start, stop), slice(first, first + (stop - start) // case.kernel_stride)


def alone(case, x, b):
    """The inputs of sequence b on its own, as new leaves."""
    tokens, compressed = rows_of(case, b)
    x = x.replace(
        **{name: getattr(x, name)[tokens] for name in PER_TOKEN},
        **{name: getattr(x, name)[compressed] for name in PER_COMPRESSED_TOKEN},
        cu_seqlens=torch.tensor([0, case.lengths[b]], dtype=torch.int32, device=x.q.device),
        max_seqlen=case.lengths[b],
    )
    return x.to(x.q.dtype, requires_grad=x.q.requires_grad)


def random_output_gradient(operator, case, x, o):
    """Random; NaN in rows of pooled or gathered windows that no sequence owns,
    whose gradients must be ignored.
    """
    do = torch.randn_like(o)
    if operator in COMPRESSED_OUTPUT:
        owned = torch.zeros(o.shape[0], dtype=torch.bool)
        owned[sorted(windows(x.cu_seqlens, **case.windows))] = True
        do[~owned.to(do.device)] = torch.nan
    return do


@pytest.mark.parametrize("case", cases.SEVERAL_SEQUENCES, ids=str)
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_packed_equals_separate(operator, backend, case):
    cases.on_a_gpu_only(backend)
    dtype, rounding = cases.widest_dtype(backend)
    case = cases.case_for(operator, backend, case, calls=2, dtype=dtype)
    x = cases.make_inputs(case, dtype, device=cases.device_of(backend), requires_grad=True)
    result = cases.call(operator, case, x, backend)
    do = random_output_gradient(operator, case, x, cases.output(result))
    grads = cases.gradients(operator, cases.output(result), x, do)
    dweight = 0
    close = dict(rtol=rounding, atol=rounding)

    for b in range(len(case.lengths)):
        tokens, compressed = rows_of(case, b)
        x_alone = alone(case, x, b)
        result_alone = cases.call(operator, case, x_alone, backend)
        rows = compressed if operator in COMPRESSED_OUTPUT else tokens
        owned = (
            sorted(windows(x_alone.cu_seqlens, **case.windows))
            if operator in COMPRESSED_OUTPUT
            else slice(None)
        )
        torch.testing.assert_close(
            cases.output(result)[rows][owned], cases.output(result_alone)[owned], **close
        )
        if operator in cases.ATTENTIONS:
            torch.testing.assert_close(result[1][tokens], result_alone[1], **close)

        grads_alone = cases.gradients(operator, cases.output(result_alone), x_alone, do[rows])
        for name, grad, grad_alone in zip(
            cases.DIFFERENTIABLE[operator], grads, grads_alone, strict=True
        ):
            if name == "pool_weight":  # shared by the sequences
                dweight = dweight + grad_alone
                continue
            rows = compressed if name in PER_COMPRESSED_TOKEN else tokens
            torch.testing.assert_close(
                grad[rows], grad_alone, msg=lambda m, name=name: f"d{name}: {m}", **close
            )
    if operator == "pool_windows":
        torch.testing.assert_close(grads[1], dweight, rtol=100 * rounding, atol=100 * rounding)
    for name, grad in zip(cases.DIFFERENTIABLE[operator], grads, strict=True):
        if name in PER_COMPRESSED_TOKEN:
            assert (grad[getattr(x, name).isnan()] == 0).all(), (
                f"d{name} of a row that no token owns"
            )


def skip_what_is_slow_to_select(case, backend):
    """A tile of 32 rows takes the interpreter about 0.1 s where there is much to choose from."""
    if (
        backend != "reference"
        and cases.device_of(backend) == "cpu"
        and sum(case.lengths) * case.num_heads > 2300
    ):
        pytest.skip(f"{case.name} takes Triton's interpreter too long: on a GPU only")


@pytest.mark.parametrize("case", cases.SEVERAL_SEQUENCES, ids=str)
@pytest.mark.parametrize("backend", cases.backends_of("select_blocks"))
def test_packed_selection_equals_separate(backend, case):
    skip_what_is_slow_to_select(case, backend)
    x = cases.make_inputs(case, cases.widest_dtype(backend)[0], device=cases.device_of(backend))
    _, lse = cases.call("compressed_attention", case, x)
    indices, scores = cases.select(case, x, lse, backend, return_scores=True)
    for b in range(len(case.lengths)):
        tokens, _ = rows_of(case, b)
        alone_indices, alone_scores = cases.select(
            case, alone(case, x, b), lse[tokens], backend, return_scores=True
        )
        num_blocks = alone_scores.shape[2]
        torch.testing.assert_close(
            scores[tokens, :, :num_blocks], alone_scores, rtol=1e-5, atol=1e-6
        )
        assert (scores[tokens, :, num_blocks:] == 0).all()
        assert torch.equal(indices[tokens], alone_indices)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e4])
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_neighbours_do_not_matter(operator, backend, garbage):
    """Whatever stands in the other sequences, a sequence's outputs and gradients stay the
    same, bit by bit.
    """
    if backend == "flash_attn_4" and not math.isfinite(garbage):
        pytest.skip("FlashAttention 4 reads past a sequence's end, and 0 * NaN is NaN")
    if not math.isnan(garbage):
        cases.on_a_gpu_only(backend)
    case = cases.case_for(operator, backend, cases.by_name("five"), calls=2)
    kept = 2  # a sequence in the middle
    tokens, compressed = rows_of(case, kept)
    x = cases.make_inputs(case, device=cases.device_of(backend), requires_grad=True)
    before = cases.output(cases.call(operator, case, x, backend))
    do = torch.randn_like(before)
    rows = compressed if operator in COMPRESSED_OUTPUT else tokens
    do[: rows.start], do[rows.stop :] = 0, 0

    changed = x.to(case.dtype)
    for name in (*PER_TOKEN, *PER_COMPRESSED_TOKEN):
        mine = compressed if name in PER_COMPRESSED_TOKEN else tokens
        value = -5 if name == "block_indices" else garbage
        changed_rows = getattr(changed, name).clone()
        changed_rows[: mine.start], changed_rows[mine.stop :] = value, value
        setattr(changed, name, changed_rows.requires_grad_(name != "block_indices"))
    changed.pool_weight.requires_grad_()
    after = cases.output(cases.call(operator, case, changed, backend))
    assert torch.equal(after[rows], before[rows])

    grads = cases.gradients(operator, before, x, do)
    grads_changed = cases.gradients(operator, after, changed, do)
    for name, grad, grad_changed in zip(
        cases.DIFFERENTIABLE[operator], grads, grads_changed, strict=True
    ):
        if name != "pool_weight":  # sums over all sequences
            mine = compressed if name in PER_COMPRESSED_TOKEN else tokens
            assert torch.equal(grad[mine], grad_changed[mine]), f"d{name}"


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (1, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_nearly_nothing(operator, backend, lengths):
    """No sequence at all, no tokens at all, single tokens: forward and backward run and have the
    right shapes.
    """
    case = cases.case_for(
        operator, backend, dataclasses.replace(cases.by_name("nine"), lengths=lengths)
    )
    x = cases.make_inputs(
        case, cases.widest_dtype(backend)[0], device=cases.device_of(backend), requires_grad=True
    )
    o = cases.output(cases.call(operator, case, x, backend))
    grads = cases.gradients(operator, o, x, torch.ones_like(o))
    assert torch.isfinite(o).all()
    for name, grad in zip(cases.DIFFERENTIABLE[operator], grads, strict=True):
        assert grad.shape == getattr(x, name).shape
        assert torch.isfinite(grad).all()
    # One token attends to itself.
    if operator in ("selected_attention", "sliding_window_attention"):
        torch.testing.assert_close(o, x.v.repeat_interleave(case.group_size, dim=1))
    if operator == "compressed_attention":  # and sees no window
        assert (o == 0).all()
        assert (cases.call(operator, case, x, backend)[1] == -torch.inf).all()


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("backend", cases.backends_of("select_blocks"))
def test_nearly_nothing_to_select(backend, lengths):
    case = dataclasses.replace(cases.by_name("nine"), lengths=lengths)
    x = cases.make_inputs(case, torch.float32, device=cases.device_of(backend))
    indices, scores = cases.select(
        case, x, cases.call("compressed_attention", case, x)[1], backend, return_scores=True
    )
    assert indices.tolist() == [[[0, -1, -1]]] * sum(lengths)
    assert scores.shape == (sum(lengths), 1, max(lengths, default=0))


# --- Queries that are the last positions of their sequences, keys in a buffer with gaps -----------


def last_queries_of_gapped_buffer(case, x, num_queries, gaps):
    """The same sequences with only the last queries, and keys in a buffer whose gaps hold NaN.

    Returns the inputs, the extra arguments, and the full batch's rows of the queries,
    of the keys and of the compressed keys that the buffer holds, each with the buffer's own rows.
    """
    dtype, device, stride = x.q.dtype, x.q.device, case.kernel_stride
    capacities = [length + gap for length, gap in zip(case.lengths, gaps, strict=True)]
    cu_seqlens = list(accumulate(capacities, initial=0))
    full = list(accumulate(case.lengths, initial=0))
    cu_seqlens_q = torch.tensor(
        list(accumulate(num_queries, initial=0)), dtype=torch.int32, device=device
    )
    q_rows = [full[b + 1] - n + i for b, n in enumerate(num_queries) for i in range(n)]
    key_rows = [
        (full[b] + i, cu_seqlens[b] + i) for b, n in enumerate(case.lengths) for i in range(n)
    ]
    compressed_rows = [
        (full[b] // stride + i, cu_seqlens[b] // stride + i)
        for b, n in enumerate(case.lengths)
        for i in range((n - case.kernel_size) // stride + 1 if n >= case.kernel_size else 0)
    ]

    def buffer(name, rows, size):
        values = getattr(x, name).detach()
        result = torch.full((size, *values.shape[1:]), torch.nan, dtype=dtype, device=device)
        result[[there for _, there in rows]] = values[[here for here, _ in rows]]
        return result

    inputs = x.replace(
        **{
            name: getattr(x, name).detach()[q_rows]
            for name in ("q", "gate_logits", "block_indices")
        },
        **{name: buffer(name, key_rows, cu_seqlens[-1]) for name in ("k", "v")},
        **{
            name: buffer(name, compressed_rows, cu_seqlens[-1] // stride)
            for name in PER_COMPRESSED_TOKEN
        },
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32, device=device),
        max_seqlen=max(capacities),
    ).to(dtype, requires_grad=True)
    extra = dict(
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=torch.tensor(case.lengths, dtype=torch.int32, device=device),
    )
    return inputs, extra, q_rows, key_rows, compressed_rows


GAPPED = [
    # name, how many of the last positions are queries, unused rows after each sequence
    ("empty_ends", lambda n: min(n, 1), lambda b: 5),  # decoding
    ("empty_ends", lambda n: n // 2, lambda b: 0),  # chunked prefill without gaps
    ("nine", lambda n: n, lambda b: 3 * b + 1),  # everything is a query
    ("nine", lambda n: n % 4, lambda b: b % 2 * 11),
    ("packed_nine", lambda n: min(n, 2), lambda b: 37 - b),
    ("nine_bf16", lambda n: 0, lambda b: 4),  # nobody asks
]
# The whole also takes the loop orders of selected attention by name.
LOOP_ORDERS = [
    pytest.param("nsa_attention", *x.values, marks=x.marks, id=f"nsa_attention-{x.values[0]}")
    for x in cases.backends_of("selected_attention")
    if x.values[0] not in cases.BACKENDS["compressed_attention"].by_name
]


@pytest.mark.parametrize(("name", "num_queries", "gap"), GAPPED, ids=range(len(GAPPED)))
@pytest.mark.parametrize(
    ("operator", "backend"),
    cases.operators_and_backends(*cases.ATTENTIONS, "nsa_attention") + LOOP_ORDERS,
)
def test_last_queries_over_gapped_keys(operator, backend, name, num_queries, gap):
    case = cases.case_for(operator, backend, cases.by_name(name), calls=0)  # few of its queries
    dtype, rounding = cases.widest_dtype(backend)
    x = cases.make_inputs(case, dtype, device=cases.device_of(backend), requires_grad=True)
    few, extra, q_rows, key_rows, compressed_rows = last_queries_of_gapped_buffer(
        case, x, [num_queries(n) for n in case.lengths], [gap(b) for b in range(len(case.lengths))]
    )
    run = functools.partial(cases.call, operator, case, few, **extra)
    if cases.is_refused(operator, backend, run):
        return
    result = cases.call(operator, case, x, "reference")
    result_few = run(backend)
    o, o_few = cases.output(result), cases.output(result_few)
    # Sums over the queries arrive in another order.
    close = dict(rtol=10 * rounding, atol=10 * rounding)
    torch.testing.assert_close(o_few, o[q_rows], **close)
    if operator in cases.ATTENTIONS:
        torch.testing.assert_close(result_few[1], result[1][q_rows], **close)

    do_few = torch.randn_like(o_few)
    if reason := cases.refusal(operator, backend, run, backward=True):
        with pytest.raises(ValueError, match=f"{re.escape(reason)}.*Fix"):
            cases.gradients(operator, o_few, few, do_few)
        return
    do = torch.zeros_like(o)
    do[q_rows] = do_few
    grads, grads_few = (
        cases.gradients(operator, o, x, do),
        cases.gradients(operator, o_few, few, do_few),
    )
    for name, grad, grad_few in zip(cases.DIFFERENTIABLE[operator], grads, grads_few, strict=True):
        if name in ("q", "gate_logits"):
            torch.testing.assert_close(grad_few, grad[q_rows], **close)
            continue
        rows = compressed_rows if name in PER_COMPRESSED_TOKEN else key_rows
        here, there = [a for a, _ in rows], [b for _, b in rows]
        torch.testing.assert_close(
            grad_few[there], grad[here], msg=lambda m, name=name: f"d{name}: {m}", **close
        )
        unused = torch.ones(grad_few.shape[0], dtype=torch.bool)
        unused[there] = False
        assert (grad_few[unused.to(grad_few.device)] == 0).all(), (
            f"d{name} of rows that nobody owns"
        )


@pytest.mark.parametrize(("name", "num_queries", "gap"), GAPPED, ids=range(len(GAPPED)))
@pytest.mark.parametrize("backend", cases.backends_of("select_blocks"))
def test_selection_for_last_queries_over_gapped_keys(backend, name, num_queries, gap):
    case = cases.by_name(name)
    skip_what_is_slow_to_select(case, backend)
    dtype, _ = cases.widest_dtype(backend)
    x = cases.make_inputs(case, dtype, device=cases.device_of(backend))
    few, extra, q_rows, *_ = last_queries_of_gapped_buffer(
        case, x, [num_queries(n) for n in case.lengths], [gap(b) for b in range(len(case.lengths))]
    )
    _, lse = cases.call("compressed_attention", case, x)
    indices, scores = cases.select(case, x, lse, backend, return_scores=True)
    indices_few, scores_few = cases.select(
        case, few, lse[q_rows], backend, return_scores=True, **extra
    )
    assert torch.equal(indices_few, indices[q_rows])
    num_blocks = min(scores.shape[2], scores_few.shape[2])
    torch.testing.assert_close(
        scores_few[..., :num_blocks], scores[q_rows][..., :num_blocks], rtol=1e-5, atol=1e-6
    )
    assert (scores_few[..., num_blocks:] == 0).all()


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends(*COMPRESSED_OUTPUT))
def test_windows_of_gapped_keys(operator, backend):
    """Windows of the used rows only: windows that reach into a gap do not exist."""
    case = cases.by_name("nine")
    dtype, rounding = cases.widest_dtype(backend)
    x = cases.make_inputs(case, dtype, device=cases.device_of(backend), requires_grad=True)
    gaps = [b % 2 * 11 for b in range(len(case.lengths))]
    few, extra, _, key_rows, compressed_rows = last_queries_of_gapped_buffer(
        case, x, case.lengths, gaps
    )
    here, there = [a for a, _ in compressed_rows], [b for _, b in compressed_rows]
    o = cases.call(operator, case, x, backend)
    o_few = cases.call(operator, case, few, backend, seqused_k=extra["seqused_k"])
    torch.testing.assert_close(o_few[there], o[here], rtol=rounding, atol=rounding)

    do, do_few = torch.full_like(o, torch.nan), torch.full_like(o_few, torch.nan)
    do[here] = torch.randn_like(o[here])
    do_few[there] = do[here]
    grads, grads_few = (
        cases.gradients(operator, o, x, do),
        cases.gradients(operator, o_few, few, do_few),
    )
    torch.testing.assert_close(
        grads_few[0][[b for _, b in key_rows]], grads[0][[a for a, _ in key_rows]]
    )
    gap_rows = few.k.isnan()
    assert (grads_few[0][gap_rows] == 0).all()
    if operator == "pool_windows":
        torch.testing.assert_close(grads_few[1], grads[1])


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends(*cases.ATTENTIONS))
def test_unused_query_rows(operator, backend):
    """With seqused_k alone, queries share the keys' rows; those past the used ones see nothing."""
    case = cases.case_for(operator, backend, cases.by_name("empty_ends"), calls=0)  # forward only
    dtype, rounding = cases.widest_dtype(backend)
    x = cases.make_inputs(case, dtype, device=cases.device_of(backend))
    used = torch.tensor([0, 20, 0, 0, 64, 0], dtype=torch.int32, device=x.q.device)
    run = functools.partial(cases.call, operator, case, x, seqused_k=used)
    if cases.is_refused(operator, backend, run):
        return
    o, lse = run(backend)
    o_full, lse_full = cases.call(operator, case, x, "reference")
    unused = slice(20, 33)
    assert (o[unused] == 0).all()
    assert (lse[unused] == -torch.inf).all()
    for rows in (slice(0, 20), slice(33, None)):
        torch.testing.assert_close(o[rows], o_full[rows], rtol=rounding, atol=rounding)
        torch.testing.assert_close(lse[rows], lse_full[rows], rtol=rounding, atol=rounding)
