"""What backend="auto" would run, and why."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_fsa.config import NSAConfig
from nsa_fsa.decode import Pages
from nsa_fsa.decode.call import AppendCall, DecodeCall
from nsa_fsa.decode.operator import APPEND_BACKENDS
from nsa_fsa.decode.operator import BACKENDS as DECODE_BACKENDS
from nsa_fsa.modules.compression import POOLED
from nsa_fsa.modules.native_sparse_attention import NativeSparseAttention
from nsa_fsa.ops.common import profiler, triton_backends
from nsa_fsa.ops.common.backends import Backends
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Blocks, Windows, default_scale
from nsa_fsa.ops.compression.operator import GATHER_BACKENDS, POOL_BACKENDS, GatherCall, PoolCall
from nsa_fsa.ops.nsa_attention import OPERATORS, CoreCall
from nsa_fsa.ops.selected_attention.call import SelectedCall
from nsa_fsa.ops.selected_attention.operator import selected_key
from nsa_fsa.ops.sliding_window_attention import flash_attention
from nsa_fsa.ops.sliding_window_attention.operator import BACKENDS as SLIDING_BACKENDS
from nsa_fsa.sequences import Sequences

# Compute capabilities (NVIDIA, "CUDA GPU Compute Capability").
GPUS = {
    "v100": (7, 0),
    "t4": (7, 5),
    "a100": (8, 0),
    "a10": (8, 6),
    "rtx3090": (8, 6),
    "l4": (8, 9),
    "l40s": (8, 9),
    "rtx4090": (8, 9),
    "h100": (9, 0),
    "h200": (9, 0),
    "b200": (10, 0),
    "b300": (10, 3),
    "rtx5090": (12, 0),
}

# What an H200 copies in the time by which a step's launches take longer than full attention's, and
# which part of the rate of such a copy a step reaches: a fit to benchmarks/results/decode.
BYTES_OF_LAUNCHES, SHARE_OF_RATE = 80e6, 0.8


@dataclass(frozen=True)
class Choice:
    """One operator: what runs, what is known about it, and why each backend that comes before it
    cannot. Of "flash_attention" that is which library it runs, and why the others cannot."""

    operator: str
    backend: str
    why: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.backend} ({self.why})"]
        lines += [f"    not {name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """Every operator of the layer; printing it gives a readable page."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        return "\n".join(str(choice) for choice in self.choices)


def explain(
    config: NSAConfig,
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    gpu: str | None = None,
) -> Explanation:
    """What the layer's operators would run for `num_tokens` packed tokens,
    without running anything.

    What the layer would refuse is refused: it is made and called,
    on tensors that have a shape and no memory.

    Args:
        config: the layer; of a patched model, `NSAConfig.from_pretrained_config(model.config)`.
        num_tokens: rows of q, k and v.
        dtype: of q, k and v.
        device: default the GPU where there is one.
        gpu: what would run on another machine with such a GPU, such as "h100", "sm_90" or "9.0",
            and with Triton; which FlashAttention it has is taken from this machine. Not together
            with `device`.

    Returns:
        An `Explanation`, to be printed or read.

    Raises:
        ValueError: for what the layer would refuse, a device that is not there,
            or a GPU that is not known.
        RuntimeError: for a backend that cannot run on the machine.
    """
    if not isinstance(num_tokens, int) or not 1 <= num_tokens < 2**31:
        raise ValueError(
            f"num_tokens={num_tokens!r} must be an int from 1 to 2 ** 31 - 1, "
            "as far as the int32 of cu_seqlens counts. Fix: give the tokens of one batch."
        )
    if gpu is not None and device is not None:
        raise ValueError(
            f"device={str(device)!r} and gpu={gpu!r} are both given. Fix: pass one of them."
        )
    with triton_backends.assuming(None if gpu is None else capability_of(gpu)):
        where = torch.device("cuda") if gpu is not None else _present(device)
        _check_layer(config, num_tokens, dtype)
        runs = _runs(config, num_tokens, dtype, where)
        return Explanation(tuple(_explain(run) for run in runs))


def capability_of(gpu: str) -> tuple[int, int]:
    """The compute capability of a GPU's name ("h100") or architecture ("sm_90", "sm_90a", "9.0").

    Raises:
        ValueError: for one that is not known.
    """
    name = re.sub(r"[ _-]", "", gpu.lower()).removeprefix("nvidia")
    if name in GPUS:
        return GPUS[name]
    if (found := re.fullmatch(r"sm(\d+)(\d)[af]?|(\d+)\.(\d)", name)) is not None:
        major, minor = (int(x) for x in found.groups() if x is not None)
        return major, minor
    raise ValueError(
        f"gpu={gpu!r} is not known: allowed are {', '.join(GPUS)}, and compute capabilities. "
        "Fix: for example sm_90, or 9.0."
    )


