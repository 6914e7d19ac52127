"""What the launcher of kernels takes for the same compiled kernel. That it launches what Triton
would, every test on a GPU shows; here stands a function in for Triton's, which counts how often
it is asked."""

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from nsa_fsa.ops.common import launcher, replay


class Pair(NamedTuple):
    ptr: Any
    stride: Any


class Compiled:
    """A kernel that keeps what it was launched with."""

    function = packed_metadata = None

    def __init__(self):
        self.launches = []

    def run(self, *arguments):
        self.launches.append(arguments)

    def launch_metadata(self, grid, stream, *arguments):
        return grid, stream, arguments


class Function:
    """Triton's side: parameters x, count, stride, TILE and WIDTH,
    and a compilation each time it is asked.
    """

    device_caches = None

    def __init__(self):
        self.compiled = []
        kinds = dict(
            x=(False, False),
            count=(True, False),
            stride=(False, False),
            TILE=(False, False),
            WIDTH=(False, False),
        )
        self.params = [
            SimpleNamespace(
                name=name,
                is_constexpr=name.isupper(),
                do_not_specialize=x,
                do_not_specialize_on_alignment=y,
            )
            for name, (x, y) in kinds.items()
        ]

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **constants):
        self.compiled.append(Compiled())
        return self.compiled[-1]


@pytest.fixture
def kernel(monkeypatch):
    if launcher.specialize is None:
        pytest.skip("this Triton does not say how it describes values")
    monkeypatch.setattr(launcher, "_backend", lambda: make_backend(GPUTarget("cuda", 90, 32)))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return launcher.Launcher(Function())


X = torch.zeros(64)


def test_a_known_kernel_is_launched_without_triton(kernel):
    kernel[5, 2](X, 3, 32, WIDTH=9, TILE=16, num_warps=4)
    kernel[6, 2](X, 40, 64, WIDTH=9, TILE=16, num_warps=4)
    (compiled,) = kernel.function.compiled
    ((x, y, z, stream, *_, first, count, stride, tile, width),) = compiled.launches
    assert (x, y, z, stream) == (6, 2, 1, 7)
    assert first is X
    assert (count, stride, tile, width) == (40, 64, 16, 9)  # in the order of the parameters


# What Triton compiles a kernel anew for.
OTHERS = {
    "dtype": dict(x=X.half()),
    "alignment": dict(x=X[1:]),
    "nothing": dict(x=None),
    "a bundle": dict(x=Pair(X, 32)),
    "a bundle's stride": dict(x=Pair(X, 33)),
    "a count of 64 bits": dict(count=1 << 40),
    "a stride of 1": dict(stride=1),
    "an odd stride": dict(stride=33),
    "a constant": dict(TILE=32),
    "an option": dict(num_warps=8),
}


def test_other_kernels_are_told_apart(kernel):
    known = dict(x=X, count=3, stride=32, TILE=16, WIDTH=9, num_warps=4)
    for changes in ({}, *OTHERS.values()):
        values = known | changes
        arguments = [values.pop(name) for name in ("x", "count", "stride")]
        kernel[(1,)](*arguments, **values)
        kernel[(1,)](*arguments, **values)  # and known from then on
    assert len(kernel.function.compiled) == 1 + len(OTHERS)
    assert all(len(compiled.launches) == 1 for compiled in kernel.function.compiled)
    kernel[(1,)](X, 3, 32, 16, WIDTH=9, num_warps=4)
    kernel[(1,)](X, 3, 32, 32, WIDTH=9, num_warps=4)  # a constant by its position
    assert len(kernel.function.compiled) == 3 + len(OTHERS)


def test_a_profilers_hook_sees_every_launch(kernel, monkeypatch):
    kernel[(1,)](X, 3, 32, TILE=16, WIDTH=9)
    hook = launcher.triton.knobs.runtime.launch_enter_hook
    monkeypatch.setattr(hook, "calls", [print])
    kernel[(1,)](X, 3, 32, TILE=16, WIDTH=9)
    ((*_, metadata, enter, leave, x, count, stride, tile, width),) = kernel.function.compiled[
        0
    ].launches
    assert metadata == ((1,), 7, (x, count, stride, tile, width))
    assert enter is hook
    assert leave is launcher.triton.knobs.runtime.launch_exit_hook


def test_nobody_is_told_of_a_compilation(kernel, monkeypatch):
    """Triton could not tell of a bundle of constants, and would fail."""
    runtime, names = launcher.triton.knobs.runtime, ("jit_cache_hook", "jit_post_compile_hook")
    for name in names:
        monkeypatch.setattr(runtime, name, print)
    told = []

    def compile(*arguments, **constants):
        told.extend(getattr(runtime, name) for name in names)
        raise RuntimeError("not compiled")

    monkeypatch.setattr(kernel.function, "compile", compile)
    with pytest.raises(RuntimeError, match="not compiled"):
        kernel[(1,)](X, 3, 32, TILE=16, WIDTH=9)
    assert told == [None, None]
    assert [getattr(runtime, name) for name in names] == [print, print]


def test_two_threads_that_compile_take_no_hook_away(monkeypatch):
    """As the forward's and the backward's; the first is done while the second still compiles."""
    runtime = launcher.triton.knobs.runtime
    monkeypatch.setattr(runtime, "jit_post_compile_hook", print)
    first_began, second_began, first_ended = (threading.Event() for _ in range(3))

    def first():
        with launcher.without_compile_hooks():
            first_began.set()
            second_began.wait(0.3)
        first_ended.set()

    def second():
        first_began.wait()
        with launcher.without_compile_hooks():
            second_began.set()
            first_ended.wait(0.3)

    threads = [threading.Thread(target=x) for x in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runtime.jit_post_compile_hook is print


class Descriptor:
    """What describes a tensor for bulk copies."""

    def __init__(self, base):
        self.base, self.block_shape = base, [8]


def test_a_tape_launches_with_the_tensors_that_it_has_then(kernel, monkeypatch):
    """Wherever they stand among the arguments: in a bundle of bundles, too."""
    monkeypatch.setattr(replay, "TAPES", {})
    monkeypatch.setattr(replay, "applies", lambda x: True)
    monkeypatch.setattr(launcher.Launcher, "_described", lambda self, arguments: ["known"])

    def launch(x, y):
        scratch = x.new_empty(8)
        bundles = (Pair(y, 3), None, (Pair(x[2:], 1), x.view(8, 8).T, Pair(Descriptor(y), 2)))
        kernel[5, 2](bundles, 7, Pair(scratch, Pair(4, 5)), TILE=Pair(1, 2), WIDTH=9)
        return x + 1

    for _ in range(4):
        x, y = torch.zeros(64), torch.zeros(9)
        o = replay.replayed("a launch", (x, y), lambda x=x, y=y: launch(x, y))
    assert [callable(play) for play in replay.TAPES.values()] == [True]
    assert torch.equal(o, x + 1)

    (compiled,) = kernel.function.compiled
    assert len(compiled.launches) == 3  # the first call was Triton's
    (*grid, stream, _, _, _, _, _, bundles, count, scratch, tile, width) = compiled.launches[-1]
    assert (grid, stream, count, tile, width) == ([5, 2, 1], 7, 7, (1, 2), 9)
    (of_y, none, (of_x, transposed, described)) = bundles
    assert of_y == (y.data_ptr(), 3)
    assert none is None
    assert of_x == (x.data_ptr() + 8, 1)
    assert transposed == x.data_ptr()
    assert described[0].base.data_ptr() == y.data_ptr()
    assert described[0].block_shape == [8]
    assert isinstance(scratch[0], int)
    assert scratch[1] == (4, 5)
