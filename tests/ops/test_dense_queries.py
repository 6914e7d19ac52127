"""dense_below: queries at smaller positions attend to all keys up to their own, and the others as
if there were no such number."""

import re

import pytest
import torch

from nsa_fsa.ops import nsa_attention
from nsa_fsa.sequences import Sequences, cu_seqlens_from_lengths
from tests.modules.layers import SPARSE, randn
from tests.naive import naive_attention
from tests.on_gpu import assert_rms_close
from tests.oracle import oracle_dense, queries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = dict(SPARSE, scale=0.4)
HKV, G, D, DV = 2, 2, 8, 12
LENGTHS = {
    "some of each kind": (0, 5, 26, 3, 12),
    "one": (33,),
    "alike": (14, 14, 14),
    "a long one among short ones": (3, 1, 30, 2),
}
NAMES = ("q", "k", "v", "k_cmp", "v_cmp", "gate_logits", "k_swa", "v_swa")
CLOSE = dict(rtol=1e-10, atol=1e-10)


def leaves_of(num_queries, num_keys, dtype=torch.float64):
    """The tensors of NAMES."""
    shapes = (
        (num_queries, HKV * G, D),
        (num_keys, HKV, D),
        (num_keys, HKV, DV),
        (num_keys // 4, HKV, D),
        (num_keys // 4, HKV, DV),
        (num_queries, HKV * G, 3),
        (num_keys, HKV, D),
        (num_keys, HKV, DV),
    )
    return [
        randn(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)
    ]


def attend(leaves, sequences, dense_below, backend="reference", **options):
    *first, k_swa, v_swa = leaves
    layout = sequences._asdict()
    return nsa_attention(
        *first,
        **layout,
        **SIZES,
        k_swa=k_swa,
        v_swa=v_swa,
        dense_below=dense_below,
        backend=backend,
        **options,
    )


def expected_of(leaves, sequences, dense_below):
    """Full attention in the rows of dense queries, and elsewhere what there is without them."""
    q, k, v = leaves[:3]
    layout = sequences._asdict()
    del layout["max_seqlen"]
    sees, is_dense = torch.zeros(len(q), 1, len(k), dtype=torch.bool), []
    for row, first_key_row, t in queries(**layout):
        sees[row, :, first_key_row : first_key_row + t + 1] = True
        is_dense.append(t < dense_below)
    dense = naive_attention(q, k, v, sees, SIZES["scale"])
    is_dense = torch.tensor(is_dense)[:, None, None]
    return torch.where(is_dense, dense, attend(leaves, sequences, 0))


def with_gradients(o, leaves):
    do = randn(*o.shape, dtype=o.dtype, seed=11).to(o)
    return [o, *torch.autograd.grad(o, leaves, do, materialize_grads=True)]


@pytest.mark.parametrize("dense_below", [1, 12, 25, 2**40])
@pytest.mark.parametrize("name", LENGTHS)
def test_whole_sequences(name, dense_below):
    lengths = torch.tensor(LENGTHS[name])
    sequences = Sequences(cu_seqlens_from_lengths(lengths), int(lengths.max()))
    leaves = leaves_of(int(lengths.sum()), int(lengths.sum()))
    found = with_gradients(attend(leaves, sequences, dense_below), leaves)
    expected = with_gradients(expected_of(leaves, sequences, dense_below), leaves)
    for what, x, y in zip(("o", *NAMES), found, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("dense_below", [1, 12, 31, 100])
def test_queries_at_the_end_of_what_a_cache_holds(dense_below):
    """Rows in use, of 40 that each sequence has, and how many of them are new."""
    lengths, new = torch.tensor([2, 9, 0, 30, 33, 40]), torch.tensor([2, 4, 0, 20, 1, 7])
    starts = torch.arange(7, dtype=torch.int32) * 40
    sequences = Sequences(starts, 40, cu_seqlens_from_lengths(new), lengths.int())
    leaves = leaves_of(int(new.sum()), 240)
    with torch.no_grad():
        found = attend(leaves, sequences, dense_below)
        expected = expected_of(leaves, sequences, dense_below)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_queries_at_the_end_of_whole_sequences():
    """Without room for more, as where queries are left out."""
    lengths, new = torch.tensor([20, 9, 30]), torch.tensor([15, 9, 3])
    of_keys, of_queries = map(cu_seqlens_from_lengths, (lengths, new))
    sequences, leaves = Sequences(of_keys, 30, of_queries), leaves_of(27, 59)
    found = with_gradients(attend(leaves, sequences, 12), leaves)
    expected = with_gradients(expected_of(leaves, sequences, 12), leaves)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_the_kernels_of_the_sliding_window():
    lengths = torch.tensor([3, 17])
    sequences = Sequences(cu_seqlens_from_lengths(lengths), 17)
    on_device = Sequences(cu_seqlens_from_lengths(lengths.to(DEVICE)), 17)
    exact = leaves_of(20, 20)
    leaves = [x.detach().float().to(DEVICE).requires_grad_() for x in exact]
    found = with_gradients(attend(leaves, on_device, 9, "triton_window"), leaves)
    expected = with_gradients(expected_of(exact, sequences, 9), exact)
    for what, x, y in zip(("o", *NAMES), found, expected, strict=True):
        assert_rms_close(what, x.cpu(), y, torch.float32)


def test_nothing_else_runs_where_all_are_dense():
    """What would be read is NaN. Its gradient is 0, and not missing."""
    sequences = Sequences(torch.tensor([0, 20, 38], dtype=torch.int32), 20)
    leaves = leaves_of(38, 38)
    with torch.no_grad():
        for x in leaves[3:]:
            x.fill_(torch.nan)
    found = attend(leaves, sequences, 20)
    dense, _ = oracle_dense(*leaves[:3], scale=0.4, cu_seqlens=sequences.cu_seqlens)
    torch.testing.assert_close(found, dense, **CLOSE)
    *read, k_cmp, v_cmp, gates, k_swa, v_swa = torch.autograd.grad(found.sum(), leaves)
    for x in (k_cmp, v_cmp, gates, k_swa, v_swa):
        assert torch.equal(x, torch.zeros_like(x))
    for x, y in zip(read, torch.autograd.grad(dense.sum(), leaves[:3]), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_what_is_returned_beside_is_that_of_the_branches():
    sequences, leaves = Sequences(torch.tensor([0, 40], dtype=torch.int32), 40), leaves_of(40, 40)
    _, plain = attend(leaves, sequences, 0, return_branches=True)
    for dense_below in (12, 40):
        o, branches = attend(leaves, sequences, dense_below, return_branches=True)
        assert torch.equal(o, attend(leaves, sequences, dense_below))
        for x, y in zip(branches, plain, strict=True):
            assert torch.equal(x, y)


def test_one_trace_serves_all_lengths():
    """Below the number and above it."""
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager", dynamic=True)

    def step(length):
        sequences = Sequences(torch.tensor([0, length], dtype=torch.int32), length)
        leaves = leaves_of(length, length)
        o = compiled(leaves, sequences, 20)
        for x, y in zip(
            with_gradients(o, leaves),
            with_gradients(attend(leaves, sequences, 20), leaves),
            strict=True,
        ):
            torch.testing.assert_close(x, y, **CLOSE)

    step(36)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (12, 20, 21):
            step(length)


def test_rows_of_queries_that_are_in_no_sequence_are_refused():
    starts, used = (torch.tensor(x, dtype=torch.int32) for x in ([0, 9], [5]))
    with pytest.raises(ValueError, match=re.escape("Fix: pass cu_seqlens_q")):
        attend(leaves_of(9, 9), Sequences(starts, 9, seqused_k=used), 3)
