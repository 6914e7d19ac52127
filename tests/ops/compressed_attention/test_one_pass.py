"""The backward of compressed attention in one pass, at lengths that take two by default."""

import dataclasses

import pytest
import torch

from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.windowed_attention import backward
from tests.on_gpu import (
    MIB,
    assert_no_growth,
    assert_rms_close,
    extra,
    num_bytes,
    record,
    syncs_forbidden,
)
from tests.ops.compressed_attention.test_gpu import (
    CACHED,
    LENGTHS,
    assert_same_bits,
    check,
    check_nan_stays,
    make,
)

pytestmark = pytest.mark.gpu

SHAPES = [(g, d, d) for d in (64, 128) for g in (1, 4, 16, 64)]
FEW = [(1, 128, 128), (8, 64, 64)]
NAMES = ("o", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """One pass at any length, and its rows in parts of few; counts its launches."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its kernel is written for Hopper")
    choose, run, found = tuning.compressed_config, backward.run_dkdv, []

    def always(*arguments):
        return dataclasses.replace(choose(*arguments), one_pass_tokens=0, one_pass_part_rows=4096)

    def count(inputs, dk, dv, dq_sums=None):
        found.append(dq_sums is not None)
        run(inputs, dk, dv, dq_sums)

    monkeypatch.setattr(tuning, "compressed_config", always)
    monkeypatch.setattr(backward, "run_dkdv", count)
    return found


@pytest.mark.parametrize(
    "lengths",
    [(2500,), (64 + 31,), (1500, 0, 37, 2000, 31, 300, 33)],
    ids=["one", "whole_tiles", "packed"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(launches, dtype, shape, lengths):
    check(make(lengths, 2, *shape, dtype=dtype))
    assert launches == [True]


@pytest.mark.parametrize(
    "windows", [(16, 16), (64, 16), (64, 64), (12, 4), (2, 1), (1, 1)], ids=str
)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_windows(shape, windows):
    check(make((1500, 0, 37, 2000, 31, 300), 1, *shape, windows=windows))


@pytest.mark.parametrize("num_kv_heads", [1, 3, 24])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_any_number_of_heads(shape, num_kv_heads):
    check(make((1500, 0, 700), num_kv_heads, *shape))


@pytest.mark.parametrize(("lengths", "num_queries", "used"), CACHED, ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_last_queries(shape, lengths, num_queries, used):
    check(make(lengths, 2, *shape, num_queries=num_queries, used=used))


@pytest.mark.parametrize("num_kv_heads", [3, 8])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_heads_in_turn(launches, shape, num_kv_heads):
    """With room for two KV heads."""
    p = make((1500, 0, 700), num_kv_heads, *shape)
    group_size, head_dim, v_dim = shape
    parts = -(-max(p.lengths) * group_size // 4096)
    of_parts = parts * p.k_cmp.shape[0] * (head_dim + v_dim) if parts > 1 else 0
    check(
        dataclasses.replace(
            p, workspace_bytes=2 * 4 * (sum(p.lengths) * group_size * head_dim + of_parts)
        )
    )
    assert launches == [True] * -(-num_kv_heads // 2)


@pytest.mark.parametrize("shape", [(3, 128, 128), (5, 64, 64), (4, 96, 96)], ids=str)
def test_what_takes_two_passes(launches, shape):
    """Groups that do not fill tiles, and widths without a kernel for Hopper."""
    check(make(LENGTHS, 2, *shape))
    assert launches == [False]


@pytest.mark.usefixtures("deterministic_only")
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_deterministic_algorithms(launches, shape):
    p = make(LENGTHS, 2, *shape)
    first, second = p.run(), p.run()
    assert launches == [False] * 2
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("spoiled", range(len(LENGTHS)))
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_nan_stays_in_its_sequence(shape, spoiled):
    def assert_close(found, expected, name, names):
        # Of the forward, whose bits do not depend on the order of additions; lse may be -inf.
        if name in ("o", "lse"):
            assert_same_bits(found, expected, name, names)
        else:
            assert_rms_close(name, torch.cat(found), torch.cat(expected))

    check_nan_stays(make(LENGTHS, 2, *shape), spoiled, assert_close)


def test_no_host_syncs():
    problems = [make(lengths, 2, 4, 128) for lengths in ((1000,), LENGTHS)]
    for p in problems:
        p.run()
    with syncs_forbidden():
        for p in problems:
            p.run()


def test_cuda_graph():
    p, other = make(LENGTHS, 2, 4, 128), make(LENGTHS, 2, 4, 128, seed=1)
    graph, recorded = record(p.run)
    with torch.no_grad():
        for name in ("q", "k_cmp", "v_cmp", "do"):
            getattr(p, name).copy_(getattr(other, name))
    graph.replay()
    for name, a, b in zip(NAMES, recorded, other.run(), strict=True):
        if name != "lse":
            assert_rms_close(name, a, b)


def test_no_growth_over_50_steps():
    assert_no_growth(make((1000, 3000), 2, 4, 128).run)


@pytest.mark.parametrize("shape", FEW, ids=str)
def test_peak(shape):
    """Beside the gradients and statistics of 8 bytes a query head, sums within the workspace:
    of two KV heads, or of one.
    """
    p = dataclasses.replace(
        make((20_000, 0, 12_768), 8, *shape), workspace_bytes=shape[0] * 8 * MIB + 56 * MIB
    )
    p.run()  # loads the kernels
    o, _ = p.forward()
    grads, peak = extra(lambda: torch.autograd.grad(o, p.leaves(), p.do))
    allowed = num_bytes(*grads) + 8 * p.q.shape[0] * p.q.shape[1] + p.workspace_bytes + 4 * MIB
    assert peak <= allowed, f"{peak / MIB:.1f} MiB, allowed are {allowed / MIB:.1f}"
