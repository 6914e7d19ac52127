"""An engine of vLLM in a process of its own, and what is measured of it: `python -m
benchmarks.engine PLAN FILE_DESCRIPTOR` reads a plan from a file, and writes a line of JSON for
every part of it. `serving` starts it.
"""

import asyncio
import dataclasses
import json
import math
import os
import random
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Send = Callable[[dict[str, Any]], None]
FEWEST_STEPS = 8  # that all requests of a batch decode together, or nothing is said of them


class Part(NamedTuple):
    """Something that is measured: "first_token", "decode", "agreement" or "load"."""

    kind: str
    num_tokens: int  # of each prompt; of the longest one in a load
    batch_size: int = 1
    rate: float | None = None  # requests a second of a load

    def where(self) -> dict[str, Any]:
        """What an entry of the results says of it."""
        variant = None if self.rate is None else f"{self.rate:g}/s"
        sizes = dict(num_tokens=self.num_tokens, batch_size=self.batch_size)
        return {"pass": self.kind, **sizes, "variant": variant}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an engine is told, and what is measured of it."""

    parts: tuple[Part, ...]
    engine: dict[str, Any]  # the arguments of vLLM's AsyncEngineArgs
    vocab_size: int
    new_tokens: int = 256  # of every answer but those of which only the first token counts
    runs: int = 5  # of a first token, after one that does not count
    shortest: int = 1024  # prompt of a load
    seconds: float = 60.0  # in which the requests of a load come
    limit: float = 300.0  # seconds that a part may take; a load, after its last request

    @staticmethod
    def read(path: Path) -> "Plan":
        fields = json.loads(path.read_text())
        return Plan(**fields | dict(parts=tuple(Part(*x) for x in fields["parts"])))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    def limit_of(self, part: Part) -> float:
        return self.limit + self.seconds if part.kind == "load" else self.limit

    def prompts(self, part: Part) -> list[list[int]]:
        """The same ones for every engine."""
        rng = random.Random(str(part))
        sizes = [part.num_tokens] * part.batch_size
        return [rng.choices(range(self.vocab_size), k=size) for size in sizes]


class Answer(NamedTuple):
    tokens: list[int]
    asked: float  # seconds, as all times here
    times: list[float]  # when each token came

    @property
    def waited(self) -> float:
        """Milliseconds until there was a token."""
        return 1e3 * (self.times[0] - self.asked)


async def complete(engine: Any, prompt: list[int], new_tokens: int) -> Answer:
    """The greedy continuation of a prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    answer = Answer([], time.perf_counter(), [])
    request = dict(prompt_token_ids=prompt)
    async for output in engine.generate(request, sampling, uuid.uuid4().hex):
        found = output.outputs[0].token_ids
        answer.tokens.extend(found)
        answer.times.extend([time.perf_counter()] * len(found))
    if len(answer.tokens) != new_tokens:
        raise ValueError(f"{len(answer.tokens)} tokens came instead of {new_tokens}.")
    return answer


async def first_token(engine: Any, plan: Plan, part: Part) -> dict[str, Any]:
    """Milliseconds until the first token of a prompt that is alone."""
    prompts = plan.prompts(part._replace(batch_size=plan.runs + 1))
    times = [(await complete(engine, prompt, 1)).waited for prompt in prompts]
    return summary(times[1:]) | dict(times=times[1:])


async def decode(engine: Any, plan: Plan, part: Part) -> dict[str, Any]:
    """Milliseconds of a step, and tokens a second, while all requests decode: from the last of the
    first tokens until one has all of its tokens."""
    needed, room = part.batch_size * (part.num_tokens + plan.new_tokens), room_of(engine)
    if needed > room:
        raise ValueError(f"its {needed:,} tokens do not fit into caches of {room:,}.")
    prompts = plan.prompts(part)
    began = time.perf_counter()
    answers = await asyncio.gather(*(complete(engine, x, plan.new_tokens) for x in prompts))
    took = time.perf_counter() - began
    start, end = max(x.times[0] for x in answers), min(x.times[-1] for x in answers)
    inside = [[t for t in x.times if start <= t <= end] for x in answers]
    steps = min(len(times) for times in inside) - 1
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"all requests decode together for only {max(steps, 0)} of {plan.new_tokens} tokens. "
            "Fix: more --new-tokens, or a larger --chunk."
        )
    tokens = sum(len(times) - 1 for times in inside)
    return summary(gaps(inside)) | dict(
        ms=1e3 * (end - start) * part.batch_size / tokens,
        tokens_per_s=tokens / (end - start),
        steps=steps,
        with_prefill_tokens_per_s=part.batch_size * plan.new_tokens / took,
    )


