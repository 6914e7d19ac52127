"""Block divergence against whole matrices, its gradients, and the memory that it takes."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_fsa import ops
from nsa_fsa.ops.block_divergence import reference
from nsa_fsa.ops.block_divergence.operator import OPERATOR, DivergenceCall
from nsa_fsa.ops.common.calls import Blocks, Windows
from nsa_fsa.sequences import Sequences
from tests.ops.block_divergence.direct import direct

# Windows of two hops and of one, blocks of as many hops as a window has, and no forced blocks.
SIZES = {
    "tiny": dict(kernel_size=4, kernel_stride=2, block_size=8, init_blocks=1, local_blocks=1),
    "whole": dict(kernel_size=4, kernel_stride=4, block_size=4, init_blocks=1, local_blocks=2),
    "dense": dict(kernel_size=3, kernel_stride=1, block_size=3, init_blocks=0, local_blocks=0),
    "one_block": dict(kernel_size=8, kernel_stride=2, block_size=64, init_blocks=0, local_blocks=1),
}
NUM_SELECTED = 3
FULL = 2**30


def make(lengths, group_size, sizes, num_kv_heads=2, dim=4, dtype=torch.float64, cached=()):
    """Everything that the operator takes, of packed sequences; `cached`: for each of them, how many
    of its tokens have no query."""
    c = SimpleNamespace(**sizes)
    num_tokens = sum(lengths)
    cached = cached or [0] * len(lengths)
    num_new = [length - past for length, past in zip(lengths, cached, strict=True)]
    q = torch.randn(sum(num_new), num_kv_heads * group_size, dim, dtype=dtype) * 2
    k = torch.randn(num_tokens, num_kv_heads, dim, dtype=dtype)
    k_cmp = torch.randn(num_tokens // c.kernel_stride, num_kv_heads, dim, dtype=dtype)
    starts, starts_q = (
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths, num_new)
    )
    where = dict(cu_seqlens=starts, max_seqlen=max(lengths), scale=0.7)
    if any(cached):
        where |= dict(cu_seqlens_q=starts_q, seqused_k=starts.diff())
    windows = dict(kernel_size=c.kernel_size, kernel_stride=c.kernel_stride)
    _, lse = ops.sliding_window_attention(q, k, k, window_size=FULL, return_lse=True, **where)
    _, lse_cmp = ops.compressed_attention(q, k_cmp, k_cmp, return_lse=True, **windows, **where)
    chosen = ops.select_blocks(
        q, k_cmp, lse_cmp, num_selected_blocks=NUM_SELECTED, **sizes, **where
    )
    tensors = dict(q=q, k=k, k_cmp=k_cmp, lse=lse, lse_cmp=lse_cmp, block_indices=chosen)
    return tensors, sizes | where


def directly(tensors, lengths, rule, cached=(), **options):
    """The direct computation, sequence by sequence."""
    c = SimpleNamespace(**rule)
    found, first, first_q = [], 0, 0
    for length, past in zip(lengths, cached or [0] * len(lengths), strict=True):
        if length == 0:
            continue
        rows = slice(first_q, first_q + length - past)
        n = max(0, (length - c.kernel_size) // c.kernel_stride + 1)
        token = first // c.kernel_stride
        q, chosen = tensors["q"][rows], tensors["block_indices"][rows]
        k, k_cmp = tensors["k"][first : first + length], tensors["k_cmp"][token : token + n]
        # Queries of what is cached are not looked at.
        q = torch.cat((q.new_zeros(past, *q.shape[1:]), q))
        chosen = torch.cat((chosen.new_zeros(past, *chosen.shape[1:]), chosen))
        results = direct(q, k, k_cmp, chosen, c, c.scale, **options)
        found.append([x[past:] for x in results])
        first, first_q = first + length, rows.stop
    return [torch.cat(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("free_only", [False, True], ids=["all", "free"])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_direct_computation(sizes, group_size, free_only):
    """With all queries at once, and one at a time."""
    lengths = (1, 27, 0, 3, 18)
    tensors, rule = make(lengths, group_size, SIZES[sizes])
    inputs = q, k_cmp = [tensors[name].requires_grad_() for name in ("q", "k_cmp")]
    expected = directly(tensors, lengths, rule, free_only=free_only)
    weight = torch.randn_like(expected[0])
    if not expected[0].requires_grad:
        assert (free_only, sizes) == (True, "one_block")  # no block is free there
        expected[0] = expected[0] + 0 * (q.sum() + k_cmp.sum())
    expected_grads = torch.autograd.grad((expected[0] * weight).sum(), inputs)
    for workspace_bytes in (2**28, 1):
        found = ops.block_divergence(
            **tensors, **rule, free_only=free_only, workspace_bytes=workspace_bytes
        )
        assert [x.requires_grad for x in found] == [True, False, False]
        grads = torch.autograd.grad((found.divergence * weight).sum(), inputs)
        for ours, theirs in zip((*found, *grads), (*expected, *expected_grads), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, equal_nan=True)


def test_something_is_to_be_learned_and_chosen():
    """What the test above compares is not all 0, all 1 or nothing."""
    tensors, rule = make((60,), 2, SIZES["tiny"])
    divergence, mass, recall = ops.block_divergence(**tensors, **rule)
    assert divergence[10:].min() >= 0
    assert divergence[30:].mean() > 0.1
    assert 0.3 < mass[40:].mean() < 0.9
    assert recall[:24].isnan().all()
    assert 0.1 < recall[32:].mean() < 0.95


def test_queries_after_a_past():
    lengths, cached = (30, 41), (17, 0)
    tensors, rule = make(lengths, 2, SIZES["tiny"], cached=cached)
    found = ops.block_divergence(**tensors, **rule)
    expected = directly(tensors, lengths, rule, cached)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, equal_nan=True)


def test_weights_too_small_for_their_dtype_leave_it_finite():
    """Where softmax weights of windows are 0 in float32, their logarithms are not -inf."""
    tensors, rule = make((40,), 2, SIZES["tiny"], dtype=torch.float32)
    tensors["q"] *= 300
    sizes = dict(kernel_size=4, kernel_stride=2)
    where = {x: rule[x] for x in ("cu_seqlens", "max_seqlen", "scale")}
    q, k, k_cmp = (tensors[name] for name in ("q", "k", "k_cmp"))
    _, tensors["lse"] = ops.sliding_window_attention(
        q, k, k, window_size=FULL, return_lse=True, **where
    )
    _, tensors["lse_cmp"] = ops.compressed_attention(
        q, k_cmp, k_cmp, return_lse=True, **sizes, **where
    )
    q.requires_grad_()
    divergence = ops.block_divergence(**tensors, **rule).divergence
    assert 90 < divergence.max() < torch.inf
    (grad,) = torch.autograd.grad(divergence.sum(), q)
    assert grad.isfinite().all()


def test_gradcheck():
    """Of compressed keys alone: the mass, which is held to be constant, depends on q."""
    tensors, rule = make((11, 14), 2, SIZES["tiny"])
    windows = dict(kernel_size=4, kernel_stride=2)
    where = {x: rule[x] for x in ("cu_seqlens", "max_seqlen", "scale")}

    def divergence(k_cmp):
        _, lse_cmp = ops.compressed_attention(
            tensors["q"], k_cmp, k_cmp, return_lse=True, **windows, **where
        )
        changed = {**tensors, "k_cmp": k_cmp, "lse_cmp": lse_cmp}
        return ops.block_divergence(**changed, **rule).divergence

    assert torch.autograd.gradcheck(divergence, (tensors["k_cmp"].requires_grad_(),))


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside it and are still alive."""

    def __init__(self, *inputs):
        super().__init__()
        self.now = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if (
                isinstance(x, torch.Tensor)
                and (place := x.untyped_storage()._cdata) not in self.known
            ):
                self.known.add(place)
                size = x.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self.gone, place, size)
        return found

    def gone(self, place, size):
        self.known.discard(place)
        self.now -= size


