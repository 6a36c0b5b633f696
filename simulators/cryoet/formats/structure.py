"""Structures as files have them: `read_structure_file`, the one reader behind `Specimen.from_file` and `TEMSim`.

What a file means where it is not plain:

* Models: all count where the occupancies of each atom add up to 1 over them (an ensemble of which each is a share);
  else they are alternatives of one whole (NMR), and the first one counts. This is decided residue by residue: a file
  may mix both.
* Alternative locations of one atom share a place: occupancies that add up to more than 1 are scaled to add up to 1.
* Occupancies of nothing but 0 are a column that nobody filled in, as some modelling programs leave it: each is 1.
* A negative B is what refinement against a sharpened map leaves; an atom is not sharper than a point, and B is 0.
* Residues DUM are planes of membranes (OPM, PPM), not atoms.
* Atoms at the very same place each count, unless they are alternative locations.
* Where an element is missing, it follows from the atom's name.

Each of these but planes of membranes and elements that follow is told by a warning.

Reference:
    Atomic Coordinate Entry Format Version 3.3, Worldwide Protein Data Bank (2012): columns of ATOM; occupancies of
    alternates add up to at most 1; of models in which each is a part, too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from bridge.errors import InputError
from simulators.cryoet.formats.assembly import assembled, assembly_names
from simulators.cryoet.formats.gemmi import import_gemmi
from simulators.cryoet.formats.packed import PACKED_ERRORS, opened

Key = tuple[str, str, int, str]
UNKNOWN_ATOMS = ("error", "skip")
# Of an occupancy, which files have with two digits.
_ROUNDING = 0.005
_DUMMIES = ("DUM",)
# What atoms of standard residues are made of; their names need no column to be read.
_OF_RESIDUES = "HDCNOSP"


@dataclass(frozen=True, eq=False)
class Group:
    """Atoms of one residue in one model.

    Args:
        chain: its name.
        residue: gemmi's.
        key: chain, number, how many were called so before, and name: the same for the residue in all models. The name
            is "" where one place has several residues, as alternatives.
        model: 0 for the first one.
    """

    chain: str
    residue: Any
    key: Key
    model: int


@dataclass(frozen=True, eq=False)
class Structure:
    """What of a file counts: `groups` in the order of the file. The models own the atoms and are kept with them."""

    groups: list[Group]
    models: list[Any]


def read_structure_file(
    path: str | Path,
    *,
    assembly: str | None = None,
    model: int | str | None = None,
    unknown_atoms: str = "error",
    water: bool = False,
) -> Structure:
    """Reads PDB or mmCIF, plain or compressed (gzip, bzip2), whatever its line ends and byte-order mark.

    Args:
        path: the file; what it is shows in its text.
        assembly: name of the biological assembly; None for the atoms of the file as they stand.
        model: the number of one model; "all" for all as they stand; None as the head of this module has it.
        unknown_atoms: "error", or "skip" for a structure without the atoms whose element is not known.
        water: whether water counts.

    Raises:
        InputError: no such file, not readable, no atoms, an unknown atom, model or assembly; the message names the line
            where there is one.
    """
    gemmi, path = import_gemmi(), Path(path)
    if unknown_atoms not in UNKNOWN_ATOMS:
        raise InputError(f"Unknown unknown_atoms={unknown_atoms!r}. Known: {', '.join(UNKNOWN_ATOMS)}.")
    if model is not None and model != "all" and not _is_number(model):
        raise InputError(f"Expected model as a number, 'all' or None, got {model!r}.")
    if not path.is_file():
        raise InputError(f"Expected a PDB or mmCIF file, found none at {str(path)!r}. Check the path.")
    skip = unknown_atoms == "skip"
    try:
        with opened(path) as stream:
            text = _decoded(stream.read())
        block = None
        if _is_cif(text):
            structure, block = _from_cif(gemmi, text)
            present = {residue.subchain for m in structure for chain in m for residue in chain}
        else:
            structure = gemmi.read_pdb_string(_tidied(gemmi, text, path, skip, water).encode())
            present = {
                line[20:22].strip() for line in text.split("\n") if line[:6].upper().startswith(("ATOM", "HETATM"))
            }
        structure.merge_chain_parts()
    except InputError:
        raise
    # What gemmi and decompression raise for bytes that are not what they should be.
    except (RuntimeError, ValueError, IndexError, *PACKED_ERRORS) as error:
        raise InputError(
            f"Expected a PDB or mmCIF file (also .gz), got {str(path)!r}, which gemmi cannot read: {error}. Check the "
            "file."
        ) from error
    models = [m for m in structure if m.count_atom_sites()]
    if not models:
        raise InputError(f"Expected atoms in {str(path)!r}, found none. Is it a coordinate file, and whole?")
    for one in models:
        _clear(gemmi, one, path, text, skip, water)
    if not any(m.count_atom_sites() for m in models):
        raise InputError(
            f"Expected atoms other than {'' if water else 'water and '}dummies in {str(path)!r}, found none. Choose "
            "another structure."
        )
    _complete(models, path)
    models = _chosen(models, model, path)
    if assembly is not None and assembly_names(structure, block):
        models = assembled(
            gemmi, structure, models, str(assembly), text, block, present, path, lambda said: _warn(path, said, 6)
        )
    elif assembly not in (None, "1"):
        raise InputError(f"Unknown assembly {assembly!r}: {str(path)!r} names no assemblies. Use assembly=None.")
    elif (
        assembly is not None and block is None and re.search(r"^REMARK 350\s+BIOMT", text, re.MULTILINE | re.IGNORECASE)
    ):
        _warn(path, "REMARK 350 has matrices, but names no assembly (BIOMOLECULE: 1): its atoms count as they stand.")
    return Structure([group for i, m in enumerate(models) for group in _groups(m, i)], models)


def _is_number(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and value.isdecimal())


def _decoded(raw: bytes) -> str:
    """ASCII, lines that end with a line feed alone. Comments may be in any encoding; what is used is ASCII."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if raw.startswith(mark):
            text = raw.decode(encoding, errors="replace").lstrip("\ufeff")
            break
    else:
        text = raw.decode("latin-1")
    # Another character counts as one: columns stay where they are.
    return text.encode("ascii", "replace").decode("ascii").replace("\r\n", "\n").replace("\r", "\n")


