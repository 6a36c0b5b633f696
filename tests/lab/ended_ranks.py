"""What tests of killed jobs wait for."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path


def until_the_run_is_free(directory: Path, timeout_s: float = 60.0) -> None:
    """Until no process holds the run in a directory: a launcher that is shot tells its ranks nothing, and they live on
    until they miss it.
    """
    lock = directory / ".lock"
    begin = time.monotonic()
    while lock.exists():
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
        assert time.monotonic() - begin < timeout_s, f"a rank still holds {directory} after {timeout_s:g} s"
        time.sleep(0.1)
