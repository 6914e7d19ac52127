"""What backend="auto" takes on GPUs that are not here, by tensors without memory and what a GPU would say of itself."""

import warnings

import pytest
import torch

from nsa_fsa.ops.common import backends, triton_backends
from nsa_fsa.ops.selected_attention.operator import wants_index

LAYOUT = dict(cu_seqlens_q=None, seqused_k=None, scale=0.1)
H100, T4 = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def gpus(monkeypatch):
    """One GPU that Triton compiles for and one that is too old, in one process."""
    capabilities = {H100: (9, 0), T4: (7, 5)}
    monkeypatch.setattr(triton_backends, "_missing", lambda: None)
    monkeypatch.setattr(triton_backends, "interpreted", lambda: False)
    monkeypatch.setattr(triton_backends, "capability", capabilities.__getitem__)
    monkeypatch.setattr(backends, "_WARNED", set())


class Elsewhere(torch.Tensor):
    """Says that it is on a device, which need not be here, and has no memory there."""

    @staticmethod
    def __new__(cls, *shape, dtype, device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was to be computed, and this is about what would be")


def calls(device, dtype=torch.float16):
    """Tensors and arguments of each attention operator."""
    q, k = (Elsewhere(100, heads, 64, dtype=dtype, device=device) for heads in (4, 2))
    indices = Elsewhere(100, 2, 4, dtype=torch.int32, device=device)
    return {
        "compressed_attention": ((q, k, k), dict(LAYOUT, kernel_size=32, kernel_stride=16)),
        "selected_attention": ((q, k, k), dict(LAYOUT, block_indices=indices, block_size=64, init_blocks=0, local_blocks=0)),
        "sliding_window_attention": ((q, k, k), dict(LAYOUT, window_size=4)),
    }


def indexed(device, backend, dtype=torch.float16):
    (q, k, v), arguments = calls(device, dtype)["selected_attention"]
    return wants_index(q, k, v, arguments["block_indices"], 64, 0.1, None, None, backend)


@pytest.mark.usefixtures("gpus")
def test_every_gpu_is_asked_itself():
    for operator in calls(T4):
        for device, ours in ((H100, True), (T4, False), (H100, True)):
            tensors, arguments = calls(device)[operator]
            found = backends.resolve(operator, "auto", *tensors, **arguments).name
            assert (found != "reference") == ours, (operator, device, found)
    (reason, *_) = backends.passed_over("selected_attention", *calls(T4)["selected_attention"][0], **arguments).values()
    assert reason == "it needs compute capability 8.0 or newer, and this GPU has 7.5"
    with pytest.raises(RuntimeError, match=r"backend='triton' .*cannot run here.*this GPU has 7\.5.*Fix"):
        backends.resolve("selected_attention", "triton", *calls(T4)["selected_attention"][0])


@pytest.mark.usefixtures("gpus")
def test_an_index_is_made_for_those_who_read_it():
    assert {name for name in ("auto", *backends.available("selected_attention")) if indexed(H100, name)} == {
        "auto",
        "triton",
        "triton_kv_major",
    }
    assert not any(indexed(T4, name) for name in ("auto", "reference"))
    assert not indexed(H100, "auto", torch.float64)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("operator", calls("cpu"))
def test_a_gpu_left_to_the_reference_is_told_once(operator):
    tensors, arguments = calls(H100, torch.float64)[operator]

    def run(name="auto", backward=False):
        return backends.to_run(operator, name, *tensors, backward=backward, **arguments).name

    message = rf"{operator} runs on a GPU as the reference.*slow: .*float64.*Fix: .*backend=\"reference\""
    with pytest.warns(UserWarning, match=message):
        assert run() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
        run(backward=True)
        run("reference")
        tensors, arguments = calls(H100)[operator]
        assert run() != "reference"
        tensors, arguments = calls("cpu")[operator]
        assert run() == "reference"
    tensors, arguments = calls(T4)[operator]
    with pytest.warns(UserWarning, match=rf"{operator} runs .*this GPU has 7\.5"):
        run()


def test_a_backend_of_ones_own_needs_no_reason(monkeypatch):
    """The defaults of `Backend`: it runs wherever its tensors are."""
    own = backends.Backend("own", forward=None)
    monkeypatch.setitem(backends._BACKENDS, "gated_combine", {"own": own, **backends._BACKENDS["gated_combine"]})
    assert backends.available("gated_combine")["own"] is None
    assert backends.resolve("gated_combine", "auto", torch.empty(1), torch.empty(1)).name == "own"


def test_tensors_on_a_cpu_ask_no_gpu(monkeypatch):
    """Asking would start CUDA."""

    def asked(*_):
        raise AssertionError("a GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_device", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(triton_backends, "_missing", lambda: None)
    monkeypatch.setattr(triton_backends, "interpreted", lambda: False)
    for operator, (tensors, arguments) in calls(torch.device("cpu")).items():
        assert backends.resolve(operator, "auto", *tensors, **arguments).name == "reference"
        *_, of_triton = backends.passed_over(operator, *tensors, **arguments).values()
        assert of_triton == "the tensors are on cpu"
