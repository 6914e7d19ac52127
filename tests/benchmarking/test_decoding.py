"""Steps of decoding as the benchmark makes, repeats and checks them."""

import dataclasses

import pytest
import torch

from nsa_fsa import NSAConfig
from nsa_fsa.benchmarking import decoding
from nsa_fsa.benchmarking.check import WrongResult
from nsa_fsa.benchmarking.decoding import (
    LAYER_DECODE,
    NSA_DECODE,
    SDPA,
    DecodeCase,
    nsa_step,
    sdpa_step,
)

CONFIG = NSAConfig.from_dict(
    dict(preset="tiny", hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
)
CASE = DecodeCase(CONFIG, 208, torch.float32, "cpu", batch_size=3)


def checked(implementation, case):
    return implementation.check(case, "forward", implementation.passes(case)["forward"]())


@pytest.mark.parametrize("num_new", [1, 4])
def test_a_right_step_passes(num_new):
    case = dataclasses.replace(CASE, num_new=num_new)
    assert checked(NSA_DECODE, case)["o"] < 1e-5


def test_full_attention_is_held_to_its_own_reference():
    full = dataclasses.replace(SDPA, function=lambda *x: sdpa_step(*x, backend="MATH"))
    assert checked(full, CASE)["o"] < 1e-5
    with pytest.raises(ValueError, match="stands at the first key"):
        full.passes(dataclasses.replace(CASE, num_new=2))


def test_layers_have_caches_of_their_own(monkeypatch):
    assert CASE.layers == 8
    pages = torch.cat([CASE.pages(layer).table.flatten() for layer in range(8)])
    assert len(pages) == len(pages.unique()) == CASE["k"].shape[0]
    monkeypatch.setattr(decoding, "MOST_BYTES", 3 * 208 * 2 * 32 * 4 * 2)
    assert CASE.layers == 2


def test_a_layers_step():
    case = dataclasses.replace(CASE, batch_size=2, num_new=2)
    assert checked(LAYER_DECODE, case)["y"] < 1e-4
    assert (LAYER_DECODE.repeats(case), NSA_DECODE.repeats(case)) == (1, 8)


def test_a_wrong_step_is_refused():
    def wrong(case, layer):
        step = nsa_step(case, layer)
        return lambda: step()._replace(o=step().o * 1.02)

    def other_blocks(case, layer):
        step = nsa_step(case, layer)
        return lambda: step()._replace(block_indices=step().block_indices + 1)

    for function, said in ((wrong, "o differs"), (other_blocks, "choices of blocks")):
        with pytest.raises(WrongResult, match=said):
            checked(dataclasses.replace(NSA_DECODE, function=function), CASE)
