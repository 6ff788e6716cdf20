"""Images: rounding to 8 bits, grids and sheets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from sitkit.evaluation.plots import INK, PAPER
from sitkit.runtime.errors import WorkFailed
from sitkit.runtime.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

ROUNDING = "round-half-even"
CELL = 48
GAP = 2


def to_uint8(x: Tensor) -> np.ndarray:
    """Return images (n, c, h, w) in [-1, 1] as uint8 (n, h, w, c): round((x + 1) * 127.5), halves to even (`ROUNDING`).

    Raises WorkFailed for values that are not finite.
    """
    import torch

    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        raise WorkFailed(f"{len(bad)} of {len(x)} images hold NaN or Inf, the first at index {int(bad[0])}.")
    levels = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def image_grid(
    images: np.ndarray, path: Path | str, columns: int, scale: int | None = None, row_labels: list[str] | None = None
) -> None:
    """Write images (n, h, w, 1 or 3) uint8 as a PNG with `columns` images per row.

    Args:
        images: the images.
        path: the file.
        columns: images per row.
        scale: each pixel becomes scale x scale pixels; by default cells have about 48 pixels and are never reduced.
        row_labels: a label at the left of each row.

    Raises:
        ValueError: another shape or type, or a wrong number of labels.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(f"a grid shows uint8 (n, h, w, 1 or 3) images; got {images.dtype} {images.shape}.")
    n, h, w, channels = images.shape
    if n < 1 or columns < 1:
        raise ValueError(f"a grid needs at least 1 image and 1 column; got {n} and {columns}.")
    rows = math.ceil(n / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"a grid of {rows} rows needs {rows} labels; got {len(row_labels)}.")
    zoom = max(1, round(CELL / max(h, w))) if scale is None else scale
    if zoom < 1:
        raise ValueError(f"scale must be at least 1; got {zoom}.")

    font = ImageFont.load_default(max(12, min(h * zoom // 2, 18)))
    margin = max((math.ceil(font.getlength(label)) + 4 * GAP for label in row_labels or []), default=0)
    size = (margin + columns * (w * zoom + GAP) + GAP, rows * (h * zoom + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images.repeat(zoom, axis=1).repeat(zoom, axis=2)):
        row, column = divmod(i, columns)
        corner = (margin + GAP + column * (w * zoom + GAP), GAP + row * (h * zoom + GAP))
        sheet.paste(Image.fromarray(image.repeat(3 // channels, axis=2)), corner)
    for row, label in enumerate(row_labels or []):
        middle = GAP + row * (h * zoom + GAP) + h * zoom // 2
        pen.text((margin - 2 * GAP, middle), label, fill=INK, font=font, anchor="rm")
    with replacing(Path(path)) as fresh:
        sheet.save(fresh, format="PNG")


def image_sheet(images: np.ndarray, columns: int, most: int = 96) -> bytes:
    """Return images (n, h, w, 1 or 3) uint8, `columns` per row, as the bytes of a small picture for a page.

    Small images are a PNG without scaling, which the page enlarges; images above `most` pixels are reduced, as WebP.
    """
    import io

    import numpy as np
    from PIL import Image

    n, h, w, channels = images.shape
    small = h <= most and w <= most
    gap = max(1, round(min(h, w) / 16)) if small else GAP
    size = (h, w) if small else (round(h * most / max(h, w)), round(w * most / max(h, w)))
    rows = math.ceil(n / columns)
    tile = (size[1] + gap, size[0] + gap)
    canvas = Image.new("RGBA", (columns * tile[0] - gap, rows * tile[1] - gap), (0, 0, 0, 0))
    for i, image in enumerate(np.broadcast_to(images, (n, h, w, max(3, channels)))):
        row, column = divmod(i, columns)
        picture = Image.fromarray(np.ascontiguousarray(image))
        if not small:
            picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
        canvas.paste(picture, (column * tile[0], row * tile[1]))
    file = io.BytesIO()
    if small:
        canvas.save(file, format="PNG", optimize=True)
    else:
        canvas.save(file, format="WEBP", quality=82, method=6)
    return file.getvalue()


def smaller(path: Path | str, width: int) -> bytes:
    """Return a picture on disk, reduced to at most `width` pixels, as the bytes of a WebP."""
    import io

    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((width, 8 * width))
        file = io.BytesIO()
        image.convert("RGB").save(file, format="WEBP", quality=82, method=6)
    return file.getvalue()


def size_of(data: bytes) -> tuple[int, int]:
    """Return width and height of a picture in pixels."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).size
