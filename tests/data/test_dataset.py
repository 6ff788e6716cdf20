"""Laws of every data set, batches that depend on (seed, step, size) alone, and wrong files."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sitkit.data.dataset import Dataset, Examples, in_memory, split_holdout
from sitkit.data.decoding import Pictures, Source, centre_square
from sitkit.data.stream import batch
from sitkit.registry import datasets, spec
from sitkit.runtime.errors import UserError, WorkFailed

LAWS = ("checkerboard", "moons", "eight-gaussians", "two-spirals")


def pictures(n: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def square(picture: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(centre_square(Image.fromarray(picture), size))


def write_npz(folder: Path, **arrays: object) -> str:
    path = folder / "set.npz"
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return str(path)


def write_folder(folder: Path, height: int = 11, width: int = 14) -> Path:
    for name, extension in (("b cat", "png"), ("a dog", "png"), ("c", "webp")):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(pictures(4, height, width)):
            Image.fromarray(picture).save(folder / name / f"{i}.{extension}", lossless=True)
    (folder / "a dog" / ".DS_Store").write_bytes(b"hidden")
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty folder for the fingerprints of image sets that passed the check of their headers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=["digits", *LAWS, "npz", "npz-unlabelled", "image-folder"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    if request.param in LAWS:
        return datasets.create("points", law=request.param, size=600)
    if request.param == "npz":
        return datasets.create("npz", path=write_npz(tmp_path, images=pictures(30, 8, 6), labels=np.arange(30) % 7))
    if request.param == "npz-unlabelled":
        return datasets.create("npz", path=write_npz(tmp_path, images=pictures(30, 8, 6)[..., 0]), size=4, flip=True)
    if request.param == "image-folder":
        return datasets.create("image-folder", path=str(write_folder(tmp_path)), size=5, holdout=0.25)
    return datasets.create(request.param)


def test_these_tests_cover_every_data_set_of_the_modules() -> None:
    modules = {f"sitkit.data.{module}" for module in ("digits", "toy", "npz", "folder")}
    assert {name for name in datasets if datasets.origin(name) in modules} == {
        "digits",
        "points",
        "npz",
        "image-folder",
        "gaussian-mixture",
    }


def test_examples_keep_their_contract(dataset: Dataset) -> None:
    examples = dataset.load()
    everything = np.arange(len(examples))
    x = examples.read(everything)
    assert x.shape == (len(examples), *examples.shape) and x.dtype == torch.float32
    assert x.isfinite().all()
    assert examples.labels.shape == (len(examples),) and examples.labels.dtype == np.int64
    if examples.num_classes:
        assert sorted(set(examples.labels.tolist())) == list(range(examples.num_classes))
    else:
        assert not examples.labels.any()
    if examples.is_image:
        assert x.min() >= -1 and x.max() <= 1
    assert torch.equal(examples.read(everything[::-1].copy()), x.flip(0))


def test_train_and_heldout_are_together_all_examples(dataset: Dataset) -> None:
    examples = dataset.load()
    both = np.concatenate([examples.train, examples.heldout])
    assert sorted(both.tolist()) == list(range(len(examples)))
    assert len(examples.heldout) == max(1, round(dataset.holdout * len(examples)))


def test_loading_again_gives_the_same(dataset: Dataset) -> None:
    first, second = dataset.load(), dataset.load()
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 64
    assert np.array_equal(first.heldout, second.heldout) and np.array_equal(first.labels, second.labels)
    everything = np.arange(len(first))
    assert torch.equal(first.read(everything), second.read(everything))
    assert datasets.parse(spec(dataset)) == dataset


def test_an_epoch_has_every_example_once(dataset: Dataset) -> None:
    examples = dataset.load()
    n = len(examples.train)
    size = n // 20 + 2
    steps = -(-3 * n // size)
    stream = np.concatenate([index_of(examples, 3, step, size) for step in range(steps)])
    epochs = [stream[k * n : (k + 1) * n] for k in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), examples.train)
    assert not np.array_equal(epochs[0], epochs[1])


def index_of(examples: Examples, seed: int, step: int, size: int) -> np.ndarray:
    """Return the indices of the examples of a batch, by a data set whose values are the indices."""
    values = np.arange(len(examples), dtype=np.float32)[:, None]
    numbered = in_memory(values, None, (), holdout=len(examples.heldout) / len(examples))
    assert np.array_equal(numbered.train, examples.train)
    return batch(numbered, seed, step, size)[0].flatten().long().numpy()


def test_a_batch_is_a_function_of_seed_step_and_size(dataset: Dataset) -> None:
    examples, again = dataset.load(), dataset.load()
    first = {step: batch(examples, 3, step, 8) for step in (0, 1, 40)}
    for step in (40, 0, 1, 17, 0):
        x, y, positions = batch(again, 3, step, 8)
        if step in first:
            assert torch.equal(x, first[step][0]) and torch.equal(y, first[step][1])
        assert positions.tolist() == list(range(step * 8, step * 8 + 8))
        assert y.dtype == torch.int64
    assert not torch.equal(batch(examples, 4, 0, 8)[0], first[0][0])


def test_the_stream_is_the_same_for_every_size(dataset: Dataset) -> None:
    examples = dataset.load()
    whole = batch(examples, 3, 0, 60)
    parts = [batch(examples, 3, step, 4) for step in range(15)]
    assert torch.equal(whole[0], torch.cat([x for x, _, _ in parts]))
    assert torch.equal(whole[1], torch.cat([y for _, y, _ in parts]))


def test_batches_are_the_same_in_another_process() -> None:
    # Another process has another hash seed and another history.
    code = """
