"""What the benchmark measures: the selections, and the counts of arithmetic and bytes."""

import dataclasses

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.benchmarking import selected
from nsa_fsa.benchmarking.check import Inputs
from nsa_fsa.benchmarking.selections import block_counts, correlated, neighbour_overlap, random_selection, realistic_selection
from nsa_fsa.benchmarking.settings import Necessary, Setting, causal_pairs, floor_ms, necessary, visible_pairs
from tests.benchmark.tools import CPU, SETTINGS, TINY


def assert_like_select_blocks(indices, setting):
    """Plain loops over what every selection has to be."""
    assert indices.dtype == torch.int32
    assert indices.shape == (setting.num_tokens, setting.num_kv_heads, setting.num_blocks)
    for t, heads in enumerate(indices.tolist()):
        own = t // setting.block_size
        forced = {j for j in range(own + 1) if j < setting.init_blocks or j > own - setting.local_blocks}
        for row in heads:
            valid = [j for j in row if j >= 0]
            assert row == valid + [-1] * (setting.num_blocks - len(valid))
            assert valid == sorted(set(valid))
            assert len(valid) == min(setting.num_blocks, own + 1)
            assert all(j <= own for j in valid)
            assert forced <= set(valid)


# Selections


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_random_selection(setting, seed):
    indices = random_selection(setting, torch.Generator().manual_seed(seed))
    assert_like_select_blocks(indices, setting)
    again = random_selection(setting, torch.Generator().manual_seed(seed))
    assert torch.equal(indices, again)


def test_random_selection_prefers_no_block(seed):
    setting = Setting(16 * 64, 1, num_heads=64, block_size=16, num_blocks=7)
    last = random_selection(setting, torch.Generator().manual_seed(seed))[-16:]  # all 64 blocks are eligible
    counts = torch.bincount(last.flatten(), minlength=64)
    assert (counts[[0, 62, 63]] == 1024).all()  # the forced ones: every query, every head
    # 4 of 61: 67 on average, a standard deviation of 8; six of them on either side.
    assert counts[1:62].min() > 19
    assert counts[1:62].max() < 115


def test_selection_in_chunks_is_the_same(monkeypatch, seed):
    setting = SETTINGS[0]
    inputs = selected.make_inputs(dataclasses.replace(setting, selection="realistic", num_tokens=192), seed, CPU)
    whole = realistic_selection(inputs.setting, inputs.q.detach(), inputs.k.detach())
    monkeypatch.setattr("nsa_fsa.benchmarking.selections.CHUNK_BYTES", 1 << 14)
    assert torch.equal(realistic_selection(inputs.setting, inputs.q.detach(), inputs.k.detach()), whole)
    assert_like_select_blocks(random_selection(setting, torch.Generator().manual_seed(seed)), setting)
    assert neighbour_overlap(whole, inputs.setting) == pytest.approx(loops_overlap(whole, inputs.setting))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_realistic_selection_is_what_the_operators_choose(block_size, seed):
    """Against the package's own reference in float64: the scores of what was chosen add up to the best sum."""
    setting = Setting(
        640, 2, num_heads=4, head_dim=16, block_size=block_size, num_blocks=4, selection="realistic", dtype="float32"
    )
    inputs = selected.make_inputs(setting, seed, CPU)
    assert_like_select_blocks(inputs.block_indices, setting)
    q, k = inputs.q.detach().double(), inputs.k.detach().double()
    # Windows of 32 keys, every 16; the operators' layout has one more row, which stands for no whole window.
    k_cmp = torch.cat([k.unfold(0, 32, 16).mean(-1), k.new_zeros(1, 2, 16)])
    layout = (inputs.cu_seqlens, setting.num_tokens)
    windows = dict(kernel_size=32, kernel_stride=16)
    _, lse = ops.compressed_attention(q, k_cmp, k_cmp, *layout, **windows, return_lse=True)
    expected, scores = ops.select_blocks(
        q, k_cmp, lse, *layout, **windows, block_size=block_size, num_selected_blocks=setting.num_blocks, return_scores=True
    )

    def chosen_sum(indices):
        return scores.gather(-1, indices.long().clamp(min=0)).where(indices >= 0, 0).sum(-1)

    # Rounding to float32 may swap blocks whose scores tie to 1e-5; it may not lose any score.
    assert torch.allclose(chosen_sum(inputs.block_indices), chosen_sum(expected), rtol=1e-5)
    assert (inputs.block_indices == expected).float().mean() > 0.99


