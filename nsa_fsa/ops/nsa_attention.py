"""The whole core of Native Sparse Attention: queries, keys, values and gates in, output out.

One operator with one autograd formula, so that backward keeps only what it needs, and the gradients
of the branches meet in place. A branch's gradients never see a gated copy of the output's: see
`nsa_fsa.reference.branch_gradients`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_fsa.checks import check_ints, check_positive, check_rows
from nsa_fsa.config import BRANCHES
from nsa_fsa.ops.block_selection import operator as block_selection
from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.common.attention_operator import fake_result
from nsa_fsa.ops.common.backends import Backends, check_known
from nsa_fsa.ops.common.calls import (
    WORKSPACE_BYTES,
    AddTo,
    Blocks,
    Softmax,
    Windows,
    check_attention,
    check_compressed_rows,
    check_compressed_values,
    default_scale,
)
from nsa_fsa.ops.common.registration import Gradient, define_operator
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall

# The branches, and what mixes them.
from nsa_fsa.ops.compressed_attention import operator as compressed_attention
from nsa_fsa.ops.dense_queries import EVERYTHING, attend_densely, is_known
from nsa_fsa.ops.gated_combine import operator as gated_combine
from nsa_fsa.ops.gated_combine.operator import BranchesCall, GatedCall, check_gates
from nsa_fsa.ops.selected_attention import operator as selected_attention
from nsa_fsa.ops.selected_attention.call import BlockIndex, IndexCall, SelectedCall
from nsa_fsa.ops.sliding_window_attention import operator as sliding_window_attention
from nsa_fsa.sequences import Sequences

# In the order in which they run.
OPERATORS: tuple[Backends[Any], ...] = (
    compressed_attention.BACKENDS,
    block_selection.BACKENDS,
    selected_attention.BACKENDS,
    sliding_window_attention.BACKENDS,
    gated_combine.BACKENDS,
)


class Branches(NamedTuple):
    """What happened inside `nsa_attention`, for those who want to look; without gradients."""

    o_cmp: Tensor  # [T, HQ, DV]
    o_slc: Tensor  # [T, HQ, DV]
    o_swa: Tensor  # [T, HQ, DV]
    block_indices: Tensor  # int32 [T, HKV, T_sel]; of dense queries, what they would have chosen
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
    dense_below: int = 0,
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
        k_cmp, v_cmp: compressed keys and values, `[T // kernel_stride, HKV, D]` and
            `[T // kernel_stride, HKV, DV]`.
        gate_logits: `[T, HQ or 1, 3]`, before the sigmoid; branch order compressed,
            selected, sliding.
        dense_below: queries at a smaller position of their sequence than this attend to all keys of
            the selected branch up to their own instead, and have no part in the branches and gates;
            where max_seqlen is not greater, nothing else runs. 0: none do.
        k_swa, v_swa: keys and values of the sliding branch; default k and v.
        return_branches: also return the branches' outputs and log-sum-exps, and the block indices.
        recompute: of "compressed", "selected" and "sliding", the branches whose output is not kept
            for backward but computed again there: `[T, HQ, DV]` less memory each, for the time of
            the branch's forward.
        workspace_bytes: how much memory the kernels may take beside inputs, outputs and gradients,
            at any length; what is not counted says `selected_attention`.
        backend: which implementation runs: a name goes to every operator that has a backend of this
            name, and the others choose as with "auto"; `nsa_fsa.explain` says what runs. A
            sequence's output has the same bits in any company with a name, and may differ in the
            last ones with "auto", which chooses by the whole batch; so may gradients with both.
        The other arguments are those of `compressed_attention`, `select_blocks`,
        `selected_attention` and `sliding_window_attention`.

    Returns:
        o `[T, HQ, DV]` in q's dtype, and on request `Branches`.

    Raises:
        ValueError: for inconsistent shapes, dtypes, devices, sequence descriptors or sizes,
            a branch that does not exist, or a backend that no operator has; with dense_below, where
            seqused_k is given without cu_seqlens_q.
    """
    windows = Windows(kernel_size, kernel_stride).check()
    blocks = Blocks(block_size, init_blocks, local_blocks).check()
    blocks.check_selection(windows, num_selected_blocks)
    check_positive(window_size=window_size, workspace_bytes=workspace_bytes)
    check_ints(0, dense_below=dense_below)
    check_known(backend, "nsa_attention", *OPERATORS)
    check_rows("q", q, 3, "[T, HQ, D]")

    shared = (k_swa is None or k_swa is k) and (v_swa is None or v_swa is v)
    k_own = None if shared else (k if k_swa is None else k_swa)
    v_own = None if shared else (v if v_swa is None else v_swa)
    call = CoreCall(
        *(q, k, v, k_cmp, v_cmp, gate_logits, k_own, v_own),
        Sequences(cu_seqlens, max_seqlen, cu_seqlens_q, seqused_k),
        default_scale(q, scale),
        *(windows, blocks, num_selected_blocks, window_size, workspace_bytes),
        _checked_branches(recompute),
        backend,
        int(torch.is_grad_enabled()),
    )
    call.check()
    if dense_below and not return_branches and is_known(max_seqlen <= dense_below):
        return call.with_unread(sliding_window_attention.OPERATOR(call.dense(dense_below)).o)

    result: Any = OPERATOR(call)
    o, inside = result
    if dense_below:
        o = attend_densely(call.dense(dense_below), o)
    outputs = (inside.o_cmp, inside.o_slc, inside.o_swa)
    branches = Branches(*outputs, inside.block_indices, *inside.lses)
    return (o, branches) if return_branches else o


