"""A layer that PyTorch's `parallelize_module` splits over two and four processes: its outputs,
gradients and decoded tokens are those of one process."""

import copy
import sys

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from nsa_fsa.cache import NSACache
from nsa_fsa.distributed.tensor_parallel import tensor_parallel_plan
from tests.distributed.processes import on_ranks, printed_by, say
from tests.modules.layers import VARIANTS, make_variant, randn

HEADS = dict(num_heads=8, num_kv_heads=4)
CASES = [name for name in VARIANTS if name != "own-modules"]
ON_FOUR = ["default", "mean-linear"]


@pytest.mark.slow
def test_equals_one_process(tmp_path):
    printed = printed_by("tests.distributed.test_tensor_parallel", "compare", tmp_path)
    expected = [f"2 {name}" for name in CASES] + [f"4 {name}" for name in ON_FOUR]
    assert printed == expected


def test_what_cannot_be_split_is_refused(tmp_path):
    printed = printed_by("tests.distributed.test_tensor_parallel", "refuse", tmp_path)
    of_heads, of_own = printed
    assert "2 ranks of tensor parallelism do not divide the 3 KV heads" in of_heads
    assert "FirstPlusTanhOfLast, cannot be split by KV heads. Fix: no tensor" in of_own


@pytest.mark.parametrize(
    ("name", "features"), [("q_proj", 16), ("q_proj", 24), ("k_proj", 8), ("v_proj", 0)]
)
def test_projections_that_are_no_equal_parts_are_refused(name, features):
    layer = make_variant("default")
    setattr(layer, name, torch.nn.Linear(24, features, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the projections return .*need 32, 16, 16.*Fix: "):
        layer(randn(1, 20, 24))


# --- In each of the processes ---------------------------------------------------------------------


def split(layer):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return parallelize_module(layer, mesh, tensor_parallel_plan(layer))


def compare():
    size = distributed.get_world_size()
    for name in CASES if size == 2 else ON_FOUR:
        whole = make_variant(name, **HEADS)
        layer = split(copy.deepcopy(whole))
        x, do = randn(2, 48, 24, seed=1), randn(2, 48, 24, seed=2)
        o, gradients = outcome(layer, x, do)
        expected, expected_gradients = outcome(whole, x, do)
        assert_close(o, expected, expected.abs().max(), "o")
        largest = max(y.abs().max() for y in expected_gradients.values())
        for part, y in expected_gradients.items():
            assert_close(gradients[part], y, largest, part)
        assert_close(written(layer, x), written(whole, x), expected.abs().max(), "decoded")
        say(size, name)


def outcome(layer, x, do):
    """The output, and the gradients of x and of the parameters, as wholes."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    o = layer(x)
    o.backward(do)
    found = {name: y.grad for name, y in layer.named_parameters()}
    found = {k: y.full_tensor() if hasattr(y, "full_tensor") else y for k, y in found.items()}
    return o.detach(), found | dict(x=x.grad)


@torch.no_grad()
def written(layer, x):
    """A prompt, and then token by token."""
    cache = NSACache(layer.config)
    return torch.cat([layer(part, cache=cache) for part in x.split((40, 1, 1, 6), dim=1)], dim=1)


def assert_close(actual, expected, largest, what):
    error = (actual - expected).abs().max() / largest
    assert error < 1e-12, f"{what}: {error}"


def refuse():
    three = make_variant("default", num_heads=6, num_kv_heads=3)
    for layer in (three, make_variant("own-modules")):
        before = [*layer.parameters()]
        with pytest.raises(ValueError, match=r"Fix: ") as error:
            split(layer)
        assert all(x is y for x, y in zip(layer.parameters(), before, strict=True))
        say(error.value)


if __name__ == "__main__":
    for size in (2, 4) if sys.argv[1] == "compare" else (2,):
        on_ranks(globals()[sys.argv[1]], size, sys.argv[2])
