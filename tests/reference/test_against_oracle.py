"""nsa_fsa.reference in float64 against tests/oracle.py, which reads spec.md one query at a time,
and against autograd.
"""

import dataclasses

import pytest
import torch

from nsa_fsa import reference
from nsa_fsa.ops.common import reference_chunks as sequences
from tests import oracle
from tests.cases import (
    CASES,
    DIFFERENTIABLE,
    SMALL_CASES,
    Case,
    by_name,
    call,
    gradients,
    make_inputs,
    output,
)
from tests.naive import naive_call

# Float64 against float64: both sides round at 1e-16, and some hundred terms are summed.
CLOSE = dict(rtol=1e-10, atol=1e-11)

# Small enough for gradcheck, which runs an operator twice per input number;
# an empty sequence and unowned rows included.
TINY = Case("tiny", (5, 0, 9), 2, 2, 3, 2, torch.float64, 4, 2, 4, 2, 1, 1, 3, seed=0, small=True)

# The reference's functions and their backwards.
FORWARDS = {
    "compressed_attention": (
        reference.compressed_attention,
        reference.compressed_attention_backward,
    ),
    "selected_attention": (reference.selected_attention, reference.selected_attention_backward),
    "sliding_window_attention": (
        reference.sliding_window_attention,
        reference.sliding_window_attention_backward,
    ),
    "gated_combine": (reference.gated_combine, reference.gated_combine_backward),
    "pool_windows": (reference.pool_windows, reference.pool_windows_backward),
    "gather_windows": (reference.gather_windows, reference.gather_windows_backward),
}


def arguments(operator, case, x):
    """The positional and keyword arguments that a function of nsa_fsa.reference takes."""
    tensors = [getattr(x, name) for name in DIFFERENTIABLE[operator]]
    packed = (x.cu_seqlens, x.max_seqlen)
    if operator == "compressed_attention":
        return (*tensors, *packed), dict(scale=case.scale, **case.windows)
    if operator == "selected_attention":
        return (*tensors, x.block_indices, *packed), dict(
            scale=case.scale, block_size=case.block_size
        )
    if operator == "sliding_window_attention":
        return (*tensors, *packed), dict(scale=case.scale, window_size=case.window_size)
    if operator == "gated_combine":
        return tensors, {}
    return (*tensors, x.cu_seqlens), case.windows


def run_reference(operator, case, x):
    positional, keywords = arguments(operator, case, x)
    return FORWARDS[operator][0](*positional, **keywords)


def run_backward(operator, case, x, do, result):
    positional, keywords = arguments(operator, case, x)
    if isinstance(result, tuple):  # an attention: its backward is given o and lse after q, k, v
        positional = (*positional[:3], *result, *positional[3:])
    grads = FORWARDS[operator][1](do, *positional, **keywords)
    return grads if isinstance(grads, tuple) else (grads,)


def run_oracle(operator, case, x):
    attention = dict(scale=case.scale, cu_seqlens=x.cu_seqlens)
    if operator == "compressed_attention":
        return oracle.oracle_compressed(x.q, x.k_cmp, x.v_cmp, **case.windows, **attention)
    if operator == "selected_attention":
        return oracle.oracle_selected(
            x.q, x.k, x.v, x.block_indices, block_size=case.block_size, **attention
        )
    if operator == "sliding_window_attention":
        return oracle.oracle_sliding(x.q, x.k, x.v, window_size=case.window_size, **attention)
    if operator == "gated_combine":
        return oracle.oracle_gated(x.gate_logits, x.o_cmp, x.o_slc, x.o_swa)
    if operator == "pool_windows":
        return oracle.oracle_pool(x.k, x.pool_weight, x.cu_seqlens, **case.windows)
    return oracle.oracle_gather(x.k, x.cu_seqlens, **case.windows)


def owned_rows(operator, case, x, o):
    """The rows of the output that mean something: unowned rows of pool_windows are unspecified."""
    if operator == "pool_windows":
        return sorted(oracle.windows(x.cu_seqlens, **case.windows))
    return slice(0, o.shape[0])


def random_gradient(o, rows):
    """A random output gradient, NaN in the rows outside `rows`: what flows into unowned rows
    must be ignored.
    """
    do = torch.full_like(o, torch.nan)
    do[rows] = torch.randn_like(o[rows])
    return do.detach()


def compare_gradients(operator, found, expected, **tolerance):
    for name, a, b in zip(DIFFERENTIABLE[operator], found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"d{name}: {m}", **tolerance)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
