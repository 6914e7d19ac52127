"""scripts/train.py as a user runs it, on one process and on two: losses, resuming, and what is
saved.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from rich.console import Console
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import StateDictType, fully_shard
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments
from typer.testing import CliRunner

from nsa_fsa.integrations.transformers import checkpoint_layers, chunk_loss, chunk_mlp
from tests.integrations.families import family
from tests.integrations.models import dense_model, sparse_model, tokens

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train.py"
TINY = ROOT / "configs" / "tiny-demo.yaml"
STEPS, LENGTH, SEQUENCES = 4, 160, 2  # of a step
ODD = 266  # twice that less the first tokens is no number of bfloat16
SHORT = ("--steps", STEPS, "--length", LENGTH, "--learning-rate", 1e-3, "--save-every", 2)


def script():
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        specification = importlib.util.spec_from_file_location("train", SCRIPT)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPT.parent))
        for beside in ("progress", "shapes"):
            sys.modules.pop(beside, None)
    return module


@pytest.fixture(scope="module")
def module():
    """The script, on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield script()


@pytest.fixture(scope="module")
def run(module):
    """The script with some arguments: what it prints."""
    app = typer.Typer()
    app.command()(module.main)
    module.console = Console(width=300, force_terminal=False)

    def invoke(*arguments, code=0):
        found = CliRunner().invoke(app, [str(x) for x in arguments])
        assert found.exit_code == code, found.output
        return found.output

    return invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where everything lies: a text of two documents, and what was trained on it."""
    folder = tmp_path_factory.mktemp("training")
    for number in range(2):
        words = " ".join(str(i * i + number) for i in range(700))
        (folder / f"{number}.txt").write_text(words)
    return folder


def texts(folder):
    return ("--data", folder / "0.txt", "--data", folder / "1.txt")


@pytest.fixture(scope="module")
def whole(run, folder):
    """A run that nothing interrupts, on one process: what it printed."""
    arguments = ("--random-init", TINY, *texts(folder), *SHORT, "--batch-size", SEQUENCES)
    return run(*arguments, "--output", folder / "whole")


def history(output, step=STEPS):
    """What was logged of every step."""
    state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [x for x in state["log_history"] if "loss" in x]


def logged(output, step=STEPS):
    """Loss and gradient norm of every step."""
    return [(x["loss"], x["grad_norm"]) for x in history(output, step)]


def weights(output):
    return AutoModelForCausalLM.from_pretrained(output / "model").state_dict()


def assert_same_run(found, expected):
    torch.testing.assert_close(logged(found), logged(expected), rtol=1e-5, atol=1e-5)
    of_found, of_expected = weights(found), weights(expected)
    assert list(of_found) == list(of_expected)
    for name, x in of_expected.items():
        # Adam's first steps are of the size of the rate, whatever the gradient is.
        torch.testing.assert_close(of_found[name], x, rtol=0, atol=0.02 * 1e-3, msg=name)


def assert_resumed(found, first):
    """The times of its first steps are those of the run that it went on from."""
    assert history(found)[:2] == history(first)[:2]
    assert history(found)[2:] != history(first)[2:]


def test_one_process(whole, folder):
    assert "NSALlamaForCausalLM of 424,752 parameters" in whole
    for step in range(1, STEPS + 1):
        assert f"step {step} of {STEPS}: loss " in whole
    assert "tokens/s" in whole
    assert "GiB" in whole
    losses = [loss for loss, _ in logged(folder / "whole")]
    assert losses[-1] < losses[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(folder / "whole" / "model")
    assert type(model).__name__ == "NSALlamaForCausalLM"
    steps = history(folder / "whole")
    assert [x["step"] for x in steps] == [*range(1, STEPS + 1)]
    assert all(x["tokens_per_second"] > 0 and x["peak_gib"] > 0.01 for x in steps)


def test_resuming_equals_going_on(whole, run, folder):
    resumed = folder / "resumed"
    shutil.copytree(folder / "whole", resumed)
    shutil.rmtree(resumed / f"checkpoint-{STEPS}")
    shutil.rmtree(resumed / "model")
    arguments = ("--random-init", TINY, *texts(folder), *SHORT, "--batch-size", SEQUENCES)
    printed = run(*arguments, "--output", resumed, "--resume")
    assert "step 2 of" not in printed
    assert "step 3 of" in printed
    assert_resumed(resumed, folder / "whole")
    assert logged(resumed) == logged(folder / "whole")
    expected = weights(folder / "whole")
    assert all(torch.equal(x, expected[name]) for name, x in weights(resumed).items())


def test_less_memory_is_the_same_training(whole, run, folder):
    """Other chunks, other checkpoints, and two batches for one."""
    arguments = ("--random-init", TINY, *texts(folder), *SHORT, "--batch-size", 1)
    changes = ("--accumulate=2", "--loss-chunk=0", "--mlp-chunk=50", "--checkpoint=none")
    run(*arguments, *changes, "--output", folder / "accumulated")
    assert_same_run(folder / "accumulated", folder / "whole")


def test_torchrun_and_accelerate_shard_alike(module, tmp_path):
    """--fsdp says what the file says."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **module.sharing(True))
    given = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    with accelerate_shards():
        of_file = FullyShardedDataParallelPlugin()
    assert given.fsdp_version == 2
    assert given.state_dict_type is StateDictType.SHARDED_STATE_DICT
    names = ("fsdp_version", "reshard_after_forward", "cpu_offload", "state_dict_type")
    for name in (*names, "auto_wrap_policy", "cpu_ram_efficient_loading"):
        assert getattr(given, name) == getattr(of_file, name), name


