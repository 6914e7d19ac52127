"""Row 12 of reliability.md: the operators as torch.library sees them, and under torch.compile."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

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
    suited,
)

# Two KV heads, DV != D and no NaN: torch.library.opcheck compares inputs before and after, and NaN differs from itself.
CASE = Case("registration", (17, 0, 2), 2, 2, 8, 4, torch.float32, 4, 2, 4, 3, 1, 1, 6, seed=5)


def heads_first(x):
    """Strided as a transposed [H, T, D] is."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def same(x):
    return x


def inputs(requires_grad, backend="reference", case=CASE, layout=same, operator=None):
    x = make_inputs(suited(case, backend, operator=operator), device=device_of(backend))
    x = x.replace(**{name: getattr(x, name).nan_to_num(0) for name in ("k_cmp", "v_cmp")})
    for name, value in vars(x).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(x, name, layout(value).detach().requires_grad_(requires_grad))
    return x


def samples(operator, x, backend):
    """Argument tuples for a registered operator, with every optional argument given and not given."""
    packed, scale, block_size = (
        (x.cu_seqlens, x.max_seqlen),
        CASE.scale,
        suited(CASE, backend, operator=operator.removesuffix("_backward")).block_size,
    )
    cu_seqlens_q = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=x.q.device)
    used = torch.tensor([16, 0, 2], dtype=torch.int32, device=x.q.device)
    whole, last = (*packed, None, None, scale), (*packed, cu_seqlens_q, used, scale)
    windows = (CASE.kernel_size, CASE.kernel_stride)
    blocks = (CASE.num_selected_blocks, CASE.init_blocks, CASE.local_blocks)
    counts = torch.full(x.block_indices.shape[:2], 2, dtype=torch.int32, device=x.q.device)
    few = slice(0, 5)

    def attention(keys, *variants):
        """variants: queries, layout and the operator's own arguments."""
        k, v = (getattr(x, name) for name in keys)
        forward = [(q, k, v, *layout, *own, backend) for q, layout, own in variants]
        if not operator.endswith("_backward"):
            return forward
        found = []
        for q, k, v, *rest in forward:
            forward_op = getattr(torch.ops.nsa_fsa, operator.removesuffix("_backward"))
            o, lse = forward_op(q, k, v, *rest)
            found.append((torch.randn_like(o), q, k, v, o, lse, *rest))
        return found

    q_few, indices = x.q.detach()[few], x.block_indices
    if operator.startswith("compressed_attention"):
        own = (*windows, 2**20)
        return attention(("k_cmp", "v_cmp"), (x.q, whole, own), (q_few, last, own))
    if operator.startswith("sliding_window_attention"):
        own = (CASE.window_size, 2**20)
        differentiated = x.k.requires_grad or operator.endswith("_backward")
        few_too = [] if backend == "flash_attn_4" or (backend == "torch_flash" and differentiated) else [(q_few, last, own)]
        return attention(("k", "v"), (x.q, whole, own), *few_too)
    if operator.startswith("nsa_attention"):
        return whole_samples(operator, x, backend, (whole, last), (*windows, block_size, *blocks, CASE.window_size, 2**20))
    if operator == "block_index":
        return [(indices, given, *packed, block_size, forced, forced) for given, forced in ((None, 0), (counts, 1))]
    if operator.startswith("selected_attention"):
        no_index, budget = (None,) * 6, 2**20
        variants = [(x.q, whole, (indices, None, *no_index, block_size, 0, 0, budget))]
        if backend == "triton_kv_major":
            index = torch.ops.nsa_fsa.block_index(indices, counts, *packed, block_size, 1, 1)
            variants.append((x.q, whole, (indices, counts, *index, block_size, 1, 1, 1)))
        elif backend == "reference" or not (x.k.requires_grad or operator.endswith("_backward")):
            variants.append((q_few, last, (indices[few], counts[few], *no_index, block_size, 1, 1, budget)))
        return attention(("k", "v"), *variants)
    lse = torch.ops.nsa_fsa.compressed_attention(x.q, x.k_cmp, x.v_cmp, *whole, *windows, 2**20, backend)[1]
    if operator in ("select_blocks", "block_scores"):
        own = (*windows, block_size, *(blocks if operator == "select_blocks" else ()), backend)
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


def whole_samples(operator, x, backend, layouts, sizes):
    """For nsa_attention: keys of its own for the sliding branch or not, outputs kept or computed again, last queries only."""
    whole, last = layouts
    tensors = (x.q, x.k, x.v, x.k_cmp, x.v_cmp, x.gate_logits)
    own = tuple(torch.randn_like(t).requires_grad_(t.requires_grad) for t in (x.k, x.v))
    forward = [
        (*tensors, None, None, *whole, *sizes, [False] * 3, backend),
        (*tensors, *own, *whole, *sizes, [True] * 3, backend),
    ]
    if not operator.endswith("_backward"):
        few = (x.q.detach()[:5], *(t.detach() for t in tensors[1:5]), x.gate_logits.detach()[:5])
        return [*forward, (*few, None, None, *last, *sizes, [False] * 3, backend)]
    found = []
    for arguments in forward:
        o, *saved = torch.ops.nsa_fsa.nsa_attention(*arguments)
        outputs = [None if again else branch for again, branch in zip(arguments[-2], saved, strict=False)]
        found.append((torch.randn_like(o), *arguments, *outputs, *saved[3:]))
    return found


