"""Plugins, their templates and the documentation import from `sitkit` and `sitkit.testing` alone."""

from __future__ import annotations

import re

from support import ROOT

PUBLIC = {"sitkit", "sitkit.testing"}
STATEMENT = re.compile(r"^\s*(?:from (sitkit(?:\.\w+)*) import|import (sitkit(?:\.\w+)*))\b", re.MULTILINE)
SOURCES = sorted(
    path
    for pattern in ("plugins/**/*.py", "plugins/**/*.md", ".docs/pages/**/*.md", "sitkit/**/*.tmpl", "README.md")
    for path in ROOT.glob(pattern)
)


def inner_imports(text: str) -> list[str]:
    """Return the modules inside sitkit that a text imports from, as plugins must not."""
    modules = (match[1] or match[2] for match in STATEMENT.finditer(text))
    return [module for module in modules if module not in PUBLIC]


def test_an_inner_import_is_noticed() -> None:
    text = "import sitkit\nfrom sitkit import Loss\nfrom sitkit.testing import obey\n    from sitkit.runs.run import load\n"
    assert inner_imports(text) == ["sitkit.runs.run"]


def test_plugins_templates_and_docs_import_public_names_alone() -> None:
    assert len(SOURCES) > 50
    inner = [
        f"{path.relative_to(ROOT).as_posix()}: {module}"
        for path in SOURCES
        for module in inner_imports(path.read_text(encoding="utf-8"))
    ]
    assert not inner, "\n".join(inner)
