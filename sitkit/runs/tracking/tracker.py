"""A run's folder kept in MLflow while the work goes on: a thread that sends what `sitkit.runs.tracking.sync` finds unsent."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sitkit.runs.tracking.store import SERVER_TIMEOUT, public, tracking_uri
from sitkit.runs.tracking.sync import (
    METRICS,
    RUN_ARTIFACTS,
    TRACKED,
    Status,
    catch_up,
    matching,
    send_run,
)
from sitkit.runtime.files import write_json


class Tracker:
    """Keeps a run folder in sync from a daemon thread while a block runs, and once more at its end.

    The end is FINISHED, KILLED after ctrl-C, and FAILED after any other exception.  Leaving waits at most `patience`
    seconds.  Nothing is raised: an outage is one call of `on_warning` (from the thread), and what was missed is sent
    by a later `send_run`.  Not enabled, it does nothing and imports nothing.

    artifacts: patterns of files in the folder, looked up at every sync.  children, model: as for `send_run`; children that
    were not sent whole, because the tracker was down, are sent first.  Its settings stay in tracked.json, for
    `catch_up`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str,
        experiment: str = "sitkit",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        artifacts: Sequence[str] = RUN_ARTIFACTS,
        parent: str | None = None,
        children: Mapping[Path, Mapping[str, Any]] | None = None,
        model: Sequence[int] | None = None,
        enabled: bool = True,
        interval: float = 30.0,
        patience: float = SERVER_TIMEOUT,
        on_warning: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.folder, self.artifacts, self.enabled = Path(folder).resolve(), tuple(artifacts), enabled
        self.interval, self.patience, self.on_warning = interval, patience, on_warning
        # Settled here: the block may change the directory or the environment.
        self.uri = tracking_uri()
        self.children = dict(children or {})
        self._settings: dict[str, Any] = {
            "name": name,
            "experiment": experiment,
            "params": params,
            "tags": tags,
            "parent": parent,
            "model": model,
        }
        self._leaving = threading.Event()
        self._status: Status = "RUNNING"
        self._down = False
        self._thread = threading.Thread(target=self._work, name="sitkit-tracking", daemon=True)

    def __enter__(self) -> Self:
        if self.enabled:
            self._remember()
            self._thread.start()
        return self

    def _remember(self) -> None:
        write_json(self.folder / TRACKED, {**self._settings, "patterns": self.artifacts, "status": self._status})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        self._status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self._remember()
        self._leaving.set()
        self._thread.join(self.patience)
        if self._thread.is_alive():
            self._warn(f"no answer within {self.patience:g} s")

    def _work(self) -> None:
        while not self._leaving.is_set():
            self._send("RUNNING")
            self._leaving.wait(self.interval)
        self._send(self._status)

    def _send(self, status: Status) -> None:
        try:
            for child in self.children:
                catch_up(child, uri=self.uri, on_warning=self.on_warning)
            send_run(
                self.folder, artifacts=matching(self.folder, self.artifacts), status=status, children=self.children,
                uri=self.uri, on_warning=self.on_warning, **self._settings,
            )  # fmt: skip
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._warn(lines[0].replace(self.uri.rstrip("/"), public(self.uri).rstrip("/"))[:200])
        else:
            self._down = False

    def _warn(self, reason: str) -> None:
        if not self._down:
            self._down = True
            self.on_warning(
                f"MLflow at {public(self.uri)} did not take the run: {reason.rstrip('.')}. The work goes on, "
                f"{METRICS} has everything, and MLflow gets the rest later, at the latest by the same command again."
            )
