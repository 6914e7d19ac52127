"""The one table of cases that drives every operator and every backend,
and how to make a case's inputs and call an operator.

A new backend is tested as soon as it is registered: the tests are parametrised by
`backends_of(operator)`.
"""

import dataclasses
import functools
import re
from dataclasses import dataclass
from itertools import accumulate
from unittest import mock

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.ops.common import replay
from nsa_fsa.ops.common.backends import Backend
from nsa_fsa.ops.compression.operator import GATHER_BACKENDS, POOL_BACKENDS
from nsa_fsa.ops.nsa_attention import OPERATORS
from tests.oracle import windows


@dataclass(frozen=True)
class Case:
    """One problem. `small`: small enough for tests/oracle.py; otherwise the oracle is
    nsa_fsa.reference in float64.
    """

    name: str
    lengths: tuple[int, ...]
    num_kv_heads: int
    group_size: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    kernel_size: int
    kernel_stride: int
    block_size: int
    num_selected_blocks: int
    init_blocks: int
    local_blocks: int
    window_size: int
    seed: int
    small: bool = False

    def __str__(self):
        return f"{self.name}-seed{self.seed}"

    @property
    def num_heads(self):
        return self.num_kv_heads * self.group_size

    @property
    def windows(self):
        return dict(kernel_size=self.kernel_size, kernel_stride=self.kernel_stride)

    @property
    def blocks(self):
        return dict(
            block_size=self.block_size,
            num_selected_blocks=self.num_selected_blocks,
            init_blocks=self.init_blocks,
            local_blocks=self.local_blocks,
        )

    @property
    def scale(self):
        return self.head_dim**-0.5


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# fmt: off
CASES = [
    Case(*row, seed=seed, small=sum(row[1]) <= 140)
    for seed, row in enumerate([
        # name, lengths, HKV, G, D, DV, dtype, kernel_size, kernel_stride, block_size, T_sel, init,
        # local, window
        ("one_token", (1,), 1, 1, 32, 32, F32, 32, 16, 64, 4, 1, 2, 8),
        ("one_token_g3", (1,), 2, 3, 80, 64, BF16, 16, 16, 16, 1, 0, 1, 1),
        # Shorter than a window and than a block.
        ("t15", (15,), 2, 2, 32, 64, BF16, 16, 8, 16, 2, 1, 1, 4),
        ("t15_tiny_windows", (15,), 1, 8, 64, 32, F32, 4, 2, 4, 3, 1, 1, 6),
        ("t16", (16,), 1, 3, 64, 64, F16, 16, 16, 16, 2, 1, 1, 16),
        ("t16_one_block", (16,), 1, 16, 32, 32, F32, 8, 4, 16, 1, 0, 0, 5),
        ("t17", (17,), 1, 4, 32, 80, F32, 16, 8, 16, 2, 0, 1, 5),
        ("t17_g12", (17,), 1, 12, 32, 32, BF16, 8, 8, 16, 5, 1, 1, 64),
        ("t31", (31,), 1, 5, 80, 80, BF16, 32, 16, 32, 4, 1, 2, 16),
        ("t31_stride1", (31,), 2, 1, 64, 32, F32, 3, 1, 4, 3, 0, 1, 7),
        ("t32", (32,), 2, 1, 32, 96, F32, 32, 16, 32, 4, 1, 2, 32),
        ("t32_g7", (32,), 1, 7, 32, 32, F16, 16, 8, 16, 2, 1, 0, 10),
        ("t33", (33,), 1, 7, 64, 32, F16, 16, 8, 32, 2, 1, 1, 17),
        ("t33_d128", (33,), 1, 2, 128, 64, BF16, 16, 4, 16, 2, 0, 2, 33),
        ("t63", (63,), 1, 4, 96, 96, BF16, 32, 16, 64, 16, 1, 2, 512),
        ("t64", (64,), 2, 2, 64, 64, F32, 32, 16, 64, 1, 0, 1, 64),
        ("t64_g5", (64,), 1, 5, 32, 32, F16, 16, 8, 16, 3, 1, 1, 12),
        ("t65", (65,), 1, 3, 80, 128, F16, 32, 16, 64, 2, 1, 1, 16),
        ("t65_no_forced", (65,), 2, 1, 32, 32, F32, 8, 4, 16, 3, 0, 0, 20),
        ("t127", (127,), 1, 2, 32, 32, F32, 32, 16, 32, 3, 1, 2, 31),
        ("t127_d192", (127,), 1, 1, 192, 128, BF16, 16, 8, 16, 5, 1, 2, 40),
        ("empty_ends", (0, 33, 0, 0, 64, 0), 2, 2, 32, 64, F32, 16, 8, 16, 3, 1, 1, 9),
        ("nine", (1, 0, 15, 16, 17, 5, 31, 33, 2), 1, 3, 32, 32, F32, 8, 4, 8, 3, 1, 1, 6),
        ("nine_bf16", (17, 16, 1, 0, 15, 3, 32, 31, 4), 2, 1, 64, 32, BF16,
         16, 16, 16, 2, 1, 1, 16),
        # Few tokens: for tests that run it often.
        ("five", (0, 5, 17, 0, 11), 2, 2, 32, 64, F32, 8, 4, 16, 2, 1, 0, 9),
        # From here on too large for tests/oracle.py.
        ("t200_d256", (200,), 1, 2, 256, 256, F16, 32, 16, 64, 3, 1, 1, 50),
        ("t200_g16", (200,), 1, 16, 192, 128, BF16, 32, 16, 64, 3, 1, 2, 64),
        ("t200_g12", (200,), 1, 12, 256, 64, F32, 16, 8, 32, 4, 1, 1, 33),
        ("t200_g8", (200,), 2, 8, 96, 80, F16, 32, 32, 128, 1, 0, 1, 128),
        ("t1000", (1000,), 1, 4, 64, 128, BF16, 32, 16, 64, 7, 1, 2, 128),
        ("t1000_b128", (1000,), 1, 1, 128, 192, F32, 32, 16, 128, 4, 1, 2, 200),
        ("t2048", (2048,), 1, 2, 64, 64, BF16, 32, 16, 64, 16, 1, 2, 512),
        ("packed_2048", (65, 2048, 0, 127), 1, 1, 128, 64, F16, 64, 16, 128, 5, 1, 2, 100),
        ("packed_1000", (1000, 63, 1, 200, 64), 1, 2, 80, 96, F32, 16, 8, 16, 6, 0, 1, 64),
        ("packed_nine", (64, 127, 0, 63, 65, 200, 31, 33, 32), 2, 5, 32, 32, BF16,
         32, 16, 32, 3, 1, 1, 32),
        # Sequences of one length, which need no tables.
        ("alike", (21, 21, 21), 1, 3, 32, 32, F32, 8, 4, 16, 2, 1, 1, 9),
        ("alike_700", (700, 700, 700, 700), 2, 3, 64, 64, BF16, 32, 16, 64, 5, 1, 2, 100),
    ])
]
# fmt: on
SMALL_CASES = [case for case in CASES if case.small]
SEVERAL_SEQUENCES = [case for case in CASES if len(case.lengths) > 1]


