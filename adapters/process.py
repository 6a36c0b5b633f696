"""Runs one program in a process group of its own and leaves nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from bridge.environment import describe_status


@final
@dataclass(frozen=True)
class Outcome:
    """How a run ended: `status` as in `subprocess`, negative for a signal."""

    command: tuple[str, ...]
    status: int
    timed_out: bool

    def describe(self) -> str:
        return describe_status(self.status)


def run_process(
    command: tuple[str, ...],
    *,
    directory: Path,
    environment: Mapping[str, str],
    standard_input: Path | None,
    standard_output: Path,
    standard_error: Path,
    timeout_s: float | None,
    kill_grace_s: float,
) -> Outcome:
    """Runs a program to its end, or to the time limit.

    What it says goes to files: a pipe that nobody empties stops the program, and one that a grandchild holds open
    stops us. Whatever is left of its process group is killed afterwards, also when we are interrupted.
    """
    with contextlib.ExitStack() as files:
        stdin = subprocess.DEVNULL if standard_input is None else files.enter_context(standard_input.open("rb"))
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=stdin,
            stdout=files.enter_context(standard_output.open("wb")),
            stderr=files.enter_context(standard_error.open("wb")),
            start_new_session=True,
        )
        try:
            ended = _await_end(process.pid, timeout_s)
            if not ended:
                _signal_group(process.pid, signal.SIGTERM)
                _await_end(process.pid, kill_grace_s)
        finally:
            # Before the leader is reaped: until then its number, which is the group's, cannot be anybody else's.
            _signal_group(process.pid, signal.SIGKILL)
            status = process.wait()
        return Outcome(command, status, timed_out=not ended)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _await_end(pid: int, timeout_s: float | None) -> bool:
    """Waits until a child has ended, without reaping it; False after `timeout_s`."""
    with _descriptor(pid) as descriptor:
        if descriptor is None:
            return _poll_end(pid, timeout_s)
        # Wakes up at the very end, where waiting in `subprocess` looks only every now and then.
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        # poll takes milliseconds in 31 bits; a limit beyond 24 days is none.
        limit = None if timeout_s is None or timeout_s > 2e6 else int(1000 * timeout_s)
        return bool(poll.poll(limit))


@contextlib.contextmanager
def _descriptor(pid: int) -> Iterator[int | None]:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # kernels before 5.3, and containers that forbid it
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _poll_end(pid: int, timeout_s: float | None) -> bool:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pause = 0.0005
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True
