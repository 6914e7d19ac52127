"""`nsa-fsa convert` as a user runs it: what is made, what an interruption changes, and what is
refused before anything is loaded."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from nsa_fsa import NSAConfig
from nsa_fsa.integrations.transformers import NSAAttention
from nsa_fsa.training import Schedule, conversion
from tests.integrations.models import dense_model, sparse_model
from tests.training.command_line import forbid_loading, run_command, widen_console_and_hide_gpu

ROOT = Path(__file__).parents[2]
TEXT = ("--text", ROOT / "docs" / "spec.md", "--text", ROOT / "docs" / "lab")
SHAPE = ("--preset", "tiny", "--length", 128, "--accumulate", 2, "--layer-inputs", "none")
STEPS, WARM_UP = 6, 2
SCHEDULE = ("--steps", STEPS, "--warm-up", WARM_UP, "--ramp", 1, "--learning-rate", 1e-3)
# The last steps are without a teacher.
USUAL = (*TEXT, *SHAPE, *SCHEDULE, "--divergence", 0, "--save-every", 2)


@pytest.fixture(autouse=True)
def on_a_wide_console_without_gpu(monkeypatch):
    widen_console_and_hide_gpu(monkeypatch)


run = partial(run_command, "convert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a dense checkpoint lies, of 16 bits, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("conversion")
    dense_model(vocab_size=256).bfloat16().save_pretrained(folder / "dense")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """What was printed of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        widen_console_and_hide_gpu(patch)
        return run(folder / "dense", *USUAL, "--output", folder / "whole")


def history(output):
    return json.loads((output / "history.json").read_text())


