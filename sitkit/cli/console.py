"""Output of the command line: tables, messages, JSON, and progress as live bars or as lines of a log."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sitkit.cli.interrupt import CONTINUE, resumable
from sitkit.runtime.files import visible
from sitkit.runtime.progress import Progress
from sitkit.runtime.progress_bar import bars, log_lines, terminal_text

T = TypeVar("T")
# Under torchrun only the first process prints, but an error of any process is printed.
QUIET = os.environ.get("RANK", "0") != "0"
# Without emoji: rich would replace the `:ok:` in a name like study:ok:0.
out = Console(highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty(), quiet=QUIET)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=QUIET)
loud = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def error(message: object) -> None:
    """Print an error message on standard error."""
    loud.print(f"[bold red]error:[/] {terminal_text(message)}")


def warn(message: object) -> None:
    """Print a warning on standard error; the work continues."""
    err.print(f"[yellow]warning:[/] {terminal_text(message)}")


def say(message: str) -> None:
    """Print a line on standard output, never folded, so that a path or a command in it can be copied."""
    out.print(terminal_text(message), soft_wrap=True)


def note(message: object) -> None:
    """Print a line on standard error."""
    err.print(terminal_text(message))


def show_warnings() -> None:
    """From now on print each Python warning as one line, without its source line."""

    def print_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:
            warn(message)

    warnings.showwarning = print_warning


def as_json(value: Any) -> None:
    """Print a value as JSON on standard output; a named tuple or a dataclass is printed as a mapping."""
    if not QUIET:
        sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def plain(value: Any) -> Any:
    """Return a value for JSON: named tuples and dataclasses become mappings, paths become strings."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "__dataclass_fields__"):
        value = {key: getattr(value, key) for key in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def facts(**values: object) -> None:
    """Print a line for each value: its name, then the value.  A value that is None has no line."""
    for name, value in values.items():
        if value is not None:
            say(f"{name:9} {value}")


def short(value: Any, digits: int = 4) -> str:
    """Return a number with a few digits, for a table; "-" for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def call(verb: Callable[..., T], *values: Any, state: str = CONTINUE, **flags: Any) -> T:
    """Call a public function of sitkit and show its progress.

    state: what the message says about the work, before the command that continues it, if ctrl-C stops it.
    """
    with resumable(state), progress() as report:
        return verb(*values, progress=report, **flags)


def empty_table(columns: Sequence[str], title: str = "", whole: int = 0) -> Table:
    """Return a table without rows; the first `whole` columns are never folded."""
    # A cell is folded and never cut, so that a name, a path or a command in it can be copied.
    headings = [Column(terminal_text(column), overflow="fold", no_wrap=i < whole) for i, column in enumerate(columns)]
    return Table(
        *headings, title=terminal_text(title) or None, title_justify="left", header_style="bold", show_edge=False
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str = "",
    notes: Sequence[str] = (),
    cut: bool = False,
) -> None:
    """Print a table with its footnotes.

    cut: in a narrow terminal the last column is cut and the others stay whole; otherwise all columns are folded.
    """
    rendered = empty_table(columns, title, len(columns) - 1 if cut else 0)
    for row in rows:
        row = [*row[:-1], Text(visible(str(row[-1])), overflow="ellipsis", no_wrap=True)] if cut else row
        rendered.add_row(*(value if isinstance(value, Text) else terminal_text(value) for value in row))
    if cut and not out.is_terminal:
        # In a file or a pipe nothing is cut.
        rendered.width = out.measure(rendered, options=out.options.update(width=10_000)).maximum
    out.print(rendered)
    for note in notes:
        out.print(f"[dim]{terminal_text(note)}[/]")


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a function that shows events: as live bars in a terminal, else as a line every few seconds."""
    with bars(err) if err.is_terminal else log_lines(err) as report:
        yield report
