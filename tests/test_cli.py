"""The command line, as a user types it."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nsa_fsa
from nsa_fsa import NativeSparseAttention, NSAConfig, cli
from nsa_fsa.benchmarking.cases import PASSES, Case
from nsa_fsa.benchmarking.decoding import FULL_DECODING, DecodeCase, sdpa_step
from nsa_fsa.benchmarking.implementations import CUDNN, sdpa
from nsa_fsa.ops.sliding_window_attention import flash_attention
from tests.benchmarking.tools import FakeMeter
from tests.cases import DIFFERENTIABLE, Impossible, prefer

ROOT = Path(__file__).parents[1]
WIDE = {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli.app, arguments, env=WIDE)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def wide_console(monkeypatch):
    monkeypatch.setattr(cli.console, "width", 300)


def test_info_lists_versions_and_every_backend_with_its_reason(monkeypatch):
    prefer(monkeypatch, "gated_combine", Impossible())
    printed = run("info")
    assert nsa_fsa.__version__ in printed
    assert torch.__version__.split("+")[0] in printed
    for operator in cli.OPERATORS:
        for name, reason in operator.available().items():
            (line,) = (
                x
                for x in printed.splitlines()
                if f" {operator.operator} " in x and f" {name} " in x
            )
            assert (" yes " if reason is None else f" no: {reason} ") in line


def test_pictures_are_no_concern_of_info_and_explain(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not importable
    assert "torch" in run("info")
    assert "gated_combine" in run("explain", "--device", "cpu", "--tokens", "64")


def test_info_knows_every_operator():
    named = {operator.operator for operator in cli.OPERATORS}
    others = {"select_blocks", "append_tokens", "nsa_decode"}
    assert named == {*DIFFERENTIABLE, *others} - {"nsa_attention"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_explain_a_file(path):
    printed = run(
        "explain",
        "--config",
        str(path),
        "--tokens",
        "4096",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    assert (
        str(nsa_fsa.explain(NSAConfig.from_yaml(path), 4096, device="cpu", dtype=torch.float32))
        in printed
    )


def test_explain_a_preset():
    printed = run(
        "explain",
        "--preset",
        "fsa-128x8",
        "--heads",
        "16",
        "--kv-heads",
        "2",
        "--head-dim",
        "64",
        "--device",
        "cpu",
    )
    assert "8,192 tokens, 16 query heads of 64, 2 KV heads, bfloat16:" in printed
    config = NSAConfig.from_dict(
        dict(preset="fsa-128x8", hidden_size=1024, num_heads=16, num_kv_heads=2, head_dim=64)
    )
    assert str(nsa_fsa.explain(config, 8192, device="cpu")) in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtype", "int8"), "allowed are bfloat16, float16, float32, float64"),
        (("--preset", "magic"), "allowed are ('fsa-64x16'"),
        (("--heads", "10", "--kv-heads", "3"), "num_kv_heads"),
        (("--config", "nowhere.yaml"), "does not exist"),
        (("--tokens", "0"), "Invalid value for '--tokens'"),
        (("--tokens", str(2**31)), "num_tokens=2147483648 must be an int from 1 to 2 ** 31 - 1"),
        (("--tokens", "9" * 30), "must be an int from 1 to 2 ** 31 - 1"),
        (("--heads", "0"), "Invalid value for '--heads'"),
        (
            ("--head-dim", str(2**62)),
            "is not allowed: it must be an int >= 1, and one that 64 bits hold",
        ),
        (("--device", "cuda:97"), "device='cuda:97' is not here"),
        (("--device", "abacus"), "device='abacus' is not here"),
        (("--device", "vulkan"), "'Vulkan' backend. Fix: a device of this machine"),
        (
            ("--device", "hpu"),
            "device='hpu' is not here: No module named 'torch.hpu'. Fix: a device of this machine",
        ),
        (("--for", "h101"), "gpu='h101' is not known: allowed are v100"),
        (("--for", "h100", "--device", "cpu"), "device='cpu' and gpu='h100' are both given"),
    ],
)
def test_what_is_wrong_is_said(arguments, said):
    assert said in told("explain", *arguments)


def told(*arguments):
    """What a command says that refuses, in one line."""
    return " ".join(run(*arguments, code=2).replace("│", " ").split())


# What a file can say, and what is said about it.
FILES = {
    "backend: cuda": "backend='cuda' is not an implementation",
    f"block_size: {2**70}": f"NSAConfig.block_size={2**70} is not allowed",
    f"window_size: {2**63}": f"NSAConfig.window_size={2**63} is not allowed",
    "rope_parameters: {rope_type: default, rope_theta: 1e6}": "YAML reads 1e6, without a point, as",
    "rope_parameters: {rope_type: yarn, factor: 4.0, beta_fast: fast}": "rope",
    "rope_parameters: {rope_type: llama3, factor: 4.0, low_freq_factor: '1', high_freq_factor: 4.0,"
    " original_max_position_embeddings: 512}": "rope",
    "block_size: [": "is no valid YAML",
    "\tblock_size: 64": "is no valid YAML",
    "\x00": "is no valid YAML",
}


@pytest.mark.parametrize(("line", "said"), FILES.items(), ids=range(len(FILES)))
def test_explain_refuses_what_the_layer_refuses(line, said, tmp_path):
    path = tmp_path / "layer.yaml"
    path.write_text(f"hidden_size: 256\nnum_heads: 4\nnum_kv_heads: 2\n{line}\n")
    with pytest.raises(Exception, match=r"\w"):  # as the layer does, whatever it raises
        NativeSparseAttention(NSAConfig.from_yaml(path))(torch.randn(1, 128, 256))
    assert said in told("explain", "--config", str(path), "--tokens", "128", "--device", "cpu")


def test_options_that_a_file_makes_void_are_refused():
    path = str(ROOT / "configs" / "llama3-8b.yaml")
    assert "so --heads, --head-dim would have no effect" in told(
        "explain", "--config", path, "--heads=4", "--head-dim=64"
    )
    assert "so --preset would have no effect" in told(
        "explain", "--config", path, "--preset", "tiny"
    )


def test_version():
    assert run("--version") == f"nsa_fsa {nsa_fsa.__version__}, PyTorch {torch.__version__}\n"


@pytest.mark.parametrize("gpu", ["h100", "NVIDIA H100", "sm_90", "sm_90a", "9.0"])
def test_explain_what_another_machine_would_run(gpu):
    printed = run("explain", "--for", gpu, "--tokens", "65536")
    # Without reasons why not.
    chosen = [line.split(" (")[0] for line in printed.splitlines()[1:] if not line.startswith(" ")]
    ran = dict(line.split(": ") for line in chosen)
    assert ran.pop("sliding_window_attention") == "flash_attention"
    assert set(ran.values()) == {"triton"}
    # Nothing of this machine's timings.
    assert "selected_attention: triton (forward: the default tiles" in printed


def test_explain_what_an_old_or_wrongly_asked_gpu_would_run():
    printed = run("explain", "--for", "t4")
    assert "selected_attention: reference" in printed
    assert "not triton: it needs compute capability 8.0 or newer, and this GPU has 7.5" in printed
    assert "not triton: q has dtype torch.float64" in run(
        "explain", "--for", "h100", "--dtype", "float64"
    )


# bench and crossover


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "--tokens", "-1"), "Invalid value for '--tokens'"),
        (("bench", "--tokens", str(2**31)), "Invalid value for '--tokens'"),
        (("bench", "--kv-heads", "3"),
         "num_kv_heads=3 is not allowed: it must be a divisor of num_heads=32"),
        (("bench", "--kv-heads", "0"), "Invalid value for '--kv-heads'"),
        (("bench", "--head-dim", "-8"), "Invalid value for '--head-dim'"),
        (("bench", "--heads", "0"), "Invalid value for '--heads'"),
        (("bench", "--preset", "magic"), "allowed are ('fsa-64x16'"),
        (("bench", "--config", "nowhere.yaml"), "does not exist"),
        (("bench", "--config", str(ROOT / "configs/llama3-8b.yaml"), "--kv-heads", "4"),
         "--kv-heads would have no effect"),
        (("bench", "--dtype", "float32"), "'float32' is not known: allowed are bfloat16, float16"),
        (("bench", "--implementation", "magic"),
         "'magic' is not known: allowed are nsa_fsa, nsa_layer, flash_attn_4, cudnn"),
        (("bench", "--pass", "sideways"),
         "'sideways' is not known: allowed are forward, backward, forward_backward"),
        (("bench", "--milliseconds", "-1"), "Invalid value for '--milliseconds'"),
        (("bench", "--seed", str(2**63)), "Invalid value for '--seed'"),
        (("bench", "--output", __file__), "Invalid value for '--output'"),
        (("bench", "decode", "--kv-heads", "3"), "it must be a divisor of num_heads=32"),
        (("bench", "decode", "--new", "17"), "Invalid value for '--new'"),
        (("bench", "decode", "--batch", "0"), "Invalid value for '--batch'"),
        (("bench", "prefill", "--chunk", "0"), "Invalid value for '--chunk'"),
        (("bench", "--tokens", "64", "decode"), "Fix: nsa-fsa bench decode --tokens"),
        (("crossover", "--kv-heads", "5"), "it must be a divisor of num_heads=32"),
        (("crossover", "--head-dim", "0"), "Invalid value for '--head-dim'"),
        (("crossover", "--against", "magic"),
         "'magic' is not known: allowed are flash_attn_4, cudnn"),
        (("crossover", "--dtype", "float64"),
         "'float64' is not known: allowed are bfloat16, float16"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_explained_before_a_gpu_is_looked_for(arguments, said, monkeypatch):
    monkeypatch.setattr(cli, "need_a_gpu", lambda: pytest.fail("the arguments were taken"))
    assert said in told(*arguments)


@pytest.mark.parametrize("command", ["bench", "bench decode", "bench prefill", "crossover"])
def test_without_a_gpu_there_is_nothing_to_time(command, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    printed = " ".join(run(*command.split(), f"--output={tmp_path}", code=1).split())
    assert "cannot run here: PyTorch" in printed
    assert "sees no CUDA GPU" in printed
    assert not list(tmp_path.iterdir())


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in run("bench", code=1)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have one, on which full attention is PyTorch's own."""
    monkeypatch.setattr(cli, "need_a_gpu", lambda: None)
    monkeypatch.setattr(cli, "CudaMeter", FakeMeter)
    monkeypatch.setattr(cli, "Case", partial(Case, device="cpu"))
    math = dataclasses.replace(CUDNN, function=partial(sdpa, backend="MATH"))
    monkeypatch.setitem(cli.FULL_ATTENTION, "cudnn", math)
    monkeypatch.setitem(cli.IMPLEMENTATIONS, "cudnn", math)
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, None)  # each by itself: another test may have it
    # What was found is remembered, by another test for example.
    monkeypatch.setattr(flash_attention.FLASH_ATTN_4, "missing", lambda: "it is not installed")
    # The file is named after the GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "LENGTHS", (64,))
    monkeypatch.setattr("nsa_fsa.benchmarking.runs.Bench.crossover.__defaults__", ((64, 128),))


