"""The README's figures are those of docs/results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_timings():
    """Every cell of the table under "How fast", to the digits that it gives."""
    section = README.split("## How fast")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    groups = [int(re.search(r"G = (\d+)", heading)[1]) for heading in lines[0][1:]]
    measured = {
        (row["implementation"], row["group_size"], row["pass"]): row["ms"]
        for benchmark in ("selected", "compressed", "selection")
        for row in json.loads((ROOT / f"docs/results/{benchmark}_nvidia_h200.json").read_text())["rows"]
        if row["num_tokens"] == 65536
        and row["head_dim"] == 128
        and row["selection"] in ("random", "full", "independent")
        and (row["block_size"], row["num_blocks"]) in ((64, 16), (0, 0))
        # The choice of blocks is timed beside compressed attention once more; the table quotes the latter's own run.
        and (benchmark == "selection") == (row["implementation"] == "select_blocks")
    }
    compared = 0
    for label, *cells in lines[2:]:
        implementation = re.search(r"`(\w+)`", label)[1]
        for group, cell in zip(groups, cells, strict=True):
            if cell.strip() == "-":
                assert (implementation, group, "forward") not in measured
                continue
            passes = ("forward",) if implementation == "select_blocks" else ("forward", "backward")
            for name, figure in zip(passes, cell.split("/"), strict=True):
                digits = len(figure.strip().partition(".")[2])
                assert float(figure) == round(measured[implementation, group, name], digits), (label, group, name)
                compared += 1
    assert compared == 37


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!https?://)([^)#]+)\)", README))))
def test_links(path):
    assert (ROOT / path).exists()
