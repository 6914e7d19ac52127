"""Row 15 of reliability.md at lengths that tests/ops/test_extreme_values.py leaves to the GPU."""

import pytest
import torch

from tests.cases import Case
from tests.gpu.problems import BACKENDS
from tests.ops.test_extreme_values import (
    all_zero,
    check_extreme_values,
    equal_keys,
    huge_key,
    times_30,
)

pytestmark = pytest.mark.gpu

# name, lengths, HKV, G, D, DV, dtype, kernel_size, kernel_stride, block_size, T_sel, init, local,
# window, seed
CASES = [
    Case("hopper", (3000, 0, 200), 1, 4, 128, 128, torch.bfloat16, 32, 16, 64, 16, 1, 2, 512, 50),
    Case("hopper_f16", (2048,), 2, 1, 64, 64, torch.float16, 32, 16, 128, 8, 1, 2, 512, 51),
    Case("plain", (1500, 700), 1, 3, 96, 80, torch.bfloat16, 32, 16, 32, 16, 1, 2, 512, 52),
]


@pytest.mark.parametrize("change", [times_30, equal_keys, huge_key, all_zero])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("operator", "backend"),
    [
        ("compressed_attention", "triton"),
        *(("selected_attention", backend) for backend in BACKENDS),
    ],
)
def test_extreme_values(operator, backend, case, change):
    check_extreme_values(operator, backend, case, change)
