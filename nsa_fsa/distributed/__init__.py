"""Several GPUs: context parallelism, where every rank has a part of each sequence, and, in
`tensor_parallel`, layers whose heads are split."""

from nsa_fsa.distributed.context_parallel import ContextParallel

__all__ = ["ContextParallel"]
