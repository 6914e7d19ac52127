"""Compiles every Triton kernel of nsa_fsa for several GPU architectures, without a GPU, and checks
what each one needs.

The package's own host functions run on tensors that have a shape and no memory, and what they
launch is compiled instead of launched. So the tile sizes, warps and stages checked are the ones
that the package ships. A kernel fails the check if it does not compile, takes too long to, keeps
values in local memory (spills), wants more shared memory than the architecture has, or multiplies a
stride in 32 bits.

    python scripts/check_resources.py                  # the default configurations, as `make test`
    python scripts/check_resources.py --all --jobs 8   # all of them: an hour of one core
    python scripts/check_resources.py --arch sm_90 --head-dim 256 --dtype fp16
"""

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

# Before Triton is imported: an interpreted kernel cannot be compiled.
os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton_ir import faults

from nsa_fsa.decode.append import append_tokens
from nsa_fsa.decode.call import AppendCall, DecodeCall
from nsa_fsa.decode.launch import nsa_decode
from nsa_fsa.decode.pages import Pages
from nsa_fsa.ops.block_divergence.call import DivergenceCall
from nsa_fsa.ops.block_divergence.launch import block_divergence, block_divergence_backward
from nsa_fsa.ops.block_selection.call import SelectionCall
from nsa_fsa.ops.block_selection.triton import select_blocks
from nsa_fsa.ops.common import tuning
from nsa_fsa.ops.common.calls import NOTHING, AddTo, Blocks, Softmax, Windows
from nsa_fsa.ops.common.windowed_attention.backward import windowed_attention_bwd
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.common.windowed_attention.forward import windowed_attention_fwd
from nsa_fsa.ops.compression import triton as compress
from nsa_fsa.ops.gated_combine import triton as gated_combine
from nsa_fsa.ops.selected_attention.block_index import build_block_index
from nsa_fsa.ops.selected_attention.call import IndexCall, SelectedCall
from nsa_fsa.ops.selected_attention.launch import KVMajor, QueryMajor, Way
from nsa_fsa.sequences import Sequences

console = Console()

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
BLOCK_SIZES = (16, 32, 64, 128)
GROUP_SIZES = (1, 4, 16)
# Shared memory that one block of threads can have, in KiB (CUDA C++ programming guide, compute
# capabilities).
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 82,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
}

TENSOR_MEMORY_COLUMNS = 512  # of Blackwell's tensor memory; other architectures report 0
# Bytes of stack a thread that are not yet a spill worth the name: four registers. 8 bytes were one
# store and one load in the SASS of the kernels where ptxas left them; kernels that run out of
# registers need 24 bytes and usually hundreds.
STACK_ALLOWED = 16
# Where a kernel needs more, how much, and what was measured on an H200 (65,536 tokens, G = 1).
#
# dk and dv: the computing threads hold 240 of their registers in products and accumulators; what
# they put away are pointers for the end and one load a step. It takes 15.4 ms; with 232 registers,
# and 40 instead of 24 for the loading threads, 15.7. With dq as well it is 56 to 64 bytes at G = 1,
# and five loads a step.
#
# Forward: with Triton 3.6, packed sequences take 24 to 32 bytes whatever the registers are (208 to
# 232), one sequence 8 to 16. They are written once a program and read back between tiles, which
# takes 7.7 to 7.9 ms with any of these. Of selected attention by unions it is 16 to 40 bytes where
# heads are 128 wide, and the same: nothing of it inside the loop over blocks, which SASS shows.
STACK_KNOWN = {
    "compressed_bwd_dkdv_hopper_kernel": 64,
    "compressed_fwd_hopper_kernel": 32,
    "union_fwd_hopper_kernel": 40,
}
# plain is what a layer calls. chunked has a small workspace, counts, and no promise about forced
# blocks. candidates is plain with every configuration that the profiler tries; it leaves out what
# does not run. decoding is what a few new tokens launch.
VARIANTS = ("plain", "chunked", "candidates", "decoding")
NUM_TOKENS, NUM_HEADS = 4096, 64


