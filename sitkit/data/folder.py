"""Images in one folder per class, of any size: the folder is listed once, and images are decoded when they are read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from sitkit.data.dataset import Dataset, Examples, fingerprint, split_holdout
from sitkit.data.decoding import Pictures, Source, check_headers, picture_examples
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, require_at_least

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")


@final
@datasets.register("image-folder")
@dataclass(frozen=True)
class ImageFolder(Dataset):
    """Images in a folder per class, path/class/name.png|jpg|jpeg|webp: centre square of `size`, x = value / 127.5 - 1.

    Classes and files are in the order of their names; hidden files are ignored.  flip: mirror half of the drawn images,
    left to right.  channels: 3 (colour) or 1 (grey).  Transparency and the orientation mark of a camera are ignored, as in
    the reference code of the field.  Loading lists the folder and checks the headers; images are decoded when they are
    read, and stay in memory if all of them fit in 1 GiB.  The fingerprint covers size, channels, and the name and length
    of every file, not its content: a copy in another place is the same data, and no file must be read for it; a file that
    changes but keeps its length is not noticed.
    """

    path: str
    size: int
    flip: bool = True
    channels: Literal[1, 3] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, size=self.size)

    def load(self) -> Examples:
        import numpy as np

        folder = Path(self.path).expanduser()
        classes = _listing(folder)
        files = [f"{name}/{file}" for name, inside in classes.items() for file, _ in inside]
        labels = np.repeat(np.arange(len(classes)), [len(inside) for inside in classes.values()])
        text = "".join(
            "\0".join([f"\n{name}", *(f"{file} {length}" for file, length in inside)])
            for name, inside in classes.items()
        )
        mark = fingerprint(f"image-folder {self.size} {self.channels}{text}")
        source = Source(len(files), lambda i: str(folder / files[i]), lambda i: folder / files[i])
        check_headers(source, str(folder), mark)
        parts = split_holdout(len(files), self.holdout)
        reader = Pictures(source, self.size, self.channels, self.flip)
        return picture_examples(reader, labels.astype(np.int64), tuple(classes), mark, parts)


def _listing(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Return the files of each class with their lengths in bytes; classes and files are in the order of names."""
    layout = "dataset 'image-folder' reads path/class/name.png (or .jpg, .jpeg, .webp)."
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder. {layout}")
    inside = _visible(folder)
    loose = [entry for entry in inside if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir()]
    if loose:
        raise UserError(f"{loose[0].path}: an image outside a class folder. {layout}")
    classes = {entry.name: _visible(Path(entry.path)) for entry in inside if entry.is_dir()}
    if not classes:
        raise UserError(f"{folder}: there is no class folder in it. {layout}")
    for name, files in classes.items():
        if not files:
            raise UserError(f"{folder / name}: this class has no image. Add some, or remove the folder.")
        for file in files:
            if not file.name.lower().endswith(EXTENSIONS) or file.is_dir():
                raise UserError(f"{file.path}: not a .png, .jpg, .jpeg or .webp file. Move it out of the class folder.")
    return {name: [(file.name, file.stat().st_size) for file in files] for name, files in classes.items()}


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
