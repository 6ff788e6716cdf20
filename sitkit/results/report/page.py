"""The parts of a page, and the page as one HTML file.

A page has sections, and a section has parts: facts, tables, charts, sample sheets, code and notes. The HTML holds all
data of the parts; the template has the text around them, the style and two scripts (sorting, copying).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sitkit.results.table import TableCell


@dataclass(frozen=True)
class PagePart:
    """Base class: a part of a section."""

    @property
    def kind(self) -> str:
        """The name of the template's macro for this part."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Table(PagePart):
    """A table. Names of columns with numbers begin with "#"; the first cell of a row is its heading.

    Attributes:
        notes: sentences below the table.
        folded: whether the reader must unfold the table to see it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    notes: Sequence[str] = ()
    folded: bool = False

    @classmethod
    def of(
        cls, caption: str, rows: Sequence[Mapping[str, TableCell]], notes: Sequence[str] = (), *, folded: bool = False
    ) -> Table:
        """Return a table of rows that map the names of the columns to the cells."""
        return cls(caption, list(rows[0]), [list(row.values()) for row in rows], notes, folded)

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """The name of each column, and whether it holds numbers."""
        return [(name.removeprefix("#"), name.startswith("#")) for name in self.columns]


@dataclass(frozen=True)
class Facts(PagePart):
    """Names with their values."""

    facts: Mapping[str, str]


@dataclass(frozen=True)
class Chart:
    """Inline SVG with a title and a caption."""

    svg: str
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Charts(PagePart):
    """Charts, side by side on a wide screen."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Sheet:
    """A picture: its bytes, its size in CSS pixels, and its texts. `alt` is the text for screen readers."""

    data: bytes
    width: int
    height: int
    title: str
    caption: str
    alt: str

    @property
    def uri(self) -> str:
        """The picture as a data: address."""
        kind = "png" if self.data.startswith(b"\x89PNG") else "webp"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True)
class Sheets(PagePart):
    """Pictures side by side, enlarged without smoothing."""

    sheets: Sequence[Sheet]


@dataclass(frozen=True)
class Code(PagePart):
    """Text to copy."""

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Notes(PagePart):
    """Sentences; `alarm` marks failures."""

    notes: Sequence[str]
    alarm: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a sentence that introduces the section, and its parts."""

    title: str
    intro: str
    parts: Sequence[PagePart]

    @property
    def anchor(self) -> str:
        """The name that the table of contents links to."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A report: its title, "Run" or "Study", its first sentence, its sections, and how it was made."""

    title: str
    kind: str
    lead: str
    sections: Sequence[Section]
    made: Mapping[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """Return the page as one file without references to other files."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        loader = PackageLoader("sitkit.results.report", "templates")
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        shown = [section for section in self.sections if section.parts]
        return environment.get_template("page.html").render(page=self, sections=shown)
