"""Tests of the documentation: its blocks run, its commands exist, its site builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import ROOT
from typer.main import get_command

from sitkit.cli.commands import app
from sitkit.registry import registries
from sitkit.runs.config.sources import assemble, read_yaml

DOCS = ROOT / ".docs"
PAGES = [ROOT / "README.md", *sorted((DOCS / "pages").rglob("*.md"))]
BLOCK = re.compile(r"(?P<before>(?:<!--[^\n]*-->\n)?)```(?P<language>\w*)\n(?P<text>.*?)\n```", re.S)
SAVED = re.compile(r"[Ss]aved? (?:this )?as `([\w./-]+)`")


class Block(NamedTuple):
    """A fenced block of a page: language, text, file and line, reason for not running it, and the file to save it as."""

    language: str
    text: str
    place: str
    spared: str
    saved: str


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order.

    A comment `<!-- not run: why -->` before a block gives the reason for not running it; "Save this as `x`" names its file.
    """
    text = page.read_text(encoding="utf-8")
    result, end = [], 0
    for match in BLOCK.finditer(text):
        comment = match["before"].strip().removeprefix("<!--").removesuffix("-->").strip()
        spared = comment if comment.startswith(("not run:", "command:")) else ""
        saved = SAVED.findall(text[end : match.start()])
        place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
        result.append(Block(match["language"], match["text"], place, spared, saved[-1] if saved else ""))
        end = match.end()
    return result


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(text: str) -> list[list[str]]:
    """Return the words of every `sitkit ...` command in a shell block, without comments, with continued lines joined."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    parts = [part for line in lines for part in re.split(r"&&|\||;", line.partition(" #")[0])]
    return [words[1:] for part in parts if (words := shlex.split(part)) and words[0] == "sitkit"]


def inline(page: Path) -> list[str]:
    """Return the complete commands in sentences and tables."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [command for command in re.findall(r"`(sitkit [^`]+)`", text) if "..." not in command]


def parse(command: Any, name: str, words: list[str]) -> None:
    """Raise the error of the parser for a command or a flag that does not exist; no command runs."""
    context = command.make_context(name, list(words))
    inner = getattr(command, "commands", None)
    if inner is not None:
        rest = [*context._protected_args, *context.args]
        assert rest and rest[0] in inner, f"no command {name} {rest[:1]}"
        parse(inner[rest[0]], rest[0], rest[1:])


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_exists_with_its_flags(page: Path) -> None:
    assert "```" not in page.read_text(encoding="utf-8") or blocks(page)
    for block in blocks(page):
        if block.language == "sh":
            for words in commands(block.text):
                try:
                    parse(get_command(app), "sitkit", words)
                except Exception as error:
                    pytest.fail(f"{block.place}: sitkit {shlex.join(words)}: {getattr(error, 'message', error)}")
    for text in inline(page):
        for words in commands(text):
            try:
                parse(get_command(app), "sitkit", words)
            except Exception as error:
                pytest.fail(f"{ids(page)}: `{text}`: {getattr(error, 'message', error)}")


def test_a_flag_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(Exception, match=r"--interpolant|No such option"):
        parse(get_command(app), "sitkit", ["train", "--interpolant", "gvp"])


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_settings_block_is_valid(page: Path) -> None:
    for block in blocks(page):
        layer = read_yaml(block.place, block.text) if block.language == "yaml" else None
        # Another test checks studies; a plain configuration has no key of a study.
        if layer is not None and not {"rows", "space", "objective", "columns", "grid"} & set(layer.values):
            assemble([layer])


def test_the_menu_names_every_page() -> None:
    menu = (DOCS / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    written = {page.relative_to(DOCS / "pages").as_posix() for page in PAGES if DOCS in page.parents}
    generated = {"gallery.md", "components.md", "cli.md", "reference/index.md", "tree.md"}
    assert set(re.findall(r"[\w/-]+\.md", menu)) == written | generated


def tree_of_the_readme() -> set[str]:
    """Return the paths of the Python files of sitkit that the tree in the README names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("```text\nsitkit/\n")[2].partition("\nplugins/")[0]
    paths, room = set(), ""
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = line.strip().partition("   ")[0].split()
        if depth == 1:
            room = names[0] if names[0].endswith("/") else ""
        paths |= {(room if depth > 1 else "") + name for name in names if name.endswith(".py")}
    return paths


def test_the_tree_of_the_readme_names_every_file() -> None:
    package = ROOT / "sitkit"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    tree = tree_of_the_readme()
    assert sorted(tree - files) == [], "the tree names files that do not exist"
    unnamed = {path for path in files - tree if not path.endswith("__init__.py")}
    assert sorted(unnamed) == [], "files without a line in the tree"


def test_the_page_on_plugins_has_every_kind() -> None:
    table = (DOCS / "pages" / "how-to" / "plugin.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z]+)` \|", table, re.M) == [registry.kind for registry in registries.values()]


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in PAGES if any(not b.spared for b in blocks(page))], ids=ids)
def test_every_block_runs(page: Path, tmp_path: Path) -> None:
    """Run the blocks of a page one after another in one folder, like a reader."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    # The packages that a page installs go to a separate folder on the search path.
    site = tmp_path / "site-packages"
    path = os.pathsep.join(filter(None, (str(ROOT), str(site), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        # pip reads this variable as its opposite: 0 builds without isolation, with the installed packages.
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    environment.pop("SITKIT_PLUGINS", None)
    runs = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    for block in blocks(page):
        if block.saved and block.language not in runs:
            (tmp_path / block.saved).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.saved).write_text(block.text + "\n", encoding="utf-8")
        elif block.language in runs and not block.spared:
            process = subprocess.run(
                [*runs[block.language], block.text], cwd=tmp_path, env=environment, capture_output=True, text=True,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert process.returncode == 0, f"{block.place}\n{block.text}\n{process.stdout}\n{process.stderr}"


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install 'sitkit[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(tmp_path)]
    process = subprocess.run(build, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stdout + process.stderr
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "https://fonts" not in front and "cdn" not in front, "the site loads a file from another host"
