"""topk_sparse_attention against plain loops: indices head by head, packed sequences."""

import inspect
import re
from itertools import accumulate, pairwise

import pytest
import torch

from nsa_fsa.compat import topk_sparse_attention
from tests.compat.loops import assert_same, attend, keys_of_blocks, leaves
from tests.wrong_values import (
    NO_BACKENDS,
    assert_refused,
    instead_of_int,
    instead_of_number,
    instead_of_tensor,
)

LENGTHS = (9, 0, 3, 17, 1)  # shorter than a block, empty, not a multiple of one
T, HKV, D, DV, BLOCK_SIZE, T_SEL = sum(LENGTHS), 2, 5, 3, 4, 3
CU_SEQLENS = torch.tensor([*accumulate(LENGTHS, initial=0)], dtype=torch.int32)


def oracle(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale):
    group_size = q.shape[1] // k.shape[1]
    rows = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        for t in range(stop - start):
            for h in range(q.shape[1]):
                kv = h // group_size
                seen = [
                    start + p
                    for p in keys_of_blocks(topk_idx[kv, start + t].tolist(), block_size, t)
                ]
                rows.append(attend(q[start + t, h], k[seen, kv], v[seen, kv], softmax_scale)[0])
    return torch.stack(rows).unflatten(0, q.shape[:2])