def by_name(name):
    return next(case for case in CASES if case.name == name)


@dataclass
class Inputs:
    """Everything that some operator takes. Rows that no compressed token owns are NaN in
    k_cmp and v_cmp.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cmp: torch.Tensor
    v_cmp: torch.Tensor
    gate_logits: torch.Tensor
    o_cmp: torch.Tensor
    o_slc: torch.Tensor
    o_swa: torch.Tensor
    pool_weight: torch.Tensor
    block_indices: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to(self, dtype, requires_grad=False):
        """The same values in another dtype, as new leaves of autograd."""
        floats = {
            name: x.detach().to(dtype, copy=True) for name, x in vars(self).items() if is_float(x)
        }
        return self.replace(**{name: x.requires_grad_(requires_grad) for name, x in floats.items()})


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def make_inputs(case, dtype=None, device="cpu", requires_grad=False):
    """Random inputs of a case. The values are rounded to the case's dtype,
    so that every dtype holds the same ones.
    """
    generator = torch.Generator().manual_seed(case.seed)
    total, heads, kv_heads = sum(case.lengths), case.num_heads, case.num_kv_heads
    cu_seqlens = list(accumulate(case.lengths, initial=0))
    rounded_to = case.dtype if dtype is None or dtype.itemsize > case.dtype.itemsize else dtype

    def randn(*shape):
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(rounded_to)
            .to(dtype or case.dtype)
        )

    k_cmp = randn(total // case.kernel_stride, kv_heads, case.head_dim)
    v_cmp = randn(total // case.kernel_stride, kv_heads, case.v_head_dim)
    owned = windows(cu_seqlens, **case.windows)
    for row in set(range(total // case.kernel_stride)) - set(owned):
        k_cmp[row] = v_cmp[row] = torch.nan

    block_indices = torch.full((total, kv_heads, case.num_selected_blocks), -1, dtype=torch.int32)
    for start, length in zip(cu_seqlens, case.lengths, strict=False):
        for t in range(length):
            for kv in range(kv_heads):
                chosen = torch.randperm(t // case.block_size + 1, generator=generator)[
                    : case.num_selected_blocks
                ]
                block_indices[start + t, kv, : len(chosen)] = chosen.sort().values

    inputs = Inputs(
        q=randn(total, heads, case.head_dim),
        k=randn(total, kv_heads, case.head_dim),
        v=randn(total, kv_heads, case.v_head_dim),
        k_cmp=k_cmp,
        v_cmp=v_cmp,
        gate_logits=randn(total, heads if case.seed % 2 else 1, 3),  # per head or per token
        o_cmp=randn(total, heads, case.v_head_dim),
        o_slc=randn(total, heads, case.v_head_dim),
        o_swa=randn(total, heads, case.v_head_dim),
        pool_weight=randn(kv_heads, case.kernel_size),
        block_indices=block_indices,
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        max_seqlen=max(case.lengths, default=0),
    )
    for name, x in vars(inputs).items():
        if isinstance(x, torch.Tensor):
            setattr(inputs, name, x.to(device).requires_grad_(requires_grad and is_float(x)))
    return inputs


# Every operator with the inputs that it is differentiable in. Selection carries no gradient.
DIFFERENTIABLE = {
    "compressed_attention": ("q", "k_cmp", "v_cmp"),
    "selected_attention": ("q", "k", "v"),
    "sliding_window_attention": ("q", "k", "v"),
    "gated_combine": ("gate_logits", "o_cmp", "o_slc", "o_swa"),
    "pool_windows": ("k", "pool_weight"),
    "gather_windows": ("k",),
    "nsa_attention": ("q", "k", "v", "k_cmp", "v_cmp", "gate_logits"),
}
BACKENDS = {found.operator: found for found in (POOL_BACKENDS, GATHER_BACKENDS, *OPERATORS)}
# What a layer calls for every token, in this order.
CORE = (
    "compressed_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "gated_combine",
)
# What one of ATTENTIONS computes, forward and backward.
RESULTS = ("o", "lse", "dq", "dk", "dv")
ATTENTIONS = ("compressed_attention", "selected_attention", "sliding_window_attention")


def call(operator, case, x, backend="auto", **extra):
    """Runs an operator of nsa_fsa.ops on a case's inputs; attention operators return (o, lse).
    `extra` goes to the operator.
    """
    layout = dict(backend=backend, **extra)
    packed, qkv = (x.cu_seqlens, x.max_seqlen), (x.q, x.k, x.v)
    if operator == "compressed_attention":
        return ops.compressed_attention(
            x.q, x.k_cmp, x.v_cmp, *packed, return_lse=True, **case.windows, **layout
        )
    if operator == "select_blocks":
        lse = call("compressed_attention", case, x, "reference")[1]
        return select(case, x, lse, **layout)
    if operator == "selected_attention":
        return ops.selected_attention(
            *qkv, x.block_indices, *packed, block_size=case.block_size, return_lse=True, **layout
        )
    if operator == "sliding_window_attention":
        return ops.sliding_window_attention(
            *qkv, *packed, window_size=case.window_size, return_lse=True, **layout
        )
    if operator == "gated_combine":
        return ops.gated_combine(x.gate_logits, x.o_cmp, x.o_slc, x.o_swa, **layout)
    if operator == "pool_windows":
        return ops.pool_windows(x.k, x.pool_weight, *packed, **case.windows, **layout)
    if operator == "gather_windows":
        return ops.gather_windows(x.k, *packed, **case.windows, **layout)
    if operator == "nsa_attention":
        return ops.nsa_attention(
            *qkv,
            *(x.k_cmp, x.v_cmp, x.gate_logits),
            *packed,
            window_size=case.window_size,
            **case.blocks,
            **case.windows,
            **layout,
        )
    raise ValueError(operator)


def output(result):
    """The differentiable output of what `call` returned."""
    return result[0] if isinstance(result, tuple) else result


def select(case, x, lse, backend="auto", **extra):
    """Runs select_blocks on a case's inputs."""
    return ops.select_blocks(
        x.q,
        x.k_cmp,
        lse,
        x.cu_seqlens,
        x.max_seqlen,
        backend=backend,
        **case.blocks,
        **case.windows,
        **extra,
    )


