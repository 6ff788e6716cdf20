"""The table of a study as CSV, Markdown, LaTeX (booktabs) and plain cells.

The tables do not depend on when, where or how often a study was run.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

from sitkit.results.statistics import LEVEL, Estimate, Standing
from sitkit.results.study_results import FACTS, CellResult, StudyResults
from sitkit.runtime.files import visible

CSV_COLUMNS = (
    "row", "column", "seed", "sample_seed", "metric", "value", "stderr", "real", "n", "nfe", "reference", "run",
    "samples", "failure",
)  # fmt: skip
Mark = Literal[Standing, "failed"]


class TableCell(NamedTuple):
    """A cell of a table for people.

    Attributes:
        text: the text, for a number "value ± standard error".
        sort: the value that the table of a page is sorted by; None: the text.
        mark: how the number compares with the other rows, or "failed".
        reference: the published number, or "".
        code: a command that the reader of a page can unfold and copy.
    """

    text: str
    sort: float | str | None = None
    mark: Mark = ""
    reference: str = ""
    code: str = ""

    @property
    def key(self) -> str:
        """The text that the script of a page sorts by."""
        if isinstance(self.sort, float | int):
            return repr(float(self.sort))
        return self.sort if self.sort is not None else self.text


def number(value: Any, digits: int = 4) -> str:
    """Return a number for people; a dash for None."""
    if value is None:
        return "\u2013"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def number_cell(value: Any, digits: int = 4) -> TableCell:
    """Return a cell with a number; a dash for None."""
    return TableCell(number(value, digits), value)


class Grid(NamedTuple):
    """A table for people: title, names of the columns, for each row its name and its cells, and notes."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[TableCell]]]
    notes: list[str]


