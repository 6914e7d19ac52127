"""What NSA adds to the tensor parallelism of transformers: gates are split by query heads, as the
projection of queries is, and compressors by KV heads. All else of an NSA layer reads its sizes from
what it is given.
"""

import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ReplicatedWithGradAllReduce,
    TensorParallelLayer,
)

from nsa_fsa.distributed.tensor_parallel import check_splits
from nsa_fsa.integrations.transformers.attention import NSAAttention
from nsa_fsa.integrations.transformers.layers import attention_layers
from nsa_fsa.modules.compression import Compressor


class PerHead(TensorParallelLayer):
    """Parameters `[HKV, ...]` of a module that works head by head: a rank has those of its heads,
    and the module's forward sees plain tensors."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        whole: Any = module._parameters[param]
        if whole is not None:
            part = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: Any, mesh: Any) -> nn.Module:
        if isinstance(module, Compressor):
            check_splits(module, mesh.size())
        return super().install_forward(module, mesh)


class SharedGate(ReplicatedWithGradAllReduce):
    """A gate for all heads: every rank has all of it, and its gradients, of which a rank finds what
    its own heads give, are added up."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        super().install_forward(module, mesh)
        forward = module.forward

        def of_all_ranks(x: torch.Tensor) -> torch.Tensor:
            whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            return forward(whole.to_local(grad_placements=[Partial()]))

        module.forward = of_all_ranks
        return module


class Gate(TensorParallelLayer):
    """Either kind of gate."""

    def _kind(self, module: Any) -> TensorParallelLayer:
        return SHARED if module.out_features == 3 else ALL_PARALLEL_STYLES["colwise"]

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        self._kind(module).shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        return self._kind(module).install_forward(module, mesh)


SHARED = SharedGate()
ALL_PARALLEL_STYLES.register("nsa_gate", Gate())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register("nsa_per_head", PerHead())  # type: ignore[arg-type]


def extend_plan(model: Any) -> None:
    """Adds to a model's plan what its NSA layers have besides, where the plan splits their heads.
    Where it gathers queries, keys and values first, every rank has all of a layer."""
    plan: dict[str, str] = model._tp_plan or {}
    for layer in attention_layers(model).values():
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        styles = [style for part, style in plan.items() if part.startswith(f"{name}.")]
        if "rowwise" not in styles or not isinstance(layer.module, NSAAttention):
            continue
        plan[f"{name}.gate"] = "nsa_gate"
        for which in ("compress_k", "compress_v"):
            compressor: nn.Module = getattr(layer.module, which)
            for part, _ in compressor.named_modules(prefix=which):
                plan[f"{name}.{part}"] = "nsa_per_head"