def _is_cif(text: str) -> bool:
    """Whether the first line that is not a comment begins a block."""
    for line in text.split("\n"):
        if line.strip() and not line.startswith("#"):
            return line.strip().lower().startswith("data_")
    return False


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _warn(path: Path, said: str, level: int = 5) -> None:
    warnings.warn(f"{path.name}: {said}", UserWarning, stacklevel=level)


# --- elements -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _known(gemmi: Any, symbol: str) -> bool:
    """Whether it is an element whose electron scattering is tabulated."""
    element = gemmi.Element(symbol)
    return element.atomic_number > 0 and element.c4322 is not None


def _refuse_atom(symbol: str, atom: str, residue: str, place: str, path: Path) -> NoReturn:
    raise InputError(
        f"Expected elements with electron scattering factors, got {symbol!r} for atom {atom or '?'} of residue "
        f"{residue}{place} of {str(path)!r}. Correct its element, or leave such atoms out: unknown_atoms='skip'."
    )


def _stated(gemmi: Any, line: str) -> str:
    """The element in columns 77 and 78 of a PDB line, or one column beside; "" where they hold none."""
    field = line[76:78].strip()
    beside = line[75:78].strip()
    # A segment's name begins in column 73: one letter in column 76 belongs to what follows.
    if not line[72:75].strip() and len(beside) == 2 and beside.isalpha() and line[75] != " " and _known(gemmi, beside):
        return beside
    beside = line[76:79].strip()
    if len(beside) == 2 and beside.isalpha() and line[78:79].isalpha() and _known(gemmi, beside):
        return beside
    # Numbers are those of lines, in the oldest files.
    return field if field.isalpha() else ""


def guessed_element(name: str, residue: str, columns: str = "") -> str:
    """An element from the atom's name, where the file has none; "" where that tells nothing.

    Args:
        name: the atom's.
        residue: its residue's.
        columns: columns 13 to 16 of a PDB file, in which the element ends in the second one.
    """
    gemmi = import_gemmi()
    letters = re.sub(r"[^A-Za-z]", "", name).upper()
    if not letters:
        return ""
    own = re.sub(r"[^A-Za-z]", "", residue).upper()
    if letters == own and len(letters) <= 2 and _known(gemmi, letters):
        return letters  # an ion, wherever its name stands
    if residue in ("MSE", "SEC") and letters.startswith("SE"):
        return "SE"
    if gemmi.find_tabulated_residue(residue).is_standard():
        return letters[0] if letters[0] in _OF_RESIDUES else ""
    if columns:
        if len(columns.strip()) == 4 and letters[0] in "HD":
            return letters[0]
        pair = columns[:2].strip()
        if pair.isalpha() and _known(gemmi, pair):
            return pair
        return letters[0] if _known(gemmi, letters[0]) else ""
    pair = letters[:2]
    common = pair in ("CL", "BR", "FE", "ZN", "MG", "MN", "CU", "NI", "SE", "SI") or not _known(gemmi, letters[0])
    return pair if common and _known(gemmi, pair) else letters[0] if _known(gemmi, letters[0]) else ""


