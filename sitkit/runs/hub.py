"""Runs in one file on the Hugging Face hub, by huggingface_hub: hf://owner/name, or hf://owner/name@revision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from sitkit.runtime.errors import UserError, WorkFailed

SCHEME = "hf://"
FILE, CARD = "model.safetensors", "README.md"


class Repository(NamedTuple):
    """A repository of models; revision is a branch, a tag or a commit, None the newest state."""

    name: str
    revision: str | None


def parse(address: str) -> Repository:
    """The repository of an address.  Raises UserError that says how one is written."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if match is None:
        raise UserError(f"{address}: a repository on the hub is written hf://owner/name or hf://owner/name@revision.")
    return Repository(match[1], match[2])


def download(address: str) -> Path:
    """The run's file of a repository, from huggingface_hub's cache where it is there already.

    Raises UserError where the hub has none, or cannot be reached and the cache has none.
    """
    repository = parse(address)
    library = _library()
    try:
        return Path(library.hf_hub_download(repository.name, FILE, revision=repository.revision))
    except Exception as error:  # huggingface_hub, its HTTP client and the system raise many kinds.
        raise UserError(f"{address}: {_reason(error)}") from None


def push(file: Path, card: str, address: str, *, private: bool = False) -> str:
    """Upload a run's file, and its card unless the repository has one; made where it is not there.  Returns its web address.

    The token is huggingface_hub's (`hf auth login`, or HF_TOKEN).  Raises WorkFailed where the hub does not take it.
    """
    repository = parse(address)
    if repository.revision is not None:
        raise UserError(f"{address}: an upload goes to the repository, not to a revision of it.")
    library = _library()
    try:
        api = library.HfApi(library_name="sitkit")
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        add = [library.CommitOperationAdd(FILE, file)]
        if not api.file_exists(repository.name, CARD):
            add.append(library.CommitOperationAdd(CARD, card.encode()))
        done = api.create_commit(repository.name, add, commit_message=f"Upload {FILE} by sitkit")
    except Exception as error:
        raise WorkFailed(f"{address} was not uploaded: {_reason(error)}") from None
    return str(done.repo_url)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{SCHEME} needs huggingface_hub ({error}): pip install 'sitkit[hub]'") from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    # The library explains itself over several paragraphs, the first of which may be empty.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
