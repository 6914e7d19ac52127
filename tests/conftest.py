"""Settings that every test shares."""

import os
import zlib

import pytest
import torch


def pytest_configure(config):
    # The workers of pytest-xdist already use every core; more threads would only fight over them.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds torch from the test's name, so that a test fails alone as it does in company; printed when it fails."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    print(f"torch.manual_seed({value})")  # pytest shows captured output only for failures
    return value
