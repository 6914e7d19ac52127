"""Gates: how much of each branch goes into the output (docs/spec.md, section 7)."""

import torch
from torch import nn

from nsa_fsa.modules.start import assign

# Biases of `gate_init="dense"`: sigmoid(6) = 0.9975 opens the selected branch,
# sigmoid(-6) = 0.0025 nearly closes the others and still lets a gradient of 0.0025 through, so
# that training can open them.
_DENSE_BIAS = (-6.0, 6.0, -6.0)


class BranchGate(nn.Linear):
    """Linear map from the residual stream to gate logits, `[..., E] -> [..., 3 H]`.

    The logits are ordered head by head, those of a head compressed, selected, sliding; the layer
    reshapes them. Only the start differs from a Linear's, so whatever a tool puts in a Linear's
    place (an adapter, a quantized Linear) may stand here, and tensor parallelism may split it
    column-wise. Its few numbers decide what a layer reads: quantizers that take names to leave
    alone, such as transformers' `modules_to_not_convert`, know it as ".*self_attn.gate".

    Args:
        hidden_size: E.
        num_gates: H: the number of query heads, or 1 for gates shared by all heads.
        init: "balanced" (all gates 0.5) or "dense" (the selected branch open,
            the others nearly closed).
    """

    init = "balanced"

    def __init__(self, hidden_size: int, num_gates: int, init: str = "balanced", **factory) -> None:
        super().__init__(hidden_size, 3 * num_gates, **factory)
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        if self.init == "dense":
            bias = torch.tensor(_DENSE_BIAS, dtype=self.bias.dtype, device=self.bias.device)
            assign(self.bias, bias.repeat(self.out_features // 3))
