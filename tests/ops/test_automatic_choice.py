"""What backend="auto" takes on GPUs that are not here, by tensors without memory and what a GPU
would say of itself.
"""

import warnings

import pytest
import torch

from nsa_fsa.ops.common import triton_backends
from nsa_fsa.ops.common.backends import Backend
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks, Windows
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.gated_combine.operator import GatedCall
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.operator import wants_index
from nsa_fsa.sequences import Sequences
from tests.cases import BACKENDS, prefer

H100, T4 = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def gpus(monkeypatch):
    """One GPU that Triton compiles for and one that is too old, in one process."""
    capabilities = {H100: (9, 0), T4: (7, 5)}
    monkeypatch.setattr(triton_backends, "_missing", lambda: None)
    monkeypatch.setattr(triton_backends, "interpreted", lambda: False)
    monkeypatch.setattr(triton_backends, "capability", capabilities.__getitem__)
    for operator in BACKENDS.values():
        monkeypatch.setattr(operator, "_warned", set())


class Elsewhere(torch.Tensor):
    """Says that it is on a device, which need not be here, and has no memory there."""

    @staticmethod
    def __new__(cls, *shape, dtype, device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was to be computed, and this is about what would be")


def calls(device, dtype=torch.float16, backend="auto"):
    """A call of each attention operator."""
    q, k = (Elsewhere(100, heads, 64, dtype=dtype, device=device) for heads in (4, 2))
    indices = Elsewhere(100, 2, 4, dtype=torch.int32, device=device)
    starts = Elsewhere(2, dtype=torch.int32, device=device)
    shared = (q, k, k, Sequences(starts, 100), 0.1, WORKSPACE_BYTES, backend)
    return {
        "compressed_attention": WindowedCall(*shared, Windows(32, 16), None),
        "selected_attention": SelectedCall(*shared, Blocks(64, 0, 0), indices, None, None),
        "sliding_window_attention": WindowedCall(*shared, Windows(1, 1), 4),
    }


def indexed(device, backend, dtype=torch.float16):
    return wants_index(calls(device, dtype, backend)["selected_attention"])


@pytest.mark.usefixtures("gpus")
def test_every_gpu_is_asked_itself():
    for operator in calls(T4):
        for device, ours in ((H100, True), (T4, False), (H100, True)):
            found = BACKENDS[operator].choose(calls(device)[operator], warn=False).name
            assert (found != "reference") == ours, (operator, device, found)
    (reason, *_) = (
        BACKENDS["selected_attention"].passed_over(calls(T4)["selected_attention"]).values()
    )
    assert reason == "it needs compute capability 8.0 or newer, and this GPU has 7.5"
    with pytest.raises(
        RuntimeError, match=r"backend='triton' .*cannot run here.*this GPU has 7\.5.*Fix"
    ):
        BACKENDS["selected_attention"].choose(calls(T4, backend="triton")["selected_attention"])


@pytest.mark.usefixtures("gpus")
def test_an_index_is_made_for_those_who_read_it():
    assert {
        name for name in ("auto", *BACKENDS["selected_attention"].by_name) if indexed(H100, name)
    } == {"auto", "triton", "triton_kv_major"}
    assert not any(indexed(T4, name) for name in ("auto", "reference"))
    assert not indexed(H100, "auto", torch.float64)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("operator", calls("cpu"))
def test_a_gpu_left_to_the_reference_is_told_once(operator):
    def run(device=H100, dtype=torch.float64, name="auto", backward=False):
        return (
            BACKENDS[operator].choose(calls(device, dtype, name)[operator], backward=backward).name
        )

    message = (
        rf"{operator} runs on a GPU as the reference.*slow: .*float64.*Fix: .*backend=\"reference\""
    )
    with pytest.warns(UserWarning, match=message):
        assert run() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
        run(backward=True)
        run(name="reference")
        assert run(dtype=torch.float16) != "reference"
        assert run("cpu", torch.float16) == "reference"
    with pytest.warns(UserWarning, match=rf"{operator} runs .*this GPU has 7\.5"):
        run(T4, torch.float16)


def test_a_backend_of_ones_own_needs_no_reason(monkeypatch):
    """What `Backend` says by default: it runs wherever its tensors are."""

    class Own(Backend):
        name = "own"

        def forward(self, call):
            return call.o_cmp

    prefer(monkeypatch, "gated_combine", Own())
    assert BACKENDS["gated_combine"].available()["own"] is None
    x = torch.empty(1, 1, 3)
    assert BACKENDS["gated_combine"].choose(GatedCall(x, x, x, x, "auto")).name == "own"


def test_tensors_on_a_cpu_ask_no_gpu(monkeypatch):
    """Asking would start CUDA."""

    def asked(*_):
        raise AssertionError("a GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_device", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(triton_backends, "_missing", lambda: None)
    monkeypatch.setattr(triton_backends, "interpreted", lambda: False)
    for operator, call in calls(torch.device("cpu")).items():
        assert BACKENDS[operator].choose(call).name == "reference"
        *_, of_triton = BACKENDS[operator].passed_over(call).values()
        assert of_triton == "the tensors are on cpu"
