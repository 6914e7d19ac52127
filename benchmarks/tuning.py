"""Times ways to cut decoding's work on this machine's GPU: the default, and each change of it.

A change is a row of `CHANGES`; a case is one of `CASES`. Every result is compared with the
reference's before it is timed. What is faster on the GPUs that matter becomes the default, in
`nsa_fsa/decode/launch.py`.
"""

import contextlib
import dataclasses
import multiprocessing
from typing import Any

import pandas as pd
import torch
from triton.errors import TritonError

from nsa_fsa import NSAConfig
from nsa_fsa.benchmarking.check import WrongResult
from nsa_fsa.benchmarking.decoding import NSA_DECODE, DecodeCase, Step, append
from nsa_fsa.benchmarking.meter import CudaMeter
from nsa_fsa.decode.call import DecodeCall
from nsa_fsa.decode.launch import default_config, nsa_decode
from nsa_fsa.ops.common.calls import Blocks, Windows, default_scale

MOST_PROCESSES = 16  # that compile; each has the caches of some layers, up to 4 GiB
# Batch, tokens, query heads, KV heads and new tokens.
CASES = {
    "1 x 32K, G = 4": (1, 32768, 64, 16, 1),
    "1 x 64K, G = 4": (1, 65536, 64, 16, 1),
    "1 x 64K, G = 16": (1, 65536, 64, 4, 1),
    "1 x 256K, G = 16": (1, 262144, 64, 4, 1),
    "32 x 64K, G = 4": (32, 65536, 64, 16, 1),
    "32 x 64K, G = 16": (32, 65536, 64, 4, 1),
    "8 x 64K, G = 4": (8, 65536, 64, 16, 1),
    "8 x 64K, G = 4, 4 new": (8, 65536, 64, 16, 4),
    "1 x 64K, G = 4, 4 new": (1, 65536, 64, 16, 4),
    "8 x 64K, G = 4, 16 new": (8, 65536, 64, 16, 16),
    "8 x 64K, G = 16, 4 new": (8, 65536, 64, 4, 4),
    "1 x 64K, 32 heads, G = 4": (1, 65536, 32, 8, 1),
    "8 x 64K, 32 heads, G = 4": (8, 65536, 32, 8, 1),
}
CHANGES: dict[str, dict[str, int]] = {
    "default": {},
    "score in one step's memory": dict(score_stages=2),
    "score a step ahead": dict(score_stages=5),
    "score a step ahead by 4 warps": dict(score_stages=5, score_warps=4),
    "score a step ahead, 32 windows by 1 warp": dict(
        score_stages=5, score_windows=32, score_warps=1, score_least=8
    ),
    "score, 2 steps of 32 shares": dict(score_least=2, score_shares=32),
    "score, 4 steps of 32 shares": dict(score_least=4, score_shares=32),
    "score, 2 steps of 64 shares": dict(score_least=2, score_shares=64),
    "score, 4 steps of 64 shares": dict(score_least=4, score_shares=64),
    "choose by 1 warp": dict(choose_warps=1),
    "choose by 2 warps": dict(choose_warps=2),
    "choose by 4 warps": dict(choose_warps=4),
    "choose from lists of 512": dict(ranked=512),
    "choose from lists of 2048": dict(ranked=2048),
    "attend by 2 warps": dict(attend_warps=2),
    "attend in 4 and 4 shares": dict(shares=4, sliding_shares=4),
    "attend in 16 and 8 shares": dict(shares=16, sliding_shares=8),
    "as for several new": dict(score_least=4, shares=4),
    "as for one new": dict(score_least=2, shares=8),
    "score, 32 windows by 1 warp": dict(score_windows=32, score_warps=1),
    "score, 32 windows by 2 warps": dict(score_windows=32),
    "score, 128 windows by 4 warps": dict(score_windows=128, score_warps=4),
    "attend in one step's memory": dict(attend_stages=1),
    "attend a step ahead": dict(attend_stages=3),
    "attend, 32 keys by 2 warps": dict(attend_warps=2, keys=32),
    "attend, 32 keys by 1 warp": dict(attend_warps=1, keys=32),
}


def case_of(name: str) -> DecodeCase:
    batch, tokens, heads, kv_heads, new = CASES[name]
    config = NSAConfig(hidden_size=8192, num_heads=heads, num_kv_heads=kv_heads, head_dim=128)
    return DecodeCase(config, tokens, batch_size=batch, num_new=new)


def changed_step(case: DecodeCase, layer: int, change: dict[str, int]) -> Step:
    """A layer's step with another configuration."""
    c, pages, q = case.config, case.pages(layer), case["q"]
    config = dataclasses.replace(default_config(q, pages.v, case.num_new), **change)
    call = DecodeCall(
        *(q, case["gate_logits"], pages, case["lengths"], default_scale(q, c.scale)),
        Windows(c.kernel_size, c.kernel_stride),
        Blocks(c.block_size, c.init_blocks, c.local_blocks),
        *(c.num_selected_blocks, c.window_size, c.dense_below, "triton"),
    )

    def step() -> Any:
        append(case, layer)
        return nsa_decode(call, config)

    return step


def compile_one(job: tuple[str, str]) -> None:
    """In a process of its own: compiling takes longer than all the rest, and one core. What does
    not compile is told of where it is timed."""
    name, change = job
    case = dataclasses.replace(case_of(name), batch_size=1)
    with contextlib.suppress(RuntimeError, TritonError):
        changed_step(case, 0, CHANGES[change])()
        torch.cuda.synchronize()


def run(meter: CudaMeter, cases: list[str], changes: list[str]) -> pd.DataFrame:
    """Microseconds of a layer, by change and case; NaN where the result is wrong or none."""
    jobs = [(name, change) for name in cases for change in changes]
    processes = min(multiprocessing.cpu_count(), MOST_PROCESSES, len(jobs))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_one, jobs, chunksize=1)
    table = pd.DataFrame(index=changes, columns=cases, dtype=float)
    for name in cases:
        case = case_of(name)
        for change in changes:

            def function(case: Any, layer: int, change: str = change) -> Step:
                return changed_step(case, layer, CHANGES[change])

            way = dataclasses.replace(NSA_DECODE, function=function)
            try:
                call = way.passes(case)["forward"]
                way.check(case, "forward", call())
            except (WrongResult, RuntimeError, TritonError) as error:
                print(f"{change}, {name}: {error}", flush=True)
                continue
            table.loc[change, name] = 1e3 * meter.time(call)["ms"] / case.layers
        print(table[[name]].round(1).T.to_string(), flush=True)
        del case
        torch.cuda.empty_cache()
    return table
