"""A conversion from a dense checkpoint to a sparse one: what it is, whether it is possible, how
long it would take, and the run, which may be interrupted anywhere."""

import dataclasses
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available

from nsa_fsa import checks
from nsa_fsa.config import PRESETS, NSAConfig
from nsa_fsa.integrations.transformers import (
    NSAAttention,
    PatchReport,
    checkpoint_layers,
    chunk_loss,
    patch_model,
    unpatch_model,
)
from nsa_fsa.integrations.transformers.checkpoint import Checkpoint
from nsa_fsa.integrations.transformers.data import PackedTokens, files_of, rows_of
from nsa_fsa.integrations.transformers.layers import attention_layers
from nsa_fsa.modules.branches import PARTS
from nsa_fsa.progress import Steps

# The other parts of a conversion.
from nsa_fsa.training.folder import (
    HISTORY,
    MODEL,
    STORE,
    UNFINISHED,
    begin_in,
    checkpoints,
    number,
    progress_of,
    remove,
    write_json,
)
from nsa_fsa.training.schedule import PRECISIONS, Schedule, Teaching
from nsa_fsa.training.trainer import ConversionMixin

LAYER_INPUTS = ("none", "device", "host")


@dataclass(frozen=True)
class Plan:
    """All that decides what a conversion makes.

    Args:
        checkpoint: a folder, a name on the hub, or a file that ends in .gguf.
        text: files of text or tokens, or folders of text.
        schedule: the stages.
        config: the NSA settings, as `patch_model` takes them; None: the preset "fsa-64x16".
        overrides: fields of NSAConfig, which win over these.
        dense_layers: indices of layers that stay dense; negative ones count from the end.
        by_layer: fields of NSAConfig that win in some layers, as "3-10" (both included), "0" or
            "-1" names them: `{"3-10": {"num_selected_blocks": 48}}`.
        length: tokens of a sequence.
        batch_size: sequences at once.
        accumulate: batches of a step.
        separate: whether documents do not see each other; else the text goes on from one to the
            next, and fills sequences that are longer than documents are.
        dtype: of files of bare numbers.
        weight_decay: of matrices that were there before.
        lora: the rank of adapters that learn in the second stage instead of what they adapt, and
            are merged into that in the end; 0: everything learns.
        seed: of the order of sequences, and of adapters.
        precision: "bf16" or "fp32", in which layers compute. Weights are float32 while they learn.
        is_twin: whether the model is saved as the dense one that it was: see `twin`.
    """

    checkpoint: str
    text: tuple[str, ...]
    schedule: Schedule
    config: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: tuple[int, ...] = ()
    by_layer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    length: int = 8192
    batch_size: int = 1
    accumulate: int = 4
    separate: bool = False
    dtype: str = "uint16"
    weight_decay: float = 0.1
    lora: int = 0
    seed: int = 0
    precision: str = "fp32"
    is_twin: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        checks.check_ints(0, lora=self.lora, seed=self.seed)
        checks.check_positive(batch_size=self.batch_size, accumulate=self.accumulate)
        checks.check_one_of(PRECISIONS, precision=self.precision)

    @property
    def tokens_of_a_step(self) -> int:
        return self.length * self.batch_size * self.accumulate

    @property
    def learning(self) -> str:
        """What learns in the second stage, beside the new parts."""
        return "adapters" if self.lora else "everything"

    def twin(self) -> "Plan":
        """A dense model that learns as this one does in the second stage, from as much of the same
        text: what a sparse one is fairly compared with. All its queries read all keys.

        Raises:
            ValueError: where there is no second stage.
        """
        schedule = self.schedule
        if schedule.warm_up == schedule.steps:
            raise ValueError(
                f"warm_up={schedule.warm_up} are all the steps, in which nothing learns that a "
                "dense model has. Fix: a shorter warm-up; or no twin, but the checkpoint itself."
            )
        alone = dataclasses.replace(
            schedule,
            steps=schedule.steps - schedule.warm_up,
            warm_up=0,
            then=Teaching(error=0.0, divergence=0.0),
        )
        overrides = {**self.overrides, "dense_below": self.length}
        return dataclasses.replace(self, schedule=alone, overrides=overrides, is_twin=True)

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Way:
    """How a conversion is run, which changes nothing of what it makes.

    Args:
        layer_inputs: where layers keep their inputs, to compute all else again in backward:
            "device" or "host"; "none": they keep everything.
        loss_chunk: tokens whose logits are held at once; 0: all.
        save_every: steps between two checkpoints to go on from; 0: none.
        log_every: steps between two reports.
    """

    layer_inputs: str = "device"
    loss_chunk: int = 2048
    save_every: int = 100
    log_every: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        checks.check_ints(0, loss_chunk=self.loss_chunk, save_every=self.save_every)
        checks.check_positive(log_every=self.log_every)
        checks.check_one_of(LAYER_INPUTS, layer_inputs=self.layer_inputs)


