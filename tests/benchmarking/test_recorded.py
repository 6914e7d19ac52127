"""Recorded choices of blocks: what is in the file, and what lengthening them keeps."""

import pytest
import torch

from benchmarks.inputs import SuiteCase
from nsa_fsa.benchmarking import recorded
from nsa_fsa.benchmarking.recorded import Recorded, union_factor
from nsa_fsa.config import NSAConfig

RECORDS = recorded.read()
CONFIG = NSAConfig(hidden_size=32, num_heads=2, num_kv_heads=1)
every_record = pytest.mark.parametrize("record", RECORDS, ids=lambda x: f"{x.stage}_{x.layer}")


def assert_possible(block_indices):
    """What a query can choose: itself and what is before it, each once, ascending, and what is
    promised."""
    rows = torch.arange(len(block_indices))[:, None]
    own = rows // 64
    for blocks in block_indices.unbind(1):
        is_there = blocks >= 0
        assert torch.equal(is_there.sum(1, keepdim=True), (own + 1).clamp(max=16))
        ascending = torch.where(is_there, blocks, 1 << 30)
        assert ((ascending.diff(dim=1) > 0) | ~is_there[:, 1:]).all()
        assert (blocks <= own).all()
        for promised in (torch.zeros_like(own), own, (own - 1).clamp(min=0)):
            assert (blocks == promised).any(1).all()


@every_record
def test_the_file_has_choices_of_a_whole_text(record):
    assert record.block_indices.shape == (8192, 3, 16)
    assert record.block_indices.dtype == torch.int32
    assert_possible(record.block_indices)
    assert 1.1 < union_factor(record.block_indices, 16) < 2.3  # 16 of 16 would read all at random


@every_record
@pytest.mark.parametrize("num_tokens", [1000, 8192, 8193, 30000, 65536])
def test_what_is_longer_is_possible(record, num_tokens):
    found = recorded.lengthened(record.block_indices, num_tokens)
    assert found.shape == (num_tokens, 3, 16)
    assert_possible(found)
    assert torch.equal(found[:8192], record.block_indices[:num_tokens])


@every_record
def test_neighbours_of_what_is_longer_agree_as_much(record):
    found = recorded.lengthened(record.block_indices, 8192 + 8 * 7168)
    for n in (2, 8, 16, 64):
        expected = union_factor(record.block_indices, n)
        assert union_factor(found, n) == pytest.approx(expected, rel=0.01)


def test_what_is_longer_reads_all_of_the_text():
    """Free blocks lie anywhere before a query, and not only in its own repetition."""
    found = recorded.lengthened(RECORDS[-1].block_indices, 65536)
    last = found[-7168:, :, :-2].flatten()
    share = torch.histc(last.float(), bins=8, min=0, max=1024) / len(last)
    assert (share > 0.02).all()


def test_another_seed_moves_other_blocks():
    first, second = (recorded.lengthened(RECORDS[0].block_indices, 20000, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first[:8192], second[:8192])


def test_heads_are_taken_of_every_layer():
    indices = torch.arange(2 * 3).view(1, 6, 1).expand(8192, 6, 16)
    records = [Recorded("untrained", i, indices[:, 3 * i : 3 * i + 3]) for i in range(2)]
    assert recorded.heads_of(records, 8)[0, :, 0].tolist() == [0, 3, 1, 4, 2, 5, 0, 3]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "blocks.npz"
    recorded.write(RECORDS[:2], path)
    for found, expected in zip(recorded.read(path), RECORDS[:2], strict=True):
        assert (found.stage, found.layer) == (expected.stage, expected.layer)
        assert torch.equal(found.block_indices, expected.block_indices)


def test_union_factors_are_those_of_plain_loops():
    case = SuiteCase(CONFIG, 1280, torch.float32, "cpu", selection="random")
    blocks = case["block_indices"]
    tiles = [range(t, t + 8) for t in range(1024, 1280, 8)]
    together = [len({b for t in tile for b in blocks[t, 0].tolist()}) for tile in tiles]
    assert union_factor(blocks, 8) == pytest.approx(sum(together) / len(tiles) / 16)
