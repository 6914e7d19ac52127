"""Writing the values that a parameter starts with."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def assign(parameter: nn.Parameter, values: Tensor) -> None:
    """`parameter.copy_(values)`, also of a parameter that FSDP or tensor parallelism cut:
    each process then copies its part.

    values: the same in every process, so that none has to send them.
    """
    if type(parameter) is not nn.Parameter:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            values = distribute_tensor(
                values, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
    parameter.copy_(values)
