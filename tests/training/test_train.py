"""Training: every combination trains, and a training that was stopped ends at the same weights."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import call, copied, finish, flags, start, tiny, trained, wait, weights
from torch import nn

from sitkit.data.dataset import load_examples
from sitkit.data.stream import batch
from sitkit.models.autoencoder import prepare_data
from sitkit.registry import interpolants, targets, weightings
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.schema import Config
from sitkit.runs.run import initial_network, load
from sitkit.runs.run_folder import RunFolder, folder_of
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.progress import Event
from sitkit.runtime.stops import SIGNALS
from sitkit.runtime.tensors import load_tensors, read_header
from sitkit.training.objective import TrainingInputs, objective_of
from sitkit.training.step import Due, due, forget_rows
from sitkit.training.train import run_training


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that are whole."""
    path = RunFolder(folder).metrics
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def step_of(folder: Path) -> int:
    return max((row["step"] for row in rows(folder)), default=0)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(folder)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(checkpoints(RunFolder(folder).checkpoints)[-1])[1]


def test_every_interpolant_target_and_weighting_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = list(itertools.product(interpolants, targets, weightings))
    wrong = []
    for interp, target, weight in made:
        words = (f"interp={interp}", f"target={target}", f"weight={weight}", "train.steps=20", "run.log_every=1")
        try:
            values = [row["loss"] for row in rows(run_training(tiny(tmp_path, *words, base="digits")))]
            right = len(values) == 20 and all(math.isfinite(loss) and loss > 0 for loss in values)
        except WorkFailed:
            right = False
        if not right:
            wrong.append((interp, target, weight))
    with capsys.disabled():
        print(f"\n{len(made) - len(wrong)} of {len(made)} combinations trained 20 steps with finite loss")
    assert not wrong and len(made) >= 3 * 4 * 6


def at(step: int, act: Callable[[], object]) -> Callable[[Event], None]:
    """Progress that acts when training reports a step."""

    def report(event: Event) -> None:
        if event.stage == "train" and event.done == step and not event.message:
            act()

    return report


