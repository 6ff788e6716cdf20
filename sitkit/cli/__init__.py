"""The command line: parse the flags, call the verb, print.  The import is light: no torch, mlflow or pydantic."""

from __future__ import annotations

import os
import re
import sys


def open_closed_streams() -> None:
    """Open the standard streams that are closed, on the null device; else the next file that is opened takes their place."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main() -> None:
    """Run the `sitkit` command.

    Exit status: 0; 1 if the work failed; 2 if it is impossible, which is found before any work; 128 + the signal
    after a signal, so 130 after ctrl-C.
    """
    from sitkit.cli.interrupt import stop_at_once

    open_closed_streams()
    stop_at_once()
    from sitkit.cli import console
    from sitkit.runtime.errors import UserError, WorkFailed

    console.show_warnings()
    try:
        from sitkit.cli.commands import app

        app(prog_name="sitkit")
    except (UserError, WorkFailed) as error:
        console.error(error)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except (MemoryError, RuntimeError) as error:
        # torch's error of the memory of a CPU has no type of its own.
        if not (isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error))):
            raise
        console.error(f"the memory is not enough: {(str(error) or 'an allocation failed').splitlines()[0]}")
        sys.exit(1)
    except OSError as error:
        # A folder that cannot be written, or a full disk: the system's message names the file and the reason.
        console.error(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else error)
        sys.exit(1)
