"""Training on several GPUs: context parallelism, where every rank has a part of each sequence."""

from nsa_fsa.distributed.context_parallel import ContextParallel

__all__ = ["ContextParallel"]
