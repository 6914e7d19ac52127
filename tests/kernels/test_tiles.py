"""Tiles and items so small that shapes an interpreter can run are cut as only long sequences otherwise are."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa.kernels import tuning
from tests.cases import F32, Case, backends_of
from tests.promised import assert_results_close, output_gradient, run, selection

CASE = Case("tiles", (5, 0, 50, 33), 2, 1, 32, 16, F32, 8, 4, 16, 4, 1, 1, 8, seed=9)
SHORT = Case("tiles_short", (20, 0, 17), 2, 1, 16, 16, F32, 8, 4, 16, 2, 1, 0, 8, seed=10)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows and items of 48: a block with more than 48 rows, (query, head) pairs, is shared by several programs."""
    default = tuning.default_config

    def small(*args, **kwargs):
        config = default(*args, **kwargs)
        sizes = {field.name: 16 for field in dataclasses.fields(config) if field.name.endswith("_m")}
        items = {field.name: 48 for field in dataclasses.fields(config) if field.name.endswith("item_rows")}
        assert sizes
        assert items
        return dataclasses.replace(config, **sizes, **items)

    monkeypatch.setattr(tuning, "default_config", small)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace_bytes", [60_000, 2**30])
@pytest.mark.parametrize("group_size", [1, 5])
@pytest.mark.parametrize("case", [CASE, SHORT], ids=str)
@pytest.mark.parametrize("backend", [b for b in backends_of("selected_attention") if b.values[0] != "reference"])
def test_how_work_is_cut_does_not_show(backend, case, group_size, workspace_bytes):
    case, x, indices = selection(dataclasses.replace(case, group_size=group_size), backend)
    do = output_gradient(case)
    expected = run("reference", case, x, indices, do)
    assert_results_close(backend, run(backend, case, x, indices, do, workspace_bytes=workspace_bytes), expected)