# --- PDB ----------------------------------------------------------------------------------------------------------


def _tidied(gemmi: Any, text: str, path: Path, skip: bool, water: bool) -> str:
    """The file's text with all that a line needs, frames as models, without dummies and what may be skipped."""
    header: list[str] = []
    frames: list[tuple[str, list[str]]] = [("", [])]
    for number, line in enumerate(text.split("\n"), 1):
        record = line[:6].strip().upper()
        if record in ("ATOM", "HETATM"):
            atom = _atom(gemmi, record, line.rstrip(), number, path, skip, water)
            if atom:
                frames[-1][1].append(atom)
        elif record == "MODEL":
            frames.append((line[6:].strip(), []))
        elif record in ("ENDMDL", "END"):
            # Trajectories have frames with no more than END between them.
            frames.append(("", []))
        elif record == "TER":
            frames[-1][1].append(line.rstrip())
        elif record not in ("ANISOU", "SIGATM", "SIGUIJ"):
            header.append(line.rstrip())
    frames = [frame for frame in frames if any(not line.startswith("TER") for line in frame[1])]
    if len(frames) < 2:
        return "\n".join([*header, *(line for _, lines in frames for line in lines), "END", ""])
    numbers = [int(name) for name, _ in frames if name.isdecimal()]
    if len(set(numbers)) < len(frames):
        numbers = list(range(1, len(frames) + 1))
    body = [
        line for n, (_, lines) in zip(numbers, frames, strict=True) for line in (f"MODEL     {n:4d}", *lines, "ENDMDL")
    ]
    return "\n".join([*header, *body, "END", ""])


def _atom(gemmi: Any, record: str, line: str, number: int, path: Path, skip: bool, water: bool) -> str:
    """A line that gemmi cannot misread: it reads as far as it understands, and would say nothing. "" to leave out."""
    residue, name = line[17:20].strip(), line[12:16].strip()
    if _is_plain(gemmi, record, residue, name, line):
        return line
    if residue in _DUMMIES or name in _DUMMIES:
        return ""
    for start in (30, 38, 46):
        _field(line, start, start + 8, "a coordinate", number, path)
    blank = "  1.00" if not line[54:60].strip() else line[54:60].rjust(6)
    if _field(line, 54, 60, "an occupancy", number, path, 1.0) < 0:
        raise InputError(
            f"Expected occupancies >= 0, got {line[54:60].strip()} in line {number} of {str(path)!r}. Correct the line."
        )
    _field(line, 60, 66, "a B factor", number, path, 0.0)
    width = "  0.00" if not line[60:66].strip() else line[60:66].rjust(6)
    symbol = _stated(gemmi, line) or guessed_element(name, residue, line[12:16])
    if not _known(gemmi, symbol) and (water or not gemmi.find_tabulated_residue(residue).is_water()):
        if skip:
            return ""
        where = f"{residue} {line[21:22].strip()} {line[22:27].strip()}".replace("  ", " ")
        _refuse_atom(symbol or line[76:78].strip(), name, where, f" in line {number}", path)
    return f"{record:<6}{line[6:54]}{blank}{width}{line[66:76]:<10}{symbol:>2}"


def _is_plain(gemmi: Any, record: str, residue: str, name: str, line: str) -> bool:
    """Whether all columns are as they should be, as in nearly all lines."""
    try:
        total = sum(map(abs, map(float, (line[30:38], line[38:46], line[46:54], line[60:66])))) + float(line[54:60])
    except ValueError:
        return False
    return (
        float(line[54:60]) >= 0
        and total < math.inf
        and line.startswith(record)
        and residue not in _DUMMIES
        and name not in _DUMMIES
        and not line[78:79].isalpha()
        and (line[75:76] == " " or line[72:73] != " ")
        and _known(gemmi, line[76:78].strip())
    )


def _field(line: str, start: int, stop: int, what: str, number: int, path: Path, missing: float | None = None) -> float:
    text = line[start:stop]
    try:
        value = missing if missing is not None and not text.strip() else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(
            f"Expected {what} in columns {start + 1} to {stop} of line {number} of {str(path)!r}, got {text!r}. Is the "
            "file whole, and a PDB file?"
        )
    return value


# --- mmCIF --------------------------------------------------------------------------------------------------------


# Columns without which gemmi sees no atoms, though nothing depends on them or they follow from others.
_NEEDED = {"id": "?", "type_symbol": "?", "label_alt_id": ".", "label_asym_id": "A", "label_seq_id": "."}


