"""What every test on a GPU leaves behind: no memory, for the next one's to be measured or to fit; and what several need."""

import gc
import os

import pytest
import torch

# Without it, PyTorch refuses matrix products under deterministic algorithms. Read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def no_memory_left_behind():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(params=[False, True], ids=["any_algorithm", "deterministic_algorithms"])
def deterministic(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)  # also fills new memory with NaN
    yield request.param
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def deterministic_only():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