import hashlib
from sitkit.data.stream import batch
from sitkit.registry import datasets
examples = datasets.create("points", law="moons", size=100).load()
x, y, _ = batch(examples, 1, 33, 16)
print(hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest(), examples.fingerprint)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    examples = datasets.create("points", law="moons", size=100).load()
    x, y, _ = batch(examples, 1, 33, 16)
    assert out == [hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest(), examples.fingerprint]


def test_batches_have_the_labels_of_their_examples() -> None:
    values = np.arange(50, dtype=np.float32)[:, None]
    examples = in_memory(values, np.arange(50) % 5, tuple("abcde"), holdout=0.1)
    for step in range(30):
        x, y, _ = batch(examples, 0, step, 8)
        assert torch.equal(x.flatten().long() % 5, y)


def test_augmentation_follows_the_keys() -> None:
    values = pictures(400, 2, 3).transpose(0, 3, 1, 2)
    examples = in_memory(values, None, (), holdout=0.0, flip=True)
    plain = examples.read(np.arange(4))
    mirrored = examples.read(np.arange(4), np.array([0, 1, 2, -1]))
    assert torch.equal(mirrored[[0, 2]], plain[[0, 2]])
    assert torch.equal(mirrored[[1, 3]], plain[[1, 3]].flip(-1))
    assert torch.equal(examples.read(np.arange(4)), plain)
    flips = []
    for step in range(2):
        index = index_of(examples, 0, step, 400)
        flip = (batch(examples, 0, step, 400)[0] != examples.read(index)).flatten(1).any(1).numpy()
        # 400 fair coins: four standard deviations of 10.
        assert abs(flip.sum() - 200) < 40
        flips.append(flip[np.argsort(index)])
    # An example is mirrored afresh in each epoch: the two agree on half of the 400, within four standard deviations.
    assert abs((flips[0] == flips[1]).sum() - 200) < 40
    still = in_memory(values, None, (), holdout=0.0)
    assert torch.equal(still.read(np.arange(4), np.ones(4, np.int64)), plain)


