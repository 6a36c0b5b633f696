"""SerialEM's `.mdoc`, also as other programs write it: `read_mdoc`, and what its keys mean.

* Order: that of PriorRecordDose, else of DateTime; where neither tells it, it is asked for.
* Defocus: TargetDefocus, negative for underfocus. "Defocus" is the objective lens', whose zero is anywhere: it is taken
  only where there is no target and all images have it negative.
* Axis: the title "Tilt axis angle = ..." which IMOD reads, else RotationAngle less 90 degrees, as SerialEM has it.
  Thermo Fisher's Tomography 5 and others may count RotationAngle otherwise, so that files which are not SerialEM's and
  have no title are told about.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bridge.arrays import Array
from bridge.errors import InputError

_NUMBERS = (
    "PixelSpacing",
    "TiltAngle",
    "RotationAngle",
    "ExposureDose",
    "PriorRecordDose",
    "Defocus",
    "TargetDefocus",
)
_DOSES = ("ExposureDose", "PriorRecordDose")
_TITLE = "Tilt axis angle"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# Differences of doses that are the same but for their rounding.
_SAME = 0.01


def text_lines(path: Path) -> list[str]:
    """The lines of a text file. Comments and paths may be in any encoding; what is used is ASCII."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"Expected a text file at {str(path)!r}, got: {error}. Check the path.") from error


