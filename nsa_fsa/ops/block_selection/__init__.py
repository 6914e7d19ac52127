"""The blocks of keys that each query reads."""
