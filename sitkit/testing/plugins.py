"""Whether an installed plugin keeps the laws: it loads, it is light, and each of its components obeys those of its kind."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sitkit.registry import Component, Registry, owned, spec
from sitkit.registry.loading import Plugin, load_plugins
from sitkit.registry.plugin import broken, installed, left_out
from sitkit.registry.settings_files import SettingsFiles, presets, settings_files
from sitkit.runtime.errors import UserError, suggest
from sitkit.runtime.progress import Event, Progress, silent

PluginState = Literal["loaded", "broken", "left out"]
LawOutcome = Literal["holds", "broken", "not shown"]

LOADS = "loads", "Its module is imported and what it registers is taken."
LIGHT = "light", "Importing it does not import torch, so that `sitkit --help` and `sitkit list` stay quick."
HEAVY = "it imports torch: do so inside the functions that need it, or under TYPE_CHECKING."
POSSIBLE = "possible", "What it sets is known, right, and possible: nothing in it would be refused."
FILLED = "filled", "Without fields, or with those of `test_fields`, it can be made."


@dataclass(frozen=True)
class LawResult:
    """What became of one law for one subject: the package, or a component "sampler mine (steps=3)"."""

    subject: str
    law: str
    meaning: str
    outcome: LawOutcome
    reason: str = ""


@dataclass(frozen=True)
class Conformance:
    """The verdicts on one plugin."""

    plugin: Plugin
    verdicts: tuple[LawResult, ...]

    @property
    def failures(self) -> list[LawResult]:
        """The laws that it breaks."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "broken"]


def plugin_state(plugin: Plugin) -> tuple[PluginState, str]:
    """What became of a plugin when it was loaded, and why."""
    load_plugins()
    if plugin in left_out:
        return "left out", "SITKIT_PLUGINS does not name it."
    for failed in broken:
        if failed.plugin == plugin:
            return "broken", failed.reason
    return "loaded", ""


def plugins_named(words: Sequence[str]) -> list[Plugin]:
    """Installed plugins by package or entry point; all that may load where none is named.

    Raises UserError for a word that names none, and for one that SITKIT_PLUGINS leaves out.
    """
    load_plugins()
    if not words:
        return [plugin for plugin in installed if plugin not in left_out]
    found = []
    for word in words:
        named = [plugin for plugin in installed if word in (plugin.package, plugin.name, plugin.module)]
        if not named:
            known = [plugin.package for plugin in installed]
            has = f"Installed: {', '.join(known)}." if known else "Install it first: pip install -e FOLDER."
            raise UserError(f"No plugin {word!r} is installed.{suggest(word, known)} {has}")
        if any(plugin in left_out for plugin in named):
            raise UserError(f"SITKIT_PLUGINS leaves out {word!r}: unset it, or add {named[0].name!r} to it.")
        found += [plugin for plugin in named if plugin not in found]
    return found


def test_plugin(plugin: Plugin, progress: Progress = silent) -> Conformance:
    """Try every law on a plugin and on everything that it registered; nothing that it does stops the rest."""
    state, reason = plugin_state(plugin)
    if state != "loaded":
        return Conformance(plugin, (LawResult("package", *LOADS, "broken", reason),))
    verdicts = [LawResult("package", *LOADS, "holds"), _judge("package", *LIGHT, lambda: _light(plugin))]
    for registry, name in owned(plugin):
        verdicts += _component(registry, name, progress)
    for files in settings_files.values():
        for name in files.names_of(plugin):
            verdicts.append(_judge(f"{files.kind} {name}", *POSSIBLE, partial(_settings, files, name)))
    return Conformance(plugin, tuple(verdicts))


def _component(registry: Registry[Any], name: str, progress: Progress) -> Iterable[LawResult]:
    """The laws of a component's kind for each of its instances; of a preset, that it can be made."""
    from sitkit.testing import examples_of, laws_of

    subject = f"{registry.kind} {name}"
    made: list[Component] = []

    def fill() -> None:
        try:
            preset = name in registry.presets()
            made.extend([registry.create(name)] if preset else examples_of(registry[name], subject))
        except UserError as error:
            raise AssertionError(f"{error}") from None

    verdicts = [_judge(subject, *FILLED, fill)]
    if name in registry.presets():
        return verdicts
    for component in made:
        laws = laws_of(component)
        who = subject if len(made) == 1 else f"{subject} ({_fields(component)})"
        for i, law in enumerate(laws):
            progress(Event(who, i, len(laws)))
            verdicts.append(_judge(who, law.name, law.meaning, law.check))
        progress(Event(who, len(laws), len(laws)))
    return verdicts


def _settings(files: SettingsFiles, name: str) -> None:
    """A preset makes a configuration; a study has no cell that cannot be; a search has the form of one."""
    from sitkit.runs.config.sources import assemble, read_config, read_yaml, validate
    from sitkit.studies.search.space import Search
    from sitkit.studies.study_file import read_study

    try:
        if files is presets:
            assemble([read_config(name)])
        elif "space" in (layer := read_yaml(files[name])).values:
            validate(Search, layer.values, layer.where)
        else:
            read_study(name).require()
    except UserError as error:
        raise AssertionError(str(error)) from None


def _judge(subject: str, law: str, meaning: str, check: Callable[[], None]) -> LawResult:
    """The verdict of one check, whose draws depend on no other and leave no trace."""
    import torch

    from sitkit.testing import NotShown

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            check()
        except NotShown as why:
            return LawResult(subject, law, meaning, "not shown", str(why))
        except AssertionError as error:
            return LawResult(subject, law, meaning, "broken", str(error))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return LawResult(subject, law, meaning, "broken", f"{reason} ({last.filename}:{last.lineno})")
    return LawResult(subject, law, meaning, "holds")


def _light(plugin: Plugin) -> None:
    code = f"import sys, sitkit, {plugin.module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise AssertionError(f"{plugin.module}: {said[-1] if said else HEAVY}")


def _fields(component: Component) -> str:
    plain = {key: value for key, value in spec(component).items() if key != "name"}
    return ", ".join(f"{key}={value['name'] if isinstance(value, dict) else value}" for key, value in plain.items())
