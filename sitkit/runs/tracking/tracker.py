"""A thread that keeps MLflow up to date with a run folder while the work goes on."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Self

from sitkit.runs.tracking.store import SERVER_TIMEOUT, is_local, public, reach, tracking_uri
from sitkit.runs.tracking.sync import METRICS, Status, TrackedRun, catch_up, send_run
from sitkit.runtime.errors import UserError


class Tracker:
    """Sends a run folder to MLflow from a daemon thread while a block runs, and once more at its end.

    The end is FINISHED, KILLED after ctrl-C, and FAILED after any other exception.  Nothing is raised: an outage is one
    call of `on_warning` (from the thread), and the missing part is sent by a later `send_run` or `catch_up`.  Children
    that were not sent completely, because the server was down, are sent first.

    Args:
        tracked: the folder and its description.
        enabled: False: nothing is done and nothing imported.
        interval: seconds between two syncs.
        patience: the longest time in seconds that the end of the block waits for a server that does not answer.  It waits
            until a database is complete, and at most SERVER_TIMEOUT for a server that answers.
        on_warning: a function that receives a message.
    """

    def __init__(
        self,
        tracked: TrackedRun,
        *,
        enabled: bool = True,
        interval: float = 30.0,
        patience: float = 2.0,
        on_warning: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.tracked, self.enabled, self.interval, self.patience = tracked, enabled, interval, patience
        self.on_warning = on_warning
        # Read now: the block may change the directory or the environment.
        self.uri = tracking_uri()
        self._leaving = threading.Event()
        self._status: Status = "RUNNING"
        self._down = False
        self._named: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="sitkit-tracking", daemon=True)

    def __enter__(self) -> Self:
        if self.enabled:
            self.tracked.write(self._status)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if not self.enabled:
            return
        self._status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self.tracked.write(self._status)
        self._leaving.set()
        reason = f"no answer within {SERVER_TIMEOUT:g} s"
        if is_local(self.uri):
            self._thread.join()
        elif self._thread.is_alive() and (silence := self._silence()):
            reason = silence
        else:
            self._thread.join(SERVER_TIMEOUT)
        if self._thread.is_alive():
            self._warn(reason)

    def _silence(self) -> str:
        """Return why the server does not answer within the patience, or ""; a socket's own limit is for each part of an answer."""
        reasons: list[str] = []
        probe = threading.Thread(target=lambda: reasons.append(reach(self.patience, self.uri)[1]), daemon=True)
        probe.start()
        probe.join(self.patience)
        return reasons[0] if reasons else f"no whole answer within {self.patience:g} s"

    def _work(self) -> None:
        while not self._leaving.is_set():
            self._send("RUNNING")
            self._leaving.wait(self.interval)
        self._send(self._status)

    def _send(self, status: Status) -> None:
        try:
            for child in self.tracked.children or {}:
                try:
                    catch_up(child, uri=self.uri, on_warning=self.on_warning)
                except UserError as error:
                    self._name(str(error))
            send_run(self.tracked, status, uri=self.uri, on_warning=self.on_warning)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._warn(lines[0].replace(self.uri.rstrip("/"), public(self.uri).rstrip("/"))[:200])
        else:
            self._down = False

    def _name(self, fault: str) -> None:
        if fault not in self._named:
            self._named.add(fault)
            self.on_warning(fault)

    def _warn(self, reason: str) -> None:
        if not self._down:
            self._down = True
            self.on_warning(
                f"MLflow at {public(self.uri)} did not take the run: {reason.rstrip('.')}. The work goes on, "
                f"{METRICS} has everything, and MLflow gets the rest later, at the latest by the same command again."
            )
