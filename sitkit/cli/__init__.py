"""The command line: parse, call the verb, print.  Importing it does not import torch, mlflow or pydantic."""

from __future__ import annotations

import sys


def main() -> None:
    """The `sitkit` command.  Exit status 0; 1, the work failed; 2, impossible, found before any work; 130, ctrl-C."""
    from sitkit.cli.interrupt import stop_at_once

    stop_at_once()
    from sitkit.cli import console
    from sitkit.runtime.errors import UserError, WorkFailed

    console.show_warnings()
    try:
        from sitkit.cli.commands import app

        app(prog_name="sitkit")
    except UserError as error:
        console.error(error)
        sys.exit(2)
    except WorkFailed as error:
        console.error(error)
        sys.exit(1)
    except OSError as error:
        # A folder that cannot be made or written, a full disk: the system says what and where.
        console.error(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else error)
        sys.exit(1)
