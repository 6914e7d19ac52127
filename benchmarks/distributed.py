"""What several GPUs bring: one process a GPU, as torchrun starts them, and each beside one GPU.

context: both passes of NSA's core, its compression included: "shared" by ranks that exchange tokens
for heads, in every possible number of groups of KV heads, and "alone", where every rank does all of
it. "exchange" is shared with nothing to compute. Of a shared row `default` says whether its number
of groups is the one that is taken by default.
module: the forward of a layer of Llama-3-8B whose heads are split, with the sum of its outputs.
prefill: the first token of a Llama-3-8B that transformers has split as it was loaded.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from benchmarks import generation
from nsa_fsa import NativeSparseAttention, NSAConfig, ops, patch_model
from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.cache import KeyValues
from nsa_fsa.distributed import ContextParallel
from nsa_fsa.distributed.context_parallel import Runs
from nsa_fsa.modules.branches import SparseBranches
from nsa_fsa.sequences import Sequences

# Of a part, a row's pass, the sizes of its case, and what was measured.
Add = Callable[[str, str, dict[str, Any], dict[str, Any]], None]
RUNS, WARM_UP = 5, 2
METHOD: dict[str, Any] = dict(
    timing=f"wall time from a barrier until the slowest rank's GPU is idle, median of {RUNS} after "
    f"{WARM_UP}; alone: every rank at once does all of it, the slowest counts"
)
# Query heads, KV heads and tokens; and how many ranks there must be.
SHARED = ((32, 8, 131072, 1), (32, 8, 262144, 1), (64, 4, 131072, 1), (64, 4, 1 << 20, 4))
CHECKED = (32, 8, 32768)
BLOCKS = ((64, 16), (128, 8))
LENGTHS = (32768, 65536)


def config_of(heads: int, kv_heads: int, block_size: int = 64, blocks: int = 16) -> NSAConfig:
    return NSAConfig(
        hidden_size=4096,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        block_size=block_size,
        num_selected_blocks=blocks,
    )


class Ranks:
    """The processes of this run, and what they measure together."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if device == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def largest(self, x: float) -> float:
        """Of all ranks."""
        found = torch.tensor(x, dtype=torch.float64, device=self.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return float(found)

    def time(self, call: Callable[[], Any]) -> dict[str, Any]:
        """Milliseconds of a call that every rank makes, and GiB of the fullest GPU."""
        times = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP + RUNS):
            self.wait()
            began = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(self.largest(1e3 * (time.perf_counter() - began)))
        times = times[WARM_UP:]
        found = dict(ms=statistics.median(times), ms_20=min(times), ms_80=max(times))
        if self.device.type == "cuda":
            found["peak_gib"] = self.largest(torch.cuda.max_memory_allocated() / 2**30)
        return found

    def wait(self) -> None:
        """Until all are here and their GPUs idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()


# --- Context parallelism --------------------------------------------------------------------------


class Shared(SparseBranches):
    """The inputs of the core, `[1, S, H, ...]`; with `cp` this rank's part of them, with S / n."""

    NAMES = ("q", "k", "v", "gate_logits")

    def __init__(self, case: Case, cp: ContextParallel | None, computed: bool = True) -> None:
        """computed: whether there is attention between the exchanges."""
        self.case, self.cp = case, cp
        self.attention = self._attend if computed else self._nothing
        self.leaves = [self._make(name).requires_grad_() for name in self.NAMES]
        self.do = self._make("do")

    def _make(self, name: str) -> Tensor:
        whole = self.case.make(name)[None]
        return whole if self.cp is None else self.cp.part(whole).clone()

    def forward(self) -> Tensor:
        if self.cp is not None:
            return self.cp.attend(self.attention, *self.leaves)
        return self.attention(slice(None), None, *(x.flatten(0, 1) for x in self.leaves))[None]

    @property
    def nsa_config(self) -> NSAConfig:
        return self.case.config

    def _attend(
        self, _: slice, runs: Runs | None, q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor
    ) -> Tensor:
        layout, windows = self.case.layout, self.case.windows
        k_cmp, v_cmp = (ops.pool_windows(x, None, **layout, **windows) for x in (k, v))
        keys = KeyValues(k, v, k, v, k, v)
        gates = gate_logits.flatten(1)
        return self.mix(q, keys, k_cmp, v_cmp, gates, Sequences(**layout), runs=runs)

    @staticmethod
    def _nothing(_: slice, runs: Runs | None, q: Tensor, *others: Tensor) -> Tensor:
        """Of the others the gradient is 0, which takes part in the exchange, too."""
        return q

    def both_passes(self) -> tuple[Tensor, ...]:
        o = self.forward()
        return (o.detach(), *torch.autograd.grad(o, self.leaves, self.do))


def errors(case: Case, cp: ContextParallel) -> dict[str, float]:
    """The largest difference of a result from that of one rank, by the latter's largest number."""
    mine, alone = Shared(case, cp).both_passes(), Shared(case, None).both_passes()
    found = {}
    for name, x, y in zip(("o", *(f"d{x}" for x in Shared.NAMES)), mine, alone, strict=True):
        whole = cp.part(y).float()
        found[name] = float((x.float() - whole).abs().max() / whole.abs().max())
    return found


