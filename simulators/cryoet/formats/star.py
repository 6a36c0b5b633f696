"""STAR files as tables of texts and numbers, read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge.arrays import Array
from bridge.errors import InputError
from simulators.cryoet.formats.gemmi import import_gemmi

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# Nothing in these tables is larger, whatever its unit; what is computed of such numbers is finite.
LARGEST = 1e9


@dataclass(frozen=True, eq=False)
class Table:
    """A block of a STAR file: its columns as texts; a list of pairs is a table of one row."""

    path: Path
    name: str
    columns: Mapping[str, Sequence[str]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def check_rows(self) -> None:
        if not self.rows:
            raise InputError(
                f"Expected rows in data_{self.name} of {str(self.path)!r}, got none. Was it written completely?"
            )

    def texts(self, column: str) -> list[str]:
        values = list(self.columns[column])
        for i, value in enumerate(values, start=1):
            if value in ("", ".", "?"):
                raise InputError(f"Expected a text in row {i} of {column} in {str(self.path)!r}, got {value!r}.")
        return values

    def numbers(self, column: str) -> Array:
        values = []
        for i, text in enumerate(self.columns[column], start=1):
            # float() alone takes "nan", "1_0" and other alphabets' digits.
            value = float(text) if NUMBER.fullmatch(text) else np.nan
            if not abs(value) <= LARGEST:
                raise InputError(
                    f"Expected a number within +-{LARGEST:g} in row {i} of {column} in data_{self.name} of "
                    f"{str(self.path)!r}, got {text[:40]!r}."
                )
            values.append(value)
        return np.array(values)

    def optional(self, column: str) -> Array | None:
        return self.numbers(column) if column in self.columns else None

    def together(self, columns: tuple[str, ...]) -> Array | None:
        """(rows, columns), or None where there is none of them."""
        missing = [column for column in columns if column not in self.columns]
        if len(missing) == len(columns):
            return None
        if missing:
            raise InputError(
                f"Expected {', '.join(columns)} together in {str(self.path)!r}, found no {', '.join(missing)}."
            )
        return np.stack([self.numbers(column) for column in columns], axis=1)

    def single(self, column: str, assumed: list[str]) -> float | None:
        """One angle for all rows [degree]: their mean, where they agree to half a degree."""
        values = self.optional(column)
        if values is None:
            return None
        away = (values - values[0] + 180.0) % 360.0 - 180.0
        if np.ptp(away) > 0.5:
            raise InputError(
                f"Expected one {column} in {str(self.path)!r}, got angles {np.ptp(away):g} degrees apart: a tilt "
                "series here has one."
            )
        if np.ptp(away) > 0:
            assumed.append(f"{column} is the mean of angles up to {np.ptp(away):g} degrees apart.")
        return float(values[0] + away.mean())

    def row_of(self, name: str | None) -> int:
        names = self.texts("rlnTomoName")
        if name is None and len(names) > 1:
            raise InputError(
                f"Expected one series in {str(self.path)!r}, got {len(names)}. Give name=, one of {names[:9]}."
            )
        if name is not None and name not in names:
            raise InputError(f"Unknown rlnTomoName {name!r} in {str(self.path)!r}. Known: {', '.join(names[:9])}.")
        return 0 if name is None else names.index(name)


def listed(blocks: Mapping[str, Table]) -> str:
    return ", ".join(f"data_{name}" for name in list(blocks)[:9]) or "no blocks"


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # names that no file can have
        return False


def read_star(path: Path, advice: str = " Check the path.") -> dict[str, Table]:
    """The blocks of a STAR file by name."""
    cif = import_gemmi().cif
    if not is_file(path):
        raise InputError(f"Expected a STAR file, found none at {str(path)!r}.{advice}")
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Expected a STAR file, which is text, got {str(path)!r}: {error}.") from error
    if odd := re.search(r"[^\t\n -~\u00a0-\U0010ffff]", text):
        raise InputError(f"Expected a STAR file, which is text, got the character {odd[0]!r} in {str(path)!r}.")
    if not text.endswith("\n"):
        # A number cut off in the middle is a number.
        raise InputError(
            f"Expected {str(path)!r} to end with the end of a line, got {text[-20:]!r}. Was it written completely? If "
            "so, end the line."
        )
    try:
        document = cif.read_string(text)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"Expected a STAR file, got {str(path)!r}, which cannot be read: {error}.") from error
    blocks = {}
    for block in document:
        loops = [item.loop for item in block if item.loop is not None]
        pairs = [item.pair for item in block if item.pair is not None]
        name = block.name.strip()
        if len(loops) > 1 or (loops and pairs) or any(item.frame is not None for item in block):
            raise InputError(f"Expected one table in the block data_{name} of {str(path)!r}, got several.")
        columns = {tag.removeprefix("_"): [cif.as_string(value)] for tag, value in pairs}
        for loop in loops:
            values, width = list(loop.values), loop.width()
            columns = {
                tag.removeprefix("_"): [cif.as_string(value) for value in values[i::width]]
                for i, tag in enumerate(loop.tags)
            }
        blocks[name] = Table(path, name, columns)
    return blocks
