"""What a conversion is judged by: the loss at every position, what layers choose beside what dense
attention would, whether a needle is found, and whether what stands far above is copied.

A model is one of transformers, a window is int64 `[S]`, and nothing here leaves gradients.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nsa_fsa.training.teacher import teach

FIRST_BUCKET = 512  # positions, where a window has eight times as many or more
_ROWS = 1024  # tokens whose logits are float32 at once

Encode = Callable[[str], list[int]]


# --- Loss -----------------------------------------------------------------------------------------


@torch.no_grad()
def losses(model: Any, windows: Iterable[Tensor]) -> Tensor:
    """Nats of every token but a window's first, float32 `[windows, S - 1]`, on the CPU."""
    rows = []
    for window in windows:
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        pairs = zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True)
        found = [cross_entropy(x.float(), y, reduction="none") for x, y in pairs]
        rows.append(torch.cat(found).cpu())
    return torch.stack(rows)


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges of positions `first : stop`, each but the first as long as all before it; of a short
    window the first is shorter than 512, so that there are some four of them."""
    edge = max(1, min(FIRST_BUCKET, 2 ** int(math.log2(length)) // 8))
    edges = [0]
    while edge < length:
        edges.append(edge)
        edge *= 2
    return [*zip(edges, [*edges[1:], length], strict=True)]


class Gap(NamedTuple):
    """The loss at some positions, of two models on the same windows."""

    first: int  # position
    stop: int
    dense: float  # nats a token
    sparse: float
    # The standard error of their difference over windows; NaN of one alone.
    uncertainty: float

    @property
    def gap(self) -> float:
        return self.sparse - self.dense


def gaps(dense: Tensor, sparse: Tensor) -> list[Gap]:
    """By `buckets`, and of all positions in front of these; of what `losses` returns."""
    length = dense.shape[1] + 1
    found = []
    for first, stop in ((0, length), *buckets(length)):
        # The first token is nobody's to predict, so that position p is in column p - 1.
        both = [x[:, max(0, first - 1) : stop - 1].mean(1) for x in (dense, sparse)]
        difference = both[1] - both[0]
        error = difference.std() / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        found.append(Gap(first, stop, both[0].mean().item(), both[1].mean().item(), float(error)))
    return found


# --- Layers ---------------------------------------------------------------------------------------


class LayerReport(NamedTuple):
    """Means of a layer's lessons: see `Lesson`."""

    layer: int
    error: float
    divergence: float
    mass: float
    recall: float
    gates: tuple[float, float, float]


@torch.no_grad()
def layers(model: Any, windows: Iterable[Tensor]) -> list[LayerReport]:
    """What every NSA layer chooses, beside dense attention over the same queries and keys."""
    found: dict[int, list[Tensor]] = {}
    for window in windows:
        with teach(model) as teacher:
            model.base_model(input_ids=window[None].to(model.device), use_cache=False)
        for x in teacher.lessons:
            numbers = torch.stack([x.error, x.divergence, x.mass, x.recall, *x.gates])
            found.setdefault(x.layer_idx, []).append(numbers.cpu())
    reports = []
    for layer, rows in sorted(found.items()):
        error, divergence, mass, recall, *gates = torch.stack(rows).nanmean(0).tolist()
        reports.append(LayerReport(layer, error, divergence, mass, recall, tuple(gates)))
    return reports


# --- Needles --------------------------------------------------------------------------------------

WORDS = (
    "amber", "badger", "cedar", "dolphin", "ember", "falcon", "garnet", "heron", "indigo",
    "juniper", "kestrel", "lantern", "marigold", "nutmeg", "otter", "pepper",
)  # fmt: skip
NEEDLE = "\n\nRemember this: the secret code of the {word} is {code}.\n\n"
QUESTION = "\n\nNow recall what was to be remembered above: the secret code of the {word} is"


