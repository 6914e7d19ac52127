"""Tiles and items so small that shapes an interpreter can run are cut as only long sequences and
wide heads otherwise are.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa.ops.common import tuning
from tests.cases import F32, Case, backends_of, on_a_gpu_only
from tests.ops.selected_attention import test_cached_chunks as cached
from tests.ops.selected_attention.promised import (
    assert_results_close,
    output_gradient,
    run,
    selection,
)

CASE = Case("tiles", (5, 0, 50, 33), 2, 1, 32, 16, F32, 8, 4, 16, 4, 1, 1, 8, seed=9)
SHORT = Case("tiles_short", (20, 0, 17), 2, 1, 16, 16, F32, 8, 4, 16, 2, 1, 0, 8, seed=10)
# Blocks of two pieces, some with keys in the first piece only:
# all of them sparse, and some of them dense.
PIECES = Case("pieces", (37, 0, 70), 1, 1, 32, 16, F32, 8, 4, 32, 3, 0, 0, 8, seed=11)
PIECES_FORCED = dataclasses.replace(PIECES, name="pieces_forced", init_blocks=1, local_blocks=1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows and items of 48: a block with more than 48 rows, (query, head)
    pairs, is shared by several programs. Pieces and steps of 16 keys: so are those of a
    block that has more."""

    def small(make_config):
        def made(*args, **kwargs):
            config = make_config(*args, **kwargs)
            names = [field.name for field in dataclasses.fields(config)]
            sizes = {name: 16 for name in names if name.endswith(("_m", "_keys"))}
            items = {name: 48 for name in names if name.endswith("item_rows")}
            assert {"fwd_keys", "bwd_keys", "merge_keys", "bwd_m"} <= sizes.keys()
            assert items
            return dataclasses.replace(config, **sizes, **items)

        return made

    for name in ("default_config", "plain_config"):
        monkeypatch.setattr(tuning, name, small(getattr(tuning, name)))
    monkeypatch.setattr(tuning, "query_major_tile", lambda *_: (16, 4, 2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace_bytes", [60_000, 2**30])
@pytest.mark.parametrize("group_size", [1, 5])
@pytest.mark.parametrize("case", [CASE, SHORT, PIECES, PIECES_FORCED], ids=str)
@pytest.mark.parametrize(
    "backend", [b for b in backends_of("selected_attention") if b.values[0] != "reference"]
)
def test_how_work_is_cut_does_not_show(backend, case, group_size, workspace_bytes):
    if case is not SHORT:
        on_a_gpu_only(backend)
    case, x, indices = selection(dataclasses.replace(case, group_size=group_size), backend)
    do = output_gradient(case)
    expected = run("reference", case, x, indices, do)
    assert_results_close(
        backend, run(backend, case, x, indices, do, workspace_bytes=workspace_bytes), expected
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("workspace_bytes", [60_000, 2**30])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_how_the_work_of_a_chunk_is_cut_does_not_show(backend, block_size, workspace_bytes):
    """Blocks of one and of two pieces, which many queries after them chose."""
    on_a_gpu_only(backend)
    chunk = cached.make_chunk(group_size=3, free=2, block_size=block_size)
    cached.check(backend, chunk, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
def test_plain_backward_has_two_stages(head_dim, block_size, dtype):
    """With one dq is wrong on Hopper, which neither the interpreter nor a compiler notices."""
    q = torch.empty(1, 4, head_dim, dtype=dtype)
    configs = tuning.candidates(q, q, block_size, "backward")
    assert all(config.bwd_stages > 1 for config in configs.values()), configs


def test_gluon_kernels_run_on_hopper_alone(monkeypatch):
    """AMD's MI200 calls its capability (9, 0) too."""
    x = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16, shape=(1, 4, 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning.triton, "__version__", "3.7.1")
    monkeypatch.setattr(torch.version, "hip", None)
    assert tuning.runs_gluon(x, x)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not tuning.runs_gluon(x, x)


def test_a_remembered_choice_is_the_choice_for_these_arguments():
    """Whatever was asked before: every problem's tiles, out of order, against making them anew."""
    problems = [
        (torch.empty(1, 4, d, dtype=dtype), torch.empty(1, 4, dv, dtype=dtype), block_size)
        for dtype in (torch.bfloat16, torch.float32)
        for d, dv in ((64, 64), (128, 128), (256, 256), (64, 256), (32, 64))
        for block_size in (128, 16, 64, 32)
    ]
    for q, v, block_size in problems:
        assert tuning.plain_config(q, v, block_size) == tuning.plain_config.__wrapped__(
            q, v, block_size
        )
        assert tuning.default_config(q, v, block_size) == tuning.default_config.__wrapped__(
            q, v, block_size
        )
        for direction in ("forward", "backward"):
            found = tuning.candidates(q, v, block_size, direction)
            assert found == tuning.candidates.__wrapped__(q, v, block_size, direction)


# The short sequence first, so that no range of queries begins where a block does.
TIGHT = Case("workspace", (5, 0, 70, 33), 2, 1, 32, 16, F32, 8, 4, 16, 4, 1, 1, 8, seed=9)
TIGHT_SHORT = Case("workspace_short", (20, 0, 17), 2, 1, 16, 16, F32, 8, 4, 16, 2, 1, 0, 8, seed=10)


# With 3 heads a group the partials of one KV head of TIGHT take about 50 KB forward and 170 KB
# backward. One byte is enough for nothing, so that ranges are as short as they can be.
@pytest.mark.parametrize(
    ("case", "budget"),
    [*((TIGHT, budget) for budget in (1, 30_000, 60_000, 100_000, 200_000)), (TIGHT_SHORT, 1)],
    ids=lambda value: str(getattr(value, "name", value)),
)
@pytest.mark.parametrize("group_size", [1, 3, 4])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_budget_does_not_show(backend, group_size, case, budget):
    if budget in (30_000, 100_000):
        on_a_gpu_only(backend, "triton_kv_major", "triton_query_major")
    if group_size != 3:
        on_a_gpu_only(backend)
    case, x, indices = selection(dataclasses.replace(case, group_size=group_size), backend)
    do = output_gradient(case)
    expected = run("reference", case, x, indices, do)
    assert_results_close(
        backend, run(backend, case, x, indices, do, workspace_bytes=budget), expected
    )
