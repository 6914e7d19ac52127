"""Processes that share a group, of one program that has imported everything once: of gloo, or of
NCCL where GPUs are visible."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[2]


def printed_by(module, *arguments, gpus=False):
    """The lines that `python -m module ...` prints, on the CPU unless GPUs are asked for."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout.splitlines()


def on_ranks(function, size, folder, *arguments):
    """Calls `function(*arguments)` in as many processes; raises what one of them raises."""
    store = Path(folder) / f"{function.__name__}_{size}"
    start_processes(_rank, (size, store, function, arguments), nprocs=size, start_method="fork")


def _rank(rank, size, store, function, arguments):
    numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update({name: str(x) for name, x in numbers.items()}, MASTER_ADDR="localhost")
    torch.set_num_threads(1)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(rank)
    init = f"file://{store}"
    distributed.init_process_group(backend, init_method=init, rank=rank, world_size=size)
    function(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()


def say(*words):
    """Prints on the first rank."""
    if distributed.get_rank() == 0:
        print(*words, flush=True)


def summed(x):
    """The sum over all ranks."""
    x = x.detach().clone()
    distributed.all_reduce(x)
    return x
