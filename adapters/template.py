"""What a program's files mean: `Template`, and `TextTemplate` for programs that read text and write an array."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.paths import with_files
from bridge.errors import InputError, OutputError
from bridge.simulator.space import ParameterSpace

STDOUT, STDERR = "stdout.txt", "stderr.txt"


@final
@dataclass(frozen=True)
class Row:
    """One evaluation, as a template sees it.

    Args:
        values: parameter name -> value; float, or int for parameters of kind "integer" (rounded to the nearest).
        vector: (d,) float64, unrounded, in the order of the parameter space.
        seed: the simulator's own seed, below 2^64. A program that takes less may use `row.seed % 2**31`.
    """

    values: Mapping[str, float | int]
    vector: NDArray[np.float64]
    seed: int


class Template(ABC):
    """What a program's files mean. Instances must be picklable; they must not change between runs."""

    @abstractmethod
    def write_input(self, directory: Path, row: Row) -> None:
        """Writes the program's input for one row into a fresh, empty directory, which is its working directory."""

    @abstractmethod
    def read_output(self, directory: Path) -> ArrayLike:
        """Reads what the program left in the directory; `stdout.txt` and `stderr.txt` are what it said."""

    def command_arguments(self, row: Row) -> tuple[str, ...]:
        """Arguments that depend on the row; they follow the profile's."""
        return ()

    def standard_input(self, row: Row) -> str | None:
        """Name of a file in the directory that the program reads as its standard input; None for none."""
        return None

    def log_files(self) -> tuple[str, ...]:
        """Names of files in the directory whose last lines belong into the message of a failure."""
        return ()

    def check(self, space: ParameterSpace) -> None:
        """Raises `InputError` where the template does not fit the parameters; called once, before any run."""
        return None


@final
@dataclass(frozen=True)
class TextTemplate(Template):
    """Input as text with `{parameter}` placeholders, output as a file with an array.

        template = TextTemplate(inputs={"in.txt": "mass = {mass_kg}\\nseed = {seed}\\n"}, output="out.npy")
        simulator = ExternalSimulator(template, Profile(("my-code", "in.txt"), timeout_s=60), space, (64, 64))

    Placeholders are Python's format fields: `{mass_kg}` is written so that it reads back as the same number,
    `{mass_kg:.3f}` as asked; `{seed}` is the seed; braces of the file itself are doubled, `{{` and `}}`.

    Args:
        output: file that the program writes, relative to its directory; "stdout.txt" for what it prints.
        inputs: file name -> text, each with placeholders.
        arguments: further command-line arguments, each with placeholders.
        stdin: which of `inputs` the program reads as its standard input.
        read: path -> array; by default by the extension: .npy, .mrc (needs mrcfile), .csv (commas), and .txt, .dat and
            all others as numbers separated by white space, with # comments.
    """

    output: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    stdin: str | None = None
    read: Callable[[Path], ArrayLike] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.arguments, list | tuple) or not all(isinstance(a, str) for a in self.arguments):
            raise InputError(f"Expected arguments as a list of strings, got {self.arguments!r}.")
        if not isinstance(self.output, str):
            raise InputError(f"Expected output as the name of a file, got {self.output!r}.")
        texts = self.inputs.items() if isinstance(self.inputs, Mapping) else [(None, None)]
        if not all(isinstance(name, str) and isinstance(text, str) for name, text in texts):
            raise InputError(f"Expected inputs as a mapping of file names to texts, got {self.inputs!r}.")
        object.__setattr__(self, "arguments", tuple(self.arguments))
        object.__setattr__(self, "inputs", dict(self.inputs))
        for name in (self.output, *self.inputs):
            if os.path.isabs(name) or ".." in Path(name).parts or not name:
                raise InputError(f"Expected file names inside the run's directory, got {name!r}. Make it relative.")
        if self.stdin is not None and self.stdin not in self.inputs:
            raise InputError(f"Expected stdin among the inputs {list(self.inputs)}, got {self.stdin!r}.")

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What is written and read; the order of the files makes no difference."""
        arguments = tuple(map(with_files, self.arguments))
        rest = {"output": self.output, "arguments": arguments, "stdin": self.stdin, "read": self.read}
        return {f"input {name}": with_files(text, folders=False) for name, text in self.inputs.items()} | rest

    def check(self, space: ParameterSpace) -> None:
        if "seed" in space.names:
            raise InputError("Expected no parameter called 'seed': {seed} stands for the simulator's seed. Rename it.")
        known = {*space.names, "seed"}
        for text in (*self.inputs.values(), *self.arguments):
            unknown = sorted(set(_fields(text)) - known)
            if unknown:
                raise InputError(
                    f"Unknown placeholders {unknown} in {text[:60]!r}. Known: {', '.join((*space.names, 'seed'))}. "
                    "Double the braces that belong to the file itself: {{ and }}."
                )

        used = {name for text in (*self.inputs.values(), *self.arguments) for name in _fields(text)}
        if unused := [name for name in space.names if name not in used]:
            warnings.warn(
                f"TextTemplate has no placeholder for {', '.join(unused)}: outputs cannot depend on "
                f"{'it' if len(unused) == 1 else 'them'}. Write {{{unused[0]}}} into inputs or arguments, or take the "
                "parameter out of the space.",
                UserWarning,
                stacklevel=4,
            )

    def write_input(self, directory: Path, row: Row) -> None:
        for name, text in self.inputs.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._fill(text, row), encoding="utf-8")

    def command_arguments(self, row: Row) -> tuple[str, ...]:
        return tuple(self._fill(text, row) for text in self.arguments)

    def standard_input(self, row: Row) -> str | None:
        return self.stdin

    def read_output(self, directory: Path) -> ArrayLike:
        path = directory / self.output
        if not path.exists():
            raise FileNotFoundError(2, "no such file", self.output)
        return (self.read or read_array)(path)

    @staticmethod
    def _fill(text: str, row: Row) -> str:
        return text.format(**row.values, seed=row.seed)


def _fields(text: str) -> Iterable[str]:
    try:
        return [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise InputError(
            f"Expected text with {{parameter}} placeholders, got {text[:60]!r}: {error}. Double the braces that "
            "belong to the file itself: {{ and }}."
        ) from error


def read_array(path: Path) -> NDArray[Any]:
    """An array from a .npy, .mrc, .csv or text file, by its extension."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix in (".mrc", ".mrcs", ".map", ".rec", ".st"):
        try:
            import mrcfile
        except ImportError as error:
            raise OutputError(
                'Expected mrcfile to read MRC files; install it: `pip install "simulation-bridge[cryoet]"`.'
            ) from error
        with mrcfile.open(path, mode="r") as file:
            return np.array(file.data)
    if path.stat().st_size == 0:
        raise OutputError(f"Expected numbers in {path.name}, got an empty file.")
    return np.loadtxt(path, delimiter="," if suffix == ".csv" else None)
