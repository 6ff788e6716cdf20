"""Parquet files, read one row group at a time from a disk or over a network; the data set `hub` streams from them.

At first only the footer of a file is read, later one column of the row groups that a batch needs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sitkit.runtime.errors import UserError, WorkFailed

# The number of footers that are read in parallel: they are small, and the network is slow to answer.
FOOTERS = 16


class Files:
    """Parquet files of one schema, in order, opened by fsspec: local paths and hf://, s3://, https:// and others.

    Raises UserError, with the name of the file, for a file that cannot be read.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        with ThreadPoolExecutor(FOOTERS, "sitkit-parquet") as pool:
            self.footers: list[Any] = list(pool.map(self._footer, self.paths))
        sizes = [
            (number, group, footer.row_group(group).num_rows)
            for number, footer in enumerate(self.footers)
            for group in range(footer.num_row_groups)
        ]
        self.place = [(number, group) for number, group, _ in sizes]
        self.starts = np.cumsum([0, *(rows for _, _, rows in sizes)])

    @property
    def count(self) -> int:
        """The number of rows of all files."""
        return int(self.starts[-1])

    @property
    def schema(self) -> Any:
        """The Arrow schema of the first file."""
        return self.footers[0].schema.to_arrow_schema()

    def lengths(self, column: str) -> np.ndarray:
        """Return the bytes of a column in each row group, (groups,) int64."""
        sizes = []
        for number, group in self.place:
            parts = self.footers[number].row_group(group)
            columns = (parts.column(i) for i in range(parts.num_columns))
            sizes.append(sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] == column))
        return np.array(sizes, np.int64)

    def column(self, name: str) -> Any:
        """Return a whole column as an Arrow table, without reading the others."""
        import pyarrow

        with ThreadPoolExecutor(FOOTERS, "sitkit-parquet") as pool:
            return pyarrow.concat_tables(
                list(pool.map(lambda number: self._read(number, None, name), range(len(self.paths))))
            )

    def group(self, number: int, column: str) -> Any:
        """Return a column of one row group as an Arrow table."""
        file, group = self.place[number]
        return self._read(file, group, column)

    def _read(self, number: int, group: int | None, column: str) -> Any:
        import pyarrow.parquet

        with _opened(self.paths[number]) as handle:
            file = pyarrow.parquet.ParquetFile(handle, metadata=self.footers[number])
            return file.read(columns=[column]) if group is None else file.read_row_group(group, columns=[column])

    def _footer(self, path: str) -> Any:
        import pyarrow.parquet

        try:
            with _opened(path) as handle:
                return pyarrow.parquet.read_metadata(handle)
        except Exception as error:  # pyarrow, fsspec and each of its file systems raise their own kinds.
            raise UserError(
                f"{path}: cannot be read as parquet: {str(error).strip() or type(error).__name__}"
            ) from None


def _opened(path: str) -> Any:
    from fsspec.core import url_to_fs

    system, name = url_to_fs(path)
    return system.open(name, "rb")


class Rows:
    """Rows of a column by number; the `kept` row groups used last stay in memory.

    Raises WorkFailed, with the name of the file, for a row group that cannot be fetched.
    """

    def __init__(self, files: Files, column: str, kept: int) -> None:
        self.files, self.column = files, column
        self.group = functools.lru_cache(kept)(self._fetch)
        self._locks = [threading.Lock() for _ in files.place]

    def __getitem__(self, number: int) -> Any:
        group = int(np.searchsorted(self.files.starts, number, side="right")) - 1
        # Of the threads that need one row group, the first fetches it and the others wait.
        with self._locks[group]:
            column = self.group(group)
        return column[number - int(self.files.starts[group])].as_py()

    def _fetch(self, group: int) -> Any:
        try:
            return self.files.group(group, self.column).column(self.column)
        except Exception as error:
            path = self.files.paths[self.files.place[group][0]]
            reason = str(error).strip().splitlines()
            raise WorkFailed(f"{path}: cannot be read: {reason[0] if reason else repr(error)}.") from None


def nearly_shuffled(train: np.ndarray, starts: np.ndarray, window: int) -> Callable[[int, int], np.ndarray]:
    """Return (seed, epoch) -> a permutation of `train` through the row groups in random order, `window` of them mixed.

    The examples are sorted by the random place of their row group plus a uniform draw from [0, window).  So at most about
    window + 1 row groups are in use at any time, and a new row group begins when an old one ends.
    """
    groups = np.searchsorted(starts, train, side="right") - 1

    def order(seed: int, epoch: int) -> np.ndarray:
        random = np.random.default_rng((seed, epoch))
        place = random.permutation(len(starts) - 1)
        return train[np.argsort(place[groups] + window * random.random(len(train)), kind="stable")]

    return order


def split_by_group(starts: np.ndarray, holdout: float, least: int = 20) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (train, heldout) with whole row groups held out, so that neither part reads the row groups of the other.

    Returns None if there are fewer than `least` row groups.
    """
    from sitkit.data.dataset import split_holdout

    if len(starts) - 1 < least:
        return None
    train, heldout = split_holdout(len(starts) - 1, holdout)
    rows = [np.arange(first, last) for first, last in zip(starts[:-1], starts[1:], strict=True)]
    return tuple(np.concatenate([np.empty(0, np.int64), *(rows[g] for g in some)]) for some in (train, heldout))  # pyright: ignore[reportReturnType]
