"""The files in results/: how runs join one, and those that are published."""

import json

import pytest

from benchmarks import floors, published
from benchmarks.published import FOLDER, KEY, SuiteResults, rows_of, validate
from tests.benchmarking.tools import RATES, FakeMeter

PATHS = sorted(FOLDER.glob("*.json"))
ROW = dict.fromkeys(KEY) | dict(kind="ours", ms=1.0, ms_20=1.0, ms_80=1.0, errors={})
ABOUT = dict(ceilings=RATES, seed=0)


def suite_results(folder, **options):
    return SuiteResults(folder, "core", FakeMeter(), ABOUT, **options)


def add(store, implementation, **fields):
    store.add("rows", **ROW | dict(implementation=implementation, num_tokens=1) | fields)


def test_merge_joins_runs_of_the_same_code(tmp_path):
    first = suite_results(tmp_path)
    add(first, "a")
    add(first, "b")
    first.add("not_timed", implementation="c", num_tokens=1, reason="not installed")
    second = suite_results(tmp_path, merge=True)
    add(second, "b", ms=5.0)
    add(second, "b", num_tokens=2)
    second.add("not_timed", implementation="c", num_tokens=1, reason="not installed")
    document = json.loads(second.path.read_text())
    validate(document)
    found = [(r["implementation"], r["num_tokens"], r["ms"], r["run"]) for r in document["rows"]]
    assert found == [("a", 1, 1.0, 0), ("b", 1, 5.0, 1), ("b", 2, 1.0, 1)]
    assert len(document["runs"]) == 2
    assert len(document["not_timed"]) == 1


def test_without_merge_a_run_starts_afresh(tmp_path):
    add(suite_results(tmp_path), "a")
    second = suite_results(tmp_path)
    add(second, "b")
    assert [row["implementation"] for row in second.document["rows"]] == ["b"]


def test_what_is_measured_is_no_longer_left_out(tmp_path):
    """A reason without a pass is about all of them."""
    store = suite_results(tmp_path)
    for which in (dict(implementation="a"), dict(implementation="b")):
        store.add("not_timed", **which, num_tokens=1, reason="not installed")
    failed = {"implementation": "c", "num_tokens": 1, "pass": "backward"}
    store.add("not_timed", **failed, reason="no gradient")
    for name in ("a", "c"):
        add(store, name, **{"pass": "forward"})
    left_out = [entry["implementation"] for entry in store.document["not_timed"]]
    assert left_out == ["b", "c"]


@pytest.mark.parametrize("what", ["gpu", "commit", "source_digest"])
def test_merge_refuses_other_code_and_another_gpu(tmp_path, what):
    store = suite_results(tmp_path)
    add(store, "a")
    (store.document if what == "gpu" else store.document["code"])[what] = "another"
    store.write()
    with pytest.raises(ValueError, match=f"measured with {what} another, and this run has"):
        suite_results(tmp_path, merge=True)


def test_a_commit_may_be_stated(tmp_path):
    code = suite_results(tmp_path, commit="abc").document["code"]
    assert (code["commit"], code["dirty"], code["commit_stated_by_hand"]) == ("abc", None, True)


# What is published


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_published_files_are_whole(path):
    document = json.loads(path.read_text())
    validate(document)
    assert document["rows"] or document["agreement"]
    assert not document["code"]["dirty"], "measured code that no commit has"


@pytest.mark.parametrize("part", published.REQUIRED)
def test_validate_misses_nothing(part):
    for name in published.REQUIRED[part]:
        document = json.loads(PATHS[0].read_text())
        entry = document[part] if part == "code" else document[part][0]
        del entry[name]
        with pytest.raises(ValueError, match=f"an entry of {part} lacks .*{name}"):
            validate(document)


def test_validate_refuses_a_row_twice_and_a_run_that_is_not_there():
    document = json.loads(PATHS[0].read_text())
    document["rows"][0]["run"] = 99
    with pytest.raises(ValueError, match="a run that is not there"):
        validate(document)
    document["rows"].append(document["rows"][0])
    with pytest.raises(ValueError, match="twice"):
        validate(document)
    with pytest.raises(ValueError, match="schema=2 is not known"):
        validate(document | dict(schema=2))


def test_the_peak_is_that_of_a_whole_step():
    """Earlier code measured it with the inputs made inside; now these are counted and added."""
    rows = rows_of("core_memory")
    rows = rows[rows.peak_gib.notna()]
    assert len(rows) == 3
    for row in rows.to_dict("records"):
        counted = row["extra_gib"] + floors.work(row)["forward"].bytes / 2**30
        assert counted == pytest.approx(row["peak_gib"], rel=1e-3)
        assert floors.full_attention_bytes(row) / 2**30 == row["full_attention_gib"]
        # What README promises: twice full attention's tensors, or one and a half times.
        bar = 1.5 if "computes again" in row["variant"] else 2.0
        assert row["peak_gib"] <= bar * row["full_attention_gib"]


def test_the_peak_is_counted_where_it_was_not_measured():
    document = published.read("core")
    rows = published.frame(document)
    row = document["rows"][0]
    counted = row["extra_gib"] + floors.work(row)["forward"].bytes / 2**30
    assert rows.peak_gib[0] == counted
