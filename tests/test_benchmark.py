"""The benchmark on a CPU: inputs, counts, checks, files, tables and pictures, with a meter that needs no GPU."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
from benchmarking import report, results, selected  # noqa: E402
from benchmarking.check import Inputs, Oracle, WrongResult  # noqa: E402
from benchmarking.implementations import IMPLEMENTATIONS, Implementation, ours, sdpa  # noqa: E402
from benchmarking.measure import Memory, Timing, code_version, source_digest  # noqa: E402
from benchmarking.selections import (  # noqa: E402
    block_counts,
    correlated,
    neighbour_overlap,
    random_selection,
    realistic_selection,
)
from benchmarking.settings import Necessary, Setting, causal_pairs, floor_ms, necessary, visible_pairs  # noqa: E402

from nsa_fsa import ops  # noqa: E402

CPU = torch.device("cpu")
# Where Triton's kernels run: interpreted without a GPU, which tests/conftest.py sees to.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = [
    Setting(200, 2, num_heads=4, head_dim=16, block_size=16, num_blocks=5, dtype="float32"),
    Setting(160, 1, num_heads=2, head_dim=8, block_size=32, num_blocks=8, init_blocks=2, local_blocks=1, dtype="float32"),
    Setting(40, 4, num_heads=4, head_dim=8, block_size=64, num_blocks=4, init_blocks=0, local_blocks=1, dtype="float32"),
]
TINY = Setting(96, 2, num_heads=4, head_dim=16, block_size=16, num_blocks=4, dtype="float32")


class FakeMeter:
    """Calls what it is given once, and says that it took one more millisecond every time."""

    def __init__(self):
        self.method = {"timing": "none"}
        self.calls = 0

    def time(self, function):
        function()
        self.calls += 1
        return Timing(float(self.calls), self.calls - 0.5, self.calls + 0.5)

    def memory(self, function):
        function()
        return Memory(3 << 30, 1 << 30)

    def ceilings(self):
        return dict(copy_bytes_per_s=4e12, copy="made up", matmul_flop_per_s=7e14, matmul="made up")


def quiet():
    return Console(file=io.StringIO(), width=200)


def open_results(folder, benchmark="selected", **options):
    return results.Results(folder, benchmark, FakeMeter(), seed=0, peers={}, **options)


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
    monkeypatch.setattr("benchmarking.selections.CHUNK_BYTES", 1 << 14)
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


def reference_calls(inputs):
    return ours(inputs, "reference")


@pytest.mark.parametrize("setting", [TINY, *SETTINGS], ids=str)
def test_the_check_accepts_what_is_right(setting, seed):
    inputs = selected.make_inputs(setting, seed, CPU)
    calls, oracle = reference_calls(inputs), Oracle(inputs)
    errors = oracle.check(o=calls.forward())
    for backward in (calls.backward, calls.forward_backward):
        errors |= oracle.check(**dict(zip(("dq", "dk", "dv"), backward(), strict=True)))
    assert max(errors.values()) < 1e-5
    assert set(errors) == {"o", "dq", "dk", "dv"}


def test_the_check_accepts_full_attention(seed):
    inputs = selected.make_inputs(TINY, seed, CPU)
    errors = selected.checked(sdpa(inputs, "MATH"), Oracle(inputs, full=True))
    assert set(errors) == {"forward", "backward", "forward_backward"}
    assert max(error for each in errors.values() for error in each.values()) < 1e-5
    with pytest.raises(WrongResult, match="o differs"):
        Oracle(inputs).check(o=sdpa(inputs, "MATH").forward())


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
@pytest.mark.parametrize("wrong", ["scaled", "nan", "one block less", "one head swapped"])
def test_the_check_refuses_what_is_wrong(name, wrong, seed):
    inputs = selected.make_inputs(TINY, seed, CPU)
    faulty = inputs
    if wrong == "one block less":
        indices = inputs.block_indices.clone()
        indices[..., 1] = -1
        faulty = dataclasses.replace(inputs, block_indices=indices)
    calls = reference_calls(faulty)
    if wrong == "one block less":  # without the promise that makes kernels take forced blocks for granted
        calls = ours(dataclasses.replace(faulty, setting=dataclasses.replace(TINY, init_blocks=0, local_blocks=0)), "reference")
    result = (
        dict(zip(("o", "dq", "dk", "dv"), (calls.forward(), *calls.forward_backward()), strict=True))[name].detach().clone()
    )
    if wrong == "scaled":
        result *= 1.02
    elif wrong == "nan":
        result[-1] = torch.nan
    elif wrong == "one head swapped":
        result[:, 0] = result[:, -1]
    with pytest.raises(WrongResult, match=name):
        Oracle(inputs).check(**{name: result})


# The peers' adapters, with stand-ins that compute the right thing from what they are given


def stand_in(monkeypatch, module, **members):
    parts = module.split(".")
    for depth in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(parts[depth - 1]))
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**members))


def selected_reference(q, k, v, indices, block_size):
    cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32)
    return ops.selected_attention(q, k, v, indices, cu_seqlens, q.shape[0], block_size=block_size, backend="reference")


def causal_reference(q, k, v, causal):
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def fla_stand_in(q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16, block_size=64):
    assert block_indices.dtype == block_counts.dtype == torch.int64
    assert g_cmp is g_slc is g_swa is None
    counted = torch.arange(block_indices.shape[-1]) < block_counts[..., None]
    indices = block_indices.where(counted, -1).int()
    return selected_reference(q[0], k[0], v[0], indices[0], block_size)[None]


def old_fla_stand_in(q, k, v, g_slc, g_swa, block_indices, block_counts, block_size):
    return fla_stand_in(q, k, v, None, None, None, block_indices, block_counts, block_size) * g_slc[..., None]


def topk_stand_in(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale=None):
    assert topk_idx.dtype == torch.int32
    assert topk_idx.is_contiguous()
    assert cu_seqlens.tolist() == [0, q.shape[0]]
    return selected_reference(q, k, v, topk_idx.transpose(0, 1), block_size)


def cudnn_stand_in(
    q_tensor, k_tensor, v_tensor, block_indices_tensor, block_counts_tensor, cum_seqlen_q_tensor, cum_seqlen_k_tensor,
    block_size, scale_softmax, max_s_q, max_s_k, is_causal=False,
):  # fmt: skip
    assert is_causal
    assert max_s_q == max_s_k == q_tensor.shape[0]
    assert torch.equal(block_counts_tensor, block_counts(block_indices_tensor))
    return selected_reference(q_tensor, k_tensor, v_tensor, block_indices_tensor, block_size), None, None


@pytest.mark.parametrize(
    ("name", "module", "members"),
    [
        ("flash_attn_4", "flash_attn.cute", dict(flash_attn_func=lambda *qkv, **o: (causal_reference(*qkv, **o), None))),
        ("flash_attn_2", "flash_attn", dict(flash_attn_func=causal_reference)),
        ("fla_nsa", "fla.ops.nsa", dict(parallel_nsa=fla_stand_in)),
        ("fla_nsa", "native_sparse_attention.ops.parallel", dict(parallel_nsa=old_fla_stand_in)),
        ("nsa_triton", "native_sparse_attention.ops", dict(topk_sparse_attention=topk_stand_in)),
        ("fsa", "fsa.ops.FSA_topk_sparse_attention", dict(FSA_topk_sparse_attention=topk_stand_in)),
        ("cudnn_nsa", "cudnn", dict(NSA=types.SimpleNamespace(selection_attention_wrapper=cudnn_stand_in))),
    ],
)
def test_peers_get_what_they_take(monkeypatch, name, module, members, seed):
    implementation = IMPLEMENTATIONS[name]
    monkeypatch.setitem(sys.modules, "fla.ops.nsa", None)  # not importable, unless it is what stands in
    stand_in(monkeypatch, module, **members)
    assert implementation.missing() is None
    inputs = selected.make_inputs(TINY, seed, CPU)
    calls = implementation.prepare(inputs)
    errors = selected.checked(calls, Oracle(inputs, full=implementation.kind == "full"))
    passes = {"forward"} if name == "cudnn_nsa" else {"forward", "backward", "forward_backward"}
    assert set(errors) == passes, calls.not_timed
    assert set(calls.not_timed) == {"forward", "backward", "forward_backward"} - passes


def test_what_peers_do_not_support():
    assert "16, 32" in IMPLEMENTATIONS["fla_nsa"].unsupported(Setting(8192, 4))
    assert IMPLEMENTATIONS["fla_nsa"].unsupported(Setting(8192, 16)) is None
    assert "128" in IMPLEMENTATIONS["cudnn_nsa"].unsupported(Setting(8192, 16, block_size=128))
    assert IMPLEMENTATIONS["cudnn_nsa"].unsupported(Setting(8192, 1)) is None


# Runs


def wrong_peer(inputs):
    calls = reference_calls(inputs)
    right = calls.forward
    calls.forward = lambda: right() * 2
    return calls


def failing_backward(inputs):
    calls = reference_calls(inputs)

    def backward():
        raise NotImplementedError("no gradient here")

    calls.backward = calls.forward_backward = backward
    return calls


def import_error():
    raise ImportError("no such package")


def made_up(name, prepare, kind="ours", **options):
    return Implementation(name, f"label of {name}", kind, prepare, **options)


TIMED = [
    made_up("triton_kv_major", functools.partial(ours, backend="triton_kv_major"), facts=lambda inputs, name: {"extra": name}),
    made_up("reference", reference_calls),
    made_up("sdpa_cudnn", functools.partial(sdpa, backend="MATH"), "full"),
    made_up("wrong", wrong_peer, "selected"),
    made_up("forward only", failing_backward, "selected"),
    made_up("missing", reference_calls, "selected", load=import_error),
    made_up("unable", reference_calls, "selected", unsupported=lambda setting: "it is Tuesday"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, on the CPU too: two group sizes, two selections, one head width; Triton kernels by the interpreter."""
    folder = tmp_path_factory.mktemp("results")
    store = open_results(folder)
    settings = [
        dataclasses.replace(TINY, num_tokens=48, num_heads=2, group_size=group, selection=selection)
        for selection in ("random", "realistic")
        for group in (1, 2)
    ]
    passes = ["forward", "backward", "forward_backward"]
    selected.run_times(settings, TIMED, passes, FakeMeter(), store, 0, DEVICE, quiet())
    return store


