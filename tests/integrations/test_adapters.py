"""Saved PEFT adapters: which base model they are loaded onto."""

import copy

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from nsa_fsa.integrations.transformers import NSALlamaForCausalLM, patch_model, unpatch_model
from tests.integrations.models import dense_model, output, sparse_model, tokens

peft = pytest.importorskip(
    "peft", reason="PEFT is not installed, and these tests are of its adapters"
)

LORA = dict(
    r=4,
    target_modules=["q_proj", "v_proj"],
    modules_to_save=["self_attn.gate"],
    task_type="CAUSAL_LM",
)


def save_adapter(model, folder):
    """A LoRA adapter that changes the model's output, saved; returns that output."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return output(adapted, ADAPTED)


def checkpoint(folder, model):
    """The model as from_pretrained gives it."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


ADAPTED = tokens(1, 130)
LOADERS = {
    "peft": peft.AutoPeftModelForCausalLM.from_pretrained,
    "transformers": AutoModelForCausalLM.from_pretrained,
}
LOADS_SAVED_MODULES = pytest.mark.skipif(
    transformers.__version__ < "5.24",
    reason="transformers 5.17 drops an adapter's modules_to_save, of dense models, too",
)


@pytest.mark.parametrize(
    "load",
    [LOADERS["peft"], pytest.param(LOADERS["transformers"], marks=LOADS_SAVED_MODULES)],
    ids=LOADERS,
)
def test_an_adapter_of_a_saved_sparse_model_loads_by_itself(tmp_path, load):
    expected = save_adapter(
        checkpoint(tmp_path / "sparse", sparse_model(layers=[1])), tmp_path / "adapter"
    )
    assert torch.equal(output(load(tmp_path / "adapter").eval(), ADAPTED), expected)


@pytest.mark.parametrize(
    "nsa",
    [dict(window_size=32), dict(preset="tiny"), dict(per_layer={0: dict(window_size=32)})],
    ids=str,
)
def test_settings_that_a_sparse_checkpoint_has_anyway_change_nothing(tmp_path, nsa):
    sparse_model().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, nsa=nsa).name_or_path == str(tmp_path)


def patched(folder):
    model = checkpoint(folder, dense_model())
    patch_model(model, "tiny", gate_init="balanced", verbose=False)
    return model


def patched_within(folder):
    model = checkpoint(folder, dense_model())
    patch_model(model.model, "tiny", verbose=False)
    return model


def patched_again(folder):
    model = checkpoint(folder, sparse_model())
    patch_model(model, window_size=8, verbose=False)
    return model


def read_sparse(folder):
    dense_model().save_pretrained(folder)
    return NSALlamaForCausalLM.from_pretrained(folder, nsa=dict(preset="tiny"))


def read_with_settings(folder):
    sparse_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, nsa=dict(window_size=8))


def read_with_a_config(folder):
    sparse_model().save_pretrained(folder)
    config = copy.deepcopy(
        AutoConfig.from_pretrained(folder, nsa=dict(per_layer={1: dict(num_selected_blocks=3)}))
    )
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


class LastToken(torch.nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, windows):
        return windows[:, :, -1]


def read_with_a_compressor(folder):
    sparse_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, compressor_k=LastToken)


def unpatched(folder):
    return unpatch_model(checkpoint(folder, sparse_model()))


CHANGED = {
    patched: "patch_model",
    patched_within: "patch_model",
    patched_again: "patch_model",
    read_sparse: "NSALlamaForCausalLM",
    read_with_settings: "NSALlamaForCausalLM",
    read_with_a_config: "NSALlamaForCausalLM",
    read_with_a_compressor: "NSALlamaForCausalLM",
    unpatched: "unpatch_model",
}


# PEFT, to see whether the vocabulary was resized.
@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("make", CHANGED, ids=lambda make: make.__name__)
def test_an_adapter_does_not_load_onto_a_checkpoint_that_is_another_model(tmp_path, make, load):
    """Its base model is not what the checkpoint of that name holds,
    and dense instead of sparse it would run as well.
    """
    model = make(tmp_path / "base")
    if make is unpatched:
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        adapted.save_pretrained(tmp_path / "adapter")
    else:
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(
        OSError,
        match=rf"base, changed by {CHANGED[make]}: load and change it alike, then PeftModel",
    ):
        load(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_of_a_patched_model_loads_onto_one_patched_alike(tmp_path):
    expected = save_adapter(patched(tmp_path / "dense"), tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        patched(tmp_path / "dense"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(output(loaded, ADAPTED), expected)


def test_an_unpatched_model_is_what_its_checkpoint_holds(tmp_path):
    model = patched(tmp_path / "dense")
    model = unpatch_model(model)
    assert {m.name_or_path for m in model.modules() if hasattr(m, "name_or_path")} == {
        str(tmp_path / "dense")
    }
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(output(loaded, ADAPTED), output(adapted.eval(), ADAPTED))


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_resized_vocabulary_is_saved_with_the_adapter_on_request(tmp_path):
    """PEFT cannot see by itself that a patched model's was resized:
    its base model has no file to compare with.
    """
    model = patched(tmp_path / "dense")
    model.resize_token_embeddings(100)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    fresh = patched(tmp_path / "dense")
    torch.manual_seed(1)  # new rows are random
    fresh.resize_token_embeddings(100)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(output(loaded, ADAPTED), output(adapted, ADAPTED))


def test_peft_loads_an_adapter_of_a_sparse_model_onto_a_dense_one(tmp_path):
    """No file of an adapter can prevent it, so README warns of it;
    should PEFT come to refuse it, that line can go.
    """
    save_adapter(checkpoint(tmp_path / "sparse", sparse_model()), tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(dense_model(), tmp_path / "adapter")
    assert not any("gate" in name.split(".") for name, _ in loaded.named_parameters())
