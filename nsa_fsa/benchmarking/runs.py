"""What `nsa-fsa bench` and `nsa-fsa crossover` do: check, time and record; search for a length."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from nsa_fsa.benchmarking.cases import Case
from nsa_fsa.benchmarking.implementations import NSA_CORE, Implementation
from nsa_fsa.benchmarking.results import Results, versions

STEP = 1024  # what the lengths of a crossover are multiples of
LENGTHS = tuple(STEP << doubling for doubling in range(8))  # to 131,072
Times = dict[str, float]  # milliseconds of each pass


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures with a meter, into results."""

    meter: Any
    results: Results
    console: Console

    def measure(self, case: Case, by: Implementation, passes: Sequence[str], **facts: Any) -> Times:
        """Checks each pass, then times and records it. One that raises is left out with the reason,
        and a wrong forward takes all passes with it."""
        where, times = by.where(case) | facts, {}
        with self.console.status(f"{case.num_tokens:,} tokens, {by.label}"):
            try:
                calls = by.passes(case)
                right = by.check(case, "forward", calls["forward"]())
            except Exception as error:  # a peer may raise anything
                self.leave_out(where, error)
                return {}
            for name in (x for x in passes if x in calls):
                where["pass"], call = name, calls[name]
                try:
                    errors = right if name == "forward" else by.check(case, name, call())
                    taken = self.meter.time(call)
                    measured = {x: y / by.repeats(case) for x, y in taken.items()}
                    measured |= self.meter.memory(call)
                except Exception as error:
                    self.leave_out(where, error)
                    continue
                about = dict(label=by.label, version=versions().get(by.distribution))
                self.results.add("rows", **where, **measured, **about, errors=errors)
                times[name] = measured["ms"]
        return times

    def leave_out(self, where: dict[str, Any], error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        self.results.add("not_timed", **where, reason=reason)
        what = f"{where['implementation']} {where.get('pass', '')}, {where['num_tokens']:,} tokens"
        self.console.print(f"not timed: {what}: {reason}", style="yellow", markup=False)

    def crossover(self, case: Case, full: Implementation, lengths: Sequence[int] = LENGTHS) -> None:
        """From which length on the core is faster, for both passes: doubles the length, then
        halves the interval in which the faster one changes.

        Of the entry that is added, `tokens` is None where full attention is faster at the longest
        length, `slower_at` is None where the core is faster at every length, and `ratios` has the
        time of full attention over that of the core, by tokens.
        """
        ratios: dict[str, dict[int, float]] = dict(forward={}, forward_backward={})

        def time(tokens: int, passes: Sequence[str]) -> None:
            here = dataclasses.replace(case, num_tokens=tokens)
            ours, theirs = (self.measure(here, x, passes) for x in (NSA_CORE, full))
            for name in ours.keys() & theirs.keys():
                ratios[name][tokens] = theirs[name] / ours[name]

        for tokens in lengths:
            time(tokens, list(ratios))
        for name, found in ratios.items():
            while (between := middle(found)) is not None:
                time(between, [name])
                if between not in found:  # it did not run
                    break
            slower, faster = bracket(found)
            entry = {x: y for x, y in case.sizes().items() if x != "num_tokens"}
            entry |= {"against": full.name, "pass": name, "tokens": faster, "slower_at": slower}
            self.results.add("crossovers", **entry, ratios=dict(sorted(found.items())))


def bracket(ratios: dict[int, float]) -> tuple[int | None, int | None]:
    """The last length at which full attention is as fast, and the next one, as far as there are
    such lengths."""
    slower = max((tokens for tokens, ratio in ratios.items() if ratio <= 1), default=None)
    return slower, min((x for x in ratios if slower is None or x > slower), default=None)


def middle(ratios: dict[int, float]) -> int | None:
    """Where to measure next; None where the length is known to one step, or lies outside."""
    slower, faster = bracket(ratios)
    if slower is None or faster is None or faster - slower <= STEP:
        return None
    return (slower + faster) // 2 // STEP * STEP
