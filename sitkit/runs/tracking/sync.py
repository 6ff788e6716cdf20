"""MLflow receives what the run folder holds.

metrics.jsonl on disk is the source of truth; a cursor beside it (tracking.json) records how much of it was sent.  So no
point is lost while the server is down or after a kill: the next `send_run` sends the rest.  mlflow is imported only when
something is sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sitkit.runs.config.records import CursorRecord, TrackedRecord
from sitkit.runs.tracking import store
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_record, read_row, to_json, write_json

if TYPE_CHECKING:
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

METRICS = "metrics.jsonl"
CURSOR, TRACKED = "tracking.json", "tracked.json"
RUN_ARTIFACTS = ("config.yaml", "environment.json", "**/*.png")
TOKEN, PARENT = "sitkit.token", "mlflow.parentRunId"
MODEL = "model"

# MLflow's own limits.
METRICS_A_CALL, ENTRIES_A_CALL = 1000, 100
LONGEST_PARAM, LONGEST_TAG = 6000, 8000
CUT = " ... (cut)"
SEND_AGAIN = "Remove it: the run is then sent again, as a new one."
# Seconds; making a database takes a minute on a busy machine.
LONGEST_SYNC = 600.0
# A time in seconds, and a number, that MLflow can hold.
LATEST, LARGEST = 10**11, 10**308
# Lines of metrics.jsonl between two writes of the cursor.
LINES_A_GROUP = 250


@dataclass(frozen=True)
class TrackedRun:
    """A folder that MLflow shows as a run.

    Args:
        folder: the folder; a relative path is made absolute.
        name: the name of the run.
        experiment: the experiment in MLflow.
        params: parameters by name.
        tags: tags by name.
        patterns: patterns of the files in the folder that are sent; a file that changes is sent again.
        parent: the id of the run under which MLflow shows this one (`run_id`).
        children: folders whose runs MLflow shows under this one, with tags for each.  A child inside another child's
            folder goes under that child; a run that has a parent already keeps it.
        model: the shape of a sample, if MLflow keeps the trained run as a model when it is finished.
    """

    folder: Path
    name: str
    experiment: str = "sitkit"
    params: Mapping[str, Any] | None = None
    tags: Mapping[str, Any] | None = None
    patterns: Sequence[str] = RUN_ARTIFACTS
    parent: str | None = None
    children: Mapping[Path, Mapping[str, Any]] | None = None
    model: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder).resolve())

    @property
    def files(self) -> list[Path]:
        """The files of the folder that match a pattern, sorted; a link out of the folder is left out."""
        found = {path for pattern in self.patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.resolve().is_relative_to(self.folder))

    def write(self, status: Status) -> None:
        """Write the description and a status to tracked.json, from which `catch_up` sends the run."""
        record = {key: value for key, value in vars(self).items() if key not in ("folder", "children")}
        write_json(self.folder / TRACKED, record | {"status": status})


@dataclass(frozen=True)
class Cursor:
    """The part of a run folder that MLflow has.

    token: a tag of the run in any store, by which it is found before its id is written down.
    uri, run: the address of the store and MLflow's id of the run.
    offset, last: the length of metrics.jsonl that was sent, and the line that ends there.
    artifacts: the [size, mtime_ns] that was sent of each path.
    status: the status of the run in the store.
    """

    token: str
    uri: str = ""
    run: str = ""
    offset: int = 0
    last: str = ""
    artifacts: Mapping[str, list[int]] = field(default_factory=dict)
    status: str = ""


def run_id(folder: str | Path) -> str | None:
    """Return MLflow's id of the run of a folder (for `parent`), or None if it was never sent or its record is damaged."""
    with contextlib.suppress(UserError):
        return (_read_cursor(Path(folder)).run or None) if (Path(folder) / CURSOR).exists() else None
    return None


