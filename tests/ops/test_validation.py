"""Bad arguments are refused with a ValueError that names the argument and its value,
before anything is computed.
"""

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from nsa_fsa import ops
from tests.cases import BACKENDS, Impossible, device_of, prefer
from tests.wrong_values import (
    NO_BACKENDS,
    assert_refused,
    instead_of_int,
    instead_of_number,
    instead_of_tensor,
)

T, HQ, HKV, D, DV, S = 32, 4, 2, 16, 8, 4
SIZES = dict(kernel_size=8, kernel_stride=S)
BLOCKS = dict(block_size=16, num_selected_blocks=4, init_blocks=1, local_blocks=2)

TENSORS = dict(
    q=torch.zeros(T, HQ, D),
    k=torch.zeros(T, HKV, D),
    v=torch.zeros(T, HKV, DV),
    k_cmp=torch.zeros(T // S, HKV, D),
    v_cmp=torch.zeros(T // S, HKV, DV),
    lse=torch.zeros(T, HQ),
    weight=torch.zeros(HKV, 8),
    gate_logits=torch.zeros(T, HQ, 3),
    o_cmp=torch.zeros(T, HQ, DV),
    o_slc=torch.zeros(T, HQ, DV),
    o_swa=torch.zeros(T, HQ, DV),
    block_indices=torch.zeros(T, HKV, 4, dtype=torch.int32),
    cu_seqlens=torch.tensor([0, 20, T], dtype=torch.int32),
)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def take(names, changes):
    """The named good tensors, with `changes` put in their place; the other changes are keywords."""
    tensors = [changes.pop(name) if name in changes else TENSORS[name] for name in names]
    return tensors, changes.pop("max_seqlen", T)


def compressed(**changes):
    tensors, max_seqlen = take(("q", "k_cmp", "v_cmp", "cu_seqlens"), changes)
    return ops.compressed_attention(*tensors, max_seqlen, **{**SIZES, **changes})


def selected(**changes):
    tensors, max_seqlen = take(("q", "k", "v", "block_indices", "cu_seqlens"), changes)
    return ops.selected_attention(*tensors, max_seqlen, **{"block_size": 16, **changes})


def sliding(**changes):
    tensors, max_seqlen = take(("q", "k", "v", "cu_seqlens"), changes)
    return ops.sliding_window_attention(*tensors, max_seqlen, **{"window_size": 8, **changes})


def select(**changes):
    tensors, max_seqlen = take(("q", "k_cmp", "lse", "cu_seqlens"), changes)
    return ops.select_blocks(*tensors, max_seqlen, **{**SIZES, **BLOCKS, **changes})


def pool(**changes):
    tensors, max_seqlen = take(("k", "weight", "cu_seqlens"), changes)
    return ops.pool_windows(*tensors, max_seqlen, **{**SIZES, **changes})


def gather(**changes):
    tensors, max_seqlen = take(("k", "cu_seqlens"), changes)
    return ops.gather_windows(*tensors, max_seqlen, **{**SIZES, **changes})


def gated(**changes):
    tensors, _ = take(("gate_logits", "o_cmp", "o_slc", "o_swa"), changes)
    return ops.gated_combine(*tensors, **changes)


def whole(**changes):
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gate_logits", "cu_seqlens")
    tensors, max_seqlen = take(names, changes)
    return ops.nsa_attention(
        *tensors, max_seqlen, **{**SIZES, **BLOCKS, "window_size": 8, **changes}
    )


ATTENTIONS = (compressed, selected, sliding, select, whole)
WITH_SEQUENCES = (*ATTENTIONS, pool, gather)
WITH_WINDOWS = (compressed, select, pool, gather, whole)
LAST = dict(q=torch.zeros(3, HQ, D), cu_seqlens_q=ints(0, 1, 3))

# (operators, changed arguments, what the message must say)
BAD = [
    # q, k, v
    (ATTENTIONS, dict(q=torch.zeros(T, D)), rf"q has shape \({T}, {D}\)"),
    (ATTENTIONS, dict(q=torch.zeros(T, HQ, D, dtype=torch.int32)), r"q has dtype torch.int32"),
    (
        ATTENTIONS,
        dict(q=torch.zeros(T, HQ, D, dtype=torch.complex64)),
        r"q has dtype torch.complex64",
    ),
    (
        ATTENTIONS,
        dict(q=torch.zeros(T, HQ, D).bfloat16()),
        r"has dtype torch.float32 but q has torch.bfloat16.*[Ff]ix",
    ),
    (
        ATTENTIONS,
        dict(q=torch.zeros(T, HQ, D, device="meta")),
        r"is on cpu but q is on meta.*[Ff]ix",
    ),
    (ATTENTIONS, dict(q=torch.zeros(T, HQ, D + 1)), rf"q has head width {D + 1} but k\w* has {D}"),
    (
        ATTENTIONS,
        dict(q=torch.zeros(T, HQ + 1, D)),
        rf"q has {HQ + 1} heads and k\w* has {HKV}.*multiple",
    ),
    ((selected, sliding, whole), dict(k=torch.zeros(T, HKV)), rf"k has shape \({T}, {HKV}\)"),
    (
        (selected, sliding, whole),
        dict(k=torch.zeros(T, HKV, D).half()),
        r"k has dtype torch.float16 but q has torch.float32",
    ),
    (
        (selected, sliding, whole),
        dict(v=torch.zeros(T, HKV, DV).half()),
        r"v has dtype torch.float16 but q has torch.float32",
    ),
    (
        (selected, sliding, whole),
        dict(v=torch.zeros(T, HKV, DV, device="meta")),
        r"v is on meta but q is on cpu",
    ),
    (
        (selected, sliding, whole),
        dict(v=torch.zeros(T, HKV + 2, DV)),
        rf"v has shape \({T}, {HKV + 2}, {DV}\) but k has",
    ),
    (
        (selected, sliding, whole),
        dict(v=torch.zeros(T - 1, HKV, DV)),
        rf"v has shape \({T - 1}, {HKV}, {DV}\) but k has",
    ),
    (
        (selected, sliding),
        dict(q=torch.zeros(3, HQ, D)),
        rf"q has 3 rows and k has {T}|block_indices is",
    ),
    (
        (compressed, whole),
        dict(v_cmp=torch.zeros(T // S, HKV + 1, DV)),
        rf"v_cmp has shape \({T // S}, {HKV + 1}, {DV}\)",
    ),
    (
        (compressed, select, whole),
        dict(k_cmp=torch.zeros(T // S, HKV, D).half()),
        r"k_cmp has dtype torch.float16",
    ),
    (
        (compressed,),
        dict(k_cmp=torch.zeros(T // S - 1, HKV, D), v_cmp=torch.zeros(T // S - 1, HKV, DV)),
        rf"k_cmp has {T // S - 1} rows.*need {T // S}",
    ),
    (
        (select,),
        dict(k_cmp=torch.zeros(T // S - 1, HKV, D)),
        rf"k_cmp has {T // S - 1} rows.*need {T // S}",
    ),
    ((select,), dict(lse=torch.zeros(T, HKV)), rf"lse is torch.float32 \({T}, {HKV}\)"),
    ((select,), dict(lse=torch.zeros(T, HQ).half()), r"lse is torch.float16"),
    ((select,), dict(lse=torch.zeros(T, HQ, device="meta")), r"lse is .*on meta"),
    # sequence descriptors
    (
        WITH_SEQUENCES,
        dict(cu_seqlens=ints(0, 20, T, dtype=torch.int64)),
        r"cu_seqlens has dtype torch.int64.*Fix",
    ),
    (
        WITH_SEQUENCES,
        dict(cu_seqlens=ints(0, T).view(1, 2)),
        r"cu_seqlens has dtype torch.int32 and shape \(1, 2\)",
    ),
    (WITH_SEQUENCES, dict(cu_seqlens=ints()), r"cu_seqlens"),
    (WITH_SEQUENCES, dict(cu_seqlens=ints(0, T).to("meta")), r"cu_seqlens is on meta.*Fix"),
    (
        WITH_SEQUENCES,
        dict(cu_seqlens=ints(0, 20, 10, T)),
        r"cu_seqlens=\[0, 20, 10, 32\] must rise",
    ),
    (WITH_SEQUENCES, dict(cu_seqlens=ints(1, T)), r"cu_seqlens=\[1, 32\] must rise from 0"),
    (
        WITH_SEQUENCES,
        dict(cu_seqlens=ints(0, T - 1)),
        r"cu_seqlens=\[0, 31\] must rise from 0 to .*32",
    ),
    (
        WITH_SEQUENCES,
        dict(cu_seqlens=ints(0, T + 1), max_seqlen=T + 1),
        r"cu_seqlens=\[0, 33\] must rise from 0 to .*32",
    ),
    (
        WITH_SEQUENCES,
        dict(max_seqlen=19),
        r"max_seqlen=19 is less than the longest sequence, 20.*Fix",
    ),
    (WITH_SEQUENCES, dict(max_seqlen=-1), r"max_seqlen=-1 must be a Python int >= 0"),
    (WITH_SEQUENCES, dict(max_seqlen=32.0), r"max_seqlen=32.0 must be a Python int"),
    (
        WITH_SEQUENCES,
        dict(max_seqlen=torch.tensor(32)),
        r"max_seqlen=tensor\(32\) must be a Python int.*Fix",
    ),
    (
        WITH_SEQUENCES,
        dict(seqused_k=ints(20, 12, dtype=torch.int64)),
        r"seqused_k has dtype torch.int64.*Fix",
    ),
    (WITH_SEQUENCES, dict(seqused_k=ints(20)), r"seqused_k has dtype torch.int32 and shape \(1,\)"),
    (
        WITH_SEQUENCES,
        dict(seqused_k=ints(21, 12)),
        r"seqused_k=\[21, 12\] must lie between 0 and .*\[20, 12\]",
    ),
    (WITH_SEQUENCES, dict(seqused_k=ints(-1, 12)), r"seqused_k=\[-1, 12\] must lie between 0"),
    (
        ATTENTIONS,
        dict(cu_seqlens_q=ints(0, T)),
        r"cu_seqlens_q has dtype torch.int32 and shape \(2,\)",
    ),
    (
        ATTENTIONS,
        dict(cu_seqlens_q=ints(0, 20, 31)),
        r"cu_seqlens_q=\[0, 20, 31\] must rise from 0 to .*32",
    ),
    (ATTENTIONS, dict(cu_seqlens_q=ints(0, 33, 32)), r"cu_seqlens_q=\[0, 33, 32\] must rise"),
    (
        (compressed, sliding),
        dict(**LAST, seqused_k=ints(0, 12)),
        r"sequence 0 has 1 queries but 0 keys.*Fix",
    ),
    # sizes
    (WITH_WINDOWS, dict(kernel_size=10), r"kernel_size=10 must be a multiple of kernel_stride=4"),
    (WITH_WINDOWS, dict(kernel_size=0), r"kernel_size=0 must be an int >= 1"),
    (WITH_WINDOWS, dict(kernel_stride=0), r"kernel_stride=0 must be an int >= 1"),
    (WITH_WINDOWS, dict(kernel_size=8.0), r"kernel_size=8.0 must be an int >= 1"),
    ((select, whole), dict(block_size=18), r"block_size=18 must be a multiple of kernel_stride=4"),
    ((select, whole), dict(block_size=4), r"block_size=4 must be .*at least kernel_size=8"),
    ((select, selected, whole), dict(block_size=0), r"block_size=0 must be an int >= 1"),
    (
        (select, whole),
        dict(num_selected_blocks=0, init_blocks=0, local_blocks=0),
        r"num_selected_blocks=0 must be an int >= 1",
    ),
    (
        (select, whole),
        dict(num_selected_blocks=2),
        r"init_blocks=1 and local_blocks=2 .*num_selected_blocks=2",
    ),
    ((select, whole), dict(init_blocks=-1), r"init_blocks=-1"),
    ((select, selected, whole), dict(local_blocks=-1), r"local_blocks=-1"),
    ((sliding, whole), dict(window_size=0), r"window_size=0 must be an int >= 1"),
    # block indices
    (
        (selected,),
        dict(block_indices=TENSORS["block_indices"].long()),
        r"block_indices is torch.int64 .*must be int32",
    ),
    (
        (selected,),
        dict(block_indices=TENSORS["block_indices"][0]),
        rf"block_indices is torch.int32 \({HKV}, 4\)",
    ),
    (
        (selected,),
        dict(block_indices=TENSORS["block_indices"][1:]),
        rf"block_indices is torch.int32 \({T - 1}, {HKV}, 4\)",
    ),
    (
        (selected,),
        dict(block_indices=TENSORS["block_indices"][:, :1]),
        rf"block_indices is torch.int32 \({T}, 1, 4\)",
    ),
    (
        (selected,),
        dict(block_indices=TENSORS["block_indices"].to("meta")),
        r"block_indices is .* on meta",
    ),
    ((selected,), dict(block_counts=-1), r"block_counts=-1 must be an int >= 0"),
    (
        (selected,),
        dict(block_counts=torch.zeros(T, HKV, dtype=torch.int64)),
        r"block_counts is torch.int64",
    ),
    (
        (selected,),
        dict(block_counts=torch.zeros(T, 1, dtype=torch.int32)),
        rf"block_counts is torch.int32 \({T}, 1\)",
    ),
    (
        (selected,),
        dict(block_counts=torch.zeros(T, HKV, dtype=torch.int32, device="meta")),
        r"block_counts is .* on meta",
    ),
    # pooling weights
    (
        (pool,),
        dict(weight=torch.zeros(HKV, 7)),
        rf"weight is torch.float32 \({HKV}, 7\).*\({HKV}, 8\)",
    ),
    ((pool,), dict(weight=torch.zeros(HKV, 8, dtype=torch.int32)), r"weight is torch.int32"),
    ((pool,), dict(weight=torch.zeros(HKV, 8, device="meta")), r"weight is .* on meta"),
    ((pool, gather), dict(k=torch.zeros(T, D)), rf"x has shape \({T}, {D}\)"),
    ((pool, gather), dict(k=torch.zeros(T, HKV, D, dtype=torch.int32)), r"x has dtype torch.int32"),
    # gates and branches
    (
        (gated, whole),
        dict(gate_logits=torch.zeros(T, HQ, 2)),
        rf"gate_logits has shape \({T}, {HQ}, 2\).*3\]",
    ),
    (
        (gated, whole),
        dict(gate_logits=torch.zeros(T, HKV, 3)),
        rf"gate_logits has shape \({T}, {HKV}, 3\)",
    ),
    (
        (gated, whole),
        dict(gate_logits=torch.zeros(T - 1, HQ, 3)),
        rf"gate_logits has shape \({T - 1}, {HQ}, 3\)",
    ),
    (
        (gated, whole),
        dict(gate_logits=torch.zeros(T, HQ, 3, dtype=torch.int32)),
        r"gate_logits has dtype torch.int32",
    ),
    (
        (gated, whole),
        dict(gate_logits=torch.zeros(T, HQ, 3, device="meta")),
        r"gate_logits is on meta",
    ),
    ((gated,), dict(o_slc=torch.zeros(T, HQ, DV).half()), r"o_slc is torch.float16"),
    (
        (gated,),
        dict(o_swa=torch.zeros(T, HQ, DV + 1)),
        rf"o_swa is torch.float32 \({T}, {HQ}, {DV + 1}\)",
    ),
    ((gated,), dict(o_swa=torch.zeros(T, HQ, DV, device="meta")), r"o_swa is .* on meta"),
    # backends
    (
        (*WITH_SEQUENCES, gated),
        dict(backend="cudnn"),
        r"backend='cudnn' is not an implementation of \w+: allowed are .*auto.*Fix",
    ),
]


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{[*value.shape]}{value.device.type}".removeprefix("torch.")
    return str(value)


def table():
    found = []
    for operators, changes, message in BAD:
        values = "-".join(f"{name}={describe(value)}" for name, value in changes.items())
        found += [
            pytest.param(operator, changes, message, id=f"{operator.__name__}-{values}")
            for operator in operators
        ]
    return found


@pytest.mark.parametrize(("operator", "changes", "message"), table())
def test_bad_arguments_are_refused(operator, changes, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        operator(**changes)
    # a dtype or shape that it must have is the fix.
    assert "Fix: " in str(error.value) or "it must be" in str(error.value)


@pytest.mark.parametrize("operator", [*WITH_SEQUENCES, gated])
def test_the_good_arguments_are_accepted(operator):
    """Otherwise the table above would prove nothing."""
    operator()


@pytest.mark.parametrize("operator", WITH_SEQUENCES)
def test_optional_arguments_are_accepted(operator):
    operator(seqused_k=ints(20, 11))
    operator(max_seqlen=1000)
    if operator in (compressed, sliding):
        operator(**LAST)


def tensors(num_indices=4, dim=D, dtype=torch.float32):
    shapes = dict(q=(T, HQ, dim), k=(T, HKV, dim), v=(T, HKV, DV))
    indices = torch.zeros(T, HKV, num_indices, dtype=torch.int32)
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()} | dict(
        block_indices=indices
    )


NOT_FOR_TRITON = [
    (dict(block_size=8), r"block_size=8; supported are \(16, 32, 64, 128\)"),
    (dict(block_size=48), r"block_size=48; supported are"),
    (dict(scale=0.0), r"scale=0.0; it must be positive"),
    (dict(scale=-1.0), r"scale=-1.0; it must be positive"),
    (
        tensors(dtype=torch.float64),
        r"q has dtype torch.float64; supported are float16, bfloat16 and float32",
    ),
    (tensors(dim=257), r"head widths 257 and 8; supported are at most 256"),
    (tensors(num_indices=129), r"129 block indices a query; supported are at most 128"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    NOT_FOR_TRITON,
    ids=[message.split(";")[0] for _, message in NOT_FOR_TRITON],
)
@pytest.mark.parametrize("backend", ["triton", "triton_kv_major", "triton_query_major"])
def test_what_the_triton_kernels_do_not_take(backend, changes, message):
    """Refused with the reason where they are asked for by name; "auto" goes on to the reference."""
    if (reason := BACKENDS["selected_attention"].available()[backend]) is not None:
        pytest.skip(reason)
    names = ("q", "k", "v", "block_indices", "cu_seqlens")
    device = device_of(backend)
    changes = {name: TENSORS[name] for name in names} | changes
    changes = {
        name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in changes.items()
    }
    with pytest.raises(
        ValueError,
        match=rf"backend='{backend}' of selected_attention does not support this: {message}.*Fix",
    ):
        selected(**changes, backend=backend)
    selected(**changes)


def test_a_backend_that_cannot_run_here_says_why(monkeypatch):
    prefer(monkeypatch, "gated_combine", Impossible())
    with pytest.raises(
        RuntimeError,
        match=r"backend='impossible' of gated_combine cannot run here: it needs a machine.*auto",
    ):
        gated(backend="impossible")
    gated(backend="auto")  # takes the next one that can
    available = BACKENDS["gated_combine"].available()
    assert available["impossible"] == "it needs a machine [from] the future"
    assert available["reference"] is None


# --- Every argument of every operator, with everything that it cannot be --------------------------

SMALLEST = dict(
    max_seqlen=0,
    kernel_size=1,
    kernel_stride=1,
    block_size=1,
    num_selected_blocks=1,
    init_blocks=0,
    local_blocks=0,
    window_size=1,
    dense_below=0,
    workspace_bytes=1,
)
OPTIONAL = dict(
    k_swa=TENSORS["k"],
    v_swa=TENSORS["v"],
    cu_seqlens_q=TENSORS["cu_seqlens"],
    seqused_k=ints(20, 12),
    block_counts=torch.zeros(T, HKV, dtype=torch.int32),
    weight=TENSORS["weight"],
)
SWITCHES = ("return_lse", "return_scores", "return_branches")  # anything is true or false


def starts(**changes):
    tensors, _ = take(("k", "cu_seqlens"), changes)
    return ops.window_starts(*tensors, **{**SIZES, **changes})


def wrong_arguments():
    operators = {
        compressed: ops.compressed_attention,
        selected: ops.selected_attention,
        sliding: ops.sliding_window_attention,
        select: ops.select_blocks,
        whole: ops.nsa_attention,
        pool: ops.pool_windows,
        gather: ops.gather_windows,
        gated: ops.gated_combine,
        starts: ops.window_starts,
    }
    for call, operator in operators.items():
        for name in inspect.signature(operator).parameters:
            if name in SWITCHES:
                continue
            name = "k" if name == "x" else name
            if name in OPTIONAL:
                values = instead_of_tensor(OPTIONAL[name], optional=True)
                if name == "block_counts":
                    values = [value for value in values if type(value) is not int]
            elif name in TENSORS:
                values = instead_of_tensor(TENSORS[name])
            elif name in SMALLEST:
                values = instead_of_int(SMALLEST[name])
            else:
                values = {
                    "scale": instead_of_number(),
                    "backend": NO_BACKENDS,
                    "recompute": NO_RECOMPUTE,
                }[name]
            if call is starts and name == "k":  # of which only rows and device count
                values = [
                    value
                    for value in values
                    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.is_meta
                ]
            yield pytest.param(call, name, values, id=f"{call.__name__}-{name}")


NO_RECOMPUTE = [None, 3, True, "compressed", ["window"], [1], [np.ones(2)], torch.ones(2)]


@pytest.mark.parametrize(("operator", "name", "values"), [*wrong_arguments()])
def test_no_argument_fails_from_inside(operator, name, values):
    """A ValueError that names the argument and says what it must be:
    no other error, and no result.
    """
    shown = "x" if name == "k" and operator in (pool, gather, starts) else name
    shown = {"k_swa": "k", "v_swa": "v"}.get(shown, shown)  # checked as a branch's keys and values
    for value in values:
        assert_refused(lambda value=value: operator(**{name: value}), shown, value)


@pytest.mark.parametrize("operator", [compressed, selected, sliding, select, whole])
@pytest.mark.parametrize("shape", [dict(D=0), dict(DV=0), dict(HQ=0), dict(HKV=0)], ids=str)
def test_heads_without_width_and_no_heads(operator, shape):
    sizes = dict(D=D, DV=DV, HQ=HQ, HKV=HKV) | shape
    if operator is select and "DV" in shape:
        pytest.skip("it has no values")
    rows = {"q": (T, "HQ", "D"), "k": (T, "HKV", "D"), "v": (T, "HKV", "DV")}
    rows |= {"k_cmp": (T // S, "HKV", "D"), "v_cmp": (T // S, "HKV", "DV")}
    rows |= {"lse": (T, "HQ"), "gate_logits": (T, "HQ", 3), "block_indices": (T, "HKV", 4)}
    wanted = {
        select: ("q", "k_cmp", "lse"),
        compressed: ("q", "k_cmp", "v_cmp"),
        sliding: ("q", "k", "v"),
    }
    wanted |= {
        selected: ("q", "k", "v", "block_indices"),
        whole: ("q", "k", "v", "k_cmp", "v_cmp", "gate_logits"),
    }
    tensors = {
        name: torch.zeros([sizes.get(axis, axis) for axis in rows[name]], dtype=TENSORS[name].dtype)
        for name in wanted[operator]
    }
    with pytest.raises(ValueError, match="must be"):
        operator(**tensors)


def test_a_scale_of_another_kind_of_number():
    for scale in (1, np.float32(0.5), np.float64(0.5), Fraction(1, 2), -0.5, 0.0):
        expected = sliding(scale=float(scale), return_lse=True)
        assert all(
            torch.equal(a, b)
            for a, b in zip(sliding(scale=scale, return_lse=True), expected, strict=True)
        )


def test_a_scale_that_varies_under_torch_compile():
    torch._dynamo.reset()
    tensors = dict(q=torch.randn(T, HQ, D), k=torch.randn(T, HKV, D))
    compiled = torch.compile(
        lambda scale: sliding(scale=scale, **tensors), fullgraph=True, backend="aot_eager"
    )
    for scale in (0.1, 0.2, 0.3, 1):
        assert torch.equal(compiled(scale), sliding(scale=scale, **tensors))
    with pytest.raises(Exception, match="scale=nan must be a finite number"):
        compiled(float("nan"))