USUAL = Way()


# --- Before anything is loaded --------------------------------------------------------------------


class Possible(NamedTuple):
    """A conversion that nothing speaks against."""

    source: Checkpoint
    files: list[Path]
    report: PatchReport  # of what would be patched


def check(plan: Plan) -> Possible:
    """Whether a conversion is possible, before a weight is loaded or anything is written.

    Raises:
        ValueError, TypeError, OSError: name what cannot be converted, and why.
        ImportError: names the package that is missing.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"a conversion runs in one process, and this is one of {processes}. "
            "Fix: start it without torchrun or accelerate."
        )
    files = files_of(plan.text)
    source = Checkpoint.of(plan.checkpoint)
    _check_config(source, plan)
    if plan.lora:
        _need_peft()
    skeleton = source.skeleton()
    report = patch_model(skeleton, **_changes(skeleton, plan), dry_run=True, verbose=False)
    return Possible(source, files, report)


def _check_config(source: Checkpoint, plan: Plan) -> None:
    config = source.config
    if hasattr(config, "nsa"):
        raise ValueError(
            f"{source.name} is sparse already ({config.model_type}). Fix: a dense checkpoint; to "
            "train a sparse one on, scripts/train.py."
        )
    kept = getattr(config, "quantization_config", None)
    if kept is not None:
        found = kept if isinstance(kept, Mapping) else vars(kept)
        raise ValueError(
            f"{source.name} is quantized ({found.get('quant_method', 'unknown')}), and what is "
            "quantized neither learns nor takes merged adapters. Fix: the checkpoint that it was "
            "made of, in 16 or 32 bits."
        )
    if source.longest is not None and plan.length > source.longest:
        raise ValueError(
            f"length={plan.length} is more than the {source.longest} positions that {source.name} "
            f"was made for. Fix: length={source.longest} or less, or another rope_parameters and "
            "max_position_embeddings in its config.json."
        )


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "adapters need PEFT, which is not installed. Fix: pip install peft; or leave lora out."
        ) from error


def _changes(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """What `patch_model` is called with.

    Raises:
        ValueError: for layers that are not there, or that stay dense and have settings.
    """
    if not plan.dense_layers and not plan.by_layer:
        return dict(config=plan.config, **plan.overrides)

    found = attention_layers(model)
    dense = {i for x in plan.dense_layers for i in layers_named(str(x), len(found))}
    layers = [i for i, x in found.items() if x.is_full and i not in dense]
    if not plan.by_layer:
        return dict(config=plan.config, layers=layers, **plan.overrides)

    own: dict[int, dict[str, Any]] = {i: {} for i in layers}
    for text, values in plan.by_layer.items():
        for i in layers_named(text, len(found)):
            if i not in own:
                raise ValueError(
                    f"by_layer={dict(plan.by_layer)} has settings for layer {i}, which stays "
                    f"dense. Fix: layers among {layers}."
                )
            own[i] |= values
    common: dict[str, Any] = {"preset": plan.config or "fsa-64x16"}
    if plan.config is not None and plan.config not in PRESETS:
        common = NSAConfig.from_yaml(plan.config).to_dict()
    return dict(config={i: {**common, **plan.overrides, **x} for i, x in own.items()})


def layers_named(text: str, count: int) -> list[int]:
    """Of a model with so many layers: "3-10" is 3 to 10, "-1" the last one."""
    span = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", text)
    if span is not None:
        first, last = int(span[1]), int(span[2] or span[1])
        if -count <= first <= last < count and (first >= 0 or span[2] is None):
            return [i % count for i in range(first, last + 1)]
    raise ValueError(
        f"{text!r} names no layers among 0 to {count - 1}. Fix: an index, a negative one, which "
        f"counts from the end, or a span such as 0-{count - 1}."
    )


# --- The run --------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A patched model and its text."""

    model: Any
    windows: ConcatDataset[dict[str, torch.Tensor]]
    merge: Callable[[], Any]  # the model as it is to be saved


