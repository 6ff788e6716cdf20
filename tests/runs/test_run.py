"""Trained runs: what `load` reads, the errors for damaged ones, and the one way to change their settings."""

from __future__ import annotations

import ast
import json
import pickle
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import ROOT, flipped_bit, tiny, trained

import sitkit
from sitkit.models.backbone import Backbone
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.sources import Layer, read_assignments
from sitkit.runs.evaluate import measure_run
from sitkit.runs.run import initial_network, load, open_run
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.tensors import digest_of, load_tensors, save_tensors
from sitkit.training.train import run_training


def only_checkpoint(run: Path) -> Path:
    (path,) = checkpoints(RunFolder(run).checkpoints)
    return path


def test_loading_gives_the_averaged_weights_or_the_raw_ones(run: Path) -> None:
    _, tensors = load_tensors(only_checkpoint(run))
    for weights, prefix in (("ema", "ema."), ("raw", "model.")):
        loaded = load(run, weights=weights)  # pyright: ignore[reportArgumentType]
        assert loaded.step == 40 and loaded.config.sample.weights == weights
        for name, value in loaded.network.state_dict().items():
            assert torch.equal(value, tensors[prefix + name])
        chosen = load(run, settings=read_assignments([f"sample.weights={weights}"]))
        assert all(map(torch.equal, chosen.network.parameters(), loaded.network.parameters()))
    assert not torch.equal(tensors["ema.head.weight"], tensors["model.head.weight"])
    assert not any(p.requires_grad for p in load(run).network.parameters())


def test_sitkit_load_reads_a_field_of_the_run(run: Path) -> None:
    loaded = sitkit.load(run)
    x, t, y = torch.randn(5, 2), torch.full((5,), 0.3), torch.zeros(5, dtype=torch.int64)
    # Data and noise are solved for and put together again: three roundings at 2^-24 of values up to 4 are 7e-7.
    read = loaded.field.read(x, torch.tensor(0.3), y).velocity
    torch.testing.assert_close(read, loaded.network(x, t, y), atol=7e-7, rtol=0)
    assert float(loaded.network(x, t, y).abs().max()) > 1e-3
    assert loaded.shape == (2,) and loaded.identity == run.name.rpartition("-")[2]
    assert loaded.config == tiny(trained().parent)


def test_settings_on_top_change_sampling_only(run: Path) -> None:
    loaded = load(run, settings=read_assignments(["sampler=euler-maruyama", "sampler.steps=9", "sample.n=3"]))
    assert loaded.config.sampler.name == "euler-maruyama" and loaded.config.sample.n == 3
    assert loaded.config.diffusion.name == "sigma"  # an SDE's own default, not the ODE's `zero` that the run has
    assert load(run, settings=read_assignments(["sampler.steps=9"])).config.diffusion.name == "zero"
    for words in ("target=score", "train.lr=1", "data.size=10", "backbone.depth=2", "interp=gvp", "weight=noise"):
        with pytest.raises(UserError, match=rf"^--set {words}: {words.partition('=')[0].partition('.')[0]} was fixed"):
            load(run, settings=read_assignments([words]))


def test_a_checkpoint_by_its_step(run: Path) -> None:
    path = only_checkpoint(run)
    header, tensors = load_tensors(path)
    save_tensors(path.with_name("step-00000007.safetensors"), tensors, header | {"step": 7})
    assert load(run, step=7).step == 7 and load(run).step == 40
    with pytest.raises(UserError, match=r"no checkpoint at step 8; it has step-00000007, step-00000040"):
        load(run, step=8)


def test_damaged_checkpoints_are_refused_and_named(run: Path) -> None:
    path = only_checkpoint(run)
    whole = path.read_bytes()
    for kept in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=rf"{path} is damaged or cut short"), warnings.catch_warnings():
            warnings.simplefilter("error")
            load(run)
    path.write_bytes(whole)
    load(run)


def test_every_flipped_bit_in_weights_is_noticed(run: Path) -> None:
    path, draw = only_checkpoint(run), random.Random(0)
    for _ in range(40):
        with flipped_bit(path, draw), pytest.raises(UserError, match=rf"{path} is damaged: its content changed"):
            load(run)
    load(run)


def test_a_checkpoint_of_the_release_before_has_no_digest_and_loads(run: Path) -> None:
    path = only_checkpoint(run)
    header, tensors = load_tensors(path)
    save_file(tensors, path, {"sitkit": json.dumps(header)})
    assert load(run).step == 40


def test_an_older_checkpoint_replaces_a_damaged_one(run: Path) -> None:
    newer = only_checkpoint(run).with_name("step-00000050.safetensors")
    newer.write_bytes(only_checkpoint(run).read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"{newer} is damaged"):
        assert load(run).step == 40


class Boom:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4, "torch"])
def test_a_pickle_is_refused_unread(run: Path, tmp_path: Path, protocol: int | str) -> None:
    path, trace = only_checkpoint(run), tmp_path / "executed"
    if protocol == "torch":
        torch.save({"boom": Boom(trace)}, path)
    else:
        path.write_bytes(pickle.dumps(Boom(trace), protocol=int(protocol)))
    with pytest.raises(UserError, match=rf"{path} is a pickle"):
        load(run)
    with pytest.raises(UserError, match=rf"{path} is a pickle"):
        load(path)
    assert not trace.exists()