def test_a_run_records_rows(finished):
    document = json.loads(finished.path.read_text())
    results.validate(document)
    assert document == finished.document
    found = {(r["implementation"], r["pass"], r["group_size"], r["selection"]) for r in document["rows"]}
    passes = ("forward", "backward", "forward_backward")
    selections = ("random", "realistic")
    expected = {(x, p, g, s) for x in ("triton_kv_major", "reference") for p in passes for g in (1, 2) for s in selections}
    expected |= {("sdpa_cudnn", p, g, "full") for p in passes for g in (1, 2)}  # once for both selections
    expected |= {("forward only", "forward", g, s) for g in (1, 2) for s in selections}
    assert found == expected
    for row in document["rows"]:
        assert row["ms_20"] < row["ms"] < row["ms_80"]
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["tflops"] == pytest.approx(row["necessary_tflop"] / row["ms"] * 1e3)
        assert (row["extra_gib"], row["workspace_gib"]) == (3, 1)
        assert max(row["errors"].values()) < 1e-4
        assert row["label"] == f"label of {row['implementation']}"
        assert row.get("extra") == (row["pass"] if row["implementation"] == "triton_kv_major" else None)
    assert len(document["selections"]) == 4
    assert all(0 <= entry["overlap_sparse"] <= entry["overlap_all"] <= 1 for entry in document["selections"])
    run = document["runs"][0]
    assert run["machine"]["torch"] == torch.__version__
    assert run["ceilings"]["matmul_flop_per_s"] == 7e14


