"""Launches kernels with less work on the host than Triton's own way,
which takes 30 to 60 microseconds for a large kernel.

Triton binds, describes and looks up every argument anew at each launch. Here a kernel that is
compiled is found by what Triton would compile it for, and launched as Triton's `CompiledKernel`
does. Whatever is not known yet goes Triton's own way.

This uses private interfaces of Triton, tried with 3.6 and 3.7;
where they are missing, everything goes Triton's own way.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.compiler import make_backend

from nsa_fsa.ops.common import replay
from nsa_fsa.ops.common.replay import Recorder

try:
    from triton._C.libtriton import native_specialize_impl as specialize
except ImportError:
    specialize = None


def current_stream(device: int) -> int:
    """The stream of PyTorch on which kernels are launched."""
    return torch._C._cuda_getCurrentRawStream(device)


def hooks() -> tuple[Any, Any] | None:
    """What wants to know of launches, such as a profiler: called before and after each; or None."""
    runtime = triton.knobs.runtime
    if not runtime.launch_enter_hook.calls:
        return None
    return runtime.launch_enter_hook, runtime.launch_exit_hook


replay.AVOIDED_FOR.append(hooks)


_COMPILING = threading.Lock()  # or a thread would put back what another one had taken away


@contextlib.contextmanager
def without_compile_hooks() -> Iterator[None]:
    """Triton writes a kernel's constants as JSON for whoever asks to be told of compilations, as
    vLLM does while it serves, and fails at a bundle of constants. So nobody is told of ours."""
    runtime = triton.knobs.runtime
    with _COMPILING:
        asked = runtime.jit_cache_hook, runtime.jit_post_compile_hook
        runtime.jit_cache_hook = runtime.jit_post_compile_hook = None
        try:
            yield
        finally:
            runtime.jit_cache_hook, runtime.jit_post_compile_hook = asked


def run(kernel: Any, grid: tuple[int, ...], device: int, arguments: Sequence[Any]) -> None:
    """Launches a compiled kernel as Triton does."""
    stream, metadata, (enter, leave) = current_stream(device), None, hooks() or (None, None)
    if enter is not None:
        metadata = kernel.launch_metadata(grid, stream, *arguments)
    x, y, z = (*grid, 1, 1)[:3]
    kernel.run(
        *(x, y, z, stream, kernel.function, kernel.packed_metadata),
        *(metadata, enter, leave, *arguments),
    )


def take_down(
    recorder: Recorder, kernel: Any, grid: tuple[int, ...], device: int, arguments: Sequence[Any]
) -> None:
    """Tells the recorder of a launch, which a tape repeats with addresses for tensors."""

    def written(x: Any) -> str:
        if isinstance(x, Tensor):
            return recorder.address(x)
        if not _holds_tensors(x):
            return recorder.constant(x)
        if isinstance(x, tuple):
            return f"({', '.join(map(written, x))},)"
        others = {name: value for name, value in vars(x).items() if name != "base"}
        members = f"base={address}({recorder.address(x.base)}), **{recorder.constant(others)}"
        return f"{recorder.constant(SimpleNamespace)}({members})"

    address = recorder.constant(Address)
    stream = recorder.once(f"{recorder.constant(current_stream)}({device})")
    functions = (recorder.constant(x) for x in (kernel.function, kernel.packed_metadata))
    values = (*(*grid, 1, 1)[:3], stream, *functions, None, None, None, *map(written, arguments))
    recorder.do(f"{recorder.constant(kernel.run)}({', '.join(map(str, values))})")


def _holds_tensors(x: Any) -> bool:
    """Whether an argument is a tensor, a descriptor of bulk copies, or a bundle with any."""
    if isinstance(x, tuple):
        return any(map(_holds_tensors, x))
    return isinstance(x, Tensor) or hasattr(x, "block_shape")  # Triton's descriptors and Gluon's


class Address(int):
    """Where a tensor begins, for those who ask a tensor."""

    def data_ptr(self) -> int:
        return self


class Launcher:
    """A kernel that the host launches: `kernel[grid](*arguments, **constants_and_options)`."""

    def __init__(self, function: Any):
        self.function = function  # triton.jit's
        self.compiled: dict[Any, Any] = {}
        self.interpreted = not hasattr(function, "device_caches")
        if not self.interpreted:
            self.names = [x.name for x in function.params]
            # Whether an argument is a constant; and otherwise whether Triton compiles the kernel
            # anew for some values of an integer, and for some alignments.
            self.kinds = [
                (x.is_constexpr, not x.do_not_specialize, not x.do_not_specialize_on_alignment)
                for x in function.params
            ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if self.interpreted or specialize is None:
            return functools.partial(replay.opaque, self.function[grid])
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
        key = (device, *self._described(arguments), *constants.items())
        kernel = self.compiled.get(key)
        bound = [*arguments, *(constants[name] for name in self.names[len(arguments) :])]
        if kernel is not None:
            run(kernel, grid, device, bound)
        else:
            with without_compile_hooks():
                kernel = self.function[grid](*arguments, **constants)
            if kernel is None:
                return replay.refuse("Triton does not say what it has launched")
            self.compiled[key] = kernel
        if (recorder := replay.RECORDER.get()) is not None:
            take_down(recorder, kernel, grid, device, bound)

    def _described(self, arguments: tuple[Any, ...]) -> list[Any]:
        """What Triton compiles for: of tensors the dtype and whether they begin at a multiple of 16
        bytes, and of integers that it may know whether they are 1 and multiples of 16."""
        found: list[Any] = []
        for x, (constant, value, alignment) in zip(arguments, self.kinds, strict=False):
            if constant:
                found.append(x)
            elif type(x) is torch.Tensor:
                found += (x.dtype, x.data_ptr() % 16 == 0)
            elif type(x) is int and not value:
                found.append(-(1 << 31) <= x < 1 << 31)
            else:
                found.append(specialize(_backend(), x, False, value, alignment))
        return found


@functools.cache
def _backend() -> Any:
    """What Triton asks how values are described: the same for all GPUs of one maker."""
    return make_backend(triton.runtime.driver.active.get_current_target())
