"""What people pass by mistake, for tests that go through every argument of a function."""

import re

import numpy as np
import pytest
import torch

NAN, INF = float("nan"), float("inf")


def assert_refused(call, name, value):
    """A ValueError that says what is wrong with the argument `name` and what it must be,
    or how to fix it.
    """
    with pytest.raises(ValueError, match=r"must|Fix|allowed") as error:
        pytest.fail(f"{name}={value!r} was accepted: {call()!r:.100}")
    # Of tensors on two devices, either may be the one to move.
    is_elsewhere = isinstance(value, torch.Tensor) and value.is_meta
    assert is_elsewhere or re.search(rf"\b{name}\b", str(error.value)), (
        f"{name}={value!r}: {error.value}"
    )


def instead_of_tensor(good, optional=False):
    """For an argument that is the tensor `good`, float or integer:
    other things, and tensors of other axes, kinds, places.
    """
    others = [3.0, 3, "text", True, [1, 2], np.ones(3), *([] if optional else [None])]
    if good.is_floating_point():
        kinds = [good.int(), good.bool(), good.to(torch.complex64)]
    else:
        kinds = [good.float(), good.bool(), good.short()]
    axes = [good[None], good.new_zeros(()), good.new_zeros(0)]
    return [*others, *kinds, *axes, good.to("meta")]


def instead_of_int(minimum, optional=False):
    wrong = [minimum - 1, 2.0, "8", True, [8], np.ones(2), torch.tensor(8), NAN]
    return wrong if optional else [*wrong, None]


def instead_of_number(optional=True):
    """For a finite number."""
    wrong = [NAN, INF, -INF, 10**400, "0.5", True, [0.5], np.ones(2), torch.tensor(0.5), 1j]
    return wrong if optional else [*wrong, None]


NO_BACKENDS = [None, "", "quantum", 3, True, ["auto"]]
