"""What the documents name is there: files, the sections that they link to,
and names of the code.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("nsa_fsa", "benchmarks", "configs", "docs", "scripts", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FILES = [
    f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")
]
FILES += [f"/{path.name}" for path in ROOT.glob("*.*")]
SOURCES = [
    *(ROOT / name for name in ("Makefile", "pyproject.toml")),
    *ROOT.glob("benchmarks/*.yaml"),
]
SOURCES += [
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)
]
WORDS = {word for path in SOURCES for word in re.findall(r"\w+", path.read_text())}


def anchors(page: str) -> set[str]:
    """What a link to a section of the page may end in, as GitHub has it."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)


def broken_links(path: Path, page: str) -> list[str]:
    broken = []
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", without_code(page)):
        to = path.parent / target if target else path
        if not to.exists() or (
            anchor and anchor not in anchors(to.read_text() if target else page)
        ):
            broken.append(f"{target}#{anchor}")
    return broken


def unknown_files(page: str) -> list[str]:
    page = re.sub(r"https?://\S+", "", page)
    names = re.findall(r"(?<![\w.-])[\w/-]+\.(?:py|md|yaml|json|toml)\b", page)
    return [name for name in names if not any(file.endswith(f"/{name}") for file in FILES)]


def unknown_words(page: str) -> list[str]:
    """Of names in backticks that have an underscore, calls and members included."""
    names = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?=?`", without_code(page))
    return [name for name in names if "_" in name and not WORDS.issuperset(name.split("."))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(path):
    page = path.read_text()
    assert not broken_links(path, page)
    assert not unknown_files(page)
    assert not unknown_words(page)


def test_what_is_not_there_is_noticed():
    page = (
        "# A title\n[one](nowhere.md) "
        "[two](#a-title) [three](#another) `ops/nothing.py` `default_config` `a.no_such_word()`"
    )
    assert broken_links(ROOT / "README.md", page) == ["nowhere.md#", "#another"]
    assert unknown_files(page) == ["nowhere.md", "ops/nothing.py"]
    assert unknown_words(page) == ["a.no_such_word"]
