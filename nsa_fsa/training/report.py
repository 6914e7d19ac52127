"""What a conversion did to a model: measured beside the dense one, and written as JSON, as a page,
and as pictures."""

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from nsa_fsa import checks
from nsa_fsa.benchmarking.results import code_version, command_line, machine, versions
from nsa_fsa.config import BRANCHES
from nsa_fsa.integrations.transformers import unpatch_model
from nsa_fsa.integrations.transformers.checkpoint import Checkpoint
from nsa_fsa.integrations.transformers.data import PackedTokens, files_of, rows_of
from nsa_fsa.modules.branches import Record
from nsa_fsa.modules.recording import sparse_layers
from nsa_fsa.progress import Steps
from nsa_fsa.training import measures
from nsa_fsa.training.folder import history_of
from nsa_fsa.training.measures import DEPTHS, Copy, Gap, Haystacks, LayerReport, Needles
from nsa_fsa.training.schedule import PRECISIONS
from nsa_fsa.visualization import record

DOCUMENT, PAGE = "report.json", "report.md"
WINDOWS_OF_LAYERS = 4  # of those whose loss is measured: the first ones
DRAWN_LAYERS = 3


@dataclass(frozen=True)
class Question:
    """What is asked of a converted checkpoint.

    Args:
        checkpoint: a sparse one.
        text: that it has not learned from, as of `Plan`.
        dense: what it is compared with; None: the same weights with dense attention.
        length: tokens of a window; None: as many as the model was made for, and at most 8,192.
        windows: how many, evenly spaced in the text.
        needles: how many for each length and depth, and as many copies for each depth; 0: none.
        dtype: of files of bare numbers.
        seed: of needles.
        precision: "bf16" or "fp32", in which layers compute.
    """

    checkpoint: str
    text: tuple[str, ...]
    dense: str | None = None
    length: int | None = None
    windows: int = 16
    needles: int = 4
    dtype: str = "uint16"
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        checks.check_ints(0, needles=self.needles, seed=self.seed)
        checks.check_positive(windows=self.windows)
        checks.check_one_of(PRECISIONS, precision=self.precision)


