"""`bridge run`: a Python script as `__main__`, under the rules that a job of several ranks needs from line one."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from bridge.dispatch import get_dispatcher
from bridge.dispatch.world import driver
from bridge.errors import BridgeError, InputError, exit_code, exit_status


def run_script(script: str, arguments: Sequence[str], drive: bool) -> int:
    """The script as `__main__`, under the rules that a job of several ranks needs from its first line on.

    An exception ends all ranks, with the traceback, also before the script has called bridge; so does `sys.exit` of one
    rank alone. A rank that is at its end while others still make collective calls raises a `CollectiveError` on all.
    """
    path = Path(script)
    if not path.is_file():
        raise InputError(f"Expected a Python script, got {script!r}, which is no file.")
    dispatcher = get_dispatcher()
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)
    if drive:
        with driver() as main:
            return _as_main(path) if main else 0
    status = _as_main(path)
    if dispatcher.size > 1:
        try:
            dispatcher.begin("end of the script", f"exit status {status}")
        except BridgeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return status


def _as_main(path: Path) -> int:
    """Runs a script; its exit status."""
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        return exit_status(error)
    except BaseException as error:
        # A `BridgeError` too is shown with its traceback, as under plain Python; under MPI this ends all ranks.
        with contextlib.suppress(SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            return 130
        return exit_code(type(error)) if isinstance(error, BridgeError) else 1
    return 0