def _from_cif(gemmi: Any, text: str) -> tuple[Any, Any]:
    """The structure and its block; None where no block has atoms."""
    for block in gemmi.cif.read_string(text):
        loop = block.find_loop("_atom_site.Cartn_x").get_loop()
        if loop is None:
            if block.find_value("_atom_site.Cartn_x"):
                return gemmi.make_structure_from_block(block), block  # a single atom
            continue
        tags = [tag.partition(".")[2] for tag in loop.tags]
        for tag, value in _NEEDED.items():
            if tag not in tags:
                loop.add_columns([f"_atom_site.{tag}"], value)
        if "id" not in tags:
            for i, row in enumerate(block.find("_atom_site.", ["id"]), 1):
                row[0] = str(i)
        # Some have charges, as in O1-; where there is none it follows from the name.
        stated = {symbol: _without_charge(gemmi, symbol) for symbol in set(block.find_values("_atom_site.type_symbol"))}
        if any(symbol != plain for symbol, plain in stated.items()):
            for kind in ("label", "auth"):
                for row in block.find("_atom_site.", ["type_symbol", f"{kind}_atom_id", f"{kind}_comp_id"]):
                    if row[0] in stated and row[0] != stated[row[0]]:
                        names = (gemmi.cif.as_string(row[i]) for i in (1, 2))
                        row[0] = stated[row[0]] or guessed_element(*names) or "X"
        return gemmi.make_structure_from_block(block), block
    return gemmi.Structure(), None


def _without_charge(gemmi: Any, symbol: str) -> str:
    """The element of a type symbol; "" where there is none; an unknown symbol as it stands."""
    if symbol in ("?", ".", "''", '""', ""):
        return ""
    letters = re.match(r"[A-Za-z]*", symbol.strip("'\"")) or [""]
    return letters[0] if _known(gemmi, letters[0]) else symbol


def _line_of(text: str, atom: Any) -> str:
    """Where an atom of an mmCIF file stands, if it begins its line as it does in those of the PDB."""
    found = re.search(rf"^(ATOM|HETATM)\s+{atom.serial}\s", text, re.MULTILINE)
    return f" in line {text.count(chr(10), 0, found.start()) + 1}" if found else f", number {atom.serial},"


# --- both ---------------------------------------------------------------------------------------------------------


def _clear(gemmi: Any, model: Any, path: Path, text: str, skip: bool, water: bool) -> None:
    """Takes out of a model what does not count; raises for what cannot."""
    for chain in model:
        for i in reversed(range(len(chain))):
            residue = chain[i]
            if residue.name in _DUMMIES or (residue.is_water() and not water):
                del chain[i]
                continue
            for j in reversed(range(len(residue))):
                atom = residue[j]
                if atom.name in _DUMMIES:
                    del residue[j]
                elif not _known(gemmi, atom.element.name):
                    if not skip:
                        where = f"{residue.name} {chain.name} {residue.seqid}"
                        _refuse_atom(atom.element.name, atom.name, where, _line_of(text, atom), path)
                    del residue[j]
                elif not (atom.occ >= 0 and math.isfinite(sum(atom.pos.tolist()) + atom.occ + atom.b_iso)):
                    raise InputError(
                        f"Expected numbers for each atom, and occupancies >= 0, got others for atom {atom.name} of "
                        f"residue {residue.name} {chain.name} {residue.seqid}{_line_of(text, atom)} of {str(path)!r}. "
                        "Correct it."
                    )
            if not len(residue):
                del chain[i]
    for i in reversed(range(len(model))):
        if not len(model[i]):
            del model[i]


def _groups(model: Any, index: int) -> Iterator[Group]:
    """Residues; where one place has several, all of whose atoms have alternative locations, they share their key."""
    seen: dict[tuple[str, str, str], int] = {}
    for chain in model:
        before = None
        for residue in chain:
            number = str(residue.seqid)
            name = "" if all(a.has_altloc() for a in residue) else residue.name
            place = (chain.name, number, name)
            if place != before or name:
                seen[place] = seen.get(place, 0) + 1
            before = place
            yield Group(chain.name, residue, (chain.name, number, seen[place], name), index)


def _sites(model: Any) -> dict[tuple[Key, str], list[Any]]:
    """The atoms of each site: alternatives of one, but not atoms of one name without alternatives."""
    found: dict[tuple[Key, str], list[Any]] = {}
    for group in _groups(model, 0):
        for i, atom in enumerate(group.residue):
            site = (group.key, atom.name)
            if site in found and not any(a.has_altloc() for a in (*found[site], atom)):
                site = (group.key, f"{atom.name} {i}")
            found.setdefault(site, []).append(atom)
    return found