SIZES = ("--heads=4", "--head-dim=16", "--preset=tiny", "--seed=3")


def test_bench(gpu, tmp_path):
    """The whole command, in 16 bits: checked, timed, printed, written."""
    options = (*SIZES, "--kv-heads=1", "--kv-heads=4", "--tokens=96", f"--output={tmp_path}")
    printed = run("bench", *options)
    document = json.loads((tmp_path / "bench_none.json").read_text())
    rows = document["rows"]
    assert {(r["implementation"], r["group_size"], r["pass"]) for r in rows} == {
        (name, g, p) for name in ("nsa_fsa", "nsa_layer", "cudnn") for g in (1, 4) for p in PASSES
    }
    assert {(r["num_tokens"], r["dtype"], r["block_size"]) for r in rows} == {
        (96, "bfloat16", 16),
        (96, "bfloat16", 0),
    }
    assert all(
        0 < max(r["errors"].values()) < 0.02 for r in rows if r["implementation"] != "nsa_layer"
    )
    assert {x["implementation"] for x in document["not_timed"]} == {"flash_attn_4"}
    for said in (
        "4 / 1",
        "4 / 4",
        "nsa_fsa, whole core",
        "nsa_fsa, whole layer",
        "full: cuDNN",
        "not timed: flash_attn_4",
    ):
        assert said in printed
    assert "0.25 / 0.25" in printed


