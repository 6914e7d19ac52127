"""Attention over the windows of a query's past: compressed attention, and the sliding window."""
