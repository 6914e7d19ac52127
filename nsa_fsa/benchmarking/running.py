"""What every run shares: a progress bar, checking before timing, and the loop over settings and implementations."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nsa_fsa.benchmarking.calls import Calls, Implementation
from nsa_fsa.benchmarking.check import WrongResult
from nsa_fsa.benchmarking.measure import GIB, Meter
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.settings import PASSES, Necessary, Setting, floor_ms


class Oracle(Protocol):
    """Its `check` takes results by name; returns their errors, or raises WrongResult."""

    @property
    def check(self) -> Callable[..., dict[str, float]]: ...


@dataclasses.dataclass(frozen=True)
class Subject:
    """How one implementation is measured at a setting: what its rows say of that, what it computes, what that takes."""

    recorded: Setting
    oracle: Oracle
    work: dict[str, Necessary]
    beside: Callable[[str, float], dict[str, Any]] = lambda name, ms: {}  # what to hold a pass's milliseconds against


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The inputs of one setting, and what to hold each implementation to."""

    inputs: Any
    subject: Callable[[Implementation], Subject]


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that names the step now begun, and counts the one before it as done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting", total=total)
        started = False

        def step(name: str) -> None:
            nonlocal started
            progress.update(bar, description=name, advance=1 if started else 0)
            started = True

        yield step
        progress.update(bar, completed=total)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def checked(calls: Calls, oracle: Oracle, passes: tuple[str, ...] | list[str] = PASSES) -> dict[str, dict[str, float]]:
    """Errors of every pass. What raises loses its pass, with the reason in calls.not_timed; a wrong forward loses them all."""
    errors: dict[str, dict[str, float]] = {}
    for name in PASSES:
        call = calls.of(name)
        if call is None or name not in ("forward", *passes):
            continue
        try:
            errors[name] = oracle.check(**calls.named(name, call()))
        except Exception as error:  # a peer may raise anything
            reason = f"refused: {error}" if isinstance(error, WrongResult) else first_line(error)
            if name == "forward":
                calls.not_timed |= dict.fromkeys(PASSES, reason)
                calls.backward = calls.forward_backward = None
                return {}
            calls.not_timed[name] = reason
            setattr(calls, name, None)
    return errors


def measure(
    results: Results, meter: Meter, implementation: str, kind: str, calls: Calls, oracle: Oracle,
    work: dict[str, Necessary], passes: list[str], setting: Setting, console: Console, variant: str = "",
    facts: Callable[[str, float], dict[str, Any]] = lambda name, ms: {},
) -> None:  # fmt: skip
    """Checks an implementation, then times its passes and records them."""
    errors = checked(calls, oracle, passes)
    where = {**dataclasses.asdict(setting), "variant": variant}
    rates = results.ceilings["matmul_flop_per_s"], results.ceilings["copy_bytes_per_s"]
    for name in passes:
        if name not in errors:
            if name in calls.not_timed:
                results.leave_out(implementation, calls.not_timed[name], **where, **{"pass": name})
                console.print(
                    f"[yellow]not timed:[/] {implementation} {variant} {name}, {setting}: {escape(calls.not_timed[name])}"
                )
            continue
        call = calls.of(name)
        assert call is not None
        try:
            memory, timing = meter.memory(call), meter.time(call)
        except torch.OutOfMemoryError as error:
            results.leave_out(implementation, first_line(error), **where, **{"pass": name})
            continue
        parts = [work["forward"], work["backward"]] if name == "forward_backward" else [work[name]]
        floor = floor_ms(parts, *rates)
        results.add_row(
            implementation, kind, name, setting, variant, ms=timing.median, ms_20=timing.low, ms_80=timing.high,
            host_ms=timing.host, tflops=work[name].flops / timing.median / 1e9 or None, necessary_tflop=work[name].flops / 1e12,
            necessary_gb=work[name].bytes / 1e9, floor_ms=floor, of_floor=floor / timing.median, extra_gib=memory.extra / GIB,
            workspace_gib=memory.workspace / GIB, errors=errors[name], **facts(name, timing.median),
        )  # fmt: skip


def importable(implementations: list[Implementation], results: Results, console: Console) -> list[Implementation]:
    """Those that are there; the others are left out with their reasons."""
    present = []
    for implementation in implementations:
        reason = implementation.missing()
        if reason is None:
            present.append(implementation)
        else:
            results.leave_out(implementation.name, reason)
            console.print(f"[yellow]not timed:[/] {implementation.label}: {escape(reason)}")
    return present


def run_one(
    implementation: Implementation, setting: Setting, prepared: Prepared, passes: list[str], meter: Meter, results: Results,
    console: Console,
) -> None:  # fmt: skip
    """One implementation at one setting; what cannot run is left out with its reason."""
    subject = prepared.subject(implementation)
    where = dataclasses.asdict(subject.recorded)
    if (reason := implementation.unsupported(setting)) is not None:
        results.leave_out(implementation.name, reason, **where)
        return
    try:
        calls = implementation.prepare(prepared.inputs)
    except Exception as error:
        results.leave_out(implementation.name, first_line(error), **where)
        return
    measure(
        results, meter, implementation.name, implementation.kind, calls, subject.oracle, subject.work, passes, subject.recorded,
        console, facts=lambda name, ms: implementation.describe(prepared.inputs, name) | subject.beside(name, ms),
    )  # fmt: skip


def run_implementations(
    settings: list[Any], implementations: list[Implementation], passes: list[str], meter: Meter, results: Results,
    console: Console, prepare: Callable[[Any], Prepared],
) -> None:  # fmt: skip
    """Every implementation at every setting, each recorded setting once."""
    present = importable(implementations, results, console)
    done: set[tuple[str, Setting]] = set()
    with progress_bar(console, len(settings) * len(present)) as step:
        for setting in settings if present else ():
            prepared = None  # the last inputs go before the next ones come
            prepared = prepare(setting)
            for implementation in present:
                step(f"{setting}: {implementation.name}")
                place = implementation.name, prepared.subject(implementation).recorded
                if place not in done:
                    done.add(place)
                    run_one(implementation, setting, prepared, passes, meter, results, console)
