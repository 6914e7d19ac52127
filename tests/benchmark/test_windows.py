"""The benchmarks of compressed attention, compression and block selection: counts, inputs, and what their checks refuse."""

import dataclasses

import pytest
import torch

from nsa_fsa import ops
from nsa_fsa.benchmarking import compressed, selection
from nsa_fsa.benchmarking.check import WrongResult
from nsa_fsa.benchmarking.check_windows import SelectionOracle
from nsa_fsa.benchmarking.running import checked
from nsa_fsa.benchmarking.settings import (
    PASSES,
    WindowSetting,
    compressed_pairs,
    necessary,
    necessary_compression,
    necessary_selection,
)
from tests.benchmark.tools import CPU

TINY = WindowSetting(
    300, 2, num_heads=4, head_dim=16, block_size=32, num_blocks=5, selection="window_means", dtype="float32"
)  # fmt: skip
SETTINGS = [
    TINY,
    dataclasses.replace(
        TINY, num_tokens=320, group_size=1, num_heads=2, selection="independent", kernel_size=64, block_size=64
    ),
    dataclasses.replace(TINY, num_tokens=130, group_size=4, kernel_size=8, kernel_stride=8, init_blocks=2, local_blocks=1),
    dataclasses.replace(TINY, num_tokens=20),  # shorter than a window
]
COMPRESSIONS = {x.name: x for x in compressed.compression_implementations("reference")}


# Counts


def seen_windows(setting, t):
    return [i for i in range(setting.num_windows) if i * setting.kernel_stride + setting.kernel_size - 1 <= t]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_compressed_pairs(setting):
    one_head = sum(len(seen_windows(setting, t)) for t in range(setting.num_tokens))
    assert compressed_pairs(setting) == setting.num_kv_heads * one_head


def test_the_largest_settings_have_the_known_arithmetic():
    """65,536 tokens, 64 heads of 128: 4.4 TFLOP of attention, 2.2 of scores."""
    setting = WindowSetting(65536, 4)
    assert necessary(setting, compressed_pairs(setting), 0, setting.num_windows)["forward"].flops == pytest.approx(
        4.4e12, rel=0.01
    )
    assert necessary_selection(setting)["forward"].flops == pytest.approx(2.2e12, rel=0.01)


def test_necessary_bytes():
    """A case small enough to count by hand: 8 tokens, 3 windows of 4 every 2, 4 query and 2 KV heads of 8, 16 bits."""
    setting = WindowSetting(8, 2, num_heads=4, head_dim=8, block_size=4, num_blocks=2, kernel_size=4, kernel_stride=2)
    q, cmp, lse, x, indices = 8 * 4 * 8 * 2, 3 * 2 * 8 * 2, 8 * 4 * 4, 8 * 2 * 8 * 2, 8 * 2 * 2 * 4
    assert setting.num_windows == 3
    attention = necessary(setting, compressed_pairs(setting), 0, setting.num_windows)
    assert attention["forward"].bytes == (q + 2 * cmp) + (q + lse)
    assert attention["backward"].bytes == (3 * q + 2 * cmp + lse) + (q + 2 * cmp)
    assert attention["backward"].flops == 5 * 2 * 8 * compressed_pairs(setting) * 2
    assert necessary_selection(setting)["forward"].bytes == (q + cmp + lse) + indices
    assert necessary_compression(setting)["forward"].bytes == x + cmp
    assert necessary_compression(setting)["backward"].bytes == cmp + x
    assert necessary_compression(setting, weighted=True)["backward"].bytes == cmp + x + x
    gathered = necessary_compression(setting, gathered=True)
    assert gathered["forward"].bytes == x + 4 * cmp
    assert gathered["forward_backward"].bytes == 2 * (x + 4 * cmp)


# Inputs


@pytest.mark.parametrize("kind", ["independent", "window_means"])
def test_compressed_keys_spread_the_scores(kind, seed):
    setting = WindowSetting(16384, 1, num_heads=8, head_dim=16, selection=kind, dtype="float32")
    k = compressed.compressed_keys(setting, torch.Generator().manual_seed(seed))
    assert k.shape == (1024, 8, 16)
    # Half of a window is its neighbour's.
    neighbours = float((k[1:] * k[:-1]).mean() / k.square().mean())
    assert float(k.std()) == pytest.approx(1 if kind == "independent" else 6 / 32**0.5, rel=0.02)
    assert neighbours == pytest.approx(0 if kind == "independent" else 0.5, abs=0.02)