@pytest.mark.parametrize("base", ["points", "digits"])
def test_a_run_stopped_and_continued_ends_at_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    config = tiny(
        Path("runs"), "train.steps=40", "run.log_every=5", "train.warmup=20", "train.clip=1", "train.ema=0.9", base=base
    )
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = run_training(config).resolve()
    monkeypatch.chdir(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run_training(config, at(15, lambda: signal.raise_signal(signal.SIGINT)))
    parts = folder_of(config).resolve()
    assert [path.stem for path in checkpoints(RunFolder(parts).checkpoints)] == ["step-00000015"]
    events: list[Event] = []
    assert run_training(config, events.append).resolve() == parts
    assert [event.message for event in events if event.message] == [f"continuing {folder_of(config)} at step 15."]
    assert min(event.done for event in events if not event.message) == 20  # no step was taken twice
    assert weights(parts) == weights(whole)
    assert losses(parts) == losses(whole)


def test_a_picture_lost_between_a_checkpoint_and_its_drawing_is_drawn_on_the_next_start(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.steps=4", "run.sample_every=2", "run.checkpoint_every=2")
    folder = run_training(config)
    last, middle = RunFolder(folder).previews / "step-00000004.png", RunFolder(folder).previews / "step-00000002.png"
    picture = last.read_bytes()
    last.unlink()
    middle.unlink()
    run_training(config)
    assert last.read_bytes() == picture and not middle.exists()


def test_running_again_does_nothing(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    folder = run_training(config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    losses_before = losses(folder)
    run_training(config)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert losses(folder) == losses_before


# The training takes seconds, but a kill happens among its 40 checkpoints.
STEPS = 400
LONG = (f"train.steps={STEPS}", "run.log_every=5", "run.checkpoint_every=10", "run.sample_every=150", "data.law=moons")
TRAIN = ("train", "points", *flags(*LONG))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the command above, trained without a stop; tests must not write to it."""
    with pytest.MonkeyPatch.context() as patch:
        # A checkpoint records the folder, so the folder is "runs" in every test.
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return run_training(tiny(Path("runs"), *LONG)).resolve()


def killed(cwd: Path, moment: Callable[[], bool], pause: float) -> int:
    """Start the training in a process, kill it `pause` seconds after `moment()` holds, and return its exit status."""
    process = start(*TRAIN, cwd=cwd)
    wait(process, moment)
    time.sleep(pause)
    process.kill()
    process.communicate()
    return process.returncode


def past(run: Path, step: int) -> Callable[[], bool]:
    return lambda: step_of(run) >= step


def later(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def check_kills(whole: Path, folder: Path, kills: int, blind: int) -> None:
    """Kill the training at `kills` of its steps, and `blind` times while it starts or continues."""
    # 100 steps remain after the last kill.
    run, end = folder / "runs" / whole.name, STEPS - 100
    # A fixed seed: a failure can be repeated as far as the timing of the machine allows.
    draw = random.Random(17)
    began = time.monotonic()
    statuses = [killed(folder, past(run, 10), 0)]
    starting = time.monotonic() - began
    statuses += [killed(folder, later(draw.uniform(0, starting)), 0) for _ in range(blind)]
    for number in range(1, kills):
        # A random part of the remaining steps, so that the last kill is before the end.
        step = step_of(run)
        goal = min(step + draw.randint(1, 2 * (end - step) // (kills - number + 1) + 1), end)
        statuses.append(killed(folder, past(run, goal), draw.uniform(0, 0.02)))
    assert statuses == [-signal.SIGKILL] * (kills + blind)
    result = finish(start(*TRAIN, cwd=folder))
    assert result.status == 0, result.err
    assert weights(run) == weights(whole)
    # The logged losses are the same too: no step is missing or repeated.
    assert losses(run) == losses(whole)
    assert {path.suffix for path in RunFolder(run).checkpoints.iterdir()} == {".safetensors"}  # no partial file remains


def test_killed_at_random_and_run_again_ends_at_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    check_kills(whole, tmp_path, kills=4, blind=0)


@pytest.mark.slow
def test_killed_twenty_times_ends_at_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    check_kills(whole, tmp_path, kills=14, blind=6)


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_saves_a_checkpoint_and_prints_the_command_to_continue(
    sent: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / whole.name
    # No other checkpoint before the last step, so the only checkpoint is that of ctrl-C.
    words = [*TRAIN, "--set", "run.checkpoint_every=1000"]
    process = start(*words, cwd=tmp_path)
    wait(process, past(run, 5))
    with pytest.raises(UserError, match=r"is being trained by another process"):
        run_training(tiny(Path("runs"), *LONG))
    process.send_signal(sent)
    result = finish(process)
    assert result.status == 128 + sent and "Traceback" not in result.err
    (kept,) = checkpoints(RunFolder(run).checkpoints)
    step = read_header(kept)["step"]
    assert 5 <= step < STEPS
    command = re.search(r"^stopped; .* Continue with: sitkit (.*)$", result.err, re.MULTILINE)
    assert command, result.err
    assert shlex.split(command[1]) == words
    again = call(*shlex.split(command[1]))
    assert again.status == 0 and f"at step {step}." in again.err
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(run)[name]), name
    assert len(losses(run)) == len({step for step, _ in losses(run)})


@pytest.mark.parametrize("every", [1, 1000])
def test_a_loss_that_is_not_finite_stops_with_step_loss_and_checkpoint(tmp_path: Path, every: int) -> None:
    words = flags("train.lr=1e30", f"run.checkpoint_every={every}")
    result = call("train", "points", *words, "--runs", tmp_path / "runs")
    assert result.status == 1 and "Traceback" not in result.err and result.err.count("error:") == 1
    (run,) = (tmp_path / "runs").iterdir()
    message = re.search(
        r"loss became (inf|nan) at step (\d+)\. "
        r"(There is no checkpoint before it|The last good checkpoint is (\S+) \(step (\d+)\))\.",
        result.err,
    )
    assert message, result.err
    _, first, remark, kept, step = message.groups()
    # The first step with such a loss, although the check comes later.
    assert int(first) == 2
    files = checkpoints(RunFolder(run).checkpoints)
    if every == 1:
        assert [str(path) for path in files] == [kept] and step == "1"
        assert read_header(kept)["step"] == 1
        assert losses(run)[-1][0] == 1
    else:
        assert not files and remark == "There is no checkpoint before it"


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    config = tiny(tmp_path)
    folder_of(config).mkdir(parents=True)
    with FileLock(folder_of(config) / ".lock"), pytest.raises(UserError, match="being trained by another process"):
        run_training(config)
    assert {path.name for path in folder_of(config).iterdir()} <= {".lock"}


def test_changed_data_are_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    config = tiny(tmp_path, f"data={{name: npz, path: {tmp_path / 'data.npz'}}}", "sample.labels=none", base="digits")
    folder = run_training(config)
    np.savez(tmp_path / "data.npz", images=255 - images)
    load_examples.cache_clear()
    with pytest.raises(UserError, match=r"The data of .* changed since"):
        run_training(config)
    assert weights(folder)


def test_unreadable_data_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    for words in ("data={name: image-folder, path: nowhere, size: 8}", "data={name: npz, path: nowhere.npz}"):
        with pytest.raises(UserError, match="nowhere"):
            run_training(tiny(tmp_path, words, base="digits"))
    with pytest.raises(UserError, match="cuda:99"):
        run_training(tiny(tmp_path, "run.device=cuda:99"))
    assert list(tmp_path.iterdir()) == []


def losses_of(config: Config, network: nn.Module) -> Callable[[int], float]:
    """The mean loss of a step."""
    data = prepare_data(config.data, config.autoencoder)
    inputs = TrainingInputs(config, network, data.examples, torch.device("cpu"))
    objective = objective_of(config, network, data)

    def loss(step: int) -> float:
        return float(objective(*inputs(*batch(data.examples, config.train.seed, step, config.train.batch)))[0].detach())

    return loss


def test_the_loss_of_a_step_depends_on_weights_and_step_alone(tmp_path: Path) -> None:
    config = tiny(tmp_path, base="digits")
    network = initial_network(config)
    with torch.no_grad():
        first, second = (losses_of(config, network) for _ in "ab")
        values = [float(first(step)) for step in range(5)]
        torch.rand(100)
        assert [float(second(step)) for step in (4, 2, 0, 1, 3)] == [values[step] for step in (4, 2, 0, 1, 3)]
    assert len(set(values)) == 5


def test_the_loss_of_a_network_that_predicts_zero(tmp_path: Path) -> None:
    """At the start the head is zero: with velocity on `linear` the loss is the mean of |data - noise|^2."""
    config = tiny(tmp_path, "train.batch=4000", "data.size=2000", "data.holdout=0")
    data = load_examples(config.data)
    loss = losses_of(config, initial_network(config))(0)
    values = data.read(np.arange(len(data))).double()
    # 2 epochs of all the data: its part is exact.  |noise|^2 per dimension has mean 1 and variance 2; the cross term -2
    # data noise has variance 4 E data^2 = 4/3: over 8,000 numbers the error is sqrt((2 + 4/3) / 8000) = 0.020; 4 of them.
    assert abs(loss - float(values.square().mean()) - 1) < 4 * 0.0205


def test_warm_up_and_clip_bound_the_steps(tmp_path: Path) -> None:
    # Adam's first step moves each parameter by lr * |g| / (|g| + eps), at most lr; warm-up makes it lr / warmup.
    config = tiny(tmp_path, "train.steps=1", "train.warmup=10", "train.lr=1e-2")
    initial = initial_network(config).state_dict()
    moved = load(run_training(config), weights="raw").network.state_dict()
    steps = torch.cat([(moved[name] - initial[name]).abs().flatten() for name in initial])
    # Weights of size 1 are rounded to 2^-24 = 6e-8 each.
    assert 0.99e-3 < float(steps.max()) < 1e-3 + 2e-7


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_is_over_the_weights_after_every_step(tmp_path: Path, decay: float) -> None:
    config = tiny(
        tmp_path,
        f"train.ema={decay}",
        "train.ema_warmup=false",
        "run.checkpoint_every=1",
        "run.keep=100",
        "train.steps=8",
    )
    folder = run_training(config)
    average: dict[str, torch.Tensor] = {}
    for path in checkpoints(RunFolder(folder).checkpoints):
        saved = load_tensors(path)[1]
        raw = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
        # The first average is the weights themselves.
        average = {k: decay * average[k] + (1 - decay) * v for k, v in raw.items()} if average else raw
        for name, value in average.items():
            # Weights of size 1 at 2^-24, a rounding or two a step, 8 steps: 1e-6.
            torch.testing.assert_close(saved[f"ema.{name}"], value, atol=1e-6, rtol=0)


def test_checkpoints_beyond_those_kept_are_removed(tmp_path: Path) -> None:
    folder = run_training(tiny(tmp_path, "run.checkpoint_every=10", "run.keep=2"))
    assert [path.stem[-2:] for path in checkpoints(RunFolder(folder).checkpoints)] == ["30", "40"]


def test_training_continues_from_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    config = tiny(tmp_path, "run.checkpoint_every=10", "run.log_every=5")
    folder = run_training(config)
    whole, before = weights(folder), losses(folder)
    newest = checkpoints(RunFolder(folder).checkpoints)[-1]
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="damaged or cut short"):
        run_training(config)
    assert weights(folder) == whole and losses(folder) == before


def as_a_file(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    return "Not a directory"


def as_a_loop(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)
    return "Too many levels of symbolic links"


def as_a_dangling_link(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.symlink_to("gone")
    return "is a link to gone, which is not there"


def all_cut_short(folder: Path) -> str:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    return "is damaged or cut short"


@pytest.mark.parametrize("break_it", [as_a_file, as_a_loop, as_a_dangling_link, all_cut_short])
def test_checkpoints_that_cannot_be_used_are_not_trained_again_unless_restart_says_so(
    break_it: Callable[[Path], str], tmp_path: Path
) -> None:
    config = tiny(tmp_path, "run.checkpoint_every=10", "run.log_every=5")
    folder = run_training(config)
    whole, before = weights(folder), losses(folder)
    reason = break_it(RunFolder(folder).checkpoints)
    with pytest.raises(UserError, match=reason):
        run_training(config)
    assert losses(folder) == before
    (folder / "evaluations").mkdir()
    (folder / "evaluations/of-the-old-weights.json").touch()
    run_training(config, restart=True)
    assert weights(folder) == whole and losses(folder) == before and not (folder / "evaluations").exists()


def test_too_many_open_files_are_the_reason_and_no_training_begins_again(tmp_path: Path) -> None:
    """safetensors says "no such file" when the process has no file left to open."""
    folder = run_training(tiny(tmp_path))
    script = (
        "import resource, sys; from sitkit.runs.checkpoint import latest_checkpoint; from safetensors import safe_open\n"
        "import torch; from sitkit.runtime.tensors import read_header; files = []\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "try:\n    while True: files.append(open('/dev/null'))\nexcept OSError: pass\n"
        "files[0].close()\n"
        "for free in (True, False):\n"
        "    try: print(latest_checkpoint(sys.argv[1], lambda text: print('passed over', text)))\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "    files[0] = open('/dev/null') if free else None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, RunFolder(folder).checkpoints], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.endswith(".safetensors") or "Too many open files" in first, done.stdout
    assert second.startswith("Unreadable") and "Too many open files" in second, done.stdout


def test_rows_after_the_checkpoint_and_damaged_rows_are_removed(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).metrics
    odd = (
        b'{"step": 7, "loss": "\xff"}\n{"step": "7"}\n{"step": NaN}\n{"step": true}\n' + b"[" * 100_000 + b"\n\0\n[7]\n"
    )
    path.write_bytes(b'{"step": 5}\n' + odd + b'{"step": 10}\n{"step": 15}\n{"ste')
    forget_rows(path, 10)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [5, 10]


def test_the_work_after_a_step_depends_on_the_settings_alone(tmp_path: Path) -> None:
    words = ("train.steps=12", "run.log_every=3", "run.checkpoint_every=5", "run.sample_every=4")
    config = tiny(tmp_path, *words, "train.posthoc=[0.05, 0.1]", "train.posthoc_every=6")
    steps = {name: [k for k in range(1, 13) if getattr(due(config, k), name)] for name in Due._fields}
    assert steps == {
        "log": [3, 5, 6, 9, 10, 12],
        "snapshot": [6, 12],
        "save": [5, 10, 12],
        "preview": [4, 8, 12],
        "last": [12],
    }
    assert not due(tiny(tmp_path, "run.sample_every=0"), 20).preview and not due(tiny(tmp_path), 20).snapshot


def test_previews_are_written_every_sample_every_steps_and_at_the_end(tmp_path: Path) -> None:
    for every, wanted in ((15, ["15", "30", "40"]), (0, ["40"])):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        folder = run_training(tiny(tmp_path / "runs", f"run.sample_every={every}"))
        assert [path.stem[-2:] for path in sorted((folder / "previews").glob("*.png"))] == wanted


def test_a_preview_changes_nothing_of_the_training(tmp_path: Path) -> None:
    few, many = (run_training(tiny(tmp_path / str(n), f"run.sample_every={n}", base="digits")) for n in (0, 3))
    assert all(map(torch.equal, tensors(few).values(), tensors(many).values()))


def settings(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.plain().items() if key != "run"}


def test_a_checkpoint_carries_its_configuration(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    header = read_header(checkpoints(RunFolder(run_training(config)).checkpoints)[-1])
    assert header["step"] == 40 and {k: v for k, v in header["config"].items() if k != "run"} == settings(config)


def test_training_starts_from_another_run(tmp_path: Path) -> None:
    """The initial weights are the averages of the other run; a short name and another network are refused."""
    whole = trained()
    root = copied(whole, tmp_path / "runs").parent
    folder = run_training(tiny(root, f"train.init={whole.name}", "train.steps=1", "train.lr=1e-30"))
    _, given = load_tensors(checkpoints(RunFolder(whole).checkpoints)[-1])
    _, taken = load_tensors(checkpoints(RunFolder(folder).checkpoints)[-1])
    names = [name for name in given if name.startswith("ema.")]
    assert names and all(torch.equal(given[name], taken[name]) for name in names)
    with pytest.raises(UserError, match="must name the run in full"):
        run_training(tiny(root, f"train.init={whole.name.rpartition('-')[2]}", "train.steps=1"))
    before = sorted(root.iterdir())
    with pytest.raises(UserError, match="does not fit the network that train.init"):
        run_training(tiny(root, f"train.init={whole.name}", "train.steps=1", "backbone.hidden_size=24"))
    with pytest.raises(UserError, match="No run 'nowhere'"):
        run_training(tiny(root, "train.init=nowhere", "train.steps=1"))
    assert sorted(root.iterdir()) == before
