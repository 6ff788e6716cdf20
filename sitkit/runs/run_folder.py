"""The files of a run on disk, how a run is found, and the list of runs.

runs/<slug>-<training identity>/
    config.yaml  environment.json  data.json  metrics.jsonl  checkpoints/  ema/  previews/
    samples/<identity>/  evaluations/<identity>.json  likelihoods/<identity>.json
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitkit.registry import essence, metrics
from sitkit.runs.checkpoint import checkpoints, header_of_checkpoint, latest_checkpoint, step_of
from sitkit.runs.config.identity import number_identity, recorded_samples, slug, training_identity
from sitkit.runs.config.mappings import flat
from sitkit.runs.config.plain_yaml import to_yaml
from sitkit.runs.config.records import EnvironmentRecord, ShownNumber
from sitkit.runs.config.schema import SAMPLING_KEYS, TRAINING_KEYS, Config
from sitkit.runs.config.sources import Layer, read_yaml, validate
from sitkit.runs.one_file import SCHEME, download, read_run_header, settings_of_file
from sitkit.runtime.errors import UserError, suggest
from sitkit.runtime.files import exists, listed, read_json, read_record, write_file
from sitkit.runtime.hashing import identity
from sitkit.runtime.locks import locked

LOCK = ".lock"
_IDENTITY = re.compile(r"-([0-9a-f]{12})$")


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config = path / "config.yaml"  # every setting resolved
        self.environment = path / "environment.json"  # code, packages and machine; fingerprints of data and autoencoder
        self.data = path / "data.json"  # the description of the data that sampling needs
        self.metrics = path / "metrics.jsonl"  # the curves of the training
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "ema"  # averages from which post-hoc averages are rebuilt
        self.previews = path / "previews"  # pictures of samples during the training
        self.samples = path / "samples"
        self.evaluations = path / "evaluations"
        self.likelihoods = path / "likelihoods"

    def read_environment(self) -> dict[str, Any]:
        """Return the record of code, packages and machine; empty if there is none."""
        if not exists(self.environment):
            return {}
        remedy = "Copy it again, or train again from step 0 with --restart."
        return read_record(self.environment, EnvironmentRecord, "the record of a training", remedy)


def folder_of(config: Config) -> Path:
    """Return the folder of the run of a configuration.

    It is named by the identity of the training.  A run of the same training may have another name: release 0.1 made it, or
    its data are not on this machine.
    """
    name, wanted = slug(config), training_identity(config)
    folder = config.run.folder / f"{name}-{wanted}"
    if not folder.is_dir():
        for other in sorted(config.run.folder.glob(f"{name}-*/config.yaml")):
            if _IDENTITY.search(other.parent.name) and _is_run_of(RunFolder(other.parent), config, wanted):
                return other.parent
    return folder


def _is_run_of(files: RunFolder, config: Config, wanted: str) -> bool:
    """Return whether a run has the training of a configuration: equal settings, and the same data or the same path of them."""
    try:
        record, contents = files.read_environment(), recorded_contents(files.path)
        if "settings" in record:
            training = record.get("training")
        else:
            training = training_identity(read_config_of(files.path), contents, recorded_packages(record))
        if training == wanted:
            return True
        paths = _paths(config)
        same = bool(paths) and training == training_identity(config, contents)
        return same and _paths(read_config_of(files.path)) == paths
    except UserError:
        return False


def _paths(config: Config) -> list[Path]:
    """Return the absolute paths of a configuration's data and autoencoder."""
    parts = (config.data, config.autoencoder)
    return [Path(getattr(part, place)).expanduser().resolve() for part in parts for place in part.places()]


def recorded_contents(source: Path) -> dict[str, str]:
    """Return the fingerprints of "data" and "autoencoder" that a run's folder or file records."""
    record = read_run_header(source)["fingerprints"] if source.is_file() else RunFolder(source).read_environment()
    return {part: record[part] for part in ("data", "autoencoder") if part in record}


