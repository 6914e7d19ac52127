"""What settings of sparse layers cost in quality: SmolLM2-135M is converted with each, in the same
few steps of the same text, and compared with a dense twin that was trained alike.

A setting's result is the report of `nsa-fsa convert-report`, in results/conversion/.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from nsa_fsa.training import Schedule, report
from nsa_fsa.training.conversion import Plan, Run, Way, check, prepare, trainer_of
from nsa_fsa.training.folder import begin_in

RESULTS = Path(__file__).with_name("results") / "conversion"
LINEAR = dict(compress_k="linear", compress_v="linear")
# What a plan has beside what all have.
SETTINGS: dict[str, dict[str, Any]] = {
    "16 x 64": dict(overrides=LINEAR),
    "32 x 64": dict(overrides=LINEAR | dict(num_selected_blocks=32)),
    "48 x 64": dict(overrides=LINEAR | dict(num_selected_blocks=48)),
    "48 x 64 in layers 3 to 10": dict(
        overrides=LINEAR, by_layer={"3-10": dict(num_selected_blocks=48)}
    ),
    "first and last layer dense": dict(overrides=LINEAR, dense_layers=(0, -1)),
    "every fourth layer dense": dict(overrides=LINEAR, dense_layers=tuple(range(0, 30, 4))),
}
WAY = Way(layer_inputs="none", save_every=0, log_every=10)


def plan_of(checkpoint: Path, text: Iterable[str], steps: int) -> Plan:
    """What every setting has in common."""
    schedule = Schedule(steps=steps, warm_up=steps // 4, learning_rate=1e-4)
    return Plan(str(checkpoint), tuple(text), schedule, batch_size=2, accumulate=2)


def train(plan: Plan, output: Path, store: Path, console: Console) -> Path:
    """As `convert`, from text that is tokenized once for all."""
    possible = check(plan)
    begin_in(plan.written(), output)
    prepared = prepare(plan, possible, WAY, store)
    trainer = trainer_of(prepared, plan, WAY, output, plan.schedule)
    return Run(plan, output, possible.source, prepared, trainer, None, console).finish()


def measure(
    plan: Plan,
    held_out: Iterable[str],
    names: Iterable[str],
    folder: Path,
    output: Path,
    console: Console,
    commit: str | None = None,
) -> None:
    """Writes the report of every setting.

    Args:
        plan: what all have in common.
        held_out: text that is measured on.
        names: of SETTINGS.
        folder: where models and texts go meanwhile.
        output: where the reports go.
        commit: the commit, where git here does not know it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, other = folder / "text.bin", folder / "held_out.bin"
    console.print("The dense twin")
    twin = train(plan.twin(), folder / "twin", text, console)
    for name in names:
        console.print(name)
        model = train(
            dataclasses.replace(plan, **SETTINGS[name]), folder / file_of(name), text, console
        )
        question = report.Question(
            str(model), tuple(held_out), str(twin), length=plan.length, precision=plan.precision
        )
        answer = report.answer(question, report.check(question), other, console)
        console.print("\n".join(report.summary(answer)), markup=False, highlight=False)

        document = answer.document() | dict(setting=name, steps=plan.schedule.steps)
        document.pop("curve")
        if commit is not None:
            document["code"] |= dict(commit=commit, dirty=None, commit_stated_by_hand=True)
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{file_of(name)}.json").write_text(json.dumps(document, indent=1) + "\n")


def file_of(name: str) -> str:
    return name.replace(" ", "_")


def table(folder: Path = RESULTS) -> pd.DataFrame:
    """A line a setting: what is lost beside the twin."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    order = list(SETTINGS)
    lines = []
    for x in sorted(documents, key=lambda x: order.index(x["setting"])):
        last = x["loss"][-1]
        kept = (x["needles"] or {}).get("kept")
        lines.append(
            {
                "setting": x["setting"],
                f"gap at {last['first']:,} to {last['stop']:,}": f"{last['gap']:+.4f}",
                "gap, all": f"{x['loss'][0]['gap']:+.4f}",
                "mass": f"{x['mass']:.1%}",
                "needles kept": "-" if kept is None else f"{kept:.0%}",
                "copies, gap": f"{statistics.mean(y['gap'] for y in x['copies']):+.4f}",
            }
        )
    return pd.DataFrame(lines)
