"""Samples: equal for every batch size, drawn once, and recorded with everything that they depend on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import copied, tiny, trained

import sitkit
from sitkit.registry import registries
from sitkit.runs.config.sources import read_assignments
from sitkit.runs.run import Run, load
from sitkit.runs.sample import SamplePlan, draw_samples, in_proportion, labels_of, write_adm
from sitkit.runs.sample_set import ARRAYS, PICTURE, RECORD, SampleSet, Shards
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import read_json
from sitkit.runtime.progress import Event
from sitkit.training.train import run_training

# 70 samples of a small state are two blocks of 64.
DRAWN = 128


class Spent:
    """Counts the evaluations of a network, in samples."""

    def __init__(self, run: Run) -> None:
        self.samples = self.calls = 0
        run.network.register_forward_pre_hook(self._count)

    def _count(self, network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.samples += len(inputs[0])
        self.calls += 1


def opened(base: str, folder: Path, *settings: str, loud: bool = True) -> Run:
    """A trained run whose samples go to another folder; `loud`: a head as large as after a long training."""
    run = load(trained(base), settings=read_assignments(["sampler.steps=8", "sample.n=70", *settings]))
    if loud:
        for name, parameter in run.network.named_parameters():
            if name.startswith(("head", "final_layer.linear")):
                parameter.mul_(30)
    return dataclasses.replace(run, folder=folder)


def test_samples_that_are_drawn_again_in_one_process_are_read_again(tmp_path: Path) -> None:
    values = []
    for loud in (True, False):
        run = opened("points", tmp_path / "runs", loud=loud)
        samples = draw_samples(run)
        shards = Shards(samples.folder, run.data_description, (), samples.n, True)
        values.append(torch.as_tensor(shards.read(0)))
        assert torch.equal(values[-1], torch.from_numpy(np.load(samples.folder / ARRAYS)["points"]))
        shutil.rmtree(samples.folder)
    assert not torch.equal(*values)


def test_a_list_is_no_sampler() -> None:
    with pytest.raises(UserError, match=r"sampler.*A sampler is a name or a mapping with 'name'"):
        load(trained("points"), settings={"sampler": ["heun"]})


@pytest.mark.parametrize("sampler", ["heun", "euler-maruyama", "stochastic-heun"])
def test_samples_do_not_depend_on_the_batch(tmp_path: Path, sampler: str) -> None:
    for base in ("digits", "points"):
        made = [
            draw_samples(
                opened(
                    base, tmp_path / f"{base}-{size}", f"sampler={sampler}", "sampler.steps=8", f"sample.batch={size}"
                )
            )
            for size in (1, 7, 64)
        ]
        one = made[0]
        assert float(one.x.std()) > 0.1
        for other in made[1:]:
            assert other.folder.name == one.folder.name and torch.equal(other.y, one.y)
            assert torch.equal(other.x, one.x)


def test_a_sample_depends_on_its_index_and_the_seed_only(tmp_path: Path) -> None:
    few, many = (
        draw_samples(opened("digits", tmp_path / str(n), f"sample.n={n}", "sampler=euler-maruyama")) for n in (20, 45)
    )
    assert torch.equal(few.x, many.x[:20]) and torch.equal(few.y, many.y[:20])
    other = draw_samples(opened("digits", tmp_path / "other", "sample.n=20", "sample.seed=1", "sampler=euler-maruyama"))
    same = (other.x == few.x).flatten(1).all(1)
    assert not same.any() and few.folder.name != other.folder.name


def test_samples_on_disk_are_not_drawn_again(tmp_path: Path) -> None:
    run = opened("points", tmp_path)
    spent = Spent(run)
    first = draw_samples(run)
    assert spent.samples == DRAWN * 16 == DRAWN * first.record["nfe"]  # heun: two evaluations for each of 8 steps
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = draw_samples(run)
    assert spent.samples == DRAWN * 16
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == written
    assert torch.equal(again.x, first.x) and torch.equal(again.y, first.y) and again.record == first.record


def test_half_written_samples_are_drawn_again(tmp_path: Path) -> None:
    run = opened("points", tmp_path)
    first = draw_samples(run)
    arrays = (first.folder / ARRAYS).read_bytes()
    (first.folder / RECORD).unlink()  # the last that is written
    (first.folder / ARRAYS).write_bytes(arrays[:100])
    assert torch.equal(draw_samples(run).x, first.x) and (first.folder / RECORD).is_file()


@pytest.mark.parametrize(
    ("words", "nfe"),
    [
        (("sampler=euler", "sampler.steps=5"), 5), (("sampler=rk4", "sampler.steps=5"), 20), (("guidance=cfg",), 32),
        (("sampler=euler-maruyama", "sampler.steps=9"), 9),
        (("sampler=euler-maruyama", "sampler.steps=9", "guidance=cfg"), 18),
    ],
)  # fmt: skip
def test_the_record_has_the_number_of_evaluations(tmp_path: Path, words: tuple[str, ...], nfe: int) -> None:
    # A scale of 1 would need no second branch.
    scale = ["guidance.scale=2"] if "guidance=cfg" in words else []
    run = opened("points", tmp_path, *words, *scale, "sample.labels=balanced")
    spent = Spent(run)
    assert draw_samples(run).record["nfe"] == nfe == spent.samples / DRAWN


def test_the_record_is_the_recipe(tmp_path: Path) -> None:
    run = opened(
        "digits", tmp_path, "sampler=euler-maruyama", "sampler.steps=12", "sampler.last_step=tweedie", "diffusion=kl"
    )
    record = draw_samples(run).record
    recipe = record["recipe"]
    assert recipe["step"] == 20 and recipe["sampler"]["name"] == "euler-maruyama" and recipe["sampler"]["steps"] == 12
    assert recipe["diffusion"] == {"name": "kl", "norm": 1.0} and recipe["guidance"] == {"name": "none"}
    assert recipe["sample"] == {"n": 70, "seed": 0, "weights": "ema", "ema": None, "labels": "balanced"}
    assert record["training"] == trained("digits").name.rpartition("-")[2]
    # 12 steps, the last of them the step without noise, of 0.04.
    assert (
        record["intervals"] == 11
        and record["last_step"] == 0.04
        and len(record["times"]) == 12
        and record["times"][-1] == pytest.approx(0.96, abs=1e-12)
    )
    assert record["seconds"] > 0 and record["environment"]["packages"]["torch"] and record["rounding"]


def test_the_arrays_are_a_data_set(tmp_path: Path) -> None:
    samples = draw_samples(opened("digits", tmp_path))
    data = sitkit.datasets.create("npz", path=str(samples.folder / ARRAYS), holdout=0.0).load()
    assert data.shape == (1, 8, 8) and data.num_classes == 10
    assert torch.equal(data.read(np.arange(70)), samples.x)
    assert torch.equal(torch.from_numpy(data.labels), samples.y)
    with np.load(samples.folder / ARRAYS, allow_pickle=False) as arrays:
        assert arrays["images"].shape == (70, 8, 8, 1) and arrays["images"].dtype == np.uint8


def test_points_are_kept_to_the_bit_and_drawn_as_a_scatter(tmp_path: Path) -> None:
    samples = draw_samples(opened("points", tmp_path))
    with np.load(samples.folder / ARRAYS, allow_pickle=False) as arrays:
        assert arrays["points"].dtype == np.float32 and arrays["points"].shape == (70, 2)
        assert torch.equal(torch.from_numpy(arrays["points"]), samples.x)
    with Image.open(samples.folder / PICTURE) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def grid(samples: SampleSet) -> np.ndarray:
    with Image.open(samples.folder / PICTURE) as picture:
        return np.asarray(picture.convert("L"))


def test_a_grid_has_one_class_per_row(tmp_path: Path) -> None:
    all_classes = grid(draw_samples(opened("digits", tmp_path, "sample.n=30")))
    one_class = grid(draw_samples(opened("digits", tmp_path, "sample.n=30", "sample.labels=[3]")))
    none = grid(draw_samples(opened("digits", tmp_path, "sample.n=30", "sample.labels=none")))
    # 10 rows of 3; 1 row of 10; without labels rows of 10.
    assert all_classes.shape[0] > 2 * all_classes.shape[1]
    assert one_class.shape[1] > 5 * one_class.shape[0] and none.shape[1] > 2 * none.shape[0]


def labels(folder: Path, rule: str, n: int = 70) -> list[int]:
    return draw_samples(
        opened("digits", folder, f"sample.labels={rule}", f"sample.n={n}", "sampler.steps=1")
    ).y.tolist()


def test_labels_follow_their_rule(tmp_path: Path) -> None:
    assert labels(tmp_path, "balanced") == [i % 10 for i in range(70)]
    assert labels(tmp_path, "[7, 2]") == [7, 2] * 35
    assert labels(tmp_path, "none") == [10] * 70
    samples = labels(tmp_path, "random", 1000)
    assert labels(tmp_path, "random", 70) == samples[:70]
    # 100 expected of each, with a standard deviation of sqrt(1000 * 0.1 * 0.9) = 9.5; 5 of them.
    assert all(abs(count - 100) < 48 for count in np.bincount(samples, minlength=10)) and len(set(samples)) == 10


def refused(run: Run, match: str) -> None:
    spent = Spent(run)
    with pytest.raises(UserError, match=match):
        draw_samples(run)
    assert spent.calls == 0 and not (run.folder / "samples").exists()


def test_impossible_settings_are_refused_before_any_evaluation(tmp_path: Path) -> None:
    refused(opened("points", tmp_path, "diffusion=sigma"), "solves the ODE")
    refused(opened("digits", tmp_path, "sample.labels=[1, 10]"), r"classes from 0 to 9; got \[1, 10\]")
    refused(opened("digits", tmp_path, "sample.labels=[-1]"), "classes from 0 to 9")


def test_samples_that_are_not_finite_are_a_failure_and_not_kept(tmp_path: Path) -> None:
    run = opened("points", tmp_path)
    for parameter in run.network.parameters():
        parameter.fill_(1e30)
    with pytest.raises(WorkFailed, match=r"70 of 70 samples are not finite: heun on a network at step 40"):
        draw_samples(run)
    assert not list(tmp_path.rglob("*.npz"))


def test_raw_and_averaged_weights_draw_other_samples(tmp_path: Path) -> None:
    ema, raw = (draw_samples(opened("points", tmp_path, f"sample.weights={w}")) for w in ("ema", "raw"))
    assert ema.record["recipe"]["sample"]["weights"] == "ema" and raw.record["recipe"]["sample"]["weights"] == "raw"
    assert float((ema.x - raw.x).abs().max()) > 1e-4


def test_kl_eta_measures_the_loss_once_and_keeps_it(tmp_path: Path) -> None:
    words = ("sampler=euler-maruyama", "sampler.steps=9", "diffusion=kl-eta")
    run = opened("points", tmp_path, *words)
    spent = Spent(run)
    first = draw_samples(run)
    assert first.record["recipe"]["diffusion"] == {"name": "kl-eta", "norm": 1.0, "eta": 1.0, "losses": []}
    # 20 held-out points (5 % of 400), 4 noises each, 33 times; then 128 states of 9 evaluations.
    assert spent.samples == 20 * 4 * 33 + DRAWN * 9
    (path,) = tmp_path.glob("velocity-loss-*.json")
    assert path.name == "velocity-loss-ema-00000040.json"
    stored = read_json(path)
    other = opened("points", tmp_path, *words, "diffusion.eta=0.01")
    again = Spent(other)
    second = draw_samples(other)
    assert again.samples == DRAWN * 9 and second.folder != first.folder
    # The same as giving the losses by hand.
    pairs = [list(pair) for pair in zip(stored["times"], stored["smoothed"], strict=True)]
    given = draw_samples(opened("points", tmp_path, *words, f"diffusion.losses={pairs}"))
    assert torch.equal(given.x, first.x) and not torch.equal(second.x, first.x)


def test_an_adapted_grid_is_measured_once_used_and_recorded(tmp_path: Path) -> None:
    words = ("sampler.steps=7", "sampler.grid=adapted")
    run = opened("points", tmp_path, *words)
    spent = Spent(run)
    first = draw_samples(run)
    # 64 paths of 64 steps of heun; then 128 states of 14 evaluations.
    assert spent.samples == 64 * 64 * 2 + DRAWN * 14
    (path,) = tmp_path.glob("curvature-*.json")
    assert path.name == "curvature-ema-00000040.json"
    stored = read_json(path)
    pairs = [list(pair) for pair in zip(stored["times"], stored["curvature"], strict=True)]
    assert first.record["recipe"]["sampler"]["grid"] == {"name": "adapted", "curvature": []}
    grid = registries["timesteps"].create("adapted", curvature=pairs).grid(7, 0.0, 1.0)
    assert first.record["times"] == grid.tolist() and first.record["nfe"] == 14
    given = draw_samples(
        opened("points", tmp_path, "sampler.steps=7", f"sampler.grid={{name: adapted, curvature: {pairs}}}")
    )
    assert torch.equal(given.x, first.x)
    even = draw_samples(opened("points", tmp_path, "sampler.steps=7"))
    assert not torch.equal(even.x, first.x)


def test_progress_counts_samples(tmp_path: Path) -> None:
    events: list[Event] = []
    draw_samples(opened("points", tmp_path), events.append)
    assert {(event.stage, event.total) for event in events} == {("sample", 70)}
    counts = [event.done for event in events]
    assert (
        counts == sorted(counts) and set(counts) == {64, 70} and all(event.values["images/s"] > 0 for event in events)
    )


def test_a_moved_run_gives_the_same_samples_to_the_bit(tmp_path: Path) -> None:
    words = read_assignments(["sampler.steps=4", "sample.n=10"])
    first = draw_samples(load(copied(trained(), tmp_path / "here"), settings=words))
    before = first.x
    shutil.move(tmp_path / "here", tmp_path / "there")
    folder = tmp_path / "there" / trained().name
    shutil.rmtree(folder / "samples")
    again = draw_samples(load(folder, settings=words))
    assert torch.equal(again.x, before) and again.folder == folder / "samples" / first.folder.name


def test_the_archive_for_adm_has_three_channels_labels_and_the_rounding(tmp_path: Path) -> None:
    samples = draw_samples(opened("digits", tmp_path))
    write_adm(samples, tmp_path / "adm.npz")
    with np.load(tmp_path / "adm.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (70, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], np.repeat(samples.arrays["images"], 3, axis=3))
        assert np.array_equal(arrays["arr_1"], samples.y.numpy())
        assert json.loads(str(arrays["record"][0]))["rounding"] == "round-half-even"
    with pytest.raises(UserError, match="--adm writes images"):
        write_adm(draw_samples(opened("points", tmp_path)), tmp_path / "points.npz")


def test_sample_i_of_a_set_has_the_key_of_its_seed_and_number() -> None:
    """Samples are numbered from 0, and their noise belongs to (sample.seed, number): 0 is the default seed."""
    plan = SamplePlan(load(trained(), device="cpu"))
    index = torch.arange(plan.batch_size)
    keys = rng.sample_keys(0, index)
    solved = plan.solve(keys, labels_of(plan.run.config, plan.run.labelled, index, keys)).x
    assert torch.equal(plan.draw(0, 5, lambda count: None).x, solved[:5])
    assert torch.equal(plan.draw(3, 5, lambda count: None).x, solved[3:5])


def unbalanced(folder: Path, *settings: str, counts: Sequence[int] = (0, 30, 6, 0, 4), dropout: float = 0.1) -> Run:
    """A run on images of classes with gaps, untrained: 30, 6 and 4 examples of classes 1, 2 and 4."""
    folder.mkdir(exist_ok=True)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = np.random.default_rng(0).integers(0, 255, (len(labels), 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "d.npz", images=pixels, labels=labels)
    data = f"data={{name: npz, path: {folder / 'd.npz'}}}"
    words = ("train.steps=0", f"backbone.class_dropout={dropout}")
    run = load(run_training(tiny(folder / "runs", data, *words, base="digits")), device="cpu")
    return run.with_settings(read_assignments(["sampler={name: euler, steps: 1}", "sample.n=100", *settings]))


def drawn_labels(run: Run) -> dict[int, int]:
    return dict(sorted(Counter(draw_samples(run).y.tolist()).items()))


def test_classes_without_an_example_are_never_drawn(tmp_path: Path) -> None:
    assert drawn_labels(unbalanced(tmp_path)) == {1: 34, 2: 33, 4: 33}
    assert set(drawn_labels(unbalanced(tmp_path, "sample.labels=random"))) == {1, 2, 4}
    refused(unbalanced(tmp_path / "0", "sample.labels=[1, 3]"), "class '3' has no example in the data")


def test_labels_as_in_the_data_have_its_frequencies(tmp_path: Path) -> None:
    """100 samples of 30, 6 and 4 of 40: 75, 15 and 10.  Of 7 samples 5.25, 1.05 and 0.7: the largest remainder is 0.7."""
    assert drawn_labels(unbalanced(tmp_path, "sample.labels=data")) == {1: 75, 2: 15, 4: 10}
    assert drawn_labels(unbalanced(tmp_path, "sample.labels=data", "sample.n=7")) == {1: 5, 2: 1, 4: 1}
    for n in (1, 3, 50, 999):
        made = np.bincount(in_proportion((0, 30, 6, 0, 4), n), minlength=5)
        assert made.sum() == n and np.abs(made - n * np.array([0, 30, 6, 0, 4]) / 40).max() < 1
    # Mixed evenly: every 20 in a row have 15, 3 and 2 of the classes, or one more or less.
    mixed = np.array(in_proportion((0, 30, 6, 0, 4), 100))
    rows = [np.bincount(mixed[i : i + 20], minlength=5) for i in range(0, 100, 20)]
    assert np.abs(np.array(rows) - [0, 15, 3, 0, 2]).max() <= 1


def test_a_class_is_a_number_a_name_or_a_list(tmp_path: Path) -> None:
    run = opened("digits", tmp_path, "sampler={name: euler, steps: 1}", "sample.n=4")
    for words, expected in (("3", [3] * 4), ("'7'", [7] * 4), ("['1', 2]", [1, 2, 1, 2])):
        assert draw_samples(run.with_settings(read_assignments([f"sample.labels={words}"]))).y.tolist() == expected
    # One class as a number is the list of it: the same samples, drawn once.
    one, listed = (run.with_settings(read_assignments([f"sample.labels={rule}"])) for rule in ("3", "[3]"))
    assert one.config == listed.config
    refused(opened("digits", tmp_path / "cat", "sample.labels=cat"), "there is no class 'cat'")
    with pytest.raises(UserError, match="'blanced' is no rule. Did you mean 'balanced'?"):
        opened("digits", tmp_path, "sample.labels=blanced")


def test_a_class_of_data_without_labels_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.zeros((8, 8, 8, 1), np.uint8))
    data = f"data={{name: npz, path: {tmp_path / 'd.npz'}}}"
    with pytest.raises(UserError, match="have no labels"):
        run_training(tiny(tmp_path / "runs", data, "sample.labels=[0]", base="digits"))
    assert not (tmp_path / "runs").exists()
    run = load(run_training(tiny(tmp_path / "runs", data, "train.steps=0", base="digits")), device="cpu")
    refused(run.with_settings(read_assignments(["sample.labels=0"])), "the data of this run have no labels")
    for rule in ("balanced", "data", "random", "none"):
        settings = read_assignments([f"sample.labels={rule}", "sample.n=4", "sampler={name: euler, steps: 1}"])
        assert draw_samples(run.with_settings(settings)).y.tolist() == [0] * 4


def test_without_label_dropout_nothing_is_drawn_without_a_label(tmp_path: Path) -> None:
    """The embedding of no label was never trained; guidance by it is refused too."""
    reason = "class_dropout = 0: it never saw an example without a label"
    refused(unbalanced(tmp_path, "sample.labels=none", dropout=0), reason)
    run = unbalanced(tmp_path, dropout=0)
    noise = torch.zeros(2, *run.shape)
    with pytest.raises(UserError, match=reason):
        run.field.read(noise, 0.5)
    with pytest.raises(UserError, match=reason):
        sitkit.samplers.create("heun").sample(run.field, noise)
    with pytest.raises(UserError, match=reason):
        sitkit.likelihood(run, settings={"sample.labels": "none"})
    assert drawn_labels(run) == {1: 34, 2: 33, 4: 33} and set(
        drawn_labels(unbalanced(tmp_path, "sample.labels=none"))
    ) == {5}


@pytest.mark.parametrize(
    ("counts", "rule", "said"),
    [
        ((90, 10), "balanced", "labels: balanced, and the data's classes have other frequencies: 40%"),
        ((90, 10), "data", None),
        ((50, 50), "balanced", None),
        ((0, 40, 40), "balanced", None),
        ((90, 10), "none", None),
        ((90, 10), "[1]", "labels: the samples are of classes 1 alone, and are compared with all classes of the data"),
        ((90, 10), "[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]", None),
    ],
)
def test_an_evaluation_says_that_its_classes_are_not_those_of_the_data(
    tmp_path: Path, counts: tuple[int, ...], rule: str, said: str | None
) -> None:
    """With 90 and 10 of 100 examples a balanced set has 40 % in the wrong class."""
    run = unbalanced(tmp_path, "run.track=false", counts=counts)
    labels = read_assignments([f"sample.labels={rule}"]).values
    (number,) = sitkit.evaluate(run, metric="sliced-wasserstein", n=20, settings=labels)
    notes = [note for note in number.record["notes"] if "class" in note]
    assert len(notes) == (said is not None) and (said is None or notes[0].startswith(said))