@pytest.mark.parametrize("sizes", ["tiny", "dense"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_takes_no_more_memory_than_it_may(direction, sizes):
    """Beside what it returns, and the keys of one KV head; an S x S matrix of one head would be 512
    KiB."""
    length, workspace_bytes = 256, 2**17
    tensors, rule = make((length,), 2, SIZES[sizes])
    layout = Sequences(rule["cu_seqlens"], length)
    windows = Windows(rule["kernel_size"], rule["kernel_stride"])
    blocks = Blocks(rule["block_size"], rule["init_blocks"], rule["local_blocks"])
    rest = (layout, rule["scale"], windows, blocks, 0, workspace_bytes, "reference")
    call = DivergenceCall(*tensors.values(), *rest)
    do = torch.ones(length, 2, dtype=torch.float64)
    with Live(*tensors.values(), layout.cu_seqlens, do) as live:
        if direction == "forward":
            found = reference.block_divergence(call)
        else:
            found = reference.block_divergence_backward(call, do)
    returned = sum(x.nbytes for x in found)
    assert workspace_bytes / 4 < live.peak - returned < workspace_bytes


def test_opcheck():
    """Of queries after a past, which all have a choice: opcheck compares results, and NaN is equal
    to none."""
    tensors, rule = make((40, 33), 2, SIZES["tiny"], cached=(32, 32))
    names = ("cu_seqlens", "max_seqlen", "cu_seqlens_q", "seqused_k")
    layout = Sequences(*(rule[name] for name in names))
    tensors["q"].requires_grad_()
    call = DivergenceCall(
        *(*tensors.values(), layout, 0.7, Windows(4, 2), Blocks(8, 1, 1), 0, 2**20, "auto")
    )
    row = OPERATOR.call.flatten(call)
    torch.library.opcheck(torch.ops.nsa_fsa.block_divergence.default, row)
    do = torch.randn(9, 2, dtype=torch.float64)
    row[0] = row[0].detach()
    torch.library.opcheck(torch.ops.nsa_fsa.block_divergence_backward.default, (do, *row))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(workspace_bytes=0), "workspace_bytes"),
        (dict(backend="quantum"), "backend='quantum'"),
        (dict(lse=torch.zeros(3, 4)), r"lse is torch.float32 \(3, 4\) on cpu; it must be"),
        (dict(lse_cmp=torch.zeros(25, 4).half()), r"lse_cmp is torch.float16 \(25, 4\)"),
        (dict(block_indices=torch.zeros(25, 2, 3)), r"block_indices is torch.float32 \(25, 2, 3\)"),
        (dict(block_indices=torch.zeros(3, 4, 1).int()), r"int32 \(3, 4, 1\) on cpu; it must"),
        (dict(block_size=7), "block_size=7"),
    ],
)
def test_says_what_is_wrong(changes, message):
    tensors, rule = make((11, 14), 2, SIZES["tiny"])
    with pytest.raises(ValueError, match=message):
        ops.block_divergence(**{**tensors, **rule, **changes})
