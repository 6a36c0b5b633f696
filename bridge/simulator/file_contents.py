"""What is in files and folders, as a digest."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from collections.abc import Callable, Iterator

# A folder with more than this is not gone through.
_MOST_FILES, _MOST_BYTES = 10_000, 20e9


def content_digest(path: str | os.PathLike[str]) -> str:
    """A digest of what is in a file, or of the names and contents of all that is in a folder; not of where it is.

    A file is read once for each state of it (size, time of change).

    Raises:
        OSError: it cannot be read, or a folder holds too much to be gone through.
    """
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode):
        return _of_file(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)
    if not stat.S_ISDIR(status.st_mode):
        return f"special {stat.S_IFMT(status.st_mode):o}"
    state, number, total = hashlib.blake2b(digest_size=16), 0, 0
    for file, content, size in _of_folder(os.fspath(path), ()):
        number, total = number + 1, total + size
        if number > _MOST_FILES or total > _MOST_BYTES:
            raise OSError(f"more than {_MOST_FILES} files or {_MOST_BYTES:.0e} bytes")
        state.update(
            f"{os.path.relpath(file, path)}\0{content() if callable(content) else content}\0".encode(
                "utf-8", "surrogateescape"
            )
        )
    return state.hexdigest()


def _of_folder(folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, str | Callable[[], str], int]]:
    """What is in a folder, behind links as well: path, content and size of each file, and of a folder that is empty.

    Args:
        above: real paths of the folders that it is in; of a link back to one of them it is said how far up that is.
    """
    above = (*above, os.path.realpath(folder))
    names = sorted(os.listdir(folder))
    if not names:
        yield folder, "an empty folder", 0
    for name in names:
        file = os.path.join(folder, name)
        if not os.path.exists(file):
            yield file, "nothing", 0
        elif not os.path.isdir(file):
            yield file, functools.partial(content_digest, file), os.stat(file).st_size
        elif (real := os.path.realpath(file)) in above:
            yield file, f"the folder {len(above) - above.index(real)} up", 0
        else:
            yield from _of_folder(file, above)


@functools.lru_cache(maxsize=16384)
def _of_file(path: str, size: int, changed_ns: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
