"""What the README and the pages with its examples say runs as it stands;
tests/benchmarks/test_pages.py is about figures."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nsa_fsa import cli
from nsa_fsa.ops.sliding_window_attention.flash_attention import INSTALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / "docs" / f"{x}.md").read_text() for x in ("models", "operators"))

CONVERSION = (ROOT / "docs" / "conversion.md").read_text()


def blocks_of(language, pages=PAGES):
    return re.findall(rf"^```{language}\n(.*?)^```", pages, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "code",
    blocks_of("python", PAGES + CONVERSION),
    ids=lambda code: re.findall(r"import (\w+)", code)[-1],
)
def test_python_blocks_run_as_they_stand(code, tmp_path, monkeypatch):
    """In a folder in which the checkpoint that they name is a small one."""
    monkeypatch.chdir(tmp_path)
    if "from_pretrained" in code:
        transformers = pytest.importorskip("transformers")
        small = dict(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
        )
        config = transformers.LlamaConfig(hidden_size=64, intermediate_size=64, **small)
        transformers.LlamaForCausalLM(config).save_pretrained("meta-llama/Meta-Llama-3-8B")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    "line", [x for code in blocks_of("bash") for x in code.splitlines() if x.startswith("nsa-fsa")]
)
def test_commands_run_as_they_stand(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli.app, shlex.split(line, comments=True)[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "line",
    [x for code in blocks_of("bash", CONVERSION) for x in code.splitlines() if x.startswith("nsa")],
)
def test_commands_that_take_long_are_understood(line):
    """tests/training runs them on tiny models."""
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(cli.app).commands[name]
    assert command.make_context(name, arguments).params["text"]


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
    (requirement,) = re.findall(
        r'^flash-attn = \["(.*)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert f'pip install "{requirement}"' == INSTALL
    said = [
        README,
        *(path.read_text() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("nsa_fsa/**/*.py"))),
    ]
    commands = {
        x for text in said for x in re.findall(r"pip install [^`)\n]*flash.attn[^`)'\n]*", text)
    }
    assert commands == {INSTALL}
