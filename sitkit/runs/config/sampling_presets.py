"""Presets of sampling, as a search saves its winner: files that `sitkit sample RUN --preset NAME` reads."""

from __future__ import annotations

from pathlib import Path

from sitkit.registry.settings_files import presets
from sitkit.runs.config.plain_yaml import to_yaml
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import Layer, read_yaml
from sitkit.runtime.errors import UserError, suggest
from sitkit.runtime.files import write_file

PRESETS_FOLDER = "presets"
KEYS = ("sampler", "diffusion", "guidance", "sample")


def write_preset(run_folder: Path, name: str, config: Config, comment: str = "") -> Path:
    """Write the sampler, w, guidance and weights of `config` to presets/<name>.yaml of a run, below a comment."""
    plain = config.plain()
    values = {key: plain[key] for key in KEYS[:3]} | {
        "sample": {key: plain["sample"][key] for key in ("weights", "ema")}
    }
    path = run_folder / PRESETS_FOLDER / f"{name}.yaml"
    write_file(path, "".join(f"# {line}\n" for line in comment.splitlines()) + to_yaml(values))
    return path


def read_preset(run_folder: Path, name: str) -> Layer:
    """Return the settings of a run's preset.  Raises UserError with the nearest name, or for a key that is not of sampling."""
    folder = Path(run_folder) / PRESETS_FOLDER
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        has = f"It has: {', '.join(known)}." if known else "It has none; `sitkit search` makes one."
        trains = f" ({name!r} is a preset of `sitkit train`.)" if name in presets else ""
        raise UserError(f"{run_folder} has no way of sampling {name!r}.{suggest(name, known)} {has}{trains}")
    layer = read_yaml(folder / f"{name}.yaml")
    for key in layer.values:
        if key not in KEYS:
            raise UserError(
                f"{layer.where[key]}: a preset of sampling has the keys {', '.join(KEYS)}; {key!r} is another."
            )
    return layer
