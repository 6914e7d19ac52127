"""How many processes `make test-gpu` runs: one for every 12 GiB of the GPU's memory,
and no more than there are cores.

Each holds a CUDA context, its tensors and what the allocator keeps for it; one also runs the tests
that fill the memory. On a GPU of 80 GB, 12 processes fail for memory, and 4 and 6 do not; an H200,
with 141 GB, has room for 12.
"""

import os
import sys

import torch

GIB_PER_WORKER = 12


def workers(num_bytes: int, cores: int) -> int:
    """For a GPU with so much memory and so many cores beside it."""
    return max(1, min(num_bytes // (GIB_PER_WORKER * 2**30), cores))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(
            f"make test-gpu needs a CUDA GPU, and PyTorch {torch.__version__} sees none. "
            "Fix: make test, or another build: TORCH=..."
        )
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    if len(sys.argv) > 1:
        print(sys.argv[1])
    else:
        print(workers(torch.cuda.get_device_properties(0).total_memory, cores))


if __name__ == "__main__":
    main()
