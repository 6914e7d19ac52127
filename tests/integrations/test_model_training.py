"""Training patched models: checkpointing, packed batches, Trainer, PEFT."""

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from nsa_fsa.integrations.transformers import patch_model
from tests.cases import backends_of, device_of
from tests.integrations.models import FAMILIES, VOCAB, attentions, dense_model, sparse_model, tokens

LENGTHS = [150, 1, 130, 16, 37]
PARTIAL = [None, [0]]


def loss_and_gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


# --- Gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layers", PARTIAL, ids=str)
def test_gradient_checkpointing(layers, use_reentrant):
    model, ids = sparse_model(layers=layers).train(), tokens(2, 130)
    loss, grads = loss_and_gradients(model, input_ids=ids, labels=ids, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    attentions(model)[0].register_forward_hook(lambda *_: calls.append(1))
    loss_again, grads_again = loss_and_gradients(model, input_ids=ids, labels=ids)
    assert len(calls) == 2  # once more in the backward pass: checkpointing is really on
    assert torch.equal(loss_again, loss)
    assert set(grads_again) == set(grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        torch.testing.assert_close(
            grads_again[name], grad, msg=lambda m, name=name: f"{name}: {m}", rtol=1e-5, atol=1e-6
        )


# --- Packed batches -------------------------------------------------------------------------------


def collate(lengths, **arguments):
    sequences = [tokens(n, seed=n) for n in lengths]
    batch = DataCollatorWithFlattening(return_tensors="pt", **arguments)(
        [{"input_ids": s} for s in sequences]
    )
    return sequences, batch


@pytest.mark.parametrize(
    "flash", [True, False], ids=["boundaries given", "boundaries from position_ids"]
)
@pytest.mark.parametrize("layers", PARTIAL, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(family, layers, flash):
    """Logits, loss and every gradient. The collator gives position_ids in both cases,
    cu_seq_lens only when asked.
    """
    model = sparse_model(family, layers=layers)
    sequences, batch = collate(LENGTHS, return_flash_attn_kwargs=flash)
    assert ("cu_seq_lens_q" in batch) == flash
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == (1, sum(LENGTHS))

    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[0]
        separate = torch.cat([model(s[None], use_cache=False).logits[0] for s in sequences])
    torch.testing.assert_close(logits, separate, rtol=1e-3, atol=1e-3)

    loss, grads = loss_and_gradients(model, **batch, use_cache=False)
    model.zero_grad()
    num_targets = sum(n - 1 for n in LENGTHS)
    expected_loss = 0
    for sequence in sequences:
        if len(sequence) > 1:
            part = (
                model(sequence[None], labels=sequence[None], use_cache=False).loss
                * (len(sequence) - 1)
                / num_targets
            )
            part.backward()
            expected_loss += part.detach()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        size = parameter.grad.norm()
        assert (grads[name] - parameter.grad).norm() <= 1e-3 * size, name


@pytest.mark.parametrize("flash", [True, False])
def test_packing_is_not_ignored(flash):
    """That the test above can fail: as one long sequence the logits are others."""
    model = sparse_model()
    _, batch = collate(LENGTHS, return_flash_attn_kwargs=flash)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        long = model(batch["input_ids"], use_cache=False).logits
    assert (packed - long)[:, 200:].abs().max() > 0.1


def test_several_packed_rows():
    """position_ids that start anew in a batch of more than one row."""
    model = sparse_model()
    rows = [[60, 90], [100, 50], [150]]
    parts = [[tokens(n, seed=7 * b + i) for i, n in enumerate(row)] for b, row in enumerate(rows)]
    ids = torch.stack([torch.cat(row) for row in parts])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    with torch.no_grad():
        logits = model(ids, position_ids=position_ids, use_cache=False).logits
        for b, row in enumerate(parts):
            expected = torch.cat([model(part[None], use_cache=False).logits[0] for part in row])
            torch.testing.assert_close(logits[b], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
def test_packed_batch_with_a_cache(layers, flash):
    """Asked for, it is refused, because one cache row cannot hold several sequences."""
    model = sparse_model(layers=layers)
    _, batch = collate(LENGTHS, return_flash_attn_kwargs=flash)
    cache = transformers.DynamicCache()
    for arguments in (dict(use_cache=True), dict(past_key_values=cache)):
        with pytest.raises(
            ValueError, match=r"packed batch cannot fill a cache.*Fix: pass neither"
        ):
            model(**batch, **arguments)
    assert cache.get_seq_length() == 0


# --- Trainer --------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    """Four sentences over and over, from different starts, so that one epoch is enough to learn
    much of them.
    """

    def __init__(self, size, length):
        text = torch.randint(1, 97, (4, 20), generator=torch.Generator().manual_seed(0)).repeat(
            1, 10
        )
        self.items = [text[i % 4, i % 20 : i % 20 + length - i % 3] for i in range(size)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return {"input_ids": self.items[index].tolist(), "labels": self.items[index].tolist()}


def pad(items):
    width = max(len(item["input_ids"]) for item in items)
    rows = [[0] * (width - len(item["input_ids"])) + item["input_ids"] for item in items]
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
    }


def quiet_arguments(folder, batch_size, **others):
    """Of a Trainer on the CPU that prints nothing."""
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True)
    return TrainingArguments(str(folder), per_device_train_batch_size=batch_size, **quiet, **others)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_trainer(tmp_path, packed):
    model = dense_model(initializer_range=0.05)
    patch_model(model, preset="tiny", verbose=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    arguments = quiet_arguments(
        tmp_path,
        batch_size=4,
        num_train_epochs=1,
        learning_rate=3e-3,
        logging_steps=5,
        save_strategy="epoch",
        gradient_checkpointing=True,
        seed=0,
    )
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if packed else pad
    model.config.use_cache = False
    trainer = Trainer(model, arguments, train_dataset=Sentences(160, 110), data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert losses[0] > 3.5  # guessing is ln(97) = 4.6
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name

    (checkpoint,) = tmp_path.glob("checkpoint-*")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_resumes(tmp_path, family):
    """As if it had never stopped."""
    arguments = quiet_arguments(tmp_path, 2, max_steps=3, learning_rate=3e-3, save_steps=2, seed=0)

    def trainer(seed):
        return Trainer(
            sparse_model(family, seed=seed, layers=[1]),
            arguments,
            train_dataset=Sentences(16, 40),
            data_collator=pad,
        )

    first, second = trainer(seed=0), trainer(seed=1)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in second.model.named_parameters():
        assert torch.equal(parameter, first.model.get_parameter(name)), name


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer(tmp_path, packing):
    """TRL's trainer: the first step's loss is that of documents alone."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    vocabulary = {str(i): i for i in range(VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "0")), pad_token="0", eos_token="1"
    )
    documents = [tokens(n, seed=n) for n in (150, 90, 130, 40, 110, 60)]
    model = sparse_model(layers=[1])
    with torch.no_grad():
        losses = [model(x[None], labels=x[None]).loss * (len(x) - 1) for x in documents]
    expected = sum(losses) / sum(len(x) - 1 for x in documents)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(documents),
        learning_rate=3e-3,
        max_length=300,
        packing=packing,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"input_ids": [x.tolist() for x in documents]}),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == (2 if packing else 6)
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_trainer_compiles_few_graphs(tmp_path):
    """One, and one more when lengths turn out to vary; no break,
    so that none is added by a layer or a step.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments = quiet_arguments(
        tmp_path,
        batch_size=2,
        max_steps=3,
        save_strategy="no",
        torch_compile=True,
        torch_compile_backend="eager",
    )
    Trainer(
        sparse_model(layers=[1]), arguments, train_dataset=Sentences(16, 40), data_collator=pad
    ).train()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", PARTIAL, ids=str)
def test_lora(tmp_path, layers):
    """Adapters on the projections; gates and compressors trained whole and saved with
    the adapter.
    """
    model, ids = sparse_model(layers=layers), tokens(2, 130)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["self_attn.gate", "compress_k", "compress_v"],
        init_lora_weights=True,
    )
    adapted = peft.get_peft_model(model, settings)
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    # A and B of 4 projections; gate (2), compressors (2)
    assert len(trainable) == 2 * 2 * 4 + 4 * len(layers or [0, 1])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses, start = [], {name: p.detach().clone() for name, p in adapted.named_parameters()}
    for _ in range(8):
        loss = adapted(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, start[name]) == (name not in trainable), name

    adapted.eval()
    with torch.no_grad():
        expected = adapted(ids, use_cache=False).logits
    adapted.save_pretrained(tmp_path)
    fresh = sparse_model(layers=layers)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, base[name])
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected, rtol=0, atol=0)
    prompt = tokens(1, 120)
    assert torch.equal(
        loaded.generate(input_ids=prompt, max_new_tokens=10, do_sample=False),
        adapted.generate(input_ids=prompt, max_new_tokens=10, do_sample=False, use_cache=False),
    )


# --- Every backend --------------------------------------------------------------------------------


def training_losses(backend, steps=100):
    device = device_of(backend)
    model = (
        sparse_model(nsa=dict(backend=backend, gate_init="dense"), initializer_range=0.05)
        .to(device)
        .train()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data, losses = Sentences(40, 112), []
    for step in range(steps):
        items = [torch.tensor(data[(4 * step + i) % 40]["input_ids"][:110]) for i in range(4)]
        batch = torch.stack(items).to(device)
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    "backend",
    [backend for backend in backends_of("nsa_attention") if backend.values[0] != "reference"],
)
def test_training_a_model_tracks_the_reference(backend):
    if device_of(backend) == "cpu":
        pytest.skip("100 steps take Triton's interpreter hours: on a GPU only")
    # row 16 of the bars.
    torch.testing.assert_close(
        training_losses(backend), training_losses("reference"), rtol=0, atol=1e-2
    )
