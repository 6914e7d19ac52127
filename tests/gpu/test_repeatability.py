"""Row 9 of reliability.md: the same bits in every run, in company and alone."""

import pytest
import torch

from tests.gpu.problems import BACKENDS, RESULTS, make_problem

pytestmark = pytest.mark.gpu

LENGTHS = (1000, 37, 0, 3000, 64)
# 128 takes the kernels written for Hopper where they can run, 96 the plain ones.
SHAPES = [(1, 128), (4, 128), (6, 96)]


def problem(group_size, head_dim):
    return make_problem(LENGTHS, 2, group_size, head_dim=head_dim)


def assert_same_bits(found, expected, what):
    for name, a, b in zip(RESULTS, found, expected, strict=False):
        assert torch.equal(a, b), f"{name}, {what}: {(a != b).sum()} of {a.numel()} differ"


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward(backend, group_size, head_dim):
    p = problem(group_size, head_dim)
    with torch.no_grad():
        first = p.forward(backend)
        for run in range(1, 100):
            assert_same_bits(p.forward(backend), first, f"run {run}")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("workspace_bytes", [2**22, 2**31], ids=["ranges", "at_once"])
@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward(backend, group_size, head_dim, workspace_bytes):
    p = problem(group_size, head_dim)
    first = p.run(backend, workspace_bytes=workspace_bytes)
    for run in range(1, 20):
        assert_same_bits(p.run(backend, workspace_bytes=workspace_bytes), first, f"run {run}")


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_alone_and_among_others(backend, group_size, head_dim):
    p = problem(group_size, head_dim)
    with torch.no_grad():
        packed = p.forward(backend)
        for b, length in enumerate(LENGTHS):
            start = sum(LENGTHS[:b])
            assert_same_bits(
                p.alone(b).forward(backend),
                [x[start : start + length] for x in packed],
                f"sequence {b} of {length} tokens",
            )
