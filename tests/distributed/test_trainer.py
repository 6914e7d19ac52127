"""The Trainer of transformers with `cp_size=2`: losses, gradient norms and evaluation are those of
one process."""

import json
import os
import sys

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import distributed
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening, PrinterCallback, Trainer, TrainingArguments
from transformers.data.data_collator import default_data_collator
from transformers.trainer_pt_utils import LabelSmoother

from nsa_fsa.integrations.transformers import NSAContextParallel
from tests.distributed.processes import on_ranks, printed_by, say
from tests.integrations.models import sparse_model, tokens

FSDP = dict(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
    FSDP_CPU_RAM_EFFICIENT_LOADING="false",
)
KINDS = ("rows", "packed")


@pytest.mark.slow
def test_trains_as_one_process(tmp_path):
    lines = printed_by("tests.distributed.test_trainer", "train", tmp_path)
    one, two, four = ([json.loads(line) for line in lines[i : i + 2]] for i in (0, 2, 4))
    assert len(lines) == 6
    for losses in (two, four):  # float32
        for kind, found, expected in zip(KINDS, losses, one, strict=True):
            assert found == pytest.approx(expected[: len(found)], rel=2e-5), kind


def test_what_looks_at_labels_itself_is_refused(tmp_path):
    lines = printed_by("tests.distributed.test_trainer", "refuse", tmp_path)
    names = ("label_smoothing_factor", "compute_loss_func", "average_tokens_across_devices=False")
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name} is not available with context parallelism")


def test_a_trainer_without_the_hook_is_refused():
    with pytest.raises(RuntimeError, match=r"no _prepare_context_parallel_inputs after.*Fix: "):
        type("Renamed", (NSAContextParallel, Dataset), {})()


# --- In each of the processes ---------------------------------------------------------------------


class SharingTrainer(NSAContextParallel, Trainer):
    pass


class Texts(Dataset):
    """Of one length, or of several that no number of ranks divides."""

    def __init__(self, kind, number, seed):
        of_one = torch.full((number,), 64)
        generator = torch.Generator().manual_seed(seed)
        several = torch.randint(20, 90, (number,), generator=generator)
        lengths = of_one if kind == "rows" else several
        self.texts = [tokens(int(n), seed=i + seed) for i, n in enumerate(lengths)]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return dict(input_ids=self.texts[i].tolist(), labels=self.texts[i].tolist())


def believe_in_gpus():
    """accelerate has FSDP for GPUs alone: it takes these processes for some with GPUs."""
    make = PartialState.__init__

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")

    PartialState.__init__ = made


def trainer(kind, folder, rows=4, parallelism=None):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        max_steps=3,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        parallelism_config=parallelism,
    )
    made = SharingTrainer(
        sparse_model(num_key_value_heads=4),
        arguments,
        train_dataset=Texts(kind, 16, 0),
        eval_dataset=Texts(kind, 8, 100),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        if kind == "packed"
        else default_data_collator,
    )
    made.remove_callback(PrinterCallback)
    return made


def parallelism_of(size):
    """Two ranks share sequences, and four are two such pairs with other batches."""
    if size == 1:
        return None
    os.environ.update(FSDP)
    believe_in_gpus()
    return ParallelismConfig(cp_size=2, dp_shard_size=size // 2)


def train(folder):
    size = distributed.get_world_size()
    parallelism = parallelism_of(size)
    for kind in KINDS:
        made = trainer(kind, folder, 2 if size == 4 else 4, parallelism)
        made.train()
        history = made.state.log_history
        found = [x[key] for x in history for key in ("loss", "grad_norm") if key in x]
        assert len(found) == 6
        if size < 4 or kind == "rows":  # pairs pack other batches, and batches' means are averaged
            for metrics in (None, accuracy):
                values, widths = evaluated(made, metrics)
                found += values
                shared = metrics is None and size > 1
                assert kind == "packed" or widths == {32 if shared else 64}
        say(json.dumps(found))


def evaluated(made, compute_metrics):
    """The loss and the accuracy if asked for, and how many tokens of a row a model was given."""
    made.compute_metrics, seen = compute_metrics, set()
    hook = made.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.add(args[0].shape[1])
    )
    metrics = made.evaluate()
    hook.remove()
    return [metrics[key] for key in ("eval_loss", "eval_accuracy") if key in metrics], seen


def accuracy(prediction):
    found, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
    return dict(accuracy=float((found == labels)[labels != -100].mean()))


def refuse(folder):
    made = trainer("rows", folder, parallelism=parallelism_of(2))
    for owner, name, value in (
        (made, "label_smoother", LabelSmoother(0.1)),
        (made, "compute_loss_func", lambda outputs, labels, num_items_in_batch: outputs.loss),
        (made.args, "average_tokens_across_devices", False),
    ):
        kept = getattr(owner, name)
        setattr(owner, name, value)
        with pytest.raises(ValueError, match=r"Fix: ") as error:
            made.train()
        setattr(owner, name, kept)
        say(error.value)


if __name__ == "__main__":
    function = {x.__name__: x for x in (train, refuse)}[sys.argv[1]]
    for size in (1, 2, 4) if function is train else (2,):
        on_ranks(function, size, sys.argv[2], sys.argv[2])