def gradients(operator, o, x, do):
    """Gradients of `(o * do).sum()` with respect to what the operator is differentiable in."""
    leaves = [getattr(x, name) for name in DIFFERENTIABLE[operator]]
    if not o.requires_grad:  # plain autograd, where no query of the case sees any key
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(o, leaves, do, allow_unused=True, materialize_grads=True)


# How many blocks of keys Triton's interpreter may visit in one test: about 8 s on one core.
# KV-major counts each (row of q, block) once, query-major each (program, block), and a program's
# own start as one more.
INTERPRETED_BLOCKS = {"triton_kv_major": 10_000, "triton_query_major": 500}
# How many rows, (query, head) pairs, a "triton" backend of another operator may have in one test:
# about 6 s of compressed attention, the slowest of them. One in float32 counts four times, because
# its tiles have as few rows.
INTERPRETED_ROWS = 8_000
# "triton_window": the kernels of compressed attention, which are tested under their own name.
INTERPRETED_WINDOW_ROWS = 600


def skip_what_takes_too_long(operator, backend, case, calls, dtype):
    """Skips the test, with the reason, where Triton's interpreter stands in for a GPU and the test
    would take it too long: one that runs the case's forward and backward `calls` times.
    """
    if backend == "reference" or device_of(backend) == "cuda":
        return
    rows = sum(case.lengths) * (
        case.num_kv_heads if backend == "triton_query_major" else case.num_heads
    )
    if backend in INTERPRETED_BLOCKS:
        visited = min(case.num_selected_blocks, -(-max(case.lengths, default=0) // case.block_size))
        too_long = calls * rows * (1 + visited) > INTERPRETED_BLOCKS[backend]
    else:
        calls *= 3 if operator == "nsa_attention" else 1
        most = INTERPRETED_WINDOW_ROWS if backend == "triton_window" else INTERPRETED_ROWS
        too_long = calls * rows * (4 if dtype == F32 else 1) > most
    if too_long:
        pytest.skip(f"{case.name} takes Triton's interpreter too long: on a GPU only")


def refusal(operator, backend, run, *, backward=False):
    """Why a backend refuses the call of an operator that `run` makes when it is given the name of
    a backend, or None. The reference runs it; the whole's is that of its selected attention.
    """
    asked = BACKENDS["selected_attention" if operator == "nsa_attention" else operator]
    calls = []

    def choose(call, **_):
        calls.append(call)
        return asked.by_name["reference"]

    # A tape chooses no more.
    with mock.patch.object(asked, "choose", choose), mock.patch.object(replay, "ENABLED", False):
        run("reference")
    named = asked.by_name.get(backend)  # the whole takes names that selected attention does not
    return None if named is None else named.refuses(calls[0], backward=backward)


@functools.cache
def accepted(operator, backend, case):
    """The case, or where the backend refuses it, the case in float16, with blocks of 16 keys,
    or both.
    """
    for changes in ({}, {"dtype": F16}, {"block_size": 16}, {"dtype": F16, "block_size": 16}):
        changed = dataclasses.replace(case, **changes)
        token = dataclasses.replace(changed, lengths=(1,))
        x = make_inputs(token, device=device_of(backend))
        reason = refusal(operator, backend, functools.partial(call, operator, token, x))
        if reason is None:
            return changed
    raise AssertionError(f"backend={backend!r} of {operator} cannot run {case}: {reason}")


def case_for(operator, backend, case, calls=1, dtype=None):
    """The case as a backend takes it. Skips the test where only a GPU is fast enough.

    `calls`: how many times forward and backward the test runs the case; `dtype`: in which, where
    that is not the case's own.
    """
    case = accepted(operator, backend, case)
    skip_what_takes_too_long(operator, backend, case, calls, dtype or case.dtype)
    return case


def on_a_gpu_only(backend, *backends):
    """Skips the test of one of these backends, by default the slowest to interpret, on a CPU."""
    if backend in (backends or ("triton_query_major",)) and device_of(backend) == "cpu":
        pytest.skip(f"{backend} takes Triton's interpreter too long here: on a GPU only")


def is_refused(operator, backend, run):
    """Whether a backend refuses the call that `run` makes, as `refusal` has it;
    asked for by name it must then raise the reason.
    """
    reason = refusal(operator, backend, run)
    if reason is not None:
        with pytest.raises(ValueError, match=f"{re.escape(reason)}.*Fix"):
            run(backend)
    return reason is not None


# (operator, backend) without kernels of its own: whichever of the others' is fastest runs.
# tests/ops/selected_attention/test_triton_choice.py.
CHOOSERS = [("selected_attention", "triton"), ("sliding_window_attention", "flash_attention")]


def backends_of(operator):
    """The operator's backends as pytest parameters; one that cannot run here is skipped
    with its reason.
    """
    # The whole takes the name of any of its operators'; compressed attention has those that
    # several share.
    available = BACKENDS[
        "compressed_attention" if operator == "nsa_attention" else operator
    ].available()
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=reason) if reason else ())
        for name, reason in available.items()
        if (operator, name) not in CHOOSERS
    ]