def test_a_run_says_what_it_left_out(finished):
    reasons = {(e["implementation"], e.get("pass")): e["reason"] for e in finished.document["not_timed"]}
    assert "refused: o differs" in reasons["wrong", "forward"]
    assert "refused: o differs" in reasons["wrong", "backward"]
    assert reasons["forward only", "backward"] == "NotImplementedError: no gradient here"
    assert reasons["missing", None] == "import failed: ImportError: no such package"
    assert reasons["unable", None] == "it is Tuesday"
    assert not {"reference", "triton_kv_major", "sdpa_cudnn"} & {name for name, _ in reasons}


def printed(table):
    console = quiet()
    console.print(table)
    return console.file.getvalue()


def test_tables(finished):
    tables = report.latency_tables(finished.document)
    assert len(tables) == 2
    for table, selection in zip(tables, ("random", "realistic"), strict=True):
        text = printed(table)
        assert selection in text
        for label in ("nsa_fsa triton_kv_major", "full: cuDNN", "forward only", "T", "of floor"):
            assert label in text
        assert "wrong" not in text
    left_out = printed(report.left_out_table(finished.document))
    assert "it is Tuesday" in left_out
    assert report.left_out_table(finished.document | {"not_timed": []}) is None


def test_pictures(finished, tmp_path):
    paths = report.plot_latency(finished.document, tmp_path / "selected_gpu")
    assert [path.name for path in paths] == ["selected_gpu_16x4_random_d16.png", "selected_gpu_16x4_realistic_d16.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in paths)


def test_every_implementation_has_a_style():
    assert set(report.STYLES) == set(IMPLEMENTATIONS)
    assert len({(style["color"], style["marker"]) for style in report.STYLES.values()}) == len(IMPLEMENTATIONS)


def test_ablations(tmp_path):
    store = open_results(tmp_path, "selected_ablations")
    setting = dataclasses.replace(TINY, num_tokens=64, num_heads=2)
    selected.run_ablations([setting], FakeMeter(), store, 0, DEVICE, quiet())
    variants = list(selected.ablations(selected.make_inputs(setting, 0, CPU)))
    assert [(r["variant"], r["pass"]) for r in store.document["rows"]] == [
        (v, p) for v in variants for p in ("forward", "backward")
    ]
    assert store.document["not_timed"] == []
    text = printed(report.ablation_table(store.document))
    for variant in variants:
        assert variant in text
    assert "up to 18.9%" in " ".join(text.split())


def test_one_program_per_tile_means_one_tile():
    inputs = selected.make_inputs(TINY, 0, DEVICE)
    config = selected.ablations(inputs)["without the inner loop: a program per tile"][1]["config"]
    assert (config.fwd_item_rows, config.bwd_item_rows) == (config.fwd_m, config.bwd_m)


def test_memory(tmp_path):
    store = open_results(tmp_path, "selected_memory")
    setting = dataclasses.replace(TINY, num_tokens=64)
    selected.run_memory([setting], [1 << 29, selected.UNLIMITED], FakeMeter(), store, 0, DEVICE, quiet())
    rows = store.document["rows"]
    assert [(r["variant"], r["pass"]) for r in rows] == [(v, p) for v in ("0.5", "unlimited") for p in ("forward", "backward")]
    # entries [HKV, T * slots], two [HKV, blocks], one [HKV, T], and of all heads [3, T] and [4, blocks], int32
    blocks = 64 // 16 + 1
    assert rows[0]["index_gib"] * 2**30 == 4 * (2 * (64 * 1 + 2 * blocks + 64) + 3 * 64 + 4 * blocks)
    assert "unlimited" in printed(report.memory_table(store.document))


def test_the_paper_is_quoted_at_its_settings(monkeypatch, tmp_path):
    monkeypatch.setitem(selected.TABLE_5, (16, 4), {64: 1.88})
    store = open_results(tmp_path, "selected_memory")
    selected.run_memory([dataclasses.replace(TINY, num_tokens=64)], [1 << 29], FakeMeter(), store, 0, DEVICE, quiet())
    assert store.document["rows"][0]["paper_gb"] == 1.88
    assert "2508.18224" in store.document["rows"][0]["paper_source"]
    assert "1.88" in printed(report.memory_table(store.document))


# Files


def add(store, implementation="a", name="forward", setting=TINY, **measured):
    store.add_row(implementation, "ours", name, setting, ms=1.0, **measured)


def test_slug():
    assert results.slug("NVIDIA H200") == "nvidia_h200"
    assert results.slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"


def test_every_row_is_on_disk_at_once(tmp_path):
    store = open_results(tmp_path)
    for number in range(3):
        add(store, f"implementation {number}")
        assert len(json.loads(store.path.read_text())["rows"]) == number + 1
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]