def context(ranks: Ranks, add: Add) -> None:
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    heads, kv_heads, tokens = CHECKED
    case = Case(config_of(heads, kv_heads), tokens, device=str(ranks.device))
    for groups in ContextParallel(mesh).possible_groups(kv_heads):
        cp = ContextParallel(mesh, groups=groups)
        with deterministic():
            found = {name: ranks.largest(x) for name, x in errors(case, cp).items()}
            measured = ranks.time(Shared(case, cp).both_passes)
        sizes = case.sizes() | dict(groups=groups)
        add("context", "deterministic", sizes, measured | dict(errors=found))
    for heads, kv_heads, tokens, least in SHARED:
        case = Case(config_of(heads, kv_heads), tokens, device=str(ranks.device))
        if ranks.size < least:
            continue
        if least == 1:
            add("context", "alone", case.sizes(), ranks.time(Shared(case, None).both_passes))
            free(ranks)
        for groups in ContextParallel(mesh).possible_groups(kv_heads):
            cp, sizes = ContextParallel(mesh, groups=groups), case.sizes() | dict(groups=groups)
            for what, computed in dict(exchange=False, shared=True).items():
                measured = ranks.time(Shared(case, cp, computed).both_passes)
                default = groups == ContextParallel(mesh).groups
                add("context", what, sizes, measured | dict(default=default))
                free(ranks)


@contextmanager
def deterministic() -> Iterator[None]:
    """Additions in a fixed order, where an operator can have them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# --- Tensor parallelism ---------------------------------------------------------------------------


def module(ranks: Ranks, add: Add) -> None:
    """As a tensor-parallel layer is: its own heads, and the sum of all ranks' outputs."""
    for tokens in LENGTHS:
        for block_size, blocks in BLOCKS:
            whole = config_of(32, 8, block_size, blocks)
            mine = config_of(32 // ranks.size, 8 // ranks.size, block_size, blocks)
            case = Case(whole, tokens, device=str(ranks.device))
            layer = NativeSparseAttention(mine, device=ranks.device, dtype=case.dtype)
            x = case["x"]

            @torch.no_grad()
            def forward(layer: NativeSparseAttention = layer, x: Tensor = x) -> Tensor:
                y = layer(x)
                distributed.all_reduce(y)
                return y

            add("module", "forward", case.sizes(), ranks.time(forward))
            free(ranks)


def prefill(ranks: Ranks, add: Add, **changes: Any) -> None:
    """changes: of the model's config."""
    with tempfile.TemporaryDirectory() as made:
        folder = [made]
        distributed.broadcast_object_list(folder)  # the ranks of one host
        if ranks.rank == 0:
            generation.make_model(ranks.device.type, **changes).save_pretrained(folder[0])
            free(ranks)
        distributed.barrier()
        for block_size, blocks in BLOCKS:
            if ranks.rank == 0:
                save_patched(Path(folder[0]), f"{block_size}x{blocks}")
            distributed.barrier()
            split = dict(distributed_config=DistributedConfig(tp_size=ranks.size))
            model: Any = AutoModelForCausalLM.from_pretrained(
                Path(folder[0]) / "patched", dtype=torch.bfloat16, **split
            ).eval()
            for tokens in LENGTHS:
                ids = generation.prompt_of(model, tokens)
                sizes = generation.sizes_of(model, tokens) | dict(
                    block_size=block_size, num_blocks=blocks
                )

                @torch.no_grad()
                def first_token(model: Any = model, ids: Tensor = ids) -> Tensor:
                    return model(ids, logits_to_keep=1).logits.argmax(-1)

                add("prefill", "first_token", sizes, ranks.time(first_token))
            del model
            free(ranks)
        distributed.barrier()


def save_patched(folder: Path, preset: str) -> None:
    """Beside the dense checkpoint's files, the patched one's, which are the same but for what is
    new."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    patch_model(model, f"fsa-{preset}", verbose=False)
    model.save_pretrained(folder / "patched")


def free(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()


PARTS = {x.__name__: x for x in (context, module, prefill)}


def measure(results: Results | None, console: Console, parts: list[str], device: str) -> None:
    """results: of the first rank, None on others."""
    ranks = Ranks(device)

    def add(part: str, what: str, sizes: dict[str, Any], measured: dict[str, Any]) -> None:
        if results is None:
            return
        by = dict(implementation="nsa_fsa", kind="ours", num_gpus=ranks.size, variant=part)
        results.add("rows", **sizes | by, **{"pass": what, "errors": {}} | measured)
        where = f"{sizes['num_tokens']:,} tokens, {sizes['num_heads']} heads"
        found = "".join(f", {name} {x:.1e}" for name, x in measured.get("errors", {}).items())
        if "groups" in sizes:
            where += f", {sizes['groups']} groups{' (default)' * measured.get('default', False)}"
        text = f"{ranks.size} GPUs, {part}, {what}, {where}: {measured['ms']:.4g} ms{found}"
        console.print(text, highlight=False)

    for name in parts:
        PARTS[name](ranks, add)
