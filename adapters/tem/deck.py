"""TEM-simulator's input file, the deck: reading, checking and writing.

The program ends with exit status 0 whatever a deck holds, so a deck is checked before it is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from adapters.tem.keys import KEYS, Dialect, Value, check_kind, check_value, converted, known_key
from bridge.errors import InputError

_LINE_LIMIT, _NAME_LIMIT = 200, 49
_AT_MOST = {"detector": 10, "particle": 20, "particleset": 20, "volume": 20}
_NEEDED = ("sample", "geometry", "electronbeam", "optics", "detector")


@final
@dataclass(frozen=True)
class Component:
    """A component of a deck: its kind, its name ("" for none) and the keys that are set."""

    kind: str
    name: str
    values: Mapping[str, Value]

    @classmethod
    def of(cls, kind: str, name: str, values: Mapping[str, object]) -> Component:
        """A component with values of the keys' types."""
        check_kind(kind)
        if len(name) > _NAME_LIMIT or any(c.isspace() or c == "=" for c in name):
            raise InputError(
                f"Expected the name of the {kind} to have at most {_NAME_LIMIT} characters and no spaces, got {name!r}."
            )
        heading = f"{kind} {name}".strip()
        own = {k: converted(f"{k} of {heading}", known_key(kind, k), v) for k, v in values.items()}
        return cls(kind, name, MappingProxyType(own))

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping proxy cannot be pickled
        return Component.of, (self.kind, self.name, dict(self.values))

    @property
    def heading(self) -> str:
        return f"{self.kind} {self.name}".strip()

    def get(self, key: str) -> Value | None:
        """The value that holds: the one that is set, else the program's default, else None."""
        return self.values.get(key, known_key(self.kind, key).default)

    def number(self, key: str) -> float:
        """The value of a numeric key that is set or has a default."""
        value = self.get(key)
        if value is None:
            raise InputError(f"Expected {key} in the component {self.heading!r}, got none. Add it to the deck.")
        return float(value)

    def changed(self, values: Mapping[str, Value], without: Sequence[str] = ()) -> Component:
        """With other values, and without some keys."""
        kept = {k: v for k, v in self.values.items() if k not in without}
        return Component.of(self.kind, self.name, {**kept, **values})

    def check(self, dialect: Dialect) -> None:
        """Raises `InputError` where the program would refuse the component, or ignore a key of it."""
        for name, value in self.values.items():
            key = known_key(self.kind, name)
            if key.dialect not in (None, dialect):
                raise InputError(
                    f"Expected no {name} in {self.heading!r}, which the dialect {key.dialect!r} has alone; "
                    f"dialect={dialect!r} was chosen. If the binary is that fork, say so by dialect={key.dialect!r}."
                )
            check_value(f"{name} of {self.heading}", key, value)
        needed = [name for name, key in KEYS[self.kind].items() if key.required]
        missing = [name for name in (*needed, *self._needed_besides()) if self.get(name) is None]
        if missing:
            raise InputError(
                f"Expected {', '.join(dict.fromkeys(missing))} in the component {self.heading!r} of the deck, got none."
            )

    def _needed_besides(self) -> list[str]:
        """The keys that become required by the values of others."""
        get = self.get
        if self.kind == "particle":
            needed = {
                "pdb": ["voxel_size", "pdb_file_in"],
                "map": ["map_file_re_in"],
                "random": ["nx", "ny", "nz", "voxel_size", "contrast_re", "smoothness", "make_positive"],
            }[str(get("source"))]
            if get("source") == "map" and get("map_file_format") == "raw":
                needed += ["nx", "ny", "nz", "voxel_size"]
            if get("use_imag_pot"):
                return needed + {"map": ["map_file_im_in"], "random": ["contrast_im"]}.get(str(get("source")), [])
            return [*needed, "famp"]
        if self.kind == "particleset":
            return {"file": ["coord_file_in"], "random": ["where"], "grid": ["particle_dist"]}[
                str(get("particle_coords"))
            ]
        if self.kind == "geometry":
            needed = ["ntilts", "theta_start", "theta_incr"] if get("gen_tilt_data") else ["geom_file_in"]
            return [*needed, "error_file_in"] if get("geom_errors") == "file" else needed
        if self.kind == "electronbeam":
            if not get("gen_dose"):
                return ["dose_file_in"]
            return [] if get("total_dose") is not None else ["dose_per_im"]
        if self.kind == "optics":
            return ["defocus_nominal" if get("gen_defocus") else "defocus_file_in"]
        return []


