"""Golden outputs: the outputs of sitkit 0.1 in golden/*.json, so that a move of code is seen to change nothing.

`SITKIT_GOLDEN=write pytest tests/project/test_golden.py` writes the files anew.  Do so only for a change of behaviour that
is wanted, and read the difference of the files before it is committed.  The files are of commit dfe5b12.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sameness import (
    LEVELS,
    LOSS,
    VALUE,
    answer,
    digest,
    done,
    golden,
    keys,
    machine,
    plain,
    read_json,
    read_lines,
    same,
    samples,
    tensors,
)
from support import call

import sitkit

# The only imports of internal modules: if a module moves, its line here follows.
from sitkit.cli.commands import app
from sitkit.registry import registries
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import Layer, assemble, read_config
from sitkit.studies.tasks import location_of

PRESETS = ("digits", "points", "imagenet256")
# Each crosses several kinds of components: a preset, and settings on top of it.
CROSSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gvp score sde": (
        "digits",
        {"interp": "gvp", "target": "score", "sampler": {"name": "euler-maruyama", "steps": 100, "last_step": "tweedie"}},
    ),
    "vp noise kl": (
        "digits",
        {
            "interp": "vp-sbdm", "target": "noise", "weight": "noise", "diffusion": "kl",
            "sampler": {"name": "euler-maruyama", "steps": 50},
        },
    ),
    "data guided": ("digits", {"target": "data", "guidance": {"name": "cfg", "scale": 1.5}, "sampler": "dopri5"}),
    "ddpm discrete": (
        "digits",
        {
            "interp": "ddpm", "target": "noise", "timestep": {"name": "discrete", "levels": 1000},
            "sampler": {"name": "unipc", "steps": 10},
        },
    ),
    "kl-eta": (
        "digits", {"interp": "gvp", "sampler": "stochastic-heun", "diffusion": {"name": "kl-eta", "eta": 0.5}},
    ),
    "cfg-zero kid": (
        "digits",
        {
            "guidance": {"name": "cfg-zero", "scale": 2.0}, "metric": {"name": "kid", "features": "run-classifier"},
            "timestep": "logit-normal",
        },
    ),
    "two metrics": ("digits", {"metric": ["precision", "recall"], "sampler": {"name": "rk4", "steps": 6}}),
    "min-snr multistep": (
        "digits",
        {"weight": {"name": "min-snr", "gamma": 4}, "target": "data", "sampler": {"name": "dpm++-2m", "steps": 12}},
    ),
    "points ot": (
        "points", {"interp": "vp-sbdm", "target": "score", "coupling": "independent", "sampler": "midpoint"},
    ),
    "mixture exact": ("points", {"data": "gaussian-mixture", "backbone": "exact", "metric": "mmd"}),
    "imagenet sde": (
        "imagenet256",
        {
            "backbone": "sit-xl/2", "sampler": {"name": "euler-maruyama", "steps": 250, "last_step": "tweedie"},
            "diffusion": "sigma", "guidance": {"name": "cfg", "scale": 1.5}, "metric": "sfid",
        },
    ),
    "averages": (
        "digits",
        {"train": {"ema": [0.99, 0.9], "posthoc": [0.05, 0.1], "clip": 1.0}, "sample": {"ema": 0.9, "seed": 3, "n": 7}},
    ),
    "labels": ("digits", {"sample": {"labels": [1, 2, 3]}, "diffusion": "zero", "train": {"schedule": "cosine", "seed": 5}}),
    "shifted grid": (
        "digits", {"interp": "gvp", "sampler": {"name": "heun", "steps": 9, "grid": {"name": "shift"}}, "loss": "interpolant"},
    ),
    "raw weights": ("points", {"sample": {"weights": "raw", "labels": "none"}, "sampler": "euler", "target": "noise"}),
    "autoguidance": (
        "digits", {"guidance": {"name": "autoguidance", "run": "digits-linear-velocity-sit-0123456789ab"}},
    ),
    "npz recall": ("digits", {"data": {"name": "npz", "path": "my/images.npz"}, "metric": "inception-score"}),
}  # fmt: skip
# Commands that cannot succeed, and three that succeed in an empty folder.
WRONG = (
    ("nothing",),
    ("train", "--interp", "liner"),
    ("train", "digit"),
    ("train", "--no-such-option"),
    ("train", "--set", "train.lr=fast"),
    ("train", "--set", "train.learning=1"),
    ("train", "--set", "train"),
    ("sample", "no-such-run"),
    ("evaluate", "no-such-run", "--metric", "frechet"),
    ("list", "nothing"),
    ("show", "interpolant", "liner"),
    ("show", "interpolant"),
    ("ablate", "no-such-study.yaml"),
    ("ablate", "no-such-study.yaml", "--seeds", "a"),
    ("explain", "nothing:1"),
    ("verify", "nothing"),
    ("report", "nothing"),
    ("diff", "nothing", "nothing"),
    ("convert", "nothing", "--to", "x.safetensors"),
    ("plugin", "new", "my-path", "--kind", "nothing"),
    ("--version",),
    ("list",),
    ("runs",),
)
# The golden file holds every name and shape of these state dicts. For the other backbones it holds a hash of them.
WHOLE = ("mlp", "sit-xs/2")
TRAIN = (
    "train", "digits", "--backbone", "sit-xs/2", "--steps", "20", "--set", "train.batch=16", "--set", "run.sample_every=0",
    "--set", "run.track=false", "--set", "run.log_every=1", "--set", "run.checkpoint_every=10",
    "--set", "train.ema_warmup=false",
)  # fmt: skip


def made(base: str, values: dict[str, Any]) -> Config:
    """Return the configuration of a preset with settings on top of it."""
    return assemble([read_config(base), Layer(values)])


def identities(config: Config) -> dict[str, str]:
    """Return the identities of a configuration."""
    place = location_of(config)
    return {
        "run": place.run,
        "training": place.training,
        "sampling": place.samples,
        "measurement": place.measurement,
    }


def versions(config: Config) -> dict[str, int]:
    """Return the versions of the components and groups of settings of a configuration that are not 1."""
    values = {key: value[0] if isinstance(value, tuple) else value for key, value in config}
    return {key: value.version for key, value in values.items() if value.version != 1}


def test_identities() -> None:
    cases = {name: (name, {}) for name in PRESETS} | CROSSED
    configs = {name: made(base, values) for name, (base, values) in cases.items()}
    now = {name: identities(config) | {"versions": versions(config)} for name, config in configs.items()}
    kept = golden("identities", now)
    changed = [name for name in now if now[name] != kept[name] and now[name]["versions"] == kept[name]["versions"]]
    assert not changed, (
        f"the identities of {changed} changed, so results made before are not found.  If a formula or the meaning of a "
        "default changed, raise `version` of its component or group of settings; else give the new field a default that "
        "changes nothing."
    )
    assert now == kept


def test_list(tmp_path: Path) -> None:
    now: dict[str, Any] = {}
    for words in ((), ("presets",), ("experiments",)):
        command = [sys.executable, "-m", "sitkit", "list", *words, "--json"]
        printed = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
        now |= {
            plural: [{key: e[key] for key in ("name", "fields", "from") if key in e} for e in entries]
            for plural, entries in printed.items()
        }
    now["order"] = list(now)
    assert now == golden("list", now)


def test_state_dicts() -> None:
    now: dict[str, Any] = {}
    for name in own(sitkit.backbones):
        backbone = sitkit.backbones.create(name)
        if not backbone.trainable:
            continue
        shape = (2,) if name == "mlp" else (4, 32, 32) if name.startswith("sit-") and "-xs/" not in name else (1, 8, 8)
        with torch.device("meta"):
            network = backbone.build(shape=shape, num_classes=10)
        shapes = {key: list(tensor.shape) for key, tensor in sorted(network.state_dict().items())}
        now[name] = {
            "shape": list(shape),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "entries": len(shapes),
            "sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        }
        if name in WHOLE:
            now[name]["names"] = shapes
    assert now == golden("state_dicts", now)


def taken(parameter: Any) -> dict[str, Any]:
    """Return the type of a parameter and its limits, as newer and older releases of typer keep them."""
    if hasattr(parameter, "type_descriptor"):
        return {"type": parameter.type_descriptor.annotation.__name__, "range": [parameter.min, parameter.max]}
    names = {"text": "str", "integer": "int", "boolean": "bool", "path": "Path", "file": "Path"}
    kind = parameter.type
    name = kind.name.removesuffix(" range")
    return {"type": names.get(name, name), "range": [getattr(kind, "min", None), getattr(kind, "max", None)]}


def described(command: Any) -> dict[str, Any]:
    """Return the parameters and subcommands of a command, without the sentences of its help."""
    found: dict[str, Any] = {
        "hidden": command.hidden,
        "no_args_is_help": command.no_args_is_help,
        "panel": text(getattr(command, "rich_help_panel", None)),
        "parameters": [
            {
                "name": p.name,
                "is": p.param_type_name,
                "options": [*p.opts, *p.secondary_opts],
                "metavar": p.metavar,
                **taken(p),
                "default": text(p.default),
                "required": p.required,
                "hidden": p.hidden,
                "flag": getattr(p, "is_flag", False),
                "multiple": p.multiple,
                "nargs": p.nargs,
                "panel": text(p.rich_help_panel),
                "completes": getattr(p, "_custom_shell_complete", None) is not None,
            }
            for p in command.params
            # Typer adds these where it can tell the shell.
            if p.name not in ("install_completion", "show_completion")
        ],
    }
    if hasattr(command, "commands"):
        found["commands"] = {name: described(inner) for name, inner in command.commands.items()}
    return found


def text(value: Any) -> Any:
    """Return a default, or what typer wraps one in, as JSON can keep it."""
    if type(value).__name__ == "DefaultPlaceholder":
        value = value.value
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def test_command_line() -> None:
    import typer

    command = typer.main.get_command(app)
    now = described(command) | {"context": plain(command.context_settings)}
    assert now == golden("command_line", now)


def test_exit_status_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    now = {" ".join(words): call(*words).status for words in WRONG}
    assert now == golden("exit_status", now)
    assert not list(tmp_path.iterdir())


def type_name(annotation: Any) -> str:
    """Return a type as text; every class of sitkit is called a component, so that names and modules may change."""
    shown = re.sub(r"<class '([^']*)'>", r"\1", str(annotation))
    shown = re.sub(r"sitkit\.[\w.]+", "component", shown)
    return re.sub(r"\b(?:typing|pathlib|pathlib\._local|collections\.abc)\.(?=\w)", "", shown)


def settings(model: type[BaseModel], key: str = "") -> dict[str, Any]:
    """Return every key of a model and of the models within it, with its type, its limits and its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= settings(kind, f"{key}{name}.")
            continue
        default = "" if field.default is PydanticUndefined else plain(text(field.default))
        limits = [str(limit) for limit in field.metadata]
        found[f"{key}{name}"] = {"type": type_name(kind), "limits": limits, "default": default}
    return found


