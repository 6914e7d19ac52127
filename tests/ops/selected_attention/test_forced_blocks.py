"""init_blocks and local_blocks of selected_attention: a promise about the indices,
kept and broken.
"""

import pytest
import torch

from tests.cases import F32, RESULTS, Case, backends_of, on_a_gpu_only
from tests.ops.selected_attention.promised import (
    assert_results_close,
    forced,
    output_gradient,
    run,
    selection,
)

# Sequences whose last block is full, or has one key, or is the only one.
LONG = Case("forced", (0, 81, 3, 32), 2, 3, 32, 16, F32, 8, 4, 16, 1, 0, 0, 8, seed=3)
SHORT = Case("forced_short", (36, 0, 3), 2, 1, 16, 32, F32, 8, 4, 16, 1, 0, 0, 8, seed=4)


@pytest.mark.parametrize(
    ("init_blocks", "local_blocks"), [(0, 0), (1, 2), (1, 1), (2, 1), (0, 1), (1, 0), (0, 2)]
)
@pytest.mark.parametrize(
    ("case", "free"), [(LONG, 2), (SHORT, 0), (SHORT, 1)], ids=["long-2", "short-0", "short-1"]
)
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_promise_kept(backend, case, free, init_blocks, local_blocks):
    """With places left for the scores to fill and without, saying how many indices count and
    not saying so.
    """
    if (init_blocks, local_blocks, free) not in ((0, 0, 0), (1, 2, 0)):
        on_a_gpu_only(backend)
    if init_blocks + local_blocks == 0:
        free += 1  # one has to be chosen
    case, x, indices = selection(forced(case, init_blocks, local_blocks, free), backend)
    counts = (indices >= 0).sum(-1, dtype=torch.int32) if free == 1 else None
    do = output_gradient(case)
    expected = run("reference", case, x, indices, do)
    assert_results_close(backend, run(backend, case, x, indices, do, block_counts=counts), expected)


def garbage(indices):
    """What may stand in place of a promised selection: nothing, anything,
    or as many blocks other than the first as fit.
    """
    shape, width = indices.shape[:2], indices.shape[2]
    generator = torch.Generator().manual_seed(13)
    nothing = torch.full_like(indices, -1)
    anything = torch.randint(-3, 9, indices.shape, generator=generator, dtype=torch.int32)
    others = 1 + torch.arange(width, dtype=torch.int32).expand(*shape, -1)
    kind = torch.randint(0, 3, shape, generator=generator)[..., None]
    return torch.where(kind == 0, nothing, torch.where(kind == 1, anything, others))


@pytest.mark.parametrize(
    ("init_blocks", "local_blocks"), [(0, 0), (1, 2), (2, 1), (1, 0), (0, 2), (3, 9)]
)
@pytest.mark.parametrize("case", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_promise_broken(backend, case, init_blocks, local_blocks):
    """What a query gets whose indices are not as promised is unspecified, but no NaN;
    other queries do not notice.
    """
    if case is LONG or (init_blocks, local_blocks) != (1, 2):
        on_a_gpu_only(backend)
    if case is LONG and (init_blocks, local_blocks) not in ((0, 0), (1, 2), (3, 9)):
        on_a_gpu_only(backend, "triton_kv_major")
    case, x, indices = selection(forced(case, init_blocks, local_blocks, 1), backend)
    broken = torch.arange(indices.shape[0]) % 3 == 1
    indices[broken] = garbage(indices[broken])
    do = output_gradient(case)
    found, expected = (run(name, case, x, indices, do) for name in (backend, "reference"))
    assert_results_close(backend, found, expected, names=("o", "lse", "dq"), rows=~broken)
    for name, result in zip(RESULTS, found, strict=True):
        assert not result.isnan().any(), name


@pytest.mark.parametrize("num_indices", [0, 1, 2])
@pytest.mark.parametrize("backend", backends_of("selected_attention"))
def test_more_promised_than_there_are_indices(backend, num_indices):
    case, x, indices = selection(forced(SHORT, 1, 2, 0), backend)
    do = output_gradient(case)
    for name, result in zip(
        RESULTS, run(backend, case, x, indices[..., :num_indices], do), strict=True
    ):
        assert not result.isnan().any(), name
