"""The test of an installed plugin: it loads, its import is light, and each of its components obeys the laws of its kind."""

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

LOADS = "loads", "Its module can be imported and its components can be registered."
LIGHT = "light", "Importing it does not import torch, so that `sitkit --help` and `sitkit list` stay quick."
HEAVY = "it imports torch: do so inside the functions that need it, or under TYPE_CHECKING."
POSSIBLE = "possible", "Its settings are known and valid: no command would refuse them."
FILLED = "filled", "It can be created without fields, or with those of `test_fields`."


@dataclass(frozen=True)
class LawResult:
    """The outcome of one law for one subject.

    Args:
        subject: "package", or a component, as "sampler mine (steps=3)".
        law: the name of the law.
        meaning: one sentence that says what the law demands.
        outcome: "holds", "broken" or "not shown".
        reason: the reason for "broken" and "not shown".
    """

    subject: str
    law: str
    meaning: str
    outcome: LawOutcome
    reason: str = ""


@dataclass(frozen=True)
class Conformance:
    """The results of all laws for one plugin."""

    plugin: Plugin
    verdicts: tuple[LawResult, ...]

    @property
    def failures(self) -> list[LawResult]:
        """The results of the broken laws."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "broken"]


def plugin_state(plugin: Plugin) -> tuple[PluginState, str]:
    """Return whether a plugin was loaded, and the reason if it was not."""
    load_plugins()
    if plugin in left_out:
        return "left out", "SITKIT_PLUGINS does not name it."
    for failed in broken:
        if failed.plugin == plugin:
            return "broken", failed.reason
    return "loaded", ""


def plugins_named(words: Sequence[str]) -> list[Plugin]:
    """Return installed plugins by package, entry point or module; without words, all that SITKIT_PLUGINS does not leave out.

    Raises UserError for a word that names no plugin or one that SITKIT_PLUGINS leaves out.
    """
    load_plugins()
    if not words:
        return [plugin for plugin in installed if plugin not in left_out]
    plugins: list[Plugin] = []
    for word in words:
        named = [plugin for plugin in installed if word in (plugin.package, plugin.name, plugin.module)]
        if not named:
            known = [plugin.package for plugin in installed]
            has = f"Installed: {', '.join(known)}." if known else "Install it first: pip install -e FOLDER."
            raise UserError(f"No plugin {word!r} is installed.{suggest(word, known)} {has}")
        if any(plugin in left_out for plugin in named):
            raise UserError(f"SITKIT_PLUGINS leaves out {word!r}: unset it, or add {named[0].name!r} to it.")
        plugins += [plugin for plugin in named if plugin not in plugins]
    return plugins


def test_plugin(plugin: Plugin, progress: Progress = silent) -> Conformance:
    """Test every law on a plugin and on every component and settings file of it.  An error in one does not stop the others."""
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
    """Return the results of the laws of a component's kind for each of its test instances; for a preset, "filled" alone."""
    from sitkit.testing import examples_of, laws_of

    subject = f"{registry.kind} {name}"
    made: list[Component] = []
    is_preset = name in registry.presets()

    def fill() -> None:
        try:
            made.extend([registry.create(name)] if is_preset else examples_of(registry[name], subject))
        except UserError as error:
            raise AssertionError(f"{error}") from None

    verdicts = [_judge(subject, *FILLED, fill)]
    for component in [] if is_preset else made:
        laws = laws_of(component)
        who = subject if len(made) == 1 else f"{subject} ({_fields(component)})"
        for i, law in enumerate(laws):
            progress(Event(who, i, len(laws)))
            verdicts.append(_judge(who, law.name, law.meaning, law.check))
        progress(Event(who, len(laws), len(laws)))
    return verdicts


def _settings(files: SettingsFiles, name: str) -> None:
    """Raise AssertionError unless a preset makes a configuration, a study has possible cells, or a search is valid."""
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
    """Return the result of one check; torch's generator begins at a fixed seed and is restored afterwards."""
    import torch

    from sitkit.testing import NotShown

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            check()
        except NotShown as error:
            return LawResult(subject, law, meaning, "not shown", str(error))
        except AssertionError as error:
            return LawResult(subject, law, meaning, "broken", str(error))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return LawResult(subject, law, meaning, "broken", f"{reason} ({last.filename}:{last.lineno})")
    return LawResult(subject, law, meaning, "holds")


def _light(plugin: Plugin) -> None:
    code = f"import sys, sitkit, {plugin.module}; sys.exit('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if process.returncode:
        errors = process.stderr.strip().splitlines()
        raise AssertionError(f"{plugin.module}: {errors[-1] if errors else HEAVY}")


def _fields(component: Component) -> str:
    plain = {key: value for key, value in spec(component).items() if key != "name"}
    return ", ".join(f"{key}={value['name'] if isinstance(value, dict) else value}" for key, value in plain.items())
