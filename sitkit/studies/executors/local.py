"""The executor of several processes on this machine."""

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
from sitkit.runtime.stops import stopping
from sitkit.studies.executors.executor import POLL_SECONDS, STOP_TIMEOUT, OnEvent, TaskEnd, perform_plain, task_to_plain
from sitkit.studies.tasks import Task


@dataclass
class _Worker:
    """A process, our end of its pipe, and its current task."""

    process: Any
    pipe: connection.Connection
    task: Task | None = None


class Local:
    """Does tasks in processes of this machine; a process that dies is replaced.

    CPU threads are divided among the processes.  If run.device does not name a GPU, the processes take the GPUs in turn, one
    each.
    """

    def __init__(self, workers: int) -> None:
        # A server imports torch once and is forked for each worker; Windows cannot fork.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(
                ["sitkit.studies.executors", "sitkit.training.train", "sitkit.runs.evaluate"]
            )
        self._workers: list[_Worker | None] = [None] * workers

    def takes(self) -> bool:
        """Return whether a worker is idle."""
        return any(worker is None or worker.task is None for worker in self._workers)

    def submit(self, task: Task, since: str) -> None:
        """Hand the task to an idle worker."""
        slot = next(i for i, worker in enumerate(self._workers) if worker is None or worker.task is None)
        worker = self._workers[slot] or self._start_worker(slot, gpus(task.config.run.device))
        worker.task = task
        with contextlib.suppress(OSError):
            # If the worker died while it was idle, `wait` notices it.
            worker.pipe.send(task_to_plain(task, since))

    def _start_worker(self, slot: int, gpus: list[str]) -> _Worker:
        ours, theirs = self._context.Pipe()
        gpu = gpus[slot % len(gpus)] if gpus else None
        process = self._context.Process(target=_worker_main, args=(theirs, gpu, len(self._workers)))
        process.start()
        theirs.close()
        worker = self._workers[slot] = _Worker(process, ours)
        return worker

    def wait(self, on_event: OnEvent) -> list[tuple[Task, TaskEnd]]:
        """Pass on the events of the workers, and return the tasks that have ended."""
        busy = {
            worker.pipe: (i, worker) for i, worker in enumerate(self._workers) if worker is not None and worker.task
        }
        ended = []
        for pipe in connection.wait(list(busy), POLL_SECONDS):
            slot, worker = busy[pipe]  # pyright: ignore[reportArgumentType]
            assert worker.task is not None
            try:
                message: Event | TaskEnd = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                message = TaskEnd("died", f"its process ended with {_exit(worker.process.exitcode)}")
                self._workers[slot] = None
            if isinstance(message, Event):
                on_event(worker.task, message)
            else:
                ended.append((worker.task, message))
                worker.task = None
        return ended

    def close(self) -> None:
        """Stop the workers as a signal does: a training saves its current step."""
        workers = [worker for worker in self._workers if worker is not None]
        self._workers = [None] * len(self._workers)
        try:
            for worker in workers:
                if worker.task is not None and worker.process.is_alive():
                    # A process in the background of a shell may ignore SIGINT.
                    os.kill(worker.process.pid, signal.SIGTERM)
                worker.pipe.close()
            for worker in workers:
                worker.process.join(STOP_TIMEOUT)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"status {code}"
    name = signal.Signals(-code).name
    return f"{name}, probably because the machine ran out of memory" if name == "SIGKILL" else name


def _worker_main(pipe: connection.Connection, gpu: str | None, workers: int) -> None:
    """Do the tasks that come through the pipe until it is closed or the parent process is gone."""
    # A cluster may send the signal to every process, and the first process sends it again.
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt), stopping(patience=STOP_TIMEOUT):
        if hasattr(os, "setpgrp"):
            # A terminal's ctrl-C reaches the first process alone, which stops the others once.
            os.setpgrp()
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=_watch_parent, args=(parent.sentinel,), daemon=True).start()
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        import torch

        # Otherwise the output of a task could end up in the log of the next.
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))

        def send(event: Event) -> None:
            # The parent may be gone; the task goes on.
            with contextlib.suppress(OSError):
                pipe.send(event)

        while True:
            record = pipe.recv()
            _redirect_output(Path(record["log"]))
            pipe.send(perform_plain(record, send))


def _redirect_output(log: Path) -> None:
    """Redirect stdout and stderr to the log, including the output of native libraries that crash."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _watch_parent(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)


def gpus(device: str) -> list[str]:
    """Return the GPUs for workers, as CUDA_VISIBLE_DEVICES names them; none if the device names one or is the CPU."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