def test_merge_joins_runs_of_the_same_code(tmp_path):
    first = open_results(tmp_path)
    add(first, "a")
    add(first, "b")
    first.leave_out("c", "not installed")
    first.leave_out("d", "no backward", **{"pass": "backward"}, **dataclasses.asdict(TINY))
    second = open_results(tmp_path, merge=True)
    add(second, "b", tflops=5)
    add(second, "c")
    add(second, "d")  # its forward: the reason about the backward stays
    document = json.loads(second.path.read_text())
    results.validate(document)
    assert [(r["implementation"], r["run"]) for r in document["rows"]] == [("a", 0), ("b", 1), ("c", 1), ("d", 1)]
    assert document["rows"][1]["tflops"] == 5
    assert len(document["runs"]) == 2
    assert [e["implementation"] for e in document["not_timed"]] == ["d"]


def test_without_merge_a_run_starts_afresh(tmp_path):
    add(open_results(tmp_path), "a")
    assert open_results(tmp_path).document["rows"] == []


@pytest.mark.parametrize("what", ["commit", "source_digest"])
def test_merge_refuses_other_code(monkeypatch, tmp_path, what):
    add(open_results(tmp_path), "a")
    monkeypatch.setattr(results, "code_version", lambda stated: code_version(stated) | {what: "another"})
    with pytest.raises(results.CannotMerge, match="another"):
        open_results(tmp_path, merge=True)