def _checked_branches(recompute: Collection[str]) -> tuple[str, ...]:
    names = isinstance(recompute, Collection) and not isinstance(recompute, str)
    if not names or not all(isinstance(name, str) and name in BRANCHES for name in recompute):
        raise ValueError(
            f"recompute={recompute!r} must be a tuple of {BRANCHES}. "
            'Fix: for example recompute=("compressed",).'
        )
    return tuple(recompute)


@dataclass(frozen=True)
class CoreCall:
    """One call of the core, and the calls of the operators that it consists of."""

    q: Tensor  # [T, HQ, D]
    k: Tensor  # [T, HKV, D], of the selected branch
    v: Tensor  # [T, HKV, DV]
    k_cmp: Tensor  # [T // kernel_stride, HKV, D]
    v_cmp: Tensor  # [T // kernel_stride, HKV, DV]
    gate_logits: Tensor  # [T, HQ or 1, 3]
    # [T, HKV, D], of the sliding branch; None: it shares those of the selected one
    k_swa: Tensor | None
    v_swa: Tensor | None  # [T, HKV, DV]
    sequences: Sequences
    scale: float
    windows: Windows
    blocks: Blocks
    num_selected_blocks: int
    window_size: int
    workspace_bytes: int
    recompute: tuple[str, ...]  # branches whose output is not kept for the backward
    backend: str
    # 1: a backward may come, for which the block index is kept. 0: none will, and the selected
    # branch makes an index of those queries alone that need one.
    keeps_index: int = 1

    def check(self) -> None:
        """Raises ValueError for tensors that do not fit together."""
        q, k, v = self.q, self.k, self.v
        k_cmp, v_cmp, sequences = self.k_cmp, self.v_cmp, self.sequences
        kernel_stride = self.windows.kernel_stride
        check_attention(q, k, v, sequences)
        sequences.check(q.device)
        check_attention(q, k_cmp, v_cmp, sequences, kernel_stride)
        check_compressed_rows(k_cmp, k.shape[0], kernel_stride)
        if k_cmp.shape[1] != k.shape[1]:
            raise ValueError(
                f"k_cmp has {k_cmp.shape[1]} heads but k {k.shape[1]}; they must agree, "
                "because what is chosen by a head of k_cmp is read from that head of k. "
                "Fix: compress every KV head."
            )

        v_swa = v if self.v_swa is None else self.v_swa
        if self.k_swa is not None:
            check_attention(q, self.k_swa, v_swa, sequences)
            if self.k_swa.shape[0] != k.shape[0]:
                raise ValueError(
                    f"k_swa has {self.k_swa.shape[0]} rows but k {k.shape[0]}; they must agree, "
                    "because cu_seqlens is about both. Fix: make both from the same tokens."
                )

        for name, values in (("v_cmp", v_cmp), ("v_swa", v_swa)):
            if values.shape[2] != v.shape[2]:
                raise ValueError(
                    f"{name} has width {values.shape[2]} but v {v.shape[2]}; "
                    "they must agree, because the branches' outputs are added. "
                    "Fix: project the values of all branches to one width."
                )
        check_gates(self.gate_logits, q, "q")

    def check_values(self) -> None:
        """Raises ValueError for sequences whose numbers do not fit the tensors."""
        self.sequences.check_values(self.q.shape[0], self.k.shape[0])
        check_compressed_values(self.q, self.k_cmp, self.sequences, self.windows.kernel_stride)

    def _of(self, operator: Backends[Any]) -> tuple[Sequences, float, int, str]:
        """What every branch's call has after its tensors."""
        return self.sequences, self.scale, self.workspace_bytes, operator.or_auto(self.backend)

    def compressed(self) -> WindowedCall:
        shared = self._of(compressed_attention.BACKENDS)
        return WindowedCall(self.q, self.k_cmp, self.v_cmp, *shared, self.windows, None)

    def selection(self, lse: Tensor) -> SelectionCall:
        backend = block_selection.BACKENDS.or_auto(self.backend)
        sizes = (self.windows, self.blocks, self.num_selected_blocks)
        return SelectionCall(self.q, self.k_cmp, lse, self.sequences, self.scale, *sizes, backend)

    def selected(self, block_indices: Tensor, index: BlockIndex | None) -> SelectedCall:
        shared = self._of(selected_attention.BACKENDS)
        return SelectedCall(
            self.q, self.k, self.v, *shared, self.blocks, block_indices, None, index
        )

    def sliding(self) -> WindowedCall:
        k = self.k if self.k_swa is None else self.k_swa
        v = self.v if self.v_swa is None else self.v_swa
        shared = self._of(sliding_window_attention.BACKENDS)
        return WindowedCall(self.q, k, v, *shared, Windows(1, 1), self.window_size)

    def dense(self, dense_below: int) -> WindowedCall:
        """Of all queries; those at a position below `dense_below` see all keys up to their own.

        Raises ValueError for sequences whose queries it does not know.
        """
        sequences = self.sequences
        if sequences.seqused_k is not None and sequences.cu_seqlens_q is None:
            raise ValueError(
                f"dense_below={dense_below} is not available where seqused_k is given without "
                "cu_seqlens_q. Fix: pass cu_seqlens_q, and the queries of these sequences alone."
            )
        shared = self._of(sliding_window_attention.BACKENDS)
        window_size = min(dense_below, EVERYTHING)
        return WindowedCall(self.q, self.k, self.v, *shared, Windows(1, 1), window_size)

    def with_unread(self, o: Tensor) -> Tensor:
        """o, with gradients of 0 for the tensors that only the branches and gates read. A parameter
        without any gradient is an error for DDP, where other ranks have longer sequences."""
        for x in (self.gate_logits, self.k_cmp, self.v_cmp, self.k_swa, self.v_swa):
            if x is not None and x.requires_grad:
                o = o + x[:0].sum()
        return o

    def combination(self, o_cmp: Tensor, o_slc: Tensor, o_swa: Tensor) -> GatedCall:
        backend = gated_combine.BACKENDS.or_auto(self.backend)
        return GatedCall(self.gate_logits, o_cmp, o_slc, o_swa, backend)


