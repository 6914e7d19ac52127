"""Attention over the last tokens."""
