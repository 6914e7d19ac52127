"""The inputs of the suites."""

import pytest
import torch

from benchmarks import inputs
from benchmarks.inputs import SuiteCase, correlated, random_blocks
from benchmarks.operators import select_blocks
from nsa_fsa.benchmarking import recorded
from tests.benchmarking.tools import SIZES, case


def suite_case(selection, **options):
    return case(kind=SuiteCase, selection=selection, **options)


def assert_like_select_blocks(indices, x):
    """Plain loops over what every choice of blocks has to be."""
    c = x.config
    assert indices.dtype == torch.int32
    assert indices.shape == (x.num_tokens, c.num_kv_heads, c.num_selected_blocks)
    for t, heads in enumerate(indices.tolist()):
        own = t // c.block_size
        forced = {j for j in range(own + 1) if j < c.init_blocks or j > own - c.local_blocks}
        for row in heads:
            valid = [j for j in row if j >= 0]
            assert row == valid + [-1] * (c.num_selected_blocks - len(valid))
            assert valid == sorted(set(valid))
            assert len(valid) == min(c.num_selected_blocks, own + 1)
            assert all(j <= own for j in valid)
            assert forced <= set(valid)


RECORDED = dict(block_size=64, num_selected_blocks=16)


@pytest.mark.parametrize("selection", [x for x in inputs.SELECTIONS if x != "recorded"])
@pytest.mark.parametrize("sizes", [*SIZES, dict(num_tokens=40, block_size=64)], ids=str)
def test_blocks_keep_the_rules(selection, sizes, seed):
    x = suite_case(selection, seed=seed, **sizes)
    assert_like_select_blocks(x["block_indices"], x)
    again = suite_case(selection, seed=seed, **sizes)
    assert torch.equal(x["block_indices"], again["block_indices"])


def test_random_blocks_prefer_none(seed):
    sizes = dict(num_heads=64, num_kv_heads=64, block_size=32, num_selected_blocks=7)
    x = suite_case("random", num_tokens=32 * 64, seed=seed, **sizes)
    last = x["block_indices"][-32:]  # all 64 blocks are eligible
    counts = torch.bincount(last.flatten(), minlength=64)
    assert (counts[[0, 62, 63]] == 2048).all()  # the forced ones: every query, every head
    # 4 of 61: 134 on average, a standard deviation of 11; six of them on either side.
    assert counts[1:62].min() > 68
    assert counts[1:62].max() < 200


def test_random_blocks_in_chunks_keep_the_rules(monkeypatch, seed):
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 1 << 12)
    x = suite_case("random", seed=seed)
    assert_like_select_blocks(random_blocks(x), x)


def test_other_blocks_are_those_of_the_operators(seed):
    x = suite_case("independent", seed=seed)
    assert torch.equal(x["block_indices"], select_blocks(x, x["q"], x["k_cmp"]))


def overlap(x):
    """Which part of a query's free blocks its predecessor reads too."""
    shared = counted = 0
    for before, now in zip(x["block_indices"][-2000:-1], x["block_indices"][-1999:], strict=True):
        for old, new in zip(before.tolist(), now.tolist(), strict=True):
            free = set(new[1:-2])
            shared, counted = shared + len(free & set(old)), counted + len(free)
    return shared / counted


def test_neighbours_choose_alike_in_a_realistic_sequence(seed):
    sizes = dict(num_tokens=4096, num_heads=2, block_size=32, num_selected_blocks=16, head_dim=64)
    found = {s: overlap(suite_case(s, seed=seed, **sizes)) for s in ("random", "realistic")}
    assert found["random"] < 0.3
    assert found["realistic"] > 0.7


def test_correlated(seed):
    x = correlated(torch.randn(20000, 8), 0.95)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    for lag in (1, 10, 40):
        # 20,000 rows of a process that forgets in 20 are about 1,000 independent ones, 8 columns:
        # 0.03 is three sigmas.
        assert (x[lag:] * x[:-lag]).mean().item() == pytest.approx(0.95**lag, abs=0.04)


@pytest.mark.parametrize("selection", ["independent", "window_means"])
def test_compressed_keys_spread_the_scores(selection, seed):
    x = suite_case(selection, num_tokens=16384, num_heads=8, num_kv_heads=8, seed=seed)
    k = x["k_cmp"][: x.num_windows]
    # Half of a window is its neighbour's.
    alike = float((k[1:] * k[:-1]).mean() / k.square().mean())
    independent = selection == "independent"
    assert float(k.std()) == pytest.approx(1 if independent else 6 / 32**0.5, rel=0.02)
    assert alike == pytest.approx(0 if independent else 0.5, abs=0.02)


@pytest.mark.parametrize("name", ["k_cmp", "dpooled", "dwindows"])
@pytest.mark.parametrize("selection", ["independent", "window_means"])
def test_rows_without_a_window_are_poisoned(selection, name, seed):
    x = suite_case(selection, seed=seed)[name]
    assert x[17:].isnan().all()
    assert x[:17].isfinite().all()


def test_recorded_choices_are_those_of_a_real_model():
    sizes = dict(num_tokens=9000, num_heads=8, num_kv_heads=4)
    x = suite_case("recorded", **sizes, **RECORDED)
    expected = recorded.lengthened(recorded.heads_of(recorded.read(), 4), 9000)
    assert torch.equal(x["block_indices"], expected)
    with pytest.raises(ValueError, match=r"'block_size': 128.* were not recorded, but of"):
        suite_case("recorded", **sizes, block_size=128, num_selected_blocks=8)["block_indices"]


def test_unknown_inputs_are_named():
    with pytest.raises(ValueError, match="selection='best' is not known: allowed are"):
        suite_case("best")
