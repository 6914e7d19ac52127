"""Memory with guards around it: what an operator reads out of bounds shows,
and so does what it writes.
"""

from contextlib import contextmanager

import pytest
import torch

GUARD = 4096  # elements before and after
ALLOCATORS = {
    torch: ("empty", "empty_like", "zeros", "full"),
    torch.Tensor: ("new_empty", "new_zeros", "new_full"),
}
_full = torch.full


def fill_value(dtype):
    """NaN spreads to whatever is computed from it; 1, read as an index, is wrong but harmless."""
    return torch.nan if dtype.is_floating_point else 1


def guarded(x):
    """A contiguous copy of x in the middle of a larger buffer, and that buffer."""
    buffer = _full((x.numel() + 2 * GUARD,), fill_value(x.dtype), dtype=x.dtype, device=x.device)
    view = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    view.copy_(x)
    return view, buffer


def assert_untouched(buffer, name):
    for end, guard in (("before", buffer[:GUARD]), ("after", buffer[-GUARD:])):
        intact = (
            guard.isnan() if buffer.dtype.is_floating_point else guard == fill_value(buffer.dtype)
        )
        assert intact.all(), f"{(~intact).sum()} elements {end} {name} were written to"


@contextmanager
def guarded_allocations():
    """Whatever Python code allocates meanwhile lies between guards,
    which must be intact at the end, and starts as NaN or 1.
    """
    buffers = []

    def between_guards(name, allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if "empty" in name:
                x.fill_(fill_value(x.dtype))
            view, buffer = guarded(x)
            buffers.append((buffer, f"the result of {name}({tuple(x.shape)}, {x.dtype})"))
            return view

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ALLOCATORS.items():
            for name in names:
                patch.setattr(owner, name, between_guards(name, getattr(owner, name)))
        yield
    for buffer, name in buffers:
        assert_untouched(buffer, name)
