"""Commands that make a training or a number again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sitkit.registry import UserError, registries, spec

PARTS = {"sampler": "samplers", "diffusion": "diffusions", "guidance": "guidances"}


def train_command(folder: Path) -> str:
    """The command that trains, or continues, the run in a folder."""
    return f"sitkit train {shlex.quote(str(folder / 'config.yaml'))} --runs {shlex.quote(str(folder.parent))}"


def evaluate_command(folder: Path, record: Mapping[str, Any]) -> str:
    """The command that makes a number again, from its record: every setting of it that is not its component's default."""
    recipe = record["sampling"]["recipe"]
    words = ["sitkit", "evaluate", str(folder), "-n", str(record["n"]), "--seed", str(recipe["sample"]["seed"])]
    settings: dict[str, Any] = {"metric": [changed("metrics", record["metric"])]}
    settings |= {key: changed(plural, recipe[key]) for key, plural in PARTS.items()}
    settings |= {
        f"sample.{k}": v for k, v in recipe["sample"].items() if k not in ("n", "seed") and v != DEFAULTS.get(k)
    }
    for key, value in settings.items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


DEFAULTS: Mapping[str, Any] = {"weights": "ema", "labels": "balanced"}


def changed(plural: str, plain: Mapping[str, Any]) -> Any:
    """A component's plain values without those that are its defaults; its bare name where nothing is left."""
    try:
        default = spec(registries[plural].create(plain["name"]))
    except UserError:
        default = {}
    kept = {key: value for key, value in plain.items() if key == "name" or default.get(key, ...) != value}
    return plain["name"] if len(kept) == 1 else kept
