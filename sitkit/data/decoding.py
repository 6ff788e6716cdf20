"""Encoded images (PNG, JPEG, WebP) by index: threads decode them when they are read; small sets stay in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
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
                reason = error or type(error).__name__
                raise WorkFailed(f"{self.source.name(number)}: {reason}. Repair or remove it.") from None
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


def decode(file: Path | IO[bytes], size: int, channels: int) -> np.ndarray:
    """Return one image as uint8 (channels, size, size).  Raises the errors of PIL and of `require_plain_8bit`."""
    import numpy as np
    from PIL.Image import open as open_image

    with open_image(file) as image:
        require_plain_8bit(image)
        square = centre_square(image.convert("RGB" if channels == 3 else "L"), size)
    return np.atleast_3d(np.asarray(square)).transpose(2, 0, 1)


def require_plain_8bit(image: Image) -> None:
    """Raise ValueError unless an image is a single frame of 8 bits per channel; only its header is read."""
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError("has several frames; keep one")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")


def check_headers(source: Source, where: str, fingerprint: str) -> None:
    """Read the header of every image without decoding it.  Raises one UserError that lists the damaged images.

    A million files take minutes, so $XDG_CACHE_HOME/sitkit keeps the fingerprints of the sets that passed.
    """
    marker = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sitkit" / "images" / fingerprint
    if marker.exists():
        return

    def fault(number: int) -> str | None:
        from PIL.Image import open as open_image

        try:
            with open_image(source.open(number)) as image:
                require_plain_8bit(image)
        except Exception as error:  # As in `Pictures`.
            return f"{source.name(number)}: {error or type(error).__name__}"
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
    with contextlib.suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()


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
