"""Changes of decoding's configuration: each is one, and gives what the default gives."""

import dataclasses

import torch

from benchmarks.tuning import CASES, CHANGES, case_of, changed_step
from nsa_fsa.benchmarking.decoding import nsa_step
from nsa_fsa.decode.launch import DecodeConfig
from tests.benchmarking.test_decoding import CASE
from tests.cases import device_of


def test_every_change_is_of_the_configuration():
    default = DecodeConfig()
    assert not CHANGES["default"]
    for change in CHANGES.values():
        dataclasses.replace(default, **change)
    for name in CASES:
        assert case_of(name).num_tokens >= 32768


def test_a_change_changes_no_result():
    case = dataclasses.replace(CASE, device=device_of("triton"), batch_size=1)
    change = dict(score_shares=2, score_windows=16, keys=16, shares=2, sliding_shares=1, ranked=64)
    found, expected = changed_step(case, 0, change)(), nsa_step(case, 0, "reference")()
    assert torch.equal(found.block_indices, expected.block_indices)
    torch.testing.assert_close(found.o, expected.o)
