"""How products of float32 numbers are rounded: as torch is told, by whichever of its settings.
`conftest.py` restores them.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks, Windows
from nsa_fsa.ops.common.tuning import dot_precision
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.operator import selected_key
from nsa_fsa.ops.sliding_window_attention.flash_attention import window_key
from nsa_fsa.sequences import Sequences
from tests.cases import by_name, call, device_of, make_inputs, output

MATMUL = torch.backends.cuda.matmul
SETTINGS = {
    "fp32_precision": lambda fast: setattr(MATMUL, "fp32_precision", "tf32" if fast else "ieee"),
    "set_float32_matmul_precision": lambda fast: torch.set_float32_matmul_precision(
        "high" if fast else "highest"
    ),
    "allow_tf32": lambda fast: setattr(MATMUL, "allow_tf32", fast),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_of_torch_counts(setting):
    q, k = torch.empty(100, 8, 64), torch.empty(100, 2, 64)
    shared = (
        q,
        k,
        k,
        Sequences(torch.tensor([0, 100], dtype=torch.int32), 100),
        0.1,
        WORKSPACE_BYTES,
        "auto",
    )
    selected = SelectedCall(
        *shared, Blocks(64, 1, 2), torch.empty(100, 2, 16, dtype=torch.int32), None, None
    )
    window = WindowedCall(*shared, Windows(1, 1), 512)
    seen = []
    for fast in (False, True):
        setting(fast)
        keys = [selected_key(selected, "forward"), window_key(window, "forward")]
        seen.append((dot_precision(torch.float32), *keys))
        assert dot_precision(torch.bfloat16) == "tf32"
    assert [precision for precision, *_ in seen] == ["ieee", "tf32"]
    assert all(exact != fast for exact, fast in zip(*seen, strict=True))


def test_one_setting_for_all_of_torch_counts():
    MATMUL.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    assert dot_precision(torch.float32) == "tf32"


def test_an_operator_runs_where_the_trainer_has_set_tf32():
    """The older of torch's settings cannot be read then."""
    case = by_name("five")
    torch.set_float32_matmul_precision("highest")  # as it is at the start of a process
    MATMUL.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        torch.get_float32_matmul_precision()
    x = make_inputs(case, device=device_of("triton"))
    assert output(call("compressed_attention", case, x, "triton")).isfinite().all()
