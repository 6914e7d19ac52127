"""Every way to run a problem that the profiler may choose computes the same."""

import dataclasses
import json

import pytest
import torch

from tests.cases import RESULTS
from tests.on_gpu import assert_rms_close
from tests.ops.selected_attention.problems import BACKENDS, make_problem

pytestmark = pytest.mark.gpu

# Group size, head width, block size.
SHAPES = [(4, 128, 64), (12, 128, 64), (3, 64, 128), (3, 80, 32)]


def problem(group_size, head_dim, block_size):
    return make_problem(
        (1500, 0, 700), 2, group_size, head_dim=head_dim, block_size=block_size, num_indices=6
    )


def exact(p):
    """RESULTS of the reference in float64."""
    wide = {name: getattr(p, name).detach().double() for name in ("q", "k", "v", "do")}
    for name in ("q", "k", "v"):
        wide[name].requires_grad_()
    return dataclasses.replace(p, **wide).run("reference")


def check(what, found, expected, dtype=torch.bfloat16):
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        assert_rms_close(f"{name}, {what}", a, b, dtype)


@pytest.mark.parametrize(("group_size", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_candidates(direction, group_size, head_dim, block_size, monkeypatch):
    from nsa_fsa.ops.common import tuning

    p = problem(group_size, head_dim, block_size)
    expected = exact(p)
    for name, config in tuning.candidates(p.q, p.v, block_size, direction).items():
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "default_config", lambda *_, config=config: config)
            check(name, p.run("triton_kv_major"), expected)


@pytest.mark.parametrize("cramped", [False, True], ids=["", "99_kib"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_plain_tiles(head_dim, block_size, dtype, cramped, monkeypatch):
    """Every tile of the plain kernels that tuning chooses on some GPU, on this one.

    With one stage dq was wrong on an H200 with Triton 3.6, of which no compiler said anything:
    whether a tile that nobody ran on a GPU of this kind and with this Triton computes what it
    should only a run can tell.
    """
    from nsa_fsa.ops.common import tuning

    if cramped and head_dim <= 128:
        pytest.skip("these tiles do not depend on the shared memory")
    p = make_problem(
        (1500, 0, 700), 2, 4, head_dim=head_dim, dtype=dtype, block_size=block_size, num_indices=6
    )
    expected = exact(p)
    monkeypatch.setattr(tuning, "is_cramped", lambda x: cramped)
    config = tuning.plain_config.__wrapped__(p.q, p.v, block_size)
    monkeypatch.setattr(tuning, "default_config", lambda *_: config)
    monkeypatch.setattr(tuning, "plain_config", lambda *_: config)
    for backend in BACKENDS:
        check(backend, p.run(backend), expected, dtype)


def test_the_profiler_chooses_once(monkeypatch, tmp_path):
    """Times the candidates, keeps the choice in its file, and does not ask again."""
    from nsa_fsa.ops.common import profiler

    monkeypatch.setenv("NSA_FSA_PROFILE", "1")
    monkeypatch.setenv("NSA_FSA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(profiler, "_KNOWN", {})
    p = problem(*SHAPES[0])
    check("profiled", p.run("triton"), exact(p))
    files = {file: file.read_text() for file in tmp_path.glob("*/*.json")}
    found = [json.loads(text) for text in files.values()]
    assert sorted(entry["key"].split()[1] for entry in found) == ["backward", "forward"]
    for entry in found:
        # Some may need what this GPU lacks.
        assert sum(ms is not None for ms in entry["ms"].values()) > 1, entry
    for name, a, b in zip(RESULTS, p.run("auto"), p.run("triton"), strict=True):
        assert torch.equal(a, b), f"{name}: auto is not triton"
    assert {file: file.read_text() for file in tmp_path.glob("*/*.json")} == files, (
        "it was timed again"
    )
