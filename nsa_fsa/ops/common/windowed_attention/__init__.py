"""Attention over windows of tokens, of which a query sees those in its past: compressed attention,
and the sliding window.
"""