def send_run(
    tracked: TrackedRun,
    status: Status = "RUNNING",
    *,
    uri: str | None = None,
    on_warning: Callable[[str], object] = warnings.warn,
) -> None:
    """Send the part of a run folder that MLflow lacks; a second call sends nothing twice.

    A line of metrics.jsonl is {"step": int, "time": seconds since 1970, name: number, ...}.  A point keeps the time of
    its line, so that a line that is sent twice, as after a kill, is one point in a database.  Any other line is skipped
    with a warning.  A resumed training cuts the file back: the file is then sent again from its start, and the steps that
    were trained twice have two points.  A store that does not know the run gets all of it.  MLflow never changes a
    parameter: a value that differs later becomes the tag "changed.<name>".

    Any error of MLflow is raised; nothing is lost by it.
    """
    uri = uri or store.tracking_uri()
    with _alone(tracked.folder, uri):
        _Sync(tracked, uri).send(status, on_warning)


def _alone(folder: Path, uri: str) -> FileLock:
    """Return the lock of the sync of a folder; other commands on it, and a sync that was abandoned at exit, may hold it."""
    from filelock import FileLock

    return FileLock(folder / "tracking.lock", timeout=LONGEST_SYNC if store.is_local(uri) else store.SERVER_TIMEOUT)


def catch_up(
    folder: str | Path, *, uri: str | None = None, on_warning: Callable[[str], object] = warnings.warn
) -> bool:
    """Send the unsent part of a folder that a `Tracker` keeps.  Returns whether anything was unsent.

    Any error of MLflow is raised; nothing is lost by it.
    """
    if not (Path(folder) / TRACKED).exists() or is_sent(folder, uri=uri):
        return False
    uri = uri or store.tracking_uri()
    with _alone(Path(folder), uri):
        # Read under the lock: the command that tracks the folder may have ended meanwhile.
        tracked, status = _read_tracked(Path(folder))
        _Sync(tracked, uri).send(status, on_warning)
    return True


def is_sent(folder: str | Path, *, uri: str | None = None) -> bool:
    """Whether MLflow has all of a folder that a `Tracker` keeps, by undamaged records of it.  mlflow is not imported."""
    if not (Path(folder) / TRACKED).exists():
        return False
    try:
        tracked, status = _read_tracked(Path(folder))
        cursor, metrics = _read_cursor(tracked.folder), tracked.folder / METRICS
    except UserError:
        return False
    return (
        bool(cursor.run)
        and cursor.status == status
        and cursor.uri == store.public(uri or store.tracking_uri())
        and cursor.offset == (metrics.stat().st_size if metrics.exists() else 0)
        and all(cursor.artifacts.get(_place(path, tracked.folder)) == _stamp(path) for path in tracked.files)
    )


def _read_tracked(folder: Path) -> tuple[TrackedRun, Status]:
    record = read_record(folder / TRACKED, TrackedRecord, "the description of a tracked run", SEND_AGAIN)
    status = record.pop("status")
    return TrackedRun(folder, **record), status


def _read_cursor(folder: Path) -> Cursor:
    path = folder / CURSOR
    if not path.exists():
        # On disk before the run exists in the store, or a kill between the two would leave a second run.
        write_json(path, dataclasses.asdict(Cursor(uuid.uuid4().hex)))
    # Release 0.1 wrote more keys.
    record = read_record(path, CursorRecord, "the record of what MLflow has", SEND_AGAIN)
    return Cursor(**{key: value for key, value in record.items() if key in Cursor.__dataclass_fields__})


