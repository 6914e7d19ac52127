"""Native Sparse Attention with the Flash Sparse Attention loop order.

Importing this package imports PyTorch and nothing heavier: no Triton, no flash-attn, no transformers, no GPU.
"""

from nsa_fsa.config import NSAConfig

__version__ = "0.1.0"

__all__ = ["NSAConfig"]
