"""Executors divide a study among processes and machines: no task is lost or done twice, even if a process dies."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import pytest
from filelock import FileLock
from rich.console import Console
from support import BASE, STUDY, call, finish, read_csv, start, tiny, wait, write_study

from sitkit.cli.live import LiveView
from sitkit.runs.config.sources import read_assignments
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.locks import make_once
from sitkit.runtime.progress import Event, silent
from sitkit.studies.ablate import run_study
from sitkit.studies.executors import InProcess, Local, OnEvent, Ray, TaskEnd, local, perform
from sitkit.studies.executors.local import gpus
from sitkit.studies.scheduler import RETRIES, Work
from sitkit.studies.status import StudyStatus
from sitkit.studies.study_file import read_study
from sitkit.studies.tasks import FAILED, Task, failure, location_of, note, now

# About a second of training with a checkpoint every few steps: long enough to kill it.
LONG = BASE.replace("steps: 30", "steps: 300").replace("checkpoint_every: 5", "checkpoint_every: 25")


def status_of(study: Path) -> StudyStatus:
    return StudyStatus(read_study(study, settings=read_assignments([f"run.folder={study.parent / 'runs'}"])))


def logged(folder: Path, word: str) -> Counter[str]:
    """Return how often each task's log has a word."""
    logs = sorted((folder / "runs").glob("*/logs/*.log"))
    lines = {log: [line.split(" ")[3] for line in log.read_text().splitlines() if line.count(" ") >= 3] for log in logs}
    return Counter({str(log.relative_to(folder)): said.count(word) for log, said in lines.items() if word in said})


def table(folder: Path) -> bytes:
    return (folder / "studies/study/table.csv").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that one process did alone; read only."""
    folder = tmp_path_factory.mktemp("alone")
    result = call("ablate", write_study(folder, base=LONG), "--runs", folder / "runs")
    assert result.status == 0, result.err
    return folder


def test_each_task_starts_once_and_ends_once(alone: Path) -> None:
    assert set(logged(alone, "start").values()) == {1} and logged(alone, "start") == logged(alone, "done")
    assert len(logged(alone, "start")) == 2 + 4


def test_two_workers_one_killed_leave_the_table_of_one_process(alone: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, base=LONG)
    process = start("ablate", study.name, "--workers", "2", cwd=tmp_path)
    logs = tmp_path / "runs"
    wait(process, lambda: len(list(logs.glob("*/checkpoints/step-*.safetensors"))) >= 2)
    log = next(log for log in logs.glob("*/logs/train.log") if "done" not in log.read_text())
    victim = int(log.read_text().split()[2])
    assert victim != process.pid
    os.kill(victim, signal.SIGKILL)
    result = finish(process)
    assert result.status == 0, result.err
    assert "its process ended with SIGKILL" in result.err and "it is begun again" in result.err
    assert table(tmp_path) == table(alone)
    # The task that was killed began twice, every other task once, and two processes did the work.
    twice = {name: times for name, times in logged(tmp_path, "start").items() if times != 1}
    assert list(twice.values()) == [2] and all(name.endswith("train.log") for name in twice)
    assert logged(tmp_path, "died:").keys() == twice.keys()
    assert set(logged(tmp_path, "done").values()) == {1}
    pids = {line.split()[2] for path in logs.glob("*/logs/*.log") for line in path.read_text().splitlines()}
    assert len(pids - {str(process.pid)}) == 3


def test_two_commands_at_once_do_each_task_once(alone: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, base=LONG)
    both = [start("ablate", study.name, cwd=tmp_path) for _ in range(2)]
    ends = [finish(process) for process in both]
    assert [end.status for end in ends] == [0, 0], [end.err for end in ends]
    assert set(logged(tmp_path, "start").values()) == {1} and len(logged(tmp_path, "start")) == 6
    assert table(tmp_path) == table(alone)
    pids = {line.split()[2] for path in tmp_path.glob("runs/*/logs/*.log") for line in path.read_text().splitlines()}
    assert pids == {str(process.pid) for process in both}


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "to_all"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_a_signal_stops_the_workers_after_a_checkpoint_and_the_command_continues(
    alone: Path, tmp_path: Path, sent: signal.Signals, to_all: bool
) -> None:
    study = write_study(tmp_path, base=LONG.replace("checkpoint_every: 25", "checkpoint_every: 100000"))
    process = start("ablate", study.name, "--workers", "2", cwd=tmp_path)
    # Both trainings have done a step: before that there is nothing to save.
    wait(process, lambda: sum(file.stat().st_size > 0 for file in tmp_path.glob("runs/*/metrics.jsonl")) == 2)
    # A cluster sends the signal to the workers too, and the command sends it to them again.
    workers = {int(line.split()[2]) for log in tmp_path.glob("runs/*/logs/*.log") for line in log.open()}
    for pid in workers if to_all else ():
        os.kill(pid, sent)
    process.send_signal(sent)
    result = finish(process)
    assert result.status == 128 + sent and "Continue with: sitkit ablate study.yaml --workers 2" in result.err, (
        result.err
    )
    assert "Traceback" not in result.err + "".join(log.read_text() for log in tmp_path.glob("runs/*/logs/*.log"))
    # Each process that trained has saved its step and ended: no lock is held.
    stopped = logged(tmp_path, "stopped")
    assert stopped and stopped.keys() == {
        name for name in logged(tmp_path, "start") if name not in logged(tmp_path, "done")
    }
    for name in stopped:
        assert list((tmp_path / name).parent.parent.glob("checkpoints/step-*.safetensors"))
        assert make_once((tmp_path / name).with_suffix(".lock"), lambda: False, lambda: None)
    assert finish(start("ablate", study.name, "--workers", "2", cwd=tmp_path)).status == 0
    assert [row["value"] for row in read_csv(tmp_path)] == [row["value"] for row in read_csv(alone)]


def test_a_training_of_another_command_is_left_to_it(tmp_path: Path) -> None:
    config = tiny(tmp_path / "runs", "train.steps=2")
    task = Task("train", config, location_of(config))
    held = FileLock(tmp_path / "runs" / task.place.run / ".lock")
    Path(held.lock_file).parent.mkdir(parents=True)
    with held:
        assert perform(task, now(), silent) == TaskEnd("busy")
    assert perform(task, now(), silent) == TaskEnd("done") and task.done


@pytest.mark.slow
def test_a_training_of_another_process_is_waited_for(tmp_path: Path) -> None:
    """A plain `sitkit train` of a cell's training: the study does the others and comes back to it."""
    study = write_study(tmp_path, base=LONG)
    config = read_study(study).cells[0].config
    other = start("train", "base.yaml", "--interp", "linear", "--sampler", "heun", cwd=tmp_path)
    wait(other, lambda: (tmp_path / "runs" / location_of(config).run / "metrics.jsonl").exists())
    other.send_signal(signal.SIGSTOP)
    process = start("ablate", study.name, cwd=tmp_path)
    wait(process, lambda: logged(tmp_path, "done").total() == 3)
    time.sleep(2)
    assert process.poll() is None
    # The other process dies; the study continues its training.
    other.kill()
    other.communicate()
    assert finish(process).status == 0
    assert logged(tmp_path, "done").total() == 6 and not logged(tmp_path, FAILED)


