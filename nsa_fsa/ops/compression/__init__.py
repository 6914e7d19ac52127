"""Windows of keys and values to compressed tokens."""
