"""The result file: written after every measurement, so that an interrupted run keeps what it has.

schema, benchmark, gpu     what the file is about
code                       commit, dirty, source_digest: the same for all of its rows
runs                       one entry a run: date, command line, machine, ceilings, how it measured
rows                       one measured pass of one implementation at one setting; `run` says which run
selections                 mean overlap of neighbouring queries' selections, by setting; of selected attention
not_timed                  what was left out, and why
"""

import json
import os
import re
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nsa_fsa.benchmarking.measure import Meter, code_version, machine
from nsa_fsa.benchmarking.settings import Setting

SCHEMA = 1
KEY = ("implementation", "variant", "pass", *Setting.__dataclass_fields__)
WINDOWS = ("kernel_size", "kernel_stride", "window_size")  # also tell rows apart, where a benchmark has them
REQUIRED = {
    "document": {"schema", "benchmark", "gpu", "code", "runs", "rows", "selections", "not_timed"},
    "code": {"commit", "commit_stated_by_hand", "dirty", "source_digest"},
    "runs": {"date", "command", "machine", "peers", "ceilings", "method", "seed"},
    "rows": {*KEY, "kind", "run"},
    "selections": {*Setting.__dataclass_fields__, "overlap_all", "overlap_sparse", "visible_keys_mean"},
    "not_timed": {"implementation", "reason"},
}


class CannotMerge(Exception):
    """The file on disk does not belong together with this run."""


def slug(text: str) -> str:
    """A file name from a GPU's name: "NVIDIA H200" becomes "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def command_line(arguments: list[str]) -> str:
    """The command, without where the results go, which nobody can repeat elsewhere."""
    kept = [
        x
        for before, x in zip(["", *arguments], arguments, strict=False)
        if not x.startswith("--output") and before != "--output"
    ]
    program = "nsa-fsa" if Path(kept[0]).stem in ("nsa-fsa", "cli") else f"python {kept[0]}"  # wherever it is installed
    return " ".join([program, *kept[1:]])


def row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return *(row[name] for name in KEY), *(row.get(name) for name in WINDOWS)


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError for a document that lacks something, or has a row twice."""

    def check(what: str, found: dict[str, Any]) -> None:
        if missing := REQUIRED[what] - set(found):
            raise ValueError(f"{what} lacks {sorted(missing)}: {found}")

    check("document", document)
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema {document['schema']}; this code reads {SCHEMA}.")
    check("code", document["code"])
    for part in ("runs", "rows", "selections", "not_timed"):
        for entry in document[part]:
            check(part, entry)
    keys = [row_key(row) for row in document["rows"]]
    if len(set(keys)) != len(keys):
        raise ValueError("a row stands there twice.")
    if any(not 0 <= row["run"] < len(document["runs"]) for row in document["rows"]):
        raise ValueError("a row names a run that is not there.")


class Results:
    """The rows of one benchmark on one GPU, on disk after every change."""

    def __init__(
        self, folder: Path, benchmark: str, meter: Meter, *, seed: int, peers: dict[str, str | None], merge: bool = False,
        commit: str | None = None,
    ) -> None:  # fmt: skip
        here = machine()
        self.path = folder / f"{benchmark}_{slug(here['gpu'])}.json"
        code = code_version(commit)
        self.document: dict[str, Any] = dict(
            schema=SCHEMA, benchmark=benchmark, gpu=here["gpu"], code=code, runs=[], rows=[], selections=[], not_timed=[]
        )
        if merge and self.path.exists():
            self.document = self.joined(json.loads(self.path.read_text()), code)
        self.ceilings = meter.ceilings()
        self.document["runs"].append(
            dict(
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                command=command_line(sys.argv),
                machine=here,
                peers=peers,
                ceilings=self.ceilings,
                method=meter.method,
                seed=seed,
            )
        )
        self.run = len(self.document["runs"]) - 1
        self.write()

    def joined(self, document: dict[str, Any], code: dict[str, Any]) -> dict[str, Any]:
        """The document on disk, if it was measured with the same code on the same GPU."""
        validate(document)
        for name, ours, theirs in (
            ("GPU", self.document["gpu"], document["gpu"]),
            ("commit", code["commit"], document["code"]["commit"]),
            ("source digest", code["source_digest"], document["code"]["source_digest"]),
        ):
            if ours != theirs:
                raise CannotMerge(
                    f"{self.path} was measured with {name} {theirs}, and this run has {ours}: results of different code do "
                    "not belong in one file. Fix: leave --merge out to replace the file, or choose another --output."
                )
        return document

    def add_row(self, implementation: str, kind: str, name: str, setting: Setting, variant: str = "", **measured: Any) -> None:
        """One measured pass; takes the place of an earlier measurement of the same."""
        row = dict(implementation=implementation, kind=kind, variant=variant, **{"pass": name}, **asdict(setting), **measured)
        row["run"] = self.run
        self._replace("rows", row, (*KEY, *WINDOWS))
        self._drop_reasons(row)
        self.write()

    def add_selection(self, setting: Setting, **facts: Any) -> None:
        self._replace("selections", asdict(setting) | facts, tuple(Setting.__dataclass_fields__))
        self.write()

    def put(self, part: str, entries: list[dict[str, Any]]) -> None:
        """What only this benchmark has, and follows from its rows."""
        self.document[part] = entries
        self.write()

    def leave_out(self, implementation: str, reason: str, **where: Any) -> None:
        entry = dict(implementation=implementation, reason=reason, **where)
        if entry not in self.document["not_timed"]:
            self.document["not_timed"].append(entry)
            self.write()

    def _drop_reasons(self, row: dict[str, Any]) -> None:
        """What an earlier run left out is there now."""
        about = [name for name in (*KEY, *WINDOWS, "kind") if name in row and name != "implementation"]
        self.document["not_timed"] = [
            entry
            for entry in self.document["not_timed"]
            if entry["implementation"] != row["implementation"]
            or any(name in entry and entry[name] != row[name] for name in about)
        ]

    def _replace(self, part: str, entry: dict[str, Any], key: tuple[str, ...]) -> None:
        entries = self.document[part]
        entries[:] = [old for old in entries if any(old.get(name) != entry.get(name) for name in key)]
        entries.append(entry)

    def write(self) -> None:
        """Through a second file, so that no interruption leaves half of one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".json.part")
        temporary.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(temporary, self.path)