def number(text: str, path: Path, line: int) -> float:
    """A finite number, or the error that names the line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"Expected a number in line {line} of {str(path)!r}, got {text!r}.")
    return value


def within_half_a_turn(degrees: float) -> float:
    """The same angle from -180 to 180 degrees."""
    return (degrees + 180.0) % 360.0 - 180.0


@dataclass(frozen=True, eq=False)
class Mdoc:
    """The sections of an mdoc, by ZValue.

    Args:
        path: the file.
        z: (sections,) ZValues, ascending.
        sections: of each, the numbers that are used, those of the head of the file included.
        times: of each, DateTime as text; "" where there is none.
        titled_deg: the axis by the title [degree].
        serial_em: whether a title says that SerialEM wrote it.
    """

    path: Path
    z: tuple[int, ...]
    sections: tuple[Mapping[str, float], ...]
    times: tuple[str, ...]
    titled_deg: float | None
    serial_em: bool

    def chosen(self, places: Sequence[int]) -> Mdoc:
        """Some of the sections."""
        z, sections, times = (tuple(part[i] for i in places) for part in (self.z, self.sections, self.times))
        return Mdoc(self.path, z, sections, times, self.titled_deg, self.serial_em)  # type: ignore[arg-type]

    def optional(self, key: str) -> Array | None:
        """A number of each section; None where none has it."""
        found = [section[key] for section in self.sections if key in section]
        if found and len(found) != len(self.sections):
            raise InputError(
                f"Expected {key} in all {len(self.sections)} sections of {str(self.path)!r}, or none, got {len(found)}."
            )
        return np.array(found) if found else None

    def column(self, key: str) -> Array:
        """A number of each section."""
        values = self.optional(key)
        if values is None:
            raise InputError(f"Expected {key} in the sections of {str(self.path)!r}, found none.")
        return values

    def order(self, tell: Callable[[str], None]) -> list[int] | None:
        """When each image was taken, 0 for the first; None where the file does not tell."""
        n = len(self.sections)
        prior, times = self.optional("PriorRecordDose"), self._seconds()
        by_dose = prior is not None and len(np.unique(prior)) == n
        by_time = times is not None and len(np.unique(times)) == n
        if by_dose and by_time and (np.argsort(prior) != np.argsort(times)).any():  # type: ignore[arg-type]
            tell("PriorRecordDose and DateTime tell different orders; that of the doses is taken. Else give order=.")
        if not (by_dose or by_time):
            return None
        return np.argsort(np.argsort(prior if by_dose else times)).tolist()  # type: ignore[arg-type]

    def _seconds(self) -> Array | None:
        if not all(self.times):
            return None
        parsed = [_seconds(text) for text in self.times]
        return None if any(t is None for t in parsed) else np.array(parsed, dtype=np.float64)

    def doses(self, order: Sequence[int], tell: Callable[[str], None]) -> Array | None:
        """Of each image [e/angstrom^2]; those of nothing but 0 are not known."""
        doses, prior = self.optional("ExposureDose"), self.optional("PriorRecordDose")
        if doses is not None and doses.any():
            return doses
        if prior is None or len(prior) < 2:
            return None
        steps = np.diff(prior[np.argsort(np.asarray(order))])
        if not steps.min() > 0 or np.ptp(steps) > _SAME * steps.max():
            return None
        tell(f"there is no ExposureDose: that of each image is {steps.mean():.4g}, the step of PriorRecordDose.")
        return np.full(len(prior), float(steps.mean()))

    def defocus_um(self, tell: Callable[[str], None]) -> Array | None:
        """Underfocus of each image [um]; None where it is not known."""
        target, lens = self.optional("TargetDefocus"), self.optional("Defocus")
        if target is not None and target.any():
            if (target < 0).all():
                return -target
            tell(
                f"TargetDefocus goes up to {target.max():g} um, and is negative for underfocus in SerialEM's files: "
                "defocus is left unknown."
            )
            return None
        if lens is None or not lens.any():
            return None
        if (lens < 0).all():
            return -lens
        tell(
            f"Defocus goes up to {lens.max():g} um: it is the lens' reading, whose zero is not the specimen, and there "
            "is no TargetDefocus. Defocus is left unknown."
        )
        return None

    def axis_deg(self, tell: Callable[[str], None]) -> float | None:
        """The tilt axis from +y through -x [degree]; None where the file does not say."""
        rotations = self.optional("RotationAngle")
        if rotations is not None:
            around = rotations[0] + np.array([within_half_a_turn(angle - rotations[0]) for angle in rotations])
            if np.ptp(around) > 0.5:
                raise InputError(
                    f"Expected one RotationAngle in {str(self.path)!r}, got {around.min():g} to {around.max():g}."
                )
        if self.titled_deg is not None:
            return self.titled_deg
        if rotations is None:
            return None
        angle = within_half_a_turn(float(around.mean()) - 90.0)
        if not self.serial_em:
            tell(
                f"its axis is known by RotationAngle = {around.mean():g} alone, and is taken as SerialEM counts it, "
                f"less 90 degrees: {angle:g}. Tomography 5 and others may count otherwise: give tilt_axis_deg= or "
                "transforms=."
            )
        return angle


@dataclass
class _Section:
    numbers: dict[str, float] = field(default_factory=dict)
    time: str = ""
    lines: dict[str, int] = field(default_factory=dict)

    def put(self, key: str, value: float | str, line: int, path: Path) -> None:
        """Takes a value; raises where the section has another one already, since which is meant is not known."""
        known = self.time if key == "DateTime" else self.numbers.get(key)
        if key in self.lines and known != value:
            raise InputError(
                f"Expected one {key} in a section of {str(path)!r}, got {known} in line {self.lines[key]} and {value} "
                f"in line {line}. Take one out."
            )
        self.lines[key] = line
        if isinstance(value, str):
            self.time = value
        else:
            self.numbers[key] = value


def read_mdoc(path: Path) -> Mdoc:
    """Reads what is used of an mdoc; ZValues may have gaps."""
    head, sections = _Section(), dict[int, _Section]()
    current, titled, serial_em = head, None, False
    for i, line in enumerate(text_lines(path), start=1):
        opens = line.lstrip().startswith("[")
        key, equals, value = (part.strip() for part in line.strip().strip("[] ").partition("="))
        if key == "T":
            serial_em |= value.startswith("SerialEM")
            if value.startswith(_TITLE):
                titled = number((value.partition("=")[2].replace(",", " ").split() or [""])[0], path, i)
        elif key == "ZValue" and opens:
            z = number(value, path, i)
            if z != int(z) or z < 0:
                raise InputError(f"Expected ZValues 0, 1, ... in {str(path)!r}, got {value} in line {i}.")
            if int(z) in sections:
                raise InputError(f"Expected each ZValue once in {str(path)!r}, got {int(z)} again in line {i}.")
            current = sections[int(z)] = _Section(dict(head.numbers), head.time)
        elif opens:
            current = _Section()  # of something else
        elif equals and key in _NUMBERS:
            current.put(key, number(value, path, i), i, path)
            if key in _DOSES and current.numbers[key] < 0:
                raise InputError(f"Expected {key} >= 0 in line {i} of {str(path)!r}, got {value}. Correct the line.")
        elif equals and key == "DateTime":
            current.put(key, value, i, path)
    if not sections:
        raise InputError(f"Expected sections [ZValue = 0], [ZValue = 1], ... in {str(path)!r}, got none.")
    z = sorted(sections)
    return Mdoc(
        path, tuple(z), tuple(sections[k].numbers for k in z), tuple(sections[k].time for k in z), titled, serial_em
    )


def _seconds(text: str) -> float | None:
    """A time from SerialEM's 25-Mar-21 17:00:46 and 2021-Mar-25 17:00:46, or in ISO's 2021-03-25T17:00:46.5."""
    match = re.fullmatch(
        r"(\d{1,4})[-/. ](\w{1,9})[-/. ](\d{1,4})[\sT]+(\d{1,2}):(\d{2}):(\d{2}(?:[.,]\d+)?)\s*(AM|PM)?\D*",
        text.strip(),
        re.IGNORECASE | re.ASCII,
    )
    if match is None:
        return None
    first, middle, last, hour, minute, second, half = match.groups()
    name = middle[:3].lower()
    if name in _MONTHS:
        month = _MONTHS.index(name) + 1
    elif middle.isdecimal() and len(first) == 4:
        month = int(middle)
    else:
        return None  # which number is the month is not known
    day, year = (int(last), int(first)) if len(first) == 4 else (int(first), int(last))
    hours = int(hour) % 12 + 12 * (half.upper() == "PM") if half else int(hour)
    try:
        date = datetime.date(year + 2000 * (year < 100), month, day)
    except ValueError:
        return None
    return date.toordinal() * 86400.0 + hours * 3600 + int(minute) * 60 + float(second.replace(",", "."))
