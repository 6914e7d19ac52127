"""Engines of vLLM inside the test's own process, where they start in seconds."""

import contextlib
import gc

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from tests.serving.checkpoints import NEW

PAGE = 64  # tokens; on a CPU, vLLM would take 128


@contextlib.contextmanager
def engine(folder, **options):
    """An engine in float32, which tells every difference."""
    defaults = dict(dtype="float32", max_model_len=1024, enforce_eager=True, block_size=PAGE)
    llm = LLM(str(folder), disable_log_stats=False, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def run(llm, prompts, **options):
    """The requests' outputs, in the order of the prompts."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **options)
    return llm.generate([{"prompt_token_ids": x} for x in prompts], sampling, use_tqdm=False)


def tokens_of(outputs):
    return [list(x.outputs[0].token_ids) for x in outputs]


def count(llm, name):
    """A counter of vLLM's."""
    return sum(x.value for x in llm.get_metrics() if x.name == f"vllm:{name}")
