"""Damaged files: every kind of file that commands read, damaged in eight ways, under every command that may read it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from command import done, run
from count import Count, spread
from PIL import Image
from work import ENCODE, autoencoder, lasting, written

RUN = "runs/points-*"
# Kinds of file by a pattern; the first path that fits is damaged, of checkpoints the last.
FILES = {
    "settings of a run": f"{RUN}/config.yaml",
    "environment": f"{RUN}/environment.json",
    "description of data": f"{RUN}/data.json",
    "curves": f"{RUN}/metrics.jsonl",
    "older checkpoint": f"{RUN}/checkpoints/*09.safetensors",
    "newest checkpoint": f"{RUN}/checkpoints/*12.safetensors",
    "preview": f"{RUN}/previews/*.png",
    "record of samples": f"{RUN}/samples/*/record.json",
    "samples": f"{RUN}/samples/*/samples.npz",
    "picture of samples": f"{RUN}/samples/*/grid.png",
    "number": f"{RUN}/evaluations/*.json",
    "likelihood": f"{RUN}/likelihoods/*.json",
    "number of real data": "runs/references/real-*.json",
    "measured losses": f"{RUN}/*loss*.json",
    "record of a search": f"{RUN}/searches/*.json",
    "database of a search": f"{RUN}/searches/*.db",
    "results of a study": "studies/*/results.json",
    "settings": "points.yaml",
    "study": "study.yaml",
    "search": "search.yaml",
    "archive of images": "images.npz",
    "picture": "pictures/a/0.png",
    "run in one file": "one.safetensors",
    "autoencoder's settings": "ae/config.json",
    "autoencoder's weights": "ae/*.safetensors",
    "index of latents": "latents/index.json",
    "plan of latents": "latents/plan.json",
    "latents": "latents/shard-00001.safetensors",
}
# Files that people write and that have no digest: another content is another request.
INPUTS = ("settings", "study", "search", "archive of images", "picture", "curves", "autoencoder's settings")
TRAIN = (
    "--backbone", "sit-xs/2", "--set", "backbone.hidden_size=16", "--set", "backbone.num_heads=2", "--set", "backbone.depth=1",
    "--steps", "2", "--set", "train.batch=4", "--set", "run.track=false", "--set", "run.sample_every=0", "--device", "cpu",
)  # fmt: skip
LATENTS = ("train", "--data", "latents", "--set", "data.path=latents", "--autoencoder", "sd-vae", "--set", "autoencoder.path=ae",
           *TRAIN)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "points.yaml"),
    "train on an archive": ("train", "--data", "npz", "--set", "data.path=images.npz", *TRAIN),
    "train on a folder": (
        "train",
        "--data",
        "image-folder",
        "--set",
        "data.path=pictures",
        "--set",
        "data.size=8",
        *TRAIN,
    ),
    "train on latents": LATENTS,
    "encode": ENCODE,
    "sample": ("sample", "RUN", "-n", "20", "--json"),
    "sample again": ("sample", "RUN", "-n", "40", "--json"),
    "sample one file": ("sample", "one.safetensors", "-n", "20", "--json"),
    "evaluate": ("evaluate", "RUN", "-n", "20", "--json"),
    "evaluate again": ("evaluate", "RUN", "-n", "40", "--json"),
    "likelihood": ("likelihood", "RUN", "-n", "8", "--sampler", "heun", "--steps", "2", "--json"),
    "losscurve": ("losscurve", "RUN", "--json"),
    "runs": ("runs", "--json"),
    "explain": ("explain", "RUN", "--json"),
    "verify": ("verify", "RUN", "--json"),
    "diff": ("diff", "RUN", "OTHER", "--json"),
    "report of a run": ("report", "RUN"),
    "report of a study": ("report", "study"),
    "check": ("check", "study.yaml", "--json"),
    "ablate": ("ablate", "study.yaml", "--json"),
    "search": ("search", "RUN", "search.yaml", "--json"),
    "convert": ("convert", "RUN", "--to", "two.safetensors"),
}


def base(folder: Path) -> dict[str, tuple[str, ...]]:
    """Make a folder with every kind of file, and return the commands that can be run in it."""
    written(folder)
    for number in range(6):
        place = folder / "pictures" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(place / f"{number}.png")
    done(("train", "points.yaml"), folder)
    run_name = next((folder / "runs").glob("points-*")).name
    done(("ablate", "study.yaml"), folder)
    other = next(path.name for path in sorted((folder / "runs").glob("points-*")) if path.name != run_name)
    for words in (
        ("evaluate", run_name, "-n", "40"), COMMANDS["likelihood"], COMMANDS["losscurve"], COMMANDS["search"],
        ("convert", "RUN", "--to", "one.safetensors"),
    ):  # fmt: skip
        done([run_name if word == "RUN" else word for word in words if word != "--json"], folder)
    commands = dict(COMMANDS)
    if autoencoder(folder / "ae"):
        done(ENCODE, folder)
    else:
        del commands["encode"], commands["train on latents"]
    names = {"RUN": run_name, "OTHER": other}
    return {name: tuple(names.get(word, word) for word in words) for name, words in commands.items()}


def truncated(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(1 + path.stat().st_size)])


def emptied(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def flipped(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.randint(1, 3000)))


def wrong_type(path: Path, draw: random.Random) -> None:
    """One value of a JSON or YAML file is of another type; of other files, the whole content is JSON."""
    values: list[Any] = [None, True, -1, 10**30, "x", [], {}, 1e400, [[[]]], {"a": {"b": []}}]
    try:
        tree = json.loads(path.read_text())
    except ValueError:
        path.write_text(json.dumps(draw.choice(values)))
        return
    node = tree
    while isinstance(node, dict) and node:
        key = draw.choice(sorted(node))
        if draw.random() < 0.4 or not isinstance(node[key], dict) or not node[key]:
            node[key] = draw.choice(values)
            break
        node = node[key]
    path.write_text(json.dumps(tree if draw.random() < 0.8 else draw.choice(values)))


def not_text(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data.insert(draw.randrange(1 + len(data)), draw.choice((0xFF, 0xC0, 0x80)))
    path.write_bytes(data)


def folder_instead(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path, draw: random.Random) -> None:
    """A link to itself, which no user can open, not even root."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    truncated, emptied, flipped, garbage, wrong_type, not_text, folder_instead, unreadable,
)  # fmt: skip


