"""Trains a sparse model on one GPU, on many, or slowly on CPUs, with the Trainer of transformers.

The model is one that was saved sparse, any dense one of transformers, which is patched first, or
one of a known shape with random weights. Under `accelerate launch` its config file says how GPUs
share the work; under `torchrun` it is DDP, or FSDP2 with --fsdp. With FSDP2, GPUs can share the
tokens of each sequence, too.
"""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from progress import Steps  # beside this file; it wants to be imported before torch

# isort: split
import accelerate
import torch
import typer
import yaml
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from packaging import version
from rich.console import Console
from shapes import ALLOWED, layer_file, random_model, shape_config
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import ConcatDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from nsa_fsa import NSAConfig, patch_model
from nsa_fsa.config import PRESETS
from nsa_fsa.integrations.transformers import (
    NSAAttention,
    NSAContextParallel,
    checkpoint_layers,
    chunk_loss,
    chunk_mlp,
)
from nsa_fsa.integrations.transformers.checkpoint import Checkpoint
from nsa_fsa.integrations.transformers.data import (
    DTYPES,
    TEXT_DTYPE,
    TOKENS,
    PackedTokens,
    open_tokens,
    write_tokens,
)
from nsa_fsa.training.commands import Config, option

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
console = Console(quiet=RANK > 0)
CHECKPOINTS = ("none", "device", "host")
PRECISIONS = ("bf16", "fp32")
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
FSDP2 = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp2.yaml"
MODEL, DATA, OPTIMISER, MEMORY, RUN = "Model", "Data", "Optimiser", "Memory and GPUs", "Run"