@dataclass(frozen=True)
class Haystacks:
    """Where needles are hidden: sentences with a code in real text, asked for at its end.

    Args:
        lengths: tokens of a text, with needle, question and answer.
        depths: where the needle lies, from 0, the beginning, to 1, right before the question.
        samples: needles for each length and depth, each in another text.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4

    @property
    def number(self) -> int:
        return len(self.lengths) * len(self.depths) * self.samples


class Haystack(NamedTuple):
    """A text that ends in the answer."""

    place: tuple[int, int]  # of its length and its depth
    ids: Tensor  # int64 [length]
    answer: int  # how many tokens at the end are it


def lengths_up_to(length: int) -> tuple[int, ...]:
    """Up to four lengths, each half of the next one."""
    found = [length >> halved for halved in reversed(range(4))]
    return tuple(x for x in found if x >= min(256, length))


def hide(haystacks: Haystacks, text: Tensor, encode: Encode, seed: int = 0) -> list[Haystack]:
    """The texts, of real tokens `[number]` that are long enough for the longest.

    Raises:
        ValueError: for a length that has no room for needle, question and answer.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    made = []
    for _ in range(haystacks.samples):
        for row, length in enumerate(haystacks.lengths):
            for column, depth in enumerate(haystacks.depths):
                word, code = WORDS[draw(len(WORDS))], 10_000 + draw(90_000)
                needle = encode(NEEDLE.format(word=word, code=code))
                question = encode(QUESTION.format(word=word))
                answer = encode(f" {code}")
                room = length - len(needle) - len(question) - len(answer)
                if room < 0 or length > len(text):
                    raise ValueError(
                        f"a text of {length} tokens with a needle needs {length - room} of them "
                        f"for needle and question, and {len(text)} are there in all. "
                        f"Fix: lengths from {length - room} to {len(text)}."
                    )
                start, before = draw(len(text) - room + 1), round(depth * room)
                hay = text[start : start + room].tolist()
                ids = [*hay[:before], *needle, *hay[before:], *question, *answer]
                made.append(Haystack((row, column), torch.tensor(ids), len(answer)))
    return made


@torch.no_grad()
def finds(model: Any, haystack: Haystack) -> bool:
    """Whether a model that writes what is likeliest writes the answer."""
    ids = haystack.ids[None].to(model.device)
    output = model(input_ids=ids, use_cache=False, logits_to_keep=haystack.answer + 1)
    likeliest = output.logits[0, :-1].argmax(-1)
    return bool((likeliest == ids[0, -haystack.answer :]).all())


class Needles(NamedTuple):
    """Which needles two models find."""

    haystacks: Haystacks
    dense: list[list[float]]  # of every length, by depth, the share that is found
    sparse: list[list[float]]
    kept: float  # of those that the dense model finds, the share that the sparse one does; or NaN


def needles(
    haystacks: Haystacks, made: Sequence[Haystack], dense: Sequence[bool], sparse: Sequence[bool]
) -> Needles:
    """Of what both found of each text."""

    def shares(found: Sequence[bool]) -> list[list[float]]:
        total = torch.zeros(len(haystacks.lengths), len(haystacks.depths))
        for haystack, yes in zip(made, found, strict=True):
            total[haystack.place] += yes
        return (total / haystacks.samples).tolist()

    both = sum(x and y for x, y in zip(dense, sparse, strict=True))
    kept = both / sum(dense) if any(dense) else math.nan
    return Needles(haystacks, shares(dense), shares(sparse), kept)


# --- Copies ---------------------------------------------------------------------------------------

COPIED = 64  # tokens of a passage, of which the first quarter is no more than a cue
DEPTHS = (0.0, 0.25, 0.5, 0.75)


def with_copy(window: Tensor, depth: float) -> Tensor:
    """A window `[S]` whose last tokens are a copy of those that stand at a depth, from 0, its
    beginning, to 1, right before the copy. Of a window of less than 512 tokens it is an eighth."""
    copied = min(COPIED, len(window) // 8)
    start = round(depth * (len(window) - 2 * copied))
    return torch.cat((window[:-copied], window[start : start + copied]))


def copy_loss(model: Any, window: Tensor) -> float:
    """Nats of a token of the copy at the end of a window, behind its cue."""
    copied = min(COPIED, len(window) // 8)
    counted = copied - copied // 4
    ids = window[None].to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=counted + 1).logits
    return cross_entropy(logits[0, :-1].float(), ids[0, -counted:]).item()


class Copy(NamedTuple):
    """The mean loss of copies from a depth, of two models on the same windows."""

    depth: float
    dense: float  # nats a token
    sparse: float

    @property
    def gap(self) -> float:
        return self.sparse - self.dense


def copies(dense: Sequence[float], sparse: Sequence[float]) -> list[Copy]:
    """Of what `copy_loss` returns for every window, with a copy from each of DEPTHS; of no windows
    nothing."""
    if not dense:
        return []
    columns = (torch.tensor(x).view(-1, len(DEPTHS)).mean(0).tolist() for x in (dense, sparse))
    return [Copy(*row) for row in zip(DEPTHS, *columns, strict=True)]