def losses(output):
    return [(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in history(output)]


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def changed(before, after):
    return {
        name for name, x in after.items() if name in before and not torch.equal(before[name], x)
    }


def test_a_dense_checkpoint_goes_in_and_a_sparse_one_comes_out(whole, folder):
    assert "LlamaForCausalLM is now NSALlamaForCausalLM" in whole
    assert "tokens; the conversion reads 12, each 0.0" in whole
    assert "step 1 of 6: warm-up: loss " in whole
    assert "step 6 of 6: everything: loss " in whole
    assert f"Saved to {folder / 'whole' / 'model'}." in whole
    model = AutoModelForCausalLM.from_pretrained(folder / "whole" / "model")
    assert type(model).__name__ == "NSALlamaForCausalLM"
    assert model.dtype == torch.bfloat16
    layers = [x for x in model.modules() if isinstance(x, NSAAttention)]
    assert [x.nsa_config.block_size for x in layers] == [16, 16]
    before = weights(folder / "dense")
    assert len(changed(before, model.state_dict())) > len(before) / 2
    assert [x["step"] for x in history(folder / "whole")] == [1, 2, 3, 4, 5, 6]
    assert ["nsa_mass" in x for x in history(folder / "whole")] == [True] * 4 + [False] * 2
    left = {x.name for x in (folder / "whole").iterdir()} - {"runs"}
    assert left == {"model", "conversion.json", "history.json", "tokens.bin"}


def states(output):
    """What Trainer wrote last into each of its checkpoints."""
    return sorted(output.glob("checkpoint-*/trainer_state.json"))


def test_who_is_killed_goes_on_with_the_same_losses(whole, folder):
    output = folder / "killed"
    arguments = [folder / "dense", *USUAL, "--output", output]
    process = subprocess.Popen(
        [sys.executable, "-m", "nsa_fsa.cli", "convert", *map(str, arguments)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not states(output):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (output / "model").exists()
    done = int(states(output)[-1].parent.name.removeprefix("checkpoint-"))
    # As where it was killed while it wrote the next one.
    (output / "checkpoint-9").mkdir()
    assert f"Going on after step {done}." in run(*arguments)
    assert losses(output) == losses(folder / "whole")
    found, expected = (weights(x / "model") for x in (output, folder / "whole"))
    assert not changed(expected, found)


def test_what_is_there_is_kept_unless_it_is_to_go(whole, folder):
    output = folder / "kept"
    shutil.copytree(folder / "whole", output)
    before = weights(output / "model")
    said = run(folder / "dense", *USUAL, "--output", output, code=2)
    assert "model is there already, made with these options. Fix: another --output" in said
    said = run(folder / "dense", *USUAL, "--output", output, "--lora", 4, code=2)
    assert "has another conversion, whose lora is 0 and not 4. Fix: the same options" in said
    assert not changed(before, weights(output / "model"))
    (output / "notes").write_text("mine")
    run(folder / "dense", *USUAL, "--output", output, "--seed", 5, "--overwrite")
    assert changed(before, weights(output / "model"))
    assert (output / "notes").read_text() == "mine"
    for option in ([], ["--overwrite"]):
        said = run(folder / "dense", *USUAL, "--output", folder / "dense", *option, code=2)
        assert "has files that no conversion has written. Fix" in said
    assert (folder / "dense" / "model.safetensors").is_file()


def test_adapters_learn_instead_and_are_merged(folder):
    """And are resumed."""
    pytest.importorskip("peft", reason="PEFT is not installed, and these are its adapters")
    output = folder / "adapted"
    lora = (folder / "dense", *USUAL, "--lora", 4, "--output", output)
    assert "adapters: loss" in run(*lora)
    before, after = weights(folder / "dense"), weights(output / "model")
    assert before.keys() <= after.keys()
    assert not any("lora" in name for name in after)
    assert changed(before, after) == {name for name in before if name.endswith("proj.weight")}, (
        "what is no linear map of the decoder stays"
    )
    expected = losses(output)
    shutil.rmtree(output / "model")  # as where it was killed before it was saved
    (output / "history.json").unlink()
    run(*lora)
    assert losses(output) == expected
    assert not changed(after, weights(output / "model"))


def test_a_dry_run_says_all_and_writes_nothing(folder):
    said = run(folder / "dense", *USUAL, "--output", folder / "dry", "--dry-run")
    assert not (folder / "dry").exists()
    tokens = 128 * 2
    for line in (
        rf"warm-up {WARM_UP} 3,248 {WARM_UP * tokens}",
        rf"with dense attention as teacher 2 93,680 {2 * tokens}",
        rf"everything, by itself 2 93,680 {2 * tokens}",
        rf"in all {STEPS} {STEPS * tokens:,}",
    ):
        assert line in said.replace("┃", " ")
    said = run(
        *(folder / "dense", *TEXT, *SHAPE, "--output", folder / "dry", "--dry-run"),
        *("--steps", 4, "--warm-up", 4),
    )
    assert "everything" not in said


def test_layers_and_settings(folder):
    output = folder / "settings"
    run(
        *(folder / "dense", *TEXT, *SHAPE, "--output", output, "--steps", 1, "--warm-up", 1),
        *("--set", "num_selected_blocks=3", "--set", "compress_k=linear", "--dense-layer", -1),
        *("--gate-learning-rate", 0.01),
    )
    assert (
        json.loads((output / "conversion.json").read_text())["schedule"]["gate_learning_rate"]
        == 0.01
    )
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    sparse = [isinstance(x.self_attn, NSAAttention) for x in model.model.layers]
    assert sparse == [True, False]
    config = model.model.layers[0].self_attn.nsa_config
    assert (config.num_selected_blocks, config.compress_k) == (3, "linear")
    assert not changed(weights(folder / "dense"), model.state_dict())  # a warm-up alone


@pytest.mark.parametrize("config", [("--preset", "tiny"), ("--config", "one.yaml")], ids=str)
def test_settings_of_some_layers(folder, config, monkeypatch):
    monkeypatch.chdir(folder)
    tiny = NSAConfig.from_pretrained_config(AutoConfig.from_pretrained("dense"), preset="tiny")
    Path("one.yaml").write_text(yaml.safe_dump(tiny.to_dict()))
    output = folder / f"by_layer_{config[0]}"
    own = ("--layer-set", "1:num_selected_blocks=3", "--layer-set", "0-1:window_size=20")
    run(
        *(folder / "dense", *TEXT, *SHAPE[2:], *config, "--set", "window_size=24", *own),
        *("--steps", 1, "--output", output),
    )
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    configs = [x.nsa_config for x in model.modules() if isinstance(x, NSAAttention)]
    assert [x.num_selected_blocks for x in configs] == [tiny.num_selected_blocks, 3]
    assert [x.window_size for x in configs] == [20, 20]


@pytest.mark.parametrize("rate", [0, 1e-3])
def test_a_twin_is_trained_and_stays_dense(folder, rate):
    output = folder / f"twin_{rate}"
    said = run(
        *(folder / "dense", *TEXT, *SHAPE, *SCHEDULE[:-1], rate, "--twin", "--output", output)
    )
    assert "NSA" not in said
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    before, after = weights(folder / "dense"), model.state_dict()
    assert before.keys() == after.keys()
    assert bool(changed(before, after)) == bool(rate)
    assert [x["step"] for x in history(output)] == list(range(1, STEPS - WARM_UP + 1))
    assert not any("nsa_mass" in x for x in history(output))


def test_a_twin_reads_all_keys(folder):
    """Its loss is the dense model's, on a window that sparse queries do not read whole."""
    where = str(folder / "dense"), (str(TEXT[1]),)
    plan = conversion.Plan(*where, Schedule(4, 1), "tiny", length=300).twin()
    with tempfile.TemporaryDirectory() as store:
        prepared = conversion.prepare(
            plan, conversion.check(plan), conversion.USUAL, Path(store, "tokens")
        )
        ids = prepared.windows[0]["input_ids"][None]
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    found = prepared.model.eval()(input_ids=ids, labels=ids).loss
    assert found.item() == pytest.approx(dense(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_documents_may_not_see_each_other(folder):
    """The loss of windows with several documents is another then."""
    output = folder / "separate"
    text = tuple(x for i in range(40) for x in ("--text", folder / f"{i}.txt"))
    for i in range(40):
        (folder / f"{i}.txt").write_text("a page that is short " * (i % 3 + 1))
    arguments = (folder / "dense", *text, *SHAPE, "--steps", 1, "--warm-up", 1)
    run(*arguments, "--output", folder / "together")
    run(*arguments, "--output", output, "--separate")
    apart, together = (history(x)[0]["nsa_own"] for x in (output, folder / "together"))
    assert abs(apart - together) > 1e-4
    plan = json.loads((output / "conversion.json").read_text())
    assert plan["separate"] is True


@pytest.fixture(scope="module")
def others(folder):
    """Checkpoints that cannot be converted."""
    sparse_model().save_pretrained(folder / "sparse")
    sizes = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=256,
    )
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "encoder")
    t5 = transformers.T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    t5.save_pretrained(folder / "both_ways")
    capped = transformers.Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=16, layer_types=["full_attention"]
    )
    capped.save_pretrained(folder / "capped")
    for name, changes in {
        "quantized": dict(quantization_config=dict(quant_method="gptq", bits=4)),
        "dropping": dict(attention_dropout=0.1),
    }.items():
        (folder / name).mkdir()
        config = json.loads((folder / "dense" / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("no/such/folder", (), "no/such/folder"),
        ("empty", (), "empty"),
        ("sparse", (), "sparse is sparse already (nsa_llama). Fix: a dense checkpoint"),
        ("quantized", (), "quantized is quantized (gptq), and what is quantized neither learns"),
        ("both_ways", (), "T5Config, of which transformers knows no causal language model. Fix"),
        ("encoder", (), "cannot be patched: it is no model of transformers, or it has no causal"),
        ("capped", (), "its scores have a soft cap, which NSA's kernels do not have"),
        ("dropping", (), "attention_dropout=0.1 is not available in NSA"),
        ("dense", ("--length", 4096), "length=4096 is more than the 512 positions"),
        ("dense", ("--text", "no_file"), "no_file is not there. Fix: a file of text"),
        ("dense", ("--text", ROOT / "benchmarks" / "results"), "has no file of text"),
        ("dense", ("--set", "window_size=0"), "NSAConfig.window_size=0 is not allowed"),
        ("dense", ("--set", "window_sizes=64"), "did you mean 'window_size'?"),
        ("dense", ("--set", "window_size"), "'window_size' is no setting. Fix"),
        ("dense", ("--dense-layer", 2), "'2' names no layers among 0 to 1. Fix: an index"),
        ("dense", ("--steps", 2, "--warm-up", 2, "--twin"), "are all the steps, in which nothing"),
        ("dense", ("--layer-set", "1-2:window_size=9"), "'1-2' names no layers among 0 to 1"),
        ("dense", ("--layer-set", "window_size=9"), "names no layers. Fix: --layer-set 3-10:"),
        (
            "dense",
            ("--dense-layer", 0, "--layer-set", "0:window_size=9"),
            "settings for layer 0, which stays dense. Fix: layers among [1]",
        ),
        ("dense", ("--steps", 1), "warm_up=2 must be at most steps=1"),
        (
            "dense",
            ("--precision", "fp8"),
            "precision='fp8' is not known: allowed are bf16, fp32. Fix",
        ),
        ("dense", ("--layer-inputs", "disk"), "layer_inputs='disk' is not known"),
        ("dense", ("--config", TEXT[1], "--preset", "tiny"), "give one of --preset and --config"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    others, name, arguments, said, monkeypatch
):
    forbid_loading(monkeypatch)
    monkeypatch.chdir(others)
    output = others / "refused"
    assert said in run(name, *USUAL, *arguments, "--output", output, code=2)
    assert not output.exists()


def test_several_processes_are_refused(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = run(folder / "dense", *USUAL, "--output", folder / "refused", code=2)
    assert "runs in one process, and this is one of 2. Fix" in said


def test_text_of_which_the_model_cannot_learn(folder, tmp_path):
    np.save(tmp_path / "wide.npy", np.full(500, 300, dtype=np.int32))
    (tmp_path / "short.txt").write_text("too short")
    for name, said in {
        "wide.npy": "has the token 300 in window 0, and the model knows 0 to 255. Fix",
        "short.txt": "the text has 10 tokens, fewer than one window of 128. Fix",
    }.items():
        arguments = ("--text", tmp_path / name, *SHAPE, "--output", tmp_path / "out")
        assert said in run(folder / "dense", *arguments, code=2)
    # Nothing has been learned, and so nothing is to be kept.
    run(folder / "dense", *USUAL, "--steps", 1, "--warm-up", 0, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "model").is_dir()