class Lses(NamedTuple):
    """Of the branches, `[T, HQ]`."""

    lse_cmp: Tensor
    lse_slc: Tensor
    lse_swa: Tensor


class CoreSaved(NamedTuple):
    """What the backward needs beside the call. A branch whose output is None computes it again."""

    o_cmp: Tensor | None
    o_slc: Tensor | None
    o_swa: Tensor | None
    lses: Lses
    block_indices: Tensor
    block_index: BlockIndex | None


class CoreResult(NamedTuple):
    o: Tensor
    inside: CoreSaved  # with all outputs


class CoreGradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    gate_logits: Tensor
    k_swa: Tensor | None
    v_swa: Tensor | None


def _forward(call: CoreCall) -> CoreResult:
    call.check_values()
    o_cmp, lse_cmp = compressed_attention.BACKENDS.run(call.compressed())
    block_indices = block_selection.BACKENDS.run(call.selection(lse_cmp))
    selected = call.selected(block_indices, None)
    if call.keeps_index and selected_attention.wants_index(selected):
        index = selected_attention.make_index(IndexCall.of(selected))
        selected = call.selected(block_indices, index)
    o_slc, lse_slc = selected_attention.BACKENDS.run(selected)

    o_swa, lse_swa = sliding_window_attention.BACKENDS.run(call.sliding())
    o = gated_combine.BACKENDS.run(call.combination(o_cmp, o_slc, o_swa))
    lses = Lses(lse_cmp, lse_slc, lse_swa)
    return CoreResult(o, CoreSaved(o_cmp, o_slc, o_swa, lses, block_indices, selected.index))


