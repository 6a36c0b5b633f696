"""Runs Python scripts in processes that have imported what all of them import: `run_alone` of conftest asks it to.

Half of the time of a short script is the import of torch. This process imports it once, computes nothing itself, and
forks a child for each script, which then is `__main__`, in its own session, with its own arguments, environment and
files for what it says. One line of JSON asks; one of JSON answers with the exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import sys
import time
import traceback

import bridge.fitting  # noqa: F401  # and with it numpy, scipy and torch


def be(script: str, arguments: list[str], environment: dict[str, str], directory: str, out: str, err: str) -> int:
    """The life of a child, as the interpreter would have it; its exit status."""
    os.setsid()
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        timeout_s = asked.pop("timeout_s")
        child = os.fork()
        if child == 0:
            os._exit(be(**asked))
        deadline = time.monotonic() + timeout_s
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < deadline:
            time.sleep(0.005)
            done, status = os.waitpid(child, os.WNOHANG)
        if not done:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status) if done else None}), flush=True)


if __name__ == "__main__":
    main()
