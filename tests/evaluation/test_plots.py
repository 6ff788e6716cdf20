"""Pictures read back: pixels where they belong, files whole, nothing global touched."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sitkit.evaluation import plots
from sitkit.evaluation.images import GAP, ROUNDING, image_grid, to_uint8
from sitkit.evaluation.plots import Curve
from sitkit.registry import interpolants
from sitkit.runtime.errors import WorkFailed


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB"))


def test_every_level_survives_the_way_to_floats_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    x = (levels.float() / 127.5 - 1).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(x)[0, :, :, 0].ravel(), levels.numpy())


def test_rounding_is_half_to_even_clamped_and_channels_go_last() -> None:
    # (x + 1) * 127.5 is exactly 0.5, 1.5, 127.5 for x = 1/255 - 1, 3/255 - 1, 0 up to rounding in x; 0 is exact.
    assert ROUNDING == "round-half-even"
    x = torch.tensor([0.0, 5.0, -5.0, 1.0, -1.0, 0.5]).reshape(1, 3, 1, 2)
    out = to_uint8(x)
    assert out.dtype == np.uint8 and out.shape == (1, 1, 2, 3)
    # 127.5 -> 128 (even); 191.25 -> 191.
    assert out.tolist() == [[[[128, 0, 0], [255, 255, 191]]]]
    assert to_uint8(x.to(torch.bfloat16).requires_grad_()).tolist() == out.tolist()


def test_images_that_are_not_finite_are_refused() -> None:
    x = torch.zeros(4, 1, 2, 2)
    x[2, 0, 1, 1] = math.nan
    with pytest.raises(WorkFailed, match="1 of 4 images hold NaN or Inf, the first at index 2"):
        to_uint8(x)


def test_a_grid_shows_every_pixel_in_its_place(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    image_grid(images, tmp_path / "grid.png", columns=3, scale=6)
    sheet = read(tmp_path / "grid.png")
    gap = GAP
    assert sheet.shape == (3 * (5 * 6 + gap) + gap, 3 * (4 * 6 + gap) + gap, 3)
    for i, image in enumerate(images):
        top, left = gap + i // 3 * (5 * 6 + gap), gap + i % 3 * (4 * 6 + gap)
        cell = sheet[top : top + 30, left : left + 24]
        assert np.array_equal(cell, image.repeat(6, 0).repeat(6, 1))
    # The two places without an image, and the gaps, are paper.
    assert (sheet[-30 - gap :, 24 + 2 * gap :] == 255).all() and (sheet[:gap] == 255).all()


def test_a_grid_of_digits_has_readable_cells_and_labels_left_of_them(tmp_path: Path) -> None:
    images = np.zeros((20, 8, 8, 1), dtype=np.uint8)
    image_grid(images, tmp_path / "plain.png", columns=10)
    image_grid(images, tmp_path / "labels.png", columns=10, row_labels=["0", "truck"])
    plain, labels = read(tmp_path / "plain.png"), read(tmp_path / "labels.png")
    margin = labels.shape[1] - plain.shape[1]
    assert plain.shape[:2] == (2 * 50 + 2, 10 * 50 + 2)
    assert np.array_equal(labels[:, margin:], plain)
    # Ink at the height of both rows; none runs off the left edge or into the cells.
    ink = labels[:, :margin].min(2) < 128
    assert ink[:50].any() and ink[52:].any() and not ink[:, :2].any() and not ink[:, -2:].any()


@pytest.mark.parametrize(
    ("shape", "dtype", "columns", "labels", "message"),
    [
        ((4, 8, 8), np.uint8, 2, None, "uint8"),
        ((4, 8, 8, 4), np.uint8, 2, None, "uint8"),
        ((4, 8, 8, 1), np.float32, 2, None, "got float32"),
        ((4, 8, 8, 1), np.uint8, 0, None, "at least 1 image and 1 column; got 4 and 0"),
        ((0, 8, 8, 1), np.uint8, 2, None, "got 0 and 2"),
        ((4, 8, 8, 1), np.uint8, 2, ["a"], "2 rows needs 2 labels; got 1"),
    ],
)
def test_a_grid_refuses_what_it_cannot_show(
    tmp_path: Path, shape: tuple[int, ...], dtype: type, columns: int, labels: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid(np.zeros(shape, dtype), tmp_path / "grid.png", columns, row_labels=labels)
    assert not list(tmp_path.iterdir())


def colours(path: Path) -> dict[str, int]:
    """How many pixels are near each colour of the palette."""
    sheet = read(path).astype(int)
    return {
        c: int((np.abs(sheet - [int(c[i : i + 2], 16) for i in (1, 3, 5)]).max(2) < 12).sum()) for c in plots.COLOURS
    }


def test_curves_draw_each_series_in_its_colour_and_leave_gaps(tmp_path: Path) -> None:
    x = np.arange(1, 41)
    whole = [Curve("a", x, np.sqrt(x)), Curve("b", x, torch.sqrt(torch.tensor(x).float()) + 2)]
    broken = [Curve("a", x, np.where(x < 38, np.nan, np.sqrt(x))), whole[1]]
    for name, series in (("whole.png", whole), ("broken.png", broken)):
        plots.curves(series, tmp_path / name, title="loss", xlabel="step", ylabel="loss")
    full, part = colours(tmp_path / "whole.png"), colours(tmp_path / "broken.png")
    first, second, third = plots.COLOURS[:3]
    assert full[first] > 1000 and full[second] > 1000 and full[third] == 0
    assert part[first] < full[first] / 2 and part[second] == pytest.approx(full[second], rel=0.2)


def test_curves_with_errors_on_logarithmic_axes(tmp_path: Path) -> None:
    nfe, frechet = [5, 50, 500], [90.0, 9.0, 6.0]
    for name, stderr in (("bare.png", None), ("bars.png", [9.0, 2.0, 1.0])):
        curve = Curve("heun", nfe, frechet, stderr)
        plots.curves(
            [curve], tmp_path / name, title="$5 per_sample", xlabel="NFE", ylabel="frechet", logx=True, logy=True
        )
    first = plots.COLOURS[0]
    assert colours(tmp_path / "bars.png")[first] > colours(tmp_path / "bare.png")[first] > 1000


def test_curves_refuse_nothing_and_unequal_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one curve"):
        plots.curves([], tmp_path / "a.png", title="", xlabel="", ylabel="")
    with pytest.raises(ValueError, match="curve 'a' has 3 places for 2 values"):
        plots.curves([Curve("a", [1, 2, 3], [1, 2])], tmp_path / "a.png", title="", xlabel="", ylabel="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", interpolants.names())
def test_every_interpolant_has_a_plot(name: str, tmp_path: Path) -> None:
    t = np.linspace(0, 1, 50)
    with np.errstate(divide="ignore"):
        diverging = Curve("kl", t, 2 / t)
    plots.interpolant(interpolants.create(name), tmp_path / "bare.png")
    plots.interpolant(interpolants.create(name), tmp_path / "with_w.png", [Curve("linear", t, 1 - t), diverging])
    bare, with_w = read(tmp_path / "bare.png"), read(tmp_path / "with_w.png")
    assert bare.shape[1] == with_w.shape[1] == 8 * plots.DPI
    assert with_w.shape[0] == pytest.approx(1.5 * bare.shape[0], abs=2)
    assert min(list(colours(tmp_path / "bare.png").values())[:2]) > 1000


def test_the_view_of_diverging_curves_holds_the_bounded_ones() -> None:
    t = np.linspace(0, 1, 1001)[1:]
    bounded = [Curve("linear", t, 1 - t), Curve("constant", t, np.ones_like(t))]
    low, high = plots.limits([*bounded, Curve("kl", t, 2 * (1 - t) / t)])
    # No more than twice the median reach, 1, with its padding.
    assert low <= 0 and 1 < high < 2.4
    assert plots.limits([Curve("flat", t, np.zeros_like(t))]) == (-0.5, 0.5)


def test_scatter_counts_what_it_leaves_out_and_draws_paths(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(400, 2, generator=generator)
    samples = torch.randn(300, 2, generator=generator)
    samples[:3] = torch.tensor([[1e6, 0.0], [math.nan, 0.0], [0.0, -math.inf]])
    low, high = plots.window(reference.numpy(), samples.numpy())
    assert (low > -10).all() and (high < 10).all()
    assert (low <= reference.numpy().min(0)).all() and (high >= reference.numpy().max(0)).all()

    plots.scatter(samples, reference, tmp_path / "points.png", title="moons")
    start = torch.randn(297, 2, generator=generator)
    paths = torch.stack([start.lerp(samples[3:], u) for u in torch.linspace(0, 1, 9)])
    plots.scatter(samples[3:], reference, tmp_path / "paths.png", paths)
    # 48 orange dots of 3.5 points and a 1-point edge, 10 pixels across, fill 48 * 79 = 3770 pixels, and the legend's,
    # twice as wide, 280; soft edges and what lies on top take some of it.
    orange = plots.COLOURS[1]
    assert colours(tmp_path / "points.png")[orange] == 0
    assert 2000 < colours(tmp_path / "paths.png")[orange] < 4050


def test_a_heatmap_marks_what_is_missing(tmp_path: Path) -> None:
    values = np.array([[1.0, 2.0], [math.nan, 4.0], [5.0, 6.0]])
    rows, columns = ["euler", "heun", "$odd_name"], ["linear", "gvp"]
    plots.heatmap(values, rows, columns, tmp_path / "map.png", "bias", "standard errors")
    grey = (np.abs(read(tmp_path / "map.png").astype(int) - 0xE4).max(2) < 2).sum()
    cells = (np.abs(read(tmp_path / "map.png").astype(int) - [0, 34, 78]).max(2) < 4).sum()
    # The missing cell and the lowest one (cividis begins at #00224e) fill about as much, less their texts.
    assert grey > 10000 and cells == pytest.approx(grey, rel=0.2)
    plots.heatmap(np.full((1, 2), math.nan), ["a"], columns, tmp_path / "empty.png")
    plots.heatmap([[1.0, 2.0], [None, 4.0], [5.0, 6.0]], rows, columns, tmp_path / "absent.png")
    assert not (np.abs(read(tmp_path / "absent.png").astype(int) - 0xE4).max(2) < 2).sum() > 100
    with pytest.raises(ValueError, match=r"3 x 1 names for values of shape \(3, 2\)"):
        plots.heatmap(values, rows, columns[:1], tmp_path / "map.png")


def test_a_failure_leaves_the_old_picture_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a picture.png"
    image_grid(np.zeros((1, 8, 8, 1), np.uint8), path, 1)
    before = path.read_bytes()

    class Half(Figure):
        def savefig(self, fname: Any, **options: Any) -> None:
            Path(fname).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(WorkFailed, match="disk full"):
        plots.save(Half(), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_pictures_leave_pyplot_alone(tmp_path: Path) -> None:
    """In a process of its own, since other libraries import pyplot."""
    code = f"""if True:
        import sys
        from sitkit.evaluation import plots
        from sitkit.evaluation.plots import Curve
        plots.curves([Curve("a", [1, 2], [3, 4])], {str(tmp_path / "a.png")!r}, title="", xlabel="x", ylabel="y")
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.png").exists()
