"""Nothing that a process starts outlives it: neither programs and child processes, nor the directories made for them.

A process that is killed cannot clean up after itself, and what it has started in a session of its own goes on. So the
first child brings a warden along: a small process that imports nothing of ours, waits for the end of the one that has
started it, then kills what carries its mark (an environment variable, which children of children inherit) and removes
the directories that carry its name. Where the warden is killed too, the next process that uses the same folder removes
what the dead have left there.

Linux only, as the rest of what is done with processes here; elsewhere nothing is done.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "BRIDGE_STARTED_BY"
_KEPT = "kept"
_OWNED = re.compile(r"bridge-.*-(\d+)-([0-9a-z]+)-([0-9a-f]{6})-[a-z0-9_]{8}")
_PATIENCE_S = 10.0

_lock = threading.Lock()
_warden: tuple[int, int] | None = None  # whose it is, and the pipe that it reads
_told: set[tuple[int, str]] = set()


# --- the one that is guarded ------------------------------------------------------------------------------------------


def marked(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a child that is to end when this process does; starts the warden where there is none."""
    _guard()
    return {**environment, MARK: _name(os.getpid())}


def own_directory(stem: str, folder: Path | None = None, stays: bool = False) -> Path:
    """A fresh directory that goes when this process does; what dead processes have left in the folder is removed first.

    Args:
        stem: part of its name. folder: where, made where missing; the system's temporary directory by default.
        stays: it has a name that nobody removes.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    place = Path(tempfile.gettempdir() if folder is None else folder)
    place.mkdir(parents=True, exist_ok=True)
    _guard()
    _tell(place)
    return Path(tempfile.mkdtemp(prefix=f"bridge-{stem}-{_KEPT if stays else _name(os.getpid())}-", dir=place))


def keep_directory(directory: Path, stem: str, most: int | None) -> Path:
    """Gives one's own directory a name that stays, and removes the oldest of more than `most` such; its new path."""
    place = directory.parent
    kept = place / f"bridge-{stem}-{_KEPT}-{directory.name[-8:]}"
    with contextlib.suppress(OSError):
        os.rename(directory, kept)
        directory = kept
    if most is not None and place.is_dir():
        names = re.compile(rf"bridge-{re.escape(stem)}-{_KEPT}-[a-z0-9_]{{8}}")
        found = [(_changed(path), path) for path in place.iterdir() if names.fullmatch(path.name)]
        for _, path in sorted(found)[: max(0, len(found) - most)]:
            if path != directory:
                shutil.rmtree(path, ignore_errors=True)
    return directory


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has removed it
        return 0.0


def _guard() -> None:
    """Starts the warden of this process, once; a fork gets one of its own."""
    global _warden
    if not sys.platform.startswith("linux") or (_warden is not None and _warden[0] == os.getpid()):
        return
    with _lock:
        if _warden is not None and _warden[0] == os.getpid():
            return
        # Without our environment: the mark of a process above would have it killed with that one. Without our
        # standard output: who reads it would wait for the warden's end.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), _name(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        assert process.stdin is not None
        _warden = os.getpid(), os.dup(process.stdin.fileno())
        process.stdin.close()
        process.returncode = 0  # nobody waits for it: it ends after us


def _tell(folder: Path) -> None:
    """Has the warden know a folder with directories of ours, and removes what the dead have left there, once."""
    key = os.getpid(), str(folder)
    if key in _told:
        return
    _told.add(key)
    remove_left(folder)
    if _warden is not None:
        with contextlib.suppress(OSError):
            os.write(_warden[1], os.fsencode(folder) + b"\n")


def remove_left(folder: Path) -> None:
    """Removes the directories of processes of this machine that are no more."""
    ours = _place()
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            owner = _OWNED.fullmatch(path.name)
            if owner is None or owner[3] != ours or _start(int(owner[1])) == owner[2]:
                continue
            with contextlib.suppress(OSError):
                if path.lstat().st_uid == os.getuid():
                    shutil.rmtree(path, ignore_errors=True)


# --- who is who -------------------------------------------------------------------------------------------------------


def _name(pid: int) -> str:
    """Of a process, also after its number has been given to another: number, time of its start, machine."""
    return f"{pid}-{_start(pid) or '0'}-{_place()}"


def _start(pid: int) -> str | None:
    """When a process has started, in base 36 of clock ticks since the boot; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    if fields[0] in (b"Z", b"X"):  # it has ended, and nobody has asked how
        return None
    ticks, digits = int(fields[19]), ""
    while ticks:
        ticks, digit = divmod(ticks, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"


def _place() -> str:
    """The machine and the space of process numbers: several machines, and containers, may share a folder."""
    from zlib import crc32

    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{crc32(f'{os.uname().nodename} {space} {os.getuid()}'.encode()) & 0xFFFFFF:06x}"


# --- the warden -------------------------------------------------------------------------------------------------------


def watch(pid: int, name: str) -> None:
    """Waits for the end of a process, then ends what it has started and removes what it has made."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    folders = _wait(pid, name)
    until = time.monotonic() + _PATIENCE_S
    while (left := list(_marked_with(name))) and time.monotonic() < until:
        for child in left:
            with contextlib.suppress(OSError):
                # A program that we have started leads a group, with all that it has not given one of their own.
                (os.killpg if os.getpgid(child) == child else os.kill)(child, signal.SIGKILL)
        time.sleep(0.02)
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in list(Path(folder).iterdir()):
                if f"-{name}-" in path.name and _OWNED.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)


def _wait(pid: int, name: str) -> list[str]:
    """The folders that were told of, once the process has ended."""
    told = b""
    poll = select.poll()
    try:
        ends = os.pidfd_open(pid)
        poll.register(ends, select.POLLIN)
    except OSError:  # kernels before 5.3
        ends = -1
    poll.register(0, select.POLLIN)
    while _name(pid) == name:
        for descriptor, _ in poll.poll(-1 if ends >= 0 else 500):
            if descriptor == 0:
                part = os.read(0, 65536)
                told += part
                if not part:
                    poll.unregister(0)
    with contextlib.suppress(OSError):
        os.set_blocking(0, False)
        while part := os.read(0, 65536):
            told += part
    return [os.fsdecode(line) for line in told.splitlines()]


def _marked_with(name: str) -> Iterator[int]:
    mark = f"{MARK}={name}".encode()
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0") and _start(int(entry)):
                    yield int(entry)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