def damages(root: Path, trials: int, draw: random.Random) -> Count:
    """Damage a file and run a command; the same answer, a warning, or one line that says why not."""
    count, folder = Count(), root / "work"
    commands = base(folder)
    shutil.move(folder, root / "base")
    answers: dict[str, Any] = {}
    for name, words in commands.items():
        shutil.copytree(root / "base", folder, symlinks=True)
        answers[name] = _answer(done(words, folder).out)
        shutil.rmtree(folder)
    kinds = {kind: sorted((root / "base").glob(pattern)) for kind, pattern in FILES.items()}
    triples = [
        (kind, damage, command) for kind, paths in kinds.items() if paths for damage in DAMAGES for command in commands
    ]
    draw.shuffle(triples)
    for trial, (kind, damage, command) in enumerate(spread(triples, trials)):
        shutil.copytree(root / "base", folder, symlinks=True)
        damage(folder / draw.choice(kinds[kind]).relative_to(root / "base"), draw)
        ended = run(commands[command], folder)
        what = f"{command}, {kind} {damage.__name__}, trial {trial}"
        if count.check(ended, what) and ended.status == 0 and kind not in INPUTS and "warning:" not in ended.err:
            answer = _answer(ended.out)
            if answer is not None and answer != answers[command]:
                count.note("wrong", what)
        shutil.rmtree(folder)
    return count


def _answer(out: str) -> Any:
    """Return the answer of a command as plain values; None for a command that prints text."""
    try:
        return lasting(json.loads(out))
    except ValueError:
        return None
