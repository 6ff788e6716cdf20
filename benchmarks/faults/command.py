"""A command in a process of its own, forked from one that has imported everything, so that a trial takes well under a second.

Signals, limits and kills are real.  The child reports each write and each program that it starts through a pipe.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import re
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Seconds after which a command counts as one that hangs: far above the slowest, on a machine that does other work too.
PATIENCE = 120.0
TRACEBACK = "Traceback (most recent call last)"
# sitkit asks git for the commit of its own checkout.
HARMLESS = ("git",)


@dataclass
class Ended:
    """The end of a command: its status (None: it hung and was killed), its output, and the programs that it started."""

    status: int | None
    out: str
    err: str
    seconds: float
    writes: int
    programs: list[str]
    peak_mib: float

    @property
    def traceback(self) -> bool:
        """Whether it ended with a traceback, or in a way that main() does not know."""
        return TRACEBACK in self.err or (self.status is not None and self.status < 0)

    @property
    def lines(self) -> list[str]:
        """The lines on standard error that are not progress."""
        return [line for line in self.err.splitlines() if re.match(r"error:|warning:|stopped", line)]


class Command:
    """`sitkit WORDS`, running in a folder; or `body`, a function in place of the command."""

    def __init__(
        self,
        words: Sequence[str | Path],
        folder: Path,
        env: dict[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
        body: Callable[[], object] | None = None,
    ) -> None:
        self.words, self.began = [str(word) for word in words], time.monotonic()
        self.log = Path(tempfile.mkdtemp(prefix="sitkit-fault-"))
        self.pipe, theirs = os.pipe()
        self.writes, self.programs, self._rest = 0, [], b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _be(self.words, folder, self.log, theirs, env or {}, before, body)
        os.close(theirs)
        # Here too: a signal may be sent before the child has done it.
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def watch(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Follow the reports for a time, or until a condition.  Return whether the command still runs."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not until():
            if select.select([self.pipe], [], [], left)[0]:
                text = os.read(self.pipe, 65536)
                if not text:
                    return False
                *reports, self._rest = (self._rest + text).split(b"\n")
                self.writes += reports.count(b"w")
                self.programs += [report[1:].decode(errors="replace") for report in reports if report[:1] == b"p"]
        return True

    def send(self, number: int) -> None:
        """Send a signal to the command and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for the end; kill a command that hangs."""
        hung = self.watch(patience)
        # Workers hold the pipe, too: what is left of the group ends now.
        if hung:
            # The stacks of all threads, on standard error.
            os.kill(self.pid, signal.SIGUSR2)
            self.watch(2)
            self.send(signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        self.send(signal.SIGKILL)
        os.close(self.pipe)
        out, err = ((self.log / name).read_text(errors="replace") for name in ("out", "err"))
        for path in self.log.iterdir():
            path.unlink()
        self.log.rmdir()
        ended = None if hung else os.waitstatus_to_exitcode(status)
        seconds, peak = time.monotonic() - self.began, usage.ru_maxrss / 1024
        return Ended(ended, out, err, seconds, self.writes, self.programs, peak)


def run(words: Sequence[str | Path], folder: Path, **options: Any) -> Ended:
    """Run `sitkit WORDS` in a folder to its end."""
    return Command(words, folder, **options).end()


def done(words: Sequence[str | Path], folder: Path, **options: Any) -> Ended:
    """Run a command that must succeed: the fault is in the drill if it does not."""
    ended = run(words, folder, **options)
    if ended.status != 0:
        raise SystemExit(f"sitkit {' '.join(map(str, words))}: status {ended.status}\n{ended.err}")
    return ended


def _be(
    words: list[str],
    folder: Path,
    log: Path,
    pipe: int,
    env: dict[str, str],
    before: Callable[[], object],
    body: Callable[[], object] | None,
) -> None:
    """Be the command: set up the process, call main(), and end as the interpreter does."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        for number, name, stream in ((1, "out", "stdout"), (2, "err", "stderr")):
            os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT), number)
            setattr(sys, stream, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        os.environ.update(env)
        sys.argv = ["sitkit", *words]
        # A shell that starts the drills in the background would have them ignore ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.register(signal.SIGUSR2, file=sys.stderr)
        sys.addaudithook(_reporter(pipe))
        before()
        from sitkit.cli import main

        (body or main)()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _reporter(pipe: int) -> Callable[[str, tuple[Any, ...]], None]:
    owner = os.getpid()

    def report(event: str, arguments: tuple[Any, ...]) -> None:
        line = b""
        if event in ("os.rename", "os.remove", "os.mkdir", "sqlite3.connect") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            line = b"w"
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "pty.spawn"):
            name = str(arguments[0])
            if Path(name).name not in HARMLESS and not (event == "os.exec" and os.getpid() != owner):
                line = b"p" + name.encode(errors="replace").replace(b"\n", b" ")
        if line:
            with contextlib.suppress(OSError):
                os.write(pipe, line + b"\n")

    return report


def preload() -> None:
    """Import what the commands import, once for all trials."""
    import pkgutil

    import torch

    import sitkit
    from sitkit.registry import registries

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(sitkit.__path__, "sitkit."):
        if not module.name.endswith(("__main__", ".ray", "mlflow_model")):
            importlib.import_module(module.name)
    for registry in registries.values():
        _ = registry.values()
    for name in (
        "mlflow", "mlflow.store.tracking.sqlalchemy_store", "optuna.storages", "sklearn.datasets", "scipy.stats",
        "matplotlib.pyplot", "matplotlib.backends.backend_agg", "jinja2", "ruamel.yaml", "datasets", "safetensors.torch",
        "diffusers.models.autoencoders.autoencoder_kl", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "einops",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # A collection in a child would copy every page of the parent.
    gc.collect()
    gc.freeze()


def limit(kind: int, size: int) -> Callable[[], object]:
    """Return a function that limits a resource of the process that calls it."""
    return lambda: resource.setrlimit(kind, (size, size))
