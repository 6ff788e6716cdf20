"""Atomic writes: the bytes are on the disk before the name is, and the name before the next file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sitkit.runtime.files import write_file


def test_bytes_are_flushed_before_the_file_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut may leave an empty file under the final name; the flush of the folder keeps the new name."""
    done: list[str] = []
    flush, replace = os.fsync, os.replace

    def noted_flush(handle: int) -> None:
        done.append("flush " + ("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"))
        flush(handle)

    def noted_replace(*paths: Any) -> None:
        done.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_file(tmp_path / "file", "text")
    assert done == ["flush file", "rename", "flush folder"] and (tmp_path / "file").read_text() == "text"
