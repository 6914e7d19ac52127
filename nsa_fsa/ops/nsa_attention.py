"""The whole core of Native Sparse Attention: queries, keys, values and gates in, output out.

One operator with one autograd formula, so that backward keeps only what it needs, and the gradients of the branches meet in
place. A branch's gradients never see a gated copy of the output's: see `nsa_fsa.reference.branch_gradients`.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_fsa.config import BRANCHES
from nsa_fsa.ops.block_selection.operator import check_blocks
from nsa_fsa.ops.common import backends, checks, triton_backends
from nsa_fsa.ops.common.registration import define_operator
from nsa_fsa.ops.compressed_attention.operator import check_compressed_rows
from nsa_fsa.ops.gated_combine.operator import check_gates
from nsa_fsa.ops.selected_attention.operator import WORKSPACE_BYTES, block_index_fake, block_index_run, wants_index


class Branches(NamedTuple):
    """What happened inside `nsa_attention`, for those who want to look; without gradients."""

    o_cmp: Tensor  # [T, HQ, DV]
    o_slc: Tensor  # [T, HQ, DV]
    o_swa: Tensor  # [T, HQ, DV]
    block_indices: Tensor  # int32 [T, HKV, T_sel]
    lse_cmp: Tensor  # [T, HQ], natural log; -inf where a query sees nothing
    lse_slc: Tensor  # [T, HQ]
    lse_swa: Tensor  # [T, HQ]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gate_logits: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    window_size: int,
    k_swa: Tensor | None = None,
    v_swa: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    return_branches: bool = False,
    recompute: Collection[str] = (),
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Any:
    """Compressed, selected and sliding window attention, mixed by gates (NSA paper, eq. 5).

    Args:
        q: `[T, HQ, D]`.
        k, v: `[T, HKV, D]` and `[T, HKV, DV]`, of the selected branch.
        k_cmp, v_cmp: compressed keys and values, `[T // kernel_stride, HKV, D]` and `[T // kernel_stride, HKV, DV]`.
        gate_logits: `[T, HQ or 1, 3]`, before the sigmoid; branch order compressed, selected, sliding.
        k_swa, v_swa: keys and values of the sliding branch; default k and v.
        return_branches: also return the branches' outputs and log-sum-exps, and the block indices.
        recompute: of "compressed", "selected" and "sliding", the branches whose output is not kept for backward but computed
            again there: `[T, HQ, DV]` less memory each, for the time of the branch's forward.
        workspace_bytes: how much memory the kernels may take beside inputs, outputs and gradients, at any length; what is not
            counted says `selected_attention`.
        backend: which implementation runs: a name goes to every operator that has a backend of this name, and the others
            choose as with "auto"; `nsa_fsa.explain` says what runs. A sequence's output has the same bits in any company with
            a name, and may differ in the last ones with "auto", which chooses by the whole batch; so may gradients with both.
        The other arguments are those of `compressed_attention`, `select_blocks`, `selected_attention` and
        `sliding_window_attention`.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request `Branches`.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices, sequence descriptors or sizes, a branch that does not exist, or a
            backend that no operator has.
    """
    layout = (cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k)
    shared = (k_swa is None or k_swa is k) and (v_swa is None or v_swa is v)
    k_own, v_own = (None, None) if shared else (k if k_swa is None else k_swa, v if v_swa is None else v_swa)
    check_blocks(kernel_size, kernel_stride, block_size, num_selected_blocks, init_blocks, local_blocks)
    checks.check_positive(window_size=window_size, workspace_bytes=workspace_bytes)
    checks.check_attention(q, k, v, *layout)
    checks.check_attention(q, k_cmp, v_cmp, *layout, kernel_stride)
    checks.check_compressed_rows(k_cmp, k.shape[0], kernel_stride)
    checks.require(
        k_cmp.shape[1] == k.shape[1],
        lambda: (
            f"k_cmp has {k_cmp.shape[1]} heads but k {k.shape[1]}; they must agree, because what is chosen by a head of k_cmp "
            "is read from that head of k. Fix: compress every KV head."
        ),
    )
    if k_own is not None and v_own is not None:
        checks.check_attention(q, k_own, v_own, *layout)
        checks.require(
            k_own.shape[0] == k.shape[0],
            lambda: (
                f"k_swa has {k_own.shape[0]} rows but k {k.shape[0]}; they must agree, because cu_seqlens is about both. "
                "Fix: make both from the same tokens."
            ),
        )
    for name, values in (("v_cmp", v_cmp), ("v_swa", v if v_own is None else v_own)):
        checks.require(
            values.shape[2] == v.shape[2],
            lambda: (
                f"{name} has width {values.shape[2]} but v {v.shape[2]}; they must agree, because the branches' outputs are "
                "added. Fix: project the values of all branches to one width."
            ),
        )
    check_gates(gate_logits, q, "q")
    checks.require(
        isinstance(recompute, Collection)
        and not isinstance(recompute, str)
        and all(isinstance(name, str) and name in BRANCHES for name in recompute),
        lambda: f'recompute={recompute!r} must be a tuple of {BRANCHES}. Fix: for example recompute=("compressed",).',
    )
    backends.check_known(backend, "nsa_attention", *OPERATORS)
    o, *inside = _operator(
        q, k, v, k_cmp, v_cmp, gate_logits, k_own, v_own, *layout, checks.default_scale(q, scale), kernel_size,
        kernel_stride, block_size, num_selected_blocks, init_blocks, local_blocks, window_size, workspace_bytes,
        [name in recompute for name in BRANCHES], backend,
    )  # fmt: skip
    return (o, Branches(*inside[:3], inside[6], *inside[3:6])) if return_branches else o  # type: ignore[call-arg]


OPERATORS = ("compressed_attention", "select_blocks", "selected_attention", "sliding_window_attention", "gated_combine")


@dataclass
class _Branch:
    """One branch of one call: its operator, the queries, keys and values it reads, and what else its backend wants."""

    operator: str
    tensors: tuple[Tensor, Tensor, Tensor]
    arguments: dict[str, Any]
    backend: str

    def _resolve(self, backward: bool) -> backends.Backend:
        name = backends.of_several(self.operator, self.backend)
        return backends.to_run(self.operator, name, *self.tensors, backward=backward, **self.arguments)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self._resolve(backward=False).forward(*self.tensors, **self.arguments)

    def backward(self, do: Tensor, o: Tensor | None, *statistics: Tensor, add_to: tuple[Tensor | None, ...] = (None,) * 3):
        """Gradients of queries, keys and values. statistics: lse and delta of the gates' `branch_gradients`."""
        lse, delta = statistics
        run = self._resolve(backward=True).backward
        return run(do, *self.tensors, o, lse, delta=delta, add_to=add_to, **self.arguments)


