"""The one sink for what people and programs read: answers on stdout, progress and notes on stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from exporter.pipeline.progress import Progress
from exporter.types.sizes import format_size


def print_json(value: Any) -> None:
    """One object on stdout. Numbers that are not finite become null."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, right: Sequence[int] = ()
) -> None:
    """A table on stdout. `right`: indices of columns of numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_styled(cell, Text) for cell in row))
    # Where nobody looks (a file, a log), there is no width to keep to.
    Console(width=None if sys.stdout.isatty() else 150, highlight=False).print(table)


def _styled(cell: str, text: Any) -> Any:
    first = cell.split(" ", 1)[0].split("\n", 1)[0]
    style = {"ok": "green", "yes": "green", "FAIL": "bold red", "no": "red", "error": "red", "warning": "yellow"}
    return text(cell, style=style.get(first, ""))


def say(line: str = "") -> None:
    """One line of the answer on stdout."""
    print(line)


def peak_rss() -> int:
    """The most memory this process has held, bytes."""
    try:
        # ru_maxrss survives exec on Linux: it would count whatever started us.
        with open("/proc/self/status", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def progress(quiet: bool = False) -> Progress:
    """Bars on stderr where a person looks; silence elsewhere."""
    return _Bars() if sys.stderr.isatty() and not quiet else Progress()


def _amount(n: float, unit: str = "") -> str:
    """ "13.8 GB" for bytes, "8.9 M parameters" for others; without a unit where the next number has it."""
    size = format_size(n)
    return size if unit == "B" else f"{size.removesuffix('B').rstrip()} {unit}".rstrip()


class _Bars(Progress):
    """One line a stage: what, how far, how fast, how long still, peak memory."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich
        from rich.table import Column
        from rich.text import Text

        # Where the window is narrow, the bar and the label give way: a figure on two lines is none.
        figure, label = Column(no_wrap=True), Column(overflow="ellipsis")

        class Peak(ProgressColumn):
            def render(self, task: Any) -> Text:
                return Text(f"peak {format_size(peak_rss())}", style="dim")

        class Done(ProgressColumn):
            def render(self, task: Any) -> Text:
                if not task.total:
                    return Text(f"{task.elapsed or 0:.0f} s")
                unit = task.fields["unit"]
                speed = f"  {_amount(task.speed, unit)}/s" if task.speed else ""
                return Text(f"{_amount(task.completed)} of {_amount(task.total, unit)}{speed}")

        self._columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=figure),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%", table_column=figure),
            Done(figure),
            TimeRemainingColumn(table_column=figure),
            Peak(figure),
            TextColumn("[dim]{task.fields[label]}", table_column=label),
        )
        self._console = Console(stderr=True)
        self._rich_class: Any = Rich
        self._rich: Any = None
        self._lock = threading.Lock()
        self._started = 0.0

    def stage(self, name: str, total: int, unit: str = "B") -> None:
        with self._lock:
            self._stop()
            self._name, self._started = name, time.monotonic()
            self._rich = self._rich_class(*self._columns, console=self._console, transient=True)
            self._task = self._rich.add_task(name, total=total or None, label="", unit=unit)
            self._rich.start()

    def advance(self, amount: int, label: str = "") -> None:
        with self._lock:
            if self._rich:
                self._rich.update(self._task, advance=amount, label=label.removeprefix("model."))

    def done(self) -> None:
        with self._lock:
            if self._rich:
                self._stop()
                print(f"  {self._name}: {time.monotonic() - self._started:.1f} s", file=sys.stderr)

    def _stop(self) -> None:
        if self._rich:
            self._rich.stop()
            self._rich = None

    def __del__(self) -> None:
        self._stop()
