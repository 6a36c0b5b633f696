"""Files that may be compressed: what they are shows in their first bytes, not in their names."""

from __future__ import annotations

import bz2
import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, cast

# What reading a damaged file raises.
PACKED_ERRORS = (OSError, EOFError, zlib.error)


def is_packed(path: Path) -> bool:
    """Whether a file is compressed by gzip or bzip2."""
    with path.open("rb") as raw:
        start = raw.read(3)
    return start[:2] == b"\x1f\x8b" or start == b"BZh"


def opened(path: Path) -> BinaryIO:
    """The file's content, decompressed."""
    with path.open("rb") as raw:
        start = raw.read(3)
    if start[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return cast(BinaryIO, bz2.open(path, "rb")) if start == b"BZh" else path.open("rb")
