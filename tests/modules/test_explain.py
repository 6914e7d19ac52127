"""`nsa_fsa.explain`: what it says is what runs."""

import dataclasses

import pytest
import torch

import nsa_fsa
from nsa_fsa import NSAConfig
from nsa_fsa.decode import operator as decoding
from nsa_fsa.ops.common import triton_backends
from nsa_fsa.ops.sliding_window_attention import flash_attention
from tests.cases import BACKENDS, CORE

CONFIG = NSAConfig(hidden_size=256, num_heads=4, num_kv_heads=2)
DECODING = ("append_tokens", "nsa_decode")
OPERATORS = ("pool_windows", *CORE, *DECODING)
WITH_TRITON = tuple(operator for operator in OPERATORS if operator != "sliding_window_attention")
SEES_KEYS = tuple(operator for operator in WITH_TRITON if operator != "gated_combine")
needs_triton = pytest.mark.skipif(
    triton_backends.unavailable() is not None,
    reason=f"what the kernels refuse: {triton_backends.unavailable()}",
)


ALL_BACKENDS = BACKENDS | {x.operator: x for x in (decoding.APPEND_BACKENDS, decoding.BACKENDS)}


def choice(found, operator="selected_attention"):
    return next(c for c in found.choices if c.operator == operator)


@pytest.mark.parametrize("operator", OPERATORS)
def test_on_a_cpu_the_reference_runs_and_every_backend_before_it_says_why_not(operator):
    found = choice(nsa_fsa.explain(CONFIG, 1024, device="cpu"), operator)
    assert found.backend == "reference"
    assert list(found.passed_over) == [
        name for name in ALL_BACKENDS[operator].by_name if name != "reference"
    ]
    assert all(found.passed_over.values())
    for reason in found.passed_over.values():
        assert reason in str(found)


def test_every_operator_is_explained():
    found = nsa_fsa.explain(CONFIG, 1024, device="cpu")
    assert tuple(c.operator for c in found.choices) == OPERATORS
    for operator in OPERATORS:
        assert operator in str(found)


@pytest.mark.parametrize("num_tokens", [1024, 100], ids=["longer", "no longer"])
def test_full_attention_of_dense_queries(num_tokens):
    """Beside the core, or in its place where it does not run."""
    config = dataclasses.replace(CONFIG, dense_below=100)
    *others, dense, _, _ = nsa_fsa.explain(config, num_tokens, device="cpu").choices
    core = OPERATORS[1:-2] if num_tokens > 100 else ()
    assert tuple(c.operator for c in others) == ("pool_windows", *core)
    assert (dense.operator, dense.backend) == ("sliding_window_attention", "reference")
    which = "of the queries at positions below dense_below=100, over all keys"
    assert dense.why == f"{which}; the first that can run this"
    assert which in nsa_fsa.explain(config, num_tokens, gpu="h100").choices[-3].why


@pytest.mark.parametrize("change", [dict(compress_v="mlp"), dict(kv_per_branch=True)], ids=str)
def test_steps_that_go_the_way_of_training_have_no_operators(change):
    found = nsa_fsa.explain(dataclasses.replace(CONFIG, **change), 1024, device="cpu")
    assert "gated_combine" in str(found)
    assert "decode" not in str(found)


@pytest.mark.parametrize(
    ("compress_k", "compress_v", "expected"),
    [
        ("mean", "weighted", ("pool_windows",)),
        ("mlp", "linear", ("gather_windows",)),
        ("mean", "gated", ("pool_windows", "gather_windows")),
    ],
)
def test_compression_as_the_layer_does_it(compress_k, compress_v, expected):
    config = dataclasses.replace(CONFIG, compress_k=compress_k, compress_v=compress_v)
    found = nsa_fsa.explain(config, 1024, device="cpu")
    assert tuple(c.operator for c in found.choices if c.operator.endswith("_windows")) == expected


# What the kernels refuse of a config or a dtype, and by which operators:
# each is asked with its own arguments.
REFUSED = [
    (dict(), torch.float64, "has dtype torch.float64", WITH_TRITON),
    (dict(head_dim=272), torch.float16, "272", SEES_KEYS),  # the gates see values only
    (
        dict(v_head_dim=272),
        torch.float16,
        "272",
        tuple(x for x in WITH_TRITON if x != "select_blocks"),
    ),
    (dict(block_size=48), torch.float16, "block_size=48", ("selected_attention",)),
    (dict(num_selected_blocks=65), torch.float16, "num_selected_blocks=65", ("select_blocks",)),
    (dict(num_selected_blocks=129), torch.float16, "129", ("select_blocks", "selected_attention")),
    (dict(num_heads=130), torch.float16, "65 query heads", ("compressed_attention", "nsa_decode")),
]


