"""Made-up input: settings, studies, searches, `--set`, JSON records and archives, changed at random, read in one process.

Only the error of one line for the user may come out of a reader.  A batch of inputs shares a process; an input that takes
more than `SECONDS` of the processor counts as one that hangs.
"""

from __future__ import annotations

import io
import json
import random
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from command import Command
from count import Count
from damages import base
from work import SEARCH, SETTINGS, STUDY

BATCH, SECONDS = 250, 20
WORDS = [
    "null", "true", "-1", "0", "1e999", ".nan", "1" * 5000, "10000000000000000000000", "[]", "{}", "[[[[]]]]", "{a: {b: c}}",
    "x", "''", "\"\\x1b[2J\"", "../..", "/etc/passwd", "&a [*a]", "*b", "!!python/object/apply:os.system [true]", "!!omap []",
    "<<", "? ", "- ", ": ", "\t", "\0", "\u202e", "\udcff", "heun", "none", "1_000", "0x", "0b1", "2001-01-01", "|", ">",
    "%YAML 1.1", "---", "#", "=", "@", "`",
]  # fmt: skip


def changed(text: str, draw: random.Random) -> str:
    """Return a text with one to four changes: a word replaced, a line twice, removed or indented, characters changed."""
    for _ in range(draw.randint(1, 4)):
        lines = text.split("\n")
        row = draw.randrange(len(lines))
        kind = draw.randrange(6)
        if kind < 2:
            first = draw.randrange(1 + len(text))
            last = min(len(text), first + draw.choice((0, 1, 5, 20)))
            text = text[:first] + draw.choice(WORDS) + text[last:]
            continue
        if kind == 2:
            words = lines[row].split(" ")
            words[draw.randrange(len(words))] = draw.choice(WORDS)
            lines[row] = " ".join(words)
        elif kind == 3:
            lines.insert(row, draw.choice(lines))
        elif kind == 4:
            del lines[row]
        else:
            lines[row] = " " * draw.randint(1, 6) + lines[row]
        text = "\n".join(lines)
    return text