@dataclass
class _Call:
    """One call of the core: the operator's arguments, in their order; and the branches they describe."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gate_logits: Tensor
    k_swa: Tensor | None
    v_swa: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_q: Tensor | None
    seqused_k: Tensor | None
    scale: float
    kernel_size: int
    kernel_stride: int
    block_size: int
    num_selected_blocks: int
    init_blocks: int
    local_blocks: int
    window_size: int
    workspace_bytes: int
    recompute: list[bool]  # for each of BRANCHES
    backend: str

    @property
    def sequences(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("cu_seqlens", "max_seqlen", "cu_seqlens_q", "seqused_k")}

    @property
    def layout(self) -> dict[str, Any]:
        return dict(**self.sequences, scale=self.scale)

    @property
    def windows(self) -> dict[str, int]:
        return dict(kernel_size=self.kernel_size, kernel_stride=self.kernel_stride)

    @property
    def forced(self) -> dict[str, int]:
        return dict(block_size=self.block_size, init_blocks=self.init_blocks, local_blocks=self.local_blocks)

    def check_values(self) -> None:
        checks.check_layout_values(self.q.shape[0], self.k.shape[0], **self.sequences)
        check_compressed_rows(self.q, self.k_cmp, kernel_stride=self.kernel_stride, **self.sequences)

    def compressed(self) -> _Branch:
        tensors = (self.q, self.k_cmp, self.v_cmp)
        arguments = dict(**self.layout, **self.windows, workspace_bytes=self.workspace_bytes)
        return _Branch("compressed_attention", tensors, arguments, self.backend)

    def select(self, lse: Tensor) -> Tensor:
        tensors = (self.q, self.k_cmp, lse)
        sizes = dict(**self.layout, **self.windows, **self.forced, num_selected_blocks=self.num_selected_blocks)
        name = backends.of_several("select_blocks", self.backend)
        return backends.to_run("select_blocks", name, *tensors, **sizes).forward(*tensors, **sizes)

    def wants_index(self, block_indices: Tensor) -> bool:
        name = backends.of_several("selected_attention", self.backend)
        where = (self.block_size, self.scale, self.cu_seqlens_q, self.seqused_k, name)
        return wants_index(self.q, self.k, self.v, block_indices, *where)

    def selected(self, block_indices: Tensor, index: tuple[Tensor | None, ...]) -> _Branch:
        arguments = dict(
            **self.layout, **self.forced, block_indices=block_indices, block_counts=None, workspace_bytes=self.workspace_bytes,
            **dict(zip(triton_backends.INDEX, index, strict=True)),
        )  # fmt: skip
        return _Branch("selected_attention", (self.q, self.k, self.v), arguments, self.backend)

    def sliding(self) -> _Branch:
        k, v = (self.k if self.k_swa is None else self.k_swa), (self.v if self.v_swa is None else self.v_swa)
        sizes = dict(window_size=self.window_size, workspace_bytes=self.workspace_bytes)
        return _Branch("sliding_window_attention", (self.q, k, v), dict(**self.layout, **sizes), self.backend)

    def gates(self, operator: str, *tensors: Any) -> Any:
        """Runs what `gated_combine` registers."""
        name = backends.of_several(operator, self.backend)
        return backends.to_run(operator, name, self.gate_logits, self.q).forward(*tensors)


_INPUTS = [field.name for field in fields(_Call)]
_NUM_GRADIENTS = _INPUTS.index("cu_seqlens")  # of the tensors before it
# What forward leaves to backward, after its output: the branches' outputs (None where they are computed again), their
# statistics, and who chose what.
_SAVED = ("o_cmp", "o_slc", "o_swa", "lse_cmp", "lse_slc", "lse_swa", "block_indices", *triton_backends.INDEX)


def _run_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    call.check_values()
    o_cmp, lse_cmp = call.compressed().forward()
    block_indices = call.select(lse_cmp)
    index: tuple[Tensor | None, ...] = (None,) * len(triton_backends.INDEX)
    if call.wants_index(block_indices):
        index = block_index_run(
            block_indices, None, call.cu_seqlens, call.max_seqlen, **call.forced, workspace_bytes=call.workspace_bytes
        )
    o_slc, lse_slc = call.selected(block_indices, index).forward()
    o_swa, lse_swa = call.sliding().forward()
    o = call.gates("gated_combine", call.gate_logits, o_cmp, o_slc, o_swa)
    no_index = [block_indices.new_empty(0) for part in index if part is None]  # an operator cannot return None
    return o, o_cmp, o_slc, o_swa, lse_cmp, lse_slc, lse_swa, block_indices, *(no_index or index)


def _run_backward(do: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments[: len(_INPUTS)])
    saved = arguments[len(_INPUTS) :]
    outputs, statistics, (block_indices, *index) = list(saved[:3]), saved[3:6], saved[6:]
    indexed = call.wants_index(block_indices)
    branches = (
        call.compressed(),
        call.selected(block_indices, tuple(index) if indexed else (None,) * len(index)),
        call.sliding(),
    )
    do = do.contiguous()
    dgates: list[Any] = [None] * 3
    gated: list[Any] = [None] * 3

    def through_gates(numbers: list[int]) -> None:
        here = [outputs[number] if number in numbers else None for number in range(3)]
        results = call.gates("branch_gradients", do, here, statistics, call.gate_logits)
        for number in numbers:
            dgates[number], *gated[number] = (result[number] for result in results)

    # Outputs that are here all at once, which reads do once; others one by one, so that one at a time is here.
    kept = [number for number in range(3) if outputs[number] is not None]
    if kept:
        through_gates(kept)
    for number, branch in enumerate(branches):
        if number not in kept:
            outputs[number], _ = branch.forward()
            through_gates([number])
        if branch.operator != "sliding_window_attention":  # whose output FlashAttention reads again
            outputs[number] = None
    # The libraries of the sliding branch write their gradients; the others' kernels add to what they find.
    (compressed, selected, sliding), (of_compressed, of_selected, of_sliding) = branches, gated
    dq, dk_swa, dv_swa = sliding.backward(do, outputs.pop(), *of_sliding)
    shared = call.k_swa is None
    dq, dk, dv = selected.backward(do, None, *of_selected, add_to=(dq, dk_swa, dv_swa) if shared else (dq, None, None))
    dq, dk_cmp, dv_cmp = compressed.backward(do, None, *of_compressed, add_to=(dq, None, None))
    dgate_logits = torch.stack(dgates, dim=-1)
    own = [call.k.new_empty(0), call.v.new_empty(0)] if shared else [dk_swa, dv_swa]
    return dq, dk, dv, dk_cmp, dv_cmp, dgate_logits, *own


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    q, v = call.q, call.v
    outputs = [q.new_empty(q.shape[0], q.shape[1], v.shape[2]) for _ in range(4)]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    statistics = [q.new_empty(q.shape[:2], dtype=lse_dtype) for _ in range(3)]
    block_indices = q.new_empty(q.shape[0], call.k.shape[1], call.num_selected_blocks, dtype=torch.int32)
    if call.wants_index(block_indices):
        index = block_index_fake(block_indices, None, call.cu_seqlens, call.max_seqlen, *call.forced.values())
    else:
        index = tuple(block_indices.new_empty(0) for _ in triton_backends.INDEX)
    return *outputs, *statistics, block_indices, *index


def _backward_fake(do: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = _Call(*arguments[: len(_INPUTS)])
    grads = [x.new_empty(x.shape) for x in (call.q, call.k, call.v, call.k_cmp, call.v_cmp, call.gate_logits)]
    own = [(call.k, call.k_swa), (call.v, call.v_swa)]
    return *grads, *(shared.new_empty(0) if x is None else x.new_empty(x.shape) for shared, x in own)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    recompute = inputs[_INPUTS.index("recompute")]
    outputs = [None if again else o for again, o in zip(recompute, output[1:4], strict=True)]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *outputs, *output[4:])
    ctx.mark_non_differentiable(*output[1:])


def _vjp(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    inputs = [x if is_tensor else other for x, is_tensor, other in zip(saved, ctx.tensors, ctx.others, strict=False)]
    *grads, dk_swa, dv_swa = _backward(do, *inputs, *saved[len(_INPUTS) :])
    own = (None, None) if inputs[_INPUTS.index("k_swa")] is None else (dk_swa, dv_swa)
    return *grads, *own, *(None for _ in _INPUTS[_NUM_GRADIENTS:])


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor k_cmp, Tensor v_cmp, Tensor gate_logits, Tensor? k_swa, Tensor? v_swa, "
    "Tensor cu_seqlens, SymInt max_seqlen, Tensor? cu_seqlens_q, Tensor? seqused_k, float scale, int kernel_size, "
    "int kernel_stride, int block_size, int num_selected_blocks, int init_blocks, int local_blocks, int window_size, "
    "int workspace_bytes, bool[] recompute, str backend"
)
_SCHEMA_SAVED = ", ".join(f"Tensor{'?' if name.startswith('o_') else ''} {name}" for name in _SAVED)


def _results(number: int) -> str:
    return f"({', '.join(['Tensor'] * number)})"


_backward = define_operator(
    "nsa_attention_backward", _run_backward, _backward_fake,
    schema=f"(Tensor do, {_SCHEMA}, {_SCHEMA_SAVED}) -> {_results(_NUM_GRADIENTS)}",
)  # fmt: skip
_operator = define_operator(
    "nsa_attention", _run_forward, _forward_fake, schema=f"({_SCHEMA}) -> {_results(1 + len(_SAVED))}",
    setup_context=_setup_context, vjp=_vjp,
)  # fmt: skip
