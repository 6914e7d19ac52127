"""Which modules of a model are attention that can become sparse.

A module is recognised by what it is, not by a list: causal self-attention that knows its
`layer_idx` and calls transformers' attention interface.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from nsa_fsa.cache.nsa_cache import turn_back
from nsa_fsa.config import NSAConfig
from nsa_fsa.integrations.transformers.attention import FORWARDS

SIZES = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")
_SIZES_OF: dict[type[nn.Module], Callable[[Any], dict[str, Any]]] = {}


class Layer(NamedTuple):
    """A causal self-attention module of a model."""

    name: str  # as in `model.named_modules()`
    module: Any
    decoder: Any  # the innermost model of transformers around it: what is called with the mask
    why_not: str | None = None  # why it cannot become sparse, if it cannot
    is_full: bool = True  # whether it is full attention, which is refused rather than left alone


def register_attention(
    attention_class: type[nn.Module],
    forward: Callable[..., Any] | None = None,
    sizes: Callable[[Any], dict[str, Any]] | None = None,
) -> None:
    """Makes `patch_model` take an attention class of your own for causal self-attention.

    Its instances need `config`, a transformers config, and `layer_idx`.

    Args:
        attention_class: the class itself; subclasses are registered by themselves.
        forward: what a sparse layer runs instead of its own, where that does not call transformers'
            attention interface. It takes the same arguments and `**kwargs`, and hands its rotated
            queries `[B, HQ, S, D]`, and keys and values `[B, HKV, S, D or DV]` after the cache, to
            `sparse_attention(self, q, k, v, attention_mask, scaling=..., **kwargs)`, which returns
            (`[B, S, HQ, DV]`, None).
        sizes: `NSAConfig`'s hidden_size, num_heads, num_kv_heads, head_dim and v_head_dim of a
            module, where they are not in its config by their usual names.

    Raises:
        ValueError: for what is no class of modules, or a class that calls no attention interface
            and comes without a forward that does.
    """
    if not (isinstance(attention_class, type) and issubclass(attention_class, nn.Module)):
        raise ValueError(
            f"attention_class={attention_class!r:.100} must be a class of nn.Module. "
            "Fix: the class of your attention modules, not one of them."
        )
    if forward is None and not _calls_interface(attention_class):
        raise ValueError(
            f"{attention_class.__name__} does not call transformers' attention interface, so a "
            "sparse layer needs another forward. "
            "Fix: register_attention(..., forward=...), which ends in sparse_attention."
        )
    FORWARDS[attention_class] = forward
    if sizes is not None:
        _SIZES_OF[attention_class] = sizes


def attention_layers(model: nn.Module) -> dict[int, Layer]:
    """The causal self-attention of a model's decoder, by `layer_idx`; there may be one decoder."""
    found: dict[int, Layer] = {}
    decoders = {"": model}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            decoders[f"{name}." if name else ""] = module
        if not is_attention(module):
            continue
        i: Any = module.layer_idx
        if i in found:
            raise ValueError(
                f"{type(model).__name__} has two attention modules of layer {i}, {found[i].name} "
                f"and {name}. Fix: patch the model that contains one of them alone."
            )
        *_, decoder = (x for prefix, x in decoders.items() if name.startswith(prefix))
        found[i] = Layer(name, module, decoder, *_obstacle(module, decoder))
    return dict(sorted(found.items()))


def dense_type(x: Any) -> Any:
    """The class that a module or a config has, or had before it became sparse."""
    return getattr(type(x), "dense_class", type(x))


def is_attention(module: nn.Module) -> bool:
    """Whether a module is causal self-attention that can be reached; sparse ones are."""
    dense = dense_type(module)
    if not isinstance(getattr(module, "layer_idx", None), int) or not hasattr(module, "config"):
        return False
    if dense in FORWARDS:
        return True
    code = _calls_interface(dense)
    if code is None:
        return False
    crosses = {"encoder_hidden_states", "key_value_states"} & {*code.co_varnames}
    if crosses and getattr(module, "is_cross_attention", True):
        return False
    is_causal = getattr(module, "is_causal", False) and getattr(module.config, "is_causal", True)
    return bool(is_causal)


def _code_of(function: Any) -> Any:
    """The code of a function inside its decorators; None where there is none."""
    return getattr(inspect.unwrap(function), "__code__", None)


def _calls_interface(attention_class: type) -> Any:
    """The code that calls transformers' attention interface, of a class's forward or of one that it
    calls by `super()`; None where it does not."""
    for cls in attention_class.__mro__:
        if "forward" in vars(cls):
            code = _code_of(vars(cls)["forward"])
            if code is None or "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return code
            if "super" not in code.co_names:
                return None
    return None


def _obstacle(module: Any, decoder: Any) -> tuple[str | None, bool]:
    """Why attention cannot become sparse, or None, and whether it is full attention."""
    c, i = module.config, module.layer_idx
    kinds = getattr(c, "layer_types", None)
    if kinds and i < len(kinds) and kinds[i] != "full_attention":
        return f"it is {kinds[i].replace('_', ' ')}", False
    window = getattr(module, "sliding_window", None)
    if not kinds and not hasattr(module, "sliding_window"):
        # The module may be told of a window that only its decoder's mask has.
        codes = [_code_of(dense_type(x).forward) for x in (module, decoder)]
        names = [name for code in codes if code for name in (*code.co_names, *code.co_consts)]
        window = getattr(c, "sliding_window", None) if "sliding_window" in names else None
    if not kinds and window is not None:
        return f"it has a sliding window of {window}", False
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "its scores have a soft cap, which NSA's kernels do not have", True
    if getattr(module, "sinks", None) is not None:
        return "it has attention sinks, which NSA's kernels do not have", True
    return None, True


