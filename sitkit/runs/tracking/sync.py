"""MLflow as a sink fed from the run folder.

metrics.jsonl on disk is the source of truth; a cursor beside it (tracking.json) says how much of it the tracker has.
So a tracker that was down, or a process that was killed, loses nothing: the next `send_run` sends the rest.
mlflow is imported only when something is sent.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sitkit.runs.tracking.store import (
    SERVER_TIMEOUT,
    active_run,
    allowed_name,
    experiment_id,
    make_client,
    public,
    tracking_uri,
)
from sitkit.runtime.files import read_json, to_json, write_json

if TYPE_CHECKING:
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


@dataclass(frozen=True)
class Cursor:
    """What the tracker has of a run folder.

    `token` marks the run in any store, so that it is found again where its id was not yet written down.
    `offset` is the length of metrics.jsonl that was sent and `last` the line that ends there.
    `artifacts` maps a path to the [size, mtime_ns] that was sent.
    """

    token: str
    uri: str = ""
    run: str = ""
    offset: int = 0
    last: str = ""
    artifacts: Mapping[str, list[int]] = field(default_factory=dict)


def run_id(folder: str | Path) -> str | None:
    """MLflow's id of the run in a folder (what `parent` takes), or None if it was never sent."""
    path = Path(folder) / CURSOR
    return (read_json(path)["run"] or None) if path.exists() else None


def send_run(
    folder: str | Path,
    *,
    name: str,
    experiment: str = "sitkit",
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    artifacts: Iterable[Path] = (),
    status: Status = "RUNNING",
    parent: str | None = None,
    children: Mapping[Path, Mapping[str, Any]] | None = None,
    model: Sequence[int] | None = None,
    uri: str | None = None,
    on_warning: Callable[[str], object] = warnings.warn,
) -> None:
    """Send what the tracker has not got of a run folder; calling it again sends nothing twice.

    A line of metrics.jsonl is {"step": int, "time": seconds since 1970, name: number, ...}.  A point keeps the time of
    its line, so that a line sent twice, as after a kill, is one point to a database.  Any other line is skipped with a
    warning.  A resumed training cuts the file back: it is sent again from its start, and the steps that were trained
    twice have two points.  A store that does not know the run gets all of it.  MLflow never changes a
    parameter: a value that differs later becomes the tag "changed.<name>".

    artifacts: files, sent again when they change and put where they lie in the folder; missing ones wait.
    parent: the id of the run under which MLflow shows this one (`run_id`).
    children: folders whose runs MLflow shows under this one, or under that of a child they lie in, unless they have a
    parent already; each with tags for its run.
    model: the shape of a sample, if the trained run is to be kept in MLflow as a model when it is finished.
    Raises whatever MLflow raises; nothing is lost by it.
    """
    from filelock import FileLock

    folder = Path(folder).resolve()
    uri = uri or tracking_uri()
    # A sync given up at exit may still be going on while the next one begins.
    with FileLock(folder / "tracking.lock", timeout=SERVER_TIMEOUT):
        cursor = _cursor(folder)
        client = make_client(uri)
        run, cursor = _run(client, folder, cursor, uri, experiment, name)
        _describe(client, run, params or {}, {**(tags or {}), **({PARENT: parent} if parent else {})})
        # Before what `is_sent` looks at: a run that is whole has its children.
        for child, marks in (children or {}).items():
            above = next((place for place in child.parents if place in (children or {})), None)
            _nest(client, (run_id(above) if above else None) or cursor.run, cursor, child, marks)
        cursor = _send_metrics(client, folder, run, cursor, on_warning)
        cursor = _send_artifacts(client, folder, cursor, artifacts)
        if model is not None and status == "FINISHED":
            _send_model(client, folder, cursor, model)
        _conclude(client, folder, run, status)


def catch_up(
    folder: str | Path, *, uri: str | None = None, on_warning: Callable[[str], object] = warnings.warn
) -> bool:
    """Send the unsent part of a folder that a `Tracker` keeps.  Returns whether anything was unsent.

    Raises whatever MLflow raises; nothing is lost by it.
    """
    folder = Path(folder).resolve()
    if not (folder / TRACKED).exists() or is_sent(folder, uri=uri):
        return False
    settings = read_json(folder / TRACKED)
    files = matching(folder, settings.pop("patterns"))
    send_run(folder, artifacts=files, uri=uri, on_warning=on_warning, **settings)
    return True


