"""The run of `nsa-fsa crossover`: the sequence length from which the core is faster than full attention."""

import dataclasses
from typing import Any

import torch
from rich.console import Console

from nsa_fsa.benchmarking.calls import Implementation
from nsa_fsa.benchmarking.core import NSA_FSA, make_inputs, prepare_times
from nsa_fsa.benchmarking.measure import Meter
from nsa_fsa.benchmarking.results import Results
from nsa_fsa.benchmarking.running import first_line, progress_bar, run_one
from nsa_fsa.benchmarking.settings import CoreSetting

STEP = 1024  # what lengths are multiples of
LENGTHS = tuple(STEP << doubling for doubling in range(8))  # to 131,072
PASSES = ("forward", "forward_backward")
ANY_BLOCKS = ("head_dim", "num_heads", "dtype", "group_size")  # what full attention knows of a setting, beside its length
PLACE = (*ANY_BLOCKS, "block_size", "num_blocks")
MOST_HALVINGS = (LENGTHS[-1] // 2 // STEP).bit_length() - 1


def bracket(ratios: dict[int, float]) -> tuple[int | None, int | None]:
    """The last length at which full attention is as fast, and the next one; None where there is no such length.

    ratios: {tokens: time of full attention / time of the core}.
    """
    slower = [tokens for tokens, ratio in ratios.items() if ratio <= 1]
    last_slower = max(slower, default=None)
    faster = [tokens for tokens in ratios if last_slower is None or tokens > last_slower]
    return last_slower, min(faster, default=None)


def middle(ratios: dict[int, float]) -> int | None:
    """Where to measure next, between the two; None where the crossover is known to one step, or lies outside."""
    slower, faster = bracket(ratios)
    if slower is None or faster is None or faster - slower <= STEP:
        return None
    return (slower + faster) // 2 // STEP * STEP


def ratios_of(rows: list[dict[str, Any]], against: str, where: dict[str, Any], name: str) -> dict[int, float]:
    """{tokens: time of full attention / time of the core} of one pass, ascending.

    against: the implementation of full attention. where: what else tells comparisons apart, of `PLACE`.
    """
    times: dict[str, dict[int, float]] = {"ours": {}, "full": {}}
    for row in rows:
        names = PLACE if row["kind"] == "ours" else ANY_BLOCKS
        if row["pass"] == name and all(row[x] == where[x] for x in names) and row["implementation"] in (NSA_FSA.name, against):
            times[row["kind"]][row["num_tokens"]] = row["ms"]
    both = sorted(times["ours"].keys() & times["full"].keys())
    return {tokens: times["full"][tokens] / times["ours"][tokens] for tokens in both}


def crossovers(document: dict[str, Any]) -> list[dict[str, Any]]:
    """For every comparison and pass: from which length on the core is faster, and around it.

    `tokens` is None where full attention is faster at the longest length; `slower_at` is None where the core is faster at
    every length.
    """
    rows, found = document["rows"], []
    places = sorted({tuple(row[x] for x in PLACE) for row in rows if row["kind"] == "ours"})
    for against in sorted({row["implementation"] for row in rows if row["kind"] == "full"}):
        for place in places:
            where = dict(zip(PLACE, place, strict=True))
            for name in PASSES:
                if ratios := ratios_of(rows, against, where, name):
                    slower, faster = bracket(ratios)
                    entry = {"against": against, **where, "pass": name, "tokens": faster, "slower_at": slower}
                    found.append(entry | dict(ratios={str(tokens): ratio for tokens, ratio in ratios.items()}))
    return found


def first_that_runs(
    candidates: list[Implementation], setting: CoreSetting, seed: int, device: torch.device
) -> tuple[Implementation | None, dict[str, str]]:
    """The first implementation whose forward runs at a setting, and why those before it do not."""
    reasons: dict[str, str] = {}
    inputs = make_inputs(setting, seed, device)
    for candidate in candidates:
        reason = candidate.missing() or candidate.unsupported(setting)
        if reason is None:
            try:
                candidate.prepare(inputs).forward()
                return candidate, reasons
            except Exception as error:  # it may raise anything
                reason = first_line(error)
        reasons[candidate.name] = reason
    return None, reasons


def run(
    settings: list[CoreSetting], full: Implementation, meter: Meter, results: Results, seed: int, device: torch.device,
    console: Console, ours: Implementation = NSA_FSA, lengths: tuple[int, ...] = LENGTHS,
) -> None:  # fmt: skip
    """Doubles the length, then halves the interval in which the faster one changes; settings: one for each group size."""
    most = len(settings) * (len(lengths) + len(PASSES) * MOST_HALVINGS)
    with progress_bar(console, most) as step:

        def time(setting: CoreSetting, tokens: int, passes: list[str]) -> None:
            setting = dataclasses.replace(setting, num_tokens=tokens)
            step(f"{setting}: {', '.join(passes)}")
            try:
                prepared = prepare_times(setting, seed, device)
            except torch.OutOfMemoryError as error:
                results.leave_out(ours.name, first_line(error), **dataclasses.asdict(setting))
                return
            for implementation in (ours, full):
                run_one(implementation, setting, prepared, passes, meter, results, console)
            results.put("crossovers", crossovers(results.document))

        def ratios(setting: CoreSetting, name: str) -> dict[int, float]:
            return ratios_of(results.document["rows"], full.name, dataclasses.asdict(setting), name)

        for setting in settings:
            for tokens in lengths:
                time(setting, tokens, list(PASSES))
            for name in PASSES:
                between = middle(ratios(setting, name))
                while between is not None:
                    time(setting, between, [name])
                    measured = ratios(setting, name)
                    between = middle(measured) if between in measured else None  # the reason is among what was not timed
