"""Windows of token files: where documents begin, what is a label, and which files are refused."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nsa_fsa.integrations.transformers.data import (
    PackedTokens,
    files_of,
    open_tokens,
    rows_of,
    write_tokens,
)
from tests.integrations.models import dense_model, sparse_model, tokens

END = 9


def test_documents_of_a_window():
    row = np.array([1, 2, END, 3, 4, 5, END, END, 6, 7, 8], dtype=np.uint16)
    windows = PackedTokens(row, 5, [END])
    assert len(windows) == 2  # one token is left over
    found = [{name: x.tolist() for name, x in window.items()} for window in windows]
    assert found == [
        dict(
            input_ids=[1, 2, END, 3, 4],
            labels=[-100, 2, END, -100, 4],
            position_ids=[0, 1, 2, 0, 1],
        ),
        dict(
            input_ids=[5, END, END, 6, 7],
            labels=[-100, END, -100, -100, 7],
            position_ids=[0, 1, 0, 0, 1],
        ),
    ]
    assert all(x.dtype is torch.int64 for x in windows[0].values())
    whole = PackedTokens(row, 11)[0]
    assert whole["position_ids"].tolist() == [*range(11)]
    with pytest.raises(IndexError):
        windows[2]


@pytest.mark.parametrize("make", [sparse_model, dense_model])
def test_documents_do_not_see_each_other(make):
    """The loss of a window is that of its documents by themselves, in sparse layers and dense."""
    model, row = make(), tokens(200).clamp(min=END + 1)
    row[[69, 149]] = END
    window = PackedTokens(row.numpy(), 200, [END])[0]
    batch = {name: x[None] for name, x in window.items()}
    number = (window["labels"] != -100).sum()
    found = model(**batch, num_items_in_batch=number, use_cache=False).loss
    parts = [
        model(x[None], labels=x[None], num_items_in_batch=number, use_cache=False).loss
        for x in row.split([70, 80, 50])
    ]
    torch.testing.assert_close(found, sum(parts))


def test_token_files(tmp_path):
    numbers = np.arange(10)
    np.save(tmp_path / "x.npy", numbers.astype(np.int32))
    numbers.astype(np.uint32).tofile(tmp_path / "x.bin")
    for path, given in (("x.npy", "uint16"), ("x.bin", "uint32")):
        found = open_tokens(tmp_path / path, given)
        assert isinstance(found, np.memmap)
        assert found.tolist() == numbers.tolist()


def test_what_are_no_tokens_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(4))
    np.save(tmp_path / "y.npy", np.zeros((4, 4), dtype=np.int64))
    (tmp_path / "x.bin").write_bytes(b"123")
    (tmp_path / "y.bin").write_bytes(b"")
    for name, said in (
        ("x.npy", r"holds float64 of shape \(4,\).*Fix: np.save"),
        ("y.npy", r"holds int64 of shape \(4, 4\).*Fix: np.save"),
        ("x.bin", r"has 3 bytes, which are no tokens of 2 bytes \(uint16\).*Fix: the dtype"),
        ("y.bin", "has 0 bytes"),
    ):
        with pytest.raises(ValueError, match=said):
            open_tokens(tmp_path / name)
    with pytest.raises(ValueError, match="'int3' is not known: allowed are uint8"):
        open_tokens(tmp_path / "x.bin", "int3")
    with pytest.raises(ValueError, match=r"mine has 3 tokens, fewer than one window of 4"):
        PackedTokens(np.arange(3), 4, name="mine")
    with pytest.raises(ValueError, match="length=1 must be 2"):
        PackedTokens(np.arange(3), 1)
    for wrong in (10, -1):
        windows = PackedTokens(np.array([1, 2, 3, wrong]), 2, vocab_size=10, name="mine")
        assert windows[0]["input_ids"].tolist() == [1, 2]
        with pytest.raises(ValueError, match=rf"mine has the token {wrong} in window 1.*0 to 9"):
            windows[1]


@pytest.fixture
def tokenizer():
    """A token for every word, and as Llama's a first one before every text."""
    words = ["<begin>", "<end>", "<unknown>", "a", "b", "c"]
    made = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, "<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("<begin> $A", None, [("<begin>", 0)])
    names = dict(bos_token="<begin>", eos_token="<end>", unk_token="<unknown>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def test_text_is_tokenized(tmp_path, tokenizer, monkeypatch):
    """In pieces of lines, as one document a file."""
    (tmp_path / "one.txt").write_text("a b\nc a\nb b", encoding="utf-8")
    (tmp_path / "two.txt").write_text("ä c", encoding="utf-8")
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for size in (1, 1 << 20):
        monkeypatch.setattr("nsa_fsa.integrations.transformers.data._PIECE", size)
        found = write_tokens(texts, tmp_path / "made" / "x.bin", tokenizer)
        assert found.tolist() == [0, 3, 4, 5, 3, 4, 4, 1, 0, 2, 5, 1]
        found = write_tokens(texts, tmp_path / "x.bin", end=0)
        assert bytes(found.tolist()) == "a b\nc a\nb b\0ä c\0".encode()
    assert open_tokens(tmp_path / "x.bin", "uint32").tolist() == found.tolist()


def test_text_that_is_none_leaves_no_tokens(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_bytes(b"a \xff")
    with pytest.raises(ValueError, match=r"one.txt is no UTF-8 text.*Fix: convert it"):
        write_tokens([tmp_path / "one.txt"], tmp_path / "x.bin", tokenizer)
    assert not (tmp_path / "x.bin").exists()


def test_a_folder_is_its_files_of_text_in_order(tmp_path):
    for name in ("b.txt", "a/c.py", "a/picture.png", "a/b/d.md", "tokens.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    inside = [tmp_path / x for x in ("a/b/d.md", "a/c.py", "b.txt")]
    named = tmp_path / "a" / "picture.png"
    assert files_of([named, tmp_path]) == [named, *inside]
    with pytest.raises(ValueError, match=r"nowhere is not there\. Fix"):
        files_of([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no file of text, .* Fix: name the files"):
        files_of([tmp_path / "empty"])


def test_rows_of_text_are_written_once(tmp_path, tokenizer):
    np.save(tmp_path / "x.npy", np.arange(5, dtype=np.int32))
    np.arange(3, dtype=np.uint8).tofile(tmp_path / "y.bin")
    (tmp_path / "one.txt").write_text("a b")
    files, store = [tmp_path / x for x in ("x.npy", "one.txt", "y.bin")], tmp_path / "made.bin"
    for text in ("a b", "c"):  # the second is not looked at: a run goes on with what it began with
        (tmp_path / "one.txt").write_text(text)
        rows = rows_of(files, store, tokenizer, 1, "uint8")
        found = {name: x.tolist() for name, x in rows.items()}
        assert found == {
            str(tmp_path / "x.npy"): [0, 1, 2, 3, 4],
            str(tmp_path / "y.bin"): [0, 1, 2],
            "the text": [0, 3, 4, 1],
        }
