"""Row 12 of reliability.md: the operators as torch.library sees them, and under torch.compile."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_fsa.config import BRANCHES
from nsa_fsa.ops.common.registration import _SCHEMA_TYPES, Signature
from tests import cases

# Two KV heads, DV != D and no NaN: torch.library.opcheck compares inputs before and after,
# and NaN differs from itself.
CASE = cases.Case(
    "registration", (17, 0, 2), 2, 2, 8, 4, torch.float32, 4, 2, 4, 3, 1, 1, 6, seed=5
)


def heads_first(x):
    """Strided as a transposed [H, T, D] is."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def same(x):
    return x


def inputs(requires_grad, operator="nsa_attention", backend="reference", case=CASE, layout=same):
    x = cases.make_inputs(cases.case_for(operator, backend, case), device=cases.device_of(backend))
    x = x.replace(**{name: getattr(x, name).nan_to_num(0) for name in ("k_cmp", "v_cmp")})
    for name, value in vars(x).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(x, name, layout(value).detach().requires_grad_(requires_grad))
    return x


class Recorder(TorchDispatchMode):
    """Keeps what operators of nsa_fsa are called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsa_fsa":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def samples(operator, x, backend):
    """Argument tuples for a registered operator: what the public functions call it with,
    with every optional argument given and not given, and backward."""
    with Recorder() as recorder:
        for made in variants(operator.removesuffix("_backward"), x, backend):
            o = cases.output(made)
            if operator.endswith("_backward"):
                o.backward(torch.randn_like(o))
    found = [
        row for func, row in recorder.calls if func is getattr(torch.ops.nsa_fsa, operator).default
    ]
    assert found, f"{operator} was not called"
    if operator.endswith("_backward"):  # which is not differentiated again
        found = [
            tuple(y.detach() if isinstance(y, torch.Tensor) else y for y in row) for row in found
        ]
    return found


def variants(operator, x, backend):
    """Results of the public functions that call an operator."""
    case = cases.case_for(whole_of(operator), backend, CASE)
    few = slice(0, 5)
    last = dict(
        cu_seqlens_q=torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=x.q.device),
        seqused_k=torch.tensor([16, 0, 2], dtype=torch.int32, device=x.q.device),
    )
    used = dict(seqused_k=last["seqused_k"])
    counts = torch.full(x.block_indices.shape[:2], 2, dtype=torch.int32, device=x.q.device)
    differentiated = x.k.requires_grad
    if operator in ("pool_windows", "gather_windows"):
        yield cases.call(operator, case, x, backend)
        yield cases.call(operator, case, x.replace(pool_weight=None), backend, **used)
    elif operator == "gated_combine":
        for gates in (x.gate_logits, x.gate_logits[:, :1]):  # per head and per token
            yield cases.call(operator, case, x.replace(gate_logits=gates), backend)
    elif operator == "compressed_attention":
        yield cases.call(operator, case, x, backend)
        yield cases.call(operator, case, x.replace(q=x.q[few]), backend, **last)
    elif operator == "sliding_window_attention":
        yield cases.call(operator, case, x, backend)
        if backend != "flash_attn_4" and not (backend == "torch_flash" and differentiated):
            yield cases.call(operator, case, x.replace(q=x.q[few]), backend, **last)
    elif operator in ("select_blocks", "block_scores"):
        lse = cases.call("compressed_attention", case, x, backend)[1]
        yield cases.select(case, x, lse, backend, return_scores=True)
        yield cases.select(
            case, x.replace(q=x.q[few]), lse[few], backend, return_scores=True, **last
        )
    elif operator in ("selected_attention", "block_index"):
        yield cases.call("selected_attention", case, x, backend)
        yield cases.call(
            "selected_attention",
            case,
            x,
            backend,
            block_counts=counts,
            init_blocks=1,
            local_blocks=1,
        )
        if backend == "reference" or not differentiated:
            few_indices = x.replace(q=x.q[few], block_indices=x.block_indices[few])
            yield cases.call(
                "selected_attention", case, few_indices, backend, block_counts=counts[few], **last
            )
    elif operator == "nsa_attention":
        own = {
            f"{name}_swa": torch.randn_like(y).requires_grad_(differentiated)
            for name, y in (("k", x.k), ("v", x.v))
        }
        yield cases.call(operator, case, x, backend)
        yield cases.call(operator, case, x, backend, recompute=BRANCHES, **own)
        if not differentiated:
            yield cases.call(
                operator,
                case,
                x.replace(q=x.q[few], gate_logits=x.gate_logits[few]),
                backend,
                **last,
            )
    else:
        raise ValueError(f"{operator}: no sample calls. Fix: add some here.")


FORWARD = [*cases.DIFFERENTIABLE, "select_blocks", "block_scores", "block_index"]
BACKWARD = [f"{name}_backward" for name in cases.DIFFERENTIABLE]


# Operators with a single implementation: the one whose call they are part of,
# and its backend that reads them.
SINGLE = {
    "block_index": ("selected_attention", "triton_kv_major"),
    "block_scores": ("select_blocks", "reference"),
}


def whole_of(operator):
    """The operator of whose call a registered one is a part."""
    return SINGLE.get(operator, (operator.removesuffix("_backward"), None))[0]


def test_every_registered_operator_is_checked_here():
    registered = {
        name.removeprefix("nsa_fsa::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_fsa::")
    }
    # These have an opcheck of their own, in tests/decode and tests/ops/block_divergence.
    decoding = {"append_tokens", "compress_tokens", "nsa_decode"}
    training = {"block_divergence", "block_divergence_backward"}
    elsewhere = decoding | training
    assert {name.split(".")[0] for name in registered} - elsewhere == {*FORWARD, *BACKWARD}


@pytest.mark.parametrize(("kind", "name"), _SCHEMA_TYPES.items(), ids=str)
def test_a_member_of_any_type_may_be_none(kind, name):
    """The schema says so by itself."""
    call = dataclasses.make_dataclass("call", [("x", kind), ("y", kind | None)])
    row = Signature(call).schema()
    assert row == [f"{name} x", f"{name}? y"]
    torch._C.parse_schema(f"f({', '.join(row)}) -> ()")


def registered_operators():
    """(operator, backend, requires_grad), with inputs that require a gradient where the operator
    may be given such.
    """
    found = []
    for operator in (*FORWARD, *BACKWARD):
        single = SINGLE.get(operator, (None, None))[1]
        for backend in cases.backends_of(whole_of(operator)):
            if single not in (None, *backend.values):
                continue
            # A backward is not differentiated again, and select_blocks detaches what it hands on.
            for requires_grad in (False, True) if operator in cases.DIFFERENTIABLE else (False,):
                kind = "requires_grad" if requires_grad else "plain"
                name = f"{operator}-{backend.values[0]}-{kind}"
                found.append(
                    pytest.param(
                        operator, *backend.values, requires_grad, marks=backend.marks, id=name
                    )
                )
    return found


@pytest.mark.parametrize("layout", [same, heads_first])
@pytest.mark.parametrize(("operator", "backend", "requires_grad"), registered_operators())
def test_opcheck(operator, backend, requires_grad, layout):
    """Schema, fake implementation (strides too), autograd registration and tracing with
    dynamic shapes.
    """
    cases.on_a_gpu_only(backend)
    if layout is heads_first:  # another alias, and no other number
        cases.on_a_gpu_only(backend, "triton", "triton_kv_major", "triton_window")
    x = inputs(
        requires_grad or operator.endswith("_backward"), whole_of(operator), backend, layout=layout
    )
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Two block indices of one selection differ where nothing is listed, and in where a list lies.
    # The whole, whose outputs one is among, is compared compiled and eager below.
    if operator != "block_index" and not (
        operator.startswith("nsa_attention") and backend == "triton"
    ):
        checks.append("test_aot_dispatch_dynamic")
    for arguments in samples(operator, x, backend):
        torch.library.opcheck(
            getattr(torch.ops.nsa_fsa, operator).default, arguments, test_utils=checks
        )


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_a_second_derivative_is_refused(operator, backend):
    """By name, rather than taken for zero."""
    x = inputs(True, operator, backend)
    o = cases.output(cases.call(operator, cases.case_for(operator, backend, CASE), x, backend))
    (dx,) = torch.autograd.grad(
        o.square().sum(), getattr(x, cases.DIFFERENTIABLE[operator][0]), create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"nsa_fsa::\w+_backward has no gradient.*Fix"):
        dx.sum().backward()


def test_what_carries_no_gradient_is_refused():
    """The layer detaches what goes into the choice of blocks; whoever calls the bare
    operator has to.
    """
    x = inputs(True)
    arguments = [
        y.requires_grad_() if cases.is_float(y) else y
        for y in samples("block_scores", x, "reference")[0]
    ]
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


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_no_gradient_from_above_gives_none_below(operator, backend):
    x = inputs(True, operator, backend)
    StopGradient.apply(
        cases.output(cases.call(operator, cases.case_for(operator, backend, CASE), x, backend))
    ).sum().backward()
    assert all(getattr(x, name).grad is None for name in cases.DIFFERENTIABLE[operator])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_the_compiler_does_not_look_into_an_operator(mode):
    """Called where a compiled model leaves the graph, but what it calls there is still compiled."""
    x = inputs(False)
    arguments = (
        x.gate_logits.requires_grad_(mode is torch.enable_grad),
        x.o_cmp,
        x.o_slc,
        x.o_swa,
        "reference",
    )

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
cu_seqlens = torch.tensor([0, 8], dtype=torch.int32)
ops.sliding_window_attention(q, q, q, cu_seqlens, 8, window_size=4).sum().backward()
print("torch._dynamo" in sys.modules)
"""


