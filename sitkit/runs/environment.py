"""The environment of a number: the code, the packages, the plugins and the machine.

python  platform  packages  plugins  components      versions; the components that come from plugins
git  plugin_code           commit, dirty, diff of sitkit's source and of each plugin's; null without a checkout
plugin_sources             SHA-256 of the Python files of each plugin; only with plugins
device  cpu  threads  cuda      the device of the computation; cuda only on a GPU
command                    the words of the command line
before                     of a training that continued in another environment: the earlier ones, each {until: step, ...}
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sitkit
from sitkit.registry import origins
from sitkit.registry.plugin import loaded

# Packages that compute or store; optional ones are recorded if they are installed.
PACKAGES = (
    "torch", "torchdiffeq", "torchsde", "numpy", "scipy", "scikit-learn", "einops", "pydantic", "pillow", "optuna", "mlflow",
    "torchvision", "torch-fidelity", "transformers", "diffusers", "datasets", "pot",
)  # fmt: skip


def environment(device: Any) -> dict[str, Any]:
    """Return the record of this process and of a torch.device."""
    import torch

    # The code that runs, which may differ from the package that is installed under that name.
    own, release = Path(sitkit.__file__).parent, sitkit.__version__
    code = {name: _code(_folder(plugin.module)) for name, plugin in loaded.items()}
    record: dict[str, Any] = {
        "packages": {"sitkit": release} | {name: v for name in PACKAGES if (v := _version(name))},
        "plugins": {name: str(plugin) for name, plugin in loaded.items()},
        "plugin_code": {name: state for name, state in code.items() if state},
        "components": origins(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": {"name": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()},
        "threads": torch.get_num_threads(),
    }
    if loaded:
        record["plugin_sources"] = {name: plugin.source_digest() for name, plugin in loaded.items()}
    if device.type == "cuda":
        record["cuda"] = {"runtime": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return record | {"git": _code(own), "command": sys.argv}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _folder(module: str) -> Path:
    package = find_spec(module)
    return Path(package.origin).parent if package and package.origin else Path(module)


@functools.cache
def _code(folder: Path) -> dict[str, Any] | None:
    # Read once per process: the code in memory is that of its start.
    return git_state(folder) or _installed(folder.name)


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that tracks a folder, whether the folder differs, and the SHA-256 of the difference.

    The hash is of the names and contents of files that differ from the commit or that git does not track: the output of
    `git diff` depends on each user's settings.  None if the folder is not tracked, for example an installed package in a
    virtual environment inside another repository.
    """

    def git(*words: str) -> bytes:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True).stdout

    try:
        if not git("ls-files", "--", "."):
            return None
        commit = git("rev-parse", "HEAD").decode().strip()
        changed = git("diff", "--name-only", "-z", "--no-renames", "--no-ext-diff", "--relative", "HEAD", "--", ".")
        new = git("ls-files", "-z", "--others", "--exclude-standard", "--", ".")
        names = sorted({*changed.split(b"\0"), *new.split(b"\0")} - {b""})
        digest = hashlib.sha256()
        for name in names:
            path = folder / os.fsdecode(name)
            content = path.read_bytes() if path.is_file() else None
            digest.update(name + (b"\0" if content is None else b"\0%d\0%s" % (len(content), content)))
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(names), "diff": digest.hexdigest() if names else None}


def _installed(package: str) -> dict[str, Any] | None:
    """Return the commit of a package that pip installed from a repository; None for other packages."""
    try:
        text = distribution(package).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    record = json.loads(text).get("vcs_info") if text else None
    return {"commit": record["commit_id"], "dirty": False, "diff": None} if record else None


def continued(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return the record of a training that continues from `step` in `now`; earlier environments that differ are kept."""
    record = {key: value for key, value in before.items() if key != "before"}
    past = list(before.get("before", ()))
    if step and {**record, "command": None} != {**now, "command": None}:
        past.append({"until": step, **record})
    return {**now, "before": past} if past else dict(now)


def code_version(environment: Mapping[str, Any]) -> str:
    """Return the code of a record in a few words: version, commit, and the hash of uncommitted changes."""
    name = f"sitkit {(environment.get('packages') or {}).get('sitkit', '?')}"
    git = environment.get("git")
    if not git:
        return name
    changes = f" with uncommitted changes {str(git.get('diff'))[:12]}" if git.get("dirty") else ""
    return f"{name}, commit {git['commit'][:12]}{changes}"
