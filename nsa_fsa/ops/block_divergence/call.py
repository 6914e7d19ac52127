"""What block divergence is called with, and what it returns."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nsa_fsa.ops.common.calls import Blocks, GroupedCall, Windows, check_compressed_values
from nsa_fsa.sequences import Sequences


class Divergence(NamedTuple):
    """What `block_divergence` returns; all but the first without gradients."""

    divergence: Tensor  # [T, HKV]
    mass: Tensor  # [T, HKV], of dense attention, in the chosen blocks
    recall: Tensor  # [T, HKV], of the free blocks; NaN where there was nothing to choose


class DivergenceGradients(NamedTuple):
    q: Tensor
    k_cmp: Tensor


@dataclass(frozen=True)
class DivergenceCall(GroupedCall):
    """One call of `block_divergence`."""

    q: Tensor  # [T, HQ, D]
    k: Tensor  # [T, HKV, D]
    k_cmp: Tensor  # [T // kernel_stride, HKV, D]
    lse: Tensor  # [T, HQ], of dense attention
    lse_cmp: Tensor  # [T, HQ], of compressed attention
    block_indices: Tensor  # int32 [T, HKV, T_sel]
    sequences: Sequences
    scale: float
    windows: Windows
    blocks: Blocks
    free_only: int  # 0 or 1
    workspace_bytes: int
    backend: str

    def check_values(self) -> None:
        super().check_values()
        check_compressed_values(self.q, self.k_cmp, self.sequences, self.windows.kernel_stride)