async def agreement(engine: Any, plan: Plan, part: Part) -> dict[str, Any]:
    """The tokens, which transformers judges once the engine has left the GPU."""
    prompts = plan.prompts(part)
    answers = await asyncio.gather(*(complete(engine, x, plan.new_tokens) for x in prompts))
    return dict(tokens=[x.tokens for x in answers])


async def load(engine: Any, plan: Plan, part: Part) -> dict[str, Any]:
    """Milliseconds until the first token, and between tokens, where requests come at random."""
    assert part.rate is not None
    rng = random.Random(str(part))
    bounds = (math.log(plan.shortest), math.log(part.num_tokens))
    before, loop = memory_in_use(), asyncio.get_running_loop()
    began, due, tasks = loop.time(), 0.0, []
    while (due := due + rng.expovariate(part.rate)) < plan.seconds:
        size = round(math.exp(rng.uniform(*bounds)))
        prompt = rng.choices(range(plan.vocab_size), k=size)
        await asyncio.sleep(began + due - loop.time())
        tasks.append(asyncio.create_task(complete(engine, prompt, plan.new_tokens)))
    if not tasks:
        raise ValueError(f"no request came in {plan.seconds:g} s. Fix: a larger --rate.")
    done, late = await asyncio.wait(tasks, timeout=0.9 * plan.limit)
    took = loop.time() - began
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    failed = [str(x.exception()) for x in done if x.exception() is not None]
    answers = [x.result() for x in done if x.exception() is None]
    if not answers:
        raise ValueError(f"none of {len(tasks)} requests had an answer: {(failed or ['late'])[0]}")
    between = gaps([x.times for x in answers])
    return summary([x.waited for x in answers]) | dict(
        ms_99=float(np.percentile([x.waited for x in answers], 99)),
        between_tokens_ms=float(np.percentile(between, 50)),
        between_tokens_ms_99=float(np.percentile(between, 99)),
        requests=len(tasks),
        failed=len(failed),
        failures=sorted(set(failed))[:5],
        unfinished=len(late),
        tokens_per_s=sum(len(x.tokens) for x in answers) / took,
        memory_gib=[before, memory_in_use()],
    )


MEASURED: dict[str, Callable[[Any, Plan, Part], Coroutine[Any, Any, dict[str, Any]]]] = dict(
    first_token=first_token, decode=decode, agreement=agreement, load=load
)


def summary(times: list[float]) -> dict[str, Any]:
    """The median of milliseconds, and between what most of them lie."""
    low, median, high = np.percentile(times, (20, 50, 80)).tolist()
    return dict(ms=median, ms_20=low, ms_80=high)


def gaps(times: list[list[float]]) -> list[float]:
    """Milliseconds from each token to the next of the same answer."""
    return [1e3 * (b - a) for answer in times for a, b in pairwise(answer)]


def memory_in_use() -> float | None:
    """Of the GPU, by all processes, in GiB."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def room_of(engine: Any) -> int:
    """How many tokens the caches hold."""
    cache = engine.vllm_config.cache_config
    return cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size


def about(engine: Any) -> dict[str, Any]:
    """What an engine settled on."""
    c = engine.vllm_config
    return dict(
        cache_tokens=room_of(engine),
        block_size=c.cache_config.block_size,
        graphs=c.compilation_config.cudagraph_mode.name,
        chunk=c.scheduler_config.max_num_batched_tokens,
        most_requests=c.scheduler_config.max_num_seqs,
    )


async def measure_parts(engine: Any, plan: Plan, send: Send) -> None:
    """A part that does not run says why, and the next one runs."""
    for part in plan.parts:
        send(dict(begun=part))
        limit = plan.limit_of(part)
        try:
            found = await asyncio.wait_for(MEASURED[part.kind](engine, plan, part), limit)
        except Exception as error:  # a part may raise anything
            reason = str(error).strip() or f"it took more than {limit:g} s"
            found = dict(reason=f"{type(error).__name__}: {reason}".splitlines()[0][:300])
        send(dict(part=part, found=found))


async def measure(plan: Plan, send: Send) -> None:
    """Starts an engine, and ends it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    began = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**plan.engine))
    try:
        send(dict(engine=about(engine) | dict(start_s=time.perf_counter() - began)))
        await measure_parts(engine, plan, send)
    finally:
        engine.shutdown()
        del engine  # while the modules that its end needs are there


def main(plan: str, descriptor: str) -> None:
    os.set_inheritable(int(descriptor), False)
    with os.fdopen(int(descriptor), "w") as output:

        def send(message: dict[str, Any]) -> None:
            print(json.dumps(message), file=output, flush=True)

        asyncio.run(measure(Plan.read(Path(plan)), send))


if __name__ == "__main__":
    main(*sys.argv[1:])