@pytest.mark.parametrize("operator", FORWARDS)
def test_outputs_and_gradients(operator, case):
    x = make_inputs(case, torch.float64, requires_grad=True)
    result, expected = run_reference(operator, case, x), run_oracle(operator, case, x)
    o, o_expected = output(result), output(expected)
    rows = owned_rows(operator, case, x, o)
    torch.testing.assert_close(o[rows], o_expected[rows], **CLOSE)
    if isinstance(result, tuple):
        torch.testing.assert_close(result[1], expected[1].detach(), **CLOSE)

    do = random_gradient(o, rows).nan_to_num(0)
    compare_gradients(
        operator, gradients(operator, o, x, do), gradients(operator, o_expected, x, do), **CLOSE
    )


def test_mean_pooling_is_the_weight_one_over_l():
    case = by_name("empty_ends")
    x = make_inputs(case, torch.float64)
    rows = sorted(oracle.windows(x.cu_seqlens, **case.windows))
    pooled = reference.pool_windows(x.k, None, x.cu_seqlens, **case.windows)
    torch.testing.assert_close(
        pooled[rows], oracle.oracle_pool(x.k, None, x.cu_seqlens, **case.windows)[rows], **CLOSE
    )


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_scores_and_selection(case):
    x = make_inputs(case, torch.float64)
    layout = dict(scale=case.scale, block_size=case.block_size, **case.windows)
    _, lse = run_oracle("compressed_attention", case, x)
    scores = reference.block_scores(x.q, x.k_cmp, lse, x.cu_seqlens, x.max_seqlen, **layout)
    expected = oracle.oracle_block_scores(
        x.q, x.k_cmp, x.max_seqlen, cu_seqlens=x.cu_seqlens, **layout
    )
    torch.testing.assert_close(scores, expected, **CLOSE)

    indices = reference.select_blocks(
        x.q,
        x.k_cmp,
        lse,
        x.cu_seqlens,
        x.max_seqlen,
        scale=case.scale,
        **case.blocks,
        **case.windows,
    )
    # Random scores of different blocks differ by far more than the rounding of float64,
    # except those that are exactly 0.
    assert torch.equal(
        indices, oracle.oracle_select(expected, cu_seqlens=x.cu_seqlens, **case.blocks)
    )


@pytest.mark.parametrize("case", [case for case in CASES if not case.small], ids=str)
@pytest.mark.parametrize("operator", FORWARDS)
def test_large_cases_against_dense_masks(operator, case):
    """The cases too large for tests/oracle.py, where the reference itself serves as oracle,
    get a second opinion.
    """
    x = make_inputs(case, torch.float64, requires_grad=True)
    result, expected = run_reference(operator, case, x), naive_call(operator, case, x)
    o = output(result).detach()
    rows = owned_rows(operator, case, x, o)
    torch.testing.assert_close(o[rows], expected[rows].detach(), **CLOSE)
    do = random_gradient(o, rows)
    found = run_backward(operator, case, x, do, result)
    expected = gradients(operator, expected, x, do.nan_to_num(0))
    compare_gradients(operator, found, expected, **CLOSE)


@pytest.mark.parametrize(
    "case",
    [TINY, *(by_name(name) for name in ("t17", "t31_stride1", "empty_ends", "nine"))],
    ids=str,
)
@pytest.mark.parametrize("operator", FORWARDS)
def test_backward_functions_against_autograd(operator, case):
    x = make_inputs(case, torch.float64, requires_grad=True)
    result = run_reference(operator, case, x)
    do = random_gradient(output(result), owned_rows(operator, case, x, output(result)))
    expected = gradients(operator, output(result), x, do.nan_to_num(0))
    compare_gradients(
        operator, run_backward(operator, case, x, do, result), expected, rtol=1e-9, atol=1e-12
    )


