"""The command line where the streams, the home folder, the user or the encoding are unusual."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

TRAIN = ("train", "points", "--steps", "2", "--set", "run.track=false", "--set", "train.batch=8")


def sitkit(
    *words: str, cwd: Path, shell: str = "", environment: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; `shell` follows it, and a variable of value None is not set."""
    names = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | dict(environment or {})
    line = " ".join([sys.executable, "-m", "sitkit", *words, shell])
    env = {name: value for name, value in names.items() if value is not None}
    return subprocess.run(["sh", "-c", line], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_no_result(shell: str, tmp_path: Path) -> None:
    done = sitkit(*TRAIN, cwd=tmp_path, shell=shell)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/*/checkpoints/*.safetensors"))) == 1 and "Traceback" not in done.stderr
    refused = sitkit("train", "points", "--interp", "liner", cwd=tmp_path, shell=shell)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "environment",
    [{"HOME": None}, {"HOME": "/proc/no-home"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}],
)
def test_a_training_where_the_home_folder_or_the_encoding_is_missing(
    environment: dict[str, str | None], tmp_path: Path
) -> None:
    done = sitkit(*TRAIN, cwd=tmp_path, environment=environment)
    assert done.returncode == 0 and len(list(tmp_path.glob("runs/*/checkpoints/*.safetensors"))) == 1, done.stderr
    listed = sitkit("list", "weightings", cwd=tmp_path, environment=environment)
    assert listed.returncode == 0 and "min-snr" in listed.stdout


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0 or not shutil.which("setpriv"), reason="changes the user")
def test_a_user_without_an_entry_in_the_list_of_users() -> None:
    user = f"setpriv --reuid 54321 --regid 54321 --clear-groups {sys.executable} -m sitkit"
    # Other users cannot enter `tmp_path`.
    place = Path("/tmp") / f"sitkit-user-{os.getpid()}"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    try:
        line = f"cd {place} && exec {user} {' '.join(TRAIN)}"
        env = {name: value for name, value in os.environ.items() if name != "HOME"}
        done = subprocess.run(["sh", "-c", line], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("device", ["meta", "hpu", "cuda:99", "gpu"])
def test_a_device_that_this_machine_does_not_have_is_named(device: str, tmp_path: Path) -> None:
    done = sitkit(*TRAIN, "--device", device, cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.startswith(f"error: device '{device}' is not usable on this machine; usable: cpu")
