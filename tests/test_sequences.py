"""pack_batch against a loop over the tokens."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from nsa_fsa.sequences import pack_batch

CPU = torch.device("cpu")


def packed_by_loop(mask, position_ids, length):
    """Rows of the real tokens, and the sequences as lists of them;
    without positions a sequence for every row.
    """
    real = [[bool(x) for x in row[len(row) - length :]] for row in mask.tolist()]
    sequences = []
    for b, row in enumerate(real):
        last = None
        if position_ids is None:
            sequences.append([])
        for column in (c for c in range(length) if row[c]):
            position = (
                0 if position_ids is None else int(position_ids.expand(len(real), -1)[b, column])
            )
            if position_ids is not None and (
                last is None or position - last[1] not in (1, column - last[0])
            ):
                sequences.append([])
            sequences[-1].append(b * length + column)
            last = (column, position)
    return sequences


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_packing_equals_a_loop(data):
    batch_size, length, past = (
        data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 12), (0, 4))
    )
    bits = st.lists(
        st.booleans(), min_size=batch_size * (past + length), max_size=batch_size * (past + length)
    )
    dtype = data.draw(st.sampled_from([torch.bool, torch.int64, torch.uint8]))
    mask = torch.tensor(data.draw(bits)).view(batch_size, past + length).to(dtype)
    position_ids = None
    if data.draw(st.booleans()):
        rows = data.draw(st.sampled_from([1, batch_size]))
        numbers = st.lists(st.integers(0, 3), min_size=rows * length, max_size=rows * length)
        jumps = torch.tensor(data.draw(numbers)).view(rows, length)
        counted = torch.arange(length).expand(rows, -1)
        position_ids = torch.where(
            jumps == 0, jumps, counted - torch.where(jumps == 1, counted, 0).cummax(1).values
        )
    if position_ids is not None and data.draw(st.booleans()):
        mask = torch.ones(batch_size, length, dtype=torch.bool)
        packing = pack_batch(batch_size, length, CPU, None, position_ids)
    else:
        packing = pack_batch(batch_size, length, CPU, mask, position_ids)

    sequences = packed_by_loop(mask, position_ids, length)
    real = [row for sequence in sequences for row in sequence]
    found = list(range(batch_size * length)) if packing.rows is None else packing.rows.tolist()
    assert found == real
    assert (packing.rows is None) == (len(real) == batch_size * length)
    assert (packing.mask is None) == bool(mask.bool().all() and not mask.shape[1] > length > 1)
    num_filled = len({row // length for row in real})
    assert packing.packed == (position_ids is not None and len(sequences) > num_filled)
    cu_seqlens = packing.layout.cu_seqlens.tolist()
    if not packing.packed:
        sequences = [[row for row in real if row // length == b] for b in range(batch_size)]
    assert cu_seqlens == [sum(map(len, sequences[:i])) for i in range(len(sequences) + 1)]
    assert packing.layout.cu_seqlens.dtype == torch.int32
    assert packing.layout.max_seqlen == max(map(len, sequences)) or not real


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0.0, -torch.inf]]),
        torch.tensor([[0.0, torch.finfo(torch.bfloat16).min]], dtype=torch.bfloat16),
        torch.tensor([[1.0, torch.nan]]),
        torch.tensor([[0, -10000]]),
        torch.tensor([[0.0, 0.0]]),
    ],
    ids=["inf", "min", "nan", "int", "all 0.0"],
)
def test_additive_masks_are_refused(mask):
    with pytest.raises(
        ValueError,
        match=r"negative values.*non-zero where a token is real.*Fix: attention_mask == 0",
    ):
        pack_batch(1, 2, CPU, mask)