def bytes_changed(data: bytes, draw: random.Random) -> bytes:
    """Return bytes with one to four changes, or cut short."""
    changing = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        first = draw.randrange(1 + len(changing))
        last = min(len(changing), first + draw.choice((0, 1, 4, 30)))
        changing[first:last] = draw.choice((b"", draw.randbytes(draw.randint(1, 9)), bytes(changing[first:last]) * 2))
    return bytes(changing[: draw.randrange(1 + len(changing))] if draw.random() < 0.1 else changing)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Return a random JSON value."""
    kind = draw.randrange(9 if depth < 3 else 7)
    if kind < 7:
        odd = (None, True, -1, 2**64, 10**400, 1e308, float("nan"), "", "x", "../..", "\x1b[2J", "nan", 0.5, 3)
        return draw.choice(odd)
    if kind == 7:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(("name", "n", "value", "x", "")): value(draw, depth + 1) for _ in range(draw.randrange(4))}


def replaced(tree: Any, draw: random.Random) -> Any:
    """Return plain values with one of them replaced or removed."""
    if not isinstance(tree, dict | list) or not tree or draw.random() < 0.2:
        return value(draw)
    if isinstance(tree, list):
        number = draw.randrange(len(tree))
        return [replaced(item, draw) if i == number else item for i, item in enumerate(tree)]
    key = draw.choice(sorted(tree))
    if draw.random() < 0.2:
        return {name: item for name, item in tree.items() if name != key}
    return {name: replaced(item, draw) if name == key else item for name, item in tree.items()}


def readers(folder: Path) -> dict[str, tuple[int, Callable[[random.Random], object]]]:
    """Return what reads a made-up input of each kind, with its part of the trials in percent."""
    import sitkit
    from sitkit.data.latents import read_index
    from sitkit.results.lookup import numbers
    from sitkit.results.report.run import run_page
    from sitkit.results.study_results import read_results
    from sitkit.runs.config.mappings import flat
    from sitkit.runs.config.sources import assemble, configure, read_assignments, read_config, read_yaml
    from sitkit.studies.search.space import read_search
    from sitkit.studies.study_file import read_study

    points, run = configure("points"), next((folder / "runs").glob("points-*"))
    keys = sorted(flat(points.plain()))
    records = [
        path for path in sorted(folder.rglob("*.json")) if path.parent.name not in ("ae", "references", "searches")
    ]

    def settings(draw: random.Random) -> object:
        return assemble([read_config("points"), read_yaml("settings.yaml", changed(SETTINGS, draw))])

    def studies(draw: random.Random) -> object:
        study = draw.random() < 0.5
        path = folder / "made-up.yaml"
        path.write_bytes(changed(STUDY if study else SEARCH, draw).encode(errors="surrogateescape"))
        return read_study(path) if study else read_search(path, points)

    def assignments(draw: random.Random) -> object:
        key = draw.choice(keys) if draw.random() < 0.9 else changed(draw.choice(keys), draw)
        text = (
            draw.choice(WORDS)
            if draw.random() < 0.5
            else changed(draw.choice(("1e-3", "[1, 2]", "{name: heun}")), draw)
        )
        return assemble([read_config("points"), read_assignments([f"{key}={text}"])])

    def record(draw: random.Random) -> object:
        path = draw.choice(records)
        whole = path.read_bytes()
        new = (
            bytes_changed(whole, draw)
            if draw.random() < 0.5
            else json.dumps(replaced(json.loads(whole), draw)).encode()
        )
        owner = next((parent for parent in path.parents if parent.parent.name == "runs"), run)
        look: list[Callable[[], object]] = [
            lambda: sitkit.load(owner),
            lambda: sitkit.list_runs(folder / "runs"),
            lambda: sitkit.explain(str(owner), runs=folder / "runs"),
            lambda: numbers(str(owner), folder / "runs"),
            lambda: run_page(owner),
        ]
        if path.parent.parent.name == "studies":
            look = [lambda: read_results(path)]
        elif path.parent.name == "latents":
            look = [lambda: read_index(path.parent)]
        path.write_bytes(new)
        try:
            return draw.choice(look)()
        finally:
            path.write_bytes(whole)

    def archive(draw: random.Random) -> object:
        file = io.BytesIO()
        shapes = ((6, 4, 4, 1), (6, 4, 4), (6,), (), (0, 4, 4, 3), (6, 1, 4, 4))
        kinds = ("u1", "i8", "f4", "U5", "?", "c8", "M8[s]", "S3", "V4")
        arrays = {"images": np.zeros((6, 4, 4, 1), np.uint8), "labels": np.arange(6) % 3}
        for _ in range(draw.randrange(3)):
            name = draw.choice(("images", "labels", "label_names", "x", "../x"))
            arrays[name] = np.zeros(draw.choice(shapes), draw.choice(kinds))
        np.savez(file, **arrays)
        path = folder / "made-up.npz"
        path.write_bytes(bytes_changed(file.getvalue(), draw) if draw.random() < 0.7 else file.getvalue())
        return sitkit.datasets.create("npz", path=str(path), size=draw.choice((None, 8))).load()

    return {
        "settings": (30, settings), "studies": (10, studies), "assignments": (20, assignments), "records": (20, record),
        "archives": (20, archive),
    }  # fmt: skip


def inputs(root: Path, trials: int, draw: random.Random) -> Count:
    """Give made-up input to the readers, in batches."""
    count, folder = Count(), root / "work"
    base(folder)
    for kind, (percent, read) in readers(folder).items():
        left = max(1, trials * percent // 100)
        while left > 0:
            seeds = [draw.getrandbits(48) for _ in range(min(BATCH, left))]
            _batch(count, kind, read, seeds, folder)
            left -= len(seeds)
    return count


def _batch(count: Count, kind: str, read: Callable[[random.Random], object], seeds: list[int], folder: Path) -> None:
    from sitkit.runtime.errors import UserError, WorkFailed

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError

    def body() -> None:
        # Seconds of the processor: the machine may do other work.  The patience with the batch finds a reader that sleeps.
        signal.signal(signal.SIGPROF, give_up)
        warnings.simplefilter("ignore")
        for seed in seeds:
            print(f"{seed} begun", flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                read(random.Random(seed))
            except (UserError, WorkFailed):
                pass
            except TimeoutError:
                print("hangs", flush=True)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(f"tracebacks {type(error).__name__}: {str(error)[:100]!r} at {place.filename}:{place.lineno}")
            signal.setitimer(signal.ITIMER_PROF, 0)
        print("the end", flush=True)

    ended = Command((), folder, body=body).end(60 + SECONDS * len(seeds))
    seed = ""
    for line in ended.out.splitlines():
        first, _, rest = line.partition(" ")
        if rest == "begun":
            count.trials, seed = count.trials + 1, first
        elif first in ("hangs", "tracebacks"):
            count.note(first, f"{kind}, seed {seed}: {rest}")
    for program in ended.programs:
        count.note("programs", f"{kind}: {program}")
    if not ended.out.endswith("the end\n"):
        count.note(
            "tracebacks", f"{kind}, seed {seed}: the process ended with status {ended.status}: {ended.err[-200:]}"
        )
