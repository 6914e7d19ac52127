"""What a conversion leaves in its folder, from which it goes on, and which a report looks at."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

PLAN, MODEL, STORE, HISTORY = "conversion.json", "model", "tokens.bin", "history.json"
UNFINISHED = f"{MODEL}.unfinished"
# Beside the plan and the checkpoints of Trainer.
_OWN = (MODEL, UNFINISHED, STORE, f"{STORE}.unfinished", HISTORY, "runs")


class Progress(NamedTuple):
    """What there is of a conversion already."""

    last: Path | None = None  # the checkpoint to go on from
    done: int = 0  # steps
    is_finished: bool = False


def progress_of(plan: dict[str, Any], output: Path) -> Progress:
    """How far the conversion in a folder is; nothing is changed there.

    plan: as JSON has it.

    Raises:
        ValueError: where the folder has what another conversion has learned, or other files.
    """
    if not _has_files(output):
        return Progress()
    last = _last_checkpoint(output)
    done, is_finished = 0 if last is None else number(last), (output / MODEL).is_dir()
    before = read_json(_plan_in(output))
    differ = [name for name in plan if before.get(name) != plan[name]]
    if not differ:
        return Progress(last, done, is_finished)
    if last is None and not is_finished:
        return Progress()
    name = differ[0]
    raise ValueError(
        f"{output} has another conversion, whose {name} is {before.get(name)!r} and not "
        f"{plan[name]!r}. Fix: the same options, to go on with that one; another folder; or "
        "overwrite it."
    )


def begin_in(plan: dict[str, Any], output: Path, *, anew: bool = False) -> None:
    """Makes a folder that of a conversion: what another has written there is removed, and nothing
    else.

    anew: also what the same one has written.

    Raises:
        ValueError: for a folder with files and no conversion.
    """
    output.mkdir(parents=True, exist_ok=True)
    if _has_files(output) and (read_json(_plan_in(output)) != plan or anew):
        for path in (*checkpoints(output), *(output / name for name in _OWN)):
            remove(path)
    write_json(output / PLAN, plan)


def _has_files(output: Path) -> bool:
    return output.is_dir() and any(output.iterdir())


def _plan_in(output: Path) -> Path:
    path = output / PLAN
    if not path.is_file():
        raise ValueError(
            f"{output} has files that no conversion has written. Fix: another, empty folder."
        )
    return path


def history_of(model: Path) -> tuple[list[dict[str, Any]], int]:
    """The logs of the conversion that a checkpoint is of, and how long its warm-up was; nothing
    where the checkpoint lies elsewhere."""
    history, plan = model.parent / HISTORY, model.parent / PLAN
    if not (model.is_dir() and history.is_file() and plan.is_file()):
        return [], 0
    return read_json(history), read_json(plan)["schedule"]["warm_up"]


def number(checkpoint: Path) -> int:
    """The step of one of Trainer's checkpoints."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(output: Path) -> list[Path]:
    """Those of Trainer, whole or not, in order."""
    found = (x for x in output.iterdir() if re.fullmatch(r"checkpoint-\d+", x.name))
    return sorted(found, key=number)


def _last_checkpoint(output: Path) -> Path | None:
    """The last that is whole: the state is what Trainer writes last."""
    for folder in reversed(checkpoints(output)):
        try:
            read_json(folder / "trainer_state.json")
        except (OSError, ValueError):
            continue
        return folder
    return None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Through a second file, so that no interruption leaves half of one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def remove(path: Path) -> None:
    """A folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