def test_the_first_call_does_not_import_the_compiler():
    """Which takes as long as importing torch itself."""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "False\n", result.stdout + result.stderr


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", [same, heads_first])
@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_compiled_equals_eager(operator, backend, layout, compiler):
    """One graph without breaks, forward and backward, bit by bit."""
    cases.on_a_gpu_only(backend)
    torch._dynamo.reset()
    case = cases.case_for(operator, backend, CASE, calls=2)
    x = inputs(True, operator, backend, layout=layout)
    compiled = torch.compile(
        lambda x: cases.output(cases.call(operator, case, x, backend)),
        fullgraph=True,
        backend=compiler,
    )
    o, o_compiled = cases.output(cases.call(operator, case, x, backend)), compiled(x)
    assert torch.equal(o, o_compiled)
    do = torch.randn_like(o)
    for name, *grads in zip(
        cases.DIFFERENTIABLE[operator],
        cases.gradients(operator, o, x, do),
        cases.gradients(operator, o_compiled, x, do),
        strict=True,
    ):
        assert torch.equal(*grads), f"d{name}"


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", cases.backends_of("select_blocks"))
def test_compiled_selection_equals_eager(backend, compiler):
    torch._dynamo.reset()
    x = inputs(False, "select_blocks", backend)
    lse = cases.call("compressed_attention", CASE, x)[1]
    compiled = torch.compile(
        lambda x, lse: cases.select(CASE, x, lse, backend, return_scores=True),
        fullgraph=True,
        backend=compiler,
    )
    for a, b in zip(
        compiled(x, lse), cases.select(CASE, x, lse, backend, return_scores=True), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("operator", "backend"), cases.operators_and_backends())
def test_no_recompilation_after_the_second_length(operator, backend):
    """The first length compiles, the second may compile once more with dynamic sizes,
    no later one does.
    """
    cases.on_a_gpu_only(backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    block_size = cases.case_for(operator, backend, CASE).block_size
    case = dataclasses.replace(CASE, block_size=block_size)
    compiled = torch.compile(
        lambda x: cases.output(cases.call(operator, case, x, backend)),
        fullgraph=True,
        backend=counter,
    )
    frames = []
    # Tables of 32 rows need no padding.
    for lengths in [(12, 0, 5), (11, 3, 4), (15, 1, 4), (2, 1, 29)]:
        case = cases.case_for(operator, backend, dataclasses.replace(CASE, lengths=lengths))
        x = inputs(True, operator, backend, case)
        o = compiled(x)
        assert torch.equal(o, cases.output(cases.call(operator, case, x, backend)))
        cases.gradients(operator, o, x, torch.ones_like(o))
        frames.append(counter.frame_count)
    assert frames[0] == 1
    assert frames[1:] == [frames[1]] * 3, f"graphs compiled so far, after each length: {frames}"
    assert frames[1] <= 2
