"""Settings that every test shares."""

import gc
import importlib.util
import os
import sys
import zlib
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides once, while it is imported, whether it compiles kernels or runs
    # them on the CPU.
    assert "triton" not in sys.modules, "something imported Triton before TRITON_INTERPRET was set"
    os.environ["TRITON_INTERPRET"] = "1"
# On a GPU the profiler would time every shape that a test comes up with,
# and keep that in the user's cache.
os.environ["NSA_FSA_PROFILE"] = "0"
# Without it, PyTorch refuses matrix products under deterministic algorithms. Read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# Tests of the server have an environment of their own: see the Makefile.
NO_VLLM = importlib.util.find_spec("vllm") is None
collect_ignore = ["serving"] if NO_VLLM else []


def pytest_report_header():
    if NO_VLLM:
        return "tests/serving is left out: vLLM is not installed here. Fix: make test-serving"
    return None


def pytest_configure(config):
    # The workers of pytest-xdist already use every core; more threads would only fight over them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds torch from the test's name, so that a test fails alone as it does in company;
    printed when it fails.
    """
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    print(f"torch.manual_seed({value})")  # pytest shows captured output only for failures
    return value


@pytest.fixture(autouse=True)
def float32_products():
    """What torch was told of them comes back: the Trainer has them rounded to tf32,
    in the whole process, where it compiles.
    """
    matmul = torch.backends.cuda.matmul
    before = torch.backends.fp32_precision, matmul.fp32_precision
    yield
    torch.backends.fp32_precision, matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def no_tapes():
    """A test may replace a function that the tape of an earlier test would still call."""
    from nsa_fsa.ops.common import replay

    replay.TAPES.clear()


@pytest.fixture(autouse=True)
def no_memory_left_behind(request):
    """What a test on a GPU leaves behind is freed, for the next one's to be measured or to fit."""
    yield
    if request.node.get_closest_marker("gpu"):
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
