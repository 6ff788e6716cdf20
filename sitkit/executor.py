"""Where the tasks of a study are done: in this process, in processes of this machine, or on a Ray cluster.

Whoever is at a task holds the lock beside its log, as in sitkit.share, so any number of processes and machines on one
folder divide a study among themselves; the system frees a dead one's lock, and its task is another's to do.  The folder
must be on a file system whose locks hold across its machines (NFS 4, Lustre and CephFS; NFS 3 only with lockd).
The only module that imports ray.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from platform import node
from typing import Any, Literal, NamedTuple, Protocol

from sitkit.config import Layer, assemble
from sitkit.progress import Event, Progress
from sitkit.registry import UserError, WorkFailed
from sitkit.share import attempt
from sitkit.task import FAILED, Task, failure, note, place_of

# Seconds that an executor waits for news before it looks at something else.
PATIENCE = 1.0
# Seconds in which a worker that is told to stop writes its checkpoint.
FAREWELL = 60.0


class Ended(NamedTuple):
    """How a task ended: done; failed, with the reason; busy, another process is at it; died, its worker is gone."""

    how: Literal["done", "failed", "busy", "died"]
    reason: str = ""


Tell = Callable[[Task, Event], None]


class Executor(Protocol):
    """Does tasks."""

    def takes(self) -> bool:
        """Whether another task may be submitted now."""
        ...

    def submit(self, task: Task, since: str) -> None:
        """Begin a task.  One that has failed in another process since then is not tried again."""
        ...

    def wait(self, tell: Tell) -> list[tuple[Task, Ended]]:
        """The tasks that have ended, at the latest `PATIENCE` seconds from now unless this process does them itself."""
        ...

    def close(self) -> None:
        """Let whatever still runs save what it has, and end it."""
        ...


def perform(task: Task, since: str, tell: Progress) -> Ended:
    """Do a task unless it is done or another process is at it; its log has when it began, how it ended and why."""
    ended = Ended("done")

    def do() -> None:
        nonlocal ended
        ended = _do(task, tell)

    def over() -> bool:
        return task.done or failure(task.path, since) is not None

    if attempt(task.path.with_suffix(".lock"), over, do):
        return ended
    if task.done:
        return Ended("done")
    reason = failure(task.path, since)
    return Ended("busy") if reason is None else Ended("failed", reason)


def _do(task: Task, tell: Progress) -> Ended:
    from sitkit.evaluate import evaluate
    from sitkit.run import load
    from sitkit.train import Busy, train

    config = task.config
    note(task.path, "start")
    tell(Event("start", message=task.name))
    try:
        if task.kind == "train":
            train(config, tell)
        else:
            run = load(config.run.folder / task.place.run, weights=config.sample.weights, device=config.run.device)
            evaluate(dataclasses.replace(run, config=config), tell)
    except Busy:
        note(task.path, "left to the process that is training it")
        return Ended("busy")
    except (UserError, WorkFailed) as error:
        reason = str(error)
    except Exception as error:
        # Whatever went wrong in a plugin or for want of memory, the other cells are done.
        with task.path.open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        note(task.path, "stopped")
        raise
    else:
        note(task.path, "done")
        return Ended("done")
    note(task.path, f"{FAILED} {reason}")
    return Ended("failed", reason)


class Here:
    """This process, one task after another."""

    def __init__(self) -> None:
        self._next: tuple[Task, str] | None = None

    def takes(self) -> bool:
        """Whether it is idle."""
        return self._next is None

    def submit(self, task: Task, since: str) -> None:
        """Do it when it is waited for."""
        self._next = task, since

    def wait(self, tell: Tell) -> list[tuple[Task, Ended]]:
        """Do the task."""
        if self._next is None:
            return []
        (task, since), self._next = self._next, None
        return [(task, perform(task, since, lambda event: tell(task, event)))]

    def close(self) -> None:
        """Nothing runs but this."""


def as_plain(task: Task, since: str) -> dict[str, Any]:
    """A task as plain values, for another process, and the folder from which its paths start."""
    log = str(task.path.absolute())
    return {"kind": task.kind, "config": task.config.plain(), "since": since, "cwd": os.getcwd(), "log": log}


def perform_plain(told: Mapping[str, Any], tell: Progress) -> Ended:
    """Do the task that `as_plain` told of.  Events go out every half second, but for messages."""
    said = 0.0

    def seldom(event: Event) -> None:
        nonlocal said
        now = time.monotonic()
        if event.message or now - said > 0.5:
            said = now
            tell(event)

    try:
        os.chdir(told["cwd"])
    except OSError as error:
        return Ended("failed", f"{told['cwd']} cannot be entered on {node()}: {error.strerror}.")
    config = assemble([Layer(told["config"])])
    return perform(Task(told["kind"], config, place_of(config)), told["since"], seldom)


@dataclass
class _Worker:
    """A process, our end of its pipe, and the task that it is at."""

    process: Any
    pipe: connection.Connection
    task: Task | None = None


class Local:
    """Processes that do one task after another; one that dies is replaced.

    CPU threads are divided among them, and where run.device leaves the choice each sees one GPU, all of them in turn.
    """

    def __init__(self, workers: int) -> None:
        # A server imports torch once and is forked for each worker; Windows cannot fork.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(["sitkit.executor", "sitkit.train", "sitkit.evaluate"])
        self._crew: list[_Worker | None] = [None] * workers

    def takes(self) -> bool:
        """Whether a worker is idle."""
        return any(worker is None or worker.task is None for worker in self._crew)

    def submit(self, task: Task, since: str) -> None:
        """Hand the task to an idle worker."""
        slot = next(i for i, worker in enumerate(self._crew) if worker is None or worker.task is None)
        worker = self._crew[slot] or self._hire(slot, gpus(task.config.run.device))
        worker.task = task
        with contextlib.suppress(OSError):
            # Of one that has died while it was idle the pipe tells when it is waited for.
            worker.pipe.send(as_plain(task, since))

    def _hire(self, slot: int, gpus: list[str]) -> _Worker:
        ours, theirs = self._context.Pipe()
        gpu = gpus[slot % len(gpus)] if gpus else None
        process = self._context.Process(target=_serve, args=(theirs, gpu, len(self._crew)))
        process.start()
        theirs.close()
        worker = self._crew[slot] = _Worker(process, ours)
        return worker

    def wait(self, tell: Tell) -> list[tuple[Task, Ended]]:
        """What the workers say."""
        busy = {worker.pipe: (i, worker) for i, worker in enumerate(self._crew) if worker is not None and worker.task}
        ended = []
        for pipe in connection.wait(list(busy), PATIENCE):
            slot, worker = busy[pipe]  # pyright: ignore[reportArgumentType]
            assert worker.task is not None
            try:
                said: Event | Ended = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                said, self._crew[slot] = Ended("died", f"its process ended with {_exit(worker.process.exitcode)}"), None
            if isinstance(said, Event):
                tell(worker.task, said)
            else:
                ended.append((worker.task, said))
                worker.task = None
        return ended

    def close(self) -> None:
        """As ctrl-C does: a training saves the step that it is at."""
        crew = [worker for worker in self._crew if worker is not None]
        self._crew = [None] * len(self._crew)
        try:
            for worker in crew:
                if worker.task is not None and worker.process.is_alive():
                    os.kill(worker.process.pid, signal.SIGINT)
                worker.pipe.close()
            for worker in crew:
                worker.process.join(FAREWELL)
        finally:
            for worker in crew:
                worker.process.kill()
                worker.process.join()


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"status {code}"
    name = signal.Signals(-code).name
    return f"{name}, as the system ends it where memory is short" if name == "SIGKILL" else name


def _serve(pipe: connection.Connection, gpu: str | None, workers: int) -> None:
    """A worker: does what comes through the pipe until that is closed, or the process that reads it is gone."""
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        if hasattr(os, "setpgrp"):
            # A terminal's ctrl-C reaches the first process alone, which tells the others once.
            os.setpgrp()
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // workers))

        def tell(event: Event) -> None:
            # Nobody may read it any more; that is no fault of the task.
            with contextlib.suppress(OSError):
                pipe.send(event)

        while True:
            told = pipe.recv()
            _write_to(Path(told["log"]))
            pipe.send(perform_plain(told, tell))


def _write_to(log: Path) -> None:
    """What the process prints from now on, be it the last words of a library that crashes, is in the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _follow(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)


