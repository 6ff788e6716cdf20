"""Small pictures of samples and data for a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sitkit.data.dataset import load_examples
from sitkit.evaluation.images import image_sheet, size_of, smaller, to_uint8
from sitkit.results.report.page import Notes, PagePart, Sheet, Sheets
from sitkit.runs.config.identity import label
from sitkit.runs.config.schema import Config
from sitkit.runs.sample_set import PICTURE, opened_samples
from sitkit.runtime.errors import LeftOut, UserError, WorkFailed

MAX_SHEETS = 48
# Minimum size of one image in pixels of the page; `image_sheet` makes larger images smaller.
SHEET_CELL, COLUMNS, SMALL, LARGE = 28, 10, 60, 20


def sample_parts(
    config: Config | None, samples: Sequence[tuple[Path, str, str]], total: int, where: str, broken: LeftOut
) -> list[PagePart]:
    """Return the sheets of the data and of sets of samples, with a note on the sets that are not shown.

    Args:
        config: the run whose data are shown; None: no data.
        samples: folder, title and caption of each set.
        total: the number of all sets; `samples` has at most `MAX_SHEETS`.
        where: the end of the note.
        broken: receives the sets that cannot be read.
    """
    sheets = [data_sheet(config)] if config else []
    for sample in samples:
        with broken.noting():
            sheets.append(sample_sheet(*sample))
    sheets = [sheet for sheet in sheets if sheet]
    parts: list[PagePart] = [Sheets(sheets)] if sheets else []
    return parts + ([Notes([f"{total - MAX_SHEETS} more {where}"])] if total > MAX_SHEETS else [])


def sample_sheet(folder: Path, title: str, caption: str) -> Sheet | None:
    """Return the first samples of a folder, in order of their index; None for points without a plot."""
    with opened_samples(folder) as arrays:
        images = arrays.get("images")
        n = len(arrays["labels"])
    if images is None:
        return _scatter(folder / PICTURE, title, caption, n)
    return _sheet(images, title, caption, f"samples 0 to {{last}} of {title}, {caption}")


def data_sheet(config: Config) -> Sheet | None:
    """Return examples of the data, ordered by label; None if they are no images or cannot be read."""
    try:
        data = load_examples(config.data)
    except (UserError, WorkFailed, OSError):
        return None
    if not data.is_image:
        return None
    classes = [np.flatnonzero(data.labels == c) for c in range(max(1, data.num_classes))][:COLUMNS]
    index = np.array([members[i] for i in range(SMALL // COLUMNS) for members in classes if i < len(members)])
    images = to_uint8(data.read(index))
    return _sheet(images, "data", f"{label(config.data)}, {len(data):,} examples", "examples 0 to {last} of the data")


def _sheet(images: np.ndarray, title: str, caption: str, alt: str) -> Sheet:
    side = max(images.shape[1:3])
    n = min(len(images), SMALL if side <= 64 else LARGE)
    columns = min(COLUMNS if side <= 64 else COLUMNS // 2, n)
    data = image_sheet(images[:n], columns)
    width, height = size_of(data)
    zoom = max(1, round(SHEET_CELL * columns / width))
    return Sheet(data, width * zoom, height * zoom, title, caption, alt.format(last=n - 1))


def _scatter(path: Path, title: str, caption: str, n: int) -> Sheet | None:
    if not path.is_file():
        return None
    data = smaller(path, 640)
    width, height = size_of(data)
    return Sheet(data, width // 2, height // 2, title, caption, f"{n} samples of {title} over the data")
