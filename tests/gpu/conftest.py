"""What every test on a GPU leaves behind: no memory, for the next one's to be measured or to fit."""

import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def no_memory_left_behind():
    yield
    gc.collect()
    torch.cuda.empty_cache()
