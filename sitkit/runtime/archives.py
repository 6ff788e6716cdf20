"""NumPy archives that are written and read in parts, so that they may be larger than the memory."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from sitkit.runtime.errors import UserError
from sitkit.runtime.files import replacing


@contextlib.contextmanager
def writing(path: Path, compress: bool = True) -> Iterator[zipfile.ZipFile]:
    """Yield an archive to add arrays to.  The file appears once it is complete; equal arrays give equal bytes."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with replacing(path) as fresh, zipfile.ZipFile(fresh, "w", kind) as archive:
        yield archive


def add(archive: zipfile.ZipFile, name: str, n: int, parts: Iterable[np.ndarray]) -> None:
    """Add an array of n rows in parts.  Raises ValueError for another number of rows."""
    info = zipfile.ZipInfo(f"{name}.npy")  # Its date is fixed, so that the bytes do not depend on the time.
    info.compress_type = archive.compression
    rows = 0
    with archive.open(info, "w", force_zip64=True) as file:
        for part in parts:
            if rows == 0:
                shape = (n, *part.shape[1:])
                header = {"descr": npy.dtype_to_descr(part.dtype), "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(part).tobytes())
            rows += len(part)
    if rows != n:
        raise ValueError(f"{name} needs {n} rows; got {rows}.")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Yield an archive of samples to read whole arrays from.  Raises UserError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            yield archive
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove the folder {path.parent}, and the same command draws the samples again."
        ) from None


def rows(path: Path, name: str, size: int) -> Iterator[np.ndarray]:
    """Yield an array of an archive, `size` rows at a time.  The array must have plain numbers in C order, as `add` writes."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        width = math.prod(shape[1:]) * dtype.itemsize
        for first in range(0, shape[0], size):
            count = min(size, shape[0] - first)
            yield np.frombuffer(file.read(count * width), dtype).reshape(count, *shape[1:])
