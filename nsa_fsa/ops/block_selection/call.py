"""What block selection is called with."""

from dataclasses import dataclass

from torch import Tensor

from nsa_fsa.ops.common.calls import Blocks, Call, Windows, check_compressed_values
from nsa_fsa.sequences import Sequences


@dataclass(frozen=True)
class SelectionCall(Call):
    """One call of block selection."""

    q: Tensor  # [T, HQ, D]
    k_cmp: Tensor  # [T // kernel_stride, HKV, D]
    lse: Tensor  # [T, HQ], of compressed attention
    sequences: Sequences
    scale: float
    windows: Windows
    blocks: Blocks
    num_selected_blocks: int
    backend: str

    def check_values(self) -> None:
        """Raises ValueError for sequences whose numbers do not fit the tensors."""
        check_compressed_values(self.q, self.k_cmp, self.sequences, self.windows.kernel_stride)
