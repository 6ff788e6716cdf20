"""The process group: a single process, and two real ones under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sitkit.runtime import distributed
from sitkit.runtime.errors import UserError

# The code of each of two processes; it prints its results as "rank: value".
TOGETHER = """
import sys, torch
from sitkit.runtime import distributed
from sitkit.runtime.errors import UserError, WorkFailed

def tell(name, value):
    sys.stdout.write(f"{group.rank} {name} {value}\\n"); sys.stdout.flush()

with distributed.joined("cpu") as group:
    tell("size", group.size)
    tell("lead", group.lead)
    tell("share", list(group.share(5)))
    tell("gathered", group.gather(group.rank * 10))
    tell("decided", group.broadcast("mine" if group.rank == 1 else "lead's"))
    mine = torch.tensor([1.0, 5.0]) * (group.rank + 1)
    tell("mean", group.mean(mine).tolist())
    tell("kept", mine.tolist())
    with distributed.joined("cpu") as inner:
        tell("inner", (inner.rank, inner.size))
    group.barrier()
"""


def torchrun(code: str, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run code in a number of processes under torchrun."""
    (cwd / "code.py").write_text(code)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "code.py"]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ})


def test_a_single_process_is_the_whole_group() -> None:
    with distributed.joined("cpu") as group:
        assert (group.rank, group.size, group.lead, group.device) == (0, 1, True, torch.device("cpu"))
        assert group.gather(3) == [3] and group.broadcast("x") == "x"
        assert list(group.share(4)) == [0, 1, 2, 3]
        value = torch.ones(2)
        assert group.mean(value) is value
        group.barrier()


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta2"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with (
        pytest.raises(UserError, match=f"device '{name}' is not usable on this machine; usable: cpu"),
        distributed.joined(name),
    ):
        pass


def test_shares_are_disjoint_complete_and_even() -> None:
    for total in (0, 1, 7, 64, 101):
        for size in (1, 2, 3, 8):
            shares = [distributed.ProcessGroup(rank, size, torch.device("cpu")).share(total) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_processes(tmp_path: Path) -> None:
    left = torchrun(TOGETHER, tmp_path)
    assert left.returncode == 0, left.stderr
    told = {tuple(line.split(" ", 2)[:2]): line.split(" ", 2)[2] for line in left.stdout.splitlines()}
    for rank, share in (("0", "[0, 1]"), ("1", "[2, 3, 4]")):
        assert told[rank, "size"] == "2" and told[rank, "lead"] == str(rank == "0")
        assert told[rank, "share"] == share
        assert told[rank, "gathered"] == ("[0, 10]" if rank == "0" else "[]")
        assert told[rank, "decided"] == "lead's"
        assert told[rank, "mean"] == "[1.5, 7.5]"
        assert told[rank, "inner"] == f"({rank}, 2)"
    assert told["0", "kept"] == "[1.0, 5.0]" and told["1", "kept"] == "[2.0, 10.0]"


FAILING = """
import sys, time, torch
from sitkit.runtime import distributed
from sitkit.runtime.errors import UserError, WorkFailed

try:
    with distributed.joined("cpu") as group:
        group.barrier()
        {what}
        group.barrier()
except (UserError, WorkFailed) as error:
    sys.stdout.write(f"{{type(error).__name__}}: {{error}}\\n"); sys.stdout.flush()
    sys.exit(1)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise UserError('no such thing')", r"UserError: (rank 1 of 2: )?no such thing\n"),
        (
            "if group.rank == 1: raise WorkFailed('my disk is full')",
            r"WorkFailed: rank 1 of 2: my disk is full\n",
        ),
        (
            "if group.rank == 1: import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"(WorkFailed: Another of the 2 processes ended without a message .*\n)?",
        ),
    ],
)
def test_an_error_in_one_process_ends_all_with_one_message(tmp_path: Path, what: str, said: str) -> None:
    left = torchrun(FAILING.format(what=what), tmp_path)
    assert left.returncode == 1
    assert re.fullmatch(said, left.stdout), (left.stdout, left.stderr)
    # The only traceback is torchrun's own.
    assert 'code.py", line' not in left.stderr, left.stderr
