"""A tracking server that is dead, hangs, answers 500, or dies and comes back; and databases after kills and crowds.

The work ends as without a server, and everything arrives at the next command that finds one.
"""

from __future__ import annotations

import http.server
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from command import Command, done, run
from count import Count, spread
from work import differences, ends, written

TRACKED = ("--set", "run.track=true")
TRAIN = ("train", "points.yaml", *TRACKED)


def free_port() -> int:
    """Return a port on which no server answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers each request with 500."""

    def do_GET(self) -> None:
        """Answer 500."""
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


def hanging(port: int) -> None:
    """Accept connections for ever, and answer none."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen(64)
        kept = []
        while True:
            kept.append(server.accept())


def failing(port: int) -> None:
    """Answer 500 for ever."""
    http.server.HTTPServer(("127.0.0.1", port), Failing).serve_forever()


@contextmanager
def serving(body: Callable[[int], None] | None, folder: Path) -> Iterator[str]:
    """Yield the address of a bad server; without a body there is none."""
    port = free_port()
    server = Command((), folder, body=lambda: body(port)) if body else None
    while server and socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    if server:
        server.send(signal.SIGKILL)
        server.end(10)


def statuses(database: Path) -> list[str]:
    """Return the status of each run in a database of MLflow."""
    with sqlite3.connect(database) as connection:
        return [status for (status,) in connection.execute("select status from runs")]


def check_arrived(count: Count, database: Path, expected: int, what: str) -> None:
    """Count the runs that are not there, are there twice, or are called RUNNING."""
    found = statuses(database) if database.is_file() else []
    if "RUNNING" in found:
        count.note("running", f"{what}: {found}")
    if len(found) != expected:
        count.note("unequal", f"{what}: {len(found)} runs in the store, not {expected}")


def bad_server(body: Callable[[int], None] | None) -> Callable[[Count, Path, dict[str, str], str, random.Random], None]:
    """Return the trial of a server that does not do its work."""

    def trial(count: Count, folder: Path, right: dict[str, str], what: str, draw: random.Random) -> None:
        with serving(body, folder) as address:
            ended = run(TRAIN, folder, env={"MLFLOW_TRACKING_URI": address})
        count.check(ended, what, (0,))
        if (said := ended.err.count("did not take the run")) != 1:
            count.note("status", f"{what}: {said} lines say that the server did not take the run")
        count.check(run(TRAIN, folder), f"{what}, again with a store", (0,))
        count.trials -= 1
        check_arrived(count, folder / "mlflow.db", 1, what)
        if unequal := differences(_ours(folder), right):
            count.note("unequal", f"{what}: {', '.join(unequal[:4])}")

    return trial


def killed(count: Count, folder: Path, right: dict[str, str], what: str, draw: random.Random) -> None:
    """Kill a tracked training three times, then run three commands on the folder."""
    for _ in range(3):
        command = Command(TRAIN, folder)
        command.watch(draw.uniform(0.1, 2))
        command.send(signal.SIGKILL)
        command.end()
    count.trials += 1
    for words in (TRAIN, ("evaluate", "latest"), TRAIN):
        count.check(run(words, folder), f"{what}, {words[0]}", (0,))
        count.trials -= 1
    # The training and the evaluation.
    check_arrived(count, folder / "mlflow.db", 2, what)


def crowd(count: Count, folder: Path, right: dict[str, str], what: str, draw: random.Random) -> None:
    """Four trainings on a new store at once."""
    commands = [Command((*TRAIN, "--seed", str(seed)), folder) for seed in range(4)]
    for command in commands:
        count.check(command.end(), what, (0,))
        count.trials -= 1
    count.trials += 1
    check_arrived(count, folder / "mlflow.db", 4, what)


def coming_back(count: Count, folder: Path, right: dict[str, str], what: str, draw: random.Random) -> None:
    """A real server that is killed during a training; another one with its database comes before the next command."""
    port = free_port()
    server = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server += ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "served"]
    env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *server], cwd=folder, env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None:
                raise SystemExit("mlflow server did not start")
            time.sleep(0.1)
        return process

    address = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    long = (*TRAIN, "--steps", "60")
    first = start()
    try:
        command = Command(long, folder, env=address)
        command.watch(60, lambda: any(folder.glob("runs/*/tracking.json")))
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    count.check(command.end(), what, (0,))
    second = start()
    try:
        count.check(run(long, folder, env=address), f"{what}, again", (0,))
        count.trials -= 1
    finally:
        os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    check_arrived(count, folder / "server.db", 1, what)


TRIALS = {
    "dead": bad_server(None),
    "hanging": bad_server(hanging),
    "answering 500": bad_server(failing),
    "killed trainings": killed,
    "four on a new store": crowd,
    "dying and coming back": coming_back,
}


def _ours(folder: Path) -> dict[str, str]:
    return {
        name: digest for name, digest in ends(folder).items() if name.startswith("runs/") and "tracking" not in name
    }


def tracker(root: Path, trials: int, draw: random.Random) -> Count:
    """Train with each kind of store, and look at what arrives."""
    count, alone = Count(), written(root / "alone")
    # Without a path of its own in the settings, the folder changes nothing.
    done(("train", "points.yaml", "--set", "run.track=true"), alone)
    right = _ours(alone)
    for trial, name in enumerate(spread(list(TRIALS), trials)):
        TRIALS[name](count, written(root / f"trial-{trial}"), right, f"{name}, trial {trial}", draw)
    return count