def own(registry: Any) -> list[str]:
    """Return the names that sitkit itself registers; other tests of this process may have added more."""
    return [name for name in registry.names() if registry.origin(name).partition(".")[0] == "sitkit"]


def fields(component: type[Any]) -> dict[str, str]:
    """Return the fields of a component with their types."""
    types = typing.get_type_hints(component)
    return {field.name: type_name(types[field.name]) for field in dataclasses.fields(component)}


def test_settings() -> None:
    now = {
        "keys": settings(Config),
        "order": list(Config.model_fields),
        "presets": {name: plain(made(name, {}).plain()) for name in PRESETS},
        "fields": {
            registry.plural: {name: fields(registry[name]) for name in own(registry) if name not in registry.presets()}
            for registry in registries.values()
        },
    }
    assert now == golden("settings", now)


def test_training_sampling_and_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done(*TRAIN)
    ode = answer("sample", "latest", "-n", "16", "--sampler", "heun", "--steps", "4")
    sde = answer("sample", "latest", "-n", "16", "--sampler", "euler-maruyama", "--steps", "4", "--seed", "1")
    guided = answer("sample", "latest", "-n", "16", "--steps", "4", "--guidance", "cfg")
    drawn = {"ode": ode, "sde": sde, "guided": guided}
    values = answer("evaluate", "latest", "-n", "64", "--metric", "frechet,precision")
    (folder,) = (path for path in Path("runs").iterdir() if (path / "config.yaml").is_file())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state, header = tensors(folder / "checkpoints/step-00000020.safetensors")
    lines = read_lines(folder / "metrics.jsonl")
    arrays = {name: samples(Path(record["path"])) for name, record in drawn.items()}
    now = {
        "machine": machine(),
        "always": {
            "run": folder.as_posix(),
            "files": [path.relative_to(folder).as_posix() for path in files],
            "keys": {p.relative_to(folder).as_posix(): keys(read_json(p)) for p in files if p.suffix == ".json"}
            | {"metrics.jsonl": sorted({key for line in lines for key in keys(line)})}
            | {f"checkpoint {key}": keys(value) for key, value in header.items()},
            "printed keys": {name: keys(record) for name, record in (drawn | {"evaluate": values}).items()},
            "samples": {
                name: {
                    "path": record["path"],
                    "nfe": record["nfe"],
                    "recipe": record["recipe"],
                    "times": record["times"],
                }
                for name, record in drawn.items()
            },
            "evaluations": {e["metric"]["name"]: e["path"] for e in values},
            "tensors": {name: [str(array.dtype), list(array.shape)] for name, array in state.items()},
            "arrays": {
                name: {key: [str(a.dtype), list(a.shape)] for key, a in found.items()} for name, found in arrays.items()
            },
        },
        "losses": [line["loss"] for line in lines if "loss" in line],
        "values": {f"{e['metric']['name']} {key}": e[key] for e in values for key in ("value", "stderr", "halves")},
        "first images": {name: found["images"][0].ravel().tolist() for name, found in arrays.items()},
        "sha256": {name: digest(found.items()) for name, found in arrays.items()}
        | {"checkpoint": digest(state.items())},
    }
    kept = golden("training", now)
    assert plain(now["always"]) == kept["always"]
    same(now["losses"], kept["losses"], kept["machine"], LOSS)
    # A precision is a fraction of 64 samples; one sample may fall on the other side.
    same(now["values"], kept["values"], kept["machine"], VALUE, abs=1 / 64)
    for name, image in now["first images"].items():
        same(image, kept["first images"][name], kept["machine"], 0, abs=LEVELS)
    if machine() == kept["machine"]:
        assert now["sha256"] == kept["sha256"]
