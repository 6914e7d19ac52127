"""The command line, as a user types it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nsa_fsa
from nsa_fsa import NativeSparseAttention, NSAConfig, cli
from nsa_fsa.benchmarking import app as benchmark
from nsa_fsa.ops.common import backends

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
    impossible = backends.Backend("impossible", lambda: None, unavailable=lambda _: "it needs a machine [from] the future")
    monkeypatch.setitem(backends._BACKENDS, "gated_combine", {"impossible": impossible, **backends._BACKENDS["gated_combine"]})
    printed = run("info")
    assert nsa_fsa.__version__ in printed
    assert torch.__version__.split("+")[0] in printed
    for operator in cli.OPERATORS:
        for name, reason in backends.available(operator).items():
            (line,) = (x for x in printed.splitlines() if f" {operator} " in x and f" {name} " in x)
            assert (" yes " if reason is None else f" no: {reason} ") in line


def test_pictures_are_no_concern_of_info_and_explain(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not importable
    assert "torch" in run("info")
    assert "gated_combine" in run("explain", "--device", "cpu", "--tokens", "64")


def test_bench_has_every_subject():
    printed = run("bench", "--help")
    for subject in ("selected", "selection", "compressed", "core"):
        assert f" {subject} " in printed


def test_info_knows_every_operator():
    parts = {"block_scores", "branch_gradients"}  # of an operator in the table, not operators that a layer calls
    assert set(cli.OPERATORS) | parts == set(backends._BACKENDS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_explain_a_file(path):
    printed = run("explain", "--config", str(path), "--tokens", "4096", "--device", "cpu", "--dtype", "float32")
    assert str(nsa_fsa.explain(NSAConfig.from_yaml(path), 4096, device="cpu", dtype=torch.float32)) in printed


def test_explain_a_preset():
    printed = run("explain", "--preset", "fsa-128x8", "--heads", "16", "--kv-heads", "2", "--head-dim", "64", "--device", "cpu")
    assert "8,192 tokens, 16 query heads of 64, 2 KV heads, bfloat16:" in printed
    config = NSAConfig.from_dict(dict(preset="fsa-128x8", hidden_size=1024, num_heads=16, num_kv_heads=2, head_dim=64))
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
        (("--head-dim", str(2**62)), "is not allowed: it must be an int >= 1, and one that 64 bits hold"),
        (("--device", "cuda:97"), "device='cuda:97' is not here"),
        (("--device", "abacus"), "device='abacus' is not here"),
        (("--device", "vulkan"), "'Vulkan' backend. Fix: a device of this machine"),
        (("--device", "hpu"), "device='hpu' is not here: No module named 'torch.hpu'. Fix: a device of this machine"),
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
    "rope_parameters: {rope_type: default, rope_theta: 1e6}": "(YAML reads 1e6, without a point, as text)",
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
    assert "so --heads, --head-dim would have no effect" in told("explain", "--config", path, "--heads=4", "--head-dim=64")
    assert "so --preset would have no effect" in told("explain", "--config", path, "--preset", "tiny")


def test_version():
    assert run("--version") == f"nsa_fsa {nsa_fsa.__version__}, PyTorch {torch.__version__}\n"


@pytest.mark.parametrize("gpu", ["h100", "NVIDIA H100", "sm_90", "sm_90a", "9.0"])
def test_explain_what_another_machine_would_run(gpu):
    printed = run("explain", "--for", gpu, "--tokens", "65536")
    chosen = [line.split(" (")[0] for line in printed.splitlines()[1:] if not line.startswith(" ")]  # without reasons why not
    ran = dict(line.split(": ") for line in chosen)
    assert ran.pop("sliding_window_attention") == "flash_attention"
    assert set(ran.values()) == {"triton"}
    assert "selected_attention: triton (forward: the default tiles" in printed  # nothing of this machine's timings


def test_explain_what_an_old_or_wrongly_asked_gpu_would_run():
    printed = run("explain", "--for", "t4")
    assert "selected_attention: reference" in printed
    assert "not triton: it needs compute capability 8.0 or newer, and this GPU has 7.5" in printed
    assert "not triton: q has dtype torch.float64" in run("explain", "--for", "h100", "--dtype", "float64")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("core", "--tokens", "-1"), "Invalid value for '--tokens'"),
        (("selected", "--tokens", "0"), "Invalid value for '--tokens'"),
        (("compressed", "--tokens", str(2**31)), "Invalid value for '--tokens'"),
        (("selection", "--group", "0"), "Invalid value for '--group'"),
        (("core", "--group", "3"), "3 does not divide --heads 64"),
        (("core", "--head-dim", "-8"), "Invalid value for '--head-dim'"),
        (("core", "--output", __file__), "Invalid value for '--output'"),
        (("core", "--heads", "0"), "Invalid value for '--heads'"),
        (("core", "--blocks", "0x16"), "'0x16' is not of the form 64x16"),
        (("core", "--blocks", "24x16"), "block_size=24 is not allowed: it must be a multiple of kernel_stride=16"),
        (("selected", "--blocks", "64x2"), "num_selected_blocks=2 is not allowed"),
        (("selected", "--memory", "--budget", "-1"), "Invalid value for '--budget'"),
        (("core", "--milliseconds", "-1"), "Invalid value for '--milliseconds'"),
        (("core", "--seed", str(2**63)), "Invalid value for '--seed'"),
    ],
)
def test_bench_checks_before_it_looks_for_a_gpu(arguments, said, monkeypatch):
    monkeypatch.setattr(benchmark, "need_a_gpu", lambda: pytest.fail("the arguments were taken"))
    assert said in told("bench", *arguments)


def test_crossover_checks_too(monkeypatch):
    monkeypatch.setattr(benchmark, "need_a_gpu", lambda: pytest.fail("the arguments were taken"))
    assert "5 does not divide --heads 64" in told("crossover", "--group", "5")
    assert "Invalid value for '--head-dim'" in told("crossover", "--head-dim", "0")


def test_the_command_itself():
    """As `nsa-fsa` is installed, in a process of its own."""
    command = [sys.executable, "-m", "nsa_fsa.cli", "explain", "--device", "cpu", "--tokens", "64"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "gated_combine: reference" in result.stdout
    (entry,) = (x for x in (ROOT / "pyproject.toml").read_text().splitlines() if x.startswith("nsa-fsa = "))
    assert entry == 'nsa-fsa = "nsa_fsa.cli:app"'
