"""Docstrings, comments and messages use plain words; the list is that of the constructions that readers stumbled over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

WORDS = re.compile(
    r"\b(whoever|nobody|(?:be|is|are|was|were) had|so many|alike|what is no|what became of|comes to|is at(?! most| least)|told|of which)\b",
    re.IGNORECASE,
)
SOURCES = sorted(
    path for folder in ("sitkit", "plugins", "benchmarks", ".docs") for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip


def passages(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment and every string of a module, docstrings included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def hard_words(path: Path) -> list[str]:
    """ "file:line: word" of each word of the list."""
    place = path.relative_to(ROOT).as_posix()
    return [
        f"{place}:{line}: {match[0]}"
        for line, passage in passages(path.read_text(encoding="utf-8"))
        for match in WORDS.finditer(re.sub(r"\s+", " ", passage))
    ]


def test_the_words_are_noticed() -> None:
    text = '"""What is\nhad."""\nx = "So many"  # nobody\n'
    assert [bool(WORDS.search(re.sub(r"\s+", " ", passage))) for _, passage in passages(text)] == [True, True, True]


def test_docstrings_comments_and_messages_use_plain_words() -> None:
    assert len(SOURCES) > 150
    lines = [line for path in SOURCES for line in hard_words(path)]
    assert lines == []
