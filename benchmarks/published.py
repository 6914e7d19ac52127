"""The files in results/: a run writes them, later runs of the same code may join them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import floors
from nsa_fsa.benchmarking.results import Results

FOLDER = Path(__file__).with_name("results")
GPU = "nvidia_h200"  # whose results the pages quote
# What tells the rows of a file apart.
KEY = (
    "implementation", "variant", "pass", "num_tokens", "group_size", "num_heads", "head_dim",
    "block_size", "num_blocks", "init_blocks", "local_blocks", "selection", "dtype", "kernel_size",
    "kernel_stride", "window_size", "batch_size", "num_new", "num_gpus", "groups",
)  # fmt: skip
REQUIRED = {
    "code": {"commit", "dirty", "source_digest"},
    "runs": {"date", "command", "machine", "ceilings", "method", "seed"},
    "rows": {*KEY[2:-7], "implementation", "kind", "ms", "ms_20", "ms_80", "errors", "run"},
    "not_timed": {"implementation", "reason"},
}


class SuiteResults(Results):
    """Results that know the rates of the run, and may join a file of the same code."""

    def __init__(
        self,
        folder: Path,
        suite: str,
        meter: Any,
        about: dict[str, Any],
        *,
        merge: bool = False,
        commit: str | None = None,
    ) -> None:
        """about: the `ceilings` and the `seed` of the run; commit: the commit, where git here does
        not know it, as in a copy of the files alone."""
        super().__init__(folder, suite, meter.method)
        self.document["runs"][0] |= about
        if commit is not None:
            self.document["code"] |= dict(commit=commit, dirty=None, commit_stated_by_hand=True)
        if merge and self.path.exists():
            self.join(json.loads(self.path.read_text()))

    def join(self, before: dict[str, Any]) -> None:
        """Continues an earlier file."""
        for name in ("gpu", "commit", "source_digest"):
            ours, theirs = ((x | x["code"])[name] for x in (self.document, before))
            if ours != theirs:
                raise ValueError(
                    f"{self.path} was measured with {name} {theirs}, and this run has {ours}: one "
                    "file is about one code. Fix: leave --merge out to replace the file, or choose "
                    "another --output."
                )
        before["runs"] += self.document["runs"]
        self.document = before

    def add(self, part: str, **entry: Any) -> None:
        """Takes the place of an earlier entry about the same; what is measured was not left out."""
        key = (*KEY, "against")
        for name, like in {"not_timed": entry, part: {}}.items():
            self.document[name] = [
                old
                for old in self.document.get(name, [])
                if any(old.get(x, like.get(x)) != entry.get(x) for x in key)
            ]
        super().add(part, **entry)


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError for a document that lacks something, or has a row twice."""
    if document.get("schema") != 1:
        raise ValueError(f"schema={document.get('schema')!r} is not known: allowed is 1.")
    for part, names in REQUIRED.items():
        entries = document[part] if part != "code" else [document[part]]
        for entry in entries:
            if missing := names - set(entry):
                raise ValueError(f"an entry of {part} lacks {sorted(missing)}: {entry}")
    keys = [tuple(row.get(name) for name in KEY) for row in document["rows"]]
    if len(set(keys)) != len(keys):
        raise ValueError("a row is there twice.")
    if any(not 0 <= row["run"] < len(document["runs"]) for row in document["rows"]):
        raise ValueError("a row names a run that is not there.")


def read(suite: str, gpu: str = GPU, folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / f"{suite}_{gpu}.json").read_text())


def rows_of(suite: str, gpu: str = GPU, folder: Path = FOLDER) -> pd.DataFrame:
    return frame(read(suite, gpu, folder))


def frame(document: dict[str, Any]) -> pd.DataFrame:
    """The rows of a file, each with its floor at the rates of its run, and with the peak of memory
    that counts the inputs."""
    runs, rows = document["runs"], document["rows"]
    rows = [row | floors.floor(row, runs[row["run"]]["ceilings"]) for row in rows]
    table = pd.DataFrame(rows)
    if "peak_gib" not in table:
        inputs = [floors.work(row)["forward"].bytes / 2**30 for row in rows]
        table["peak_gib"] = table["extra_gib"] + inputs
    return table
