"""Identities of plain values, and readable names for folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any


def identity(*parts: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of plain values: equal values, equal identity."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def readable(words: Iterable[str]) -> str:
    """Words as lower-case letters and digits of ASCII with single hyphens between them, 80 at most; "run" where none is left."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")[:80].strip("-") or "run"
