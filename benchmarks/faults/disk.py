"""A disk that is full: each command in a file system of its own that is too small, and again once it has room.

Where the system does not let this process mount one, a limit of the size of a file takes its place.
"""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
from pathlib import Path

from command import limit, run
from count import Count, spread
from stops import Undisturbed, again
from work import ends

SIZES, ROOM = 10, 2**26
COMMANDS = ("train", "sample", "evaluate", "encode", "search", "ablate")


def full(root: Path, trials: int, draw: random.Random) -> Count:
    """Run each command on a disk of each size; the sizes lie between that of its input and what it needs."""
    # The disk is mounted on the folder of the trials, whose path the records hold.
    disk = root / "trial"
    known, count = Undisturbed(root), Count()
    pairs = [(name, size) for size in range(SIZES) for name in COMMANDS if name in known.places]
    mounts = _mount(disk, ROOM)
    try:
        for trial, (name, number) in enumerate(spread(pairs, trials)):
            share = (number + draw.random()) / SIZES
            _fill(count, known, name, share, f"{name} with {share:.0%} of its disk, trial {trial}", mounts)
    finally:
        if mounts:
            subprocess.run(["umount", "-l", disk], check=True)
    return count


def _fill(count: Count, known: Undisturbed, name: str, share: float, what: str, mounts: bool) -> None:
    """Run a command on a disk that has a share of what it writes; then again, with room."""
    place, disk = known.places[name], known.folder
    _clear(disk)
    shutil.copytree(place.folder, disk, dirs_exist_ok=True)
    if mounts:
        start = _blocks([path.stat().st_size for path in place.folder.rglob("*")])
        _resize(disk, int(start + share * (_blocks(known.sizes[name]) - start)))
        ended = run(place.words, disk)
    else:
        ended = run(place.words, disk, before=limit(resource.RLIMIT_FSIZE, int(share * max(known.sizes[name]))))
    if count.check(ended, what) and ended.status:
        errors = [line for line in ended.lines if line.startswith("error:")]
        if len(errors) != 1:
            count.note("status", f"{what}: {len(errors)} errors")
    try:
        ends(disk)
    except (ValueError, KeyError, EOFError, OSError) as error:
        count.note("unequal", f"{what}: a file is torn: {error}")
    if mounts:
        _resize(disk, ROOM)
    again(count, place.words, disk, what, known.ends[name])


def _mount(folder: Path, size: int) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    try:
        return subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        return False


def _resize(folder: Path, size: int) -> None:
    # A file system cannot be smaller than what it holds.
    least = shutil.disk_usage(folder).used
    subprocess.run(["mount", "-o", f"remount,size={max(size, least + 4096)}", folder], check=True)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _blocks(sizes: list[int]) -> int:
    """Return the bytes that files of these sizes take in blocks of 4 KiB, with one for each entry."""
    return sum(4096 + -(-size // 4096) * 4096 for size in sizes)