@final
@dataclass(frozen=True)
class Deck:
    """An input file of TEM-simulator.

    Args:
        components: in the order of the file.
        folder: where the files that it names are looked up.
    """

    components: tuple[Component, ...]
    folder: Path = field(default_factory=Path)

    @classmethod
    def read(cls, path: str | Path) -> Deck:
        """A deck from a file; the files that it names are relative to its folder.

        Raises:
            InputError: no such file, a line that the program cannot parse or would cut off, or an unknown key.
        """
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Expected a deck of TEM-simulator at {str(path)!r}, got {error}.") from error
        components: list[tuple[str, str, dict[str, object]]] = []
        for number, line in enumerate(lines, start=1):
            if len(line.encode()) > _LINE_LIMIT:
                raise InputError(
                    f"Expected lines of at most {_LINE_LIMIT} bytes, got {len(line.encode())} in line {number} of "
                    f"{path}: TEM-simulator cuts the rest off. Use relative file names."
                )
            if line.startswith("#") or not line.strip():
                continue
            if line.startswith("="):
                words = line.replace("=", " ").split()
                if not 1 <= len(words) <= 2:
                    raise InputError(f"Expected '=== component name ===' in line {number} of {path}, got {line!r}.")
                components.append((words[0], words[1] if len(words) == 2 else "", {}))
                continue
            key, equals, value = line.partition("=")
            value = value.strip()
            value = value[1:].partition('"')[0] if value.startswith('"') else (value.split() or [""])[0]
            if not equals or not key.strip() or not value or not components:
                raise InputError(f"Expected 'key = value' under a heading in line {number} of {path}, got {line!r}.")
            components[-1][2][key.split()[0]] = value
        return cls(tuple(Component.of(*parts) for parts in components), path.parent)

    @classmethod
    def from_tables(cls, tables: Mapping[str, object], folder: str | Path = ".") -> Deck:
        """A deck from tables: {"optics": {"cs": 2.0, ...}, "particle TMV": {...}, ...}; its files are in `folder`.

        Raises:
            InputError: an unknown component or key, or a value of the wrong type.
        """
        components = []
        for heading, values in tables.items():
            kind, _, name = heading.partition(" ")
            if not isinstance(values, Mapping):
                raise InputError(f"Expected the component {heading!r} as a table of keys, got {values!r}.")
            components.append(Component.of(kind, name.strip(), values))
        return cls(tuple(components), Path(folder))

    def all(self, kind: str) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.kind == kind)

    def indices(self, kind: str) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(self.components) if c.kind == kind)

    def one(self, kind: str) -> Component:
        """The only component of its kind."""
        return self.all(kind)[0]

    def with_components(self, components: Sequence[Component]) -> Deck:
        return Deck(tuple(components), self.folder)

    def check(self, dialect: Dialect) -> None:
        """Raises `InputError` where the program would refuse the deck, or do something else than it says."""
        for kind in KEYS:
            number = len(self.all(kind))
            if number > _AT_MOST.get(kind, 1):
                raise InputError(f"Expected at most {_AT_MOST.get(kind, 1)} {kind} in a deck, got {number}.")
            if kind in _NEEDED and not number:
                raise InputError(f"Expected the component {kind!r} in the deck, got none. Micrographs need it.")
        named = [c.heading for c in self.components if c.name]
        if twice := sorted({h for h in named if named.count(h) > 1}):
            raise InputError(f"Expected components with distinct names, got {twice} more than once. Rename them.")
        for component in self.components:
            component.check(dialect)
        beam = self.one("electronbeam")
        if beam.get("gen_dose") and beam.get("total_dose") is not None and beam.get("dose_per_im") is not None:
            raise InputError("Expected total_dose or dose_per_im in the deck, got both. Remove one.")
        particles = [c.name for c in self.all("particle")]
        for one in self.all("particleset"):
            if one.get("particle_type") not in particles:
                raise InputError(
                    f"Expected particle_type of a particleset to be one of the deck's particles {particles}, got "
                    f"{one.get('particle_type')!r}."
                )

    def text(self) -> str:
        """The deck as the program reads it.

        Raises:
            InputError: a line would be longer than the program reads.
        """
        lines = []
        for component in self.components:
            lines.append(f"=== {component.heading} ===")
            lines += [f"{key} = {_written(value)}" for key, value in component.values.items()]
        for line in lines:
            if len(line.encode()) > _LINE_LIMIT:
                raise InputError(
                    f"Expected lines of at most {_LINE_LIMIT} bytes, got {len(line.encode())}: {line[:60]}... "
                    "Use shorter names."
                )
        return "\n".join(lines) + "\n"


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return f'"{value}"' if any(c.isspace() for c in value) else value
    return repr(value)


def read_table(path: Path, columns: Sequence[int]) -> NDArray[np.float64]:
    """A table as the program reads it: comments, then "rows columns", then the rows.

    Raises:
        InputError: it cannot be read, or has another number of columns.
    """
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        words = [line for line in words if line]
        rows, width = int(words[0][0]), int(words[0][1])
        table = np.array([[float(word) for word in line[:width]] for line in words[1 : rows + 1]], dtype=np.float64)
        table = table.reshape(rows, width)
    except (OSError, ValueError, IndexError) as error:
        raise InputError(
            f"Expected a table ('rows columns', then the rows) in {str(path)!r}, got {type(error).__name__}: {error}."
        ) from error
    if width not in columns or not np.isfinite(table).all():
        expected = " or ".join(map(str, columns))
        raise InputError(f"Expected {expected} columns of finite numbers in {str(path)!r}, got {width}.")
    return table


def table_text(table: NDArray[np.float64]) -> str:
    """The inverse of `read_table`."""
    lines = [f"{len(table)} {table.shape[1]}", *(" ".join(repr(float(v)) for v in row) for row in table)]
    return "\n".join(lines) + "\n"
