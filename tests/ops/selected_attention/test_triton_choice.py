"""backend="triton" runs what the profiler finds fastest: kernels that the other tests know by
their own names.
"""

import pytest
import torch

from nsa_fsa import NativeSparseAttention, NSAConfig, explain
from tests.cases import (
    BACKENDS,
    DIFFERENTIABLE,
    by_name,
    call,
    case_for,
    device_of,
    gradients,
    make_inputs,
)

pytestmark = pytest.mark.skipif(
    BACKENDS["selected_attention"].available()["triton"] is not None,
    reason=str(BACKENDS["selected_attention"].available()["triton"]),
)
CASE = by_name("five")


@pytest.fixture(autouse=True)
def profiler_off(monkeypatch):
    """Then the default runs: KV-major, where it can."""
    monkeypatch.setenv("NSA_FSA_PROFILE", "0")


def test_default_is_kv_major():
    case = case_for("selected_attention", "triton_kv_major", CASE, calls=2)
    results = []
    x = make_inputs(case, device=device_of("triton"), requires_grad=True)
    do = torch.randn_like(x.o_slc)
    for backend in ("triton", "triton_kv_major"):
        o, lse = call("selected_attention", case, x, backend)
        results.append(
            dict(
                zip(
                    ("o", "lse", *DIFFERENTIABLE["selected_attention"]),
                    (o, lse, *gradients("selected_attention", o, x, do)),
                    strict=True,
                )
            )
        )
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_decoding_is_query_major_and_has_no_gradient():
    case = case_for("selected_attention", "triton_query_major", CASE)
    x = make_inputs(case, device=device_of("triton"), requires_grad=True)
    used = torch.tensor(case.lengths, dtype=torch.int32, device=x.q.device)
    o, lse = call("selected_attention", case, x, "triton", seqused_k=used)
    for a, b in zip(
        (o, lse),
        call("selected_attention", case, x, "triton_query_major", seqused_k=used),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_on_a_cpu_nothing_chooses_triton():
    """Its interpreter is for tests; a user who does not ask for it gets the reference."""
    x = make_inputs(CASE)
    assert torch.equal(
        call("selected_attention", CASE, x, "auto")[0],
        call("selected_attention", CASE, x, "reference")[0],
    )


def test_a_layer_takes_the_name_of_one_operators_backend():
    """The selected branch has two Triton backends, the others one or none:
    these choose for themselves.
    """
    config = NSAConfig.from_dict(
        dict(
            preset="tiny",
            hidden_size=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            backend="triton_kv_major",
        )
    )
    chosen = {
        choice.operator: choice.backend
        for choice in explain(config, 40, dtype=torch.float32).choices
    }
    assert chosen.pop("selected_attention") == "triton_kv_major"
    assert "triton_kv_major" not in chosen.values()
    device = device_of("triton_kv_major")
    attn = NativeSparseAttention(config, device=device)
    assert attn(torch.randn(1, 40, 64, device=device)).shape == (1, 40, 64)
