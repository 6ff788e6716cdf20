"""A run as one file: the weights of one average, the settings, and fingerprints of everything that they depend on.

    tensors    the network's state, by its own names; autoencoder/..., the state of an autoencoder from a folder
    metadata   sitkit: JSON of the step, the name of the weights, the settings except `run`, the description of the data,
               fingerprints of training, data, autoencoder and weights, and the packages that the components came from

It is safetensors: nothing in it is executed, and other tools read the weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sitkit.models.autoencoder import PACKED
from sitkit.runs.config.records import FileRecord
from sitkit.runs.config.schema import Config
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import checked_record
from sitkit.runtime.tensors import digest_of, load_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor


KIND = "run"


def weights_name(config: Config) -> str:
    """Return the name of the weights of a configuration: "ema", "raw", or "ema-0.05" for a chosen average."""
    weights, ema = config.sample.weights, config.sample.ema
    return weights if ema is None else f"{weights}-{ema!r}"


def read_run_header(path: Path) -> dict[str, Any]:
    """Return the header of a run's file.  Raises UserError for a damaged file, a pickle, or another kind of file."""
    header = read_header(path)
    if header.get("kind") != KIND:
        raise UserError(
            f"{path} is a checkpoint; give the folder of its run: {path.parent.parent}. "
            "`sitkit convert RUN --to NAME.safetensors` makes one file of a run."
        )
    if header.get("format") != 1:
        raise UserError(f"{path} is of format {header.get('format')}, which this sitkit does not read: upgrade it.")
    return checked_record(
        header, FileRecord, f"The header of {path}", "the description of a run", "Copy the file again."
    )


def settings_of_file(path: Path) -> dict[str, Any]:
    """Return the settings in a file; the path of an autoencoder in it is the file itself, wherever it is now."""
    header = read_run_header(path)
    if "autoencoder" in header:
        header["config"]["autoencoder"]["path"] = str(path.resolve())
    return header["config"]


def weights_of_file(path: Path, config: Config, step: int | None) -> tuple[int, dict[str, Tensor]]:
    """Return (step, the network's state) of a file.

    Raises:
        UserError: for other weights than those of `config` and `step`, for another autoencoder than that of the export,
            and for weights that have changed since they were written.
    """
    header, tensors = load_tensors(path)
    fingerprints = header["fingerprints"]
    if weights_name(config) != header["weights"]:
        raise UserError(f"{path} holds the weights {header['weights']!r} alone, not {weights_name(config)!r}.")
    if step not in (None, header["step"]):
        raise UserError(f"{path} holds step {header['step']} alone, not step {step}.")
    if config.autoencoder.fingerprint() != fingerprints["autoencoder"]:
        raise UserError(f"{path}: the autoencoder {config.autoencoder} is not that of its training.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(PACKED)}
    if digest_of(tensors) != fingerprints["weights"]:
        raise UserError(f"{path}: the weights changed since the file was written: copy it again.")
    return int(header["step"]), tensors


SCHEME = "hf://"
HUB_FILE, HUB_CARD = "model.safetensors", "README.md"


class Repository(NamedTuple):
    """A repository of models on the hub; revision is a branch, a tag or a commit, None the newest state."""

    name: str
    revision: str | None


def parse_address(address: str) -> Repository:
    """Return the repository of an address.  Raises UserError with the form of an address."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if match is None:
        raise UserError(f"{address}: a repository on the hub is written hf://owner/name or hf://owner/name@revision.")
    return Repository(match[1], match[2])


def download(address: str) -> Path:
    """Return the run's file of a repository, from huggingface_hub's cache if it is there.

    Raises:
        UserError: if the hub does not have it, or cannot be reached and the cache does not have it.
    """
    repository = parse_address(address)
    library = _library()
    try:
        return Path(library.hf_hub_download(repository.name, HUB_FILE, revision=repository.revision))
    except Exception as error:  # huggingface_hub, its HTTP client and the system raise many kinds.
        raise UserError(f"{address}: {_reason(error)}") from None


def upload(file: Path, card: str, address: str, *, private: bool = False) -> str:
    """Upload a run's file, and its card unless the repository has one, and return the web address.

    A missing repository is created.  The token is huggingface_hub's (`hf auth login`, or HF_TOKEN).

    Raises:
        WorkFailed: if the hub refuses the file.
    """
    repository = parse_address(address)
    if repository.revision is not None:
        raise UserError(f"{address}: an upload goes to the repository, not to a revision of it.")
    library = _library()
    try:
        api = library.HfApi(library_name="sitkit")
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        add = [library.CommitOperationAdd(HUB_FILE, file)]
        if not api.file_exists(repository.name, HUB_CARD):
            add.append(library.CommitOperationAdd(HUB_CARD, card.encode()))
        commit = api.create_commit(repository.name, add, commit_message=f"Upload {HUB_FILE} by sitkit")
    except Exception as error:
        raise WorkFailed(f"{address} was not uploaded: {_reason(error)}") from None
    return str(commit.repo_url)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{SCHEME} needs huggingface_hub ({error}): pip install 'sitkit[hub]'") from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    # The library's message has several paragraphs; the first may be empty.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