def test_a_checkpoint_in_place_of_a_run_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=rf"is a checkpoint; give the folder of its run: {run}\."):
        load(only_checkpoint(run))


def test_a_run_without_a_checkpoint_or_with_one_of_another_run_is_refused(run: Path) -> None:
    path = only_checkpoint(run)
    foreign = checkpoints(RunFolder(trained("digits")).checkpoints)[0]
    shutil.copy(foreign, path.with_name("step-00000099.safetensors"))
    with pytest.raises(UserError, match=r"step-00000099.safetensors was trained with"):
        load(run)
    shutil.rmtree(path.parent)
    with pytest.raises(UserError, match=r"has no checkpoint yet: continue its training with `sitkit train"):
        load(run)


@pytest.mark.parametrize("std", ["x", -1.0, 0.0, [1.0]])
def test_a_damaged_standard_deviation_of_the_data_is_named(run: Path, std: object) -> None:
    path = RunFolder(run).data
    write_json(path, read_json(path) | {"std": std})
    with pytest.raises(UserError, match=rf"{path} has a wrong value: std"):
        load(run)


def test_initial_weights_belong_to_the_seed_and_leave_the_generator_of_torch_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (initial_network(tiny(tmp_path, f"train.seed={seed}")) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not all(map(torch.equal, one.parameters(), other.parameters()))


def test_a_backbone_that_is_not_trained_needs_no_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path, "data={name: gaussian-mixture}", "backbone=exact", "sample.labels=none")
    assert isinstance(config.backbone, Backbone) and not config.backbone.trainable
    folder = run_training(config)
    assert load(folder).step == 0 and not RunFolder(folder).checkpoints.exists()


def test_the_settings_of_a_run_change_in_one_way_only() -> None:
    places = []
    for path in sorted([*(ROOT / "sitkit").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not any(keyword.arg == "config" for keyword in node.keywords):
                continue
            if ast.unparse(node.func).rpartition(".")[2] == "replace":
                places.append(str(path.relative_to(ROOT)))
    assert places == ["sitkit/runs/run.py"], "use Run.with_settings, which reads the weights that the settings name"


def test_the_weights_of_a_record_are_those_that_its_settings_name(tmp_path: Path) -> None:
    folder = run_training(tiny(tmp_path, "train.ema=[0.5, 0.999]", "train.posthoc=[0.05, 0.1]", "run.sample_every=0"))
    settings = [{"weights": "raw"}, {}, {"ema": 0.999}, {"ema": 0.5}, {"ema": 0.07}]
    fingerprints = {}
    run = load(folder, device="cpu")
    for sample in settings:
        over = Layer({"sample": {"weights": "ema", "ema": None, "n": 8, **sample}})
        run = run.with_settings(over)
        (evaluation,) = measure_run(run)
        checkpoint = read_json(evaluation.path)["checkpoint"]
        fresh = load(folder, device="cpu", settings=over)
        fingerprint = digest_of(fresh.network.state_dict())
        assert checkpoint == {"step": 40, "weights": fresh.weights_name, "fingerprint": fingerprint}
        assert fingerprint == digest_of(load(folder, settings=run.config).network.state_dict())
        fingerprints[fresh.weights_name] = fingerprint
    assert fingerprints["ema"] == fingerprints["ema-0.5"] and len(set(fingerprints.values())) == 4


def test_other_settings_leave_the_network_and_the_step(run: Path) -> None:
    trained_run = load(run, device="cpu")
    same = trained_run.with_settings(Layer({"sample": {"n": 3}}))
    assert same.network is trained_run.network and same.config.sample.n == 3
    raw = trained_run.with_settings(Layer({"sample": {"weights": "raw"}}))
    assert raw.network is raw.field.network is not trained_run.network
    assert (raw.step, raw.device) == (trained_run.step, trained_run.device)
    with pytest.raises(UserError, match=r"train was fixed when .* was trained"):
        trained_run.with_settings(Layer({"train": {"lr": 1.0}}))
    train_settings = trained_run.config.train.model_copy(update={"seed": 5})
    with pytest.raises(UserError, match=r"train was fixed when .* was trained"):
        trained_run.with_settings(trained_run.config.model_copy(update={"train": train_settings}))


def test_another_step_of_a_run_keeps_the_settings_that_the_run_has(tmp_path: Path) -> None:
    folder = run_training(tiny(tmp_path, "run.checkpoint_every=20", "run.sample_every=0"))
    newest = load(folder, device="cpu").with_settings(Layer({"sample": {"n": 8, "seed": 3, "weights": "raw"}}))
    older = open_run(newest, {"step": 20, "seed": 4}, "sample")
    assert (older.step, older.device, older.folder) == (20, newest.device, newest.folder)
    assert older.config.sample == newest.config.sample.model_copy(update={"seed": 4})
