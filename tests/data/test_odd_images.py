"""Image files that are odd or hostile: read, or named in one line; no other program is started."""

from __future__ import annotations

import io
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sitkit.data.dataset import Examples
from sitkit.data.decoding import FORMATS, decode
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty folder for the sets that passed the check of their images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def picture(shade: int = 99, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 10, 200)).convert(mode)


def classes(folder: Path) -> Path:
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(4):
            picture(30 * i).save(folder / name / f"{i}.png")
    return folder


def load(folder: Path, **fields: object) -> Examples:
    return datasets.create("image-folder", path=str(folder), **{"size": 8, **fields}).load()


@pytest.mark.parametrize("content", [EPS, b"\xc5\xd0\xd3\xc6" + bytes(26) + EPS], ids=["eps", "eps with a preview"])
def test_postscript_is_refused_and_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    programs, started = tmp_path / "bin", tmp_path / "started"
    programs.mkdir()
    for name in ("gs", "gswin32c", "gswin64c", "djpeg"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {started}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    folder = classes(tmp_path / "set")
    (folder / "a" / "9.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a/9\.png: cannot identify it as PNG, JPEG, WEBP, BMP, GIF or TIFF"):
        load(folder)
    assert not started.exists()


def every_format() -> list[str]:
    """The formats that Pillow can read and write, apart from those that sitkit reads."""
    Image.init()
    return sorted(set(Image.SAVE) & set(Image.OPEN) - {*FORMATS, "MPO"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", every_format())
def test_an_image_of_another_format_is_refused_by_its_content(tmp_path: Path, kind: str) -> None:
    written = io.BytesIO()
    try:
        picture(mode="1" if kind in ("XBM", "MSP") else "RGB").save(written, kind)
    except Exception as error:
        pytest.skip(f"this Pillow does not write {kind}: {error}")
    if Image.open(io.BytesIO(written.getvalue())).format in FORMATS:
        pytest.skip("a container of a format that is read")
    file = tmp_path / "x.png"
    file.write_bytes(written.getvalue())
    for source in (file, io.BytesIO(written.getvalue())):
        with pytest.raises(ValueError, match="cannot identify"):
            decode(source, 8, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_whatever_its_name_is(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.png"
    picture().save(file, kind, quality=100)
    # JPEG and WebP are lossy: at quality 100 a flat colour is within two levels.
    assert np.abs(decode(file, 8, 3).astype(int) - np.array([99, 10, 200])[:, None, None]).max() <= 2


@pytest.mark.parametrize(("kind", "ending"), [("GIF", "gif"), ("MPO", "jpg")])
def test_the_first_picture_of_several_is_used(tmp_path: Path, kind: str, ending: str) -> None:
    folder = classes(tmp_path / "set")
    picture(0).save(folder / "a" / f"9.{ending}", kind, save_all=True, append_images=[picture(255)])
    red = ((load(folder, holdout=0.0).read(np.array([4]))[0, 0] + 1) * 127.5).mean()
    assert red < 12, "the first picture has red 0, the second 255"


def device(path: Path) -> None:
    os.symlink("/dev/zero", path)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # The path of a socket may have 100 characters.
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("make", [os.mkfifo, unix_socket, device])
@pytest.mark.parametrize("place", ["a", "."])
@pytest.mark.parametrize("ending", [".png", ""])
def test_what_is_no_regular_file_is_named_and_not_opened(
    tmp_path: Path, make: Callable[[Path], None], place: str, ending: str
) -> None:
    folder = classes(tmp_path / "set")
    make(folder / place / f"odd{ending}")
    with pytest.raises(UserError, match=r"odd(\.png)?: not a regular file"):
        load(folder)
    with pytest.raises(ValueError, match="not a regular file"):
        decode(folder / place / f"odd{ending}", 8, 3)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    for place in ("c", "a/9.png"):
        folder = classes(tmp_path / place.replace("/", "-"))
        os.symlink("nowhere/c", folder / place)
        with pytest.raises(UserError, match=rf"{place}: a link to nowhere/c, which is not there"):
            load(folder)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    folder = classes(tmp_path / "set")
    os.symlink(folder / "a", folder / "c")
    os.symlink(folder / "a" / "0.png", folder / "b" / "9.png")
    assert load(folder).class_names == ("a", "b", "c")


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    folder = os.fsencode(classes(tmp_path / "set"))
    os.mkdir(folder + b"/caf\xe9")
    for name in (b"a/caf\xe9.png", b"caf\xe9/1.png"):
        with open(folder + b"/" + name, "wb") as file:
            picture().save(file, "PNG")
    examples = load(tmp_path / "set")
    assert examples.class_names == ("a", "b", r"caf\xe9") and len(examples) == 10
    other = load(tmp_path / "set").fingerprint
    os.rename(folder + b"/a/caf\xe9.png", folder + b"/a/caf\xea.png")
    assert examples.fingerprint == other != load(tmp_path / "set").fingerprint
    with open(folder + b"/a/bad\xe9.png", "wb") as file:
        file.write(b"no image")
    with pytest.raises(UserError, match=r"bad\\xe9\.png: cannot identify"):
        load(tmp_path / "set")


def test_a_folder_of_images_without_class_folders_has_no_classes(tmp_path: Path) -> None:
    for i, mode in enumerate(("RGBA", "RGB", "L", "P", "LA", "1", "CMYK")):
        picture(30 * i, mode).resize((20 + i, 30)).save(tmp_path / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    examples = load(tmp_path)
    assert examples.class_names == () and len(examples) == 7 and not examples.labels.any()
    (tmp_path / "notes.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"notes\.heic: not a \.png"):
        load(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = classes(tmp_path / "set")
    (folder / "b").chmod(0)
    try:
        if os.access(folder / "b", os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(UserError, match=r"b: cannot be read: Permission denied"):
            load(folder)
    finally:
        (folder / "b").chmod(0o755)


def test_null_rows_and_null_labels_of_a_data_set_are_named(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    written = io.BytesIO()
    picture().save(written, "PNG")
    whole = {"bytes": written.getvalue(), "path": None}
    features = library.Features({"image": library.Image(), "label": library.ClassLabel(2)})

    def save(name: str, images: list[object], labels: list[object], kind: object = features) -> str:
        library.Dataset.from_dict({"image": images, "label": labels}, kind).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    def read(path: str) -> Examples:
        return datasets.create("hub", path=path, size=8, holdout=0.0, label="label").load()

    with pytest.raises(UserError, match=r"1 of 3 images.*\n.*example 1: has no image \(null\)"):
        read(save("rows", [whole, None, whole], [0, 1, 0]))
    for name, kind in (("classes", library.ClassLabel(2)), ("numbers", library.Value("int64"))):
        path = save(name, [whole] * 3, [0, None, 1], library.Features({"image": library.Image(), "label": kind}))
        with pytest.raises(UserError, match=r"1 examples have no label \(null\), the first is example 1"):
            read(path)
