"""What block divergence is called with, and what it returns."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_fsa.ops.common.calls import Blocks, Windows, check_compressed_values
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
class DivergenceCall:
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

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def check_values(self) -> None:
        """Raises ValueError for sequences whose numbers do not fit the tensors."""
        self.sequences.check_values(self.q.shape[0], self.k.shape[0])
        check_compressed_values(self.q, self.k_cmp, self.sequences, self.windows.kernel_stride)
