"""Identities of plain values, and readable names for folders."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sitkit.runtime.errors import UserError


def identity(*parts: Any) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of plain values; equal values have equal identities."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hyphenated(words: Iterable[str]) -> str:
    """Return words as lower-case ASCII letters and digits joined by single hyphens, 80 characters at most.

    The result is "run" if no letter or digit remains.
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")[:80].strip("-") or "run"


def file_digest(*paths: str | Path) -> str:
    """Return the SHA-256 of a file, or of the SHA-256 of several.  Raises UserError if one is missing."""
    digests = []
    for path in (Path(path).expanduser() for path in paths):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file.")
        stat = path.stat()
        digests.append(_sha256_of(path.absolute(), stat.st_mtime_ns, stat.st_size))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.lru_cache(maxsize=16)
def _sha256_of(path: Path, *state: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
