"""What the command line draws: a live bar, or plain lines where nobody watches, tables, messages."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from sitkit.runtime.progress import Progress
from sitkit.runtime.progress_bar import bars, lines

if TYPE_CHECKING:
    pass


# Of the processes under torchrun the first speaks for all, but whichever fails says why.
QUIET = os.environ.get("RANK", "0") != "0"
# Without emoji: a name like study:ok:0 is no picture.
out = Console(highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty(), quiet=QUIET)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True, quiet=QUIET)
loud = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def error(message: object) -> None:
    """One clear message on standard error."""
    loud.print(f"[bold red]error:[/] {escape(str(message))}")


def warn(message: object) -> None:
    """Something that does not stop the work."""
    err.print(f"[yellow]warning:[/] {escape(str(message))}")


def say(message: str) -> None:
    """A line of output.  A terminal folds it, not we: a path or a command in it is there to be copied."""
    out.print(escape(message), soft_wrap=True)


def show_warnings() -> None:
    """Python's warnings as one line each, without the source line that raised them."""

    def shown(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:
            warn(message)

    warnings.showwarning = shown


def as_json(value: Any) -> None:
    """Machine-readable output."""
    if not QUIET:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str = "",
    notes: Sequence[str] = (),
    cut: bool = False,
) -> None:
    """A table with its footnotes.  cut: where there is no room, the last column is cut and the others are whole."""
    from rich.table import Column, Table

    # Folded, not cut: a name, a path or a command in a cell is there to be copied.
    headings = [Column(escape(column), overflow="fold", no_wrap=cut and column != columns[-1]) for column in columns]
    drawn = Table(*headings, title=escape(title) or None, title_justify="left", header_style="bold", show_edge=False)
    for row in rows:
        row = [*row[:-1], Text(str(row[-1]), overflow="ellipsis", no_wrap=True)] if cut else row
        drawn.add_row(*(value if isinstance(value, Text) else escape(str(value)) for value in row))
    if cut and not out.is_terminal:
        # Where nobody looks, nothing is cut.
        drawn.width = out.measure(drawn, options=out.options.update(width=10_000)).maximum
    out.print(drawn)
    for note in notes:
        out.print(f"[dim]{escape(note)}[/]")


@contextmanager
def progress() -> Iterator[Progress]:
    """A function for events: live bars on a terminal, else a line every few seconds."""
    with bars(err) if err.is_terminal else lines(err) as report:
        yield report


def plain(value: Any) -> Any:
    """Named tuples as mappings."""
    if hasattr(value, "_asdict"):
        return {key: plain(v) for key, v in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: plain(getattr(value, key)) for key in value.__dataclass_fields__}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
