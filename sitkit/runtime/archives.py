"""NumPy archives that are written and read in parts, so that they may be larger than the memory."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from sitkit.runtime.errors import UserError, unreadable
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


# What NumPy and zipfile raise for bytes that are not what they should be.
DAMAGES = (
    ValueError, EOFError, KeyError, TypeError, SyntaxError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class ArrayHeader(NamedTuple):
    """What an archive says of an array before its values."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def headers(path: Path, copies: int = 1) -> dict[str, ArrayHeader]:
    """Return the shape and the type of each array of an archive, read from the headers alone.

    A small file can promise any size, and a zip can unpack to a thousand times its own.  So the promise is compared with the
    bytes of the file, and with the memory that is left, before anything is allocated.

    Args:
        path: the file.
        copies: how often its arrays will be in memory at the same time.

    Returns:
        The headers by the name of the array.

    Raises:
        UserError: for a file that is not an archive of arrays, an array whose bytes are not those of its shape, and arrays
            that are larger together than the memory that is left.
    """
    found: dict[str, ArrayHeader] = {}
    total = 0
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as file:
                version = npy.read_magic(file)
                read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read is None:
                    raise ValueError(f"{info.filename} is of format {version}")
                shape, _, dtype = read(file)
                promised, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
            if dtype.hasobject:
                raise UserError(
                    f"{path}: holds Python objects, which are refused because reading them can run code. Save plain arrays."
                )
            if promised != there:
                raise ValueError(
                    f"{info.filename} of shape {shape} needs {promised:,} bytes, and the file has {there:,}"
                )
            found[info.filename.removesuffix(".npy")] = ArrayHeader(shape, dtype)
            total += there
    require_memory(copies * total, f"{path}, unpacked" if copies == 1 else f"{path}, unpacked {copies} times,")
    return found


def require_memory(size: float, what: str) -> None:
    """Raise UserError if the memory that is left for this process is less than `size` bytes, which `what` needs."""
    if size > (left := memory_left()):
        raise UserError(
            f"{what} needs {size / 2**30:,.1f} GiB, and {left / 2**30:.1f} GiB of memory are left for this process: "
            "give it more memory, or fewer or smaller arrays."
        )


def memory_left() -> int:
    """Return the bytes that this process can still allocate: what the system has, and what the process's own limit leaves."""
    left = [2**63]
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        left.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        if limit != resource.RLIM_INFINITY:
            left.append(max(0, limit - used))
    return min(left)


@contextlib.contextmanager
def _damage_named(path: Path, remedy: str = "Write or copy it again.") -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except MemoryError:
        raise UserError(f"{path} does not fit into the memory that is left for this process.") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except DAMAGES as error:
        raise UserError(f"{path} is damaged ({error}). {remedy}") from None


@contextlib.contextmanager
def opened(path: Path, remedy: str = "Write or copy it again.") -> Iterator[Any]:
    """Yield an archive to read whole arrays from, its headers checked.

    Args:
        path: the file.
        remedy: what to do about a damaged file, for errors.

    Raises:
        UserError: as `headers`, and for values that are damaged.
    """
    headers(path)
    with _damage_named(path, remedy), np.load(path, allow_pickle=False) as archive:
        yield archive


def rows(path: Path, name: str, size: int) -> Iterator[np.ndarray]:
    """Yield an array of an archive, `size` rows at a time.  The array must have plain numbers in C order, as `add` writes."""
    with _damage_named(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        width = math.prod(shape[1:]) * dtype.itemsize
        for first in range(0, shape[0], size):
            count = min(size, shape[0] - first)
            yield np.frombuffer(file.read(count * width), dtype).reshape(count, *shape[1:])