def test_rows_without_a_window_are_poisoned(seed):
    inputs = compressed.make_inputs(TINY, seed, CPU)
    assert (TINY.num_windows, TINY.num_rows) == (17, 18)
    for x in (inputs.k, inputs.v, compressed.make_compression_inputs(TINY, seed, CPU).dpooled):
        assert x[17:].isnan().all()
        assert x[:17].isfinite().all()


def test_unknown_keys_are_named(seed):
    with pytest.raises(ValueError, match="'best'"):
        compressed.make_inputs(dataclasses.replace(TINY, selection="best"), seed, CPU)


# Compressed attention


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_check_accepts_compressed_attention(setting, seed, monkeypatch):
    monkeypatch.setattr("nsa_fsa.benchmarking.check_windows.ROWS_AT_A_TIME", 1 << 11)  # several chunks
    inputs = compressed.make_inputs(setting, seed, CPU)
    calls = compressed.attention(inputs, "reference")
    errors = checked(calls, compressed.attention_subject(setting, inputs).oracle)
    assert set(errors) == set(PASSES), calls.not_timed
    assert set(errors["forward"]) == {"o", "lse"}
    assert set(errors["backward"]) == set(errors["forward_backward"]) == {"dq", "dk", "dv"}
    assert max(error for each in errors.values() for error in each.values()) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(seed):
    """Its forward; it has no backward on the CPU."""
    inputs = compressed.make_inputs(TINY, seed, CPU)
    errors = checked(compressed.FLEX.prepare(inputs), compressed.attention_subject(TINY, inputs).oracle, ["forward"])
    assert errors["forward"]["o"] < 1e-5


FAULTS = ["scaled", "nan", "a head of another", "one window too many", "one window too few", "what no window owns"]