def is_sent(folder: str | Path, *, uri: str | None = None) -> bool:
    """Whether all of a folder that a `Tracker` keeps was sent, by its cursor.  mlflow is not imported."""
    folder = Path(folder).resolve()
    if not (folder / TRACKED).exists():
        return False
    cursor, metrics = _cursor(folder), folder / METRICS
    files = matching(folder, read_json(folder / TRACKED)["patterns"])
    return (
        bool(cursor.run)
        and cursor.uri == public(uri or tracking_uri())
        and cursor.offset == (metrics.stat().st_size if metrics.exists() else 0)
        and all(cursor.artifacts.get(path.relative_to(folder).as_posix()) == _stamp(path) for path in files)
    )


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that some pattern means, each once and in order."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _cursor(folder: Path) -> Cursor:
    path = folder / CURSOR
    if not path.exists():
        # On disk before the run exists in the store, or a kill between the two would leave a second run.
        write_json(path, dataclasses.asdict(Cursor(uuid.uuid4().hex)))
    return _read_cursor(path)


def _read_cursor(path: Path) -> Cursor:
    # Release 0.1 wrote two more keys.
    return Cursor(**{key: value for key, value in read_json(path).items() if key not in ("doubt", "floor")})


def _move(folder: Path, cursor: Cursor, **changes: Any) -> Cursor:
    moved = dataclasses.replace(cursor, **changes)
    write_json(folder / CURSOR, dataclasses.asdict(moved))
    return moved


def _run(
    client: MlflowClient, folder: Path, cursor: Cursor, uri: str, experiment: str, name: str
) -> tuple[Run, Cursor]:
    """The run in the store: the one known, else the one that carries our token, else a new one."""
    if cursor.run and cursor.uri == public(uri):
        known = active_run(client, cursor.run)
        if known is not None:
            return known, cursor
    number = experiment_id(client, uri, experiment)
    marked = client.search_runs([number], f"tags.`{TOKEN}` = '{cursor.token}'", max_results=1)
    first = next((row for row in map(_row, _lines(folder / METRICS, 0)) if row), None)
    started = float(first["time"]) if first else time.time()
    run = marked[0] if marked else client.create_run(number, int(started * 1000), {TOKEN: cursor.token}, name)
    fresh = Cursor(cursor.token, public(uri), run.info.run_id)
    return run, _move(folder, fresh)


