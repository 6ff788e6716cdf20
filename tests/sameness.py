"""Shared by the golden tests: fingerprints of files, and comparisons of floats, exact on the recorded machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from safetensors import safe_open
from support import call

GOLDEN = Path(__file__).parent / "project" / "golden"
# Parts of a record whose keys depend on the installed packages and on the place of the code.
OPEN = ("packages", "plugins", "plugin_code", "components", "git")
# Another processor adds floats in another order, which is a relative error of about 1e-7 in each sum.  Adam divides the
# gradient by its own size, so an entry near zero may take a step of another sign, and 20 steps let that grow a little.
# AVX2 code and scalar code in the place of AVX512 (ATEN_CPU_CAPABILITY=avx2, default) changed the losses by 1.1e-7
# relative at most, and no level of an image and no value of a metric.  The tolerances leave room for other libraries.
LOSS, VALUE, LEVELS = 1e-4, 1e-3, 2


def done(*words: str | Path) -> str:
    """Run `sitkit WORDS`, require success, and return its standard output."""
    result = call(*words)
    assert result.status == 0, (words, result)
    return result.out


def answer(*words: str | Path) -> Any:
    """Run `sitkit WORDS --json`, require success, and return its standard output as plain values."""
    return json.loads(done(*words, "--json"))


def read_json(path: Path) -> Any:
    """Return the plain values of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, the keys sorted."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """Return the processor and the libraries, on which the last bits of a float depend."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else "unknown",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def same(now: Any, kept: Any, recorded: Mapping[str, str], rel: float, abs: float = 0.0) -> None:
    """Compare plain values; numbers are compared exactly on the recorded machine, else within a tolerance."""
    if machine() == recorded:
        assert now == kept
    else:
        near(now, kept, rel, abs)


def near(now: Any, kept: Any, rel: float, abs: float) -> None:
    """Compare plain values, the numbers in them within a tolerance."""
    if isinstance(kept, Mapping):
        assert now.keys() == kept.keys()
        for key in kept:
            near(now[key], kept[key], rel, abs)
    elif isinstance(kept, list):
        assert len(now) == len(kept)
        for item, other in zip(now, kept, strict=True):
            near(item, other, rel, abs)
    elif isinstance(kept, (int, float)) and not isinstance(kept, bool):
        assert now == pytest.approx(kept, rel=rel, abs=abs)
    else:
        assert now == kept


def digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Return the SHA-256 of arrays: names, types, shapes and values, in the order of the names."""
    sha256 = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        sha256.update(f"{name} {array.dtype} {array.shape}".encode())
        sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


def samples(folder: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the samples in a folder."""
    with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors of a safetensors file, and the plain values of its metadata."""
    with safe_open(path, framework="np") as file:
        header = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118


def keys(value: Any, key: str = "") -> list[str]:
    """Return the dotted names of all keys in plain values, sorted; `[]` stands for the items of a list."""
    found: set[str] = set()
    if isinstance(value, Mapping):
        for name, inner in value.items():
            full = f"{key}.{name}" if key else str(name)
            found |= {full} | (set(keys(inner, full)) if name not in OPEN else set())
    elif isinstance(value, list):
        for inner in value:
            found |= set(keys(inner, f"{key}[]"))
    return sorted(found)


def golden(name: str, now: Any, folder: Path = GOLDEN) -> Any:
    """Return the golden output that is kept under a name; with SITKIT_GOLDEN=write, keep `now` first."""
    path = folder / f"{name}.json"
    if os.environ.get("SITKIT_GOLDEN") == "write":
        write_json(path, now)
    return read_json(path)


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))