class Scripted:
    """An executor whose tasks end as a list says; `given` has the names of its tasks."""

    def __init__(self, ends: dict[str, list[TaskEnd]]) -> None:
        self.ends, self.given, self.held = ends, [], []
        self.closed = False

    def takes(self) -> bool:
        return len(self.held) < 2

    def submit(self, task: Task, since: str) -> None:
        self.given.append(task.name)
        self.held.append(task)

    def wait(self, on_event: OnEvent) -> list[tuple[Task, TaskEnd]]:
        if not self.held:
            return []
        task = self.held.pop()
        on_event(task, Event("start", message=task.name))
        return [(task, self.ends[task.name].pop(0) if self.ends.get(task.name) else TaskEnd("done"))]

    def close(self) -> None:
        self.closed = True


def test_a_task_whose_worker_dies_is_tried_three_times(tmp_path: Path) -> None:
    tasks = status_of(write_study(tmp_path)).missing()
    first, second = (task for task in tasks if task.kind == "train")
    died = TaskEnd("died", "its process ended with SIGKILL")
    scripted = Scripted({first.name: [died] * 9, second.name: [died]})
    said: list[Event] = []
    work = Work(tasks, said.append)
    work.do(scripted)
    assert scripted.closed
    assert scripted.given.count(first.name) == 1 + RETRIES and scripted.given.count(second.name) == 2
    # Tasks that wait for it do not begin; the others do.
    assert set(scripted.given) == {first.name, second.name, *(t.name for t in tasks if t.after == second.key)}
    assert work.failed == {first.key: "its process ended with SIGKILL, 3 times."}
    assert {s.state for s in work.statuses.values() if first.key in (s.task.key, s.task.after)} == {"failed"}
    assert said[-1][:3] == ("study", 6, 6)
    assert first.path.read_text().count("died: its process ended with SIGKILL") == 3