def test_merge_refuses_another_gpu(tmp_path):
    store = open_results(tmp_path)
    store.document["gpu"] = "another"
    store.write()
    with pytest.raises(results.CannotMerge, match="another"):
        open_results(tmp_path, merge=True)


@pytest.mark.parametrize("part", ["runs", "rows", "selections", "not_timed"])
def test_validate_misses_nothing(finished, part):
    for name in results.REQUIRED[part]:
        document = json.loads(json.dumps(finished.document))
        del document[part][0][name]
        with pytest.raises(ValueError, match=name):
            results.validate(document)


def test_validate_refuses_a_row_twice(finished):
    document = json.loads(json.dumps(finished.document))
    document["rows"].append(document["rows"][0])
    with pytest.raises(ValueError, match="twice"):
        results.validate(document)


def test_the_code_is_named():
    version = code_version("stated")
    assert version["source_digest"] == source_digest()
    assert version["commit"] not in ("", "unknown")


# The command line


def test_without_a_gpu_it_says_so(tmp_path):
    """As a user meets it."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "200"}
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "selected", f"--output={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 1
    text = " ".join(run.stdout.split())
    assert "cannot run here: PyTorch" in text
    assert "sees no CUDA GPU" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["--memory", "--ablations"])
def test_no_mode_runs_without_a_gpu(monkeypatch, mode, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = CliRunner().invoke(benchmark.app, ["selected", mode, f"--output={tmp_path}"])
    assert run.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_it_refuses_interpreted_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(benchmark, "console", console := quiet())
    assert CliRunner().invoke(benchmark.app, ["selected"]).exit_code == 1
    assert "TRITON_INTERPRET is set" in console.file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks=64"], "is not of the form 64x16"),
        (["--selection=best"], "'best' is none of random, realistic"),
        (["--implementation=magic"], "'magic' is none of auto"),
        (["--pass=sideways"], "'sideways' is none of forward"),
        (["--memory", "--ablations"], "two runs"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message):
    run = CliRunner().invoke(benchmark.app, ["selected", *arguments], env={"COLUMNS": "200"})
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    command = [
        sys.executable, str(SCRIPTS / "benchmark.py"), "selected", "--tokens=2048", "--group=4", "--blocks=64x16",
        "--milliseconds=5", "--implementation=triton_kv_major", "--implementation=sdpa_flash", f"--output={tmp_path}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    results.validate(document)
    assert len(document["rows"]) == 9, document["not_timed"]  # three passes; two selections, and full attention once
    assert all(0 < row["of_floor"] < 1 for row in document["rows"])


def test_inputs_are_random_numbers_of_the_right_shape(seed):
    inputs = selected.make_inputs(TINY, seed, CPU)
    assert isinstance(inputs, Inputs)
    assert inputs.q.shape == inputs.do.shape == (96, 4, 16)
    assert inputs.k.shape == inputs.v.shape == (96, 2, 16)
    assert all(x.requires_grad for x in (inputs.q, inputs.k, inputs.v))
    assert all(x.std().item() == pytest.approx(1, abs=0.15) for x in (inputs.q, inputs.k, inputs.v, inputs.do))
    with pytest.raises(ValueError, match="selection='best'"):
        selected.make_inputs(dataclasses.replace(TINY, selection="best"), seed, CPU)