def test_bench_takes_a_part_of_it(gpu, tmp_path):
    path = str(ROOT / "configs" / "tiny-demo.yaml")
    options = (
        "--implementation=nsa_fsa",
        "--pass=forward",
        "--dtype=float16",
        "--tokens=64",
        "--tokens=96",
    )
    run("bench", "--config", path, *options, f"--output={tmp_path}")
    rows = json.loads((tmp_path / "bench_none.json").read_text())["rows"]
    config = NSAConfig.from_yaml(path)
    assert [(r["num_tokens"], r["pass"], r["dtype"]) for r in rows] == [
        (t, "forward", "float16") for t in (64, 96)
    ]
    assert {(r["num_heads"], r["block_size"]) for r in rows} == {
        (config.num_heads, config.block_size)
    }


def test_bench_decode(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "DecodeCase", partial(DecodeCase, device="cpu"))
    math = partial(sdpa_step, backend="MATH")
    full = [
        dataclasses.replace(x, function=math) if x.name == "cudnn" else x for x in FULL_DECODING[:2]
    ]
    monkeypatch.setattr(cli, "FULL_DECODING", full)
    sizes = ("--kv-heads=2", "--tokens=96", "--tokens=208", "--batch=1", "--batch=2")
    printed = run("bench", "decode", *SIZES, *sizes, f"--output={tmp_path}")
    document = json.loads((tmp_path / "bench_decode_none.json").read_text())
    assert {(r["implementation"], r["num_tokens"], r["batch_size"]) for r in document["rows"]} == {
        (name, t, b) for name in ("nsa_decode", "cudnn") for t in (96, 208) for b in (1, 2)
    }
    assert all(max(r["errors"].values()) < 0.005 for r in document["rows"])
    assert {x["implementation"] for x in document["not_timed"]} == {"flash_attn_4"}
    for said in ("4 / 2", "nsa_fsa, decoding", "full: cuDNN", "2.00x"):
        assert said in printed


