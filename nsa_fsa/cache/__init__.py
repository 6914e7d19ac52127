"""Decode state of a layer: keys, values, compressed keys and values, and the open window."""

from nsa_fsa.cache.nsa_cache import KeyValues, NSACache, Step

__all__ = ["KeyValues", "NSACache", "Step"]