def sizes_of(module: Any) -> dict[str, Any]:
    """The fields of NSAConfig that an attention module decides."""
    if (own := _SIZES_OF.get(dense_type(module))) is not None:
        return {"scale": None, **own(module)}
    width = _first(module, "qk_head_dim", "head_dim", "head_size")
    found = sizes_in(module.config, width)
    width = found["head_dim"]
    scale = getattr(module, "scaling", None)
    found |= dict(
        head_dim=width,
        v_head_dim=_first(module, "v_head_dim") or width,
        scale=float(scale) if isinstance(scale, (int, float)) else None,
    )
    if hasattr(module, "kv_b_proj"):  # latent attention
        found["num_kv_heads"] = found["num_heads"]
    return found


def sizes_in(config: Any, width: int | None = None) -> dict[str, Any]:
    """The same as far as a config of transformers says; width: of heads, where it is known."""
    heads = config.num_attention_heads
    width = width or _first(config, "qk_head_dim", "head_dim") or config.hidden_size // heads
    return dict(
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=_first(config, "num_key_value_heads", "num_kv_heads") or heads,
        head_dim=width,
        v_head_dim=_first(config, "v_head_dim") or width,
    )


def _first(x: Any, *names: str) -> Any:
    return next((y for name in names if (y := getattr(x, name, None)) is not None), None)


def check_rotation(layer: Layer, config: NSAConfig) -> None:
    """Raises ValueError unless the keys of a layer can be turned back, where they have to be."""
    unset = (p.is_meta or p.numel() == 0 for p in layer.module.parameters())
    if config.compress_rope == "before" or any(unset):
        return  # what is made without memory was looked at when it was first made
    rotary = getattr(layer.decoder, "rotary_emb", None)
    reason = "it is not known how they were rotated"
    if (rope_type := getattr(rotary, "rope_type", None)) in ("dynamic", "longrope"):
        reason = f'a rotation of type "{rope_type}" changes with the length of the sequence'
    elif "mrope_section" in (getattr(layer.module.config, "rope_parameters", None) or {}):
        reason = "the positions of images in a cache are not known"
    elif rotary is not None and _can_turn_back(layer.module, rotary):
        return
    raise ValueError(
        f'compress_rope="after" is not available in {type(layer.module).__name__}: its keys '
        f'cannot be turned back, because {reason}. Fix: compress_rope="before".'
    )


@torch.no_grad()
def _can_turn_back(attention: Any, rotary: nn.Module) -> bool:
    """Whether keys of random tokens, rotated and turned back, are those that were not."""
    weight = next(p for p in attention.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, attention.config.hidden_size, generator=generator).to(weight)
    found: list[Tensor] = []

    def keep_keys(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        found.append(k[0].transpose(0, 1))  # [S, HKV, D]
        return torch.zeros_like(q).transpose(1, 2)[..., : v.shape[3]], None

    config = attention.config
    AttentionInterface.register(_PROBE, keep_keys)
    try:
        attention.config = with_function(config, _PROBE)
        cos, sin = rotary(x, position_ids=torch.arange(3, device=x.device)[None])
        for pair in ((cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))):
            forward = dense_type(attention).forward
            forward(attention, x, position_embeddings=pair, attention_mask=None)
    except Exception:  # of another signature
        return False
    finally:
        attention.config = config
        AttentionInterface._global_mapping.pop(_PROBE, None)
    rotated, plain = found
    if not plain.isfinite().all():  # weights that are to be set later
        return True
    if cos.ndim != 3 or cos.shape[-1] > plain.shape[-1]:
        return False
    error = (turn_back(rotated, cos[0], sin[0]) - plain).abs().max()
    return bool(error <= 8 * torch.finfo(plain.dtype).eps * plain.abs().max())


_PROBE = "nsa_fsa_probe"


def with_function(config: Any, name: str) -> Any:
    """A config for attention modules alone, with another attention function."""
    made: Any = object.__new__(dense_type(config))
    made.__dict__.update(config.__dict__)
    made._attn_implementation_internal = name
    return made


@dataclass(frozen=True)
class ModelExplanation:
    """What `patch_model` would do with every attention module; printing it gives a table."""

    model_class: str
    # Of every module its name, its class, and why it cannot become sparse; "" where it can or is.
    layers: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        if not self.layers:
            return (
                f"{self.model_class} has no causal self-attention that calls "
                "transformers' attention interface; register_attention takes a class of your own."
            )
        lines = [f"{self.model_class}:"]
        for name, cls, why_not in self.layers:
            what = f"stays as it is: {why_not}" if why_not else "NSA"
            lines.append(f"  {name} ({cls}): {what}")
        return "\n".join(lines)


def explain_model(model: nn.Module) -> ModelExplanation:
    """Module by module, what `patch_model` would do with a model, and why not more.

    Raises:
        ValueError: for a model with several decoders.
    """
    layers = attention_layers(model).values()
    rows = ((x.name, type(x.module).__name__, x.why_not or "") for x in layers)
    return ModelExplanation(type(model).__name__, tuple(rows))