def _place(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _text(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else to_json(value)
    return text if len(text) <= longest else text[: longest - len(CUT)] + CUT


def _lines(path: Path, offset: int) -> Iterator[bytes]:
    """Yield the whole lines after an offset; a line that is still being written waits for the next call."""
    if path.exists():
        with path.open("rb") as file:
            file.seek(offset)
            yield from (line for line in file if line.endswith(b"\n"))


def _row(line: bytes) -> dict[str, Any] | None:
    row = read_row(line)
    moment = None if row is None else row.get("time")
    return row if isinstance(moment, (int, float)) and 0 <= moment <= LATEST else None


def _points(row: Mapping[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    moment = round(row["time"] * 1000)
    numbers = {
        store.allowed_name(key): float(value)
        for key, value in row.items()
        if key not in ("step", "time")
        and ((isinstance(value, (int, float)) and abs(value) < LARGEST) or value in ("NaN", "Infinity", "-Infinity"))
    }
    return [Metric(key, value, moment, row["step"]) for key, value in numbers.items()]


def _intact(path: Path, cursor: Cursor) -> bool:
    """Whether the file still has, at the cursor's offset, the line that was sent last."""
    last = cursor.last.encode()
    if not last or not path.exists():
        return not last
    with path.open("rb") as file:
        file.seek(max(0, cursor.offset - len(last)))
        return file.read(len(last)) == last


def _describe(client: MlflowClient, run: Run, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
    """Send the parameters and tags that the run lacks or has with other values."""
    from mlflow.entities import Param, RunTag

    wanted = {store.allowed_name(key): _text(value, LONGEST_PARAM) for key, value in params.items()}
    known = run.data.params
    labels = {store.allowed_name(key): _text(value, LONGEST_TAG) for key, value in tags.items()}
    labels |= {f"changed.{key}"[:250]: value for key, value in wanted.items() if known.get(key, value) != value}
    new = [Param(key, value) for key, value in wanted.items() if key not in known]
    marks = [RunTag(key, value) for key, value in labels.items() if run.data.tags.get(key) != value]
    for start in range(0, max(len(new), len(marks)), ENTRIES_A_CALL):
        part = slice(start, start + ENTRIES_A_CALL)
        client.log_batch(run.info.run_id, params=new[part], tags=marks[part])


class _Sync:
    """Sends one folder to one store, and moves the cursor after each part."""

    def __init__(self, tracked: TrackedRun, uri: str) -> None:
        self.tracked, self.folder, self.uri = tracked, tracked.folder, uri
        self.cursor = _read_cursor(self.folder)
        self.client = store.make_client(uri)
        self.run = self.find_run()

    def move(self, **changes: Any) -> None:
        self.cursor = dataclasses.replace(self.cursor, **changes)
        write_json(self.folder / CURSOR, dataclasses.asdict(self.cursor))

    def find_run(self) -> Run:
        """Return the run of the cursor, else the run with the cursor's token, else a new run."""
        if self.cursor.run and self.cursor.uri == store.public(self.uri):
            known = store.active_run(self.client, self.cursor.run)
            if known is not None:
                return known
        experiment, token = store.experiment_id(self.client, self.uri, self.tracked.experiment), self.cursor.token
        marked = self.client.search_runs([experiment], f"tags.`{TOKEN}` = '{token}'", max_results=1)
        first = next((row for row in map(_row, _lines(self.folder / METRICS, 0)) if row), None)
        started = int((float(first["time"]) if first else time.time()) * 1000)
        run = marked[0] if marked else self.client.create_run(experiment, started, {TOKEN: token}, self.tracked.name)
        self.move(uri=store.public(self.uri), run=run.info.run_id, offset=0, last="", artifacts={})
        return run

    def send(self, status: Status, on_warning: Callable[[str], object]) -> None:
        """Send each part; the status goes last, so that a run that MLflow shows as finished is complete."""
        tracked = self.tracked
        parent, children = {PARENT: tracked.parent} if tracked.parent else {}, tracked.children or {}
        _describe(self.client, self.run, tracked.params or {}, {**(tracked.tags or {}), **parent})
        # Before the parts that `is_sent` compares: a run that is complete has its children.
        for child, tags in children.items():
            above = next((place for place in child.parents if place in children), None)
            self.nest(child, tags, (run_id(above) if above else None) or self.cursor.run)
        self.send_metrics(on_warning)
        self.send_artifacts()
        if tracked.model is not None and status == "FINISHED":
            self.send_model(tracked.model)
        if self.run.info.status != status:
            self.send_status(status)
        if self.cursor.status != status:
            self.move(status=status)

    def send_status(self, status: Status) -> None:
        if status == "RUNNING":
            self.client.update_run(self.cursor.run, status)
            return
        # A run that is sent days later ended when its last line was written, not now.
        path = self.folder / METRICS
        ended = path.stat().st_mtime if path.exists() else time.time()
        self.client.set_terminated(self.cursor.run, status, int(ended * 1000))

    def nest(self, folder: Path, tags: Mapping[str, Any], parent: str) -> None:
        """Tag the run of another folder in the same store, and put it under `parent` unless it has a parent already."""
        if not (folder / CURSOR).exists():
            return
        try:
            other = _read_cursor(folder)
        except UserError:  # `catch_up` names it.
            return
        known = store.active_run(self.client, other.run) if other.run and other.uri == self.cursor.uri else None
        if known is not None:
            _describe(self.client, known, {}, {**tags, **({} if PARENT in known.data.tags else {PARENT: parent})})

    def send_metrics(self, on_warning: Callable[[str], object]) -> None:
        path = self.folder / METRICS
        if not _intact(path, self.cursor):
            self.cursor = dataclasses.replace(self.cursor, offset=0, last="")
        lines = _lines(path, self.cursor.offset)
        while group := list(itertools.islice(lines, LINES_A_GROUP)):
            points: list[Metric] = []
            for line in group:
                row = _row(line)
                if row is None:
                    on_warning(f"{path} has a line that is not a step's metrics, which is not sent: {line[:80]!r}.")
                else:
                    points += _points(row)
            for start in range(0, len(points), METRICS_A_CALL):
                self.client.log_batch(self.cursor.run, metrics=points[start : start + METRICS_A_CALL])
            end = self.cursor.offset + sum(map(len, group))
            self.move(offset=end, last=group[-1].decode(errors="replace"))

    def send_artifacts(self) -> None:
        for path in self.tracked.files:
            place, parent = _place(path, self.folder), _place(path.parent, self.folder)
            # Read before sending, so that a file that changes meanwhile is sent again.
            stamp = _stamp(path)
            if self.cursor.artifacts.get(place) != stamp:
                self.client.log_artifact(self.cursor.run, str(path), None if parent == "." else parent)
                self.move(artifacts={**self.cursor.artifacts, place: stamp})

    def send_model(self, shape: Sequence[int]) -> None:
        """Send the newest checkpoint with its configuration as an MLflow model, again when there is a newer one."""
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.pyfunc import save_model
        from mlflow.types import ColSpec, Schema, TensorSpec

        newest = max(self.folder.glob("checkpoints/*.safetensors"), default=None)
        if newest is None or self.cursor.artifacts.get(MODEL) == _stamp(newest):
            return
        inputs = Schema([ColSpec("long", "index"), ColSpec("long", "label")])
        outputs = Schema([TensorSpec(np.dtype("float32"), (-1, *shape))])
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            (run / newest.parent.name).mkdir(parents=True)
            for path in (newest, *self.folder.glob("config.yaml"), *self.folder.glob("velocity-loss-*.json")):
                shutil.copy2(path, run / path.relative_to(self.folder))
            with warnings.catch_warnings():
                # About a missing example of the input, which would have to be drawn.
                warnings.simplefilter("ignore")
                save_model(
                    path=str(Path(folder) / MODEL),
                    python_model=str(Path(__file__).parents[1] / "exchange" / "mlflow_model.py"),
                    artifacts={"run": str(run)},
                    signature=ModelSignature(inputs, outputs),
                    # Named here, or MLflow would start a process to find out what the file imports.
                    pip_requirements=[f"sitkit=={version('sitkit')}"],
                )
            self.client.log_artifacts(self.cursor.run, str(Path(folder) / MODEL), MODEL)
        self.move(artifacts={**self.cursor.artifacts, MODEL: _stamp(newest)})
