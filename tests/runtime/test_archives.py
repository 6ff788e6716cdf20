"""Archives of arrays: what a file promises is compared with its bytes and the memory before anything is allocated."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from sitkit.registry import datasets
from sitkit.runtime import archives
from sitkit.runtime.errors import UserError


def header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    text = io.BytesIO()
    npy.write_array_header_1_0(text, {"descr": kind, "fortran_order": False, "shape": shape})
    return text.getvalue()


def stored(path: Path, content: bytes, name: str = "images.npy") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def unpacking(path: Path, images: int) -> Path:
    """An archive of black images, which unpacks to a thousand times its size."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header((images, 64, 64, 3)))
        for _ in range(images // 1000):
            file.write(bytes(64 * 64 * 3 * 1000))
    return path


def flipped(path: Path) -> Path:
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


LIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "more than the file has": (
        lambda p: stored(p, header((10**9, 64, 64, 3)) + bytes(4096)),
        "needs 12,288,000,000,000",
    ),
    "less than the file has": (lambda p: stored(p, header((1, 8, 8, 3)) + bytes(4096)), "needs 192 bytes"),
    "past 64 bits": (lambda p: stored(p, header((2**40, 2**40)) + bytes(64)), "images.npy of shape"),
    "a negative size": (lambda p: stored(p, header((-4, 8, 8, 3)) + bytes(64)), "is damaged"),
    "no header": (lambda p: stored(p, b"images"), "is damaged"),
    "half a header": (lambda p: stored(p, header((4, 8, 8, 3))[:40]), "is damaged"),
    "a header that is code": (lambda p: stored(p, header((4,)).replace(b"(4,)", b"f(4)")), "is damaged"),
    "Python objects": (lambda p: stored(p, header((4,), "|O") + bytes(64)), "holds Python objects"),
    "other bytes": (flipped, "is damaged"),
}


@pytest.mark.parametrize("kind", LIES)
def test_an_archive_that_lies_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    make, words = LIES[kind]
    path = make(tmp_path / "lie.npz")
    with pytest.raises(UserError, match=words) as caught:
        datasets.create("npz", path=str(path)).load()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        list(archives.rows(path, "images", 2))
        with archives.opened(path) as arrays:
            assert arrays["images"].shape


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """1.2 GB in 1.2 MB, for a process that may take another 0.5 GiB."""
    path = unpacking(tmp_path / "bomb.npz", 100_000)
    assert path.stat().st_size < 2e6
    script = (
        "import resource, sys; from sitkit.runtime import archives; from pathlib import Path\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))\n"
        "try: archives.headers(Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    message, peak = done.stdout.splitlines()
    assert message.startswith("UserError") and "unpacked needs 1.1 GiB" in message, done.stdout
    # NumPy alone takes about 60 MB.
    assert int(peak) < 400_000


def test_the_memory_that_is_left_follows_the_limit_of_the_process() -> None:
    assert 2**20 < archives.memory_left() < 2**50
