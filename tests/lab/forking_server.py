"""Python scripts in processes that have imported what all of them import.

Most of the time of a short script is the import of torch. The server imports it once, computes nothing itself, and
forks a process for each script, which then is `__main__`, in its own session, with the arguments, environment,
directory and open files of whoever asked.

    forking_server.py SOCKET         the server; it ends with its standard input
    forking_server.py SOCKET SCRIPT ARGUMENTS ...
                                     stands in for a process that runs the script: a launcher's ranks, started so, hand
                                     their place in the job on to a fork, as open files and environment

A process that stands in hands on signals, ends as the fork does, and takes the fork with it where it is killed. But
they are two processes: ranks that are to die are started as any others.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

_MOST_FILES = 64


def ask(
    server: str,
    script: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    files: Mapping[int, int],
) -> socket.socket:
    """Has a script run; `files`: descriptors there -> here. The connection brings the exit status, see `exit_status`;
    each byte sent on it is a signal to the script, and its end kills the script and all that it has started."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    asked = {"script": script, "arguments": list(arguments), "environment": dict(environment)}
    asked |= {"directory": directory, "files": list(files)}
    socket.send_fds(connection, [b"?"], list(files.values()))
    connection.sendall(json.dumps(asked).encode() + b"\n")
    return connection


def exit_status(connection: socket.socket) -> int:
    """Waits for it; negative: the signal that ended the script. The connection's own timeout holds."""
    with connection.makefile("r") as answers:
        return int(answers.readline())


def _stand_in(server: str, script: str, arguments: list[str]) -> None:
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    files = {}
    for number in numbers:
        with contextlib.suppress(OSError):  # the listing's own
            fcntl.fcntl(number, fcntl.F_GETFD)
            files[number] = number
    connection = ask(server, script, arguments, os.environ, os.getcwd(), files)
    for handed in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(handed, lambda number, frame: connection.send(bytes([number])))
    status = exit_status(connection)
    if status >= 0:
        os._exit(status)
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


def _keep(connection: socket.socket, child: int) -> None:
    """Between whoever asked and the script, until one of them ends."""
    connection.settimeout(0.005)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        try:
            numbers = connection.recv(16)
        except TimeoutError:
            continue
        except OSError:
            numbers = b""
        if not numbers:
            os.killpg(child, signal.SIGKILL)
            os._exit(0)
        for number in numbers:
            os.kill(child, number)


def _become(asked: Mapping[str, object], received: list[int]) -> str:
    """The script that this process is to run, with everything about it as it was asked for."""
    # First all out of the way: one may have the number that another is to have.
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, 256) for number in received]
    for number in received:
        os.close(number)
    for number, to in zip(moved, asked["files"], strict=True):
        os.dup2(number, to)
        os.close(number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    sys.argv = [asked["script"], *asked["arguments"]]
    sys.path[0] = os.path.dirname(asked["script"])
    return asked["script"]


def _serve(path: str) -> str | None:
    """Returns in each fork, with the script to run, and where the server is to end, with None."""
    import bridge.fitting.fit  # noqa: F401  # and with it numpy, scipy and torch

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that keep
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(64)
    os.rename(path + ".new", path)  # it is there as soon as it answers
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if listener not in ready:
            return None
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        _, received, _, _ = socket.recv_fds(connection, 1, _MOST_FILES)
        with connection.makefile("r") as lines:
            asked = json.loads(lines.readline())
        # In a session of its own before anybody can want to end it.
        begun, begins = os.pipe()
        child = os.fork()
        if child:
            for number in (*received, begins):
                os.close(number)
            os.read(begun, 1)
            _keep(connection, child)
        os.setsid()
        for number in (begun, begins):
            os.close(number)
        connection.close()
        return _become(asked, received)


def wait_for(path: str, timeout_s: float = 120.0) -> None:
    """Until the server answers."""
    begin = time.monotonic()
    while not os.path.exists(path):
        if time.monotonic() - begin > timeout_s:
            raise TimeoutError(f"no server after {timeout_s:g} s")
        time.sleep(0.02)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _stand_in(sys.argv[1], sys.argv[2], sys.argv[3:])
    elif (to_run := _serve(sys.argv[1])) is not None:
        import runpy

        runpy.run_path(to_run, run_name="__main__")