def loops_overlap(indices, setting):
    shares = {"all": [], "sparse": []}
    for t in range(1, setting.num_tokens):
        own = t // setting.block_size
        for head in range(setting.num_kv_heads):
            now = {j for j in indices[t, head].tolist() if j >= 0}
            before = set(indices[t - 1, head].tolist())
            sparse = {j for j in now if j >= setting.init_blocks and j <= own - max(setting.local_blocks, 1)}
            shares["all"].append(len(now & before) / len(now))
            if sparse:
                shares["sparse"].append(len(sparse & before) / len(sparse))
    return {name: sum(x) / max(len(x), 1) for name, x in shares.items()}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_neighbour_overlap(setting, seed):
    indices = random_selection(setting, torch.Generator().manual_seed(seed))
    assert neighbour_overlap(indices, setting) == pytest.approx(loops_overlap(indices, setting))


def test_neighbours_choose_alike_under_realistic_selection(seed):
    setting = Setting(2048, 1, num_heads=2, block_size=16, num_blocks=16, dtype="float32")
    overlap = {}
    for selection in ("random", "realistic"):
        inputs = selected.make_inputs(dataclasses.replace(setting, selection=selection), seed, CPU)
        overlap[selection] = neighbour_overlap(inputs.block_indices, inputs.setting)["sparse"]
    assert overlap["random"] < 0.4
    assert overlap["realistic"] > 0.7


def test_correlated(seed):
    x = correlated((20000, 8), 0.95, torch.Generator().manual_seed(seed), torch.float32)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    for lag in (1, 10, 40):
        # 20,000 rows of a process that forgets in 20 are about 1,000 independent ones, 8 columns: 0.03 is three sigmas.
        assert (x[lag:] * x[:-lag]).mean().item() == pytest.approx(0.95**lag, abs=0.04)


def test_block_counts(seed):
    indices = random_selection(SETTINGS[0], torch.Generator().manual_seed(seed))
    assert block_counts(indices).tolist() == [[sum(j >= 0 for j in row) for row in heads] for heads in indices.tolist()]


# Counts


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_visible_pairs(setting, seed):
    indices = random_selection(setting, torch.Generator().manual_seed(seed))
    expected = 0
    for t, heads in enumerate(indices.tolist()):
        for row in heads:
            keys = {p for j in row if j >= 0 for p in range(j * setting.block_size, (j + 1) * setting.block_size)}
            expected += sum(p <= t for p in keys)
    assert visible_pairs(indices, setting.block_size) == expected


def test_causal_pairs():
    setting = Setting(50, 2, num_heads=6)
    assert causal_pairs(setting) == 3 * sum(t + 1 for t in range(50))


def test_necessary_arithmetic():
    """The figures of a case small enough to count by hand: 2 tokens, 2 heads of one group, head width 4, all keys visible."""
    setting = Setting(2, 2, num_heads=2, head_dim=4, dtype="bfloat16")
    work = necessary(setting, pairs=3, num_indices=1)
    # 3 pairs, 2 heads, 4 multiply-adds for q k and for p v; five such products backward.
    assert work["forward"].flops == 3 * 2 * (2 * 4) * 2
    assert work["backward"].flops == 3 * 2 * (2 * 4) * 5
    assert work["forward_backward"].flops == work["forward"].flops + work["backward"].flops
    q, k, lse, indices = 2 * 2 * 4 * 2, 2 * 1 * 4 * 2, 2 * 2 * 4, 2 * 1 * 1 * 4
    assert work["forward"].bytes == (q + 2 * k + indices) + (q + lse)
    assert work["backward"].bytes == (q + 2 * k + 2 * q + lse + indices) + (q + 2 * k)


def test_the_largest_setting_has_the_known_arithmetic():
    """65,536 tokens, 64 heads of 128, 1,024 keys each: 2.2 TFLOP forward."""
    setting = Setting(65536, 1)
    assert necessary(setting, 65536 * 64 * 1024, 16)["forward"].flops == pytest.approx(2.2e12, rel=0.01)


def test_floor():
    parts = [Necessary(flops=10, bytes=1), Necessary(flops=1, bytes=10)]
    assert floor_ms(parts, matmul_flops=5, copy_bytes=2) == pytest.approx(1e3 * (10 / 5 + 10 / 2))


# The check of results


def test_inputs_are_random_numbers_of_the_right_shape(seed):
    inputs = selected.make_inputs(TINY, seed, CPU)
    assert isinstance(inputs, Inputs)
    assert inputs.q.shape == inputs.do.shape == (96, 4, 16)
    assert inputs.k.shape == inputs.v.shape == (96, 2, 16)
    assert all(x.requires_grad for x in (inputs.q, inputs.k, inputs.v))
    assert all(x.std().item() == pytest.approx(1, abs=0.15) for x in (inputs.q, inputs.k, inputs.v, inputs.do))
    with pytest.raises(ValueError, match="selection='best'"):
        selected.make_inputs(dataclasses.replace(TINY, selection="best"), seed, CPU)
