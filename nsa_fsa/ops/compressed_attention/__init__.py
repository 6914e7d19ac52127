"""Attention over compressed tokens."""