@pytest.mark.parametrize("name", ["o", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_refuses_wrong_attention(name, fault, seed):
    inputs = compressed.make_inputs(TINY, seed, CPU)
    shift = {"one window too many": -TINY.kernel_stride, "one window too few": TINY.kernel_stride}.get(fault, 0)
    # Windows that end a stride earlier or later are seen one step sooner or later.
    faulty = dataclasses.replace(TINY, kernel_size=TINY.kernel_size + shift)
    given = {}
    if fault == "one window too many":  # the last row is then owned, and read
        given = {x: getattr(inputs, x).detach().nan_to_num(0.5).requires_grad_() for x in ("k", "v")}
    calls = compressed.attention(dataclasses.replace(inputs, setting=faulty, **given), "reference")
    results = calls.named("forward", calls.forward()) | calls.named("backward", calls.backward())
    result = results[name].detach().clone()
    if fault == "scaled":
        result *= 1.02
    elif fault == "nan":
        result[-1] = torch.nan
    elif fault == "a head of another":
        result[:, 0] = result[:, -1]
    elif fault == "what no window owns":
        if name in ("dk", "dv"):
            result[-1] += 1
        else:
            result[0] += 1  # of a query that sees nothing; lse is infinite there
            if name == "lse":
                result[0] = 0
    oracle = compressed.attention_subject(TINY, inputs).oracle
    with pytest.raises(WrongResult, match=f"{name} differs"):
        oracle.check(**{name: result})


# Compression


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_check_accepts_compression(setting, name, seed):
    inputs = compressed.make_compression_inputs(setting, seed, CPU)
    calls = COMPRESSIONS[name].prepare(inputs)
    errors = checked(calls, compressed.compression_subject(inputs, COMPRESSIONS[name]).oracle)
    assert set(errors) == set(PASSES), calls.not_timed
    assert set(errors["forward"]) == {"windows" if name == "gather" else "pooled"}
    assert set(errors["backward"]) == ({"dx", "dweight"} if name == "pool_weighted" else {"dx"})
    assert max(error for each in errors.values() for error in each.values()) < 1e-5


@pytest.mark.parametrize("fault", ["scaled", "nan", "shifted", "one head swapped"])
@pytest.mark.parametrize(
    ("name", "result"), [("pool_mean", "pooled"), ("pool_weighted", "dweight"), ("pool_weighted", "dx"), ("gather", "windows"),
    ("gather", "dx")],
)  # fmt: skip
def test_the_check_refuses_wrong_compression(name, result, fault, seed):
    inputs = compressed.make_compression_inputs(TINY, seed, CPU)
    calls = COMPRESSIONS[name].prepare(inputs)
    found = calls.named("forward", calls.forward()) | calls.named("backward", calls.backward())
    wrong = found[result].detach().clone()
    if fault == "scaled":
        wrong *= 1.02
    elif fault == "nan":
        wrong[0] = torch.nan
    elif fault == "shifted":
        wrong = wrong.roll(1, -1 if result == "dweight" else 0)
    else:
        wrong = wrong.flip(0 if result == "dweight" else 1)
    oracle = compressed.compression_subject(inputs, COMPRESSIONS[name]).oracle
    with pytest.raises(WrongResult, match=f"{result} differs"):
        oracle.check(**{result: wrong})


def test_gathered_rows_without_a_window_are_zero(seed):
    inputs = compressed.make_compression_inputs(TINY, seed, CPU)
    windows = COMPRESSIONS["gather"].prepare(inputs).forward().clone()
    windows[-1] = 1
    with pytest.raises(WrongResult, match="windows differs"):
        compressed.compression_subject(inputs, COMPRESSIONS["gather"]).oracle.check(windows=windows)


# Selection


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_check_accepts_what_is_selected(setting, seed):
    inputs = compressed.make_inputs(setting, seed, CPU)
    calls = selection.select(inputs, "reference")
    errors = checked(calls, SelectionOracle(inputs), ["forward"])
    assert errors["forward"]["score_lost"] < 1e-5, calls.not_timed


@pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
def test_the_scores_of_the_check_are_the_operators(setting, seed):
    inputs = compressed.make_inputs(setting, seed, CPU)
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    where, windows = (inputs.cu_seqlens, setting.num_tokens), compressed.windows_of(setting)
    _, lse = ops.compressed_attention(q, k, v, *where, **windows, return_lse=True)
    _, scores = ops.select_blocks(
        q, k, lse, *where, **windows, block_size=setting.block_size, num_selected_blocks=4, return_scores=True
    )
    found = SelectionOracle(inputs).block_scores(torch.arange(setting.num_tokens), 0)
    assert torch.allclose(found, scores[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one block fewer", "how many blocks there are"),
        ("padded with -2", "padding with -1"),
        ("descending", "ascending order"),
        ("twice", "ascending order"),
        ("the next block", "no block of the future"),
        ("without the first", "the initial blocks"),
        ("without its own", "the local blocks"),
        ("int64", "its shape or dtype"),
        ("one column fewer", "its shape or dtype"),
        ("the worst instead of the best", "less than the best"),
    ],
)
def test_the_check_refuses_a_wrong_selection(fault, message, seed, monkeypatch):
    monkeypatch.setattr("nsa_fsa.benchmarking.check_windows.QUERIES_AT_A_TIME", 100)  # rules hold across chunks
    inputs = compressed.make_inputs(TINY, seed, CPU)
    indices = selection.select(inputs, "reference").forward().clone()
    row = indices[-1, 0]  # query 299, block 9: 0, two free ones, 8 and 9
    assert row[0] == 0
    assert row[-2:].tolist() == [8, 9]
    if fault == "one block fewer":
        row[-1] = -1
    elif fault == "padded with -2":
        indices[0, 0, 1:] = -2
    elif fault == "descending":
        indices[-1, 0] = row.flip(0)
    elif fault == "twice":
        row[1] = row[2]
    elif fault == "the next block":
        row[-1] = 10
    elif fault == "without the first":
        indices[-1, 0] = torch.tensor([1, 2, 3, 8, 9])
    elif fault == "without its own":
        indices[-1, 0] = torch.tensor([0, 1, 2, 3, 8])
    elif fault == "int64":
        indices = indices.long()
    elif fault == "one column fewer":
        indices = indices[..., :-1]
    elif fault == "the worst instead of the best":
        scores = SelectionOracle(inputs).block_scores(torch.tensor([299]), 0)[0]
        worst = scores[1:8].topk(2, largest=False).indices.sort().values + 1
        row[1:3] = worst.int()
    with pytest.raises(WrongResult, match=message):
        SelectionOracle(inputs).check(indices)
