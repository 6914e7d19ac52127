"""Tapes: that they give what the operator gives, when there is none,
and that no call plays another's.
"""

import dataclasses
import importlib
import weakref

import numpy as np
import pytest
import torch

from nsa_fsa.ops.common import calls, replay
from nsa_fsa.ops.common.replay import REFUSED, SEEN, opaque, replayed
from nsa_fsa.ops.common.windowed_attention import call as windowed
from nsa_fsa.sequences import Sequences
from tests.cases import (
    DIFFERENTIABLE,
    by_name,
    call,
    device_of,
    gradients,
    make_inputs,
    operators_and_backends,
    output,
)


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    """The tapes that a test makes, also on a CPU, where operators otherwise read values back
    to check them.
    """
    monkeypatch.setattr(replay, "TAPES", {})
    monkeypatch.setattr(replay, "applies", lambda x: True)
    monkeypatch.setattr(Sequences, "check_values", lambda *_: None)
    # as an attribute of its package it is the function.
    core = importlib.import_module("nsa_fsa.ops.nsa_attention")
    for module in (calls, windowed, core):
        monkeypatch.setattr(module, "check_compressed_values", lambda *_: None)
    return replay.TAPES


def run(operator, case, backend):
    x = make_inputs(case, device=device_of(backend), requires_grad=True)
    o = output(call(operator, case, x, backend))
    return [o, *gradients(operator, o, x, torch.randn_like(o))]


# The whole consists of all operators, which a GPU also repeats one by one;
# Triton's interpreter takes 20 s for one of them.
OPERATORS = (
    DIFFERENTIABLE
    if torch.cuda.is_available()
    else ("nsa_attention", "pool_windows", "gather_windows", "gated_combine")
)
TRITON = [pair for pair in operators_and_backends(*OPERATORS) if "triton" in pair.values[1]]


@pytest.mark.parametrize(("operator", "backend"), TRITON)
def test_a_tape_gives_what_the_operator_gives(operator, backend, tapes, monkeypatch):
    case = by_name("five")
    for seed in (0, 2, 4):  # all even: an odd one has other gates
        case = dataclasses.replace(case, seed=seed)
        torch.manual_seed(seed)
        found = run(operator, case, backend)
    assert len(tapes) >= 2
    assert all(map(callable, tapes.values()))

    monkeypatch.setattr(replay, "applies", lambda x: False)
    torch.manual_seed(seed)
    for x, expected in zip(found, run(operator, case, backend), strict=True):
        assert torch.isfinite(expected).all()
        if x.is_cuda:
            torch.testing.assert_close(x, expected)  # the order of some additions is free
        else:
            assert torch.equal(x, expected)


def play(function, *rows):
    """What a function returns for rows of one kind, of which the third and later
    ones are played.
    """
    return [replayed("a test", row, lambda row=row: function(*row)) for row in rows]


def pairs(number, *shape):
    return [(torch.randn(shape), torch.randn(shape)) for _ in range(number)]


def mixed(x, y):
    """Allocations, views, copies, calls with nested arguments and in-place ones,
    and tensors that are gone before the end.
    """
    for _ in range(3):
        torch.empty(0), torch.empty(5)
    scratch = x.new_empty(2, *x.shape)
    first, second = scratch
    first.copy_(x.T.contiguous().T)
    second.zero_()
    second[1:].add_(y[1:], alpha=2)
    total = torch.stack([first, second, x.contiguous()]).sum(0)
    values, order = total.flatten().sort()
    return total, values[: x.shape[0]].contiguous(), order.to(torch.int32)


def test_what_pytorch_does_is_repeated(tapes):
    rows = pairs(4, 3, 4)
    for row, found in zip(rows, play(mixed, *rows), strict=True):
        for x, expected in zip(found, mixed(*row), strict=True):
            assert torch.equal(x, expected)
    assert [callable(x) for x in tapes.values()] == [True]


def test_a_part_of_one_tensor_is_not_taken_for_another(tapes):
    """What begins where another one does may be that one, and the next time another."""

    def function(x, y):
        return x[4:] * 2 + y

    for number in range(3):
        x = torch.arange(8.0) + number
        play(function, (x, x[4:]))  # which begins at a multiple of 16 bytes, as y below does
    x, y = torch.arange(8.0), torch.randn(4)
    for found in play(function, *[(x, y)] * 4):
        assert torch.equal(found, function(x, y))
    assert [callable(tape) for tape in tapes.values()] == [True, True]


def test_results_are_new_each_time():
    rows = pairs(1, 3, 4) * 4
    found = play(mixed, *rows)
    assert len({x[0].data_ptr() for x in found}) == len(found)


def test_what_is_no_longer_needed_is_freed():
    made, alive = [], []

    def step(x):
        alive.append(sum(ref() is not None for ref in made))
        y = x + 1
        made.append(weakref.ref(y))
        return y

    def function(x, _):
        for _ in range(5):
            x = opaque(step, x)
        return x

    play(function, *pairs(2, 3))
    replayed("a test", row := pairs(1, 3)[0], lambda: function(*row))
    made.clear(), alive.clear()
    x, y = pairs(1, 3)[0]
    assert torch.equal(replayed("a test", (x, y), None), x + 5)
    assert alive == [0, 1, 1, 1, 1]  # only what the next step reads


def test_a_number_that_is_read_back_refuses_the_tape(tapes):
    rows = [(torch.full((3,), float(n)), torch.ones(3)) for n in range(5)]
    found = play(lambda x, y: x * 2 if x.sum() > 4 else y * 5, *rows)
    assert [x[0].item() for x in found] == [5, 5, 4, 6, 8]
    assert [*tapes.values()] == [REFUSED]


