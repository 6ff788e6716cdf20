"""The executor of a Ray cluster."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

from sitkit.runtime.errors import UserError
from sitkit.runtime.progress import Event
from sitkit.studies.executors.executor import POLL_SECONDS, STOP_TIMEOUT, OnEvent, TaskEnd, perform_plain, task_to_plain
from sitkit.studies.tasks import Task


class Ray:
    """Does tasks on a Ray cluster whose machines have sitkit and see the folders of this machine under the same names.

    address: "ray://host:port" or "host:port", by default RAY_ADDRESS or else the cluster of this machine; if there is no
    cluster, one is started here for the time of the study.  cpus, gpus: of a task, fractions too; by default a task has a
    GPU if the cluster has any and run.device is not the CPU.  workers: tasks at a time; by default as many as the cluster
    has room for.
    Raises UserError if ray is not installed and, before any work, if the cluster cannot be reached or the process is
    connected to one already.
    """

    def __init__(
        self, address: str | None = None, cpus: float = 1, gpus: float | None = None, workers: int | None = None
    ) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray needs ray: pip install 'sitkit[ray]'.") from None
        self._ray: Any = ray
        self._address, self._cpus, self._gpus, self._workers = address, cpus, gpus, workers
        self._running: dict[Any, Task] = {}
        self._perform: Any = None
        self._queue: Any = None

    def _connect(self, device: str) -> None:
        from ray.util.queue import Queue

        ray = self._ray
        if ray.is_initialized():
            raise UserError("This process is connected to a Ray cluster already: call ray.shutdown() before the study.")
        variables = {key: value for key, value in os.environ.items() if key.startswith(("SITKIT_", "MLFLOW_"))}
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        options: dict[str, Any] = {**quiet, "runtime_env": {"env_vars": variables}}
        address = self._address or os.environ.get("RAY_ADDRESS")
        try:
            try:
                ray.init(address or "auto", **options)
            except ConnectionError:
                if address:
                    raise
                room = None if self._workers is None else max(1, math.ceil(self._workers * self._cpus))
                ray.init("local", num_cpus=room, include_dashboard=False, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"The Ray cluster {address}" if address else "A Ray cluster of this machine"
            raise UserError(f"{where} cannot be reached: {str(error).strip().splitlines()[0]}") from None
        self._queue = Queue(actor_options={"num_cpus": 0})
        gpus = self._gpus
        if gpus is None:
            gpus = int(device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)
        # The scheduler counts deaths for every executor.
        self._perform = ray.remote(_on_ray).options(num_cpus=self._cpus, num_gpus=gpus, max_retries=0)

    def takes(self) -> bool:
        """Return whether a task may be submitted.  Ray queues tasks, and a queue lets a cluster grow on demand."""
        return self._workers is None or len(self._running) < self._workers

    def submit(self, task: Task, since: str) -> None:
        """Hand the task to the cluster."""
        if self._queue is None:
            self._connect(task.config.run.device)
        self._running[self._perform.remote(task_to_plain(task, since), self._queue)] = task

    def wait(self, on_event: OnEvent) -> list[tuple[Task, TaskEnd]]:
        """Pass on the events of the cluster, and return the tasks that have ended."""
        if not self._running:
            return []
        ray, ended = self._ray, []
        ready, rest = ray.wait(list(self._running), num_returns=1, timeout=POLL_SECONDS)
        ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest else []
        by_log = {str(task.path.absolute()): task for task in self._running.values()}
        # The actor of the queue may be gone, as when the cluster ends; the ends of tasks do not go through it.
        with contextlib.suppress(ray.exceptions.RayError):
            for log, event in self._queue.get_nowait_batch(self._queue.qsize()):
                if log in by_log:
                    on_event(by_log[log], event)
        for reference in ready:
            task = self._running.pop(reference)
            try:
                ended.append((task, ray.get(reference)))
            except ray.exceptions.RayError as error:
                ended.append((task, TaskEnd("died", f"its worker is gone ({type(error).__name__})")))
        return ended

    def close(self) -> None:
        """Stop as ctrl-C does; a cluster that was started for the study ends with it."""
        if self._queue is None:
            return
        for reference in self._running:
            self._ray.cancel(reference)
        try:
            if self._running:
                self._ray.wait(list(self._running), num_returns=len(self._running), timeout=STOP_TIMEOUT)
        finally:
            self._ray.shutdown()


def _on_ray(record: dict[str, Any], queue: Any) -> TaskEnd:
    def send(event: Event) -> None:
        # The study may have stopped; the task goes on.
        with contextlib.suppress(Exception):
            queue.actor.put_nowait.remote((record["log"], event))

    return perform_plain(record, send)
