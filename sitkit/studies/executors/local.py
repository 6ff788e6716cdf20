"""Processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from sitkit.runtime.progress import Event
from sitkit.studies.executors.executor import POLL_SECONDS, STOP_TIMEOUT, Ended, Tell, perform_plain, task_to_plain
from sitkit.studies.tasks import Task


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
            self._context.set_forkserver_preload(
                ["sitkit.studies.executors", "sitkit.training.train", "sitkit.runs.evaluate"]
            )
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
            worker.pipe.send(task_to_plain(task, since))

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
        for pipe in connection.wait(list(busy), POLL_SECONDS):
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
                worker.process.join(STOP_TIMEOUT)
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

        # Or what a task prints would come when the log is another's.
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
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
