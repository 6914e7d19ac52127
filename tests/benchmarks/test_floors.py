"""The work that cannot be done without: counted by loops and by hand, and as it was recorded."""

import pytest
import torch

from benchmarks import floors
from benchmarks.floors import floor, work
from benchmarks.inputs import SuiteCase
from benchmarks.published import FOLDER, GPU, read
from nsa_fsa import NSAConfig
from nsa_fsa.benchmarking.decoding import NSA_DECODE, SDPA, DecodeCase
from tests.benchmarking.tools import PAGES, RATES, SIZES, case
from tests.cases import CORE

FILES = [path.stem.removesuffix(f"_{GPU}") for path in FOLDER.glob(f"*_{GPU}.json")]
# Those that earlier code wrote, with floors in them.
RECORDED = sorted(x for x in FILES if any("floor_ms" in row for row in read(x)["rows"]))


def row(implementation="", kind="part", **sizes):
    """Of 65,536 tokens and the sizes that the pages quote, unless said otherwise."""
    usual = dict(PAGES, num_tokens=65536, group_size=4, ms=1.0)
    return usual | dict(implementation=implementation, kind=kind) | sizes


@pytest.mark.parametrize("sizes", [*SIZES, dict(num_tokens=20)], ids=str)
def test_pairs(sizes, seed):
    x = case(kind=SuiteCase, selection="random", seed=seed, **sizes)
    of, tokens, c = x.sizes(), range(x.num_tokens), x.config
    assert floors.full_pairs(of) == sum(t + 1 for t in tokens)
    assert floors.window_pairs(of) == sum(min(t + 1, c.window_size) for t in tokens)
    ends = [i * c.kernel_stride + c.kernel_size - 1 for i in range(x.num_windows)]
    assert floors.compressed_pairs(of) == sum(end <= t for end in ends for t in tokens)
    seen = 0
    for t, heads in enumerate(x["block_indices"].tolist()):
        keys = {j * c.block_size + i for j in heads[0] if j >= 0 for i in range(c.block_size)}
        seen += sum(p <= t for p in keys)
    assert floors.selected_pairs(of) == seen


@pytest.mark.parametrize("group", [1, 4, 16])
def test_the_known_arithmetic(group):
    """TFLOP forward of every part; backward two and a half times as many, without scores."""
    expected = {
        "compressed_attention": 4.4,
        "select_blocks": 2.2,
        "selected_attention": 2.2,
        "sliding_window_attention": 1.1,
        "gated_combine": 0,
    }
    parts = {name: work(row(name, group_size=group)) for name in expected}
    for name, tflop in expected.items():
        # To the digit given; the first 1,024 queries and own blocks see less than 16 whole blocks.
        assert parts[name]["forward"].flops / 1e12 == pytest.approx(tflop, abs=0.1), name
        if "backward" in parts[name]:
            assert parts[name]["backward"].flops == 2.5 * parts[name]["forward"].flops
    assert "backward" not in parts["select_blocks"]
    whole = work(row("nsa_fsa", "ours", group_size=group))
    assert whole["forward"].flops == sum(part["forward"].flops for part in parts.values())
    scores = parts["select_blocks"]["forward"].flops
    assert whole["backward"].flops == 2.5 * (whole["forward"].flops - scores)


def test_the_core_has_all_of_its_parts():
    assert floors.CORE_PARTS == CORE


def test_bytes_of_the_core_by_hand():
    """2 tokens of 2 query heads and 1 KV head of width 4, 16 bits, windows of one token."""
    sizes = dict(num_tokens=2, num_heads=2, group_size=2, head_dim=4, block_size=2, num_blocks=1)
    sizes |= dict(kernel_size=1, kernel_stride=1)
    q, k, k_cmp, gates, lse = 2 * 2 * 4 * 2, 2 * 4 * 2, 2 * 4 * 2, 2 * 2 * 3 * 2, 2 * 2 * 4
    whole, combine = work(row("nsa_fsa", **sizes)), work(row("gated_combine", **sizes))
    inputs = q + 2 * k + 2 * k_cmp + gates
    assert whole["forward"].bytes == inputs + q
    assert whole["backward"].bytes == (inputs + q) + inputs
    assert combine["forward"].bytes == (gates + 3 * q) + q
    assert combine["backward"].bytes == (q + gates + 3 * q) + (gates + 3 * q)
    assert floors.full_attention_bytes(row(**sizes)) == 4 * q + 4 * k + lse
    full = work(row("cudnn", "full", **sizes))
    # 3 pairs, 2 heads, 4 multiply-adds for q k and for p v; five such products backward.
    assert (full["forward"].flops, full["backward"].flops) == (3 * 2 * 8 * 2, 3 * 2 * 8 * 5)
    assert full["forward"].bytes == (q + 2 * k) + (q + lse)
    assert full["backward"].bytes == (q + 2 * k + 2 * q + lse) + (q + 2 * k)
    indices = 2 * 1 * 1 * 4
    selected = work(row("auto", "ours", **sizes))
    assert selected["forward"].bytes == full["forward"].bytes + indices


