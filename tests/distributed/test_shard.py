"""What `ContextParallel.shard` makes of a batch."""

import pytest
import torch

from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.context_parallel import _with_more
from nsa_fsa.sequences import Sequences

IDS = torch.arange(1, 25).view(2, 12)


def test_labels_are_shifted_and_counted(one_rank):
    labels = IDS.clone()
    labels[0, 3] = -100
    found = ContextParallel(one_rank).shard(input_ids=IDS, labels=labels)
    assert found["shift_labels"][0].tolist() == [2, 3, -100, *range(5, 13), -100]
    assert torch.equal(found["labels"], found["shift_labels"])
    assert found["num_items_in_batch"] == 21
    shifted = dict(shift_labels=found["shift_labels"])
    again = ContextParallel(one_rank).shard(input_ids=IDS, labels=labels, **shifted)
    assert torch.equal(again["shift_labels"], found["shift_labels"])


@pytest.mark.parametrize("in_padding", [1, 99])
def test_padding_begins_no_sequence(one_rank, in_padding):
    """Whatever positions a collator gives it."""
    real = torch.arange(12) < torch.tensor([[12], [5]])
    position_ids = torch.arange(12).where(real, torch.tensor(in_padding))
    found = ContextParallel(one_rank).shard(
        input_ids=IDS, attention_mask=real, position_ids=position_ids
    )
    assert {*found} == {"input_ids", "position_ids", "context_parallel"}
    assert torch.equal(found["position_ids"][real], position_ids[real])


def test_positions_that_begin_anew_bound_sequences(one_rank):
    position_ids = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    found = ContextParallel(one_rank).shard(input_ids=IDS, position_ids=position_ids)
    assert found["cu_seq_lens_q"].tolist() == [0, 5, 12, 24]
    assert found["max_length_q"] == 12


def test_what_is_not_of_tokens_is_handed_on(one_rank):
    others = dict(output_router_logits=True, num_logits=torch.tensor(3), table=torch.ones(2, 5))
    states = torch.randn(2, 12, 8)
    found = ContextParallel(one_rank).shard(inputs_embeds=states, **others)
    assert all(found[name] is x for name, x in others.items())
    assert torch.equal(found["inputs_embeds"], states)


@pytest.mark.parametrize(
    ("boundaries", "rows", "expected"),
    [
        ([0, 5, 12], 1, [0, 5, 12, 15]),
        ([0, 0, 12, 12], 1, [0, 0, 12, 12, 15]),
        ([0, 5, 12, 24], 2, [0, 5, 12, 15, 27, 30]),
        ([0, 12, 20, 24], 2, [0, 12, 15, 23, 27, 30]),
    ],
)
def test_tokens_at_the_end_of_rows_are_sequences(boundaries, rows, expected):
    packed = Sequences(torch.tensor(boundaries, dtype=torch.int32), 2)
    found = _with_more(packed, rows, 12, 3)
    assert found.cu_seqlens.tolist() == expected
    assert found.cu_seqlens.dtype == torch.int32
    assert found.max_seqlen == 3
