"""The result file: what was measured, with what, where and when."""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import nsa_fsa

PACKAGE = Path(nsa_fsa.__file__).resolve().parent


def printed_by(command: str) -> str:
    """What a command prints in the checkout; nothing where it cannot run."""
    options: dict[str, Any] = dict(capture_output=True, text=True, timeout=30, cwd=PACKAGE.parent)
    try:
        return subprocess.run(command.split(), **options).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def code_version() -> dict[str, Any]:
    """The commit, whether the code differs from it, and a digest of the code. An installed package
    may lie in someone else's repository, so that only a checkout asks git."""
    digest, folders, commit, changes = hashlib.sha256(), [PACKAGE], "", ""
    if (PACKAGE.parent / "pyproject.toml").exists():
        folders.append(PACKAGE.parent / "benchmarks")
        commit = printed_by("git rev-parse HEAD")
        changes = printed_by("git status --porcelain -- nsa_fsa benchmarks :!benchmarks/results")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        name = str(path.relative_to(PACKAGE.parent))
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    dirty = bool(changes) if commit else None
    return dict(commit=commit or "unknown", dirty=dirty, source_digest=digest.hexdigest()[:16])


def command_line(program: str, *arguments: str) -> str:
    """Without where the program is and where results go, which nobody can repeat elsewhere."""
    kept = [y for x, y in zip(("", *arguments), arguments, strict=False) if x != "--output"]
    module = Path(program).name == "__main__.py"
    name = f"python -m {Path(program).parent.name}" if module else "nsa-fsa"
    return " ".join([name, *(x for x in kept if not x.startswith("--output"))])


@functools.cache
def versions() -> dict[str, str]:
    """Of every package; nsa_fsa itself may run from its source tree, not installed."""
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    return installed | {"nsa-fsa": nsa_fsa.__version__}


def machine() -> dict[str, Any]:
    gpu, packages = torch.cuda.is_available(), ("nsa-fsa", "torch", "triton", "flash-attn-4")
    return dict(
        gpu=torch.cuda.get_device_name() if gpu else "none",
        driver=printed_by("nvidia-smi --query-gpu=driver_version --format=csv,noheader -i 0"),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if gpu else None,
        python=platform.python_version(),
        **{name: versions().get(name) for name in packages},
        NSA_FSA_PROFILE=os.environ.get("NSA_FSA_PROFILE"),
    )


class Results:
    """The rows of one benchmark on one GPU, in a file that is written after every measurement."""

    def __init__(self, folder: Path, benchmark: str, method: dict[str, Any]) -> None:
        here = machine()
        gpu = re.sub(r"[^a-z0-9]+", "_", here["gpu"].lower()).strip("_")
        self.path = folder / f"{benchmark}_{gpu}.json"
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        run = dict(date=date, command=command_line(*sys.argv), machine=here, method=method)
        about = dict(schema=1, benchmark=benchmark, gpu=here["gpu"], code=code_version())
        self.document: dict[str, Any] = dict(**about, runs=[run], rows=[], not_timed=[])

    def add(self, part: str, **entry: Any) -> None:
        """Adds to "rows", "not_timed" or another list, and says which run the entry is of."""
        run = len(self.document["runs"]) - 1
        self.document.setdefault(part, []).append(entry | dict(run=run))
        self.write()

    def write(self) -> None:
        """Through a second file, so that no interruption leaves half of one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.part")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(temporary, self.path)
