"""Images in one folder, or in one folder per class: the folder is listed once, and images are decoded when they are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from sitkit.data.dataset import LARGEST_IMAGE, Dataset, Examples, fingerprint, split_holdout
from sitkit.data.decoding import EXTENSIONS, Pictures, Source, check_images, picture_examples
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, require_within

KINDS = f"{', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"


@final
@datasets.register("image-folder")
@dataclass(frozen=True)
class ImageFolder(Dataset):
    """Images in a folder per class, path/class/name.png: centre square of `size`, x = value / 127.5 - 1.

    Images are PNG, JPEG, WebP, BMP, GIF (the first frame) or TIFF files.  A folder of images without a class folder has no
    classes.  Classes and files are in the order of their names; hidden files are ignored.  flip: mirror half of the drawn
    images, left to right.  channels: 3 (colour) or 1 (grey).  Transparency and the orientation mark of a camera are ignored,
    as in the reference code of the field.  Loading lists the folder and decodes every image once; later loads of the same
    files do not.  Images are decoded when they are read, and stay in memory if all of them fit in 1 GiB.  The fingerprint
    covers size, channels, and the name and length of every file, not its content: a copy in another place is the same
    data, and no file must be read for it; a file that changes but keeps its length is not noticed.
    """

    path: str
    size: int
    flip: bool = True
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, LARGEST_IMAGE, size=self.size)

    def places(self) -> tuple[str, ...]:
        return ("path",)

    def load(self) -> Examples:
        import numpy as np

        folder = Path(self.path).expanduser()
        try:
            classes = _listing(folder)
        except OSError as error:
            raise UserError(f"{shown(error.filename or folder)}: cannot be read: {error.strerror or error}.") from None
        files = [Path(file.path) for inside in classes.values() for file in inside]
        labels = np.repeat(np.arange(len(classes)), [len(inside) for inside in classes.values()])
        text = "".join(
            "\0".join([f"\n{name}", *(f"{file.name} {file.stat().st_size}" for file in inside)])
            for name, inside in classes.items()
        )
        mark = fingerprint(f"image-folder {self.size} {self.channels}{text}")
        source = Source(len(files), lambda i: shown(files[i]), lambda i: files[i])
        times = "\0".join(str(file.stat().st_mtime_ns) for inside in classes.values() for file in inside)
        check_images(source, shown(folder), f"{folder.resolve()} {mark} {times}")
        parts = split_holdout(len(files), self.holdout)
        reader = Pictures(source, self.size, self.channels, self.flip)
        names = tuple(shown(name) for name in classes if name)
        return picture_examples(reader, labels.astype(np.int64), names, mark, parts)


def _listing(folder: Path) -> dict[str, list[os.DirEntry[str]]]:
    """Return the files of each class; classes and files are in the order of names.  Files without a class have class ""."""
    layout = "dataset 'image-folder' reads path/class/name.png, or path/name.png without classes."
    try:
        inside = _visible(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{shown(folder)}: there is no such folder. {layout}") from None
    for entry in inside:
        if not entry.is_file() and not entry.is_dir():
            raise UserError(f"{shown(entry.path)}: {_what(entry)}. Restore it, or remove it.")
    loose = [entry for entry in inside if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir()]
    classes = {entry.name: _visible(Path(entry.path)) for entry in inside if entry.is_dir()}
    if loose and classes:
        raise UserError(f"{shown(loose[0].path)}: an image outside a class folder. {layout}")
    if loose:
        classes = {"": inside}
    if not classes:
        raise UserError(f"{shown(folder)}: there is no class folder and no image in it. {layout}")
    for name, files in classes.items():
        if not files:
            raise UserError(f"{shown(folder / name)}: this class has no image. Add some, or remove the folder.")
        for file in files:
            if not file.is_file():
                raise UserError(f"{shown(file.path)}: {_what(file)}, not an image. Move it out of the folder.")
            if not file.name.lower().endswith(EXTENSIONS):
                raise UserError(f"{shown(file.path)}: not a {KINDS} file. Move it out of the folder.")
    return classes


def shown(path: str | Path) -> str:
    """Return a path or a name as text in UTF-8; a byte that is not UTF-8 becomes \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _what(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        return f"a link to {shown(os.readlink(entry.path))}, which is not there"
    return "a folder" if entry.is_dir() else "not a regular file"


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