def prepare(plan: Plan, possible: Possible, way: Way, store: Path) -> Prepared:
    """Tokenizes the text, unless that is done, and loads and patches the model.

    Raises:
        ValueError: for text of which no model can learn, or a model whose loss cannot be had as
            `way` says.
    """
    source, ends = possible.source, possible.source.ends
    rows = rows_of(possible.files, store, source.tokenizer, ends[0], plan.dtype)
    bounds = ends if plan.separate else ()
    known = [
        PackedTokens(x, plan.length, bounds, source.vocab_size, name) for name, x in rows.items()
    ]
    for windows in known:
        windows[0]  # says at once if these are no tokens of this model
    torch.manual_seed(plan.seed)
    model = source.load()
    patch_model(model, **_changes(model, plan), verbose=False)
    merge = _with_adapters(model, plan.lora) if plan.lora else _itself(model)
    if plan.is_twin:
        merge = _unpatched(merge)
    if way.layer_inputs != "none":
        checkpoint_layers(model, in_host_memory=way.layer_inputs == "host")
    if way.loss_chunk:
        try:
            chunk_loss(model, way.loss_chunk)
        except ValueError as error:
            raise ValueError(f"{error} Here that is loss_chunk=0.") from error
    return Prepared(model, ConcatDataset(known), merge)


def _itself(model: Any) -> Callable[[], Any]:
    def merge() -> Any:
        return model

    return merge


def _unpatched(merge: Callable[[], Any]) -> Callable[[], Any]:
    def unpatch() -> Any:
        return unpatch_model(merge())

    return unpatch


def _with_adapters(model: Any, rank: int) -> Callable[[], Any]:
    """Puts adapters on every linear map of the decoder but the new parts; the rest is frozen.

    The model stays what it is, a model of transformers, with other modules inside.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    layers = [(name, x) for name, x in model.named_modules() if isinstance(x, NSAAttention)]
    new = tuple(f"{name}.{part}." for name, _ in layers for part in PARTS)
    head = model.get_output_embeddings()
    targets = [
        name
        for name, x in model.named_modules()
        if isinstance(x, nn.Linear) and x is not head and not f"{name}.".startswith(new)
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    tuner = LoraModel(model, config, "default")

    def merge() -> Any:
        return tuner.merge_and_unload()

    return merge


class ConversionTrainer(ConversionMixin, Trainer):
    """transformers' Trainer, by a schedule."""