def test_bench_prefill(gpu, tmp_path):
    sizes = ("--kv-heads=2", "--tokens=208", "--chunk=96", "--chunk=128", "--dtype=float16")
    printed = run("bench", "prefill", *SIZES, *sizes, f"--output={tmp_path}")
    document = json.loads((tmp_path / "bench_prefill_none.json").read_text())
    names = [row["implementation"] for row in document["rows"]]
    assert names == ["nsa_layer", "prefill", "prefill_96", "prefill_128"]
    assert not document["not_timed"]
    assert all(max(row["errors"].values()) < 0.02 for row in document["rows"])
    assert "nsa_fsa, into a cache by 96" in printed


def test_crossover(gpu, tmp_path):
    printed = run("crossover", *SIZES, "--kv-heads=2", f"--output={tmp_path}")
    assert "Against cuDNN, because" in printed
    document = json.loads((tmp_path / "crossover_none.json").read_text())
    assert {(x["against"], x["pass"], x["tokens"]) for x in document["crossovers"]} == {
        ("cudnn", "forward", 64),
        ("cudnn", "forward_backward", 64),
    }
    assert "64 or fewer" in printed
    assert "4 / 2" in printed


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (dict(ratios={1024: 0.5, 2048: 0.9}, tokens=None, slower_at=2048), "never, up to 2,048"),
        (dict(ratios={1024: 0.5, 2048: 1.5}, tokens=2048, slower_at=1024), "2,048"),
        (dict(ratios={1024: 1.5}, tokens=1024, slower_at=None), "1,024 or fewer"),
        (dict(ratios={}, tokens=None, slower_at=None), "not measured"),
    ],
)
def test_where_the_core_begins_to_be_faster_is_said(entry, said):
    entry |= {"against": "cudnn", "num_heads": 4, "group_size": 2, "pass": "forward"}
    table = cli.crossover_table(dict(gpu="none", crossovers=[entry]))
    assert next(iter(table.columns[3].cells)) == said


@pytest.mark.gpu
@pytest.mark.parametrize("command", ["bench", "crossover"])
def test_on_a_gpu(command, tmp_path):
    sizes = ("--heads=8", "--kv-heads=2", "--milliseconds=1", f"--output={tmp_path}")
    sizes += ("--tokens=2048",) if command == "bench" else ()
    line = [sys.executable, "-m", "nsa_fsa.cli", command, *sizes]
    result = subprocess.run(line, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    measured = {(r["implementation"], r["pass"]) for r in document["rows"]}
    names = ("nsa_fsa", "nsa_layer") if command == "bench" else ("nsa_fsa",)
    passes = PASSES if command == "bench" else ("forward", "forward_backward")
    assert {(name, p) for name in names for p in passes} <= measured, document["not_timed"]


def test_the_command_itself():
    """As `nsa-fsa` is installed, in a process of its own."""
    command = [sys.executable, "-m", "nsa_fsa.cli", "explain", "--device", "cpu", "--tokens", "64"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "gated_combine: reference" in result.stdout
    (entry,) = (
        x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("nsa-fsa = ")
    )
    assert entry == 'nsa-fsa = "nsa_fsa.cli:app"'