def _text(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else to_json(value)
    return text if len(text) <= longest else text[: longest - len(CUT)] + CUT


def _describe(client: MlflowClient, run: Run, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
    """The parameters and tags that the run lacks or has otherwise."""
    from mlflow.entities import Param, RunTag

    wanted = {allowed_name(key): _text(value, LONGEST_PARAM) for key, value in params.items()}
    had = run.data.params
    labels = {allowed_name(key): _text(value, LONGEST_TAG) for key, value in tags.items()}
    labels |= {f"changed.{key}"[:250]: value for key, value in wanted.items() if had.get(key, value) != value}
    new = [Param(key, value) for key, value in wanted.items() if key not in had]
    marks = [RunTag(key, value) for key, value in labels.items() if run.data.tags.get(key) != value]
    for start in range(0, max(len(new), len(marks)), ENTRIES_A_CALL):
        part = slice(start, start + ENTRIES_A_CALL)
        client.log_batch(run.info.run_id, params=new[part], tags=marks[part])


def _lines(path: Path, offset: int) -> Iterator[bytes]:
    """The whole lines after an offset; one that is still being written is left for later."""
    if path.exists():
        with path.open("rb") as file:
            file.seek(offset)
            yield from (line for line in file if line.endswith(b"\n"))


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("time"), (int, float))
    return row if sound else None


def _points(row: Mapping[str, Any]) -> list[Metric]:
    from mlflow.entities import Metric

    moment = round(row["time"] * 1000)
    numbers = {
        allowed_name(key): float(value)
        for key, value in row.items()
        if key not in ("step", "time")
        and (isinstance(value, (int, float)) or value in ("NaN", "Infinity", "-Infinity"))
    }
    return [Metric(key, value, moment, row["step"]) for key, value in numbers.items()]


def _send_metrics(
    client: MlflowClient, folder: Path, run: Run, cursor: Cursor, on_warning: Callable[[str], object]
) -> Cursor:
    path = folder / METRICS
    if not _intact(path, cursor):
        cursor = dataclasses.replace(cursor, offset=0, last="")
    for group in _groups(_lines(path, cursor.offset)):
        points: list[Metric] = []
        for line in group:
            row = _row(line)
            if row is None:
                on_warning(f"{path} has a line that is not a step's metrics, which is not sent: {line[:80]!r}.")
            else:
                points += _points(row)
        for start in range(0, len(points), METRICS_A_CALL):
            client.log_batch(run.info.run_id, metrics=points[start : start + METRICS_A_CALL])
        end = cursor.offset + sum(map(len, group))
        cursor = _move(folder, cursor, offset=end, last=group[-1].decode(errors="replace"))
    return cursor


def _groups(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lines in groups that fill one call; a line has at most one number more than commas."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        numbers = line.count(b",") + 1
        if group and size + numbers > METRICS_A_CALL:
            yield group
            group, size = [], 0
        group.append(line)
        size += numbers
    if group:
        yield group


def _intact(path: Path, cursor: Cursor) -> bool:
    """Whether the file still has, where the cursor stands, the line that was sent last."""
    last = cursor.last.encode()
    if not last:
        return True
    if not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(max(0, cursor.offset - len(last)))
        return file.read(len(last)) == last


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _send_artifacts(client: MlflowClient, folder: Path, cursor: Cursor, artifacts: Iterable[Path]) -> Cursor:
    for path in artifacts:
        path = Path(path).resolve()
        if not path.is_file():
            continue
        place = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
        # Read before sending, so that a file that changes meanwhile is sent again.
        stamp = _stamp(path)
        if cursor.artifacts.get(place.as_posix()) != stamp:
            where = place.parent.as_posix()
            client.log_artifact(cursor.run, str(path), None if where == "." else where)
            cursor = _move(folder, cursor, artifacts={**cursor.artifacts, place.as_posix(): stamp})
    return cursor


def _send_model(client: MlflowClient, folder: Path, cursor: Cursor, shape: Sequence[int]) -> None:
    """The newest checkpoint with its configuration as an MLflow model, sent again when there is a newer one."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema, TensorSpec

    newest = max(folder.glob("checkpoints/*.safetensors"), default=None)
    if newest is None or cursor.artifacts.get(MODEL) == _stamp(newest):
        return
    asked = Schema([ColSpec("long", "index"), ColSpec("long", "label")])
    drawn = Schema([TensorSpec(np.dtype("float32"), (-1, *shape))])
    with tempfile.TemporaryDirectory() as there:
        run = Path(there) / "run"
        (run / newest.parent.name).mkdir(parents=True)
        for path in (newest, *folder.glob("config.yaml"), *folder.glob("velocity-loss-*.json")):
            shutil.copy2(path, run / path.relative_to(folder))
        with warnings.catch_warnings():
            # Of an example of the input, which would have to be drawn.
            warnings.simplefilter("ignore")
            save_model(
                path=str(Path(there) / MODEL),
                python_model=str(Path(__file__).parents[1] / "exchange" / "mlflow_model.py"),
                artifacts={"run": str(run)},
                signature=ModelSignature(asked, drawn),
                # Named here, or MLflow would start a process to find out what the file imports.
                pip_requirements=[f"sitkit=={version('sitkit')}"],
            )
        client.log_artifacts(cursor.run, str(Path(there) / MODEL), MODEL)
    _move(folder, cursor, artifacts={**cursor.artifacts, MODEL: _stamp(newest)})


def _nest(client: MlflowClient, parent: str, cursor: Cursor, folder: Path, tags: Mapping[str, Any]) -> None:
    """Tags for the run of another folder in the cursor's store, which comes under `parent` unless it has one already."""
    if not (folder / CURSOR).exists():
        return
    other = _read_cursor(folder / CURSOR)
    known = active_run(client, other.run) if other.run and other.uri == cursor.uri else None
    if known is not None:
        _describe(client, known, {}, {**tags, **({} if PARENT in known.data.tags else {PARENT: parent})})


def _conclude(client: MlflowClient, folder: Path, run: Run, status: Status) -> None:
    """The status, sent last: a run that MLflow shows as finished is all there."""
    if run.info.status == status:
        return
    if status == "RUNNING":
        client.update_run(run.info.run_id, status)
        return
    # A run sent days later ended when its last line was written, not now.
    path = folder / METRICS
    ended = path.stat().st_mtime if path.exists() else time.time()
    client.set_terminated(run.info.run_id, status, int(ended * 1000))
