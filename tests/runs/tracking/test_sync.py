"""MLflow has the content of the run folder, each point once, after kills, resumed trainings and outages."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sitkit.runs.tracking import sync as tracking
from sitkit.runs.tracking.store import make_client, tracking_uri
from sitkit.runs.tracking.sync import Status, TrackedRun, catch_up, is_sent, run_id, send_run
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.files import read_json, write_json

if sys.platform == "win32":
    pytest.skip("forks", allow_module_level=True)

T0 = 1_700_000_000.0


@dataclasses.dataclass(frozen=True)
class Made:
    database: Path
    exits: list[int]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store that two processes created at the same moment.  Once for all tests: creating one takes 2 s."""
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    make_client("http://127.0.0.1")  # Imports mlflow, so that the two need not.
    uri = f"sqlite:///{database}"
    children = [fork(lambda name=name: make_client(uri).create_experiment(name)) for name in "ab"]
    return Made(database, [os.waitpid(child, 0)[1] for child in children])


def fork(work: Callable[[], object]) -> int:
    """Return the id of a process that calls `work` and exits with 0, or with 1 after an exception."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.fixture(scope="session")
def template(made: Made) -> Path:
    return made.database


@pytest.fixture
def store(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty store that MLFLOW_TRACKING_URI names, in a folder with a space."""
    (tmp_path / "a store").mkdir()
    shutil.copy(template, tmp_path / "a store" / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/a store/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def log(folder: Path, steps: range, *, moment: float = T0, **more: Any) -> None:
    """Append lines as a training does; `moment` differs between two attempts at the same step."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "time": moment + step, "loss": 1 / (1 + step), "rate": step} | more))
            file.write("\n")


def client(uri: str) -> Any:
    return make_client(uri)


def runs(uri: str) -> list[Any]:
    numbers = [e.experiment_id for e in client(uri).search_experiments()]
    return client(uri).search_runs(numbers)


def points(uri: str, folder: Path, key: str) -> list[tuple[int, float]]:
    return sorted((p.step, p.value) for p in client(uri).get_metric_history(run_id(folder), key))


def check_whole(uri: str, folder: Path, steps: int) -> None:
    """One run, and each step's point of each metric once."""
    assert len(runs(uri)) == 1
    assert points(uri, folder, "loss") == [(s, 1 / (1 + s)) for s in range(steps)]
    assert points(uri, folder, "rate") == [(s, s) for s in range(steps)]


def check_complete(uri: str, folder: Path, steps: int, resumed: int) -> None:
    """One run with every step: once before the step at which the training resumed, at most twice after it."""
    assert len(runs(uri)) == 1
    for key, expected in (("loss", [(s, 1 / (1 + s)) for s in range(steps)]), ("rate", [(s, s) for s in range(steps)])):
        sent = points(uri, folder, key)
        assert sorted(set(sent)) == expected
        assert max(map(sent.count, expected[:resumed])) == 1 and max(map(sent.count, expected)) <= 2


def sent_bytes(folder: Path) -> int:
    path = folder / "tracking.json"
    return read_json(path)["offset"] if path.exists() else 0


def cut_back(folder: Path, steps: int) -> None:
    """Remove the lines after a checkpoint, as a resumed training does."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    os.truncate(folder / "metrics.jsonl", sum(map(len, lines[:steps])))


def wait_for(condition: Callable[[], bool], seconds: float = 30.0, pause: float = 0.01) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(pause)


# What is sent


def test_a_run_arrives_whole_and_once(store: str, folder: Path) -> None:
    log(folder, range(3))
    (folder / "config.yaml").write_text("lr: 1e-4\n")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "1.png").write_bytes(b"one")
    tracked = TrackedRun(
        folder,
        "gvp",
        params={"lr": 1e-4, "target": "score", "flip": True, "none": None},
        tags={"identity": "abc"},
        patterns=("config.yaml", "pictures/*.png", "not there yet.png"),
    )
    for _ in range(2):
        send_run(tracked)
    check_whole(store, folder, 3)
    run = client(store).get_run(run_id(folder))
    assert run.info.run_name == "gvp" and run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.0001", "target": "score", "flip": "true", "none": "null"}
    assert run.data.tags["identity"] == "abc"
    first = client(store).get_metric_history(run_id(folder), "loss")[1]
    assert first.timestamp == round((T0 + 1) * 1000)
    assert run.info.start_time == round(T0 * 1000)

    cursor = (folder / "tracking.json").read_bytes()
    send_run(tracked)
    assert (folder / "tracking.json").read_bytes() == cursor, "a sync with nothing new sends nothing"

    log(folder, range(3, 5))
    (folder / "pictures" / "1.png").write_bytes(b"another")
    send_run(tracked, "FINISHED")
    check_whole(store, folder, 5)
    run = client(store).get_run(run_id(folder))
    assert run.info.status == "FINISHED"
    assert run.info.end_time == int((folder / "metrics.jsonl").stat().st_mtime * 1000)
    place = Path(client(store).download_artifacts(run.info.run_id, ""))
    assert (place / "pictures" / "1.png").read_bytes() == b"another"
    assert (place / "config.yaml").read_text() == "lr: 1e-4\n"

    send_run(dataclasses.replace(tracked, params={"lr": 2e-4}))
    run = client(store).get_run(run_id(folder))
    assert run.info.status == "RUNNING"
    assert run.data.params["lr"] == "0.0001" and run.data.tags["changed.lr"] == "0.0002"


def test_values_that_mlflow_would_refuse_are_adapted(store: str, folder: Path) -> None:
    log(folder, range(1), **{"fid@50k": 1.5, "a//b": 2, "../c": 3, "deep/key": 4, "nothing": None})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "time": T0, "loss": "NaN", "rate": "-Infinity", "note": "text"}) + "\n")
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 6001, "fits": "x" * 6000, "k€y": 1}
    send_run(TrackedRun(folder, "n", params=params, tags={"long": "y" * 9000}))
    run = client(store).get_run(run_id(folder))
    assert len(run.data.params) == 253
    assert run.data.params["fits"] == "x" * 6000 and run.data.params["k_y"] == "1"
    assert len(run.data.params["long"]) == 6000 and run.data.params["long"].endswith("x ... (cut)")
    assert len(run.data.tags["long"]) == 8000
    for key, value in {"fid_50k": 1.5, "a/b": 2, "c": 3, "deep/key": 4}.items():
        assert run.data.metrics[key] == value
    assert "nothing" not in run.data.metrics and "note" not in run.data.metrics
    assert math.isnan(run.data.metrics["loss"])
    assert run.data.metrics["rate"] == -sys.float_info.max, "MLflow keeps infinity as the largest number"
    before = {key: len(points(store, folder, key)) for key in run.data.metrics}
    write_json(folder / "tracking.json", read_json(folder / "tracking.json") | {"offset": 0, "last": ""})
    send_run(TrackedRun(folder, "n", params=params))
    assert {key: len(points(store, folder, key)) for key in run.data.metrics} == before


def test_a_link_out_of_the_folder_is_not_sent(store: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (folder / "a.png").write_text("y")
    (folder / "b.png").symlink_to("a.png")
    (folder / "c.png").symlink_to(tmp_path / "secret")
    log(folder, range(1))
    send_run(TrackedRun(folder, "n"))
    assert sorted(file.path for file in client(store).list_artifacts(run_id(folder))) == ["a.png", "b.png"]


def test_a_curve_longer_than_one_call_arrives_whole(store: str, folder: Path) -> None:
    wide = {f"class/{i}": float(i) for i in range(2300)}
    log(folder, range(1), **wide)
    log(folder, range(1, 1200))
    send_run(TrackedRun(folder, "n"))
    check_whole(store, folder, 1200)
    metrics = client(store).get_run(run_id(folder)).data.metrics
    assert all(metrics[key] == value for key, value in wide.items())


def test_invalid_lines_are_named_and_the_rest_is_sent(store: str, folder: Path) -> None:
    log(folder, range(1))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "ti{"torn\n[1]\n{"time": 3.0, "loss": 1}\n\xff\xfe\n')
        file.write(
            b'{"step": 1, "time": NaN}\n{"step": 1, "time": 1e300}\n{"step": 1e30, "time": 1}\n'
            + b"[" * 100_000
            + b"\n"
        )
    log(folder, range(1, 2))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 1700000002.0, "lo')
    messages: list[str] = []
    send_run(TrackedRun(folder, "n"), on_warning=messages.append)
    check_whole(store, folder, 2)
    assert len(messages) == 8 and all("metrics.jsonl has a line" in text for text in messages)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'ss": {1 / 3}, "rate": 2}}\n')
    send_run(TrackedRun(folder, "n"), on_warning=messages.append)
    check_whole(store, folder, 3)
    assert len(messages) == 8


def test_a_child_run_is_nested(store: str, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "study").mkdir()
    assert run_id(tmp_path / "study") is None
    send_run(TrackedRun(tmp_path / "study", "study"))
    send_run(TrackedRun(folder, "cell", parent=run_id(tmp_path / "study")))
    assert client(store).get_run(run_id(folder)).data.tags["mlflow.parentRunId"] == run_id(tmp_path / "study")


def test_children_are_nested_once_and_tagged(store: str, tmp_path: Path, folder: Path) -> None:
    """A training that two studies share stays under the first, and has the tags of both."""
    (tmp_path / "unsent").mkdir()
    log(folder, range(2))
    send_run(TrackedRun(folder, "training"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tags = {folder: {f"sitkit.study.{name}": "true"}, tmp_path / "unsent": {"a": "b"}, tmp_path / "missing": {}}
        send_run(TrackedRun(tmp_path / name, name, children=tags))
    tags = client(store).get_run(run_id(folder)).data.tags
    assert tags["mlflow.parentRunId"] == run_id(tmp_path / "one")
    assert tags["sitkit.study.one"] == tags["sitkit.study.two"] == "true"
    assert len(runs(store)) == 3


def test_children_that_were_missed_are_sent_with_their_parent(
    store: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    messages: list[str] = []
    (folder / "grid.png").write_bytes(b"png")
    training = TrackedRun(folder, "training", params={"lr": 1}, tags={"kind": "training"})
    with Tracker(training, on_warning=messages.append):
        log(folder, range(3))
    assert len(messages) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "study").mkdir()
    study = TrackedRun(tmp_path / "study", "study", children={folder: {"row": "GVP"}})
    with Tracker(study, on_warning=messages.append):
        pass
    assert len(messages) == 1 and len(runs(store)) == 2
    assert points(store, folder, "loss") == [(s, 1 / (1 + s)) for s in range(3)]
    run = client(store).get_run(run_id(folder))
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1"}
    assert (
        run.data.tags | {"kind": "training", "row": "GVP", "mlflow.parentRunId": run_id(tmp_path / "study")}
        == run.data.tags
    )
    assert [a.path for a in client(store).list_artifacts(run_id(folder))] == ["grid.png"]
    # Whole, it is not sent again, and no server is asked.
    monkeypatch.setattr(tracking, "_Sync", lambda *a, **k: pytest.fail("sent again"))
    assert not tracking.catch_up(folder)
    log(folder, range(3, 4))
    with pytest.raises(pytest.fail.Exception):
        tracking.catch_up(folder)


def test_the_mlflow_model_of_a_run_draws_the_samples_of_the_run(store: str, tmp_path: Path) -> None:
    import numpy as np
    import pandas as pd
    import torch
    from mlflow.models import get_model_info
    from mlflow.pyfunc import load_model
    from support import copied, trained

    import sitkit
    from sitkit.runs.sample import draw_samples

    run = copied(trained("points"), tmp_path / "runs")
    statuses: list[Status] = ["RUNNING", "FINISHED", "FINISHED"]
    for status in statuses:
        send_run(TrackedRun(run, "n", patterns=(), model=(2,)), status)
        kept = [a.path for a in client(store).list_artifacts(run_id(run))]
        assert kept == ([] if status == "RUNNING" else ["model"])
    place = client(store).download_artifacts(run_id(run), "model")
    signature = get_model_info(place).signature
    assert signature.inputs.input_names() == ["index", "label"]
    assert [spec.shape for spec in signature.outputs.inputs] == [(-1, 2)]
    assert not [path for path in Path(place).rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    samples = draw_samples(sitkit.load(run)).x[:5]
    classes = sitkit.load(run).examples.num_classes
    model = load_model(place)
    inputs = pd.DataFrame({"index": np.arange(5), "label": np.full(5, classes)})
    assert torch.allclose(torch.from_numpy(model.predict(inputs)), samples, atol=1e-5)


# Kills, resumes and lost stores


@pytest.mark.parametrize("written", ["before", "after creation"])
def test_a_kill_between_sending_and_the_cursor_duplicates_nothing(store: str, folder: Path, written: str) -> None:
    """The state on disk after such a kill is the cursor from before, with everything in the store."""
    log(folder, range(40))
    send_run(TrackedRun(folder, "n"))
    cursor = read_json(folder / "tracking.json")
    log(folder, range(40, 100))
    send_run(TrackedRun(folder, "n"))
    if written == "after creation":
        cursor = dataclasses.asdict(tracking.Cursor(cursor["token"]))
    write_json(folder / "tracking.json", cursor)
    log(folder, range(100, 110))
    send_run(TrackedRun(folder, "n"))
    check_whole(store, folder, 110)


@pytest.mark.parametrize("sent", [40, 90, 100])
@pytest.mark.parametrize("grown", [71, 100, 140])
@pytest.mark.parametrize("looked", [True, False])
def test_the_file_of_a_resumed_training_is_sent_again(
    store: str, folder: Path, sent: int, grown: int, looked: bool
) -> None:
    """A kill at step 100, the cursor written at `sent`, everything in the store; training goes on from step 70.

    The second attempt's lines are shorter, so that an offset from the first falls beyond their steps.
    """
    log(folder, range(sent), moment=T0 + 0.123456)
    send_run(TrackedRun(folder, "n"))
    cursor = read_json(folder / "tracking.json")
    log(folder, range(sent, 100), moment=T0 + 0.123456)
    send_run(TrackedRun(folder, "n"))
    if sent < 100:
        write_json(folder / "tracking.json", cursor)
    cut_back(folder, 70)
    messages: list[str] = []
    if looked:
        send_run(TrackedRun(folder, "n"), on_warning=messages.append)
    log(folder, range(70, grown), moment=T0 + 5000)
    send_run(TrackedRun(folder, "n"), on_warning=messages.append)
    send_run(TrackedRun(folder, "n"), on_warning=messages.append)
    assert messages == []
    check_complete(store, folder, max(grown, 100), resumed=70)


def kill_once_seen(store: str, folder: Path, table: str) -> None:
    """Kill a sync as soon as another connection sees a new row, mostly before the sync writes its cursor."""

    def send() -> None:
        os.nice(19)
        send_run(TrackedRun(folder, "n"))

    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as look:
        count = f"SELECT count(*) FROM {table}"
        before = look.execute(count).fetchone()
        child = fork(send)
        wait_for(lambda: look.execute(count).fetchone() != before, pause=0)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_real_kill_as_soon_as_the_run_exists_leaves_one_run(store: str, tmp_path: Path) -> None:
    """Three times, because one kill in two comes too late to matter."""
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        log(folder, range(3))
        kill_once_seen(store, folder, "runs")
        send_run(TrackedRun(folder, "n"))
        assert len(runs(store)) == number + 1
        assert len(points(store, folder, "loss")) == 3


def test_a_real_kill_as_soon_as_points_arrive_loses_nothing(store: str, folder: Path) -> None:
    """The training then resumes from an earlier step and logs the same steps at other times."""
    log(folder, range(50))
    send_run(TrackedRun(folder, "n"))
    log(folder, range(50, 500))
    kill_once_seen(store, folder, "metrics")
    cut_back(folder, 100)
    log(folder, range(100, 600), moment=T0 + 5000)
    send_run(TrackedRun(folder, "n"))
    check_complete(store, folder, 600, resumed=100)


def test_real_kills_at_random_moments_duplicate_nothing(store: str, folder: Path) -> None:
    log(folder, range(6000))
    sent = []
    for pause in (0.02, 0.15, 0.3, 0.6):
        child = fork(lambda: send_run(TrackedRun(folder, "n")))
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sent.append(sent_bytes(folder))
    send_run(TrackedRun(folder, "n"))
    check_whole(store, folder, 6000)
    assert sent == sorted(sent)


def test_a_store_that_lost_the_run_receives_it_again(store: str, folder: Path, template: Path) -> None:
    log(folder, range(5))
    send_run(TrackedRun(folder, "n"))
    lost = run_id(folder)
    shutil.copy(template, store.removeprefix("sqlite:///"))
    log(folder, range(5, 8))
    send_run(TrackedRun(folder, "n"))
    check_whole(store, folder, 8)
    assert run_id(folder) != lost
    client(store).delete_run(run_id(folder))
    send_run(TrackedRun(folder, "n"))
    check_whole(store, folder, 8)


def test_another_store_receives_the_whole_run_and_the_first_continues(
    store: str, folder: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(folder, range(5))
    send_run(TrackedRun(folder, "n"))
    shutil.copy(template, tmp_path / "other.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    send_run(TrackedRun(folder, "n"))
    check_whole(f"sqlite:///{tmp_path}/other.db", folder, 5)
    assert read_json(folder / "tracking.json")["uri"] == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    log(folder, range(5, 7))
    send_run(TrackedRun(folder, "n"))
    check_whole(store, folder, 7)


def test_a_store_that_is_deleted_during_the_work_is_created_again(
    folder: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default store: mlflow.db in the current directory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(template, tmp_path / "mlflow.db")
    log(folder, range(3))
    for _ in range(2):
        send_run(TrackedRun(folder, "n"))
        assert {p.name for p in tmp_path.glob("mlflow.db*")} == {"mlflow.db", "mlflow.db.lock"}
        # Not through MLflow, which would read from the deleted file what it wrote there.
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as look:
            assert look.execute("SELECT count(*) FROM metrics").fetchone() == (6,)
        (tmp_path / "mlflow.db").unlink()


def test_two_processes_may_create_the_store_at_once(made: Made) -> None:
    assert made.exits == [0, 0]
    assert {p.name for p in made.database.parent.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
    experiments = client(f"sqlite:///{made.database}").search_experiments()
    assert {"a", "b"} <= {experiment.name for experiment in experiments}, "one's store took the place of the other's"


def test_processes_may_send_at_once_also_the_same_run(store: str, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(2)]
    for folder in folders:
        folder.mkdir()
        log(folder, range(3))
    children = [
        fork(lambda folder=folder: send_run(TrackedRun(folder, folder.name))) for folder in [*folders, *folders]
    ]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    assert len(runs(store)) == 2
    assert all(len(points(store, folder, "loss")) == 3 for folder in folders)


def test_one_sync_of_a_folder_waits_for_another(store: str, folder: Path) -> None:
    from filelock import FileLock

    with FileLock(folder / "tracking.lock"):
        child = fork(lambda: send_run(TrackedRun(folder, "n")))
        time.sleep(0.5)
        assert not (folder / "tracking.json").exists()
    assert os.waitpid(child, 0)[1] == 0
    check_whole(store, folder, 0)


# The thread


def test_the_tracker_sends_while_the_block_runs_and_at_its_end(store: str, folder: Path) -> None:
    messages: list[str] = []
    with Tracker(TrackedRun(folder, "n"), interval=0.05, on_warning=messages.append):
        log(folder, range(3))
        wait_for(lambda: sent_bytes(folder) > 0)
        log(folder, range(3, 6))
        (folder / "grid.png").write_bytes(b"png")
    assert messages == []
    check_whole(store, folder, 6)
    run = client(store).get_run(run_id(folder))
    assert run.info.status == "FINISHED"
    assert [a.path for a in client(store).list_artifacts(run.info.run_id)] == ["grid.png"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")])
def test_the_end_of_the_block_is_the_status(store: str, folder: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), Tracker(TrackedRun(folder, "n")):
        raise error
    assert client(store).get_run(run_id(folder)).info.status == status


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_server_that_is_down_is_one_warning_and_receives_the_rest_later(
    store: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
    messages: list[str] = []
    start = time.monotonic()
    with Tracker(TrackedRun(folder, "n"), interval=0.01, on_warning=messages.append):
        log(folder, range(4))
        time.sleep(0.2)
    # Refused twice with a pause of up to 1 s of MLflow's own between; at most three syncs are begun.
    assert time.monotonic() - start < 10
    assert len(messages) == 1 and f"http://{address}" in messages[0] and "later" in messages[0]
    everything = messages[0] + "".join(p.read_text() for p in folder.iterdir() if p.is_file())
    assert "secret" not in everything
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with Tracker(TrackedRun(folder, "n"), on_warning=messages.append):
        pass
    assert len(messages) == 1
    check_whole(store, folder, 4)


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_never_answers_delays_the_work_by_the_patience_only(
    drips: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It accepts and says nothing, or it sends a byte of its answer from time to time."""
    messages: list[str] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        if drips:
            threading.Thread(target=drip, args=(server,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker = Tracker(TrackedRun(folder, "n"), patience=0.5, on_warning=messages.append)
        with tracker:
            start = time.monotonic()
        assert time.monotonic() - start < 1.5
        assert len(messages) == 1 and ("no whole answer within 0.5 s" in messages[0] or "timed out" in messages[0])
    if not drips:
        wait_for(lambda: not tracker._thread.is_alive())
        assert len(messages) == 1


def drip(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection = server.accept()[0]
            threading.Thread(target=trickle, args=(connection,), daemon=True).start()


def trickle(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100:
            connection.send(bytes([byte]))
            time.sleep(0.1)


def test_the_state_of_a_run_that_ended_meanwhile_is_not_sent_over_its_end(store: str, folder: Path) -> None:
    """A study catches up with a training that ends at this moment: the status is read when its turn has come."""
    tracked = TrackedRun(folder, "n")
    tracked.write("RUNNING")
    log(folder, range(2))
    with FileLock(folder / "tracking.lock"):
        late = threading.Thread(target=catch_up, args=(folder,))
        late.start()
        time.sleep(0.5)
        tracked.write("FINISHED")
    late.join()
    assert client(store).get_run(run_id(folder)).info.status == "FINISHED"


@pytest.mark.parametrize("name", ["my%20 runs", "a?b", "a#b", "50% sure", "run:@x"])
def test_a_folder_of_any_name_holds_the_store(
    name: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left beside it: some characters mean something else in the address of a database."""
    (tmp_path / "place" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "place" / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    messages: list[str] = []
    with Tracker(TrackedRun(folder, "n"), on_warning=messages.append):
        log(folder, range(2))
    assert messages == [] and [path.name for path in (tmp_path / "place").iterdir()] == [name]
    check_whole(tracking_uri(), folder, 2)
    assert Path("mlflow.db").is_file() and is_sent(folder)


def test_a_run_whose_end_was_not_sent_is_not_complete(store: str, folder: Path) -> None:
    """A kill just before the status is sent: everything else is there, and the next command sends the status."""
    tracked = TrackedRun(folder, "n")
    tracked.write("RUNNING")
    log(folder, range(2))
    send_run(tracked, "RUNNING")
    assert is_sent(folder)
    tracked.write("FINISHED")
    assert not is_sent(folder) and catch_up(folder)
    assert is_sent(folder) and client(store).get_run(run_id(folder)).info.status == "FINISHED"
    cursor = read_json(folder / "tracking.json")
    write_json(folder / "tracking.json", {key: value for key, value in cursor.items() if key != "status"})
    assert not is_sent(folder) and catch_up(folder) and is_sent(folder)


@pytest.mark.parametrize("name", ["tracking.json", "tracked.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{}", b"[1]", b'{"token": 1}', b"[" * 10_000, b'{"name": "n", "status": "GONE"}']
)
def test_a_damaged_record_of_the_tracking_is_named_and_stops_nothing(
    store: str, tmp_path: Path, name: str, content: bytes
) -> None:
    parent, child = tmp_path / "parent", tmp_path / "parent" / "child"
    child.mkdir(parents=True)
    log(parent, range(2))
    log(child, range(2))
    TrackedRun(child, "child").write("FINISHED")
    send_run(TrackedRun(child, "child"), "FINISHED")
    (child / name).write_bytes(content)
    assert not is_sent(child)
    messages: list[str] = []
    with Tracker(TrackedRun(parent, "parent", children={child: {}}), on_warning=messages.append):
        pass
    assert len(messages) == 1 and str(child / name) in messages[0], messages
    assert client(store).get_run(run_id(parent)).info.status == "FINISHED" and is_sent(parent)
    with Tracker(TrackedRun(child, "child"), on_warning=messages.append):
        pass
    assert (name == "tracked.json") == (len(messages) == 1), messages


def test_a_database_is_waited_for(store: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the tables takes a minute on a busy machine; the run is complete at the end of the block."""
    slow = tracking.send_run

    def later(*args: Any, **named: Any) -> None:
        time.sleep(1.5)
        slow(*args, **named)

    monkeypatch.setattr("sitkit.runs.tracking.tracker.send_run", later)
    with Tracker(TrackedRun(folder, "n"), patience=0.1):
        log(folder, range(2))
    check_whole(store, folder, 2)
    assert client(store).get_run(run_id(folder)).info.status == "FINISHED"


def test_a_tracker_that_is_not_enabled_does_nothing_and_imports_nothing(folder: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from sitkit.runs.tracking.sync import TrackedRun
        from sitkit.runs.tracking.tracker import Tracker
        with Tracker(TrackedRun(Path(sys.argv[1]), "n"), enabled=False):
            pass
        assert not {"mlflow", "filelock", "torch"} & set(sys.modules), sorted(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert list(folder.iterdir()) == []


# A server


@pytest.fixture
def serve(tmp_path: Path, template: Path) -> Iterator[Callable[[], Callable[[], None]]]:
    """Starts `mlflow server` on one port, several times; each start returns a function that stops it."""
    shutil.copy(template, tmp_path / "server.db")
    port = free_port()
    alive: list[subprocess.Popen[bytes]] = []

    def start() -> Callable[[], None]:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db"]
        command += ["--artifacts-destination", str(tmp_path / "served")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        alive.append(process)

        def up() -> bool:
            assert process.poll() is None
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(up, 60)

        def stop() -> None:
            alive.remove(process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        return stop

    start.uri = f"http://127.0.0.1:{port}"  # pyright: ignore[reportFunctionMemberAccess]
    yield start
    for process in alive:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back(serve: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", serve.uri)
    stop = serve()
    messages: list[str] = []
    with Tracker(TrackedRun(folder, "n", params={"lr": 1e-4}), interval=0.2, on_warning=messages.append):
        log(folder, range(5))
        (folder / "grid.png").write_bytes(b"png")
        wait_for(
            lambda: (folder / "tracking.json").exists() and len(read_json(folder / "tracking.json")["artifacts"]) == 1
        )
        stop()
        log(folder, range(5, 10))
        wait_for(lambda: len(messages) == 1)
        assert serve.uri in messages[0]
        serve()
        log(folder, range(10, 12))
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 12, "time": T0, "fid": "NaN", "kid": "Infinity"}) + "\n")
    assert len(messages) == 1
    check_whole(serve.uri, folder, 12)
    run = client(serve.uri).get_run(run_id(folder))
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.0001"}
    assert math.isnan(run.data.metrics["fid"]) and run.data.metrics["kid"] == sys.float_info.max
    assert [a.path for a in client(serve.uri).list_artifacts(run.info.run_id)] == ["grid.png"]
