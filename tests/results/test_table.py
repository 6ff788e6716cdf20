"""The table of a study as CSV, Markdown and LaTeX can be read back for any names."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sitkit.results.study_results import CellResult, PublishedNumber, StudyResults, with_estimates
from sitkit.results.table import CSV_COLUMNS, LATEX, as_csv, as_latex, as_markdown, first_sentence, grid, latex

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=20).filter(str.strip)
AWKWARD = 'a|b\\|c \\ *d* _e_ `f` <b>g</b> [h](i) &amp; 50 % $x^2$ {j}~k # "l", ±≈…'
VALUES = st.floats(allow_nan=False, allow_infinity=False, width=64)


def results(rows: list[str], columns: list[str], values: list[float], **more: Any) -> StudyResults:
    """The values in order of row, column and two training seeds; the other cells are not done."""
    drawn = iter(values)
    cells = []
    for row in rows:
        for column in columns:
            for seed in (0, 1):
                value = next(drawn, None)
                cells.append(
                    CellResult(
                        row=row, column=column, seed=seed, sample_seed=0, metric="frechet", value=value, stderr=0.5, n=10,
                        nfe=4, state="todo" if value is None else "done", reference=PublishedNumber(number=3.25, source="", setting={}),
                    )
                )  # fmt: skip
    study: dict[str, Any] = {
        "title": "T", "source": "", "file": "s.yaml", "base": None, "command": ("sitkit", "ablate", "s.yaml"),
        "runs": "../runs", "rows": tuple(rows), "columns": tuple(columns), "seeds": (0, 1), "sample_seeds": (0,), "lower_is_better": {"frechet": True},
        "cells": tuple(cells),
    }  # fmt: skip
    return with_estimates(StudyResults(**{**study, **more}))


NAMES = st.lists(TEXT, min_size=1, max_size=3, unique=True)


@given(NAMES, NAMES, st.lists(VALUES, min_size=1, max_size=8))
@example([AWKWARD], [AWKWARD], [0.1 + 0.2])
def test_csv_reads_back_to_the_last_digit(rows: list[str], columns: list[str], values: list[float]) -> None:
    study = results(rows, columns, values)
    read = list(csv.DictReader(io.StringIO(as_csv(study))))
    assert tuple(read[0]) == CSV_COLUMNS and len(read) == len(study.cells)
    for line, cell in zip(read, study.cells, strict=True):
        assert (line["row"], line["column"]) == (cell.row, cell.column)
        assert (float(line["value"]) if line["value"] else None) == cell.value
        assert (line["seed"], line["n"], line["nfe"], line["reference"]) == (str(cell.seed), "10", "4", "3.25")


def rendered(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table as a reader sees them, by another parser."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    lines: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            lines.append([])
        elif token.type == "inline" and lines and token.level > 2:
            plain = "".join(c.content for c in token.children or [] if c.type in ("text", "text_special"))
            kinds = {c.type for c in token.children or []} - {"text", "text_special", "strong_open", "strong_close"}
            assert not kinds, f"{token.content!r} is more than text: {kinds}"
            lines[-1].append(plain)
    return lines


def squeezed(text: str) -> str:
    return " ".join(text.split())


@given(NAMES, NAMES)
@example([AWKWARD, "| leads", "trails |", "\\"], [AWKWARD])
@example(["_a_ b_c", "__init__", "**"], ["<x>", "&lt;"])
def test_markdown_shows_the_names_as_they_are(rows: list[str], columns: list[str]) -> None:
    study = results(rows, columns, [1.0, 2.0])
    lines = rendered(as_markdown(study).partition("\n\n")[2])
    assert lines[0] == ["", *map(squeezed, columns)]
    assert [line[0] for line in lines[1:]] == [squeezed(row) for row in rows]
    assert all(len(line) == 1 + len(columns) for line in lines)
    assert lines[1][1].endswith("[3.25]") and lines[1][1].startswith("1.5 ± 0.5")


def unlatex(text: str) -> str:
    """What LaTeX prints: the inverse of its escapes."""
    meaning = {written: character for character, written in LATEX.items()}
    pattern = "|".join(re.escape(written) for written in sorted(meaning, key=len, reverse=True))
    return re.sub(pattern, lambda match: meaning[match[0]], text)


@given(TEXT)
@example(AWKWARD)
@example("\\textbackslash{} \\& \\\\")
def test_latex_prints_the_text_as_it_stands(text: str) -> None:
    written = latex(text)
    assert unlatex(written) == text
    left = written
    for escape in sorted(LATEX.values(), key=len, reverse=True):
        left = left.replace(escape, "")
    assert not set(left) & set("\\&%$#_{}~^"), "LaTeX interprets no remaining character"


@given(NAMES, NAMES, st.lists(VALUES.filter(lambda v: abs(v) < 1e6), min_size=1, max_size=18))
def test_latex_has_every_row_and_column(rows: list[str], columns: list[str], values: list[float]) -> None:
    text = as_latex(results(rows, columns, values))
    assert f"{{l{'r' * len(columns)}}}" in text and text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    body = text.partition("\\midrule\n")[2].partition("    \\bottomrule")[0].splitlines()
    assert len(body) == len(rows)
    for row, line in zip(rows, body, strict=True):
        cells = re.split(r"(?<!\\) & ", line.strip().removesuffix(r" \\"))
        assert unlatex(cells[0]) == row.strip() or unlatex(cells[0]).strip() == row.strip()
        assert len(cells) == 1 + len(columns)


def test_no_control_character_of_a_name_or_title_reaches_a_table() -> None:
    hostile = "a\x1b[2J\x07\r\x9b1m\u202eb"
    study = results([hostile], [hostile], [1.0, 2.0], title=hostile, notes=(hostile,))
    for text in (as_csv(study), as_markdown(study), as_latex(study)):
        assert not set(text) & set("\x1b\x07\r\x9b\u202e") and "x1b" in text


@pytest.mark.parametrize("key", ["run", "samples", "evaluation", "log"])
@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "a//b"])
def test_a_cell_names_no_file_outside_the_runs(key: str, path: str) -> None:
    known: dict[str, Any] = {"row": "a", "column": "", "seed": 0, "sample_seed": 0, "state": "done"}
    with pytest.raises(ValueError, match="a plain name is needed"):
        CellResult.model_validate(known | {key: path})


def test_bold_and_grey_follow_the_comparison() -> None:
    """Three rows over two seeds: one row is clearly the best, then two rows are equal."""
    clear = grid(results(["a", "b", "c"], ["x"], [1.0, 1.1, 50.0, 50.1, 60.0, 60.2]))
    assert [line[0].mark for _, line in clear.rows] == ["best", "", ""]
    assert any("Bold: better than every other row" in note for note in clear.notes)
    level = grid(results(["a", "b", "c"], ["x"], [1.0, 1.1, 1.1, 1.0, 60.0, 60.2]))
    # a - b is -0.1 and 0.1 over the seeds, so b is close; the means are equal, so the first is the best.
    assert [line[0].mark for _, line in level.rows] == ["lead", "close", ""]
    assert "**" not in as_markdown(results(["a", "b", "c"], ["x"], [1.0, 1.1, 1.1, 1.0, 60.0, 60.2]))
    (note,) = [note for note in level.notes if "Holm" in note]
    assert "3 pairs a column" in note and "at most 0.05 (Holm)" in note and "No row is better" in note
    text = as_markdown(results(["a", "b", "c"], ["x"], [1.0, 1.1, 50.0, 50.1, 60.0, 60.2]))
    assert "| a | **1.05 ± 0.05** [3.25] |" in text and "≈" not in text.partition("\n\n")[2].partition("\n\n")[0]
    assert r"\textbf{1.05 $\pm$ 0.05} [3.25]" in as_latex(results(["a", "b"], ["x"], [1.0, 1.1, 50.0, 50.1]))


def test_missing_and_failed_numbers_have_words() -> None:
    study = results(["a"], ["x", "y"], [1.0])
    failed = [cell.model_copy(update={"state": "failed", "failure": "Bad. Very bad."}) if cell.column == "y" else cell
              for cell in study.cells]  # fmt: skip
    shown = grid(with_estimates(study.model_copy(update={"cells": tuple(failed)})))
    assert [cell.text for cell in shown.rows[0][1]] == ["1 ± 0.5", "failed"] and shown.rows[0][1][1].mark == "failed"
    assert [cell.text for cell in grid(results(["a"], ["x", "y"], [1.0])).rows[0][1]] == ["1 ± 0.5", "…"]
    read = list(csv.DictReader(io.StringIO(as_csv(study.model_copy(update={"cells": tuple(failed)})))))
    assert [line["failure"] for line in read] == ["", "", "Bad.", "Bad."]


@pytest.mark.parametrize(
    ("text", "first"),
    [("One. Two.", "One."), ("At 0.5 it broke! More", "At 0.5 it broke!"), ("no stop", "no stop"), ("", "")],
)
def test_the_first_sentence(text: str, first: str) -> None:
    assert first_sentence(text) == first


def test_settings_and_counts_can_replace_columns() -> None:
    study = results(["a", "b"], ["x"], [1.0, 1.1, 2.0, 2.1], show=("nfe", "x", "train.lr"))
    cells = tuple(cell.model_copy(update={"shown": {"train.lr": "0.001"}}) for cell in study.cells)
    shown = grid(study.model_copy(update={"cells": cells}))
    assert shown.columns == ["nfe", "x", "train.lr"]
    assert [cell.text for cell in shown.rows[0][1]][::2] == ["4", "0.001"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [((33.948, 33.956), "33.952 ± 0.004"), ((29.78, 29.84), "29.81 ± 0.03"), ((66.0, 67.6), "66.8 ± 0.8"), ((0.0, 1e300), "5e+299 ± 5e+299")],
)  # fmt: skip
def test_a_mean_has_the_digits_of_its_error(values: tuple[float, float], shown: str) -> None:
    """34 ± 0.004 would round the mean by twelve times its error."""
    assert grid(results(["a"], ["x"], list(values))).rows[0][1][0].text.startswith(shown)