def random_indices(padding=-1, dtype=torch.int32):
    """Distinct blocks of each query's past in any order, at most T_SEL, and padding after them."""
    topk_idx = torch.full((HKV, T, T_SEL), padding, dtype=dtype)
    for start, stop in pairwise(CU_SEQLENS.tolist()):
        for t in range(stop - start):
            for kv in range(HKV):
                chosen = torch.randperm(t // BLOCK_SIZE + 1)[:T_SEL]
                topk_idx[kv, start + t, : len(chosen)] = chosen.to(dtype)
    return topk_idx


def inputs(group_size):
    return leaves((T, HKV * group_size, D), (T, HKV, D), (T, HKV, DV))


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_output_and_gradients(group_size):
    q, k, v = inputs(group_size)
    topk_idx = random_indices()
    o = topk_sparse_attention(q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS, 0.3)
    assert_same(o, oracle(q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS, 0.3), (q, k, v))


@pytest.mark.parametrize("block_size", [1, 3, 4, 64])
def test_block_sizes(block_size):
    q, k, v = inputs(2)
    # Future, absent and repeated blocks.
    topk_idx = torch.randint(-1, T // block_size + 2, (HKV, T, T_SEL), dtype=torch.int32)
    o = topk_sparse_attention(q, k, v, topk_idx, block_size, CU_SEQLENS)
    assert_same(o, oracle(q, k, v, topk_idx, block_size, CU_SEQLENS, D**-0.5), (q, k, v))


@pytest.mark.parametrize(
    ("padding", "dtype"),
    [
        *((padding, torch.int32) for padding in (-(2**31), T, 2**31 - 1)),
        *(
            (padding, torch.int64)
            for padding in (-1, -(2**63), T, 2**31, 2**32, 2**32 + 1, 2**63 - 1)
        ),
    ],
)
def test_padding(padding, dtype):
    """An int64 beyond int32 would wrap around to a block that exists."""
    q, k, v = inputs(2)
    topk_idx = random_indices(padding, dtype)
    given = topk_idx.clone()
    padded = torch.where(topk_idx == padding, -1, topk_idx).int()
    o = topk_sparse_attention(q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS)
    assert torch.equal(o, topk_sparse_attention(q, k, v, padded, BLOCK_SIZE, CU_SEQLENS))
    assert torch.equal(topk_idx, given), "the caller's indices were modified"


def test_nothing_selected_is_zero():
    q, k, v = inputs(2)
    o = topk_sparse_attention(
        q, k, v, torch.full((HKV, T, T_SEL), -1, dtype=torch.int32), BLOCK_SIZE, CU_SEQLENS
    )
    o.sum().backward()
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (o, q.grad, k.grad, v.grad))


def test_keywords_and_their_order():
    """Calls written for the originals name any of these, or none."""
    parameters = inspect.signature(topk_sparse_attention).parameters
    assert [*parameters] == [
        "q",
        "k",
        "v",
        "topk_idx",
        "block_size",
        "cu_seqlens",
        "softmax_scale",
        "backend",
    ]
    assert parameters["softmax_scale"].default is None
    assert parameters["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    q, k, v = inputs(2)
    topk_idx = random_indices()
    values = (q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS.long(), None, "auto")
    o = topk_sparse_attention(**dict(zip(parameters, values, strict=True)))
    assert torch.equal(o, topk_sparse_attention(q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS))


def test_gradcheck():
    q, k, v = leaves((7, 2, 2), (7, 1, 2), (7, 1, 2))
    topk_idx = torch.randint(-1, 4, (1, 7, 2), dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *x: topk_sparse_attention(*x, topk_idx, 2, cu_seqlens), (q, k, v)
    )


def test_compiles_without_a_graph_break():
    """And so reads nothing back from the device."""
    q, k, v = (x.detach() for x in inputs(2))
    topk_idx = random_indices(dtype=torch.int64)
    compiled = torch.compile(topk_sparse_attention, backend="eager", fullgraph=True)
    o = compiled(q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS.long())
    assert torch.equal(o, topk_sparse_attention(q, k, v, topk_idx, BLOCK_SIZE, CU_SEQLENS))


GOOD = dict(
    q=torch.zeros(T, 2 * HKV, D),
    k=torch.zeros(T, HKV, D),
    v=torch.zeros(T, HKV, DV),
    topk_idx=torch.zeros(HKV, T, T_SEL, dtype=torch.int32),
    block_size=BLOCK_SIZE,
    cu_seqlens=CU_SEQLENS,
)
BAD = [
    (
        dict(topk_idx=torch.zeros(T, HKV, T_SEL, dtype=torch.int32)),
        rf"topk_idx has shape \({T}, {HKV}, .*\[{HKV}, {T}, T_sel\]",
    ),
    (
        dict(topk_idx=torch.zeros(HKV, T, dtype=torch.int32)),
        rf"topk_idx has shape \({HKV}, {T}\).*Fix",
    ),
    (
        dict(topk_idx=torch.zeros(HKV, T, T_SEL)),
        r"topk_idx is torch.float32; it must be an int32 or int64",
    ),
    (
        dict(cu_seqlens=CU_SEQLENS.float()),
        r"cu_seqlens is torch.float32; it must be an int32 or int64",
    ),
    (dict(cu_seqlens=[0, T]), rf"cu_seqlens is \[0, {T}\]; it must be an int32 or int64 tensor"),
    (dict(cu_seqlens=torch.tensor([0, T + 1])), r"cu_seqlens=\[0, 31\] must rise from 0 to .*30"),
    (dict(block_size=0), r"block_size=0 must be an int >= 1"),
    (dict(q=torch.zeros(1, T, 4, D)), rf"q has shape \(1, {T}, 4, {D}\); it must be \[T, HQ, D\]"),
    (dict(k=torch.zeros(T, D)), rf"k has shape \({T}, {D}\); it must be \[T, HKV, D\]"),
    (dict(q=torch.zeros(T, 3, D)), r"q has 3 heads and k has 2"),
    (dict(v=torch.zeros(T, HKV, DV).half()), r"v has dtype torch.float16 but q has torch.float32"),
    (dict(backend="cudnn"), r"backend='cudnn' is not an implementation of selected_attention"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_refused(changes, message):
    topk_sparse_attention(**GOOD)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        topk_sparse_attention(**{**GOOD, **changes})


@pytest.mark.parametrize("name", inspect.signature(topk_sparse_attention).parameters)
def test_no_argument_fails_from_inside(name):
    values = {
        "block_size": instead_of_int(1),
        "softmax_scale": instead_of_number(),
        "backend": NO_BACKENDS,
    }
    for value in values.get(name) or instead_of_tensor(GOOD[name]):
        assert_refused(
            lambda value=value: topk_sparse_attention(**{**GOOD, name: value}), name, value
        )