def _present(device: torch.device | str | None) -> torch.device:
    """The device, by default the GPU where there is one."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        # The latter two come where PyTorch was built without the device. Its further sentences list
        # PyTorch's internals.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device={str(device)!r} is not here: {reason}. Fix: a device of this machine, "
            'or for another machine\'s GPU gpu="h100" (on the command line: --for h100).'
        ) from error
    return found


def _check_layer(config: NSAConfig, num_tokens: int, dtype: torch.dtype) -> None:
    """Makes the layer and calls it, without memory. On a CPU: without CUDA not even such parameters
    can be made on a GPU.
    """
    try:
        with FakeTensorMode():
            layer = NativeSparseAttention(config, device="cpu", dtype=dtype)
            layer(torch.empty(1, num_tokens, config.hidden_size, dtype=dtype))
    except (ValueError, RuntimeError):
        raise
    except Exception as error:
        # One of torch or transformers, about a number that neither this package nor Python minds.
        raise ValueError(
            f"the layer cannot run with this config: {type(error).__name__}: {error}"
        ) from error


class _Run(NamedTuple):
    """A call of an operator, and of which queries, where it is not of all."""

    operator: Backends[Any]
    call: Any
    queries: str | None = None


def _runs(
    config: NSAConfig, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> list[_Run]:
    """What the layer calls its operators with, in the order in which these run,
    on tensors that take no memory.
    """
    c, stride = config, config.kernel_stride
    with FakeTensorMode():

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        q, k, v = (
            new(num_tokens, c.num_heads, c.head_dim),
            *(new(num_tokens, c.num_kv_heads, x) for x in (c.head_dim, c.v_head_dim)),
        )
        k_cmp, v_cmp = (new(num_tokens // stride, c.num_kv_heads, x.shape[2]) for x in (k, v))
        lse = new(num_tokens, c.num_heads, dtype=torch.float32)
        block_indices = new(num_tokens, c.num_kv_heads, c.num_selected_blocks, dtype=torch.int32)
        o = new(num_tokens, c.num_heads, c.v_head_dim)
        gates = new(num_tokens, c.num_heads, 3)
        cu_seqlens = new(2, dtype=torch.int32)

    layout = Sequences(cu_seqlens, num_tokens)
    windows = Windows(c.kernel_size, stride)
    blocks = Blocks(c.block_size, c.init_blocks, c.local_blocks)
    core = CoreCall(
        *(q, k, v, k_cmp, v_cmp, gates, None, None),
        layout,
        default_scale(q, c.scale),
        *(windows, blocks, c.num_selected_blocks, c.window_size, WORKSPACE_BYTES),
        (),
        c.backend,
    )

    found: dict[str, _Run] = {}
    # Where both are compressed alike, the wider one counts.
    pairs = ((c.compress_k, k), (c.compress_v, v))
    for kind, x in sorted(pairs, key=lambda pair: pair[1].shape[2]):
        if kind in POOLED:
            pool = PoolCall(x, layout, windows, POOL_BACKENDS.or_auto(c.backend), None)
            found["pool"] = _Run(POOL_BACKENDS, pool)
        else:
            gather = GatherCall(x, layout, windows, GATHER_BACKENDS.or_auto(c.backend))
            found["gather"] = _Run(GATHER_BACKENDS, gather)

    of_core = (
        core.compressed(),
        core.selection(lse),
        core.selected(block_indices, None),
        core.sliding(),
        core.combination(o, o, o),
    )

    runs = [*found.values()]
    if num_tokens > c.dense_below:
        runs += map(_Run, OPERATORS, of_core)
    if c.dense_below:
        runs.append(_of_dense_queries(config, core))

    return runs + [_Run(*step) for step in _steps(config, core)]


def _of_dense_queries(config: NSAConfig, core: CoreCall) -> _Run:
    """Full attention of those of one sequence."""
    number = min(core.q.shape[0], config.dense_below)
    with FakeTensorMode():
        q, k, v = (
            torch.empty(number, *x.shape[1:], dtype=x.dtype, device=x.device)
            for x in (core.q, core.k, core.v)
        )
    sequences = core.sequences._replace(max_seqlen=number)
    call = dataclasses.replace(core, q=q, k=k, v=v, sequences=sequences).dense(config.dense_below)
    which = f"of the queries at positions below dense_below={config.dense_below:,}, over all keys"
    return _Run(SLIDING_BACKENDS, call, which)


def _steps(config: NSAConfig, core: CoreCall) -> list[tuple[Backends[Any], Any]]:
    """What a new token is decoded by, after as many as the core has; nothing for layers that decode
    by the operators of training: see `NSACache`."""
    c, dtype, device = config, core.q.dtype, core.q.device
    if c.kv_per_branch or not {c.compress_k, c.compress_v} <= {*POOLED}:
        return []
    with FakeTensorMode():

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        widths = (c.head_dim, c.v_head_dim)
        q, (k, v) = new(1, c.num_heads, c.head_dim), (new(1, c.num_kv_heads, x) for x in widths)
        gates, number = new(1, c.num_heads, 3), new(1, dtype=torch.int32)
        rows, table = core.q.shape[0], new(1, 1, dtype=torch.int32)
        k_cached, v_cached = (new(1, c.num_kv_heads, rows, x) for x in widths)
        k_cmp, v_cmp = (new(1, c.num_kv_heads, rows // c.kernel_stride, x) for x in widths)
    pages = Pages(k_cached, v_cached, k_cmp, v_cmp, table)
    append = AppendCall(
        *(k, v, pages, number, *(None,) * 7, core.windows, 1, 1), APPEND_BACKENDS.or_auto(c.backend)
    )
    decode = DecodeCall(
        *(q, gates, pages, number, core.scale, core.windows, core.blocks),
        *(c.num_selected_blocks, c.window_size, c.dense_below),
        DECODE_BACKENDS.or_auto(c.backend),
    )
    return [(APPEND_BACKENDS, append), (DECODE_BACKENDS, decode)]


def _explain(run: _Run) -> Choice:
    operator, call, queries = run
    chosen = operator.choose(call, warn=False).name
    passed_over = operator.passed_over(call) if call.backend == "auto" else {}

    why = [] if queries is None else [queries]
    if call.backend != "auto":
        why.append(f"backend={call.backend!r} was asked for")

    if operator.operator == "selected_attention" and chosen == "triton":
        why.append(_measured(selected_key, call))
    elif chosen == "flash_attention":
        reasons = flash_attention.obstacles(call)
        libraries = [library for library, reason in reasons.items() if reason is None]
        passed_over |= {name: reason for name, reason in reasons.items() if reason is not None}
        if len(libraries) == 1:
            why.append(f"{libraries[0]}, the only one that can run this")
        else:
            why.append(_measured(flash_attention.window_key, call, libraries))

    if operator.operator == "selected_attention" and (most := _blocks_of_neighbours(call, chosen)):
        why.append(f"neighbours that choose {most} blocks or fewer together read these at once")
    if operator in (APPEND_BACKENDS, DECODE_BACKENDS):
        why.append("a few new tokens of a cache, in inference")
    if operator is DECODE_BACKENDS and chosen == "triton":
        one, many = (float(f"{_breaks_even(call, number):.1e}") for number in (1, 32))
        why.append(
            f"as fast as full attention from about {one:,.0f} tokens of one sequence on, or "
            f"{many:,.0f} of each of 32, on an H200"
        )

    if not why[queries is not None :]:
        why.append("the first that can run this")

    reason = "; ".join(why)
    return Choice(operator.operator, chosen, reason, passed_over)


def _breaks_even(call: DecodeCall, num_sequences: int) -> float:
    """From which length of so many sequences on a new token takes no longer than with full
    attention, on an H200. By a model: both take as long as the bytes that they read, full attention
    by the rate of a copy, and NSA's launches add a constant."""
    _, num_kv_heads, _, head_dim = call.pages.k.shape
    width, size = head_dim + call.pages.v.shape[3], call.pages.k.element_size()
    token = num_sequences * num_kv_heads * width * size
    kept = call.num_selected_blocks * call.blocks.block_size + call.window_size
    of_every_token = 1 - 1 / call.windows.kernel_stride / SHARE_OF_RATE
    return (BYTES_OF_LAUNCHES / token + kept / SHARE_OF_RATE) / of_every_token


