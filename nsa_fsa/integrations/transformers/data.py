"""What a language model is trained on: windows of tokens that lie in files, in which documents do
not see each other. Files are mapped into memory, so they may be larger than it.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
TEXT_DTYPE = "uint32"  # of tokens that were text
TOKENS = (".bin", ".npy")  # what files of tokens end in
TEXTS = (".md", ".py", ".rst", ".txt")  # what files of text in a folder end in
_PIECE = 1 << 20  # characters or bytes that are tokenized at once


class PackedTokens(Dataset[dict[str, Tensor]]):
    """Windows of `length` tokens, one behind the other; the rest of the row is left out.

    An item has `input_ids`, `labels` and `position_ids`, int64 `[length]`. Positions start at 0
    behind every end of a document, which sparse layers and those of transformers take for the
    boundary of a sequence, and the first token of a document is nobody's label.

    Args:
        tokens: one row, as of `open_tokens`.
        length: of a window.
        ends: tokens that end a document, which they belong to.
        vocab_size: of the model; a window with a token beyond it raises ValueError.
        name: what errors call the row.

    Raises:
        ValueError: for fewer tokens than a window has.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        length: int,
        ends: Collection[int] = (),
        vocab_size: int | None = None,
        name: str | Path = "tokens",
    ) -> None:
        if length < 2:
            raise ValueError(f"length={length} must be 2 or more. Fix: 8192, for example.")
        if len(tokens) < length:
            raise ValueError(
                f"{name} has {len(tokens):,} tokens, fewer than one window of {length:,}. "
                "Fix: a smaller length, or more text."
            )
        self._tokens, self._length, self._name = tokens, length, name
        self._ends, self._vocab_size = np.array(sorted(ends), dtype=np.int64), vocab_size

    def __len__(self) -> int:
        return len(self._tokens) // self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no window {index}: there are {len(self)}.")
        start = index * self._length
        ids = self._tokens[start : start + self._length].astype(np.int64)
        if self._vocab_size is not None and (ids.min() < 0 or ids.max() >= self._vocab_size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(
                f"{self._name} has the token {wrong} in window {index}, and the model knows 0 to "
                f"{self._vocab_size - 1}. Fix: the model's own tokenizer, or the dtype in which "
                "the file was written."
            )
        is_first = np.ones(self._length, dtype=bool)
        is_first[1:] = np.isin(ids[:-1], self._ends)
        rows = np.arange(self._length)
        positions = rows - np.maximum.accumulate(np.where(is_first, rows, 0))
        labels = np.where(is_first, -100, ids)
        arrays = dict(input_ids=ids, labels=labels, position_ids=positions)
        return {key: torch.from_numpy(x) for key, x in arrays.items()}


def open_tokens(path: str | Path, dtype: str = "uint16") -> np.ndarray:
    """The tokens of a file, mapped into memory.

    Args:
        path: `.npy`, of one dimension, which knows its dtype, or any other name for bare numbers.
        dtype: of bare numbers, one of `DTYPES`.

    Raises:
        ValueError: for a file that does not hold such numbers.
    """
    path = Path(path)
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r")
        if tokens.ndim != 1 or tokens.dtype.name not in DTYPES:
            raise ValueError(
                f"{path} holds {tokens.dtype} of shape {tokens.shape}; it must be one row of "
                f"{', '.join(DTYPES)}. Fix: np.save(path, tokens.reshape(-1))."
            )
        return tokens
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known: allowed are {', '.join(DTYPES)}.")
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % width:
        raise ValueError(
            f"{path} has {size:,} bytes, which are no tokens of {width} bytes ({dtype}) each. "
            "Fix: the dtype in which the file was written."
        )
    return np.memmap(path, dtype=dtype, mode="r")


def files_of(paths: Iterable[str | Path]) -> list[Path]:
    """The files that are named, and those of text anywhere in the folders that are, in order.

    Raises:
        ValueError: for what is not there, or a folder without text.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(x for x in path.rglob("*") if x.suffix in TEXTS and x.is_file())
            if not inside:
                raise ValueError(
                    f"{path} has no file of text, which in a folder is what ends in "
                    f"{', '.join(TEXTS)}. Fix: name the files, as in {path}/*."
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{path} is not there. Fix: a file of text or tokens, or a folder.")
    return found


def rows_of(
    files: Iterable[Path],
    store: Path,
    tokenizer: Any = None,
    end: int | None = None,
    dtype: str = "uint16",
) -> dict[str, np.ndarray]:
    """The tokens of files, by a name for errors: each of `TOKENS` is a row of its own, and what is
    text becomes one, which is written only where it is not there yet.

    Args:
        files: as of `files_of`.
        store: where tokens of text go.
        tokenizer, end: as of `write_tokens`.
        dtype: of bare numbers.

    Raises:
        ValueError: as of `open_tokens` and `write_tokens`.
    """
    files = list(files)
    rows = {str(x): open_tokens(x, dtype) for x in files if x.suffix in TOKENS}
    if texts := [x for x in files if x.suffix not in TOKENS]:
        known = store.is_file()
        rows["the text"] = (
            open_tokens(store, TEXT_DTYPE) if known else write_tokens(texts, store, tokenizer, end)
        )
    return rows


def write_tokens(
    texts: Iterable[str | Path], path: str | Path, tokenizer: Any = None, end: int | None = None
) -> np.ndarray:
    """Tokenizes files of UTF-8 text, each a document, into a file of tokens, and opens it.

    They are read a megabyte of lines at a time, so that they may be larger than memory.

    Args:
        texts: the files.
        path: where the tokens go, as bare numbers of `TEXT_DTYPE`.
        tokenizer: of transformers. None: tokens are bytes.
        end: the token that is written behind every document. Default: the tokenizer's
            `eos_token_id`; none without it.

    Raises:
        ValueError: for a file that is no UTF-8, where there is a tokenizer, or no text at all.
    """
    path = Path(path)
    end = getattr(tokenizer, "eos_token_id", None) if end is None else end
    last = [] if end is None else [[end]]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "wb") as file:
        for text in texts:
            for ids in itertools.chain(_pieces(Path(text), tokenizer), last):
                np.asarray(ids, dtype=TEXT_DTYPE).tofile(file)
    unfinished.replace(path)
    return open_tokens(path, TEXT_DTYPE)


def _pieces(path: Path, tokenizer: Any) -> Iterator[Any]:
    """The tokens of a document; in front the one that the tokenizer begins every text with."""
    if tokenizer is None:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                yield np.frombuffer(piece, dtype=np.uint8)
        return
    first = [tokenizer.bos_token_id]
    if tokenizer("").input_ids[:1] == first:
        yield first
    try:
        with open(path, encoding="utf-8") as lines:
            while text := "".join(lines.readlines(_PIECE)):
                yield tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}. Fix: convert it.") from error
