"""Hostile files: made to start a program, to take the memory, to block, to reach other folders or to run in a browser.

Every file with a payload would write the file MARK in the folder of the trial; no trial may leave it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from command import run
from count import Count, spread
from damages import TRAIN, base
from PIL import Image

MARK = "the-payload-ran"
# Far above what the smallest work takes, with the libraries of the parent process; far below what the files promise.
MOST_MIB = 3000


class Case(NamedTuple):
    """A hostile file: what it is, how it is put into a folder, the command that reads it, and whether it must be refused."""

    what: str
    put: Callable[[Path], object]
    words: tuple[str, ...]
    refused: bool = True


@dataclass
class Payload:
    """An object whose pickle runs a command of the shell."""

    command: str = f"touch {MARK}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def png(kind: str = "png", **options: Any) -> bytes:
    """Return a small image in a format."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(file, kind, **options)
    return file.getvalue()


def giant_png(side: int) -> bytes:
    """Return a PNG whose header promises a picture of side x side, and which has a line of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(3 * side)))
        + chunk(b"IEND", b"")
    )


SHELL = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch {MARK}) (w) file\nshowpage\n".encode()
IMAGES: dict[str, bytes] = {
    "PostScript": SHELL,
    "PostScript behind a header of DOS": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(SHELL)) + bytes(18) + SHELL,
    "PDF": b"%PDF-1.4\n1 0 obj <</OpenAction <</S /Launch /F (touch)>>>> endobj\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "script": f"#!/bin/sh\ntouch {MARK}\n".encode(),
    "PNG of 60,000 x 60,000": giant_png(60_000),
    "PNG of 2,000,000,000 x 2,000,000,000": giant_png(2_000_000_000),
    "GIF of 65,535 x 65,535": b"GIF89a\xff\xff\xff\xff\x80\0\0"
    + bytes(6)
    + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
    "FLI": b"\0" * 4 + b"\x11\xaf" + b"\xff" * 122,
    "ICNS": b"icns" + struct.pack(">I", 2**31) + b"ic10" + struct.pack(">I", 2**31),
    "archive": b"ZipFile PK\x03\x04" + bytes(40),
    "pickle": pickle.dumps(Payload()),
    "nothing": b"",
    "half a PNG": png()[:40],
    "half a JPEG": png("jpeg")[:300],
    "WebP with a length of 4 GB": b"RIFF\xff\xff\xff\xffWEBPVP8 \xff\xff\xff\xff" + bytes(30),
    "TIFF whose folder is itself": b"II*\0\x08\0\0\0\x01\0\0\x01\x03\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
}
NAMES = ("x.png", "x.jpg", "x\x1b[2J.png", "\u202egnp.jpg")
FOLDER = ("train", "--data", "image-folder", "--set", "data.path=pictures", "--set", "data.size=8", *TRAIN)
ARCHIVE = ("train", "--data", "npz", "--set", "data.path=bad.npz", *TRAIN)
PARQUET = ("train", "--data", "hub", "--set", "data.path=bad.parquet", "--set", "data.size=8", *TRAIN)


def images() -> Iterator[Case]:
    """Yield images that are something else, promise too much, or are no regular files."""
    for what, data in IMAGES.items():
        for name in NAMES if what in ("PostScript", "pickle") else NAMES[:2]:
            yield Case(
                f"image: {what} as {name!r}", lambda f, n=name, d=data: (f / "pictures/a" / n).write_bytes(d), FOLDER
            )

    def bound(folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = Path.cwd()
            os.chdir(folder / "pictures/a")
            server.bind("x.png")
            os.chdir(here)

    special: dict[str, Callable[[Path], object]] = {
        "a pipe": lambda folder: os.mkfifo(folder / "pictures/a/x.png"),
        "a socket": bound,
        "a link to /dev/zero": lambda folder: (folder / "pictures/a/x.png").symlink_to("/dev/zero"),
        "a link to a terminal": lambda folder: (folder / "pictures/a/x.png").symlink_to("/dev/tty"),
        "a link to itself": lambda folder: (folder / "pictures/a/x.png").symlink_to("x.png"),
        "a class that is a link to its parent": lambda folder: (folder / "pictures/c").symlink_to(".."),
        "a class that is a link to nothing": lambda folder: (folder / "pictures/c").symlink_to("nothing"),
    }
    for what, put in special.items():
        yield Case(f"image: {what}", put, FOLDER)
    odd = {
        "a name that is not UTF-8": b"\xff\xfe.png",
        "a name with a line end": b"a\nb.png",
        "a long name": b"x" * 250 + b".png",
    }
    for what, name in odd.items():
        yield Case(
            f"image: {what}",
            lambda f, n=name: Path(os.fsdecode(os.fsencode(f / "pictures/a") + b"/" + n)).write_bytes(png()), FOLDER, False,
        )  # fmt: skip


def npy(header: str, data: bytes = b"") -> bytes:
    """Return an array with a header of its own."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + data


