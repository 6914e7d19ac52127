"""What vLLM offers beside plain generation, with NSA layers, in float32."""

import pytest
import torch
from torch.nn import functional as F
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms.cpu import CpuPlatform

from nsa_fsa.integrations.transformers import patch_model
from tests.integrations import families
from tests.integrations.models import scramble
from tests.serving import checkpoints
from tests.serving.checkpoints import NEW
from tests.serving.engines import count, engine, run, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


def of_tokens(prompts):
    return [dict(prompt_token_ids=x) for x in prompts]


def test_adapters(llama, tmp_path):
    """Two in one batch, and the model without one after them. One of gates is refused."""
    targets = [["q_proj", "k_proj", "down_proj"], ["v_proj", "o_proj", "gate_proj"]]
    expected, requests = [], []
    for i, names in enumerate(targets):
        tuned = checkpoints.make_adapter(tmp_path / str(i), llama.model, names, seed=i)
        expected.append(checkpoints.continue_greedily(tuned, llama.prompts))
        requests.append(LoRARequest(f"adapter {i}", i + 1, str(tmp_path / str(i))))
    number = len(llama.prompts)
    assert all(expected[0][i] != expected[1][i] != llama.expected[i] for i in range(number))
    with engine(llama.folder, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        turns = [i % 2 for i in range(number)]
        outputs = llm.generate(
            of_tokens(llama.prompts),
            GREEDY,
            use_tqdm=False,
            lora_request=[requests[i] for i in turns],
        )
        assert tokens_of(outputs) == [expected[turn][i] for i, turn in enumerate(turns)]
        assert tokens_of(run(llm, llama.prompts)) == llama.expected
        checkpoints.make_adapter(tmp_path / "gates", llama.model, ["gate", "q_proj"], seed=0)
        gates = LoRARequest("gates", 3, str(tmp_path / "gates"))
        with pytest.raises(ValueError, match=r"but received \['model\.layers\.0\.self_attn\.gate'"):
            llm.generate(of_tokens(llama.prompts[:1]), GREEDY, use_tqdm=False, lora_request=gates)


@pytest.fixture(scope="module")
def chunked(llama):
    options = dict(max_num_batched_tokens=90, max_num_seqs=8)
    with engine(llama.folder, enable_prompt_embeds=True, **options) as llm:
        yield llm


def test_prompts_of_embeddings(llama, chunked):
    table = llama.model.get_input_embeddings().weight.detach()
    prompts = [dict(prompt_embeds=table[torch.tensor(x)]) for x in llama.prompts]
    assert tokens_of(chunked.generate(prompts, GREEDY, use_tqdm=False)) == llama.expected


def test_logprobs_of_prompts(llama, chunked):
    """Those of transformers, to the rounding of float32."""
    outputs = run(chunked, llama.prompts, prompt_logprobs=0)
    for prompt, output in zip(llama.prompts, outputs, strict=True):
        logprobs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        found = torch.tensor([x[token].logprob for x, token in logprobs])
        with torch.no_grad():
            logits = llama.model(torch.tensor([prompt])).logits[0, :-1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_tokens_that_a_dense_model_guesses(method, make_served, tmp_path):
    served = make_served(words=5)
    checkpoints.make_guesser(tmp_path, method, words=5)
    guess = dict(method=method, model=str(tmp_path), num_speculative_tokens=3)
    with engine(served.folder, speculative_config=guess) as llm:
        assert tokens_of(run(llm, served.prompts)) == served.expected
        names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
        drafted, accepted = (count(llm, name) for name in names)
    assert 20 < accepted < drafted - 20


def test_steps_that_are_scheduled_ahead(llama, monkeypatch):
    """As GPUs do by default; vLLM turns it off on a CPU, where it works all the same."""
    settle = CpuPlatform.check_and_update_config

    def settle_otherwise(vllm_config):
        settle(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(settle_otherwise))
    with engine(llama.folder, max_num_batched_tokens=90, max_num_seqs=8) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert type(scheduler).__name__ == "AsyncScheduler"
        assert tokens_of(run(llm, llama.prompts)) == llama.expected


def test_weights_in_eight_bits(llama, tmp_path, monkeypatch):
    """Rounding to 8 bits makes much of the last bit of a float32, so that two of all tokens may
    be others; without the rounding many are."""
    # On a CPU with AMX, vLLM 0.32 takes a kernel for these that has no float32.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    quantized = checkpoints.quantize(tmp_path, llama.folder, llama.model)
    expected = checkpoints.continue_greedily(quantized, llama.prompts)
    texts = [x + y for x, y in zip(llama.prompts, expected, strict=True)]
    with engine(tmp_path) as llm:
        outputs = run(llm, texts, prompt_logprobs=0)
    ranks = [
        logprobs[token].rank
        for text, output in zip(texts, outputs, strict=True)
        for logprobs, token in zip(output.prompt_logprobs[-NEW:], text[-NEW:], strict=True)
    ]
    assert sum(rank > 1 for rank in ranks) <= 2
    with torch.no_grad():
        best = [llama.model(torch.tensor([x])).logits[0, -NEW - 1 : -1].argmax(-1) for x in texts]
    without = zip(best, expected, strict=True)
    assert sum((x != torch.tensor(y)).sum() for x, y in without) > 10


@pytest.mark.parametrize("what", ["model", "classifier"])
def test_pooling(what, tmp_path):
    """Embeddings of the bare model, and the classes of a head."""
    torch.manual_seed(0)
    make = families.language_model("Llama")
    suffix = "Model" if what == "model" else "ForSequenceClassification"
    model = make(model=suffix, hidden_size=256, head_dim=32).float().eval()
    patch_model(model, preset="tiny", verbose=False)
    scramble(model)
    model.save_pretrained(tmp_path)
    checkpoints.make_tokenizer().save_pretrained(tmp_path)
    prompts = [[token % families.VOCAB for token in x] for x in checkpoints.make_prompts()]
    with engine(tmp_path) as llm, torch.no_grad():
        if what == "model":
            outputs = llm.embed(of_tokens(prompts), use_tqdm=False)
            found = [torch.tensor(x.outputs.embedding) for x in outputs]
            last = [model(torch.tensor([x])).last_hidden_state[0, -1] for x in prompts]
            wanted = [F.normalize(x, dim=0) for x in last]
        else:
            outputs = llm.classify(of_tokens(prompts), use_tqdm=False)
            found = [torch.tensor(x.outputs.probs) for x in outputs]
            wanted = [model(torch.tensor([x])).logits[0].softmax(-1) for x in prompts]
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=2e-5, rtol=0)