def test_bytes_of_what_reads_windows_by_hand():
    """8 tokens, 3 windows of 4 every 2, 4 query and 2 KV heads of 8, 16 bits."""
    sizes = dict(num_tokens=8, num_heads=4, group_size=2, head_dim=8, block_size=4, num_blocks=2)
    sizes |= dict(kernel_size=4, kernel_stride=2)
    q, cmp, lse, x = 8 * 4 * 8 * 2, 3 * 2 * 8 * 2, 8 * 4 * 4, 8 * 2 * 8 * 2
    indices = 8 * 2 * 2 * 4
    attention = work(row("flex_attention", "peer", **sizes))
    assert attention["forward"].bytes == (q + 2 * cmp) + (q + lse)
    assert attention["backward"].bytes == (3 * q + 2 * cmp + lse) + (q + 2 * cmp)
    assert work(row("select_blocks", **sizes))["forward"].bytes == (q + cmp + lse) + indices
    names = ("pool_mean", "pool_weighted", "gather")
    mean, weighted, gathered = (work(row(name, **sizes)) for name in names)
    assert (mean["forward"].bytes, mean["backward"].bytes) == (x + cmp, cmp + x)
    assert weighted["backward"].bytes == cmp + x + x
    assert (gathered["forward"].bytes, gathered["backward"].bytes) == (x + 4 * cmp, 4 * cmp + x)


def test_the_floor_is_the_slower_of_two():
    here = row("cudnn", "full", ms=100.0) | {"pass": "forward"}
    found, part = floor(here, RATES), work(here)["forward"]
    assert found["floor_ms"] == 1e3 * part.flops / RATES["matmul_flop_per_s"]
    assert found["of_floor"] == found["floor_ms"] / 100
    assert found["bound"] == "arithmetic"
    bytes_bound = floor(row("gated_combine") | {"pass": "backward"}, RATES)
    assert bytes_bound["bound"] == "bytes"
    both = floor(here | {"pass": "forward_backward"}, RATES)["floor_ms"]
    backward = floor(here | {"pass": "backward"}, RATES)["floor_ms"]
    assert both == pytest.approx(found["floor_ms"] + backward)


@pytest.mark.parametrize("suite", RECORDED)
def test_every_floor_is_as_it_was_recorded(suite):
    """Earlier code wrote the work and the floor into each row, and counted it another way."""
    document = read(suite)
    for row in document["rows"]:
        found = floor(row, document["runs"][row["run"]]["ceilings"])
        assert found["floor_ms"] == pytest.approx(row["floor_ms"], rel=1e-12)
        names = ("forward", "backward")
        parts = [x for name, x in work(row).items() if row["pass"] in (name, "_".join(names))]
        assert sum(x.flops for x in parts) / 1e12 == pytest.approx(row["necessary_tflop"])
        assert sum(x.bytes for x in parts) / 1e9 == pytest.approx(row["necessary_gb"])


def test_the_floor_of_a_step():
    """All compressed tokens, the chosen blocks and the window, of keys and values."""
    sizes = dict(preset="tiny", hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
    c = NSAConfig.from_dict(sizes)
    step = DecodeCase(c, 208, torch.float32, "cpu", batch_size=3)
    row = NSA_DECODE.where(step) | {"pass": "forward", "ms": 1.0}
    windows = step.num_windows
    keys = windows + c.block_size * c.num_selected_blocks + c.window_size
    assert floors.work(row)["forward"].bytes == 2 * 3 * 2 * keys * 16 * 4
    full = SDPA.where(step) | {"pass": "forward", "ms": 1.0}
    assert floors.work(full)["forward"].bytes == 2 * 3 * 2 * 208 * 16 * 4