def _keep(call: CoreCall, result: CoreResult) -> CoreSaved:
    outputs = dict(compressed="o_cmp", selected="o_slc", sliding="o_swa")
    dropped: Any = {outputs[branch]: None for branch in call.recompute}
    return result.inside._replace(**dropped)


class _Gates:
    """The gates, backward: the gradient of their logits, and of every branch the statistics with
    which its own backward may be given the gradient of the whole output."""

    def __init__(self, call: CoreCall, do: Tensor, saved: CoreSaved):
        self.lses = saved.lses
        self.gate_logits, self.do = call.gate_logits, do
        self.backend = gated_combine.BRANCH_GRADIENTS.or_auto(call.backend)
        self.dlogits: Tensor | None = None  # as gate_logits, of the branches seen so far
        self.softmax: list[Softmax] = [Softmax(None, lse) for lse in self.lses]

    def see(self, *outputs: Tensor | None) -> None:
        """Learns of the branches whose outputs are not None what there is to know."""
        if all(o is None for o in outputs):
            return
        call = BranchesCall(self.do, outputs, self.lses, self.gate_logits, self.backend)
        dlogits, lses, deltas = gated_combine.BRANCH_GRADIENTS.run(call)
        if self.dlogits is None:
            self.dlogits = dlogits
        for branch, (o, lse, delta) in enumerate(zip(outputs, lses, deltas, strict=True)):
            if o is not None:
                self.softmax[branch] = Softmax(None, lse, delta)
                if self.dlogits is not dlogits:
                    self.dlogits[..., branch] = dlogits[..., branch]


def _backward(call: CoreCall, do: Tensor, saved: CoreSaved) -> CoreGradients:
    do = do.contiguous()
    compressed, sliding = call.compressed(), call.sliding()
    selected = call.selected(saved.block_indices, saved.block_index)

    # The outputs that are here are seen at once, which reads do once; others one at a time.
    gates = _Gates(call, do, saved)
    gates.see(saved.o_cmp, saved.o_slc, saved.o_swa)
    if saved.o_cmp is None:
        gates.see(compressed_attention.BACKENDS.run(compressed).o, None, None)
    if saved.o_slc is None:
        gates.see(None, selected_attention.BACKENDS.run(selected).o, None)
    o_swa = saved.o_swa
    if o_swa is None:
        o_swa = sliding_window_attention.BACKENDS.run(sliding).o
        gates.see(None, None, o_swa)
    of_compressed, of_selected, of_sliding = gates.softmax
    # FlashAttention reads the output again.
    of_sliding = Softmax(o_swa, of_sliding.lse, of_sliding.delta)
    del o_swa

    # The libraries of the sliding branch write their gradients; the others' kernels add to these.
    shared = call.k_swa is None
    dq, dk_swa, dv_swa = sliding_window_attention.BACKENDS.differentiate(sliding, do, of_sliding)
    del of_sliding
    add_to = AddTo(dq, dk_swa, dv_swa) if shared else AddTo(dq)
    dq, dk, dv = selected_attention.BACKENDS.differentiate(selected, do, of_selected, add_to)
    dq, dk_cmp, dv_cmp = compressed_attention.BACKENDS.differentiate(
        compressed, do, of_compressed, AddTo(dq)
    )
    own = (None, None) if shared else (dk_swa, dv_swa)
    assert gates.dlogits is not None
    return CoreGradients(dq, dk, dv, dk_cmp, dv_cmp, gates.dlogits, *own)


def _fake(call: CoreCall) -> CoreResult:
    o, lse = fake_result(call.compressed())
    o_cmp, o_slc, o_swa = (torch.empty_like(o) for _ in BRANCHES)
    lses = Lses(lse, torch.empty_like(lse), torch.empty_like(lse))
    shape = (call.q.shape[0], call.k.shape[1], call.num_selected_blocks)
    block_indices = call.q.new_empty(shape, dtype=torch.int32)
    selected = call.selected(block_indices, None)
    index = None
    if call.keeps_index and selected_attention.wants_index(selected):
        index = selected_attention.fake_index(IndexCall.of(selected))
    return CoreResult(o, CoreSaved(o_cmp, o_slc, o_swa, lses, block_indices, index))


_GRADIENT = Gradient(CoreSaved, _keep, CoreGradients, _backward)
OPERATOR = define_operator("nsa_attention", CoreCall, CoreResult, _forward, _fake, _GRADIENT)
