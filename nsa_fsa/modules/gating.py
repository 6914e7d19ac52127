"""Gates: how much of each branch goes into the output (docs/spec.md, section 7)."""

import torch
from torch import Tensor, nn

# Biases of `gate_init="dense"`: sigmoid(6) = 0.9975 opens the selected branch, sigmoid(-6) = 0.0025 nearly closes the others
# and still lets a gradient of 0.0025 through, so that training can open them.
_DENSE_BIAS = (-6.0, 6.0, -6.0)


class BranchGate(nn.Linear):
    """Linear map from the residual stream to gate logits, `[T, E] -> [T, H, 3]`; branch order compressed, selected, sliding.

    A Linear whose outputs are ordered head by head, so that tensor parallelism may split it column-wise.

    Args:
        hidden_size: E.
        num_gates: H: the number of query heads, or 1 for gates shared by all heads.
        init: "balanced" (all gates 0.5) or "dense" (the selected branch open, the others nearly closed).
    """

    init = "balanced"

    def __init__(self, hidden_size: int, num_gates: int, init: str = "balanced", **factory) -> None:
        super().__init__(hidden_size, 3 * num_gates, **factory)
        self.num_gates = num_gates
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        if self.init == "dense":
            with torch.no_grad():
                self.bias.view(-1, 3).copy_(torch.tensor(_DENSE_BIAS))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (self.num_gates, 3))
