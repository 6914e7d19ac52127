"""What a layer adds to the attention that it was, a gate and two compressors: how they are made,
started, and handed from one setting to the next.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.attention import NSAAttention
from nsa_fsa.integrations.transformers.layers import Layer
from nsa_fsa.integrations.transformers.settings import COMPRESSORS, own_phi
from nsa_fsa.modules.branches import PARTS, SparseBranches
from nsa_fsa.modules.compression import Compressor, LinearPhi, MLPPhi, PoolPhi
from nsa_fsa.modules.gating import BranchGate


class Parts(SparseBranches, nn.Module):
    """What a layer adds, before it is the layer's."""

    def __init__(self, config: NSAConfig, **new: Any) -> None:
        super().__init__()
        self.add_branches(config, **new)


def make_parts(
    model: PreTrainedModel,
    layers: dict[int, Layer],
    settings: Mapping[int, NSAConfig],
    own: Mapping[int, Mapping[str, Any]],
) -> tuple[dict[int, Parts], tuple[str, ...]]:
    """New parts of the layers that change, and which learned ones start anew.

    The model is untouched. own: for every layer, what makes a compressor of the user's own.
    """
    made: dict[int, Parts] = {}
    anew: list[str] = []
    for i, config in sorted(settings.items()):
        attention: Any = layers[i].module
        patched = isinstance(attention, NSAAttention)
        if patched and not hasattr(type(model), "dense_class"):
            raise ValueError(
                f"layer {i} is patched already, as a part of another model. Fix: patch that one."
            )
        if patched and attention.nsa_config == config and not any(own[i].values()):
            continue
        factory = _factory(model, attention)
        phis = {name: own_phi(attention, name) for name in COMPRESSORS} if patched else {}
        given = {name: make_phi(make, config, **factory) for name, make in own[i].items() if make}
        modes = [(x, x.training) for phi in phis.values() if phi for x in phi.modules()]
        made[i] = Parts(config, **{**phis, **given}, **factory).train(attention.training)
        for module, mode in modes:  # a phi that stays is as it was
            module.training = mode
        if patched:
            anew += _carry_over(i, attention, made[i], phis, given)
    return made, tuple(anew)


def _factory(model: PreTrainedModel, attention: nn.Module) -> dict[str, Any]:
    """Where and in what precision a layer's new parameters are made: as its projections."""
    projections = [m for m in attention.children() if hasattr(m, "weight")]
    projection = max(projections, default=attention, key=lambda m: getattr(m, "in_features", 0))
    weight: Any = getattr(projection, "weight", None)
    # torch.ao has a method of that name, and GPTQ buffers of other names.
    is_tensor = isinstance(weight, Tensor)
    tensors = [weight] if is_tensor else [*projection.parameters(), *projection.buffers()]
    device = next((x.device for x in tensors), model.device)
    if device.type == "meta" and (hook := getattr(projection, "_hf_hook", None)) is not None:
        device = hook.execution_device  # where accelerate brings offloaded weights
    is_packed = not is_tensor or not weight.is_floating_point() or weight.element_size() == 1
    return dict(device=device, dtype=model.dtype if is_packed else weight.dtype)