def as_csv(results: StudyResults) -> str:
    """Return one line per cell, in the order of the file, with all digits of the numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for cell in results.cells:
        line: dict[str, Any] = dict(cell) | {"reference": f"{cell.reference.number:g}" if cell.reference else None}
        # The rest of a reason names folders and checkpoints, which differ between machines.
        line["failure"] = first_sentence(cell.failure or "")
        writer.writerow([visible(v) if isinstance(v := line[column], str) else v for column in CSV_COLUMNS])
    return text.getvalue()


def first_sentence(text: str) -> str:
    """Return the first sentence of a text."""
    return re.split(r"(?<=[.!?]) ", text.strip(), maxsplit=1)[0]


def grid(results: StudyResults) -> Grid:
    """Return the table to print: the rows of the study, and its columns or the columns of `show`."""
    estimates = {(e.row, e.column): e for e in results.estimates}
    cells: dict[tuple[str, str], list[CellResult]] = {}
    for cell in results.cells:
        cells.setdefault((cell.row, cell.column), []).append(cell)
    shown = list(results.show) or list(results.columns)
    rows = []
    for row in results.rows:
        inside = [cell for column in results.columns for cell in cells.get((row, column), [])]
        line = [
            _number(cells.get((row, name), []), estimates.get((row, name)))
            if name in results.columns
            else TableCell(_fact(inside, name))
            for name in shown
        ]
        rows.append((row, line))
    return Grid(results.title, [name or "value" for name in shown], rows, [*results.notes, *_legend(results)])


def _number(cells: list[CellResult], estimate: Estimate | None) -> TableCell:
    if not cells:
        return TableCell("", "")  # Excluded.
    reference = f"{cells[0].reference.number:g}" if cells[0].reference else ""
    failed = sum(cell.state in ("failed", "refused") for cell in cells)
    if estimate is None:
        words = {"failed": "failed", "refused": "impossible", "todo": "…", "done": ""}
        return TableCell(words[cells[0].state], "", "failed" if failed else "", reference)
    lost = f" ({failed} of {len(cells)} failed)" if failed else ""
    text = f"{format_estimate(estimate.mean, estimate.stderr)}{lost}"
    return TableCell(text, estimate.mean, estimate.standing, reference)


def format_estimate(mean: float, error: float | None) -> str:
    """Return "1.61 ± 0.12": three digits, or more (at most 9) up to the first digit of the standard error."""
    if error is None:
        return f"{mean:.3g}"
    digits = 3
    if mean and error and math.isfinite(mean) and math.isfinite(error):
        finer = math.floor(math.log10(abs(mean))) - math.floor(math.log10(error)) + 1
        digits = min(max(digits, finer), 9)
    return f"{mean:.{digits}g} ± {error:.2g}"


def _fact(cells: list[CellResult], name: str) -> str:
    values = [cell.shown.get(name, "") if name not in FACTS else getattr(cell, name) for cell in cells]
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _legend(results: StudyResults) -> list[str]:
    """Return the meaning of the marks and of the errors, and the number of comparisons."""
    notes = []
    for of, count in dict.fromkeys((e.of, e.units) for e in results.estimates if e.stderr is not None):
        notes.append(
            f"±: one standard error, {'estimated within the cell' if of == 'samples' else f'over {count} {of}'}."
        )
    standings = {estimate.standing for estimate in results.estimates}
    if standings & {"best", "close"}:
        rows = Counter(estimate.column for estimate in results.estimates)
        comparisons = " or ".join(map(str, sorted({count * (count - 1) // 2 for count in rows.values() if count > 1})))
        best = "Bold: better than every other row" if "best" in standings else "No row is better than every other"
        notes.append(
            f"{best} of its column; ≈ (grey): not distinguishable from the column's best. The rows of a column are compared "
            f"in pairs, paired by seed, {comparisons} pair{'s' * (comparisons != '1')} a column. A wrong difference among all "
            f"of them has a probability of at most {LEVEL} (Holm)."
        )
    return notes


def as_markdown(results: StudyResults) -> str:
    """Return the table in Markdown: bold and ≈ as the legend says, published numbers in brackets."""
    table = grid(results)
    lines = [f"# {' '.join(visible(table.title).split())}\n"] if table.title else []
    lines.append("| | " + " | ".join(map(_escaped, table.columns)) + " |")
    lines.append("|---|" + "---|" * len(table.columns))
    for row, line in table.rows:
        lines.append(f"| {_escaped(row)} | " + " | ".join(map(_markdown, line)) + " |")
    notes = [line for note in table.notes for line in (visible(note), "")]
    return "\n".join([*lines, "", *notes]).rstrip("\n") + "\n"


def _escaped(text: str) -> str:
    """Return the text with the characters escaped that Markdown would interpret within a table."""
    return re.sub(r"([\\|*`<\[\]&~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(visible(text).split()))


def _markdown(cell: TableCell) -> str:
    text = {"best": f"**{cell.text}**", "close": f"≈ {cell.text}"}.get(cell.mark, cell.text)
    return f"{text} [{cell.reference}]" if cell.reference else text


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≈": r"$\approx$", "…": r"\ldots{}",
}  # fmt: skip

LATEX_MARKS = {"best": r"\textbf", "close": r"\textcolor{gray}", "failed": r"\textcolor{red}"}


def latex(text: str) -> str:
    """Return the text with the characters escaped that LaTeX would interpret."""
    return "".join(LATEX.get(character, character) for character in visible(text))


def as_latex(results: StudyResults) -> str:
    """Return the table in LaTeX, published numbers in brackets. It needs the packages booktabs and xcolor."""
    table = grid(results)
    lines = [
        "% \\usepackage{booktabs,xcolor}",
        "\\begin{table}",
        "  \\centering",
        *([f"  \\caption{{{latex(table.title)}}}"] if table.title else []),
        f"  \\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        "    \\toprule",
        "    & " + " & ".join(map(latex, table.columns)) + " \\\\",
        "    \\midrule",
        *(f"    {latex(row)} & " + " & ".join(map(_latex, line)) + " \\\\" for row, line in table.rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        *(f"  \\par\\footnotesize {latex(note)}" for note in table.notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex(cell: TableCell) -> str:
    text, command = latex(cell.text), LATEX_MARKS.get(cell.mark)
    text = f"{command}{{{text}}}" if command else text
    return f"{text} [{latex(cell.reference)}]" if cell.reference else text
