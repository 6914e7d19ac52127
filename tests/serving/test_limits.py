"""What is refused before an engine starts, by name."""

import json
import shutil

import pytest
from vllm.engine.arg_utils import EngineArgs

from nsa_fsa.integrations.transformers import patch_model
from nsa_fsa.integrations.vllm import names
from nsa_fsa.integrations.vllm.limits import refusals
from tests.integrations import families
from tests.serving import checkpoints
from tests.serving.engines import engine


def start(folder, **options):
    with engine(folder, **options):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_cache_dtype="fp8"), "--kv-cache-dtype=fp8 is not available with NSA layers"),
        (dict(block_size=8), "--block-size=8 is not allowed with NSA layers of block_size=16"),
        (
            dict(speculative_config=dict(method="ngram", num_speculative_tokens=16)),
            "num_speculative_tokens=16 is not available .* at most 15",
        ),
        (
            dict(speculative_config=dict(method="ngram_gpu", num_speculative_tokens=2)),
            "tokens guessed by 'ngram_gpu' are not available",
        ),
        (dict(pipeline_parallel_size=2), "pipeline_parallel_size=2 is not available"),
        (dict(model_impl="transformers"), "--model-impl=transformers is not available"),
    ],
)
def test_options(llama, options, message):
    with pytest.raises(ValueError, match=message):
        start(llama.folder, **options)


def test_sleep(llama):
    """What vLLM refuses on a CPU by itself."""
    config = EngineArgs(model=llama.folder, max_model_len=1024).create_engine_config()
    assert not [*refusals(config)]
    config.model_config.enable_sleep_mode = True
    (message,) = refusals(config)
    assert message.startswith("enable_sleep_mode is not available with NSA layers")


def test_guesses_of_a_sparse_model(llama):
    guess = dict(method="draft_model", model=llama.folder, num_speculative_tokens=2)
    with pytest.raises(ValueError, match=r"is not available as the model that guesses .* a dense"):
        start(llama.folder, speculative_config=guess)


@pytest.mark.parametrize("impl", ["auto", "transformers"])
@pytest.mark.parametrize("family", ["Gemma", "Phi3", "Glm"])
def test_other_families(family, impl, tmp_path):
    """Whichever way vLLM would look for a class."""
    model = families.FAMILIES[family]()
    patch_model(model, preset="tiny", verbose=False)
    model.save_pretrained(tmp_path)
    checkpoints.make_tokenizer().save_pretrained(tmp_path)
    message = f"NSA{family}ForCausalLM is not available: .* families Llama, .* Fix: model.generate"
    with pytest.raises(ValueError, match=message):
        start(tmp_path, model_impl=impl, trust_remote_code=True)


def test_a_dense_class_for_a_sparse_checkpoint(llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM is not available"):
        start(llama.folder, hf_overrides=dict(architectures=["LlamaForCausalLM"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kv_per_branch=True), "kv_per_branch=True of layer 0 is not available"),
        (dict(compressor_k="mine.Phi"), r"layer 0 was saved with a compressor_k .* mine\.Phi"),
        (dict(window_size=0), "NSAConfig.window_size=0 is not allowed"),
    ],
)
def test_checkpoints(llama, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(changed(llama.folder, tmp_path, nsa=changes))


def test_rotation_by_angles_that_change(llama, tmp_path):
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
    with pytest.raises(ValueError, match="not available with rope_type='dynamic'"):
        start(changed(llama.folder, tmp_path, rope_parameters=rope))


def test_dense_layers_with_a_sliding_window(llama, tmp_path):
    kinds = ["sliding_attention", "full_attention"]
    fields = dict(model_type="nsa_qwen3", architectures=["NSAQwen3ForCausalLM"])
    fields |= dict(dense_layer_types=kinds, sliding_window=64, use_sliding_window=True)
    with pytest.raises(ValueError, match="sliding_window=64 of dense layers is not available"):
        start(changed(llama.folder, tmp_path, nsa=dict(layers=[1]), **fields))


def changed(folder, tmp_path, nsa=(), **fields):
    """A copy of a checkpoint with other fields in its config."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields, "nsa": {**config["nsa"], **dict(nsa)}}))
    return tmp_path


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_versions_that_nobody_has_tried(version):
    message = names.why_untested(version)
    assert message.startswith(f"vLLM {version} has not been tried with NSA")
    assert all(x in message for x in names.TESTED)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1rc1"])
def test_versions_in_the_range(version):
    assert names.why_untested(version) is None


def test_the_installed_version_is_one_that_is_named():
    assert names.version_of_vllm().startswith(names.TESTED)


def test_families_that_vllm_knows_and_transformers_too():
    assert {x.model_type for x in names.FAMILIES.values()} == set(checkpoints.FAMILIES)
