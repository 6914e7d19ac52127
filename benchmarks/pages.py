"""Writes the tables into README.md and pages of docs/, between two comments:

    <!-- table: NAME, written by `python -m benchmarks pages` -->
    <!-- end of table -->

NAME is a function of `tables`.
"""

import re
from pathlib import Path

import pandas as pd

from benchmarks import tables

ROOT = Path(__file__).parents[1]
NAMES = ("performance", "decoding", "serving", "distributed")
PAGES = (ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in NAMES))
BEGIN = "<!-- table: {}, written by `python -m benchmarks pages` -->"
END = "<!-- end of table -->"
TABLE = re.compile(BEGIN.format(r"(\w+)") + "\n(.*?)" + END, re.DOTALL)


def markdown(table: pd.DataFrame) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def fill(page: str) -> str:
    """The page with every table as the results have it."""

    def written(found: re.Match[str]) -> str:
        return f"{BEGIN.format(found[1])}\n\n{markdown(getattr(tables, found[1])())}\n{END}"

    return TABLE.sub(written, page)


def write() -> list[Path]:
    """Returns the pages that changed."""
    before = {path: path.read_text() for path in PAGES}
    changed = [path for path, page in before.items() if fill(page) != page]
    for path in changed:
        path.write_text(fill(before[path]))
    return changed