def test_every_draw_has_its_own_key() -> None:
    plain = in_memory(np.zeros((10, 1), np.float32), None, (), holdout=0.0)
    keyed = dataclasses.replace(plain, reader=lambda index, keys: torch.from_numpy(keys))
    keys = torch.cat([batch(keyed, seed, step, 10)[0] for seed in range(3) for step in range(20)])
    # 600 words of 32 bits meet with a chance of 600^2 / 2^33 = 4e-5; these are fixed, and do not.
    assert keys.dtype == torch.int64 and len(keys.unique()) == 600


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    x = in_memory(values, None, (), holdout=0.0).read(np.arange(4))
    truth = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    # Rounding of one division and one difference of float32 numbers below 2.
    torch.testing.assert_close(x.double().flatten(), truth, rtol=0, atol=2.4e-7)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).flatten(), torch.arange(256, dtype=torch.uint8))


def test_a_fingerprint_is_of_values_and_labels() -> None:
    values, labels = pictures(6, 2, 2).transpose(0, 3, 1, 2), np.arange(6) % 2
    names = ("a", "b")

    def mark(values: np.ndarray, labels: np.ndarray | None = labels) -> str:
        return in_memory(values, labels, names, holdout=0.2).fingerprint

    other = values.copy()
    other[3, 1, 1, 0] ^= 1
    marks = [mark(values), mark(other), mark(values, labels[::-1]), mark(values.reshape(6, 3, 1, 4))]
    assert len(set(marks)) == 4
    assert mark(np.asfortranarray(values)) == mark(values)


def test_examples_can_be_sent_to_another_process() -> None:
    examples = datasets.create("points", size=50).load()
    twin = pickle.loads(pickle.dumps(examples))
    assert torch.equal(batch(twin, 0, 2, 8)[0], batch(examples, 0, 2, 8)[0])


@pytest.mark.parametrize(("step", "size"), [(-1, 4), (0, 0)])
def test_an_impossible_batch_is_refused(step: int, size: int) -> None:
    with pytest.raises(ValueError, match="step >= 0 and size >= 1"):
        batch(datasets.create("points", size=50).load(), 0, step, size)


def test_the_split_holds_out_the_given_fraction() -> None:
    for n, holdout, held in ((1000, 0.05, 50), (1000, 0.0, 0), (10, 0.05, 1), (2, 0.05, 1), (3, 0.5, 2)):
        train, heldout = split_holdout(n, holdout)
        assert len(heldout) == held and len(train) == n - held
    with pytest.raises(UserError, match=r"leaves none of 1 "):
        split_holdout(1, 0.05)
    with pytest.raises(UserError, match="leaves none of 0 "):
        split_holdout(0, 0.0)
    with pytest.raises(UserError, match="holdout must be"):
        datasets.create("digits", holdout=1.0)


