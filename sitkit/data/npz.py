"""Images from a NumPy archive, checked when they are loaded and kept in memory as uint8."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from sitkit.data.dataset import LARGEST_IMAGE, Dataset, Examples, in_memory
from sitkit.data.decoding import centre_square
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, require_within, suggest

if TYPE_CHECKING:
    import numpy as np


@final
@datasets.register("npz")
@dataclass(frozen=True)
class Npz(Dataset):
    """Images from a NumPy archive: images uint8 (n, h, w, c) or (n, h, w), labels (n,) optional, x = value / 127.5 - 1.

    The labels are whole numbers from 0.  The names label_names (k,) are optional; without them a class has its number as
    name.  size: crop each image to the centre square and resize it.  flip: mirror half of the drawn images, left to right.
    Pickled objects are refused.
    """

    path: str
    size: int | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            require_within(1, LARGEST_IMAGE, size=self.size)

    def places(self) -> tuple[str, ...]:
        return ("path",)

    def load(self) -> Examples:
        import numpy as np

        path = Path(self.path).expanduser()
        arrays = _read_npz(path)
        images = _images(path, arrays["images"])
        labels, class_names = _labels(path, len(images), arrays.get("labels"), arrays.get("label_names"))
        if self.size is not None:
            images = np.stack([_centre(image, self.size) for image in images])
        return in_memory(images.transpose(0, 3, 1, 2), labels, class_names, holdout=self.holdout, flip=self.flip)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    import numpy as np

    from sitkit.runtime import archives

    if not path.is_file():
        raise UserError(f"{path}: there is no such file. dataset 'npz' reads a NumPy archive (.npz) of images.")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: not a whole NumPy archive (.npz), or cut short. Write it again by numpy.savez(path, images=...)."
        )
    # The images, and the images with their channels first.
    headers = archives.headers(path, copies=2)
    if "images" not in headers:
        has = ", ".join(headers) or "none"
        raise UserError(f"{path}: has no array 'images'.{suggest('images', list(headers))} It has: {has}.")
    with archives.opened(path) as archive:
        return {key: np.asarray(archive[key]) for key in ("images", "labels", "label_names") if key in headers}


def _images(path: Path, images: np.ndarray) -> np.ndarray:
    import numpy as np

    if images.dtype != np.uint8:
        odd = " with NaN or infinity" if images.dtype.kind in "fc" and not np.isfinite(images).all() else ""
        raise UserError(
            f"{path}: 'images' is {images.dtype}{odd}, not uint8. Save whole numbers from 0 to 255; "
            "from [-1, 1] that is ((x + 1) * 127.5).round().astype('uint8')."
        )
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"{path}: 'images' has shape {images.shape}; it must be (n, h, w, c) or (n, h, w), none of them 0."
        )
    if images.ndim == 3:
        return images[..., None]
    if images.shape[1] in (1, 3, 4) and images.shape[3] not in (1, 3, 4):
        raise UserError(
            f"{path}: 'images' has shape {images.shape}, which looks like channels first. Save (n, h, w, c): "
            "images.transpose(0, 2, 3, 1)."
        )
    return images


# A label at or above this number is taken for an identifier: each class costs a row of the label table.
MOST_CLASSES = 100_000


def _labels(
    path: Path, n: int, labels: np.ndarray | None, names: np.ndarray | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if labels is None:
        if names is not None:
            raise UserError(f"{path}: has 'label_names' but no 'labels'. Add labels (n,), or leave the names out.")
        return None, ()
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise UserError(
            f"{path}: 'labels' is {labels.dtype} of shape {labels.shape}; it must be whole numbers of shape ({n},), "
            "one per image."
        )
    if labels.min() < 0:
        raise UserError(
            f"{path}: 'labels' has {labels.min()} at index {labels.argmin()}; classes count from 0. "
            "For images without labels leave 'labels' out."
        )
    largest = int(labels.max())
    if names is None:
        if largest >= MOST_CLASSES:
            raise UserError(
                f"{path}: 'labels' reaches {largest}: these look like identifiers. Number the classes from 0."
            )
        return labels, tuple(str(k) for k in range(largest + 1))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise UserError(
            f"{path}: 'label_names' is {names.dtype} of shape {names.shape}; it must be strings, shape (k,)."
        )
    if largest >= len(names):
        raise UserError(
            f"{path}: 'labels' has {largest} at index {labels.argmax()} but there are {len(names)} label_names."
        )
    return labels, tuple(names.tolist())


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    """Crop and resize an image (h, w, c) to (size, size, c), channel by channel, so any number of channels is allowed."""
    import numpy as np
    from PIL.Image import fromarray

    return np.stack([np.asarray(centre_square(fromarray(plane), size)) for plane in np.moveaxis(image, 2, 0)], axis=2)
