"""Progress of what takes long, which a log can show as well."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FAR_SLOWER = 4  # times the first step, which had to warm up
SECONDS_BETWEEN_LINES = 30


class Steps:
    """Progress of a run: a bar on a terminal; elsewhere a line for every `report`,
    and one now and then between.

    Says once if a step is far slower than the first.

    Args:
        total: steps, with those that were done before.
        what: is done, until the first report.
        done: steps of an earlier run, which this one goes on from.

    Example:
        >>> with Steps(100, console) as progress:
        ...     for step in range(100):
        ...         progress.report(f"loss {train():.3f}")
        ...         progress.advance()
    """

    def __init__(self, total: int, console: Console, what: str = "training", done: int = 0) -> None:
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = TaskID(0)
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, completed=done)
        self._console, self._total, self._said = console, total, what
        self._done = self._before = done
        self._first: float | None = None  # seconds that the first step took
        self._warned = False

    def __enter__(self) -> "Steps":
        self._start = self._last_step = self._last_line = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def report(self, text: str) -> None:
        """Says how it goes; what happened since the last step, such as an evaluation,
        does not count as a part of one.
        """
        self._said = text
        if self._bar is None:
            self._line()
        else:
            self._bar.update(self._task, description=text)
        self._last_step = time.perf_counter()

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        now = time.perf_counter()
        took, self._last_step = now - self._last_step, now
        if self._first is None:
            self._first = took
        elif took > FAR_SLOWER * self._first and not self._warned:
            self._warned = True
            self._console.print(
                f"Step {self._done} took {took:.1f} s and the first {self._first:.1f} s: "
                "other processes are using this machine's cores, "
                "and this run takes longer for as long as they do.",
                style="yellow",
                highlight=False,
            )
        if self._bar is not None:
            self._bar.advance(self._task)
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self._last_line = time.perf_counter()
        seconds = self._last_line - self._start
        left = ""
        if here := self._done - self._before:
            left = f", about {seconds / here * (self._total - self._done):.0f} s left"
        line = f"step {self._done} of {self._total}: {self._said} ({seconds:.0f} s{left})"
        self._console.print(line, highlight=False, soft_wrap=True)