def _complete(models: Sequence[Any], path: Path) -> None:
    """B factors and occupancies that an atom can have, in place."""
    atoms = [atom for m in models for chain in m for residue in chain for atom in residue]
    sharp = [atom for atom in atoms if atom.b_iso < 0]
    if sharp:
        _warn(
            path, f"B factors < 0 of {_count(len(sharp), 'atom')}, down to {min(a.b_iso for a in sharp):g}, count as 0."
        )
        for atom in sharp:
            atom.b_iso = 0.0
    if not any(atom.occ for atom in atoms):
        _warn(path, "all occupancies are 0, as in files whose column nobody filled in: each atom counts as 1.")
        for atom in atoms:
            atom.occ = 1.0
    _tell_doubles(models, path)
    crowded, most = 0, 1.0
    for m in models if any(atom.occ > 1 or atom.has_altloc() for atom in atoms) else ():
        for site in _sites(m).values():
            total = sum(atom.occ for atom in site)
            if total > 1 + _ROUNDING * (len(site) + 1):
                crowded, most = crowded + 1, max(most, total)
                for atom in site:
                    atom.occ /= total
    if crowded:
        _warn(
            path,
            f"occupancies (of all alternative locations) are more than 1 at {_count(crowded, 'place')}, up to "
            f"{most:.4g}: there they are scaled to add up to 1.",
        )


def _tell_doubles(models: Sequence[Any], path: Path) -> None:
    """Warns of atoms at the very same place that are no alternatives of each other."""
    doubled, example = 0, ""
    for m in models:
        places: dict[tuple[float, float, float], tuple[float, int]] = {}
        for chain in m:
            for residue in chain:
                for atom in residue:
                    if atom.has_altloc():
                        continue
                    place = tuple(atom.pos.tolist())
                    total, count = places.get(place, (0.0, 0))
                    places[place] = total + atom.occ, count + 1
                    if count and total + atom.occ > 1 + _ROUNDING * (count + 2):
                        doubled += 1
                        example = example or f"{atom.name} of {residue.name} {chain.name} {residue.seqid}"
    if doubled:
        _warn(
            path,
            f"{_count(doubled, 'atom')} (the first one: {example}) stand exactly where another atom does, and are no "
            "alternative locations: each counts. Does the file have its atoms twice?",
            6,
        )


def _chosen(models: list[Any], wanted: int | str | None, path: Path) -> list[Any]:
    """The models that count, less the residues that do not."""
    if wanted == "all":
        return models
    if wanted is not None:
        found = [m for m in models if m.num == int(wanted)]
        if not found:
            known = ", ".join(str(m.num) for m in models[:9]) + (", ..." if len(models) > 9 else "")
            raise InputError(f"Unknown model {wanted!r} of {str(path)!r}. Known: {known}.")
        return found[:1]
    if len(models) == 1:
        return models
    totals: dict[Key, dict[str, float]] = {}
    holders: dict[Key, list[int]] = {}
    for i, m in enumerate(models):
        for (place, name), atoms in _sites(m).items():
            sums = totals.setdefault(place, {})
            sums[name] = sums.get(name, 0.0) + sum(atom.occ for atom in atoms)
            if holders.setdefault(place, [i])[-1] != i:
                holders[place].append(i)
    kinds: dict[Key, str] = {}
    for place, sums in totals.items():
        away = max(sums.values()) - 1
        if len(holders[place]) == 1:
            kinds[place] = "single"
        elif abs(away) <= _ROUNDING * (len(holders[place]) + 1):
            kinds[place] = "shared"
        else:
            kinds[place] = "whole" if away > 0 else "part"
    advice = f"model=N takes another, model='all' all {len(models)} as they stand."
    if "shared" not in kinds.values() and set(kinds.values()) != {"single"}:
        _warn(path, f"the occupancies of its {len(models)} models do not add up to 1: the first one is read; {advice}")
        return models[:1]
    whole = {place for place, kind in kinds.items() if kind == "whole"}
    if whole:
        _warn(
            path,
            f"its {len(models)} models count together, but {_count(len(whole), 'residue')} of them are whole in "
            f"several: there the first one is read; {advice}",
        )
    for i, m in enumerate(models):
        keys = [group.key for group in _groups(m, i)]
        for k in reversed(range(len(m))):
            for j in reversed(range(len(m[k]))):
                place = keys.pop()
                if place in whole and holders[place][0] != i:
                    del m[k][j]
            if not len(m[k]):
                del m[k]
    return [m for m in models if len(m)]