def main(
    output: Annotated[Path, option(RUN, "Where all goes that is written.", file_okay=False)],
    data: Annotated[
        list[Path],
        option(
            DATA,
            "Tokens (.bin, .npy) or text (any other name), one document a file. Repeat.",
            exists=True,
            dir_okay=False,
        ),
    ],
    model: Annotated[
        str | None, option(MODEL, "A checkpoint, sparse or dense: a folder, or a name.")
    ] = None,
    random_init: Annotated[
        str | None, option(MODEL, f"Instead: random weights. Of {ALLOWED}.")
    ] = None,
    preset: Annotated[
        str | None,
        option(
            MODEL, f"How a dense model is patched. Of {', '.join(PRESETS)}. Default: fsa-64x16."
        ),
    ] = None,
    config: Config = None,
    dtype: Annotated[str, option(DATA, f"Of .bin files: of {', '.join(DTYPES)}.")] = "uint16",
    document_end: Annotated[
        list[int] | None,
        option(
            DATA,
            "Token that ends a document. Repeat. Default: the model's eos_token_id; 0 of "
            "bytes, which tokens are where weights are random.",
            min=0,
        ),
    ] = None,
    length: Annotated[int, option(DATA, "Tokens of a sequence.", min=2)] = 8192,
    steps: Annotated[int, option(OPTIMISER, "Of the optimiser, in all.", min=1)] = 1000,
    batch_size: Annotated[int, option(OPTIMISER, "Sequences a process at once.", min=1)] = 1,
    accumulate: Annotated[int, option(OPTIMISER, "Batches of a step.", min=1)] = 1,
    learning_rate: Annotated[float, option(OPTIMISER, "At its highest.", min=0)] = 2e-5,
    schedule: Annotated[str, option(OPTIMISER, f"Of {', '.join(SCHEDULES)}.")] = "cosine",
    warmup: Annotated[int, option(OPTIMISER, "Steps until that.", min=0)] = 0,
    weight_decay: Annotated[float, option(OPTIMISER, min=0)] = 0.1,
    seed: Annotated[int, option(OPTIMISER, "Of weights and order.", min=0, max=2**32 - 1)] = 0,
    precision: Annotated[
        str | None,
        option(
            MEMORY,
            f"Of {', '.join(PRECISIONS)}; weights and optimiser are float32 either way. "
            "Default: bf16 on GPUs.",
        ),
    ] = None,
    checkpoint: Annotated[
        str,
        option(
            MEMORY,
            f"Where layers keep their inputs, to compute the rest again. Of "
            f"{', '.join(CHECKPOINTS)}.",
        ),
    ] = "device",
    loss_chunk: Annotated[
        int, option(MEMORY, "Tokens whose logits are held at once; 0: all.", min=0)
    ] = 2048,
    mlp_chunk: Annotated[int, option(MEMORY, "Tokens of an MLP at once; 0: all.", min=0)] = 0,
    fsdp: Annotated[
        bool, option(MEMORY, f"Under torchrun: FSDP2, as {FSDP2.name} says.", "--fsdp")
    ] = False,
    context_parallel: Annotated[
        int, option(MEMORY, "GPUs that share each sequence, with FSDP2.", min=1)
    ] = 1,
    resume: Annotated[
        bool, option(RUN, "Go on from the last checkpoint in --output.", "--resume")
    ] = False,
    save_every: Annotated[int, option(RUN, "Steps; 0: only at the end.", min=0)] = 500,
    keep: Annotated[int, option(RUN, "Checkpoints, the last ones.", min=1)] = 2,
    log_every: Annotated[int, option(RUN, "Steps.", min=1)] = 1,
) -> None:
    """Trains a sparse model with the Trainer of transformers, on one process or many."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if (model is None) == (random_init is None):
        raise typer.BadParameter("give one of --model and --random-init.")
    if preset is not None and config is not None:
        raise typer.BadParameter("give one of --preset and --config, or none.")
    chosen(preset or "tiny", PRESETS, "--preset")
    chosen(dtype, DTYPES, "--dtype")
    chosen(schedule, SCHEDULES, "--schedule")
    chosen(checkpoint, CHECKPOINTS, "--checkpoint")
    on_gpu = torch.cuda.is_available()
    precision = chosen(precision or ("bf16" if on_gpu else "fp32"), PRECISIONS, "--precision")
    if fsdp and not on_gpu:
        raise typer.BadParameter("FSDP2 needs GPUs. Fix: leave --fsdp out.")
    last = get_last_checkpoint(output) if output.is_dir() else None
    if resume and last is None:
        raise typer.BadParameter(f"{output} has no checkpoint. Fix: leave --resume out.")
    if last is not None and not resume:
        message = f"{last} is there already. Fix: --resume, or another --output."
        raise typer.BadParameter(message, param_hint="--output")

    if last is not None:
        check_checkpoint(Path(last), fsdp)

    settings = settings_of(preset, config, random_init)
    source = source_of(model, random_init)
    check_context_parallel(context_parallel, fsdp)
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        adam_beta2=0.95,
        seed=seed,
        data_seed=seed,
        bf16=precision == "bf16",
        use_cpu=not on_gpu,
        logging_steps=log_every,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or steps,
        save_total_limit=keep,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if is_tensorboard_available() else [],
        **sharing(fsdp, context_parallel),
    )
    windows = windows_of(data, dtype, length, document_end, source, arguments)
    if random_init is None:
        made = source.load()  # on the CPU, until it is shared out
    else:
        device = f"cuda:{LOCAL_RANK}" if on_gpu else "cpu"
        made = random_model(source.config, torch.float32, device, seed)
    make_sparse(made, settings, start_anew=random_init is not None)
    if checkpoint != "none":
        checkpoint_layers(made, in_host_memory=checkpoint == "host")
    in_chunks(made, chunk_loss, loss_chunk, "--loss-chunk")
    in_chunks(made, chunk_mlp, mlp_chunk, "--mlp-chunk")

    trainer = SparseTrainer(
        made, arguments, train_dataset=windows, processing_class=source.tokenizer
    )
    trainer.check_sharing()
    trainer.remove_callback(PrinterCallback)
    sequences = f"{len(windows):,} sequences of {length:,} tokens"
    line = f"{about(made)}; {sequences}; {about_place(trainer)}."
    console.print(line, soft_wrap=True, highlight=False)
    done = int(last.rpartition("-")[2]) if last is not None else 0
    with Steps(steps, console, done=done) as progress:
        trainer.add_callback(Report(progress))
        trainer.train(resume_from_checkpoint=last)
    trainer.save_whole(output / "model")
    console.print(f"Saved to {output / 'model'}.", soft_wrap=True, highlight=False)


def chosen(value: str, allowed: Any, option: str) -> str:
    if value not in allowed:
        message = f"{value!r} is not known: allowed are {', '.join(allowed)}."
        raise typer.BadParameter(message, param_hint=option)
    return value


def check_checkpoint(folder: Path, fsdp: bool) -> None:
    """Raises BadParameter for a checkpoint of FSDP2 that is to go on without, or the reverse."""
    was_sharded = any(folder.glob("pytorch_model_fsdp*"))
    if was_sharded != (fsdp or asks_for_fsdp()):
        how = "with" if was_sharded else "without"
        message = f"{folder} was saved {how} FSDP2. Fix: resume {how} it, as docs/training.md says."
        raise typer.BadParameter(message, param_hint="--resume")


def check_context_parallel(number: int, fsdp: bool) -> None:
    """Raises BadParameter where so many processes cannot share a sequence."""
    if number == 1:
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))
    message = None
    if not (fsdp or asks_for_fsdp()):
        message = "it takes FSDP2. Fix: --fsdp under torchrun, or configs/accelerate/fsdp2.yaml."
    elif processes % number:
        message = f"{number} does not divide the {processes} processes. Fix: a number that does."
    if message is not None:
        raise typer.BadParameter(message, param_hint="--context-parallel")


def asks_for_fsdp() -> bool:
    """Whether `accelerate launch` was given a config file that says so."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def settings_of(preset: str | None, config: Path | None, random_init: str | None) -> Any:
    """What a dense model is patched with, or None: the default, or what a sparse one has.

    The file that random weights are made by says the settings, too.
    """
    if config is None and preset is None and random_init is not None:
        config = layer_file(random_init)
    if config is None:
        return preset
    try:
        NSAConfig.from_yaml(config)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
    return str(config)


