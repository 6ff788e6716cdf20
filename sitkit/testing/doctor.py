"""The state of this machine: versions, devices, plugins and the tracking store, with a remedy for each missing part."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from sitkit.registry.loading import load_plugins
from sitkit.registry.plugin import broken, loaded
from sitkit.runs.tracking.store import reach

FindingState = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """The state of one part of the machine.

    Args:
        area: "package", "device", "feature", "plugin", "store" or "tool".
        name: the name of the part.
        state: "ok", "missing" or "broken".
        detail: its version, its address, or the fault.
        remedy: the command or the fact that helps, "" if the state is ok.
    """

    area: str
    name: str
    state: FindingState
    detail: str
    remedy: str = ""


# Optional features: their modules, their purpose, and the extra that installs them.
EXTRAS = (
    (("diffusers",), "autoencoder sd-vae, sitkit encode", "latents"),
    (("datasets", "huggingface_hub"), "data hub, push and load", "hub"),
    (("transformers",), "features dinov2 (FD-DINOv2)", "dinov2"),
    (("torch_fidelity", "torchvision"), "features inception (FID, sFID, IS)", "inception"),
    (("ray",), "ablate --executor ray", "ray"),
)
NEEDED_PACKAGES = (
    "torch",
    "torchdiffeq",
    "torchsde",
    "einops",
    "pydantic",
    "typer",
    "rich",
    "optuna",
    "mlflow",
    "numpy",
    "scipy",
)


def examine_machine(patience: float = 5.0) -> list[Finding]:
    """Return the state of every part, in the order for reading.

    patience: the seconds to wait for an answer of the tracking store.
    """
    return [*_packages(), *_devices(), *_extras(), *_plugins(), _store(patience), *_tools()]


def _packages() -> list[Finding]:
    findings = [Finding("package", "python", "ok", f"{platform.python_version()}, {sys.executable}")]
    for name in ("sitkit", *NEEDED_PACKAGES):
        try:
            findings.append(Finding("package", name, "ok", version(name)))
        except PackageNotFoundError:
            findings.append(Finding("package", name, "missing", "not installed", f"pip install {name}"))
    return findings


def _devices() -> list[Finding]:
    import torch

    cpu = f"{torch.get_num_threads()} threads, {platform.machine()}"
    findings = [Finding("device", "cpu", "ok", cpu)]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        findings.append(Finding("device", f"cuda:{number}", "ok", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}, but no GPU answers" if torch.version.cuda else ""
        findings.append(Finding("device", "cuda", "missing", built or "torch is built without CUDA"))
    return findings


def _extras() -> list[Finding]:
    findings = []
    for modules, purpose, extra in EXTRAS:
        lacking = [module for module in modules if importlib.util.find_spec(module) is None]
        if lacking:
            remedy = f"pip install 'sitkit[{extra}]'"
            findings.append(Finding("feature", purpose, "missing", f"needs {', '.join(lacking)}", remedy))
        else:
            findings.append(Finding("feature", purpose, "ok", ", ".join(modules)))
    return findings


def _plugins() -> list[Finding]:
    load_plugins()
    findings = [Finding("plugin", name, "ok", str(plugin)) for name, plugin in loaded.items()]
    return findings + [
        Finding("plugin", failed.plugin.name, "broken", failed.reason, f"pip uninstall {failed.plugin.package}")
        for failed in broken
    ]


def _store(patience: float) -> Finding:
    address, trouble = reach(patience)
    if trouble:
        return Finding(
            "store", address, "broken", trouble, "runs continue and are synchronised once the store is reachable"
        )
    return Finding("store", address, "ok", "takes runs")


def _tools() -> list[Finding]:
    git = shutil.which("git")
    if git:
        return [Finding("tool", "git", "ok", git)]
    return [Finding("tool", "git", "missing", "records then lack the commit of the code", "install git")]