@dataclass(frozen=True)
class Case:
    """One call of each operator, for one architecture."""

    arch: str
    head_dim: int
    value_dim: int
    dtype: str
    block_size: int
    group_size: int
    variant: str = "plain"


@dataclass(frozen=True)
class Row:
    """What one compiled kernel needs."""

    kernel: str
    case: Case
    call: str = ""  # the host function that launched it first
    warps: int = 0
    registers: int = 0
    stack: int = 0  # bytes a thread
    shared: int = 0  # bytes
    tensor_memory: int = 0  # columns
    seconds: float = 0.0
    error: str = ""
    hash: str = ""

    @property
    def failure(self) -> str:
        """Why this kernel cannot be shipped; empty if it can."""
        limit = SHARED_KIB[self.case.arch] * 1024
        reasons = [self.error] if self.error else []
        if self.stack > STACK_KNOWN.get(self.kernel, STACK_ALLOWED):
            reasons.append(f"spills {self.stack:,} B")
        if self.shared > limit:
            reasons.append(f"shared memory {self.shared / 1024:.0f} > {limit // 1024} KiB")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            reasons.append(f"tensor memory {self.tensor_memory} > {TENSOR_MEMORY_COLUMNS} columns")
        return "; ".join(reasons)


def call_operators(case: Case, enter: Callable[[str], None]) -> None:
    """Calls every host function that launches kernels, on tensors without memory; `enter` is told
    which one comes."""
    dtype, block_size = DTYPES[case.dtype], case.block_size
    num_kv_heads = NUM_HEADS // case.group_size
    # 1,024 keys a query, as in both of the FSA paper's settings.
    num_indices = max(1024 // block_size, 4)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, do = new(NUM_TOKENS, NUM_HEADS, case.head_dim), new(NUM_TOKENS, NUM_HEADS, case.value_dim)
    k, v = (
        new(NUM_TOKENS, num_kv_heads, case.head_dim),
        new(NUM_TOKENS, num_kv_heads, case.value_dim),
    )
    if case.variant == "decoding":
        call_decoding(case, q, k, v, num_indices, enter)
        return
    indices = new(NUM_TOKENS, num_kv_heads, num_indices, dtype=torch.int32)
    cu_seqlens = new(2, dtype=torch.int32)
    plain = case.variant != "chunked"
    counts = None if plain else new(NUM_TOKENS, num_kv_heads, dtype=torch.int32)
    blocks = Blocks(block_size, *((1, 2) if plain else (0, 0)))
    lse = call_selected_attention(case, (q, k, v, do), indices, counts, cu_seqlens, blocks, enter)
    if case.variant == "candidates":
        return
    call_compression(k, cu_seqlens, enter)
    call_compressed_attention(case, q, do, enter)
    call_sliding_window(case, q, do, enter)
    call_gated_combine(do, lse, enter)
    call_selection(case, q, k, cu_seqlens, num_indices, enter)
    call_divergence(case, q, k, indices, enter)


def call_selected_attention(
    case: Case,
    tensors: tuple[torch.Tensor, ...],
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    blocks: Blocks,
    enter: Callable[[str], None],
) -> torch.Tensor:
    """Both loop orders, or all that the profiler tries, of q, k, v and do, forward also where these
    follow a past; returns an lse."""
    q, k, v, do = tensors
    # With an unlimited workspace all heads are done at once, with a tiny one ranges of one head.
    workspace_bytes = 1 << 20 if case.variant == "chunked" else 1 << 50
    sequences, scale = Sequences(cu_seqlens, NUM_TOKENS), case.head_dim**-0.5
    call = SelectedCall(
        q, k, v, sequences, scale, workspace_bytes, "triton", blocks, indices, counts, None
    )
    enter("block_index")
    call = replace(call, index=build_block_index(IndexCall.of(call)))

    ways: dict[str, dict[str, Way]] = {}
    for direction in ("forward", "backward"):
        configs = tuning.candidates(q, v, case.block_size, direction)
        if case.variant != "candidates":
            configs = {"kv_major": tuning.default_config(q, v, case.block_size)}
        ways[direction] = {name: KVMajor(config) for name, config in configs.items()}
        ways[direction] |= {} if case.variant == "candidates" else {"query_major": QueryMajor()}
    for name, way in ways["forward"].items():
        enter(f"{name} forward")
        o, lse = way.forward(call)
        enter(f"{name} forward without a backward to come")
        way.forward(replace(call, index=None))
    after_a_past = Sequences(cu_seqlens, NUM_TOKENS, cu_seqlens, cu_seqlens[1:])
    chunk = replace(call, sequences=after_a_past)
    enter("block_index after a past")
    chunk = replace(chunk, index=build_block_index(IndexCall.of(chunk)))
    for name, way in ways["forward"].items():
        enter(f"{name} forward after a past")
        way.forward(chunk)
    for name, way in ways["backward"].items():
        enter(f"{name} backward")
        softmax = Softmax(o, lse)
        way.backward(call, do, softmax, NOTHING)
        # As `nsa_attention` has it: delta is known, and gradients are added to others.
        grads = AddTo(*(x.new_empty(x.shape) for x in (q, k, v)))
        way.backward(call, do, softmax._replace(delta=lse), grads)
    return lse


def call_compression(
    k: torch.Tensor, cu_seqlens: torch.Tensor, enter: Callable[[str], None]
) -> None:
    """Windows of two hops, as in both papers, pooled with learned weights and with equal ones,
    and gathered."""
    sequences, windows = Sequences(cu_seqlens, NUM_TOKENS), Windows(32, 16)
    num_windows, num_heads, width = NUM_TOKENS // 16, *k.shape[1:]
    dpooled = k.new_empty(num_windows, num_heads, width)
    dwindows = k.new_empty(num_windows, num_heads, 32, width)
    for weight in (k.new_empty(num_heads, 32, dtype=torch.float32), None):
        enter("pool_windows")
        compress.pool_windows(k, weight, sequences, windows)
        enter("pool_windows_backward")
        compress.pool_windows_backward(dpooled, k, weight, sequences, windows)
    enter("gather_windows")
    compress.gather_windows(k, sequences, windows)
    enter("gather_windows_backward")
    compress.gather_windows_backward(dwindows, k, sequences, windows)


def windowed_call(
    case: Case,
    q: torch.Tensor,
    num_sequences: int,
    windows: Windows,
    window_size: int | None = None,
    max_seqlen: int = NUM_TOKENS,
) -> WindowedCall:
    """Attention over as many windows as NUM_TOKENS keys have."""
    num_windows, num_kv_heads = NUM_TOKENS // windows.kernel_stride, q.shape[1] // case.group_size
    k, v = (q.new_empty(num_windows, num_kv_heads, x) for x in (case.head_dim, case.value_dim))
    sequences = Sequences(q.new_empty(num_sequences + 1, dtype=torch.int32), max_seqlen)
    scale, workspace_bytes = case.head_dim**-0.5, 1 << 30
    return WindowedCall(q, k, v, sequences, scale, workspace_bytes, "triton", windows, window_size)


def call_compressed_attention(
    case: Case, q: torch.Tensor, do: torch.Tensor, enter: Callable[[str], None]
) -> None:
    """Of one whole sequence, of several, of several of one length, and of one of few heads, whose
    rows are cut into parts."""
    bounds = (NUM_TOKENS, 1 << 20)  # in two passes, and in one
    for name, num_sequences, num_heads, lengths in (
        ("one", 1, NUM_HEADS, bounds),
        ("several", 3, NUM_HEADS, bounds),
        ("several alike", 4, NUM_HEADS, (NUM_TOKENS // 4,)),
        ("one of few heads", 1, case.group_size, bounds),
    ):
        q, do = q[:, :num_heads], do[:, :num_heads]
        for max_seqlen in lengths:
            call = windowed_call(case, q, num_sequences, Windows(32, 16), max_seqlen=max_seqlen)
            enter(f"compressed_attention_fwd of {name}")
            o, lse = windowed_attention_fwd(call)

            enter(f"compressed_attention_bwd of {name}")
            windowed_attention_bwd(call, do, Softmax(o, lse))
            part_of_the_whole = AddTo(q.new_empty(q.shape))
            windowed_attention_bwd(call, do, Softmax(None, lse, lse), part_of_the_whole)


def call_sliding_window(
    case: Case, q: torch.Tensor, do: torch.Tensor, enter: Callable[[str], None]
) -> None:
    """The same kernels, to which each token is a window of its own,
    of one sequence and of several."""
    for num_sequences in (1, 3):
        call = windowed_call(case, q, num_sequences, Windows(1, 1), 512)
        enter(f"sliding_window_fwd of {num_sequences}")
        o, lse = windowed_attention_fwd(call)
        enter(f"sliding_window_bwd of {num_sequences}")
        windowed_attention_bwd(call, do, Softmax(o, lse))


def call_gated_combine(do: torch.Tensor, lse: torch.Tensor, enter: Callable[[str], None]) -> None:
    """With a gate for every head, and with one that the heads share."""
    for num_gates in (NUM_HEADS, 1):
        logits = do.new_empty(NUM_TOKENS, num_gates, 3)
        enter(f"gated_combine with {num_gates} gates")
        gated_combine.gated_combine(logits, do, do, do)
        enter(f"gated_combine_backward with {num_gates} gates")
        gated_combine.gated_combine_backward(do, logits, do, do, do)
        enter(f"branch_gradients with {num_gates} gates")
        gated_combine.branch_gradients(do, [do] * 3, [lse] * 3, logits)
        gated_combine.branch_gradients(do, [None, do, None], [lse] * 3, logits)


def call_selection(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_indices: int,
    enter: Callable[[str], None],
) -> None:
    """With windows of two hops, or of one where a block has no room for two."""
    lse = q.new_empty(NUM_TOKENS, NUM_HEADS, dtype=torch.float32)
    windows = Windows(min(32, case.block_size), 16)
    blocks, scale = Blocks(case.block_size, 1, 2), case.head_dim**-0.5
    tensors = (q, k[: NUM_TOKENS // 16], lse)
    alike = Sequences(q.new_empty(5, dtype=torch.int32), NUM_TOKENS // 4)
    for sequences in (Sequences(cu_seqlens, NUM_TOKENS), alike):
        enter("select_blocks")
        call = SelectionCall(*tensors, sequences, scale, windows, blocks, num_indices, "triton")
        select_blocks(call)


def call_divergence(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    indices: torch.Tensor,
    enter: Callable[[str], None],
) -> None:
    """Of all compared blocks and of free ones, of one sequence and of several."""
    lse = q.new_empty(NUM_TOKENS, NUM_HEADS, dtype=torch.float32)
    do = q.new_empty(NUM_TOKENS, k.shape[1], dtype=torch.float32)
    windows, blocks = Windows(min(32, case.block_size), 16), Blocks(case.block_size, 1, 2)
    tensors = (q, k, k[: NUM_TOKENS // 16], lse, lse, indices)
    for free_only, num_sequences in ((0, 1), (1, 3)):
        sequences = Sequences(q.new_empty(num_sequences + 1, dtype=torch.int32), NUM_TOKENS)
        rest = (sequences, case.head_dim**-0.5, windows, blocks, free_only, 1 << 30, "triton")
        call = DivergenceCall(*tensors, *rest)
        enter("block_divergence")
        block_divergence(call)
        enter("block_divergence_backward")
        block_divergence_backward(call, do)


def call_decoding(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_indices: int,
    enter: Callable[[str], None],
) -> None:
    """One new token and several, of sequences in pages and in one page each."""
    windows, blocks = Windows(min(32, case.block_size), 16), Blocks(case.block_size, 1, 2)
    num_heads, of_windows = k.shape[1], (k.shape[1], windows.kernel_size)
    logits, lengths = k.new_empty(of_windows, dtype=torch.float32), k.new_empty(4).int()
    half = case.head_dim // 2
    turn = k.new_empty(2, windows.kernel_size, half, dtype=torch.float32)
    for num_new, page_size in ((1, 64), (4, 64), (1, NUM_TOKENS)):
        table = k.new_empty(4, NUM_TOKENS // page_size, dtype=torch.int32)
        pages = Pages.empty(
            *(table.numel(), page_size, num_heads, case.head_dim, case.value_dim),
            *(windows.kernel_stride, table, k.dtype),
        )
        number = 4 * num_new
        cos = k.new_empty(number, 2 * half)
        learned = (
            *(logits, k.new_empty(*of_windows, case.head_dim)),
            *(logits, v.new_empty(*of_windows, case.value_dim)),
        )
        for pooling, rotation in (
            (learned, (turn, cos, cos)),
            ((logits, None) * 2, (None,) * 3),
            ((None, None) * 2, (None,) * 3),
        ):
            enter(f"append_tokens, {num_new} in pages of {page_size}")
            append_tokens(
                AppendCall(
                    *(k[:number], v[:number], pages, lengths, *pooling, *rotation),
                    *(windows, 1, 1, "triton"),
                )
            )
        gates, scale = q.new_empty(number, NUM_HEADS, 3), case.head_dim**-0.5
        for dense_below in (0, 1024):
            dense = f", dense below {dense_below}" if dense_below else ""
            enter(f"nsa_decode, {num_new} in pages of {page_size}{dense}")
            nsa_decode(
                DecodeCall(
                    *(q[:number], gates, pages, lengths, scale, windows, blocks, num_indices),
                    *(512, dense_below, "triton"),
                )
            )


class OfflineDriver:
    """What Triton asks its driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend_gpu(arch: str) -> None:
    """Makes this process believe that tensors are on a GPU of that architecture.
    There is no way back."""
    capability = int(arch.removeprefix("sm_"))
    properties = SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[arch],
        shared_memory_per_block_optin=SHARED_KIB[arch] * 1024,
        name=arch,
    )
    triton.runtime.driver.set_active(OfflineDriver(GPUTarget("cuda", capability, 32)))
    torch.cuda.get_device_capability = lambda device=None: (capability // 10, capability % 10)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]


def binary_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [binary_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    return int(found[1]), int(found[2])


def kind(value: Any) -> Any:
    """What a kernel is compiled anew for in an argument or a bundle; of integers, that one is 1."""
    if isinstance(value, tuple):
        return tuple(kind(member) for member in value)
    if isinstance(value, int):
        return value == 1
    return value.dtype if isinstance(value, torch.Tensor) else value is None


def check_case(case: Case, skip: set[int], connection: Connection) -> None:
    """Runs in a process of its own: sends ("begin", number, kernel, call), and then ("row", Row),
    for every kernel."""
    os.setsid()  # Whoever gives up on this process also ends the assembler that it waits for.
    pretend_gpu(case.arch)
    compile_launch = JITFunction.run
    seen: set[tuple[Any, ...]] = set()
    call = ""

    def enter(name: str) -> None:
        nonlocal call
        call = name

    def compile_only(
        self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any
    ) -> None:
        # Launches that differ in nothing but integers are compiled once,
        # for the integers of the first.
        number, name = len(seen), self.fn.__name__
        values = zip(self.params, args, strict=False)
        kinds = [
            repr(value) if parameter.is_constexpr else kind(value) for parameter, value in values
        ]
        launch = (name, repr(keywords), *kinds)
        if launch in seen:
            return
        seen.add(launch)
        if number in skip:  # unannounced, for its time to be nobody's
            return

        connection.send(("begin", number, name, call))
        begin = time.perf_counter()
        try:
            kernel = compile_launch(self, *args, grid=grid, warmup=True, **keywords)
            seconds = time.perf_counter() - begin
            registers, stack = resources(kernel.asm["cubin"])
            metadata = kernel.metadata
            tensor_memory = getattr(metadata, "tmem_size", None) or 0
            needs = (metadata.num_warps, registers, stack, metadata.shared, tensor_memory)
            error = faults(kernel.asm["source"], kernel.asm["ttgir"])
            row = Row(name, case, call, *needs, seconds, error, kernel.hash)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1][:300] if str(error).strip() else ""
            row = Row(name, case, call, error=f"does not compile: {type(error).__name__}: {reason}")
        connection.send(("row", row))

    JITFunction.run = compile_only
    try:
        with torch.no_grad():
            call_operators(case, enter)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        connection.send(("row", Row("(host code)", case, call, error=what)))
    connection.close()


@dataclass
class Worker:
    """The process that compiles one case."""

    case: Case
    skip: set[int]

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("fork")  # torch and Triton are imported already
        self.connection, child = context.Pipe(duplex=False)
        arguments = (self.case, self.skip, child)
        self.process = context.Process(target=check_case, args=arguments, daemon=True)
        self.process.start()
        child.close()
        self.since, self.number, self.kernel, self.call = time.monotonic(), -1, "", ""

    def stop(self) -> None:
        assert self.process.pid is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet, or is gone
            self.process.kill()
        self.process.join()


def check_cases(cases: list[Case], jobs: int, compile_limit: float) -> Iterator[Row | Case]:
    """The rows of all cases as they come, and each case itself once it is done."""
    waiting, working = [(case, set[int]()) for case in reversed(cases)], list[Worker]()
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                working.append(Worker(*waiting.pop()))
            ready = wait([worker.connection for worker in working], timeout=min(1.0, compile_limit))
            for worker in list(working):
                if worker.connection in ready:
                    try:
                        kind, *content = worker.connection.recv()
                    except EOFError:
                        worker.process.join()
                        working.remove(worker)
                        if worker.process.exitcode:
                            error = f"the compiler crashed (exit code {worker.process.exitcode})"
                            kernel = worker.kernel or "(start)"
                            yield Row(kernel, worker.case, worker.call, error=error)
                            if worker.kernel and worker.number not in worker.skip:
                                waiting.append((worker.case, worker.skip | {worker.number}))
                                continue
                        yield worker.case
                        continue

                    worker.since = time.monotonic()
                    if kind == "begin":
                        worker.number, worker.kernel, worker.call = content
                    else:
                        worker.kernel = ""  # The host's time until the next kernel is no kernel's.
                        yield content[0]
                elif worker.kernel and time.monotonic() - worker.since > compile_limit:
                    worker.stop()
                    working.remove(worker)
                    yield Row(
                        worker.kernel,
                        worker.case,
                        worker.call,
                        error=f"not compiled after {compile_limit:g} s",
                    )
                    waiting.append((worker.case, worker.skip | {worker.number}))
    finally:
        for worker in working:
            worker.stop()


def make_table(rows: list[Row]) -> Table:
    table = Table(title="Kernels compiled, not run")
    texts = ("kernel", "called by", "arch", "dtype", "variant")
    for heading in (*texts, "D", "DV", "block", "G", "warps", "regs", "stack B", "shared KiB"):
        table.add_column(heading, justify="left" if heading in texts else "right")
    table.add_column("ok", overflow="fold")
    for row in rows:
        case, failure = row.case, row.failure
        names = (row.kernel, row.call, case.arch, case.dtype, case.variant)
        shape = (case.head_dim, case.value_dim, case.block_size, case.group_size)
        needs = (row.warps, row.registers, row.stack, f"{row.shared / 1024:.1f}")
        table.add_row(
            *(str(cell) for cell in (*names, *shape, *needs)),
            f"NO: {failure}" if failure else "yes",
            style="red" if failure else None,
        )
    return table


def default_cases(archs: list[str]) -> list[Case]:
    """What `make test` checks: the settings of the FSA paper in bf16, at the usual group, and on
    Hopper at the smallest and the largest, and with a small workspace at the usual one."""
    shapes = [
        Case(arch, 128, 128, "bf16", 64, group)
        for arch in archs
        for group in ((1, 16) if arch == "sm_90" else (4,))
    ]
    shapes += [Case(arch, 128, 128, "bf16", 64, 4, "decoding") for arch in archs]
    if "sm_90" in archs:
        shapes.append(Case("sm_90", 128, 128, "bf16", 64, 4, "chunked"))
    return shapes


def chosen(values: list[Any] | None, everything: tuple[Any, ...], option: str) -> list[Any]:
    for value in values or ():
        if value not in everything:
            raise typer.BadParameter(f"{value!r} is not one of {everything}", param_hint=option)
    return list(values or everything)


def several_of(allowed: object) -> Any:
    """An option that takes some of these values."""
    return typer.Option(help=f"Of {allowed}; repeat for several.")


def main(
    everything: Annotated[
        bool, typer.Option("--all", help="Every supported shape and dtype.")
    ] = False,
    arch: Annotated[list[str] | None, several_of(", ".join(SHARED_KIB))] = None,
    head_dim: Annotated[list[int] | None, several_of(HEAD_DIMS)] = None,
    value_dim: Annotated[int | None, typer.Option(help="Default: the head width.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp16, bf16, fp32; repeat for several.")
    ] = None,
    block_size: Annotated[list[int] | None, several_of(BLOCK_SIZES)] = None,
    group_size: Annotated[list[int] | None, several_of(GROUP_SIZES)] = None,
    variant: Annotated[list[str] | None, several_of(", ".join(VARIANTS))] = None,
    jobs: Annotated[int, typer.Option(help="Kernels to compile at a time.", min=1)] = 1,
    compile_limit: Annotated[
        float, typer.Option(help="Seconds that one kernel may take to compile.")
    ] = 60.0,
    failures_only: Annotated[
        bool, typer.Option(help="Leave what passes out of the table.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows to this file.")
    ] = None,
) -> None:
    """Checks registers, spills and shared memory of every kernel. Exits with 1 if one fails."""

    archs = chosen(arch, tuple(SHARED_KIB), "--arch")
    if everything or head_dim or dtype or block_size or group_size or variant or value_dim:
        axes = (
            chosen(head_dim, HEAD_DIMS, "--head-dim") if head_dim or everything else [128],
            chosen(dtype, tuple(DTYPES), "--dtype") if dtype or everything else ["bf16"],
            chosen(block_size, BLOCK_SIZES, "--block-size") if block_size or everything else [64],
            chosen(group_size, GROUP_SIZES, "--group-size") if group_size else [4],
            chosen(variant, VARIANTS, "--variant") if variant or everything else ["plain"],
        )
        cases = [
            Case(a, d, value_dim or d, t, b, g, x)
            for a, (d, t, b, g, x) in itertools.product(archs, itertools.product(*axes))
        ]
    else:
        cases = default_cases(archs)

    rows: dict[tuple[str, ...], Row] = {}
    begin = time.monotonic()
    # No thread may run while processes are forked, so the bar is drawn by hand.
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("compiling", total=len(cases))
        for found in check_cases(cases, jobs, compile_limit):
            if isinstance(found, Case):
                progress.advance(bar)
                progress.refresh()
            else:  # a kernel that does not depend on the shape is the same one in many cases
                rows.setdefault(
                    (found.hash,) if found.hash else (found.kernel, str(found.case), found.error),
                    found,
                )

    listed = list(rows.values())
    failed = [row for row in listed if row.failure]
    console.print(make_table(failed if failures_only else listed))
    if output is not None:
        written = [asdict(row) | {"failure": row.failure} for row in listed]
        output.write_text(json.dumps(written, indent=1) + "\n")
    seconds, outcome = time.monotonic() - begin, f"{len(failed)} FAILED" if failed else "all fit"
    console.print(
        f"{len(listed)} kernels of {len(cases)} cases, "
        f"Triton {triton.__version__}, {seconds:.0f} s: {outcome}"
    )
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