def source_of(name: str | None, shape: str | None) -> Checkpoint:
    """Where the model comes from; without a name it has random weights, and bytes for tokens."""
    try:
        if name is None:
            return Checkpoint("random weights", shape_config(str(shape)), None)
        return Checkpoint.of(name)
    except (OSError, ValueError, ImportError) as error:
        hint = "--random-init" if name is None else "--model"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def windows_of(
    paths: list[Path],
    dtype: str,
    length: int,
    document_end: list[int] | None,
    source: Checkpoint,
    arguments: TrainingArguments,
) -> ConcatDataset[dict[str, torch.Tensor]]:
    """What is trained on; text is tokenized first, by one process."""
    ends = source.ends if document_end is None else document_end
    files = {str(x): x for x in paths if x.suffix in TOKENS}
    texts = [x for x in paths if x.suffix not in TOKENS]
    try:
        rows = [(name, open_tokens(x, dtype)) for name, x in files.items()]
        if texts:
            store = Path(arguments.output_dir) / "tokens.bin"
            with arguments.main_process_first(local=False):
                if RANK == 0:
                    with console.status(f"Tokenizing {len(texts)} files of text"):
                        write_tokens(texts, store, source.tokenizer, ends[0])
            rows.append(("the text", open_tokens(store, TEXT_DTYPE)))
        known = [PackedTokens(x, length, ends, source.vocab_size, name) for name, x in rows]
        for windows in known:
            windows[0]  # says at once if these are no tokens of this model
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    return ConcatDataset(known)


def make_sparse(model: Any, settings: Any, start_anew: bool) -> None:
    """Patches a dense model; a sparse one only where settings are given."""
    is_sparse = any(isinstance(x, NSAAttention) for x in model.modules())
    if is_sparse and settings is None:
        return
    given = dict(gate_init="balanced") if start_anew else {}
    try:
        patch_model(model, settings, verbose=False, **given)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error


def in_chunks(model: Any, change: Callable[..., Any], size: int, option: str) -> None:
    """Changes a model by `chunk_loss` or `chunk_mlp`, if there is a size."""
    if not size:
        return
    try:
        change(model, size)
    except ValueError as error:
        message = f"{error} Here that is {option} 0."
        raise typer.BadParameter(message, param_hint=option) from error