def test_mean_pooling_backward_against_autograd():
    case = by_name("empty_ends")
    x = make_inputs(case, torch.float64, requires_grad=True)
    pooled = reference.pool_windows(x.k, None, x.cu_seqlens, **case.windows)
    do = random_gradient(pooled, sorted(oracle.windows(x.cu_seqlens, **case.windows)))
    dk, dweight = reference.pool_windows_backward(do, x.k, None, x.cu_seqlens, **case.windows)
    assert dweight is None
    torch.testing.assert_close(
        dk, torch.autograd.grad(pooled, x.k, do.nan_to_num(0))[0], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("implementation", ["reference", "operator"])
@pytest.mark.parametrize("operator", [name for name in DIFFERENTIABLE if name != "nsa_attention"])
def test_gradcheck(operator, implementation):
    """The reference through autograd, and the registered operator through its
    hand-written backward.
    """
    x = make_inputs(TINY, torch.float64, requires_grad=True)
    names = DIFFERENTIABLE[operator]

    def function(*tensors):
        changed = x.replace(**dict(zip(names, tensors, strict=True)))
        if implementation == "reference":
            return output(run_reference(operator, TINY, changed))
        return output(call(operator, TINY, changed, "reference"))

    assert torch.autograd.gradcheck(function, [getattr(x, name) for name in names])


def test_gradcheck_of_mean_pooling():
    x = make_inputs(TINY, torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda k: call("pool_windows", TINY, x.replace(k=k, pool_weight=None), "reference"), [x.k]
    )


def test_gradcheck_of_the_whole():
    """Selection is held fixed by choosing every block: it is not continuous in its inputs."""
    case = dataclasses.replace(TINY, num_selected_blocks=3)
    x = make_inputs(case, torch.float64, requires_grad=True)
    names = DIFFERENTIABLE["nsa_attention"]
    assert torch.autograd.gradcheck(
        lambda *tensors: call(
            "nsa_attention", case, x.replace(**dict(zip(names, tensors, strict=True))), "reference"
        ),
        [getattr(x, name) for name in names],
    )


@pytest.mark.parametrize("budget", [1, 64, 1000])
@pytest.mark.parametrize("case", [by_name(name) for name in ("t63", "empty_ends", "nine")], ids=str)
@pytest.mark.parametrize(
    "operator", ["compressed_attention", "selected_attention", "sliding_window_attention"]
)
def test_chunks_do_not_show(monkeypatch, operator, case, budget):
    """Working through the queries one by one, a few or many at a time gives the same."""
    x = make_inputs(case, torch.float64, requires_grad=True)
    result = run_reference(operator, case, x)
    do = torch.randn_like(result[0])
    expected = [*result, *gradients(operator, result[0], x, do)]

    monkeypatch.setattr(sequences, "MAX_CHUNK_SCORES", budget)
    result = run_reference(operator, case, x)
    for a, b in zip([*result, *gradients(operator, result[0], x, do)], expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(run_backward(operator, case, x, do, result), expected[2:], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("budget", [1, 64])
def test_chunks_do_not_show_in_the_selection(monkeypatch, budget):
    case = by_name("nine")
    x = make_inputs(case, torch.float64)
    lse = run_reference("compressed_attention", case, x)[1]
    scored = dict(scale=case.scale, block_size=case.block_size, **case.windows)
    chosen = dict(scale=case.scale, **case.blocks, **case.windows)
    scores = reference.block_scores(x.q, x.k_cmp, lse, x.cu_seqlens, x.max_seqlen, **scored)
    indices = reference.select_blocks(x.q, x.k_cmp, lse, x.cu_seqlens, x.max_seqlen, **chosen)
    monkeypatch.setattr(sequences, "MAX_CHUNK_SCORES", budget)
    torch.testing.assert_close(
        reference.block_scores(x.q, x.k_cmp, lse, x.cu_seqlens, x.max_seqlen, **scored),
        scores,
        **CLOSE,
    )
    assert torch.equal(
        reference.select_blocks(x.q, x.k_cmp, lse, x.cu_seqlens, x.max_seqlen, **chosen), indices
    )


def test_the_table_covers_what_reliability_asks():
    """Row 4 of reliability.md: every value in at least two cases; row 5:
    the odd batches in at least one.
    """

    def counts(values, of):
        return {value: sum(value in of(case) for case in CASES) for value in values}

    for values, of in [
        ((1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 200, 1000, 2048), lambda case: case.lengths),
        ((1, 2, 3, 4, 5, 7, 8, 12, 16), lambda case: (case.group_size,)),
        ((32, 64, 80, 96, 128, 192, 256), lambda case: (case.head_dim,)),
        ((torch.float16, torch.bfloat16, torch.float32), lambda case: (case.dtype,)),
        ((16, 32, 64, 128), lambda case: (case.block_size,)),
        ((True,), lambda case: (case.head_dim != case.v_head_dim,)),
        ((1, 9), lambda case: (len(case.lengths),)),
        ((True,), lambda case: (0 in case.lengths,)),
        ((True,), lambda case: (any(0 < n < case.kernel_size for n in case.lengths),)),
        ((True,), lambda case: (any(0 < n < case.block_size for n in case.lengths),)),
    ]:
        assert min(counts(values, of).values()) >= 2, counts(values, of)