def test_clock_leaves_out_what_lies_between_steps(module):
    clock, state = module.Clock(), TrainerState()
    for event, step in (("begin", 0), ("begin", 1), ("read", 2), ("begin", 2), ("save", 3)):
        state.global_step = step
        if event == "begin":
            clock.on_step_begin(None, state, None)
        elif event == "save":
            clock.on_save(None, state, None)
        else:
            steps, seconds = clock.read(step)
            assert steps == 2
            assert seconds > 0
    state.global_step = 3
    clock.on_step_begin(None, state, None)
    assert clock.read(4)[0] == 1


def test_a_checkpoint_is_trained_on(run, folder):
    """A dense one is patched; a sparse one keeps its settings, and takes others where they are
    given. Tokens are bare numbers, or an array.
    """
    dense_model(vocab_size=97).save_pretrained(folder / "dense")
    numbers = np.random.default_rng(0).integers(1, 97, 400)
    numbers.astype("uint16").tofile(folder / "tokens.bin")
    np.save(folder / "tokens.npy", numbers)
    data = ("--data", folder / "tokens.bin", "--data", folder / "tokens.npy")
    arguments = ("--steps=1", "--length=128", "--document-end=5", "--save-every=0", *data)
    model = ("--model", folder / "dense", "--preset", "tiny")
    assert "6 sequences of 128" in run(*arguments, *model, "--output", folder / "first")
    model = ("--model", folder / "first" / "model")
    run(*arguments, *model, "--output", folder / "second")
    run(*arguments, *model, "--preset", "fsa-64x16", "--output", folder / "third")
    sizes = [
        AutoModelForCausalLM.from_pretrained(folder / name / "model")
        .model.layers[0]
        .self_attn.nsa_config.block_size
        for name in ("first", "second", "third")
    ]
    assert sizes == [16, 16, 64]


