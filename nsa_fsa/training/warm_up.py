"""The first stage of a conversion: only what is new learns."""

from torch import nn

from nsa_fsa.modules.branches import PARTS
from nsa_fsa.modules.recording import sparse_layers


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the gates and the compressors of a model's NSA layers, each once.

    Raises:
        ValueError: for a model without an NSA layer.
    """
    parts: list[nn.Module] = [getattr(x, part) for x in sparse_layers(model) for part in PARTS]
    return list({id(p): p for part in parts for p in part.parameters()}.values())


def freeze_all_but_new(model: nn.Module) -> list[nn.Parameter]:
    """Leaves the gates and the compressors of a model's NSA layers to train, and nothing else.

    Returns:
        Their parameters, for an optimizer. `model.requires_grad_(True)` lets everything train
        again.

    Raises:
        ValueError: for a model without an NSA layer.

    Example, the whole warm-up:
        >>> patch_model(model)
        >>> optimizer = torch.optim.AdamW(freeze_all_but_new(model), lr=1e-3)
        >>> for batch in batches:
        ...     with teach(model, local=True) as teacher:
        ...         model.base_model(**batch)  # without the head, whose logits nobody needs
        ...         teacher.loss().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    new = new_parameters(model)
    model.requires_grad_(False)
    for parameter in new:
        parameter.requires_grad_(True)
    return new