def gpus(device: str) -> list[str]:
    """The GPUs that workers may be given where the device leaves the choice open, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


class Ray:
    """A Ray cluster whose machines have sitkit and see the folders of this one under the same names.

    address: "ray://host:port" or "host:port", by default RAY_ADDRESS or else the cluster of this machine; where there is
    none, one is started here for as long as the study takes.  cpus, gpus: of a task, fractions too.  workers: how many
    tasks at a time; by default as many as there is room for.
    Raises UserError where ray is not installed and, before any work, where the cluster cannot be reached.
    """

    def __init__(
        self, address: str | None = None, cpus: float = 1, gpus: float = 0, workers: int | None = None
    ) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray needs ray: pip install 'sitkit[ray]'.") from None
        self._ray: Any = ray
        self._address, self._cpus, self._gpus, self._workers = address, cpus, gpus, workers
        self._running: dict[Any, Task] = {}
        self._perform: Any = None
        self._news: Any = None

    def _connect(self) -> None:
        from ray.util.queue import Queue

        ray = self._ray
        told = {key: value for key, value in os.environ.items() if key.startswith(("SITKIT_", "MLFLOW_"))}
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": told}}
        try:
            try:
                ray.init(self._address or os.environ.get("RAY_ADDRESS") or "auto", **options)
            except ConnectionError:
                if self._address or os.environ.get("RAY_ADDRESS"):
                    raise
                room = None if self._workers is None else max(1, math.ceil(self._workers * self._cpus))
                ray.init("local", num_cpus=room, include_dashboard=False, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = self._address or os.environ.get("RAY_ADDRESS")
            raise UserError(
                f"The Ray cluster {where} cannot be reached: {str(error).strip().splitlines()[0]}"
            ) from None
        self._news = Queue(actor_options={"num_cpus": 0})
        # Deaths are counted where those of other executors are.
        self._perform = ray.remote(_on_ray).options(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=0)

    def takes(self) -> bool:
        """Ray queues what it cannot begin yet, and a cluster that grows by demand grows by what waits."""
        return self._workers is None or len(self._running) < self._workers

    def submit(self, task: Task, since: str) -> None:
        """Hand the task to the cluster."""
        if self._news is None:
            self._connect()
        self._running[self._perform.remote(as_plain(task, since), self._news)] = task

    def wait(self, tell: Tell) -> list[tuple[Task, Ended]]:
        """What has come from the cluster."""
        if not self._running:
            return []
        ray, ended = self._ray, []
        ready, rest = ray.wait(list(self._running), num_returns=1, timeout=PATIENCE)
        ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0] if rest else []
        by_log = {str(task.path.absolute()): task for task in self._running.values()}
        for log, event in self._news.get_nowait_batch(self._news.qsize()):
            if log in by_log:
                tell(by_log[log], event)
        for reference in ready:
            task = self._running.pop(reference)
            try:
                ended.append((task, ray.get(reference)))
            except ray.exceptions.RayError as error:
                ended.append((task, Ended("died", f"its worker is gone ({type(error).__name__})")))
        return ended

    def close(self) -> None:
        """As ctrl-C does; a cluster that was started for the study ends with it."""
        if self._news is None:
            return
        for reference in self._running:
            self._ray.cancel(reference)
        try:
            if self._running:
                self._ray.wait(list(self._running), num_returns=len(self._running), timeout=FAREWELL)
        finally:
            self._ray.shutdown()


def _on_ray(told: dict[str, Any], news: Any) -> Ended:
    def tell(event: Event) -> None:
        # Nobody may listen any more.
        with contextlib.suppress(Exception):
            news.actor.put_nowait.remote((told["log"], event))

    return perform_plain(told, tell)
