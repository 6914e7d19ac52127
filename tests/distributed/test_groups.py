"""Heads that ranks exchange in groups: the same numbers as all at once, and while a group is
computed, others are on their way."""

import sys
from collections import defaultdict
from itertools import groupby

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.collectives import _copy
from nsa_fsa.distributed.context_parallel import spans_of
from nsa_fsa.sequences import cu_seqlens_from_lengths
from nsa_fsa.visualization import record
from tests.distributed.processes import on_ranks, printed_by, say
from tests.distributed.test_layer import HEADS, outcome
from tests.modules.layers import make_variant, randn

PACKED = dict(cu_seqlens=cu_seqlens_from_lengths(torch.tensor([37, 3, 56])), max_seqlen=56)
# Of heads that are whole words of eight bytes, and of others.
KINDS = [(torch.bfloat16, 8), (torch.bfloat16, 6), (torch.float32, 5), (torch.float64, 3)]


@pytest.mark.slow
def test_groups_change_nothing(tmp_path):
    printed = printed_by("tests.distributed.test_groups", tmp_path)
    assert printed == [*(f"2 {x.__name__}" for x in CHECKS), "4 values"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="kernels need a GPU for either rank")
def test_groups_change_nothing_of_the_kernels(tmp_path):
    gpus = torch.cuda.is_available()
    printed = printed_by("tests.distributed.test_groups", tmp_path, "kernels", gpus=gpus)
    assert printed == ["2 kernels"]


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_a_number_of_groups_is_asked_for(one_rank, wrong):
    with pytest.raises(ValueError, match=r"groups="):
        ContextParallel(one_rank, groups=wrong)


@pytest.mark.parametrize(("dtype", "width"), KINDS)
def test_copies_are_of_words_where_heads_are(dtype, width):
    x = torch.arange(2 * 3 * 4 * width).view(2, 3, 4, width).to(dtype)
    with Log() as log:
        _copy(y := x.new_empty(4, 2, 3, width), x.movedim(2, 0))
    assert torch.equal(y, x.movedim(2, 0))
    words = width * dtype.itemsize % 8 == 0
    assert log.dtypes["copy_"] == {torch.int64 if words else dtype}


@pytest.mark.parametrize(
    ("shares", "spans"),
    [(4, [0] * 4), (2, [0, 1, 1, 0]), (4, [0, 0, 1, 1, 1, 1, 0, 0]), (1, [0, 1, 2])],
)
def test_spans_have_the_same_work(shares, spans):
    """A query has as much to do as there are keys before it. One share cannot be mirrored."""
    assert spans_of(shares, len(spans)) == tuple(spans)
    work = [sum(i for i, x in enumerate(spans) if x == span) for span in {*spans}]
    assert len({*work}) == 1 or shares == 1


# --- In each of the processes ---------------------------------------------------------------------


def shared(groups=1):
    return ContextParallel(distributed.group.WORLD, groups=groups)


def parts(dtype=torch.float64, width=8):
    """q, k, v and gate logits of this rank's tokens, two rows, and the gradient of the output; a
    rank has four KV heads."""
    cp = shared()
    heads = [8 * cp.size, 4 * cp.size, 4 * cp.size, 24 * cp.size, 8 * cp.size]
    shapes = [(2, 8 * cp.size, x, width) for x in heads]
    shapes[3] = shapes[3][:3]
    whole = (randn(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes))
    return [cp.part(x).clone().requires_grad_() for x in whole]


def attention(heads, runs, q, k, v, gate_logits):
    """Of each head by itself, where every output depends on all tokens before it."""
    seen = (k.cumsum(0) * v).repeat_interleave(2, dim=1)
    return q * seen * gate_logits.unflatten(1, (-1, 3)).sum(-1, keepdim=True)