@needs_triton
@pytest.mark.parametrize(
    ("changes", "dtype", "reason", "operators"), REFUSED, ids=[reason for *_, reason, _ in REFUSED]
)
def test_what_the_kernels_refuse_is_said_by_the_operators_that_refuse_it(
    changes, dtype, reason, operators
):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = nsa_fsa.explain(
        dataclasses.replace(CONFIG, **changes), 1024, device=device, dtype=dtype
    )
    refusing = [c.operator for c in found.choices if reason in c.passed_over.get("triton", "")]
    assert tuple(refusing) == operators
    for operator in WITH_TRITON:
        chosen = choice(found, operator)
        if operator in operators:
            assert chosen.backend == "reference"
        elif device == "cuda":
            assert chosen.backend == "triton"
        else:  # the interpreter could, and is passed over for that alone
            assert chosen.passed_over["triton"] == "the tensors are on cpu"


@pytest.mark.gpu
def test_on_a_gpu_triton_runs():
    found = nsa_fsa.explain(CONFIG, 1024)
    assert {c.operator for c in found.choices if c.backend == "triton"} == set(WITH_TRITON)
    window = choice(found, "sliding_window_attention")
    assert window.backend == "flash_attention"
    assert any(library.name in window.why for library in flash_attention.LIBRARIES)
    for operator in set(WITH_TRITON) - {"selected_attention", *DECODING}:
        assert choice(found, operator).why == "the first that can run this"
    assert choice(found).why.startswith("forward: ")


@needs_triton
@pytest.mark.parametrize(
    ("factor", "said"), [(0.0, ""), (2.5, "; neighbours that choose 40 blocks")]
)
def test_what_goes_by_unions(factor, said, monkeypatch):
    """Which is up to the GPU: as on one whose default this is."""
    from nsa_fsa.ops.common import tuning

    config = tuning.Config(union_factor=factor)
    monkeypatch.setattr(tuning, "default_config", lambda *_: config)
    layer = dataclasses.replace(CONFIG, num_selected_blocks=16, backend="triton")
    why = choice(nsa_fsa.explain(layer, 1024, dtype=torch.float16)).why
    assert said in why
    assert bool(said) == ("neighbours" in why)


@pytest.mark.parametrize("backend", ["auto", "flash_attention"])
@pytest.mark.parametrize(("gpu", "library"), [("h100", "flash_attn_4"), ("a100", "torch_flash")])
def test_which_flash_attention_runs_the_window(gpu, library, backend):
    """On a GPU that flash-attn 4 runs on, that depends on whether it is installed."""
    config = dataclasses.replace(CONFIG, backend=backend)
    found = choice(nsa_fsa.explain(config, 1024, gpu=gpu), "sliding_window_attention")
    assert found.backend == "flash_attention"
    missing = flash_attention.FLASH_ATTN_4.missing()
    if missing or library == "torch_flash":
        assert "torch_flash, the only one that can run this" in found.why
        reason = missing or "it needs compute capability 9.0 or newer, and this GPU has 8.0"
        assert found.passed_over == {"flash_attn_4": reason}
        assert f"not flash_attn_4: {reason}" in str(found)
    else:
        assert "forward: flash_attn_4" in found.why
        assert "backward: flash_attn_4" in found.why
        assert found.passed_over == {}
    assert ("was asked for" in found.why) == (backend != "auto")


def test_the_window_of_float32_is_for_a_triton_kernel():
    found = choice(
        nsa_fsa.explain(CONFIG, 1024, gpu="h100", dtype=torch.float32), "sliding_window_attention"
    )
    assert found.backend == "triton_window"
    assert "supported are float16 and bfloat16" in found.passed_over["flash_attention"]


def test_a_backend_asked_for_by_name():
    config = NSAConfig(hidden_size=256, num_heads=4, num_kv_heads=2, backend="reference")
    found = choice(nsa_fsa.explain(config, 1024, device="cpu"))
    assert found.backend == "reference"
    assert "asked for" in found.why


def test_nothing_is_allocated():
    """A million tokens of 64 heads would be 16 GiB."""
    config = NSAConfig(hidden_size=8192, num_heads=64, num_kv_heads=4)
    assert (
        choice(nsa_fsa.explain(config, 1 << 20, device="cpu", dtype=torch.float16)).backend
        == "reference"
    )


def test_a_models_config_is_told_the_way_to_one():
    """The fix that the message gives works as it stands, for a dense model and for a
    patched one.
    """
    transformers = pytest.importorskip("transformers")
    small = dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, vocab_size=64))
    with pytest.raises(
        ValueError,
        match=r"config is LlamaConfig; .*Fix: .*NSAConfig.from_pretrained_config\(model.config\)",
    ):
        nsa_fsa.explain(model.config, 1024)
    assert nsa_fsa.explain(NSAConfig.from_pretrained_config(model.config), 1024)
    nsa_fsa.patch_model(model, "tiny", verbose=False)
    assert nsa_fsa.explain(NSAConfig.from_pretrained_config(model.config), 1024)
