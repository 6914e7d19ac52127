"""What the host knows of shapes is checked wherever the tensors are:
a kernel would read past the end of what is too short.

On the meta device, where nothing can be read, as nothing is read from a GPU.
"""

import pytest
import torch

from tests.ops.test_validation import (
    DV,
    HKV,
    HQ,
    TENSORS,
    D,
    S,
    T,
    compressed,
    gated,
    gather,
    pool,
    select,
    selected,
    sliding,
    whole,
)

META = {name: x.to("meta") for name, x in TENSORS.items()}
LAST = dict(q=torch.zeros(3, HQ, D), gate_logits=torch.zeros(3, HQ, 3), lse=torch.zeros(3, HQ))
LAST |= dict(cu_seqlens_q=torch.tensor([0, 1, 3]).int(), seqused_k=torch.tensor([20, 12]).int())
NAMES = {
    compressed: ("q", "k_cmp", "v_cmp", "cu_seqlens"),
    selected: ("q", "k", "v", "block_indices", "cu_seqlens"),
    sliding: ("q", "k", "v", "cu_seqlens"),
    select: ("q", "k_cmp", "lse", "cu_seqlens"),
    pool: ("k", "weight", "cu_seqlens"),
    gather: ("k", "cu_seqlens"),
    gated: ("gate_logits", "o_cmp", "o_slc", "o_swa"),
    whole: ("q", "k", "v", "k_cmp", "v_cmp", "gate_logits", "cu_seqlens"),
}
FEW = dict(k_cmp=torch.zeros(T // S - 1, HKV, D), v_cmp=torch.zeros(T // S - 1, HKV, DV))
MORE_HEADS = dict(k_cmp=torch.zeros(T // S, HQ, D), v_cmp=torch.zeros(T // S, HQ, DV))
SHORT_WINDOW = dict(k_swa=torch.zeros(T - 1, HKV, D), v_swa=torch.zeros(T - 1, HKV, DV))
BAD = [
    (
        (compressed, select, whole),
        FEW,
        rf"k_cmp has {T // S - 1} rows; {T} tokens with kernel_stride={S} need {T // S}.*Fix",
    ),
    ((whole,), LAST | FEW, rf"k_cmp has {T // S - 1} rows.*need {T // S}"),
    ((whole,), MORE_HEADS, rf"k_cmp has {HQ} heads but k {HKV}"),
    ((whole,), LAST | SHORT_WINDOW, rf"k_swa has {T - 1} rows but k {T}"),
    ((whole,), SHORT_WINDOW, rf"q has {T} rows and k has {T - 1}"),
    (
        (selected, sliding, whole),
        dict(k=torch.zeros(T - 1, HKV, D), v=torch.zeros(T - 1, HKV, DV)),
        r"rows|block_indices",
    ),
    (
        (compressed, selected, sliding, whole),
        dict(v=torch.zeros(T - 1, HKV, DV), v_cmp=FEW["v_cmp"]),
        "rows and heads must",
    ),
    ((selected,), dict(block_indices=torch.zeros(T - 1, HKV, 4).int()), "block_indices is"),
    ((selected,), dict(block_counts=torch.zeros(T, HKV + 1).int()), "block_counts is"),
    ((select,), dict(lse=torch.zeros(T - 1, HQ)), "lse is"),
    ((gated, whole), dict(gate_logits=torch.zeros(T - 1, HQ, 3)), "gate_logits has shape"),
    ((gated,), dict(o_slc=torch.zeros(T - 1, HQ, DV)), "o_slc is"),
    ((pool,), dict(weight=torch.zeros(HKV, 7)), "weight is"),
]


def meta(operator, changes):
    """The good arguments and the changes that this operator takes, without memory."""
    keywords = {"cu_seqlens_q", "seqused_k", "block_counts"} | (
        {"k_swa", "v_swa"} if operator is whole else set()
    )
    taken = {name: x for name, x in changes.items() if name in keywords or name in NAMES[operator]}
    return {name: META[name] for name in NAMES[operator]} | {
        name: x.to("meta") for name, x in taken.items()
    }


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        pytest.param(op, changes, message, id=f"{op.__name__}-{message[:24]}")
        for ops, changes, message in BAD
        for op in ops
    ],
)
def test_refused(operator, changes, message):
    operator(**meta(operator, {}))
    with pytest.raises(ValueError, match=message):
        operator(**meta(operator, changes))


@pytest.mark.parametrize(
    "operator", [compressed, sliding, select, whole], ids=lambda operator: operator.__name__
)
def test_last_queries_are_accepted(operator):
    operator(**meta(operator, LAST))