def values():
    """Bit by bit those of one process."""
    for kind in KINDS:
        *tensors, do = parts(*kind)
        whole = [shared().gather(x).detach().requires_grad_() for x in tensors]
        expected = attention(None, None, *(x.flatten(0, 1) for x in whole)).unflatten(0, (2, -1))
        wanted = torch.autograd.grad(expected, whole, shared().gather(do))
        for groups in (1, 2, 4):
            o = shared(groups).attend(attention, *tensors)
            found = torch.autograd.grad(o, tensors, do)
            for x, y in zip((o, *found), (expected, *wanted), strict=True):
                assert torch.equal(x, shared().part(y)), (kind, groups)


NAMES = {"all_to_all_single": "send", "wait_tensor": "wait", "cumsum": "compute"}


class Log(TorchDispatchMode):
    """Writes down what is sent, waited for, and computed; and the dtypes of operations."""

    def __init__(self):
        super().__init__()
        self.lines, self.dtypes = [], defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.lines += [NAMES.get(name)]
        if args and isinstance(args[0], torch.Tensor):
            self.dtypes[name].add(args[0].dtype)
        return function(*args, **(kwargs or {}))

    def __str__(self):
        return ", ".join(f"{len([*x])} {name}" for name, x in groupby(filter(None, self.lines)))


def order():
    """Groups are sent before the first is computed, and what was computed before the next is;
    gradients the same way back."""
    *tensors, do = parts()
    with Log() as forward:
        o = shared(4).attend(attention, *tensors)
    with Log() as backward:
        torch.autograd.grad(o, tensors, do)
    assert str(forward) == "16 send, " + "4 wait, 1 compute, 1 send, " * 4 + "4 wait"
    assert str(backward) == "4 send, " + "1 wait, 1 compute, 4 send, " * 4 + "16 wait"


def anomalies():
    """Whoever looks at gradients between the steps finds them there."""
    *tensors, do = parts()
    torch.autograd.set_detect_anomaly(True)
    o = shared(2).attend(attention, *tensors)
    with Log() as backward:
        torch.autograd.grad(o, tensors, do)
    torch.autograd.set_detect_anomaly(False)
    at_once = "1 send, 1 wait, "
    assert str(backward).startswith(f"{at_once}1 send, 2 wait, 1 compute, {at_once}{at_once}")


def number():
    """One, or as many as are asked for, which divide a rank's four KV heads."""
    cp = ContextParallel(distributed.group.WORLD)
    assert (cp.groups, cp.possible_groups(8)) == (1, [1, 2, 4])
    *tensors, _ = parts()
    with pytest.raises(ValueError, match=r"groups=3 .* divide the 4 KV heads that .* 2 .* Fix: "):
        shared(3).attend(attention, *tensors)


def recorded():
    """One record of a forward."""
    layer, x = make_variant("default", **HEADS), shared().part(randn(1, 96, 24))
    with record(layer) as trace:
        layer(x, context_parallel=shared(2))
    assert [x.block_indices.shape[1] for x in trace] == [2]


def kernels():
    """Bit by bit, as no sum is over heads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = dict(HEADS, block_size=16, head_dim=16, window_size=20)
    layer = make_variant("default", **sizes, backend="triton").float().to(device)
    x, do = (shared().part(randn(1, 96, 24, seed=seed)).float().to(device) for seed in (1, 2))
    layout = {**PACKED, "cu_seqlens": PACKED["cu_seqlens"].to(device)}
    o, found = outcome(layer, x, do, context_parallel=shared(2), **layout)
    expected, wanted = outcome(layer, x, do, context_parallel=shared(1), **layout)
    for y, z in zip((o, *found), (expected, *wanted), strict=True):
        assert torch.equal(y, z)


CHECKS = (values, order, anomalies, number, recorded)


def compare(*checks):
    for check in checks:
        check()
        say(distributed.get_world_size(), check.__name__)


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    if names == ["kernels"]:
        on_ranks(compare, 2, folder, kernels)
    else:
        on_ranks(compare, 2, folder, *CHECKS)
        on_ranks(compare, 4, folder, values)