def prefer(monkeypatch, operator, backend):
    """Adds a backend to an operator, before all others."""
    monkeypatch.setattr(
        BACKENDS[operator], "by_name", {backend.name: backend, **BACKENDS[operator].by_name}
    )


class Impossible(Backend):
    """A backend that cannot run here, and says why."""

    name = "impossible"

    def unavailable(self, device=None):
        return "it needs a machine [from] the future"

    def forward(self, call):
        raise AssertionError("it cannot run")


def operators_and_backends(*operators):
    """(operator, backend) pairs as pytest parameters; default: every operator."""
    return [
        pytest.param(
            operator, *backend.values, marks=backend.marks, id=f"{operator}-{backend.values[0]}"
        )
        for operator in operators or DIFFERENTIABLE
        for backend in backends_of(operator)
    ]


def device_of(backend):
    """Where a backend is tested: on the GPU where there is one, the reference on the CPU."""
    return "cuda" if backend != "reference" and torch.cuda.is_available() else "cpu"


# What rounding means, for tests that ask for equality to rounding.
ROUNDING = {torch.float64: 1e-12, F32: 1e-5, F16: 2**-10}


@functools.cache
def widest_dtype(backend):
    """The widest dtype a backend works in, and its rounding."""
    operator = next(name for name, found in BACKENDS.items() if backend in found.by_name)
    for dtype, rounding in ROUNDING.items():
        case = dataclasses.replace(by_name("one_token"), dtype=dtype)
        if accepted(operator, backend, case) == case:
            return dtype, rounding
    raise AssertionError(f"backend={backend!r} of {operator} takes none of {(*ROUNDING,)}")
