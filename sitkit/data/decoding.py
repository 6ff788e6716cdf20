"""Encoded images by index: threads decode them when they are read; small sets stay in memory.

An image is read by its content, never by its name, and only by the decoders of `FORMATS`: none of them starts another program.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sitkit.data.dataset import Examples, to_tensor
from sitkit.runtime.errors import UserError, WorkFailed

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


# Sets of decoded images up to this number of bytes stay in memory; larger sets are decoded at every read.
KEPT_BYTES = 2**30

# The decoders of Pillow that may be used, and the endings of the names of their files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """Encoded images by number.

    count: the number of images.  name: the name of an image in messages.  open: its path, or an open file.
    """

    count: int
    name: Callable[[int], str]
    open: Callable[[int], Path | IO[bytes]]


class Pictures:
    """The reader of encoded images: the centre square of `size`, x = value / 127.5 - 1; flip: mirror if a key is odd.

    A read uses one thread per core.  Raises WorkFailed, with the name of the image, if an image cannot be decoded.
    """

    def __init__(self, source: Source, size: int, channels: int, flip: bool, kept_bytes: int = KEPT_BYTES) -> None:
        import numpy as np

        self.source, self.size, self.channels, self.flip = source, size, channels, flip
        fits = source.count * channels * size * size <= kept_bytes
        # The system does not allocate memory before it is written to.
        self._kept = np.empty((source.count if fits else 0, channels, size, size), np.uint8)
        self._known = np.zeros(source.count, bool)

    def __call__(self, index: np.ndarray, keys: np.ndarray | None) -> Tensor:
        import numpy as np

        out = np.empty((len(index), self.channels, self.size, self.size), np.uint8)
        known = self._known[index]
        out[known] = self._kept[index[known]]

        def read(place: int) -> None:
            number = int(index[place])
            try:
                out[place] = decode(self.source.open(number), self.size, self.channels)
            except WorkFailed:
                raise
            except Exception as error:  # PIL raises many kinds (SyntaxError, struct.error, ...) for a broken file.
                raise WorkFailed(f"{self.source.name(number)}: {_reason(error)}. Repair or remove it.") from None
            if len(self._kept):
                self._kept[number] = out[place]
                self._known[number] = True

        missing = np.flatnonzero(~known)
        if len(missing):
            with ThreadPoolExecutor(min(os.cpu_count() or 1, len(missing)), "sitkit-decode") as pool:
                try:
                    for _ in pool.map(read, missing):
                        pass
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        return to_tensor(out, self.flip, keys)


def picture_examples(
    reader: Pictures,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    fingerprint: str,
    parts: tuple[np.ndarray, np.ndarray],
    order: Callable[[int, int], np.ndarray] | None = None,
) -> Examples:
    """Return the examples of encoded images; `parts` are the indices of the training and of the held-out examples."""
    shape, (train, heldout) = (reader.channels, reader.size, reader.size), parts
    return Examples(shape, labels, class_names, fingerprint, train, heldout, reader, bin_width=1 / 127.5, order=order)


@contextlib.contextmanager
def opened_image(file: Path | IO[bytes]) -> Iterator[Image]:
    """Yield an image whose header is read.  Only the decoders of `FORMATS` look at the content.

    Raises:
        ValueError: for a path to a pipe or a device, another format, several frames, or more than 8 bits per channel.
        OSError: if the file cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    # Opening a pipe or a device would block.
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise ValueError("not a regular file")
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"cannot identify it as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    with image:
        require_plain_8bit(image)
        yield image


def decode(file: Path | IO[bytes], size: int, channels: int) -> np.ndarray:
    """Return one image as uint8 (channels, size, size).  Raises the errors of PIL and of `opened_image`."""
    import numpy as np

    with opened_image(file) as image:
        square = centre_square(image.convert("RGB" if channels == 3 else "L"), size)
    return np.atleast_3d(np.asarray(square)).transpose(2, 0, 1)


def require_plain_8bit(image: Image) -> None:
    """Raise ValueError unless an image is a single frame of 8 bits per channel; only its header is read.

    Of a GIF the first frame is used, and of a JPEG with several pictures (MPO), as telephones write, the first picture.
    """
    if image.format not in ("GIF", "MPO") and getattr(image, "n_frames", 1) > 1:
        raise ValueError("has several frames; keep one")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")


def check_images(source: Source, where: str, content: str) -> None:
    """Decode every image once, so that no training fails at one of them.

    A million images take minutes, so $XDG_CACHE_HOME/sitkit remembers the sets that passed.

    Args:
        source: the images.
        where: the name of the set in messages.
        content: a text that changes with every image, as the paths, sizes and times of their files.

    Raises:
        UserError: one error that lists the images that cannot be used.
    """
    marker = _passed(content)
    if marker is not None and marker.exists():
        return

    def fault(number: int) -> str | None:
        try:
            with opened_image(source.open(number)) as image:
                image.load()
        except Exception as error:  # As in `Pictures`.
            return f"{source.name(number)}: {_reason(error)}"
        return None

    with ThreadPoolExecutor(os.cpu_count(), "sitkit-decode") as pool:
        faults = [text for text in pool.map(fault, range(source.count)) if text]
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(
            f"{len(faults)} of {source.count} images in {where} cannot be used; repair or remove them.\n"
            + "\n".join(faults[:10])
            + more
        )
    if marker is not None:
        with contextlib.suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()


def _passed(content: str) -> Path | None:
    """Return the file that says that a set passed; None for a user without a home folder."""
    name = hashlib.sha256(f"decoded {content}".encode(errors="surrogateescape")).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return cache / "sitkit" / "images" / name


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def centre_square(image: Image, size: int) -> Image:
    """Return the centre square of an image, size x size: halved by box averages while it is twice too large, then bicubic.

    Source: the preprocessing of Dhariwal and Nichol 2021 (ADM), which their reference statistics assume.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