def zipped(members: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def pickled_arrays() -> bytes:
    """Return an archive with Python objects."""
    file = io.BytesIO()
    np.savez(file, images=np.array([Payload()], dtype=object))
    return file.getvalue()


def archives() -> Iterator[Case]:
    """Yield archives that hold objects, lie about their size, or unpack to too much."""
    good = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 4, 4, 1), }", bytes(96))

    def lying(shape: str, kind: str = "|u1") -> bytes:
        return zipped(
            {"images.npy": npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}", bytes(96))}
        )

    deep = "[" * 60 + "('a', '<i4')" + "]" * 60
    cases = {
        "Python objects": pickled_arrays,
        "a bare pickle": lambda: pickle.dumps(Payload()),
        "objects by their header": lambda: lying("(6,)", "|O"),
        "a petabyte": lambda: lying("(1000000000, 1000, 1000, 3)"),
        "a shape beyond 64 bits": lambda: lying("(99999999999999999999999, 4, 4, 1)"),
        "a negative shape": lambda: lying("(-6, -4, 4, 1)"),
        "a shape of true": lambda: lying("(True, 4, 4, 1)"),
        "a shape that is code": lambda: lying("__import__('os').system('touch MARK')"),
        "a nested type": lambda: zipped({"images.npy": npy(f"{{'descr': {deep}, 'fortran_order': False, 'shape': (6,), }}")}),
        "a long header": lambda: zipped({"images.npy": npy("{" + " " * 60000 + "}")}),
        "a bomb": lambda: zipped(
            {"images.npy": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (400000, 40, 40, 1), }") + bytes(640_000_000)},
            zipfile.ZIP_DEFLATED,
        ),
        "an encrypted member": lambda: zipped({"images.npy": good}).replace(b"PK\x03\x04\x14\0\0", b"PK\x03\x04\x14\0\x01"),
        "an unknown compression": lambda: zipped({"images.npy": good}).replace(b"\x14\0\0\0\0\0", b"\x14\0\0\0\x63\0"),
    }  # fmt: skip
    for what, make in cases.items():
        yield Case(
            f"archive: {what}",
            lambda f, m=make: (f / "bad.npz").write_bytes(m()),
            ARCHIVE,
            what not in ("a bomb", "an encrypted member"),
        )
    for name in ("../../outside.npy", "/outside.npy", "images.npy/../x.npy", "a\x1b[2J.npy", "\u202eyn.npy"):
        data = zipped({"images.npy": good, name: good})
        yield Case(f"archive: a member {name!r}", lambda f, d=data: (f / "bad.npz").write_bytes(d), ARCHIVE, False)


