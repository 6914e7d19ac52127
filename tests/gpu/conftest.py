"""What every test on a GPU leaves behind: no memory, for the next one's to be measured or to fit;
and what several need.
"""

import gc
import os
from contextlib import contextmanager

import pytest
import torch

# Without it, PyTorch refuses matrix products under deterministic algorithms. Read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def no_memory_left_behind():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def deterministic_algorithms(on):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)  # also fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=[False, True], ids=["any_algorithm", "deterministic_algorithms"])
def deterministic(request):
    with deterministic_algorithms(request.param):
        yield request.param


@pytest.fixture
def deterministic_only():
    with deterministic_algorithms(True):
        yield