def _carry_over(
    i: int, before: NSAAttention, after: Parts, phis: Mapping[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """Gives layer i what its predecessor learned, part by part; returns the parts that do not fit.

    Parts go over as whole modules, with what others put around or on them, such as adapters and
    hooks that bring offloaded weights. Of a compressor that is given again only the values do.
    """
    anew = []
    plain = Parts(before.nsa_config, device="meta", **phis)  # without what is around them

    for part in PARTS:
        old, new = getattr(before, part), getattr(after, part)
        name = part.replace("compress", "compressor")
        is_given = name in given
        learned = (old if is_given else getattr(plain, part)).state_dict(keep_vars=True)
        wanted = new.state_dict()
        shapes, needed = ({key: x.shape for key, x in y.items()} for y in (learned, wanted))
        fits = shapes == needed

        if type(old) is not type(new) and (is_given or not fits):
            raise ValueError(
                f"{part} of layer {i} has to be made anew with these settings, "
                f"but a {type(old).__name__} has taken its place. Fix: merge or unload "
                "the adapter first, or keep the settings that decide the shape."
            )
        if is_given:
            _check_here(f"{part} of layer {i}", name, learned, wanted)

        if not fits:
            anew.append(f"{i}.{part}")
        elif is_given:
            for key, parameter in new.named_parameters():
                # The module gives this to what it loads.
                parameter.requires_grad_(learned[key].requires_grad)
            new.load_state_dict(learned, assign=True)
        else:
            setattr(after, part, old)

    return anew


def _check_here(
    part: str, name: str, learned: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for learned values that are not at hand."""
    if any(x.is_meta for x in learned.values()) and not any(x.is_meta for x in wanted.values()):
        where, first = "offloaded", "offloading"
    elif any(getattr(x, "ds_shape", x.shape) != x.shape for x in learned.values()):
        where, first = "partitioned by ZeRO-3", "deepspeed.initialize"
    else:
        return
    raise ValueError(
        f"{part} is {where}, and cannot be moved into another compressor. "
        f"Fix: leave out {name}, which keeps the one that is there, or patch before {first}."
    )


# --- Their start ----------------------------------------------------------------------------------


def make_phi(
    make: Callable[[NSAConfig], nn.Module], config: NSAConfig, **factory: Any
) -> nn.Module:
    """A compressor of the user's own, on the device and in the dtype of what is added beside it.

    In a model that is made without memory, as in `from_pretrained`, it keeps the values that it is
    made with, and which of its tensors are one: transformers puts unset memory in the place of what
    no checkpoint has, and places and casts the rest.
    """
    if not torch.empty(0).is_meta:
        phi = make(config)
        # What is none is refused where it is used.
        return phi.to(**factory) if isinstance(phi, nn.Module) else phi
    with torch.device("cpu"):
        phi = make(config)
    start: dict[int, tuple[list[str], Tensor]] = {}
    for found in (phi.named_parameters, phi.named_buffers):
        for name, x in found(remove_duplicate=False):
            start.setdefault(id(x), ([], x.detach().clone()))[0].append(name)
    phi._nsa_start = list(start.values())  # type: ignore[assignment]
    return phi


def _start(phi: nn.Module) -> None:
    """Gives such a compressor the values that it was made with, but for those of a checkpoint."""
    start = phi.__dict__.pop("_nsa_start", None)
    if start is None:
        return
    for names, value in start:
        tensors = [operator.attrgetter(name)(phi) for name in names]
        loaded = [x for x in tensors if _is_initialized(x)]
        if len(loaded) < len(tensors):
            kept = loaded[0] if loaded else tensors[0].copy_(value)
            for name in names:
                holder, _, own_name = name.rpartition(".")
                setattr(phi.get_submodule(holder), own_name, kept)
    mark_as_initialized(phi)


@torch.no_grad()
def start_parts(model: nn.Module) -> None:
    """Starts what no checkpoint brought of the parts of a model's layers."""
    module: Any
    for module in model.modules():
        if isinstance(module, Compressor):
            _start(module.phi)
        is_ours = isinstance(module, (BranchGate, Compressor, LinearPhi, MLPPhi, PoolPhi))
        if is_ours and not _is_initialized(module):
            # A reset writes every parameter of the module.
            loaded = [p for p in module.parameters(recurse=False) if _is_initialized(p)]
            values = [p.clone() for p in loaded]
            module.reset_parameters()
            for parameter, value in zip(loaded, values, strict=True):
                parameter.copy_(value)
            module._is_hf_initialized = True


def mark_as_initialized(part: nn.Module) -> None:
    """Keeps transformers from initialising a part of a layer as it does any Linear."""
    for module in part.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def _is_initialized(x: nn.Module | Tensor) -> bool:
    """Whether transformers marked it as loaded or initialised."""
    return getattr(x, "_is_hf_initialized", False)