def test_no_measurement_begins_before_its_training_and_a_busy_task_is_tried_again(tmp_path: Path) -> None:
    tasks = status_of(write_study(tmp_path)).missing()
    scripted = Scripted({task.name: [TaskEnd("busy")] for task in tasks[:1]})
    Work(tasks).do(scripted)
    for task in tasks:
        if task.after is not None:
            training = next(other for other in tasks if other.key == task.after)
            last = max(i for i, name in enumerate(scripted.given) if name == training.name)
            assert scripted.given.index(task.name) > last
    assert Counter(scripted.given) == Counter([task.name for task in tasks] + [tasks[0].name])


def test_cells_that_were_done_in_another_folder_of_the_same_name_are_an_error(tmp_path: Path) -> None:
    over = read_assignments([f"run.folder={tmp_path / 'runs'}"])
    with pytest.raises(WorkFailed, match="4 cells were done where .* is another folder"):
        run_study(write_study(tmp_path), settings=over, executor=Scripted({}))
    assert {row["value"] for row in read_csv(tmp_path)} == {""}


def test_the_time_left_follows_from_the_pace_of_finished_tasks(tmp_path: Path) -> None:
    tasks = status_of(write_study(tmp_path)).missing()
    work = Work(tasks)
    assert work.seconds_left() is None
    train, *measurements = (work.statuses[task.key] for task in tasks[:3])
    train.state, train.began, train.ended, train.part = "done", 0.0, 10.0, 1.0
    assert work.seconds_left() is None
    sampled = measurements[0]
    sampled.state, sampled.began, sampled.ended, sampled.part = "done", 10.0, 14.0, 1.0
    # One training of 10 s and three measurements of 4 s are left.
    assert work.seconds_left() == pytest.approx(10 + 3 * 4)
    # A training that continues from three quarters and has done an eighth in 5 s goes at 40 s a training.
    train.state, train.ended, train.before, train.part = "begun", 5.0, 0.75, 0.875
    assert work.seconds_left() == pytest.approx((1 + 0.125) * 40 + 3 * 4)


def test_a_failure_is_not_tried_again_by_a_process_that_runs_at_the_same_time(tmp_path: Path) -> None:
    config = tiny(tmp_path / "runs", "train.lr=1e30")
    task, since = Task("train", config, location_of(config)), now()
    first = perform(task, since, silent)
    assert first.how == "failed" and first.reason.startswith("The loss became")
    assert perform(task, since, silent) == first
    assert task.path.read_text().count(" start\n") == 1
    time.sleep(0.002)
    # The next command tries it again.
    assert perform(task, now(), silent).how == "failed" and task.path.read_text().count(" start\n") == 2


