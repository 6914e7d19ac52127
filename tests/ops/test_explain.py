"""`nsa_fsa.explain`: what it says is what runs."""

import torch

import nsa_fsa
from nsa_fsa import NSAConfig
from nsa_fsa.ops import backends

CONFIG = NSAConfig(hidden_size=256, num_heads=4, num_kv_heads=2)


def choice(found, operator="selected_attention"):
    return next(c for c in found.choices if c.operator == operator)


def test_on_a_cpu_the_reference_runs_and_every_backend_before_it_says_why_not():
    found = choice(nsa_fsa.explain(CONFIG, 1024, device="cpu"))
    assert found.backend == "reference"
    assert list(found.passed_over) == [name for name in backends.available("selected_attention") if name != "reference"]
    assert all(found.passed_over.values())
    assert found.passed_over["triton"] in str(found)


def test_every_operator_is_explained():
    text = str(nsa_fsa.explain(CONFIG, 1024, device="cpu"))
    for operator in (
        "compressed_attention",
        "select_blocks",
        "selected_attention",
        "sliding_window_attention",
        "gated_combine",
    ):
        assert operator in text


def test_a_backend_asked_for_by_name():
    config = NSAConfig(hidden_size=256, num_heads=4, num_kv_heads=2, backend="reference")
    found = choice(nsa_fsa.explain(config, 1024, device="cpu"))
    assert found.backend == "reference"
    assert "asked for" in found.why


def test_nothing_is_allocated():
    """A million tokens of 64 heads would be 16 GiB."""
    config = NSAConfig(hidden_size=8192, num_heads=64, num_kv_heads=4)
    assert choice(nsa_fsa.explain(config, 1 << 20, device="cpu", dtype=torch.float16)).backend == "reference"
