"""A study's table in the forms that people read and programs read: CSV, Markdown, LaTeX (booktabs), plain cells.

Nothing in them depends on when, where or how often a study was run.
"""

from __future__ import annotations

import csv
import io
import math
import re
from typing import Any, Literal, NamedTuple

from sitkit.results.statistics import LEVEL
from sitkit.results.study_results import FACTS, CellResult, RowEstimate, StudyResults

CSV_COLUMNS = (
    "row", "column", "seed", "sample_seed", "metric", "value", "stderr", "halves", "n", "nfe", "reference", "run",
    "samples", "failure",
)  # fmt: skip
Mark = Literal["best", "close", "lead", "failed", ""]


class TableCell(NamedTuple):
    """What stands in a place of the table: our number with its error, the published one, and how it stands."""

    text: str
    reference: str = ""
    mark: Mark = ""


class Grid(NamedTuple):
    """The table as it is printed: a title, names of columns, and for each row its name and what stands in it."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[TableCell]]]
    notes: list[str]


def as_csv(results: StudyResults) -> str:
    """One line a cell, in the order of the file, the numbers to their last digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for cell in results.cells:
        line: dict[str, Any] = dict(cell) | {"reference": f"{cell.reference.number:g}" if cell.reference else None}
        # The rest of a reason names folders and checkpoints, which are other ones on another machine.
        line["failure"] = first_sentence(cell.failure or "")
        writer.writerow([line[column] for column in CSV_COLUMNS])
    return text.getvalue()


def first_sentence(text: str) -> str:
    """A text to its first full stop that ends a sentence."""
    return re.split(r"(?<=[.!?]) ", text.strip(), maxsplit=1)[0]


def grid(results: StudyResults) -> Grid:
    """The table to print: a row for each row, a column for each column or for what the study wants shown."""
    standings = {(s.row, s.column): s for s in results.estimates}
    cells: dict[tuple[str, str], list[CellResult]] = {}
    for cell in results.cells:
        cells.setdefault((cell.row, cell.column), []).append(cell)
    shown = list(results.show) or list(results.columns)
    rows = []
    for row in results.rows:
        inside = [cell for column in results.columns for cell in cells.get((row, column), [])]
        line = [
            _number(cells.get((row, name), []), standings.get((row, name)))
            if name in results.columns
            else TableCell(_fact(inside, name))
            for name in shown
        ]
        rows.append((row, line))
    return Grid(results.title, [name or "value" for name in shown], rows, [*results.notes, *_legend(results)])


def _number(cells: list[CellResult], standing: RowEstimate | None) -> TableCell:
    if not cells:
        return TableCell("")  # Excluded.
    reference = f"{cells[0].reference.number:g}" if cells[0].reference else ""
    failed = sum(cell.state in ("failed", "refused") for cell in cells)
    if standing is None:
        words = {"failed": "failed", "refused": "impossible", "todo": "…", "done": ""}
        return TableCell(words[cells[0].state], reference, "failed" if failed else "")
    lost = f" ({failed} of {len(cells)} failed)" if failed else ""
    return TableCell(f"{format_estimate(standing.mean, standing.stderr)}{lost}", reference, standing.standing)


def format_estimate(mean: float, error: float | None) -> str:
    """ "1.61 ± 0.12": the mean to three digits, or to the first digit of its error where that is finer, 9 at most."""
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
    """What the marks and the errors mean, and how many comparisons stand behind them."""
    notes = []
    kinds = list(dict.fromkeys((s.of, s.units) for s in results.estimates if s.stderr is not None))
    meaning = {"samples": "estimated within the cell", "": ""}
    for of, count in kinds:
        notes.append(f"±: one standard error, {meaning.get(of) or f'over {count} {of}'}.")
    if any(s.standing and s.standing != "lead" for s in results.estimates):
        by_column: dict[str, int] = {}
        for s in results.estimates:
            by_column[s.column] = by_column.get(s.column, 0) + 1
        counts = sorted({count - 1 for count in by_column.values() if count > 1})
        comparisons = " or ".join(map(str, counts))
        best = "Bold: better than every other row of its column" if any(
            s.standing == "best" for s in results.estimates
        ) else "No row is better than every other of its column"  # fmt: skip
        notes.append(
            f"{best}; ≈ (grey): not distinguishable from the column's best. Each row is compared with the best of its "
            f"column, paired by seed, {comparisons} comparison{'s' * (comparisons != '1')} a column, each at "
            f"{LEVEL} / {comparisons} (Bonferroni)."
        )
    return notes


def as_markdown(results: StudyResults) -> str:
    """The table in Markdown: bold and ≈ as the legend says, the published number in brackets."""
    table = grid(results)
    lines = [f"# {table.title}\n"] if table.title else []
    lines.append("| | " + " | ".join(map(_escaped, table.columns)) + " |")
    lines.append("|---|" + "---|" * len(table.columns))
    for row, line in table.rows:
        lines.append(f"| {_escaped(row)} | " + " | ".join(map(_markdown, line)) + " |")
    notes = [line for note in table.notes for line in (note, "")]
    return "\n".join([*lines, "", *notes]).rstrip("\n") + "\n"


def _escaped(text: str) -> str:
    """Text that Markdown prints as it stands, within a cell of a table."""
    return re.sub(r"([\\|*`<\[\]&~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def _markdown(shown: TableCell) -> str:
    text = {"best": f"**{shown.text}**", "close": f"≈ {shown.text}"}.get(shown.mark, shown.text)
    return f"{text} [{shown.reference}]" if shown.reference else text


LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "≈": r"$\approx$", "…": r"\ldots{}",
}  # fmt: skip


def latex(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(LATEX.get(character, character) for character in text)


def as_latex(results: StudyResults) -> str:
    """The table for a paper; needs the packages booktabs and xcolor.  The published number stands in brackets."""
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


def _latex(shown: TableCell) -> str:
    text = latex(shown.text)
    text = {"best": f"\\textbf{{{text}}}", "close": f"\\textcolor{{gray}}{{{text}}}",
            "failed": f"\\textcolor{{red}}{{{text}}}"}.get(shown.mark, text)  # fmt: skip
    return f"{text} [{latex(shown.reference)}]" if shown.reference else text
