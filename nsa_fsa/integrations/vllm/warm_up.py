"""Small steps that come before the first request, so that none waits for a kernel to be compiled.

Triton compiles a kernel for one sequence, and for several; and operators take other kernels for few
new tokens than for many. What decodes alone is compiled where vLLM captures its graphs.
"""

from collections.abc import Iterator
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa_fsa.integrations.vllm.batch import Batch, split
from nsa_fsa.ops.common.sizes import cdiv

# Of every sequence its new tokens, and how many were there before.
STEPS = (((20, 0),), ((300, 300),), ((1, 40), (1, 70), (20, 0), (30, 100)), ((300, 0), (400, 300)))


class SmallStep(NamedTuple):
    batch: Batch
    num_tokens: int
    num_pages: int  # that its tables name


def small_steps(
    page_size: int, max_length: int, num_tokens: int, device: torch.device
) -> Iterator[SmallStep]:
    """Those of `STEPS` that an engine can come to, in which sequences have at most `max_length`
    tokens, and steps `num_tokens`."""

    def numbers(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    most_pages = cdiv(max_length, page_size)
    for step in STEPS:
        new, totals = [x for x, _ in step], [sum(x) for x in step]
        if sum(new) > num_tokens or max(totals) > max_length:
            continue
        ends = [0, *accumulate(new)]
        used = cdiv(max(totals), page_size)  # pages of every sequence
        num_pages = 1 + len(step) * used  # vLLM's page 0 is nobody's
        pages = torch.arange(1, num_pages, dtype=torch.int32, device=device)
        table = pad(pages.view(len(step), used), (0, most_pages - used))
        said: Any = SimpleNamespace(
            query_start_loc=numbers(ends),
            query_start_loc_cpu=torch.tensor(ends, dtype=torch.int32),
            seq_lens=numbers(totals),
            seq_lens_cpu_upper_bound=torch.tensor(totals, dtype=torch.int32),
            block_table_tensor=table,
        )
        yield SmallStep(split(said, page_size, most_pages), sum(new), num_pages)