def trainer_of(
    prepared: Prepared, plan: Plan, way: Way, output: Path, schedule: Schedule
) -> ConversionTrainer:
    """A Trainer of the model by a schedule, which writes into a folder."""
    arguments = TrainingArguments(
        str(output),
        max_steps=schedule.steps,
        per_device_train_batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.accumulate,
        weight_decay=plan.weight_decay,
        adam_beta2=0.95,
        seed=plan.seed,
        data_seed=plan.seed,
        bf16=plan.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=way.log_every,
        save_strategy="steps" if way.save_every else "no",
        save_steps=way.save_every or schedule.steps,
        save_total_limit=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
    )

    if arguments.n_gpu > 1:  # it would spread every batch over all that it sees
        arguments._n_gpu = 1

    trainer = ConversionTrainer(
        prepared.model, arguments, train_dataset=prepared.windows, schedule=schedule
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def convert(plan: Plan, output: Path, *, way: Way = USUAL, console: Console | None = None) -> Path:
    """Converts a checkpoint, or goes on with a conversion that was interrupted: with the same
    losses as without the interruption.

    Args:
        plan: what to convert, and how.
        output: a folder, with nothing in it or what an earlier call with the same plan has left.
        way: how to run it.
        console: where progress is shown; None: nowhere.

    Returns:
        The folder in `output` that `from_pretrained` opens, with the tokenizer.

    Raises:
        ValueError, TypeError, OSError, ImportError: as of `check`, `progress_of` and `prepare`.
    """
    if progress_of(plan.written(), output).is_finished:
        return output / MODEL
    return begin(plan, output, way=way, console=console).finish()


def begin(
    plan: Plan,
    output: Path,
    *,
    way: Way = USUAL,
    console: Console | None = None,
    possible: Possible | None = None,
) -> "Run":
    """All of `convert` that can be refused; `finish` of what it returns is the rest.

    possible: what `check` said of the plan, where it was asked.
    """
    console = Console(quiet=True) if console is None else console
    last = progress_of(plan.written(), output).last
    possible = check(plan) if possible is None else possible
    begin_in(plan.written(), output)
    with console.status("Reading the text and the model"):
        prepared = prepare(plan, possible, way, output / STORE)
    trainer = trainer_of(prepared, plan, way, output, plan.schedule)
    return Run(plan, output, possible.source, prepared, trainer, last, console)


class Run(NamedTuple):
    """A conversion that is about to be made."""

    plan: Plan
    output: Path
    source: Checkpoint
    prepared: Prepared
    trainer: ConversionTrainer
    last: Path | None  # the checkpoint to go on from
    console: Console

    def finish(self) -> Path:
        """Trains and saves the model: in the folder that is returned."""
        done = 0 if self.last is None else number(self.last)
        with Steps(self.plan.schedule.steps, self.console, done=done) as steps:
            self.trainer.add_callback(_Report(steps, self.plan))
            self.trainer.train(resume_from_checkpoint=str(self.last) if self.last else None)
        history = [x for x in self.trainer.state.log_history if "loss" in x]
        write_json(self.output / HISTORY, history)
        _save(self.prepared, self.source, self.output)
        for folder in checkpoints(self.output):
            remove(folder)
        return self.output / MODEL


def _save(prepared: Prepared, source: Checkpoint, output: Path) -> None:
    """The model, in the dtype that it came in, whole or not at all."""
    unfinished = output / UNFINISHED
    remove(unfinished)
    dtype = str(source.config.dtype or torch.float32).removeprefix("torch.")
    model = prepared.merge().to(getattr(torch, dtype))
    model.save_pretrained(unfinished)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(unfinished)
    unfinished.rename(output / MODEL)


class _Report(TrainerCallback):
    """Moves the progress, and says what is logged."""

    def __init__(self, steps: Steps, plan: Plan) -> None:
        self._steps, self._plan = steps, plan
        self._start: tuple[int, float] | None = None  # a step, and when it began

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._start is None:
            self._start = state.global_step, time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = None  # saving is no part of a step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.advance()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        said = [f"loss {logs.get('nsa_own', logs['loss']):.4f}"]
        if "nsa_mass" in logs:
            said += [
                f"error {logs['nsa_error']:.4f}",
                f"divergence {logs['nsa_divergence']:.4f}",
                f"mass in chosen blocks {logs['nsa_mass']:.4f}",
            ]
        if self._start is not None:
            (first, start), now = self._start, time.perf_counter()
            tokens = (state.global_step - first) * self._plan.tokens_of_a_step
            said.append(f"{tokens / (now - start):,.0f} tokens/s")
            self._start = state.global_step, now
        is_warm_up = state.global_step <= self._plan.schedule.warm_up
        stage = "warm-up" if is_warm_up else self._plan.learning
        self._steps.report(f"{stage}: {', '.join(said)}")


# --- The dry run ----------------------------------------------------------------------------------


class Phase(NamedTuple):
    """Steps of a conversion that take the same time each."""

    name: str
    steps: int
    parameters: int  # that learn
    tokens: int
    seconds: float  # of one step


def rehearse(plan: Plan, possible: Possible, way: Way = USUAL) -> list[Phase]:
    """A step of every kind that a conversion has, really made and timed, in memory and a temporary
    folder. On a GPU it is the second of each kind, as the first compiles kernels.

    Raises:
        ValueError: as of `prepare`.
    """
    schedule, repeat = plan.schedule, 2 if torch.cuda.is_available() else 1
    after = schedule.steps - schedule.warm_up
    taught = sum(
        schedule.teaching(step) is not None for step in range(schedule.warm_up, schedule.steps)
    )
    numbers = (schedule.warm_up, taught, after - taught)
    warm_up, *rest = (repeat * (number > 0) for number in numbers)

    short = dataclasses.replace(
        schedule, steps=warm_up + sum(rest), warm_up=warm_up, fade=rest[0] / max(1, sum(rest))
    )

    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(plan, possible, way, Path(folder) / STORE)
        in_place = dataclasses.replace(way, save_every=0)
        trainer = trainer_of(prepared, plan, in_place, Path(folder), short)
        watch = _Stopwatch()
        trainer.add_callback(watch)
        trainer.train()

    groups = trainer.create_optimizer().param_groups
    new, learning = (
        sum(p.numel() for x in groups if x["is_new"] or everything for p in x["params"])
        for everything in (False, True)
    )

    then = plan.learning
    names = ("warm-up", f"{then}, with dense attention as teacher", f"{then}, by itself")
    kinds = zip(names, numbers, (new, learning, learning), strict=True)
    last = iter(watch.seconds[repeat - 1 :: repeat])

    return [
        Phase(name, number, parameters, number * plan.tokens_of_a_step, next(last))
        for name, number, parameters in kinds
        if number
    ]


class _Stopwatch(TrainerCallback):
    """How long every step takes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(_now() - self._start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def about_seconds(seconds: float) -> str:
    """As a person says it: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
