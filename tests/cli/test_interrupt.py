"""Ctrl-C at any moment: one line, status 130, never a traceback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sitkit.cli.interrupt import resumable, stop_at_once

# Ctrl-C when a module is about to be imported, inside code that catches every exception, as some packages do.
PRESSED = """
import contextlib, signal, sys
from sitkit.cli import main

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Press())
sys.argv = ["sitkit", "sample"]
main()
"""


@pytest.mark.parametrize("name", ["rich", "typer", "pydantic", "torch", "numpy"])
def test_ctrl_c_during_an_import_ends_in_a_line(name: str, tmp_path: Path) -> None:
    code = [sys.executable, "-c", PRESSED.format(name=name)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "stopped.")


def test_a_process_that_ignores_ctrl_c_still_does(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + PRESSED.format(name="torch")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "stopped" not in done.stderr


def test_ctrl_c_that_a_library_turns_into_another_error_stops_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sitkit", "train", "my file.yaml"])
    before = signal.getsignal(signal.SIGINT)
    try:
        stop_at_once()
        ours = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as ended, resumable("all is kept. Continue with"):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise RecursionError from None
        assert ended.value.code == 130 and signal.getsignal(signal.SIGINT) is ours
        with pytest.raises(RecursionError), resumable():
            raise RecursionError
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr().err
    assert re.fullmatch(r"\nstopped; all is kept\. Continue with: sitkit train 'my file.yaml'\n", printed)
