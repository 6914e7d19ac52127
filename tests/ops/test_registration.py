"""Row 12 of reliability.md: the operators as torch.library sees them, and under torch.compile."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.cases import (
    DIFFERENTIABLE,
    Case,
    backends_of,
    call,
    device_of,
    gradients,
    make_inputs,
    operators_and_backends,
    output,
    select,
)

# Two KV heads, DV != D and no NaN: torch.library.opcheck compares inputs before and after, and NaN differs from itself.
CASE = Case("registration", (20, 0, 12), 2, 2, 8, 4, torch.float32, 4, 2, 4, 3, 1, 1, 6, seed=5)


def heads_first(x):
    """Strided as a transposed [H, T, D] is."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def same(x):
    return x


def inputs(requires_grad, backend="reference", case=CASE, layout=same):
    x = make_inputs(case, device=device_of(backend))
    x = x.replace(**{name: getattr(x, name).nan_to_num(0) for name in ("k_cmp", "v_cmp")})
    for name, value in vars(x).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(x, name, layout(value).detach().requires_grad_(requires_grad))
    return x


def samples(operator, x, backend):
    """Argument tuples for a registered operator, with every optional argument given and not given."""
    packed, scale = (x.cu_seqlens, x.max_seqlen), CASE.scale
    cu_seqlens_q = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=x.q.device)
    used = torch.tensor([18, 0, 12], dtype=torch.int32, device=x.q.device)
    whole, last = (*packed, None, None, scale), (*packed, cu_seqlens_q, used, scale)
    windows = (CASE.kernel_size, CASE.kernel_stride)
    blocks = (CASE.num_selected_blocks, CASE.init_blocks, CASE.local_blocks)
    counts = torch.full(x.block_indices.shape[:2], 2, dtype=torch.int32, device=x.q.device)
    few = slice(0, 8)

    def attention(keys, own, own_last):
        k, v = (getattr(x, name) for name in keys)
        forward = [(x.q, k, v, *whole, *own, backend), (x.q.detach()[few], k, v, *last, *own_last, backend)]
        if not operator.endswith("_backward"):
            return forward
        found = []
        for q, k, v, *rest in forward:
            forward_op = getattr(torch.ops.nsa_fsa, operator.removesuffix("_backward"))
            o, lse = forward_op(q, k, v, *rest)
            found.append((torch.randn_like(o), q, k, v, o, lse, *rest))
        return found

    if operator.startswith("compressed_attention"):
        return attention(("k_cmp", "v_cmp"), windows, windows)
    if operator.startswith("sliding_window_attention"):
        return attention(("k", "v"), (CASE.window_size,), (CASE.window_size,))
    if operator.startswith("selected_attention"):
        own = (x.block_indices, None, CASE.block_size, 0, 0)
        return attention(("k", "v"), own, (x.block_indices[few], counts[few], CASE.block_size, 1, 1))
    lse = torch.ops.nsa_fsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, *whole, *windows, backend)[1]
    if operator in ("select_blocks", "block_scores"):
        own = (*windows, CASE.block_size, *(blocks if operator == "select_blocks" else ()), backend)
        return [(x.q, x.k_cmp, lse, *whole, *own), (x.q.detach()[few], x.k_cmp, lse[few], *last, *own)]
    if operator == "pool_windows":
        return [(x.k, x.pool_weight, *packed, *windows, None, backend), (x.k, None, *packed, *windows, used, backend)]
    if operator == "gather_windows":
        return [(x.k, *packed, *windows, None, backend), (x.k, *packed, *windows, used, backend)]
    if operator == "pool_windows_backward":
        do = torch.randn_like(x.k_cmp)
        return [
            (do, x.k, weight, x.cu_seqlens, *windows, seq, backend) for weight in (x.pool_weight, None) for seq in (None, used)
        ]
    if operator == "gather_windows_backward":
        do = torch.randn_like(x.k_cmp[:, :, None].expand(-1, -1, CASE.kernel_size, -1))
        return [(do, x.k, x.cu_seqlens, *windows, seqused, backend) for seqused in (None, used)]
    branches = (x.o_cmp, x.o_slc, x.o_swa, backend)
    gates = (x.gate_logits, x.gate_logits[:, :1])  # per head and per token
    if operator == "gated_combine":
        return [(gate, *branches) for gate in gates]
    if operator == "gated_combine_backward":
        return [(torch.randn_like(x.o_cmp), gate, *branches) for gate in gates]
    raise ValueError(f"{operator}: no sample arguments. Fix: add some here.")