def sharing(fsdp: bool, context_parallel: int = 1) -> dict[str, Any]:
    """How processes share the work, as TrainingArguments take it; nothing where the launcher has
    said it, or to replicate the model.
    """
    found: dict[str, Any] = {}
    if fsdp:
        found = dict(fsdp=True, fsdp_config=yaml.safe_load(FSDP2.read_text())["fsdp_config"])
    if context_parallel > 1:
        others = int(os.environ["WORLD_SIZE"]) // context_parallel
        both = ParallelismConfig(cp_size=context_parallel, dp_shard_size=others)
        found["parallelism_config"] = both
    return found


class SparseTrainer(NSAContextParallel, Trainer):
    """transformers' Trainer, which also logs tokens a second and the peak of memory, and whose
    processes can share sequences.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock = Clock()
        self.add_callback(self.clock)

    def check_sharing(self) -> None:
        """Has FSDP2 compute in 16 bits alone what the layers compute. accelerate would have it
        round the sums of gradients, the loss, and the number of tokens that divides it, too.

        Raises:
            BadParameter: if accelerate was asked for FSDP2 and goes without, as it does on CPUs
                and without a launcher, or cannot resume.
        """
        if not self.is_fsdp_enabled and not asks_for_fsdp():
            return
        if self.accelerator.distributed_type != DistributedType.FSDP:
            raise typer.BadParameter(
                f"FSDP2 needs GPUs and a launcher, and this is {about_place(self)}. "
                "Fix: torchrun or accelerate launch, on GPUs; or configs/accelerate/ddp.yaml."
            )
        if version.parse(accelerate.__version__) < version.parse("1.13"):
            raise typer.BadParameter(
                f"accelerate {accelerate.__version__} loses FSDP2's optimizer where it resumes. "
                'Fix: pip install "accelerate>=1.13".'
            )
        if self.args.bf16:
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            sequences, seconds = self.clock.read(self.state.global_step)
            sequences *= self.get_total_train_batch_size(self.args)
            tokens = sequences * len(self.train_dataset[0]["input_ids"])
            peak = torch.tensor([peak_gib()], device=self.args.device)
            logs["tokens_per_second"] = tokens / seconds
            logs["peak_gib"] = self.accelerator.gather(peak).max().item()
        super().log(logs, start_time)

    def save_whole(self, folder: Path) -> None:
        """Saves what `from_pretrained` opens, however the model is shared out."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(folder))


class Clock(TrainerCallback):
    """How long steps take, without what lies between them, such as saving: it starts anew there."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None  # a step, and when it began

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._start is None:
            self._start = state.global_step, time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = None

    def read(self, step: int) -> tuple[int, float]:
        """Steps since the start or the last reading, and their seconds; `step` has just ended, and
        the device is idle.
        """
        assert self._start is not None, "there was no step"
        (first, start), self._start = self._start, (step, time.perf_counter())
        return step - first, self._start[1] - start


class Report(TrainerCallback):
    """Moves the progress, and says what is logged."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps.advance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self._steps.report(
                f"loss {logs['loss']:.4f}, gradient {logs['grad_norm']:.3g}, "
                f"{logs['tokens_per_second']:,.0f} tokens/s, {logs['peak_gib']:.1f} GiB"
            )


def peak_gib() -> float:
    """Of the GPU's memory since the last call, or of a CPU process since its start."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def about(model: Any) -> str:
    return f"{type(model).__name__} of {model.num_parameters():,} parameters"


def about_place(trainer: Trainer) -> str:
    sharded = trainer.accelerator.distributed_type == DistributedType.FSDP
    kind = "FSDP2" if sharded else "DDP"
    number = trainer.args.world_size
    processes = f"{number} processes with {kind}" if number > 1 else "one process"
    if (shared_by := trainer.get_cp_size()) > 1:
        processes += f", {shared_by} to a sequence"
    return f"{processes}, on {trainer.args.device.type}"


if __name__ == "__main__":
    try:
        typer.run(main)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