@pytest.mark.parametrize(
    ("values", "labels", "reason"),
    [
        (np.zeros((3, 2)), None, "float32 or uint8"),
        (np.array([[0.0], [np.nan]], np.float32), None, "NaN"),
        (np.zeros((3, 2), np.float32), np.zeros(2, int), "3 examples need labels"),
        (np.zeros((3, 2), np.float32), np.array([0, 1, 2]), "do not fit 2 classes"),
        (np.zeros((3, 2), np.float32), np.array([0, -1, 1]), "do not fit 2 classes"),
    ],
)
def test_arrays_that_break_the_contract(values: np.ndarray, labels: np.ndarray | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        in_memory(values, labels, ("a", "b") if labels is not None else (), holdout=0.0)


def test_digits_are_the_published_ones() -> None:
    from sklearn.datasets import load_digits

    examples = datasets.create("digits").load()
    pixels, labels = load_digits(return_X_y=True)
    assert examples.shape == (1, 8, 8) and len(examples) == 1797
    assert examples.class_names == tuple("0123456789")
    x = examples.read(np.arange(1797))
    # Multiples of 1/8 are exact in float32.
    assert np.array_equal((x.flatten(1).numpy() + 1) * 8, np.asarray(pixels))
    assert np.array_equal(examples.labels, np.asarray(labels))


@pytest.mark.parametrize("law", LAWS)
def test_points_are_on_the_scale_of_the_square(law: str) -> None:
    x = datasets.create("points", law=law).load().read(np.arange(20000))
    assert x.std(0).min() > 0.3 and x.std(0).max() < 0.8
    assert x.abs().max() < 1.6
    # The means of 20,000 points of standard deviation below 0.8: four standard errors are 0.023.
    assert x.mean(0).abs().max() < 0.023


@pytest.mark.parametrize("law", LAWS)
def test_points_of_a_label_lie_on_their_part(law: str) -> None:
    examples = datasets.create("points", law=law, size=4000, noise=0.0).load()
    x, y = examples.read(np.arange(4000)).double().T, torch.from_numpy(examples.labels)
    if law == "checkerboard":
        column, row = ((v + 1) * 2 for v in x)
        assert torch.equal(row.floor().long(), y // 2)
        assert torch.equal(column.floor().long() % 2, (y // 2) % 2)
        assert torch.equal(column.floor().long() // 2, y % 2)
    elif law == "moons":
        side = 1 - 2 * y
        from_centre = torch.stack([1.5 * x[0] + 0.5 * side, 1.5 * x[1] + 0.25 * side])
        torch.testing.assert_close(from_centre.norm(dim=0), torch.ones(4000).double(), rtol=0, atol=1e-6)
        assert (from_centre[1] * side > -1e-6).all()
    elif law == "eight-gaussians":
        angle = math.pi / 4 * y.double()
        torch.testing.assert_close(x, torch.stack([angle.cos(), angle.sin()]), rtol=0, atol=1e-6)
    else:
        angle = torch.atan2(x[1], x[0]) - 3 * math.pi * x.norm(dim=0) - math.pi * y
        # float32 points near the centre: an angle is known to 1e-7 / radius.
        assert (torch.remainder(angle + math.pi, 2 * math.pi) - math.pi).abs().mul(x.norm(dim=0)).max() < 3e-6


def test_noise_of_points_has_the_given_standard_deviation() -> None:
    clean, noisy = (datasets.create("points", law="moons", noise=v).load() for v in (0.0, 0.2))
    everything = np.arange(len(clean))
    away = noisy.read(everything) - clean.read(everything)
    # 40,000 draws know their standard deviation to 0.35%: four of these.
    assert away.std().item() == pytest.approx(0.2, rel=0.014)
    own = datasets.create("points", law="moons").load()
    assert own.fingerprint == datasets.create("points", law="moons", noise=0.03).load().fingerprint
    assert own.fingerprint != datasets.create("points", law="moons", seed=1).load().fingerprint


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"law": "moon"}, "law: .*moons"),
        ({"size": 0}, "size must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"sise": 3}, "Did you mean 'size'"),
    ],
)
def test_wrong_fields_of_points(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        datasets.create("points", **fields)


def test_an_archive_is_read_as_it_is(tmp_path: Path) -> None:
    images, labels = pictures(9, 4, 6), np.arange(9, dtype=np.uint8) % 3
    path = write_npz(tmp_path, images=images, labels=labels, label_names=np.array(["x", "y", "z", "never seen"]))
    examples = datasets.create("npz", path=path).load()
    assert examples.shape == (3, 4, 6) and examples.class_names == ("x", "y", "z", "never seen")
    back = ((examples.read(np.arange(9)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, images) and np.array_equal(examples.labels, labels)
    grey = datasets.create("npz", path=write_npz(tmp_path, images=images[..., 0], labels=labels)).load()
    assert grey.shape == (1, 4, 6) and grey.class_names == ("0", "1", "2")


def test_an_archive_is_cropped_and_resized(tmp_path: Path) -> None:
    images = pictures(3, 9, 16, channels=2)
    examples = datasets.create("npz", path=write_npz(tmp_path, images=images), size=4).load()
    got = ((examples.read(np.arange(3)) + 1) * 127.5).round().to(torch.uint8).numpy()
    for image, ours in zip(images, got, strict=True):
        for channel in range(2):
            assert np.array_equal(ours[channel], square(image[..., channel], 4))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "no such file"),
        (cut_short, "cut short"),
        (garble, "damaged"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_bytes(pickle.dumps([1, 2])), "not a whole NumPy archive"),
        (lambda path: path.write_bytes(np.zeros(3).dumps()), "not a whole NumPy archive"),
    ],
)
def test_a_damaged_archive_is_named(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    path = Path(write_npz(tmp_path, images=pictures(9, 8, 8)))
    damage(path)
    with pytest.raises(UserError, match=reason) as caught:
        datasets.create("npz", path=str(path)).load()
    assert str(path) in str(caught.value)


class Bomb:
    """An object whose unpickling leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_pickled_objects_in_an_archive_are_refused_and_not_loaded(tmp_path: Path) -> None:
    objects = np.empty(1, object)
    objects[0] = Bomb(tmp_path / "exploded")
    for arrays in ({"images": objects}, {"images": pictures(1, 2, 2), "labels": objects}):
        with pytest.raises(UserError, match="Python objects, which are refused"):
            datasets.create("npz", path=write_npz(tmp_path, **arrays)).load()
    assert not (tmp_path / "exploded").exists()


IMAGES = pictures(6, 4, 5)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"image": IMAGES}, "no array 'images'.* Did you mean 'image'.* It has: image"),
        ({}, "It has: none"),
        ({"images": IMAGES / 255}, "float64, not uint8"),
        ({"images": np.full((2, 2, 2, 1), np.nan)}, "with NaN or infinity"),
        ({"images": IMAGES.astype(np.int64)}, "int64, not uint8"),
        ({"images": IMAGES[0, 0]}, r"shape \(5, 3\)"),
        ({"images": IMAGES[:0]}, "none of them 0"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "channels first"),
        ({"images": IMAGES, "labels": np.arange(5)}, r"shape \(5,\); it must be whole numbers of shape \(6,\)"),
        ({"images": IMAGES, "labels": np.arange(6.0)}, "float64"),
        ({"images": IMAGES, "labels": np.eye(6, dtype=int)}, "one per image"),
        ({"images": IMAGES, "labels": np.array([0, 1, -1, 0, 0, 0])}, "has -1 at index 2"),
        ({"images": IMAGES, "labels": np.array([0, 1, 10**9, 0, 0, 0])}, "look like identifiers"),
        ({"images": IMAGES, "label_names": np.array(["a"])}, "no 'labels'"),
        ({"images": IMAGES, "labels": np.arange(6), "label_names": np.array(["a", "b"])}, "has 5 at index 5"),
        ({"images": IMAGES, "labels": np.arange(6), "label_names": np.arange(6)}, "must be strings"),
    ],
)
def test_a_wrong_archive_is_refused_with_the_reason(tmp_path: Path, arrays: dict[str, object], reason: str) -> None:
    path = write_npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=reason) as caught:
        datasets.create("npz", path=path).load()
    assert path in str(caught.value)


def test_a_data_set_needs_its_path() -> None:
    with pytest.raises(UserError, match="path"):
        datasets.create("npz")
    with pytest.raises(UserError, match="size"):
        datasets.create("image-folder", path="x")
    for name in ("npz", "image-folder"):
        with pytest.raises(UserError, match="size must be at least 1; got 0"):
            datasets.create(name, path="x", size=0)


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    examples = datasets.create("image-folder", path=str(folder), size=5).load()
    assert examples.class_names == ("a dog", "b cat", "c")
    assert examples.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    got = ((examples.read(np.arange(12)) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    truth = [square(picture, 5) for picture in pictures(4, 11, 14)]
    assert np.array_equal(got, np.stack(truth * 3))


def test_a_folder_is_listed_only_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = datasets.create("image-folder", path=str(write_folder(tmp_path)), size=5, holdout=0.0)
    examples, n = folder.load(), 0

    def list_again(*_: object) -> None:
        raise AssertionError("the folder is listed")

    for name in ("scandir", "listdir", "walk"):
        monkeypatch.setattr(f"os.{name}", list_again)
    for step in range(3 * len(examples)):
        n += len(batch(examples, 0, step, 3)[0])
    assert n > 3 * len(examples)
    with pytest.raises(AssertionError, match="is listed"):
        folder.load()


def test_a_folder_in_grey(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    folder.mkdir(parents=True)
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        Image.fromarray(pictures(1, 8, 8)[0]).convert(mode).save(folder / f"{mode}.png")
    for mode in ("L", "RGB", "CMYK"):
        Image.fromarray(pictures(1, 8, 8)[0]).convert(mode).save(folder / f"{mode}.JPG", "jpeg")
    for channels in (1, 3):
        examples = datasets.create("image-folder", path=str(folder.parent), size=8, channels=channels).load()
        assert examples.shape == (channels, 8, 8) and len(examples) == 8
    with pytest.raises(UserError, match="channels"):
        datasets.create("image-folder", path=str(folder.parent), size=8, channels=2)


def test_damaged_images_are_listed_together(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    (folder / "b cat" / "2.png").write_bytes(b"not an image")
    (folder / "b cat" / "3.png").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "c" / "deep.png")
    frames = [Image.fromarray(picture) for picture in pictures(2, 8, 8)]
    frames[0].save(folder / "c" / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(UserError, match="4 of 14 images") as caught:
        datasets.create("image-folder", path=str(folder), size=5).load()
    lines = str(caught.value).splitlines()[1:]
    for line, (name, reason) in zip(
        lines,
        (
            ("b cat/2.png", "cannot identify"),
            ("b cat/3.png", "cannot identify"),
            ("c/deep.png", "more than 8 bits"),
            ("c/moving.webp", "several frames"),
        ),
        strict=True,
    ):
        assert line.startswith(str(folder / name)) and reason in line


def test_a_truncated_image_is_named_before_training_and_when_it_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    examples = datasets.create("image-folder", path=str(folder), size=5).load()
    whole = (folder / "a dog" / "1.png").read_bytes()
    (folder / "a dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    assert examples.read(np.array([0, 2])).isfinite().all()
    with pytest.raises(WorkFailed, match=r"a dog/1\.png: .*truncated.* Repair or remove it"):
        examples.read(np.arange(12))
    with pytest.raises(UserError, match=r"1 of 12 images(.|\n)*a dog/1\.png: .*truncated"):
        datasets.create("image-folder", path=str(folder), size=5).load()


def test_an_image_that_changes_but_keeps_its_length_is_decoded_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    datasets.create("image-folder", path=str(folder), size=5).load()
    file = folder / "a dog" / "1.png"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(UserError, match=r"a dog/1\.png: cannot identify"):
        datasets.create("image-folder", path=str(folder), size=5).load()


def test_a_small_folder_is_decoded_once_and_a_large_folder_at_every_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    files, opened = sorted((folder / "a dog").glob("*.png")), []

    def open_file(number: int) -> Path:
        opened.append(number)
        return files[number]

    source = Source(4, lambda number: str(files[number]), open_file)
    index = np.array([3, 0, 3])
    for kept, times in ((4 * 75, 2), (4 * 75 - 1, 6)):
        opened.clear()
        reader = Pictures(source, 5, 3, flip=True, kept_bytes=kept)
        first, again = reader(index, np.array([0, 0, 1])), reader(index, np.array([0, 0, 1]))
        assert torch.equal(first, again) and torch.equal(first[2], first[0].flip(-1))
        # The same picture twice within one read may be decoded twice.
        assert len(opened) - (kept == 300) <= times


def test_the_fingerprint_of_a_folder_covers_names_and_lengths_but_not_its_path(tmp_path: Path) -> None:
    def mark(folder: Path, **fields: int) -> str:
        return datasets.create("image-folder", path=str(folder), **{"size": 5, **fields}).load().fingerprint

    folder, copy = write_folder(tmp_path / "one"), write_folder(tmp_path / "two")
    assert mark(folder) == mark(copy)
    marks = [mark(folder), mark(folder, size=6), mark(folder, channels=1)]
    (copy / "c" / "0.webp").rename(copy / "c" / "9.webp")
    marks.append(mark(copy))
    Image.fromarray(pictures(1, 30, 30)[0]).save(copy / "c" / "9.webp")
    marks.append(mark(copy))
    (copy / "c").rename(copy / "d")
    marks.append(mark(copy))
    assert len(set(marks)) == 6


def test_images_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "set")
    datasets.create("image-folder", path=str(folder), size=5).load()
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("an image was read again"))
    datasets.create("image-folder", path=str(folder), size=5).load()


def test_many_faults_are_counted(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for i in range(13):
        (tmp_path / "one" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"13 of 13 (.|\n)*09\.png(.|\n)*and 3 more"):
        datasets.create("image-folder", path=str(tmp_path), size=5).load()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: (f / "a dog" / "notes.txt").write_text("x"), r"notes\.txt: not a \.png"),
        (lambda f: (f / "a dog" / "deeper.png").mkdir(), r"deeper\.png: a folder, not an image"),
        (lambda f: (f / "empty").mkdir(), "empty: this class has no image"),
        (lambda f: Image.fromarray(IMAGES[0]).save(f / "stray.png"), r"stray\.png: an image outside"),
    ],
)
def test_a_wrong_folder_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[Path], object], reason: str
) -> None:
    folder = write_folder(tmp_path / "set")
    (folder / "README.txt").write_text("a file beside the classes is allowed")
    datasets.create("image-folder", path=str(folder), size=5).load()
    change(folder)
    with pytest.raises(UserError, match=reason):
        datasets.create("image-folder", path=str(folder), size=5).load()


def test_a_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class folder and no image"):
        datasets.create("image-folder", path=str(tmp_path), size=5).load()
    with pytest.raises(UserError, match="no such folder"):
        datasets.create("image-folder", path=str(tmp_path / "missing"), size=5).load()


@pytest.mark.parametrize(("width", "height", "size"), [(50, 30, 7), (30, 50, 30), (8, 8, 8), (5, 9, 12), (1, 400, 3)])
def test_the_centre_square_keeps_the_centre(width: int, height: int, size: int) -> None:
    # A ramp along each axis: the square's mean is the ramp's value at the picture's centre.
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    for ramp in (across, down):
        ours = square(ramp.round().astype(np.uint8), size)
        assert ours.shape == (size, size)
        # Halving and cropping an odd length is off the centre by up to a pixel of the ramp at the scale of the crop.
        assert abs(ours.mean() - ramp.mean()) <= 255 / min(width, height, size) + 1


def test_a_square_of_the_right_size_is_untouched() -> None:
    picture = pictures(1, 8, 8)[0]
    assert np.array_equal(square(picture, 8), picture)


def test_halving_is_by_box_averages() -> None:
    picture = pictures(1, 16, 16, 1)[0, ..., 0]
    truth = picture.reshape(8, 2, 8, 2).mean((1, 3))
    # Rows, then columns are averaged, and each time rounded to a whole number: twice 0.5.
    assert np.abs(square(picture, 8) - truth).max() <= 1.0


def test_listing_data_sets_needs_no_numpy() -> None:
    code = "import sys, sitkit; list(sitkit.datasets.values()); print([m for m in HEAVY if m in sys.modules])"
    heavy = ("torch", "numpy", "sklearn", "PIL", "datasets")
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy}; {code}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
