"""A signal that asks a command to stop, at any moment: one line, status 128 + signal, never a traceback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sitkit.cli.interrupt import resumable, stop_at_once
from sitkit.runtime.stops import SIGNALS, Stopped, noted, stopping

# Ctrl-C when a module is about to be imported, inside code that catches every exception, as some packages do.
PRESSED = """
import contextlib, signal, sys
from sitkit.cli import main

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.{sent})

sys.meta_path.insert(0, Press())
sys.argv = ["sitkit", "sample"]
main()
"""


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        *((name, signal.SIGINT) for name in ("rich", "typer", "pydantic", "torch", "numpy")),
        *(("torch", number) for number in SIGNALS[1:]),
    ],
)
def test_a_signal_during_an_import_ends_in_a_line(name: str, sent: signal.Signals, tmp_path: Path) -> None:
    code = [sys.executable, "-c", PRESSED.format(name=name, sent=sent.name)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (128 + sent, "", "stopped.")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
def test_a_process_that_ignores_a_signal_still_does(sent: signal.Signals, tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.{sent.name}, signal.SIG_IGN)\n"
    code += PRESSED.format(name="torch", sent=sent.name)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "stopped" not in done.stderr


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_that_a_library_turns_into_another_error_stops_the_work(
    sent: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sitkit", "train", "my file.yaml"])
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        stop_at_once()
        ours = signal.getsignal(sent)
        with pytest.raises(SystemExit) as ended, resumable("all is kept. Continue with"):
            try:
                signal.raise_signal(sent)
            except KeyboardInterrupt:
                raise RecursionError from None
        assert ended.value.code == 128 + sent and signal.getsignal(sent) is ours
        with pytest.raises(RecursionError), resumable():
            raise RecursionError
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    printed = capsys.readouterr().err
    assert re.fullmatch(r"\nstopped; all is kept\. Continue with: sitkit train 'my file.yaml'\n", printed)


def test_a_second_signal_ends_the_process_at_once_and_says_what_is_lost(tmp_path: Path) -> None:
    code = """
import signal, sys
from sitkit.cli.interrupt import resumable, stop_at_once
from sitkit.runtime.stops import noted
sys.argv = ["sitkit", "train", "x.yaml"]
stop_at_once()
with resumable(), noted() as signals:
    signal.raise_signal(signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    print("a step is finished", flush=True)
    try:
        signal.raise_signal(signal.SIGHUP)
    finally:
        print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGHUP, "a step is finished\n")
    assert (
        done.stderr == "\nstopped at once; the work since the last save is lost. Continue with: sitkit train x.yaml\n"
    )


def test_signals_that_repeat_the_request_are_ignored() -> None:
    with stopping(patience=60), noted() as signals:
        for number in SIGNALS:
            signal.raise_signal(number)
        assert signals == [SIGNALS[0]]
    with pytest.raises(Stopped) as caught, noted() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
    assert signals == [signal.SIGTERM] and caught.value.signum == signal.SIGHUP
    with noted() as signals:
        signal.raise_signal(signal.SIGINT)
    assert signals == [signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