FORWARD = [*DIFFERENTIABLE, "select_blocks", "block_scores", "block_index"]
BACKWARD = [f"{name}_backward" for name in DIFFERENTIABLE]


def test_every_registered_operator_is_checked_here():
    registered = {
        name.removeprefix("nsa_fsa::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("nsa_fsa::")
    }
    assert {name.split(".")[0] for name in registered} == {*FORWARD, *BACKWARD}


def registered_operators():
    """(operator, backend, requires_grad), with inputs that require a gradient where the operator may be given such."""
    found = []
    for operator in (*FORWARD, *BACKWARD):
        attention = "selected_attention" if operator == "block_index" else operator.removesuffix("_backward")
        for backend in backends_of(attention):
            if operator == "block_index" and backend.values[0] != "triton_kv_major":
                continue  # it has a single implementation
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
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Two block indices of one selection differ where nothing is listed, and in where a list lies. The whole, whose outputs
    # one is among, is compared compiled and eager below.
    if operator != "block_index" and not (operator.startswith("nsa_attention") and backend == "triton"):
        checks.append("test_aot_dispatch_dynamic")
    for arguments in samples(operator, x, backend):
        torch.library.opcheck(getattr(torch.ops.nsa_fsa, operator).default, arguments, test_utils=checks)


@pytest.mark.parametrize(("operator", "backend"), operators_and_backends())
def test_a_second_derivative_is_refused(operator, backend):
    """By name, rather than taken for zero."""
    x = inputs(True, backend)
    o = output(call(operator, suited(CASE, backend, operator=operator), x, backend))
    (dx,) = torch.autograd.grad(o.square().sum(), getattr(x, DIFFERENTIABLE[operator][0]), create_graph=True)
    with pytest.raises(RuntimeError, match=r"nsa_fsa::\w+_backward has no gradient.*Fix"):
        dx.sum().backward()


def test_what_carries_no_gradient_is_refused():
    """The layer detaches what goes into the choice of blocks; whoever calls the bare operator has to."""
    x = inputs(True)
    arguments = next(a for a in samples("block_scores", x, "reference"))
    scores = torch.ops.nsa_fsa.block_scores(*arguments)
    with pytest.raises(RuntimeError, match=r"nsa_fsa::block_scores has no gradient.*detach"):
        scores.sum().backward()


class StopGradient(torch.autograd.Function):
    """Hands back no gradient at all, not zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(("operator", "backend"), operators_and_backends())
def test_no_gradient_from_above_gives_none_below(operator, backend):
    x = inputs(True, backend)
    StopGradient.apply(output(call(operator, suited(CASE, backend, operator=operator), x, backend))).sum().backward()
    assert all(getattr(x, name).grad is None for name in DIFFERENTIABLE[operator])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_compiler_does_not_look_into_an_operator(mode):
    """Called where a compiled model leaves the graph, but what it calls there is still compiled."""
    x = inputs(False)
    arguments = (x.gate_logits.requires_grad_(mode is torch.enable_grad), x.o_cmp, x.o_slc, x.o_swa, "reference")

    def frames(called):
        """How many functions the compiler looked into."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        outside = torch._dynamo.disable(called, recursive=False)
        with mode():
            torch.compile(lambda: outside(), backend="eager")()
        return torch._dynamo.utils.counters["frames"]["total"]

    assert frames(lambda: torch.ops.nsa_fsa.gated_combine(*arguments)) == frames(lambda: None)


FIRST_CALL = """
import sys
import torch
from nsa_fsa import ops

q = torch.ones(8, 1, 4, requires_grad=True)
ops.sliding_window_attention(q, q, q, torch.tensor([0, 8], dtype=torch.int32), 8, window_size=4).sum().backward()
print("torch._dynamo" in sys.modules)
"""


def test_the_first_call_does_not_import_the_compiler():
    """Which takes as long as importing torch itself."""
    result = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=120)
    assert result.stdout == "False\n", result.stdout + result.stderr


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", [same, heads_first])
@pytest.mark.parametrize(("operator", "backend"), operators_and_backends())
def test_compiled_equals_eager(operator, backend, layout, compiler):
    """One graph without breaks, forward and backward, bit by bit."""
    torch._dynamo.reset()
    case = suited(CASE, backend, calls=2, operator=operator)
    x = inputs(True, backend, layout=layout)
    compiled = torch.compile(lambda x: output(call(operator, case, x, backend)), fullgraph=True, backend=compiler)
    o, o_compiled = output(call(operator, case, x, backend)), compiled(x)
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
    counter = CompileCounterWithBackend("aot_eager")
    block_size = suited(CASE, backend, operator=operator).block_size
    case = dataclasses.replace(CASE, block_size=block_size)
    compiled = torch.compile(lambda x: output(call(operator, case, x, backend)), fullgraph=True, backend=counter)
    frames = []
    for lengths in [(12, 0, 5), (11, 3, 4), (15, 1, 4), (2, 1, 29)]:  # tables of 32 rows need no padding
        case = suited(dataclasses.replace(CASE, lengths=lengths), backend, operator=operator)
        x = inputs(True, backend, case)
        o = compiled(x)
        assert torch.equal(o, output(call(operator, case, x, backend)))
        gradients(operator, o, x, torch.ones_like(o))
        frames.append(counter.frame_count)
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 3, f"graphs compiled so far, after each length: {frames}"
    assert frames[1] <= 2
