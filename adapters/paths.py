"""Absolute paths in texts that a program is given: what is there counts, not where it is."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

# An absolute path within a text: at its beginning, after a space, a quote, a mark, or an option of one letter.
_BEFORE = re.compile(r"(?:^|(?<=[\s'\"`=,:;|&<>(@\[{])|(?<=^-[A-Za-z])|(?<=\s-[A-Za-z]))(?=~?/)")
_AFTER = re.compile(r"[\s'\"`=,:;|&<>()@\[\]{}]")
_LISTS = ("", ":", ",", ";", "=")  # before and after the folders of a list
# What is installed with the system: it is no part of what somebody has made.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/dev", "/proc", "/sys", "/run", "/etc")


def is_of_system(path: str | os.PathLike[str]) -> bool:
    """Whether it came with the operating system."""
    return any(os.fspath(path) == top or os.fspath(path).startswith(f"{top}/") for top in _SYSTEM)


def with_files(text: str, folders: bool = True, but: Collection[str] = ()) -> str | tuple[str | Path, ...]:
    """A text, and in place of each absolute path in it what is there, as a `Path`.

    Args:
        folders: whether folders count, where the text is one, names one after "=", or is a list of them.
        but: folders of a list that do not count; nor do those of the system.
    """
    parts: list[str | Path] = []
    done = 0
    for found in _BEFORE.finditer(text):
        start = found.start()
        ends = [start + after.start() for after in itertools.islice(_AFTER.finditer(text[start : start + 4096]), 16)]
        # The longest that is there: names have spaces, too.
        ends += [len(text)] if len(text) - start < 4096 else []
        for end in sorted({*ends} - {start}, reverse=True) if start >= done else ():
            path = text[start:end]
            before, after = text[:start][-1:], text[end : end + 1]
            one = not after and before in ("", "=")
            listed = after in _LISTS and (before in _LISTS or (text[:start].startswith("-") and start == 2))
            listed = listed and path not in but and not is_of_system(path)
            if _is(os.path.isfile, path) or (folders and (one or listed) and _is(os.path.isdir, path)):
                parts += [text[done:start], Path(path)]
                done = end
                break
    return (*parts, text[done:]) if parts else text


def _is(kind: Callable[[str], bool], path: str) -> bool:
    try:
        return kind(os.path.expanduser(path))
    except ValueError:
        return False
