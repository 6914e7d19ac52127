"""Decoding: a few new tokens of every sequence, attending over a cache in pages."""

from nsa_fsa.decode.operator import Pooling, append_tokens, nsa_decode
from nsa_fsa.decode.pages import Pages

__all__ = ["Pages", "Pooling", "append_tokens", "nsa_decode"]
