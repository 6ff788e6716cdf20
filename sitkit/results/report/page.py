"""What a report's page is made of, and how it becomes one HTML file.

Sections of parts: facts, tables, charts, sample sheets, code and notes.  Everything a part shows is in the page itself;
the template has the words around it, the style and the two scripts (sorting, copying).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

PlotMark = Literal["", "best", "grey", "failed"]


@dataclass(frozen=True)
class Value:
    """One cell of a table.  sort: what it is ordered by, its text if unset; note: what a reader may want to know of it."""

    text: str
    sort: float | str | None = None
    mark: PlotMark = ""
    note: str = ""
    code: str = ""

    @property
    def key(self) -> str:
        """The text that the page's script sorts by; numbers that are none come last."""
        if isinstance(self.sort, float | int):
            return repr(float(self.sort))
        return self.sort if self.sort is not None else self.text


@dataclass(frozen=True)
class Table:
    """Columns by name, "#" in front of those whose values are numbers, and rows whose first value heads the row."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    notes: Sequence[str] = ()
    folded: bool = False

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's name and whether it holds numbers."""
        return [(name.removeprefix("#"), name.startswith("#")) for name in self.columns]


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    kind: ClassVar[str] = "facts"
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Chart:
    """Inline SVG and what it shows."""

    svg: str
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Sheet:
    """A picture: its bytes, its size in CSS pixels, and what it shows."""

    data: bytes
    width: int
    height: int
    title: str
    caption: str
    alt: str
    code: str = ""

    @property
    def uri(self) -> str:
        """The picture as a data: address."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "webp"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class Sheets:
    """Pictures side by side.  sharp: enlarged pixel by pixel."""

    kind: ClassVar[str] = "sheets"
    sheets: Sequence[Sheet]
    sharp: bool = True


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Notes:
    """Sentences; alarm: of what went wrong."""

    kind: ClassVar[str] = "notes"
    notes: Sequence[str]
    alarm: bool = False


PagePart = Table | Facts | Charts | Sheets | Code | Notes


@dataclass(frozen=True)
class Section:
    """A heading, a sentence on what follows, and the parts."""

    title: str
    intro: str
    parts: Sequence[PagePart]

    @property
    def anchor(self) -> str:
        """The name that the page's contents link to."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A report: what it is of, its first sentence, and its sections in order."""

    title: str
    kind: str
    lead: str
    sections: Sequence[Section]
    made: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """The page as one file that needs nothing else."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("sitkit.results.report", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        shown = [section for section in self.sections if section.parts]
        return environment.get_template("page.html").render(page=self, sections=shown)


def number(value: Any, digits: int = 4) -> str:
    """A number as people read it; a dash for none."""
    if value is None:
        return "\u2013"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def plain(value: Any) -> str:
    """A setting in one line: a word as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def one_line(component: Mapping[str, Any]) -> str:
    """A component's plain values in one line: its name, then its fields."""
    rest = ", ".join(
        f"{k} {one_line(v) if isinstance(v, Mapping) else plain(v)}" for k, v in component.items() if k != "name"
    )
    name = str(component.get("name", ""))
    return f"{name} ({rest})" if rest else name
