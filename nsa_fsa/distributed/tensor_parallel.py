"""Tensor parallelism for layers in a model of your own, by PyTorch's `parallelize_module`: n ranks
have HKV / n KV heads each, and the query heads that read them.

For models of transformers its own tensor parallelism does the same:
nsa_fsa/integrations/transformers/tensor_parallel.py.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from nsa_fsa.distributed.collectives import sum_gradients, summed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nsa_fsa.modules.compression import Compressor
    from nsa_fsa.modules.native_sparse_attention import NativeSparseAttention


class SummedGradients(ParallelStyle):
    """Every rank has all parameters, and finds of their gradients what its own heads give: these
    are summed."""

    def _apply(self, module: nn.Module, device_mesh: "DeviceMesh") -> nn.Module:
        group = device_mesh.get_group().group_name
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(summed, group=group))
        return module


class SharedGate(SummedGradients):
    """A gate for all heads, whose input every rank has, too."""

    def _apply(self, module: nn.Module, device_mesh: "DeviceMesh") -> nn.Module:
        group = device_mesh.get_group().group_name

        def of_all_ranks(module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
            return sum_gradients(arguments[0], group)

        module.register_forward_pre_hook(of_all_ranks)
        return super()._apply(module, device_mesh)


class PerHead(SummedGradients):
    """A compressor, of whose heads a rank uses its own."""

    def _apply(self, module: Any, device_mesh: "DeviceMesh") -> nn.Module:
        check_splits(module, device_mesh.size())
        number = module.num_heads // device_mesh.size()
        first = device_mesh.get_local_rank() * number
        module.heads = slice(first, first + number)
        return super()._apply(module, device_mesh)


def tensor_parallel_plan(layer: "NativeSparseAttention") -> dict[str, ParallelStyle]:
    """What `parallelize_module(layer, mesh, plan)` shares a layer by.

    Ranks have hidden states as a whole, before the layer and after it. Projections and gates per
    head are split; norms, compressors and gates per token stay whole on every rank, with gradients
    that are summed, so freeze what is to be frozen before. Caches hold the rank's heads.

    `parallelize_module` raises ValueError, before it has changed anything, where the ranks do not
    divide the KV heads, or a compressor is a module of your own.

    Example:
        >>> mesh = init_device_mesh("cuda", (2,))
        >>> parallelize_module(attn, mesh, tensor_parallel_plan(attn))
        >>> y = attn(x)  # as before, on every rank
    """
    plan: dict[str, ParallelStyle] = {x: PerHead() for x in ("compress_k", "compress_v")}
    plan |= {x: ColwiseParallel() for x in ("q_proj", "k_proj", "v_proj")}
    plan["o_proj"] = RowwiseParallel()
    plan["gate"] = ColwiseParallel() if layer.config.gate == "per_head" else SharedGate()
    return plan | {x: SummedGradients() for x in ("q_norm", "k_norm")}


def check_splits(compressor: "Compressor", num_ranks: int) -> None:
    """Raises ValueError unless a layer can be split over so many ranks."""
    if compressor.num_heads % num_ranks:
        raise ValueError(
            f"{num_ranks} ranks of tensor parallelism do not divide the {compressor.num_heads} KV "
            "heads of an NSA layer, and the choice of blocks belongs to a whole KV head. Fix: a "
            f"number (tp_size) that divides {compressor.num_heads}."
        )
    if compressor.is_own:
        raise ValueError(
            f"a compressor of your own, {type(compressor.phi).__name__}, cannot be split by KV "
            "heads. Fix: no tensor parallelism, or one of the package's kinds."
        )
