"""Images from Hugging Face `datasets`: a name on the hub, a folder by save_to_disk, parquet files, or an imagefolder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, final

from sitkit.data.dataset import LARGEST_IMAGE, Dataset, Examples, fingerprint, split_holdout
from sitkit.data.decoding import Pictures, Source, check_images, picture_examples
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, require_within, suggest

if TYPE_CHECKING:
    import numpy as np


@final
@datasets.register("hub")
@dataclass(frozen=True)
class Hub(Dataset):
    """Images by Hugging Face `datasets`: centre square of `size`, x = value / 127.5 - 1.

    path: a name on the hub (owner/name), a folder written by save_to_disk, a parquet file, or a folder of parquet files or
    images.  subset, revision: those of a set on the hub.  image, label: names of columns; by default the only column of
    images and the only column of classes.  label "": no labels.  The classes have the names of the column; whole numbers
    are classes from 0, and strings are classes in the order of their names.
    flip: mirror half of the drawn images, left to right.  channels: 3 (colour) or 1 (grey).
    Examples are read by index from the memory-mapped files of the library and decoded when they are read.  The fingerprint
    covers size, channels, labels and the length of every encoded image, not its content.
    streaming: read without a download; row groups of parquet files are fetched when a batch needs them.  An epoch goes
    through the row groups in a random order and mixes `window` of them at a time.  The order depends on the seed alone, so
    a training continues where it stopped.  Each process fetches the row groups that its batches need and keeps 2 * window
    of them in memory.  The held-out examples are whole row groups if there are at least 20.  The fingerprint then covers the
    length of the images of each row group instead of each image, and images are checked when they are read.
    """

    path: str
    size: int
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    flip: bool = True
    channels: Literal[1, 3] = 3
    streaming: bool = False
    window: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, LARGEST_IMAGE, size=self.size)
        require_within(1, 10**6, window=self.window)

    def places(self) -> tuple[str, ...]:
        # A name on the hub is no path.
        return ("path",) if Path(self.path).expanduser().exists() else ()

    def load(self) -> Examples:
        return self._streamed() if self.streaming else self._mapped()

    def _mapped(self) -> Examples:
        table = self._table()
        image, label = self._columns(table.features)
        labels, class_names = self._labels(table, label)
        images, lengths = _encoded(table, image)
        mark = fingerprint(f"hub {self.size} {self.channels} {class_names}", labels, lengths)
        reader, parts = self._reader(images, len(labels)), split_holdout(len(labels), self.holdout)
        times = [f"{file['filename']} {Path(file['filename']).stat().st_mtime_ns}" for file in table.cache_files]
        check_images(reader.source, self._place, f"{mark} {times}")
        return picture_examples(reader, labels, class_names, mark, parts)

    def _streamed(self) -> Examples:
        import numpy as np

        from sitkit.data.parquet import Files, Rows, nearly_shuffled, split_by_group

        files = Files(self._parquet())
        labels, class_names = np.zeros(files.count, np.int64), ()
        with self._library() as library:
            features = library.Features.from_arrow_schema(files.schema)
            image, label = self._columns(features)
            if label:
                column = library.Dataset(files.column(label)).cast(library.Features({label: features[label]}))
                labels, class_names = self._labels(column, label)
        text = f"hub streaming {self.size} {self.channels} {class_names}"
        mark = fingerprint(text, labels, files.starts, files.lengths(image))
        parts = split_by_group(files.starts, self.holdout) or split_holdout(files.count, self.holdout)
        reader = self._reader(Rows(files, image, 2 * self.window), files.count)
        order = nearly_shuffled(parts[0], files.starts, self.window)
        return picture_examples(reader, labels, class_names, mark, parts, order)

    @property
    def _place(self) -> str:
        return f"{self.path} [{self.split}]"

    def _reader(self, images: Any, count: int) -> Pictures:
        """Return the reader of `count` images, given as {"bytes", "path"} by number."""

        def name(number: int) -> str:
            file = (images[number] or {}).get("path")
            return f"{self._place}, example {number}" + (f" ({file})" if file else "")

        def open_image(number: int) -> Path | IO[bytes]:
            entry = images[number]
            if entry is None or (entry["bytes"] is None and not entry["path"]):
                raise ValueError("has no image (null)")
            return Path(entry["path"]) if entry["bytes"] is None else io.BytesIO(entry["bytes"])

        return Pictures(Source(count, name, open_image), self.size, self.channels, self.flip)

    def _parquet(self) -> list[str]:
        """Return the parquet files of the split, local paths or addresses, in their order."""
        local = Path(self.path).expanduser()
        with self._library() as library:
            if local.is_file():
                return [str(local)]
            name = str(local) if local.exists() else self.path
            builder = library.load_dataset_builder(name, self.subset, revision=self.revision)
            files = builder.config.data_files or {}
            if self.split not in files:
                raise ValueError(f"no split {self.split!r}; it has: {', '.join(map(str, files))}")
            paths = [str(path) for path in files[self.split]]
            if not paths or not all(path.endswith(".parquet") for path in paths):
                raise ValueError(
                    "streaming reads parquet files, and these are others; revision 'refs/convert/parquet' of a set on the hub "
                    "may have them, else leave data.streaming out"
                )
            return paths

    @contextlib.contextmanager
    def _library(self) -> Iterator[Any]:
        """Yield the library without its progress bars.  Raises UserError if it is absent, and for every error in it."""
        try:
            import datasets as library
        except ImportError as error:
            raise UserError(f"dataset 'hub' needs datasets ({error}): pip install 'sitkit[hub]'") from None
        local = Path(self.path).expanduser()
        if not local.exists() and self.path.startswith((".", "/", "~")):
            raise UserError(f"{self.path}: there is no such folder or file.")
        bars = library.is_progress_bar_enabled()
        library.disable_progress_bars()
        try:
            yield library
        except UserError:
            raise
        except Exception as error:  # datasets, huggingface_hub and pyarrow raise many kinds.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.path}: datasets cannot read it: {reason}") from None
        finally:
            if bars:
                library.enable_progress_bars()

    def _table(self) -> Any:
        """Return the split as a data set of the library.  Raises UserError if the library is absent or cannot read it."""
        local = Path(self.path).expanduser()
        with self._library() as library:
            if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
                loaded: Any = library.load_from_disk(str(local))
                if isinstance(loaded, library.DatasetDict):
                    if self.split not in loaded:
                        has = ", ".join(map(str, loaded))
                        raise ValueError(f"no split {self.split!r}; it has: {has}")
                    loaded = loaded[self.split]
                return loaded
            if local.is_file():
                kind = local.suffix.removeprefix(".")
                return library.load_dataset(kind, data_files={self.split: str(local)}, split=self.split)
            name = str(local) if local.exists() else self.path
            return library.load_dataset(name, self.subset, split=self.split, revision=self.revision)

    def _columns(self, features: Any) -> tuple[str, str]:
        """Return the names of the columns of images and of labels; "" if there are no labels."""
        from datasets import ClassLabel, Image

        def column(field: str, kind: type, given: str | None) -> str:
            names = [name for name, feature in features.items() if isinstance(feature, kind)]
            if given is None and len(names) > 1:
                raise UserError(
                    f"{self.path}: which column is the {field}? It has {', '.join(names)}: set data.{field}."
                )
            name = given if given is not None else names[0] if names else ""
            if name and name not in features:
                raise UserError(
                    f"{self.path}: has no column {name!r}.{suggest(name, [*features])} Columns: {', '.join(features)}."
                )
            return name

        image, label = column("image", Image, self.image), column("label", ClassLabel, self.label)
        if not image or not isinstance(features[image], Image):
            fault = f"column {image!r} holds no images" if image else "no column holds images"
            kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
            raise UserError(f"{self.path}: {fault}. Columns: {kinds}.")
        if self.label is None and not label and len(features) > 1:
            others = ", ".join(name for name in features if name != image)
            raise UserError(
                f'{self.path}: which column is the label? None holds classes; it has {others}. Set data.label, to "" for none.'
            )
        return image, label

    def _labels(self, table: Any, label: str) -> tuple[np.ndarray, tuple[str, ...]]:
        import numpy as np
        from datasets import ClassLabel

        if not label:
            return np.zeros(len(table), np.int64), ()
        column = table.data.column(label)
        if column.null_count:
            missing = np.flatnonzero(column.is_null().to_numpy())
            raise UserError(
                f"{self.path}: {len(missing)} examples have no label (null), the first is example {missing[0]}: remove them, "
                'or set data.label to "" for none.'
            )
        feature, values = table.features[label], np.asarray(table.with_format("numpy")[label][:])
        if isinstance(feature, ClassLabel):
            names = tuple(feature.names)
        elif values.dtype.kind in "iu":
            names = tuple(str(k) for k in range(int(values.max()) + 1)) if len(values) else ()
        elif values.dtype.kind in "UO" and all(isinstance(value, str) for value in values):
            words, values = np.unique(values.astype(str), return_inverse=True)
            names = tuple(words.tolist())
        else:
            raise UserError(
                f"{self.path}: column {label!r} ({feature}) holds no classes: names or whole numbers from 0."
            )
        if len(values) and not 0 <= values.min() <= values.max() < len(names):
            bad = int(np.flatnonzero((values < 0) | (values >= len(names)))[0])
            raise UserError(f"{self.path}: column {label!r} has {values[bad]} at example {bad}; classes count from 0.")
        return values.astype(np.int64), names


def _encoded(table: Any, image: str) -> tuple[Any, np.ndarray]:
    """Return the column of images as {"bytes", "path"}, not decoded, and the number of bytes of each."""
    import numpy as np
    from datasets import Image
    from pyarrow import compute

    if table._indices is not None:
        table = table.flatten_indices()
    images = table.select_columns([image]).cast_column(image, Image(decode=False))
    column = images.data.column(image)
    # The lengths are stored beside the bytes, so the bytes need not be read.
    encoded = compute.call_function("struct_field", [column], compute.StructFieldOptions("bytes"))
    lengths = compute.call_function("binary_length", [encoded]).to_numpy(zero_copy_only=False)
    inside = np.isfinite(lengths.astype(np.float64))
    sizes = [int(n) if known else _length(images[k][image])
             for k, (n, known) in enumerate(zip(lengths, inside, strict=True))]  # fmt: skip
    return _Column(images, image), np.array(sizes, np.int64)


def _length(entry: dict[str, Any] | None) -> int:
    """Return the length of the file of an image; 0 if there is none, and `check_images` names it."""
    path = (entry or {}).get("path")
    return Path(path).stat().st_size if path and Path(path).is_file() else 0


@dataclass(frozen=True)
class _Column:
    table: Any
    name: str

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.table[number][self.name]
