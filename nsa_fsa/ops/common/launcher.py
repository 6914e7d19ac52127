"""Launches kernels with less work on the host than Triton's own way,
which takes 30 to 60 microseconds for a large kernel.

Triton binds, describes and looks up every argument anew at each launch. Here a kernel that is
compiled is found by what Triton would compile it for, and launched as Triton's `CompiledKernel`
does. Whatever is not known yet goes Triton's own way.

This uses private interfaces of Triton, tried with 3.6 and 3.7;
where they are missing, everything goes Triton's own way.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.compiler.compiler import make_backend

try:
    from triton._C.libtriton import native_specialize_impl as specialize
except ImportError:
    specialize = None


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
            return self.function[grid]
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else -1
        key = (device, *self._described(arguments), *constants.items())
        kernel = self.compiled.get(key)
        if kernel is None or triton.knobs.runtime.launch_enter_hook.calls:  # such as a profiler's
            kernel = self.function[grid](*arguments, **constants)
            if kernel is not None:
                self.compiled[key] = kernel
            return
        bound = [*arguments, *(constants[name] for name in self.names[len(arguments) :])]
        stream = torch._C._cuda_getCurrentRawStream(device)
        x, y, z = (*grid, 1, 1)[:3]
        kernel.run(
            x, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *bound
        )

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