def _blocks_of_neighbours(call: SelectedCall, chosen: str) -> int:
    """How large the union of a tile of queries may be, by default, to go by it in the forward; 0
    where none does, something else was measured to be faster, or the GPU is not this machine's."""
    if triton_backends.ASSUMED.get() or chosen not in ("triton", "triton_kv_major"):
        return 0
    entry = profiler.known(selected_key(call, "forward"), call.device)
    if chosen == "triton" and entry is not None and not entry["choice"].startswith("kv_major"):
        return 0
    from nsa_fsa.ops.common import tuning  # imports Triton, which there is where this is asked
    from nsa_fsa.ops.selected_attention.unions import most_blocks

    return most_blocks(call, tuning.default_config(call.q, call.v, call.blocks.block_size))


def _measured(key_of: Callable[..., str], call: Any, among: Sequence[str] = ()) -> str:
    """What runs in each pass: what the profiler has timed before, or else the default,
    which is the first of `among`.
    """
    found = []
    for direction in ("forward", "backward"):
        entry = None
        if not triton_backends.ASSUMED.get():
            entry = profiler.known(key_of(call, direction), call.device)
        if entry is None or (among and entry["choice"] not in among):
            default = among[0] if among else "the default tiles"
            until = ", until it is first run and timed" if profiler.enabled() else ""
            found.append(f"{direction}: {default}{until}")
        else:
            choice, date = entry["choice"], entry["date"]
            ms = entry["ms"][choice]
            found.append(f"{direction}: {choice}, {ms:.2f} ms when timed on {date}")
    return "; ".join(found)
