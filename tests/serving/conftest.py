"""What engines are told, before vLLM is imported; and checkpoints that several tests share."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from typing import NamedTuple

import pytest

from tests.serving import checkpoints


class Served(NamedTuple):
    folder: str
    model: object  # of transformers
    prompts: list  # of tokens
    expected: list  # what the model continues them by


@pytest.fixture(scope="session")
def make_served(tmp_path_factory):
    """A function of `make_checkpoint`'s arguments."""

    def make(family="llama", **options):
        folder = str(tmp_path_factory.mktemp(family))
        model = checkpoints.make_checkpoint(folder, family, **options)
        prompts = checkpoints.make_prompts()
        return Served(folder, model, prompts, checkpoints.continue_greedily(model, prompts))

    return make


@pytest.fixture(scope="session")
def llama(make_served):
    return make_served("llama", compress_k="weighted", compress_v="weighted")
