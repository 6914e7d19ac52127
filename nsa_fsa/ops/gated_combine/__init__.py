"""The three branches, mixed by gates."""
