"""YAML as plain values: what is refused, at once and in one line, and that nothing else ends in another error."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sitkit.runs.config.plain_yaml import DEEPEST, MOST_VALUES, parse_yaml
from sitkit.runs.config.sources import read_assignments, read_value
from sitkit.runtime.errors import UserError


def multiplied(levels: int) -> str:
    """Each level stands for nine of the level before."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, levels)]
    return "\n".join(lines)


REFUSED = {
    "aliases": (multiplied(12), "more than"),
    "an alias of itself": ("a: &a [1, *a]", "stands for a value that holds it"),
    "nesting": ("a: " + "[" * 300 + "]" * 300, "nested more than"),
    "nested keys": ("a: " + "{b: " * 300 + "1" + "}" * 300, "nested more than"),
    "blocks": ("\n".join(" " * k + "a:" for k in range(300)), "nested more than"),
    "digits": ("a: " + "9" * 5000, "a number of 5,000 digits"),
    "hexadecimal digits": ("a: 0x" + "f" * 5000, "a number of 5,002 digits"),
    "values": ("a: [" + "1, " * (MOST_VALUES + 1) + "]", "more than"),
    "a merge key": ("b: &b {steps: 2}\ntrain:\n  <<: *b", "f:3: merge keys"),
    "a list of pairs": ("a: !!omap [b: 3]", "f:1: a: the tag"),
    "a set": ("a: !!set {b}", "f:1: a: the tag"),
    "code": ("a: !!python/object/apply:os.system [true]", "f:1: a: the tag"),
    "a key twice": ("a: {b: 1,\n b: 2}", "f:2: duplicate key 'b'"),
    "a key twice in two forms": ("1: a\n'1': b", "f:2: duplicate key '1'"),
    "a list as a key": ("? [a]\n: 1", "a key must be a word"),
    "an alias as a key": ("a: &a b\n*a : 1", "a key must be a word"),
    "two documents": ("a: 1\n---\nb: 2", "f:2: "),
    "no YAML": ("a: [1", "f:"),
    "a null byte": ("a: \0", "f: "),
    "no date": ("a: 2020-99-99", "f: "),
    "nesting in one line": ("a: " + "[1, " * 300 + "1" + "]" * 300, "f:1: lists and keys are nested more than"),
    "an older YAML": ("%YAML 1.1\n---\na: yes", "f:2: YAML 1.1 is not read"),
    "a long text": ("# x\n" * 250_001, "a text of 1,000,004 characters"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_yaml_that_multiplies_nests_or_hides_is_refused_in_one_line(kind: str) -> None:
    text, words = REFUSED[kind]
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f")
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 200, message
    # The slowest has 20,001 values, which took 1.3 s of processor time where this was written.
    assert time.process_time() - began < 20


def test_what_settings_need_is_read() -> None:
    shared = "base: &base {name: heun, steps: 5}\nfirst: *base\nsecond: *base\n"
    tree, where = parse_yaml(shared, "f")
    assert tree == {key: {"name": "heun", "steps": 5} for key in ("base", "first", "second")}
    assert where["second"] == "f:3"
    deep = "[" * (DEEPEST - 1) + "1" + "]" * (DEEPEST - 1)
    assert parse_yaml(f"a: {deep}", "f")[0] is not None
    assert parse_yaml("", "f") == (None, {}) and parse_yaml("a: '<<'", "f")[0] == {"a": "<<"}


@pytest.mark.parametrize("kind", ["aliases", "nesting", "digits", "a set", "code"])
def test_a_value_of_the_command_line_is_read_in_the_same_way(kind: str) -> None:
    text = REFUSED[kind][0]
    value = "{" + text.replace("\n", ", ") + "}"
    with pytest.raises(UserError, match="--set train.steps"):
        read_assignments([f"train.steps={value}"])


def test_a_key_of_many_parts_is_refused() -> None:
    with pytest.raises(UserError, match="nested more than"):
        read_assignments([".".join("a" * 1000) + "=1"])


@given(st.text(alphabet="ab01:-[]{}&*!<>|?'\"#,. \n\t%@`~\0\x1b\u2028", max_size=60))
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    for read in (lambda: parse_yaml(text, "f"), lambda: read_value(text)):
        try:
            read()
        except UserError as error:
            assert "\n" not in str(error)


def test_a_file_that_cannot_be_read_is_not_a_missing_one(tmp_path: Path) -> None:
    from sitkit.runs.config.sources import read_yaml

    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "dangling.yaml").symlink_to("gone.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff")
    (tmp_path / "folder.yaml").mkdir()
    for name, words in (
        ("loop", "Too many levels"), ("dangling", "is a link to gone.yaml"), ("bytes", "byte 3 is 0xff"),
        ("folder", "Is a directory"), ("missing", "There is no file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read_yaml(tmp_path / f"{name}.yaml")
