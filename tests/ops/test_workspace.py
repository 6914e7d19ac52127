"""workspace_bytes: with little of it KV heads, and ranges of a head's queries, are done in turn,
and nothing else changes.
"""

import dataclasses

import pytest

from tests.cases import F32, Case, backends_of, on_a_gpu_only
from tests.promised import assert_results_close, output_gradient, run, selection

# The short sequence first, so that no range of queries begins where a block does.
LONG = Case("workspace", (5, 0, 70, 33), 2, 1, 32, 16, F32, 8, 4, 16, 4, 1, 1, 8, seed=9)
SHORT = Case("workspace_short", (20, 0, 17), 2, 1, 16, 16, F32, 8, 4, 16, 2, 1, 0, 8, seed=10)


# With 3 heads a group the partials of one KV head of LONG take about 50 KB forward and 170 KB
# backward. One byte is enough for nothing, so that ranges are as short as they can be.
@pytest.mark.parametrize(
    ("case", "budget"),
    [*((LONG, budget) for budget in (1, 30_000, 60_000, 100_000, 200_000)), (SHORT, 1)],
    ids=lambda value: str(getattr(value, "name", value)),
)
@pytest.mark.parametrize("group_size", [1, 3, 4])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_budget_does_not_show(backend, group_size, case, budget):
    if budget in (30_000, 100_000):
        on_a_gpu_only(backend, "triton_kv_major", "triton_query_major")
    case, x, indices = selection(dataclasses.replace(case, group_size=group_size), backend)
    do = output_gradient(case)
    expected = run("reference", case, x, indices, do)
    assert_results_close(
        backend, run(backend, case, x, indices, do, workspace_bytes=budget), expected
    )