def pickles(run_name: str) -> Iterator[Case]:
    """Yield pickles in the place of weights."""
    import torch

    def saved(value: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    contents = {f"protocol {protocol}": pickle.dumps(Payload(), protocol) for protocol in range(6)}
    contents["torch.save"] = saved({"model": Payload()})
    for what, data in contents.items():
        put = {
            "one.safetensors": ("sample", "one.safetensors", "-n", "4"),
            "SiT-XL-2-256.pt": ("convert", "SiT-XL-2-256.pt"),
        }
        for name, words in put.items():
            yield Case(f"pickle: {what} as {name}", lambda f, n=name, d=data: (f / n).write_bytes(d), words)

    def checkpoint(folder: Path) -> None:
        for path in (folder / "runs" / run_name).glob("checkpoints/*"):
            path.write_bytes(contents["torch.save"])

    yield Case("pickle: as checkpoints", checkpoint, ("sample", "RUN", "-n", "4"))


def tensors() -> Iterator[Case]:
    """Yield safetensors files with headers that lie."""
    own = {"sitkit": '{"kind": "run", "format": 1}'}
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    headers: dict[str, bytes] = {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of 90 MB": struct.pack("<Q", 90_000_000) + b"{" + b" " * 20,
        "deep JSON": b"[" * 100_000,
    }
    for what, entries in {
        "tensors that overlap": {"a": one, "b": one},
        "a negative shape": {"a": {**one, "shape": [-2]}},
        "a shape beyond 64 bits": {"a": {**one, "shape": [2**40, 2**40]}},
        "offsets beyond the file": {"a": {**one, "data_offsets": [0, 2**60]}},
        "a type that is none": {"a": {**one, "dtype": "OBJECT"}},
        "a name with escapes": {"\x1b[2J\u202e": one},
        "a header that is a list": {"a": one, "__metadata__": {"sitkit": "[" * 5000}},
        "an autoencoder that is a path": {
            "a": one,
            "__metadata__": {"sitkit": json.dumps({"kind": "run", "format": 1, "autoencoder": "/etc/passwd"})},
        },
    }.items():
        text = json.dumps({"__metadata__": own, **entries}).encode()
        headers[what] = struct.pack("<Q", len(text)) + text + bytes(8)
    for what, data in headers.items():
        yield Case(
            f"tensors: {what}",
            lambda f, d=data: (f / "one.safetensors").write_bytes(d),
            ("sample", "one.safetensors", "-n", "4"),
        )


def laughs(depth: int) -> str:
    """Return YAML of a few hundred bytes that stands for 10^depth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines) + "\n"


TEXTS = {
    "a tag that calls": f"data: !!python/object/apply:os.system ['touch {MARK}']\n",
    "a tag that makes": "data: !!python/object/new:subprocess.Popen [[touch, x]]\n",
    "a module": "data: !!python/module:os\n",
    "aliases that multiply": laughs(9),
    "an alias of itself": "data: &a {name: *a}\n",
    "nesting": "data: " + "[" * 20_000 + "\n",
    "an endless number": "train: {steps: " + "9" * 100_000 + "}\n",
    "escapes": 'interp: "\\x1b[2J\\x1b]0;x\\x07"\n',
    "a merge": "data: {<<: {name: points}}\n",
    "bytes": "data: !!binary AAAA\n",
}


def texts() -> Iterator[Case]:
    """Yield settings, studies and searches that do more than say values."""
    for what, text in TEXTS.items():
        for words in (("train", "bad.yaml"), ("check", "bad.yaml"), ("search", "RUN", "bad.yaml")):
            yield Case(f"YAML: {what}, {words[0]}", lambda f, t=text: (f / "bad.yaml").write_text(t), words)
        words = ("train", "--set", text.strip().replace(": ", "=", 1)[:100_000])
        yield Case(f"YAML: {what}, --set", lambda f: None, words)


def names(run_name: str) -> Iterator[Case]:
    """Yield records that name files outside of their folder."""

    def edited(pattern: str, keys: tuple[str, ...], new: str) -> Callable[[Path], object]:
        def put(folder: Path) -> None:
            path = next(folder.glob(pattern))
            tree = node = json.loads(path.read_text())
            for key in keys[:-1]:
                node = node[int(key) if isinstance(node, list) else key]
            node[keys[-1]] = new
            path.write_text(json.dumps(tree))

        return put

    number, samples = f"runs/{run_name}/evaluations/*.json", f"runs/{run_name}/samples/*/record.json"
    for new in ("../../outside", "/outside", "a/../../b", "\x1b[2J", ".."):
        for pattern, keys, words in (
            (number, ("samples",), ("verify", "RUN")),
            (number, ("run",), ("explain", "RUN")),
            (samples, ("recipe", "guidance", "run"), ("evaluate", "RUN", "-n", "40")),
            ("studies/*/results.json", ("cells", "0", "evaluation"), ("explain", "study")),
        ):
            put = edited(pattern, keys, new)
            yield Case(
                f"name: {'.'.join(keys)} is {new!r}, {words[0]}", put, words, words[0] not in ("explain", "evaluate")
            )


def tables() -> Iterator[Case]:
    """Yield parquet files whose images are files of this machine, or are not there."""
    try:
        import datasets as library
    except ImportError:
        return
    features = library.Features({"image": library.Image(decode=False), "label": library.ClassLabel(names=["x", "y"])})
    whole = {"bytes": png(), "path": None}
    for what, image in {
        "a device": {"bytes": None, "path": "/dev/zero"},
        "a file of passwords": {"bytes": None, "path": "/etc/passwd"},
        "no image": None,
        "PostScript": {"bytes": SHELL, "path": "x.png"},
        "a giant": {"bytes": giant_png(60_000), "path": None},
    }.items():

        def put(folder: Path, image: Any = image) -> None:
            columns = {"image": [whole] * 5 + [image], "label": [0, 1, 0, 1, 0, 1]}
            library.Dataset.from_dict(columns, features).to_parquet(str(folder / "bad.parquet"))

        yield Case(f"parquet: {what}", put, PARQUET)


def cases(run_name: str) -> list[Case]:
    """Return every hostile file."""
    made = (images(), archives(), pickles(run_name), tensors(), texts(), names(run_name), tables())
    return [case for some in made for case in some]


def hostile(root: Path, trials: int, draw: random.Random) -> Count:
    """Put each hostile file into a folder and run the command that reads it."""
    count, folder = Count(), root / "work"
    words = base(folder)
    shutil.move(folder, root / "base")
    run_name = words["sample"][1]
    for case in spread(cases(run_name), trials):
        shutil.copytree(root / "base", folder, symlinks=True)
        case.put(folder)
        ended = run([run_name if word == "RUN" else word for word in case.words], folder)
        if count.check(ended, case.what) and case.refused and ended.status == 0:
            count.note("wrong", f"{case.what}: it was not refused")
        if list(folder.rglob(MARK)):
            count.note("programs", f"{case.what}: the payload ran")
        if ended.peak_mib > MOST_MIB:
            count.note("status", f"{case.what}: {ended.peak_mib:.0f} MiB")
        if "\x1b[2J" in ended.out + ended.err:
            count.note("status", f"{case.what}: a control character reached the terminal")
        shutil.rmtree(folder)
    return count