FORWARD = [*(name for name in DIFFERENTIABLE if name != "nsa_attention"), "select_blocks", "block_scores"]
BACKWARD = [f"{name}_backward" for name in DIFFERENTIABLE if name != "nsa_attention"]


def test_every_registered_operator_is_checked_here():
    registered = {
        name.removeprefix("nsa_fsa::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("nsa_fsa::")
    }
    assert {name.split(".")[0] for name in registered} == {*FORWARD, *BACKWARD}


def registered_operators():
    """(operator, backend, requires_grad), with inputs that require a gradient where the operator may be given such."""
    found = []
    for operator in (*FORWARD, *BACKWARD):
        for backend in backends_of(operator.removesuffix("_backward")):
            # A backward is not differentiated again, and select_blocks detaches what it hands on.
            for requires_grad in (False, True) if operator in DIFFERENTIABLE else (False,):
                name = f"{operator}-{backend.values[0]}-{'requires_grad' if requires_grad else 'plain'}"
                found.append(pytest.param(operator, *backend.values, requires_grad, marks=backend.marks, id=name))
    return found


@pytest.mark.parametrize("layout", [same, heads_first])
@pytest.mark.parametrize(("operator", "backend", "requires_grad"), registered_operators())
def test_opcheck(operator, backend, requires_grad, layout):
    """Schema, fake implementation (strides too), autograd registration and tracing with dynamic shapes."""
    x = inputs(requires_grad, backend, layout=layout)
    for arguments in samples(operator, x, backend):
        torch.library.opcheck(getattr(torch.ops.nsa_fsa, operator).default, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", [same, heads_first])
@pytest.mark.parametrize(("operator", "backend"), operators_and_backends())
def test_compiled_equals_eager(operator, backend, layout, compiler):
    """One graph without breaks, forward and backward, bit by bit."""
    torch._dynamo.reset()
    x = inputs(True, backend, layout=layout)
    compiled = torch.compile(lambda x: output(call(operator, CASE, x, backend)), fullgraph=True, backend=compiler)
    o, o_compiled = output(call(operator, CASE, x, backend)), compiled(x)
    assert torch.equal(o, o_compiled)
    do = torch.randn_like(o)
    for name, *grads in zip(
        DIFFERENTIABLE[operator], gradients(operator, o, x, do), gradients(operator, o_compiled, x, do), strict=True
    ):
        assert torch.equal(*grads), f"d{name}"


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", backends_of("select_blocks"))
def test_compiled_selection_equals_eager(backend, compiler):
    torch._dynamo.reset()
    x = inputs(False, backend)
    lse = call("compressed_attention", CASE, x)[1]
    compiled = torch.compile(lambda x, lse: select(CASE, x, lse, backend, return_scores=True), fullgraph=True, backend=compiler)
    for a, b in zip(compiled(x, lse), select(CASE, x, lse, backend, return_scores=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("operator", "backend"), operators_and_backends())
def test_no_recompilation_after_the_second_length(operator, backend):
    """The first length compiles, the second may compile once more with dynamic sizes, no later one does."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: output(call(operator, CASE, x, backend)), fullgraph=True, backend=counter)
    frames = []
    for lengths in [(20, 0, 12), (24, 3, 13), (9, 31, 17), (50, 1, 5), (2, 3, 100)]:
        case = dataclasses.replace(CASE, lengths=lengths)
        x = inputs(True, backend, case)
        o = compiled(x)
        assert torch.equal(o, output(call(operator, case, x, backend)))
        gradients(operator, o, x, torch.ones_like(o))
        frames.append(counter.frame_count)
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 4, f"graphs compiled so far, after each length: {frames}"
    assert frames[1] <= 2