def test_gates_start_open_where_weights_are_random(module):
    for start_anew, gate_init in ((True, "balanced"), (False, "dense")):
        model = dense_model()
        module.make_sparse(model, None, start_anew)
        assert model.model.layers[0].self_attn.nsa_config.gate_init == gate_init


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--random-init=tiny-demo", "--model=x"), "give one of --model and --random-init"),
        (("--model=nowhere/at/all",), "nowhere/at/all"),
        (("--random-init=vast",), "'vast' is not known: allowed are llama3-8b"),
        (("--random-init=tiny-demo", "--preset=vast"), "'vast' is not known: allowed are fsa-64"),
        (("--random-init=tiny-demo", "--preset=tiny", f"--config={TINY}"), "--preset and --config"),
        (("--random-init=tiny-demo", "--dtype=int3"), "'int3' is not known: allowed are uint8"),
        (("--random-init=tiny-demo", "--schedule=up"), "'up' is not known: allowed are cosine"),
        (("--random-init=tiny-demo", "--checkpoint=disk"), "'disk' is not known: allowed are none"),
        (("--random-init=tiny-demo", "--precision=fp8"), "'fp8' is not known: allowed are bf16"),
        (("--random-init=tiny-demo", "--fsdp"), "FSDP2 needs GPUs. Fix: leave --fsdp out"),
        (("--random-init=tiny-demo", "--context-parallel=2"), "it takes FSDP2. Fix: --fsdp"),
        (("--random-init=tiny-demo", "--resume"), "has no checkpoint. Fix: leave --resume out"),
        (("--random-init=tiny-demo", "--length=100000"), "fewer than one window of 100,000"),
        (("--random-init=tiny-demo", "--data=nowhere.txt"), "does not exist"),
        (("--random-init=tiny-demo", "--data={}/odd.bin"), "are no tokens of 2 bytes (uint16)"),
        (("--random-init=tiny-demo", "--data={}/large.npy"), "has the token 256 in window 0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(run, folder, arguments, said, monkeypatch):
    (folder / "odd.bin").write_bytes(b"odd")
    np.save(folder / "large.npy", np.full(LENGTH, 256))
    load = "AutoModelForCausalLM.from_config"
    monkeypatch.setattr(f"transformers.{load}", lambda *args, **kwargs: pytest.fail("loaded"))
    options = (*texts(folder), *SHORT, "--output", folder / "nothing")
    given = [x.format(folder) for x in arguments]
    assert said in " ".join(run(*options, *given, code=2).replace("│", "").split())


def test_who_cannot_share_sequences_is_refused(run, folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "8")
    options = (*texts(folder), "--context-parallel=3", "--output", folder / "refused")
    said = run("--random-init", TINY, *options, code=2)
    assert "3 does not divide the 8 processes" in said


def test_mixture_of_experts_has_no_mlp_in_chunks(run, folder):
    family("Mixtral").save_pretrained(folder / "mixture")
    options = (*texts(folder), *SHORT, "--output", folder / "nothing", "--preset=tiny")
    chunks = ("--model", folder / "mixture", "--mlp-chunk=10", "--document-end=0", "--length=20")
    said = " ".join(run(*options, *chunks, code=2).replace("│", "").split())
    assert "the mixture MixtralSparseMoeBlock" in said
    assert "Here that is --mlp-chunk 0" in said


def test_fsdp_that_accelerate_leaves_out_is_refused(run, folder, monkeypatch):
    """It would replicate the model, and say nothing."""
    forget_accelerate()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    options = (*texts(folder), *SHORT, "--output", folder / "nothing", "--random-init=tiny-demo")
    said = " ".join(run(*options, code=2).replace("│", "").split())
    assert "FSDP2 needs GPUs and a launcher, and this is one process, on cpu" in said
    forget_accelerate()


def test_a_run_is_not_overwritten(whole, run, folder):
    options = (*texts(folder), *SHORT, "--output", folder / "whole")
    printed = run(*options, "--random-init=tiny-demo", code=2)
    assert "is there already. Fix: --resume, or another" in " ".join(
        printed.replace("│", "").split()
    )


def test_a_checkpoint_is_resumed_as_it_was_saved(whole, run, folder, monkeypatch):
    options = (*texts(folder), *SHORT, "--random-init=tiny-demo", "--resume", "--output")
    sharded = folder / "sharded"
    (sharded / "checkpoint-2" / "pytorch_model_fsdp_0").mkdir(parents=True)
    said = " ".join(run(*options, sharded, code=2).replace("│", "").split())
    assert "was saved with FSDP2. Fix: resume with it" in said
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    said = " ".join(run(*options, folder / "whole", code=2).replace("│", "").split())
    assert "was saved without FSDP2. Fix: resume without it" in said


@pytest.mark.slow
def test_two_processes_equal_one(whole, run, folder):
    """DDP; FSDP2 as accelerate sets it up, its resuming, its loss in chunks, and 16 bits; and
    sequences that both share.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.test_train_script", str(folder)]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    runs = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(i), "LOCAL_RANK": str(i)}, **options
        )
        for i in range(2)
    ]
    for process in runs:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-3000:]
    for name in ("ddp", "fsdp2", "fsdp2_resumed", "shared"):
        assert_same_run(folder / name, folder / "whole")
        is_sharded = (folder / name / f"checkpoint-{STEPS}" / "pytorch_model_fsdp_0").is_dir()
        assert is_sharded == (name != "ddp")
    assert_resumed(folder / "fsdp2_resumed", folder / "fsdp2")
    exact = ("--random-init", TINY, *texts(folder), "--batch-size", SEQUENCES)
    run(*exact, "--steps=1", "--length", ODD, "--save-every=1", "--output", folder / "fp32")
    found, expected = (logged(folder / name, 1)[0][0] for name in ("fsdp2_bf16", "fp32"))
    # A number of labels that is rounded to bfloat16, as 530 to 532, would be seen.
    assert found == pytest.approx(expected, rel=4e-4)


# --- In each of the two processes -----------------------------------------------------------------


def main(folder):
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    loss_in_chunks_under_fsdp2()
    train = script().main
    options = dict(
        random_init=str(TINY),
        data=[folder / "0.txt", folder / "1.txt"],
        steps=STEPS,
        length=LENGTH,
        learning_rate=1e-3,
        save_every=2,
        batch_size=SEQUENCES // 2,
        loss_chunk=50,
        mlp_chunk=70,
    )
    train(output=folder / "ddp", **options)
    with accelerate_shards():
        train(output=folder / "fsdp2", **options)
    whole = {**options, "batch_size": SEQUENCES, "loss_chunk": 23}
    with accelerate_shards():
        train(output=folder / "shared", context_parallel=2, **whole)
    resumed = folder / "fsdp2_resumed"
    if distributed.get_rank() == 0:
        shutil.copytree(folder / "fsdp2", resumed)
        shutil.rmtree(resumed / f"checkpoint-{STEPS}")
        shutil.rmtree(resumed / "model")
    distributed.barrier()
    with accelerate_shards():
        train(output=resumed, resume=True, **options)
    few = dict(steps=1, save_every=1, length=ODD, precision="bf16")
    with accelerate_shards():
        train(output=folder / "fsdp2_bf16", **{**options, **few})
    distributed.destroy_process_group()


@contextlib.contextmanager
def accelerate_shards():
    """As `accelerate launch` sets it up, but that accelerate takes the CPUs for GPUs: on others it
    shards nothing.
    """
    forget_accelerate()
    make = PartialState.__init__

    def make_for_gpus(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:  # not yet set
            self.distributed_type, self.device = DistributedType.MULTI_GPU, torch.device("cpu")

    given = yaml.safe_load((ROOT / "configs/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "__init__", make_for_gpus)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        for name, value in given.items():
            patch.setenv(
                name.upper(), str(value).lower() if isinstance(value, bool) else str(value)
            )
        yield
    forget_accelerate()


def forget_accelerate():
    """What it knows of this process, which it finds out once."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()


def loss_in_chunks_under_fsdp2():
    """Its gradients are those of one process, however accelerate or others group the head."""
    mesh, rank = init_device_mesh("cpu", (2,)), distributed.get_rank()
    ids = tokens(2, 90)
    expected = sparse_model().double().train()
    logits = expected(ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    for head_alone, reshard in ((False, False), (True, True)):
        model = sparse_model().double().train()
        checkpoint_layers(chunk_mlp(chunk_loss(model, 25), 40))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        head = model.lm_head if head_alone else [model.model.norm, model.lm_head]
        fully_shard(head, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        own = ids[rank : rank + 1]
        for _ in range(2):  # the second finds the weights as the first has left them
            model.zero_grad()
            found = model(own, labels=own, num_items_in_batch=ids[:, 1:].numel()).loss * 2
            found.backward()
        distributed.all_reduce(total := found.detach() / 2)
        torch.testing.assert_close(total, loss.detach(), rtol=0, atol=1e-12)
        for name, x in model.named_parameters():
            wanted = expected.get_parameter(name).grad
            torch.testing.assert_close(x.grad.full_tensor(), wanted, rtol=0, atol=1e-12, msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
