"""The README's figures are those of docs/results."""

import json
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nsa_fsa import cli
from nsa_fsa.ops.sliding_window_attention.flash_attention import INSTALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


SECTION = README.split("## How fast")[1].split("\n## ")[0]


def rows_of(benchmark):
    return json.loads((ROOT / f"docs/results/{benchmark}_nvidia_h200.json").read_text())["rows"]


def is_quoted(benchmark, row):
    """Whether the table can quote a row: each implementation from one benchmark, full attention from that of the whole core,
    compressed attention from that of its parts."""
    return (
        row["num_tokens"] == 65536
        and row["head_dim"] == 128
        and row["selection"] in ("random", "full", "independent")
        and (row["block_size"], row["num_blocks"]) in ((64, 16), (0, 0))
        and (row["kind"] == "full") <= (benchmark == "core")
        and (benchmark == "core_branches") == (row["implementation"] == "compressed_attention")
        # The choice of blocks is timed beside compressed attention once more; the table quotes the latter's own run.
        and (benchmark == "selection") == (row["implementation"] == "select_blocks")
    )


def test_timings():
    """Every cell of the table under "How fast", to the digits that it gives."""
    lines = [line.strip("|").split("|") for line in SECTION.splitlines() if line.startswith("|")]
    groups = [int(re.search(r"G = (\d+)", heading)[1]) for heading in lines[0][1:]]
    measured = {
        (row["implementation"], row["group_size"], row["pass"]): row["ms"]
        for benchmark in ("core", "core_branches", "selected", "compressed", "selection")
        for row in rows_of(benchmark)
        if is_quoted(benchmark, row)
    }
    compared = 0
    for label, *cells in lines[2:]:
        implementation = re.search(r"`(\w+)`", label)[1]
        for group, cell in zip(groups, cells, strict=True):
            passes = ("forward",) if implementation == "select_blocks" else ("forward", "backward")
            for name, figure in zip(passes, cell.split("/"), strict=True):
                digits = len(figure.strip().partition(".")[2])
                assert float(figure) == round(measured[implementation, group, name], digits), (label, group, name)
                compared += 1
    assert compared == 45


def test_speed_and_memory_of_the_whole():
    """The sentences below the table."""
    text = " ".join(SECTION.split())
    speedups = defaultdict(list)  # by length: one of every G in each of the two runs
    for benchmark in ("core", "crossover"):
        ms = {
            (row["num_tokens"], row["group_size"], row["implementation"]): row["ms"]
            for row in rows_of(benchmark)
            if row["pass"] == "forward_backward"
        }
        for tokens, group, implementation in ms:
            if implementation == "flash_attn_4":
                speedups[tokens].append(ms[tokens, group, "flash_attn_4"] / ms[tokens, group, "nsa_fsa"])
    times = {tokens: f"{min(found):.1f} to {max(found):.1f} times" for tokens, found in speedups.items()}
    assert f"{times[65536]} as fast as flash-attn 4 here, {times[131072]} at 131,072 tokens" in text
    assert f"{times[12288]} at 12,288, and {times[8192]} at 8,192, over all three G and two runs" in text
    first = {
        x["tokens"]
        for x in json.loads((ROOT / "docs/results/crossover_nvidia_h200.json").read_text())["crossovers"]
        if x["pass"] == "forward_backward"
    }
    assert f"with backward NSA is faster from {min(first):,} to {max(first):,} tokens on" in text
    peaks = {len(r["recompute"]): r for r in rows_of("core_memory") if "peak_gib" in r and r["num_tokens"] == 131072}
    kept, recomputed = f"{peaks[0]['peak_gib']:.1f} GiB", f"{peaks[3]['peak_gib']:.1f} GiB"
    assert f"peaks at {kept}, inputs and gradients included, or {recomputed} with `recompute`" in text
    assert f"full attention alone take {peaks[0]['full_attention_gib']:.1f} GiB" in text
    assert any(r["num_tokens"] == 2**20 and "peak_gib" in r for r in rows_of("core_memory"))
    assert "A million tokens fit one H200" in text


def blocks_of(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks_of("python"), ids=lambda code: re.findall(r"import (\w+)", code)[-1])
def test_python_blocks_run_as_they_stand(code, tmp_path, monkeypatch):
    """In a folder in which the checkpoint that they name is a small one."""
    monkeypatch.chdir(tmp_path)
    if "from_pretrained" in code:
        transformers = pytest.importorskip("transformers")
        small = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000)
        config = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, **small)
        transformers.LlamaForCausalLM(config).save_pretrained("meta-llama/Meta-Llama-3-8B")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", [x for code in blocks_of("bash") for x in code.splitlines() if x.startswith("nsa-fsa")])
def test_commands_run_as_they_stand(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli.app, shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, result.output


def test_every_block_is_run():
    """What is neither Python nor a command of this package is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "bash"}
    for line in (x for language, code in blocks if language == "bash" for x in code.splitlines()):
        if not line.startswith("nsa-fsa"):
            target = re.match(r"make (\w+) ", line)[1]
            assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_one_command_installs_flash_attention():
    """README, `nsa-fsa info` and the extra in pyproject.toml ask for the same."""
    (requirement,) = re.findall(r'^flash-attn = \["(.*)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f'pip install "{requirement}"' == INSTALL
    said = [README, *(path.read_text() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("nsa_fsa/**/*.py")))]
    commands = {x for text in said for x in re.findall(r"pip install [^`)\n]*flash.attn[^`)'\n]*", text)}
    assert commands == {INSTALL}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?://)([^)#]+)\)", README))))
def test_links(path):
    assert (ROOT / path).exists()