def test_an_unexpected_error_is_a_failed_task_with_its_traceback_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path / "runs")
    task = Task("train", config, location_of(config))

    def exhausted(*words: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr("sitkit.training.train._loop", exhausted)
    end = perform(task, now(), silent)
    assert end == TaskEnd("failed", "RuntimeError: CUDA out of memory.\nTried to allocate 2 GiB.")
    text = task.path.read_text()
    assert "Traceback" in text and text.endswith("failed: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB.\n")


def test_a_folder_that_cannot_be_written_is_a_failed_task(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    config = tiny(tmp_path / "runs")
    end = perform(Task("train", config, location_of(config)), now(), silent)
    assert end.how == "failed" and "cannot be written: Not a directory." in end.reason


def talk(pipe: connection.Connection) -> None:
    """A worker whose tasks print."""

    def perform_aloud(record: dict[str, str], progress: object) -> TaskEnd:
        print(record["says"])
        return TaskEnd("done")

    with mock.patch.object(local, "perform_plain", perform_aloud):
        local._worker_main(pipe, None, 1)


def test_the_output_of_a_task_is_in_its_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=talk, args=(theirs,), daemon=True)
    worker.start()
    theirs.close()
    for name in ("first", "second"):
        ours.send({"log": str(tmp_path / f"{name}.log"), "says": name})
        assert ours.recv() == TaskEnd("done")
        assert (tmp_path / f"{name}.log").read_text() == f"{name}\n"
    ours.close()
    worker.join(60)
    assert worker.exitcode == 0


def test_the_last_line_of_a_log_is_what_counts(tmp_path: Path) -> None:
    log, before = tmp_path / "logs/train.log", now()
    assert failure(log, before) is None
    note(log, f"{FAILED} no luck")
    assert failure(log, before) == "no luck" and failure(log, "9999") is None
    note(log, "start")
    assert failure(log, before) is None


def test_workers_take_the_gpus_in_turn_if_the_device_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus("auto") == ["0", "1", "2"] and gpus("cpu") == gpus("cuda:1") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert gpus("cuda") == ["GPU-a", "GPU-b"]


def test_the_live_view_shows_the_state_of_each_cell(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY.replace("label: GVP", "label: GVP\n    columns: {'6': {diffusion: kl}}"))
    plan = read_study(study, settings=read_assignments([f"run.folder={tmp_path / 'runs'}"]))
    status = StudyStatus(plan)
    work = Work(status.missing())
    view = LiveView(status, work)

    def shown() -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        console.print(view)
        return re.sub(r"\s+", " ", console.export_text())

    trains = [s for s in work.statuses.values() if s.task.kind == "train"]
    measures = [s for s in work.statuses.values() if s.task.kind == "measure"]
    assert "Linear │ waiting │ waiting" in shown() and "GVP │ waiting │ failed" in shown()
    trains[0].state = "begun"
    assert "Linear │ queued │ queued" in shown()
    trains[0].event, trains[0].part = Event("train", 12, 30, {"loss": 0.5}), 0.4
    assert "Linear │ training │ training" in shown() and "40% loss 0.5" in shown()
    trains[0].state, measures[0].state, measures[0].event = "done", "begun", Event("sample", 10, 50)
    measures[0].part, measures[1].state, trains[1].state = 0.2, "planned", "elsewhere"
    text = shown()
    assert "Linear │ sampling │ planned" in text and "GVP │ elsewhere" in text and "20%" in text
    assert "cells 0/4 trainings 1/2 1 impossible" in text


def test_the_live_view_shows_names_as_they_are(tmp_path: Path) -> None:
    text = "base: base.yaml\nrows: [{label: '[/row]'}]\ncolumns: {'[/column]': {sampler: heun}}\n"
    status = status_of(write_study(tmp_path, text))
    view = LiveView(status, Work(status.missing()))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(view)
    shown = console.export_text()
    assert "[/row]" in shown and "[/column]" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--executor", "rya"), "--executor rya: no such executor. Did you mean 'ray'?"),
        (("--gpus", "1"), "--gpus 1 belongs to --executor ray"),
    ],
)
def test_impossible_flags_are_refused_before_work(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    result = call("ablate", write_study(tmp_path), "--runs", tmp_path / "runs", *words)
    assert result.status == 2 and message in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "study.yaml"]


def test_under_torchrun_the_error_says_what_to_use_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("ablate", write_study(tmp_path), "--runs", tmp_path / "runs")
    assert result.status == 2 and "use --workers" in result.err


def test_executors_with_nothing_to_do_start_nothing() -> None:
    for executor in (InProcess(), Local(2), Ray()):
        Work([]).do(executor)
        assert executor.wait(lambda task, event: None) == []


def test_a_ray_cluster_that_cannot_be_reached_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ray://127\.0\.0\.1:9 cannot be reached"):
        Work(status_of(write_study(tmp_path)).missing()).do(Ray("ray://127.0.0.1:9"))
    assert not list((tmp_path / "runs").glob("*/logs/*"))


@pytest.mark.slow
def test_a_connected_process_is_an_error_and_a_lost_queue_stops_nothing(tmp_path: Path) -> None:
    import ray

    tasks = status_of(write_study(tmp_path)).missing()
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(UserError, match=r"connected to a Ray cluster already: call ray\.shutdown\(\)"):
            Work(tasks).do(Ray())
    finally:
        ray.shutdown()
    executor = Ray(workers=1)
    executor.submit(tasks[0], now())
    try:
        ray.kill(executor._queue.actor)
        ended: list[tuple[Task, TaskEnd]] = []
        while not ended:
            ended = executor.wait(lambda task, event: None)
        assert ended == [(tasks[0], TaskEnd("done"))] and tasks[0].done
    finally:
        executor.close()


@pytest.mark.slow
def test_on_ray_with_a_worker_killed_the_table_is_that_of_one_process(alone: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, base=LONG)
    process = start("ablate", study.name, "--executor", "ray", "--workers", "2", cwd=tmp_path)
    logs = tmp_path / "runs"
    wait(process, lambda: len(list(logs.glob("*/checkpoints/step-*.safetensors"))) >= 2)
    log = next(log for log in logs.glob("*/logs/train.log") if "done" not in log.read_text())
    os.kill(int(log.read_text().split()[2]), signal.SIGKILL)
    result = finish(process)
    assert result.status == 0, result.err
    assert "it is begun again" in result.err
    assert table(tmp_path) == table(alone)
    assert sorted(logged(tmp_path, "start").values()) == [1, 1, 1, 1, 1, 2]
    assert set(logged(tmp_path, "done").values()) == {1}