def test_what_leaves_the_device_refuses_the_tape(tapes):
    """Who copies numbers to a CPU may read them there without being seen."""
    rows = pairs(3, 3)
    for (x, y), found in zip(
        rows, play(lambda x, y: x + y * len(x.to("meta")), *rows), strict=True
    ):
        assert torch.equal(found, x + 3 * y)
    assert [*tapes.values()] == [REFUSED]


@pytest.mark.gpu
def test_numbers_that_are_read_on_the_cpu_refuse_the_tape(tapes):
    rows = [
        (torch.full((3,), float(n), device="cuda"), torch.ones(3, device="cuda")) for n in range(4)
    ]
    found = play(lambda x, y: y * sum(x.tolist()), *rows)
    assert [x[0].item() for x in found] == [0, 3, 6, 9]
    assert [*tapes.values()] == [REFUSED]


def test_a_tensor_read_in_another_dtype_refuses_the_tape(tapes):
    rows = pairs(3, 4)
    found = play(lambda x, y: (x.view(torch.int32) + 1).view(torch.float32) * y, *rows)
    for (x, y), o in zip(rows, found, strict=True):
        assert torch.equal(o, (x.view(torch.int32) + 1).view(torch.float32) * y)
    assert [*tapes.values()] == [REFUSED]


def test_empty_parts_are_repeated(tapes):
    def function(x, y):
        total = torch.zeros(4)
        for start, end in ((0, 0), (0, 3), (3, 3), (3, 4), (4, 4)):
            total[start:end] += x[start:end] * y[start:end]
        return total

    rows = pairs(3, 4)
    for (x, y), found in zip(rows, play(function, *rows), strict=True):
        assert torch.equal(found, x * y)
    assert [callable(x) for x in tapes.values()] == [True]


def test_a_tensor_from_elsewhere_refuses_the_tape(tapes):
    """Also where its storage could have the address of one that is gone."""
    confused = []

    def function(x, y):
        for n in range(100):
            gone = x + n
            del gone
            other = torch.from_numpy(np.ones(1, np.float32))  # which the dispatcher does not see
            if (recorder := replay.RECORDER.get()) is not None:
                confused.append(replay._storage(other) in recorder.numbers)
            y = y + other
        return y

    rows = pairs(3, 1)
    for (_, y), found in zip(rows, play(function, *rows), strict=True):
        torch.testing.assert_close(found, y + 100)
    assert [*tapes.values()] == [REFUSED]
    assert not any(confused)


def test_a_call_of_a_library_is_repeated_as_a_whole(tapes):
    def library(x, y, out=None):
        """What the dispatcher does not see."""
        found = torch.from_numpy(x.numpy() + 2 * y.numpy())
        return found if out is None else out.copy_(found)

    def function(x, y):
        target = torch.empty(2, 3)
        opaque(library, x, y, out=target[1])
        target[0] = opaque(library, y, x)
        return target

    rows = pairs(4, 3)
    for (x, y), found in zip(rows, play(function, *rows), strict=True):
        assert torch.equal(found, torch.stack([y + 2 * x, x + 2 * y]))
    assert [callable(x) for x in tapes.values()] == [True]


def test_tensors_that_share_memory_are_told_apart():
    """Parts of one tensor, and one tensor twice, are not mistaken for tensors of their own,
    nor these for them.
    """

    def function(x, y):
        return (x - 3 * y)[1:] + y[1:].clone()

    def parts():
        return torch.randn(3, 8).split(4, dim=1)

    def twice():
        x = torch.randn(3, 8)[:, :4]
        return x, x

    def apart():
        return torch.randn(3, 8)[:, :4], torch.randn(3, 8)[:, 4:]

    for kinds in ((twice, parts, apart), (parts, apart, twice), (apart, twice, parts)):
        replay.TAPES.clear()
        rows = [kind() for kind in kinds for _ in range(3)]
        for row, found in zip(rows, play(function, *rows), strict=True):
            assert torch.equal(found, function(*row))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, n: (x.double(), n),
        lambda x, n: (x.T.contiguous().T, n),
        lambda x, n: (x[1:], n),
        lambda x, n: (
            torch.cat([x.flatten(), x[0, :1]])[1:].view(3, 4),
            n,
        ),  # begins elsewhere in a row of 16 bytes
        lambda x, n: (x, n + 1),
    ],
    ids=["dtype", "strides", "shape", "alignment", "number"],
)
def test_other_inputs_get_another_tape(change, tapes):
    def function(x, n):
        return x * n

    rows = [(torch.randn(3, 4), 2), change(torch.randn(3, 4), 2)] * 3
    for row, found in zip(rows, play(function, *rows), strict=True):
        assert torch.equal(found, function(*row))
    assert [callable(x) for x in tapes.values()] == [True, True]


def test_deterministic_algorithms_get_another_tape(tapes):
    rows = pairs(3, 3, 4)
    play(torch.add, *rows)
    torch.use_deterministic_algorithms(True)
    try:
        play(torch.add, *rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tapes) == 2


def test_the_oldest_tapes_are_forgotten(tapes, monkeypatch):
    monkeypatch.setattr(replay, "MAX_TAPES", 3)
    for size in range(1, 6):
        play(torch.add, *pairs(3, size))
    assert len(tapes) == 3


def test_an_error_makes_no_tape(tapes):
    def function(x, y):
        raise ValueError("no")

    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            play(function, *pairs(1, 3))
    assert [*tapes.values()] == [SEEN]
