"""The MLflow store: its address, a check that it can be reached, and a client.

mlflow is imported only when a client is made.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit
from urllib.request import urlopen

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SERVER_TIMEOUT = 20.0

# Set before mlflow is imported, unless the user has set them.  Its own 7 retries of 120 s would delay a run for minutes;
# a pooled SQLite connection would continue to write to a deleted database.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
}


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or mlflow.db in the current directory; a SQLite path is made absolute and quoted."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    database = _database(uri)
    return f"sqlite:///{quote(database.resolve().as_posix())}" if database else uri


def reach(patience: float, uri: str | None = None) -> tuple[str, str]:
    """Return the store's address, without user and password, and the reason why it cannot be used now, or "".

    The store is that of `tracking_uri`, unless an address is given.  A server must answer its health check within
    `patience` seconds; a file must be a database, in a folder that can be written.  Nothing is created.  MLflow checks
    addresses of other kinds when it is used.
    """
    uri = uri or tracking_uri()
    database = _database(uri)
    if database is not None:
        return uri, _unusable(database)
    if not uri.startswith(("http://", "https://")):
        return public(uri), ""
    try:
        # This page needs no password, and urlopen cannot read one from an address.
        with urlopen(f"{public(uri).rstrip('/')}/health", timeout=patience):
            return public(uri), ""
    except (OSError, ValueError) as error:
        return public(uri), f"does not answer: {getattr(error, 'reason', error)}"


def _unusable(database: Path) -> str:
    if database.exists():
        with database.open("rb") as file:
            start = file.read(16)
        return "" if start in (b"", b"SQLite format 3\0") else "is no SQLite database"
    folder = next(parent for parent in database.parents if parent.exists())
    return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written"


def _database(uri: str) -> Path | None:
    path = uri.partition("sqlite:///")[2].partition("?")[0]
    return Path(unquote(path)) if path else None


def is_local(uri: str) -> bool:
    """Whether an address is that of a database file."""
    return _database(uri) is not None


def public(uri: str) -> str:
    """Return an address without user and password, for the screen and the disk."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def make_client(uri: str) -> MlflowClient:
    """Return a client of the store at an address; a database is created if there is none."""
    from filelock import FileLock

    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    database = _database(uri)
    if database is None:
        return MlflowClient(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that create one database at once crash each other, and a kill would leave half of one.
    # Making one may take a minute on a busy machine.
    with FileLock(f"{database}.lock"):
        if not database.exists() or database.stat().st_size == 0:
            for stale in database.parent.glob(f"{database.name}.tmp-*"):
                stale.unlink()
            fresh = database.with_name(f"{database.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
            MlflowClient(_address(fresh))
            os.replace(fresh, database)
        return MlflowClient(_address(database))


def _address(database: Path) -> str:
    """Return the address of a database for SQLAlchemy.

    With the name of the driver, because for others MLflow makes a folder with the quoted name.
    """
    from sqlalchemy import URL

    # SQLite's own 5 s are too few where several processes write.
    return URL.create("sqlite+pysqlite", database=str(database), query={"timeout": "60"}).render_as_string()


def active_run(client: MlflowClient, number: str) -> Run | None:
    """Return the run with an id; None if the store does not have it or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = _database(uri)
        # Without it MLflow puts artifacts into the working directory of the first process.
        place = (database.parent / "mlruns" / allowed_name(name)).as_uri() if database else None
        try:
            return client.create_experiment(name, place)
        except MlflowException:
            # Another process may have created it at the same moment.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def allowed_name(name: str) -> str:
    """Return a name that MLflow accepts: other characters become underscores."""
    parts = re.sub(r"[^\w./ -]", "_", name[:250]).split("/")
    return "/".join(part for part in parts if part not in ("", ".", "..")) or "_"