class Answer(NamedTuple):
    """What was found."""

    question: Question
    length: int
    settings: dict[str, Any]  # of the first NSA layer
    sparse_layers: int
    loss: list[Gap]  # of all positions, and then by bucket
    curve: dict[str, list[float]]  # the mean loss at every position, dense and sparse
    layers: list[LayerReport]
    needles: Needles | None
    copies: list[Copy]
    records: list[Record]  # of some layers, of the first window
    history: list[dict[str, Any]]  # of the training, where it lies beside the checkpoint
    warm_up: int  # its first steps

    @property
    def mass(self) -> float:
        return math.fsum(x.mass for x in self.layers) / len(self.layers)

    def document(self) -> dict[str, Any]:
        """As JSON has it, with where and when."""
        here = machine() | {"transformers": versions().get("transformers")}
        found = self.needles
        return dict(
            schema=1,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command_line(*sys.argv),
            machine=here,
            gpu=here["gpu"],
            code=code_version(),
            question=asdict(self.question),
            length=self.length,
            settings=self.settings,
            loss=[_plain(dict(x._asdict(), gap=x.gap)) for x in self.loss],
            layers=[_plain(x._asdict()) for x in self.layers],
            mass=self.mass,
            needles=None if found is None else _plain(dict(found._asdict(), **asdict(found[0]))),
            copies=[dict(x._asdict(), gap=x.gap) for x in self.copies],
            curve=self.curve,
        )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What JSON knows: no NaN."""
    values.pop("haystacks", None)
    is_nan = {key for key, x in values.items() if isinstance(x, float) and math.isnan(x)}
    return {key: None if key in is_nan else x for key, x in values.items()}


class Measurable(NamedTuple):
    """A question that can be answered."""

    source: Checkpoint
    dense: Checkpoint | None
    files: list[Path]
    length: int


def check(question: Question) -> Measurable:
    """Whether a question can be answered, before a weight is loaded.

    Raises:
        ValueError, OSError: name what is wrong.
        ImportError: names the package that is missing.
    """
    files = files_of(question.text)
    source = Checkpoint.of(question.checkpoint)
    if not hasattr(source.config, "nsa"):
        raise ValueError(
            f"{question.checkpoint} is dense ({source.config.model_type}). Fix: what `nsa-fsa "
            "convert` or save_pretrained of a patched model has written."
        )

    dense = None
    if question.dense is not None:
        dense = Checkpoint.of(question.dense)
        if hasattr(dense.config, "nsa"):
            raise ValueError(
                f"{question.dense} is sparse ({dense.config.model_type}). Fix: the dense "
                "checkpoint that it was made of, or none."
            )
        if dense.vocab_size != source.vocab_size:
            raise ValueError(
                f"{question.dense} has {dense.vocab_size} tokens, and {question.checkpoint} "
                f"{source.vocab_size}. Fix: a checkpoint with the same tokenizer."
            )

    longest = source.longest
    length = min(8192, longest or 8192) if question.length is None else question.length
    if longest is not None and length > longest:
        raise ValueError(
            f"length={length} is more than the {longest} positions that {question.checkpoint} was "
            f"made for. Fix: length={longest} or less."
        )

    return Measurable(source, dense, files, length)


def answer(
    question: Question, found: Measurable, store: Path, console: Console | None = None
) -> Answer:
    """Measures both models.

    Args:
        found: what `check` said.
        store: where the tokens of the text go.
        console: where progress is shown; None: nowhere.

    Raises:
        ValueError: for a text that is too short, or whose tokens the model does not know.
    """
    console = Console(quiet=True) if console is None else console
    source, length = found.source, found.length
    rows = rows_of(found.files, store, source.tokenizer, source.ends[0], question.dtype)
    windows = _windows(rows, length, source.vocab_size, question.windows)
    few = windows[:WINDOWS_OF_LAYERS]
    made = []
    haystacks = Haystacks(measures.lengths_up_to(length), samples=max(1, question.needles))
    if question.needles:
        text, encode = torch.cat(windows), _encoder(source)
        made = measures.hide(haystacks, text, encode, question.seed)
    copied = windows[: question.needles]
    copies = [measures.with_copy(window, depth) for window in copied for depth in DEPTHS]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    total = 2 * (len(windows) + len(made) + len(copies)) + len(few) + 1
    with Steps(total, console, "measuring") as steps:

        def each(what: str, items: Sequence[Any]) -> Any:
            steps.report(what)
            for item in items:
                yield item
                steps.advance()

        def measure(model: Any, name: str) -> tuple[Tensor, list[bool], list[float]]:
            with _casting(device, question.precision):
                loss = measures.losses(model, each(f"loss, {name}", windows))
                found = [measures.finds(model, x) for x in each(f"needles, {name}", made)]
                copied = [measures.copy_loss(model, x) for x in each(f"copies, {name}", copies)]
                return loss, found, copied

        model = source.load().to(device).eval()
        ours = measure(model, "sparse")
        with _casting(device, question.precision):
            layers = measures.layers(model, each("choices", few))
            records = _selections(model, next(each("selections", few[:1])))
        steps.advance()

        own = sparse_layers(model)
        settings = own[0].nsa_config.to_dict()

        if found.dense is None:
            unpatch_model(model)
        else:
            del model
            model = found.dense.load().to(device).eval()
        theirs = measure(model, "dense")

    history, warm_up = history_of(Path(question.checkpoint))
    curve = dict(dense=theirs[0].mean(0).tolist(), sparse=ours[0].mean(0).tolist())

    return Answer(
        question,
        length,
        settings,
        len(own),
        measures.gaps(theirs[0], ours[0]),
        curve,
        layers,
        measures.needles(haystacks, made, theirs[1], ours[1]) if made else None,
        measures.copies(theirs[2], ours[2]),
        records,
        history,
        warm_up,
    )


def _windows(rows: dict[str, Any], length: int, vocab_size: int, number: int) -> list[Tensor]:
    """So many windows of the text, evenly spaced, or all that there are."""
    known = [PackedTokens(x, length, (), vocab_size, name) for name, x in rows.items()]
    places = [(x, i) for x in known for i in range(len(x))]
    number = min(number, len(places))
    chosen = [places[i * len(places) // number] for i in range(number)]
    return [x[i]["input_ids"] for x, i in chosen]


def _encoder(source: Checkpoint) -> measures.Encode:
    def encode(text: str) -> list[int]:
        if source.tokenizer is None:
            return list(text.encode())
        return source.tokenizer(text, add_special_tokens=False).input_ids

    return encode


def _casting(device: str, precision: str) -> Any:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


@torch.no_grad()
def _selections(model: Any, window: Tensor) -> list[Record]:
    """What some layers choose, evenly spaced from the first to the last."""
    with record(model) as records:
        model.base_model(input_ids=window[None].to(model.device), use_cache=False)
    drawn = min(DRAWN_LAYERS, len(records))
    return [records[i * (len(records) - 1) // max(1, drawn - 1)] for i in range(drawn)]


# --- What is written ------------------------------------------------------------------------------


def write(found: Answer, output: Path) -> list[Path]:
    """The document, the page and the pictures, in a folder; which files there are now.

    Raises:
        ImportError: without matplotlib and seaborn.
    """
    from nsa_fsa.training import pictures

    output.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(found, output)
    document = found.document()
    (output / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (output / PAGE).write_text(page(found, document, drawn), encoding="utf-8")
    return [output / DOCUMENT, output / PAGE, *(output / f"{name}.png" for name in drawn)]


def page(found: Answer, document: dict[str, Any], drawn: dict[str, str]) -> str:
    """The report as markdown. drawn: pictures by name, each with what it shows."""
    asked, c = found.question, found.settings
    dense = "the same weights with dense attention" if asked.dense is None else asked.dense
    reach = c["num_selected_blocks"] * c["block_size"]

    lines = [
        f"# {asked.checkpoint}",
        "",
        f"Compared with {dense}, on {asked.windows} windows of {found.length:,} tokens. "
        f"{found.sparse_layers} layers are sparse: every query reads {c['num_selected_blocks']} "
        f"blocks of {c['block_size']} keys ({reach:,}), the last {c['window_size']} keys, and one "
        f"compressed token for every {c['kernel_stride']}.",
        "",
        *summary(found),
        "",
        "## Loss by position",
        "",
        *_table(
            ("positions", "dense", "sparse", "gap", "uncertainty"),
            (
                (_range(x, found.length), f"{x.dense:.4f}", f"{x.sparse:.4f}", f"{x.gap:+.4f}",
                 "-" if math.isnan(x.uncertainty) else f"{x.uncertainty:.4f}")
                for x in found.loss
            ),
        ),
        "",
        "In nats per token. The uncertainty is the standard error of the gap over windows.",
        "",
    ]  # fmt: skip
    lines += _picture("loss", drawn)

    lines += [
        "## Layers",
        "",
        *_table(
            ("layer", "error", "divergence", "mass", "recall", *BRANCHES),
            ((str(x.layer), *(_number(y) for y in (*x[1:5], *x.gates))) for x in found.layers),
        ),
        "",
        "Error: how far the layer's output is from that of dense attention over the same queries, "
        "keys and values, over the norm of that. Divergence: how far block scores are from where "
        "dense attention's mass lies, in nats. Mass: the share of it in the chosen blocks. Recall: "
        "of the free blocks with the most mass, the share that is chosen. Then the mean gates.",
        "",
    ]
    lines += _picture("layers", drawn)

    if found.needles is not None:
        lines += ["## Needles", "", _about_needles(found.needles), ""]
        lines += _picture("needles", drawn)

    if found.copies:
        lines += [
            "## Copies",
            "",
            *_table(
                ("depth", "dense", "sparse", "gap"),
                (
                    (f"{x.depth:.0%}", f"{x.dense:.4f}", f"{x.sparse:.4f}", f"{x.gap:+.4f}")
                    for x in found.copies
                ),
            ),
            "",
            "The loss of a passage of the text that comes again at its end, in nats per token. A "
            "model has to look it up at that depth, of which 0% is the beginning.",
            "",
        ]

    lines += ["## Selections", ""]
    lines += _picture("selections", drawn)

    if "learning" in drawn:
        lines += ["## How it was trained", ""]
        lines += _picture("learning", drawn)

    code, here = document["code"], document["machine"]
    versions = ", ".join(f"{x} {here[x]}" for x in ("torch", "triton", "transformers") if here[x])
    lines += [
        "## How it was measured",
        "",
        f"`{document['command']}`, {document['date']}, commit {code['commit'][:12]}"
        f"{' with changes' if code['dirty'] else ''}, GPU: {here['gpu']}, {versions}, "
        f"{asked.precision}.",
    ]

    return "\n".join(lines) + "\n"


def summary(found: Answer) -> list[str]:
    """What matters most, as a list."""
    whole, last = found.loss[0], found.loss[-1]
    lines = [
        f"- Loss: {whole.sparse:.4f} nats per token, dense {whole.dense:.4f}: {whole.gap:+.4f}.",
        f"- At positions {_range(last, found.length)}: {last.sparse:.4f}, dense {last.dense:.4f}: "
        f"{last.gap:+.4f}.",
        f"- Of dense attention's mass, the chosen blocks hold {found.mass:.1%}, as a mean over "
        "layers.",
    ]
    if found.needles is not None:
        lines.append(f"- {_about_needles(found.needles)}")
    if found.copies:
        dense, sparse = (
            math.fsum(getattr(x, name) for x in found.copies) / len(found.copies)
            for name in ("dense", "sparse")
        )
        lines.append(f"- Copies: {sparse:.4f} nats per token, dense {dense:.4f}.")
    return lines


def _about_needles(found: Needles) -> str:
    shares = [
        sum(sum(row) for row in x) / sum(len(row) for row in x) for x in (found.sparse, found.dense)
    ]
    kept = "" if math.isnan(found.kept) else f", {found.kept:.0%} of those that dense finds"
    return f"Needles: {shares[0]:.0%} are found{kept}; dense finds {shares[1]:.0%}."


def _range(x: Gap, length: int) -> str:
    if (x.first, x.stop) == (0, length):
        return "all"
    return f"{short_number(x.first)} to {short_number(x.stop)}"


def short_number(number: int) -> str:
    """8192 -> "8K"; what is no multiple of 1,024 as it is."""
    return f"{number // 1024}K" if number and number % 1024 == 0 else f"{number:,}"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.4f}"


def _table(heads: Sequence[str], rows: Any) -> list[str]:
    cells = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _picture(name: str, drawn: dict[str, str]) -> list[str]:
    return [f"![{drawn[name]}]({name}.png)", ""]
