"""Identities of plain values, and readable names for folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any


def identity(*parts: Any) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of plain values; equal values have equal identities."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def hyphenated(words: Iterable[str]) -> str:
    """Return words as lower-case ASCII letters and digits joined by single hyphens, 80 characters at most.

    The result is "run" if no letter or digit remains.
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")[:80].strip("-") or "run"