def recorded_packages(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the packages of components in an environment, as `origins` makes them."""
    return record.get("components") or {}


def find_record(path: Path, records: str, identify: Callable[[dict[str, Any]], Sequence[str]]) -> Path:
    """Return the path of a result that is named by its identity; that of release 0.1's record of it, if there is one.

    Args:
        path: the path that ends with the identity.
        records: a pattern of the records beside it.
        identify: returns the identities of a record of release 0.1, which holds none.
    """
    for record in [] if exists(path) else sorted(path.parent.glob(records)):
        with contextlib.suppress(UserError, ValueError, LookupError, TypeError, AttributeError):
            values = read_json(record)
            if "identity" not in values and path.stem in identify(values):
                return path.parent / record.relative_to(path.parent).parts[0]
    return path


def find_samples(folder: Path, name: str, config: Config, contents: Mapping[str, str]) -> Path:
    """Return the folder of the samples of an identity in a run's folder.

    Args:
        folder: the run's folder.
        name: the identity of the samples.
        config: the configuration of the run.
        contents: its `recorded_contents`.
    """
    return find_record(
        RunFolder(folder).samples / name,
        "*/record.json",
        lambda record: _recorded_samples(config, record["recipe"], record, contents),
    )


def find_number(folder: Path, name: str, config: Config, contents: Mapping[str, str]) -> Path:
    """Return the file of the number of an identity in a run's folder; the arguments are those of `find_samples`."""

    def identify(record: dict[str, Any]) -> list[str]:
        drawn = _recorded_samples(config, record["sampling"]["recipe"], record, contents)
        metric, reference = metrics.parse(record["metric"]), record["reference"]["sha256"]
        packages = recorded_packages(record["environment"])
        plain = essence(metric, content=reference, packages=packages)
        return [number_identity(samples, plain, record["data"]) for samples in drawn]

    return find_record(RunFolder(folder).evaluations / f"{name}.json", "*.json", identify)


def _recorded_samples(
    config: Config, recipe: Mapping[str, Any], record: Mapping[str, Any], contents: Mapping[str, str]
) -> list[str]:
    packages = recorded_packages(record["environment"])
    return recorded_samples(config, recipe, training_identity(config, contents, packages), packages)


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, with every setting resolved."""
    write_file(RunFolder(folder).config, to_yaml(config.plain()))


def written_identity(values: Mapping[str, Any]) -> str:
    """Return the identity of the settings of a training as config.yaml has them, every default and path included."""
    return identity({key: values.get(key) for key in TRAINING_KEYS})


def read_config_of(source: Path) -> Config:
    """Return the configuration in a run's folder or in its one file.

    Raises:
        UserError: with the missing or wrong setting, and the package that a missing component came from; for a config.yaml
            that is empty or cut short, or has other settings of the training than the run's identity.
    """
    if source.is_file():
        layer = Layer(settings_of_file(source))
    elif not (layer := read_yaml(RunFolder(source).config)).values:
        raise UserError(f"{RunFolder(source).config} is empty. {_RESTORE}")
    try:
        config = validate(Config, layer.values, layer.where)
    except UserError as error:
        raise UserError(f"{error}{_missing_package(source, str(error))}", error.path) from None
    if not source.is_file():
        _check_settings(RunFolder(source), layer.values, config)
    return config


_RESTORE = "Restore it: `sitkit train` with the settings of the training writes it again."


def _check_settings(files: RunFolder, values: Mapping[str, Any], config: Config) -> None:
    """Raise UserError if config.yaml is cut short, or its settings of the training are not those of the run's identity."""
    named, record = _IDENTITY.search(files.path.name), files.read_environment()
    names = {*([named[1]] if named else []), *filter(None, [record.get("training")])}
    lacks = [key for key in SAMPLING_KEYS if values.get(key) is None]
    # The settings as they are written: a later release may add settings, which have no line in the file.
    written = written_identity(values)
    if "settings" in record:
        right = written == record["settings"] and names <= {record["training"], record.get("formerly")}
    else:
        # Release 0.1 named a run by the settings as they are written; a converted run has no record.
        right = names <= {written} or names <= {training_identity(config)}
    if right and not lacks:
        return
    plain = {key: value for key, value in config.plain().items() if key in TRAINING_KEYS}
    lacks = [key for key in flat(plain) if key not in flat(values)] + lacks
    newest = None if right else latest_checkpoint(files.checkpoints, lambda text: None)
    if newest is not None:
        check_settings_of_checkpoint(config, newest, header_of_checkpoint(newest))
    reason = f"it has no {', '.join(lacks)}" if lacks else "its settings are others than those of its training"
    raise UserError(f"{files.config} was cut short or changed by hand: {reason}. {_RESTORE}")


def check_settings_of_checkpoint(config: Config, path: Path, header: Mapping[str, Any]) -> None:
    """Raise UserError if a checkpoint was trained with other settings than those of a configuration.

    Args:
        config: the configuration of the run.
        path: the checkpoint.
        header: its header, which holds the settings of its training.
    """
    own, stored = config.plain(), header.get("config", {})
    if all(stored.get(key) == own[key] for key in TRAINING_KEYS):
        return
    # The checkpoint of an earlier release has no value for a setting that is new.
    stored = validate(Config, stored, {}).plain()
    ours, theirs = (flat({key: plain[key] for key in TRAINING_KEYS}) for plain in (own, stored))
    moved = {f"{part}.{place}" for part in ("data", "autoencoder") for place in getattr(config, part).places()}
    for key in (ours | theirs).keys() - moved:
        if ours.get(key) != theirs.get(key):
            folder = path.parent.parent
            raise UserError(
                f"{RunFolder(folder).config}: {key} is {ours.get(key)}, and {path} was trained with {theirs.get(key)}: "
                f"a setting of its training was changed or removed by hand. Write {theirs.get(key)!r} back, or remove "
                "a checkpoint that is not of this run."
            )


def _missing_package(source: Path, message: str) -> str:
    """Return the package that the component in an error message came from, and how to install it; else ""."""
    record = read_run_header(source) if source.is_file() else RunFolder(source).read_environment()
    for component, package in record.get("components", {}).items():
        kind, _, name = component.partition(" ")
        if f"No {kind} named {name!r}." in message:
            return f" {source.name} was made with {package}: pip install {package.replace(' ', '==')}"
    return ""


def check_unchanged(folder: Path, fingerprints: Mapping[str, str]) -> None:
    """Raise UserError if a run was started with a data set or an autoencoder of another fingerprint."""
    recorded = RunFolder(folder).read_environment()
    for part, fingerprint in fingerprints.items():
        if recorded.get(part, fingerprint) != fingerprint:
            raise UserError(
                f"The {part} of {folder} changed since it was begun (fingerprint {recorded[part][:12]}, now "
                f"{fingerprint[:12]}): give the old {part}, or remove the folder."
            )


def training_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run's folder.  Raises Busy if another process trains the run."""
    return locked(folder / LOCK, f"{folder} is being trained by another process.")


def remove_results(folder: Path) -> None:
    """Remove everything from a run's folder, whose lock this process holds, but the lock.

    The checkpoints go last: a process that is killed before leaves a training that continues as before.
    """
    checkpoints = RunFolder(folder).checkpoints
    for path in sorted(folder.iterdir(), key=lambda path: path == checkpoints):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def run_folders(root: Path) -> list[Path]:
    """Return the run folders under a root, sorted by name."""
    return sorted(path.parent for path in Path(root).glob("*/config.yaml"))


def find_run(name: str | Path, root: Path) -> Path:
    """Return the folder of a run by its path, its name, the start of its identity, or "latest".

    Raises:
        UserError: with the nearest name, or how to make a run.
    """
    path = Path(name)
    if RunFolder(path).config.is_file():
        return path
    if path.is_file():
        read_run_header(path)  # Raises for a pickle, a damaged file, a checkpoint, or a file that is not of sitkit.
        raise UserError(f"{path} is a run in one file, and this needs a run's folder.")
    if path.suffix == ".safetensors":
        raise UserError(f"There is no file {path}.")
    folders = {folder.name: folder for folder in run_folders(root)}
    if not folders:
        raise UserError(f"There are no runs in {root}: make one with `sitkit train`.")
    if str(name) == "latest":
        return _newest(folders.values())
    if path.name in folders and path.parent in (Path(), root):
        return folders[path.name]
    matches = [key for key in folders if key.rpartition("-")[2].startswith(str(name))]
    if len(matches) > 1:
        raise UserError(f"{str(name)!r} is the start of several runs: {', '.join(matches)}.")
    if matches:
        return folders[matches[0]]
    near = suggest(path.name, [*folders, "latest"])
    raise UserError(f"No run {str(name)!r} in {root}.{near} `sitkit runs` lists them; 'latest' is the newest.")


def _newest(folders: Iterable[Path]) -> Path:
    """Return the run that was begun last.  A run whose settings cannot be read is passed over, with a warning."""
    for folder in sorted(folders, key=lambda folder: RunFolder(folder).config.stat().st_mtime, reverse=True):
        try:
            read_yaml(RunFolder(folder).config)
        except UserError as error:
            warnings.warn(f"{folder} is passed over: {error}", stacklevel=4)
        else:
            return folder
    raise UserError("The settings of no run can be read: repair or remove these folders.")


def locate_run(name: str | Path, root: Path) -> Path:
    """Return the file or the folder that a run is loaded from.

    Args:
        name: one file, a file on the Hugging Face hub (hf://owner/name), or a name that `find_run` accepts.
        root: the folder of runs.

    Raises:
        UserError: as `find_run`, and if the hub does not have the file or cannot be reached.
    """
    if str(name).startswith(SCHEME):
        return download(str(name))
    if Path(name).is_file():
        read_run_header(Path(name))
        return Path(name)
    return find_run(name, root)


@dataclass(frozen=True)
class RunSummary:
    """The progress of a run's training and its first numbers: a line of `sitkit runs`.

    Args:
        folder: the folder of the run.
        step: the step of the newest checkpoint; 0 without a checkpoint.
        steps: the number of steps of the whole training.
        samplings: the number of sample sets on disk.
        evaluations: the number of evaluations on disk.
        values: (metric, value) of the first three evaluations.
    """

    folder: Path
    step: int
    steps: int
    samplings: int
    evaluations: int
    values: tuple[tuple[str, float], ...]


def list_runs(root: str | Path = "runs") -> list[RunSummary]:
    """Return a summary of each run in a folder, sorted by name.

    A run that cannot be read, or a record of a run, is left out with a warning that names it.

    Args:
        root: the folder of runs.

    Returns:
        The summaries.
    """
    summaries = []
    for folder in run_folders(Path(root)):
        try:
            steps, saved = read_config_of(folder).train.steps, checkpoints(RunFolder(folder).checkpoints)
        except (UserError, OSError) as error:
            warnings.warn(f"{folder} is left out: {error}", stacklevel=2)
            continue
        paths = listed(RunFolder(folder).evaluations, "*.json")
        values = [value for value in map(_value_of, paths) if value is not None]
        step, samplings = step_of(saved[-1]) if saved else 0, len(list(folder.glob("samples/*/record.json")))
        summaries.append(RunSummary(folder, step, steps, samplings, len(paths), tuple(values[:3])))
    return summaries


def _value_of(path: Path) -> tuple[str, float] | None:
    """Return the metric and the value of an evaluation; None, with a warning, for a record that cannot be read."""
    try:
        record = read_record(path, ShownNumber, "the record of a number")
    except UserError as error:
        warnings.warn(f"{error} It is left out.", stacklevel=3)
        return None
    return record["metric"]["name"], float(record["value"])
