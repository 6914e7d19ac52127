"""Native Sparse Attention with the Flash Sparse Attention loop order.

Importing this package imports PyTorch and nothing heavier: no Triton, no flash-attn,
no transformers, no GPU.
"""

import importlib
from typing import Any

from nsa_fsa.cache import NSACache
from nsa_fsa.config import NSAConfig
from nsa_fsa.modules import NativeSparseAttention, explain

__version__ = "0.1.0"

__all__ = [
    "NSACache",
    "NSAConfig",
    "NativeSparseAttention",
    "PatchReport",
    "explain",
    "explain_model",
    "patch_model",
    "register_attention",
    "sparse_attention",
    "unpatch_model",
]

_LAZY = {*__all__} - {*globals()}


def __getattr__(name: str) -> Any:
    """The Hugging Face side, imported on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("nsa_fsa.integrations.transformers"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
