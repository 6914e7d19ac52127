"""Triton kernels. Only `nsa_fsa.ops` imports them, and only once a tensor needs them."""
