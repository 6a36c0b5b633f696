"""Biological assemblies of structure files: `assembled`. What gemmi would leave out or misread in silence is named.

* PDB: the matrices of REMARK 350 have all their rows, of numbers in their columns. mmCIF: each operator that is named
  has its twelve numbers.
* Each matrix is a rotation. A mirror image is told by a warning: it belongs to racemic crystals alone.
* Chains that the file has no longer, as after it was cut, are left out with a warning.

Reference:
    Atomic Coordinate Entry Format Version 3.3, Worldwide Protein Data Bank (2012): REMARK 350.
    PDBx/mmCIF dictionary, pdbx_struct_assembly_gen.oper_expression: 1,2 or (1-60) or (X0)(1-60).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge.arrays import Array
from bridge.errors import InputError

# Of the products of a matrix' columns: files have as few as three digits.
_ROTATION = 0.01
_ADVICE = "Correct the file, or take its atoms as they stand: assembly=None."
_GEN, _GEN_TAGS = "_pdbx_struct_assembly_gen.", ["assembly_id", "oper_expression", "asym_id_list"]
_OPERATOR = "_pdbx_struct_oper_list."
_NUMBERS = [
    *(f"matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)),
    *(f"vector[{i}]" for i in (1, 2, 3)),
]


def assembly_names(structure: Any, block: Any) -> list[str]:
    """Of a file's assemblies; gemmi knows those of PDB alone, and skips some of mmCIF."""
    if block is None:
        return list(dict.fromkeys(a.name for a in structure.assemblies))
    return list(dict.fromkeys(row[0] for row in _rows(block, _GEN, _GEN_TAGS)))


def assembled(
    gemmi: Any,
    structure: Any,
    models: Sequence[Any],
    name: str,
    text: str,
    block: Any,
    present: Collection[str],
    path: Path,
    warn: Callable[[str], None],
) -> list[Any]:
    """The models as the assembly has them.

    Args:
        gemmi, structure: the package, and what it has read.
        models: of the structure, those that count.
        name: of the assembly.
        text: of the file.
        block: of an mmCIF file; None for PDB.
        present: chains of the file, whether or not their atoms count; those of mmCIF by label_asym_id.
        path, warn: the file, and what says something of it.

    Raises:
        InputError: no such assembly, damage, or none of its chains in the file.
    """
    if name not in (known := assembly_names(structure, block)):
        raise InputError(
            f"Unknown assembly {name!r} of {str(path)!r}. Known: {', '.join(known)}; None takes the atoms of the file "
            "as they stand."
        )

    def check(place: str, matrix: Array) -> None:
        if not np.abs(matrix @ matrix.T - np.eye(3)).max() < _ROTATION:
            raise InputError(
                f"Expected a rotation in the matrix of assembly {name!r} {place} of {str(path)!r}, got "
                f"{matrix.round(4).tolist()}. {_ADVICE}"
            )
        if np.linalg.det(matrix) < 0:
            warn(f"the matrix of assembly {name!r} {place} makes a mirror image.")

    chosen = _of_pdb(structure, text, name, path, check) if block is None else _of_cif(gemmi, block, name, path, check)
    generators = list(chosen.generators)
    chains = [list(g.chains) for g in generators]
    subchains = [list(g.subchains) for g in generators]
    wanted = list(dict.fromkeys(c for group in (*chains, *subchains) for c in group))
    missing = [c for c in wanted if c not in present]
    if len(missing) == len(wanted):
        raise InputError(
            f"Expected chains of assembly {name!r} in {str(path)!r}, got none of {', '.join(wanted) or 'any'}. Was the "
            "file cut? Take its atoms as they stand: assembly=None."
        )
    if missing:
        warn(f"assembly {name!r} is built without chains that the file does not have: {', '.join(missing)}.")
    made = []
    for model in models:
        own = {chain.name for chain in model}
        parts = {residue.subchain for chain in model for residue in chain}
        for i, generator in enumerate(generators):
            generator.chains = [c for c in chains[i] if c in own]
            generator.subchains = [c for c in subchains[i] if c in parts]
        made.append(gemmi.make_assembly(chosen, model, gemmi.HowToNameCopiedChain.Short))
    if not any(model.count_atom_sites() for model in made):
        raise InputError(
            f"Expected atoms in assembly {name!r} of {str(path)!r}, found none that count. Choose another."
        )
    return made


Check = Callable[[str, Array], None]


# --- PDB ----------------------------------------------------------------------------------------------------------


def _of_pdb(structure: Any, text: str, name: str, path: Path, check: Check) -> Any:
    """gemmi's assembly; raises where it has read other numbers than stand there, since it goes by columns."""
    found = [a for a in structure.assemblies if a.name == name]
    if len(found) > 1:
        raise InputError(f"Expected assembly {name!r} of {str(path)!r} once, got it {len(found)} times. {_ADVICE}")
    read = [operator.transform for generator in found[0].generators for operator in generator.operators]
    stated = _matrices(text, name, path)
    for i, (place, rows) in enumerate(stated):
        there = (
            np.column_stack((read[i].mat.tolist(), read[i].vec.tolist())) if i < len(read) else np.full((3, 4), np.nan)
        )
        if not (np.abs(there - rows) < 1e-5 * (1 + np.abs(rows))).all():
            raise InputError(
                f"Expected a matrix of assembly {name!r} after a list of chains, its numbers in columns 24 to 68, "
                f"{place} of {str(path)!r}. {_ADVICE}"
            )
        check(place, rows[:, :3])
    if len(stated) != len(read) or not stated:
        raise InputError(f"Expected matrices of assembly {name!r} in REMARK 350 of {str(path)!r}, got none. {_ADVICE}")
    return found[0]


def _matrices(text: str, name: str, path: Path) -> list[tuple[str, Array]]:
    """The matrices and vectors (3, 4) of one assembly in REMARK 350, and the lines in which they stand."""

    def refuse(number: int, line: str, expected: str) -> InputError:
        return InputError(
            f"Expected {expected} in line {number} of {str(path)!r}, for assembly {name!r}, got {line.strip()!r}. "
            f"{_ADVICE}"
        )

    found: list[tuple[str, Array]] = []
    rows: list[list[float]] = []
    serial, begin, listing = "", 0, False
    for number, line in _remarks(text, name):
        body = line[10:].strip()
        parts = body.split()
        if not body.startswith("BIOM") or body.startswith("BIOMOL"):
            if rows:
                raise refuse(number, line, f"BIOMT{len(rows) + 1} of matrix {serial}")
            if listing and body and not body.startswith("AND CHAINS"):
                raise refuse(number, line, "AND CHAINS: and the rest of a list that ends with a comma")
            listing = "CHAINS:" in body and body.endswith(",")
            continue
        listing = False
        wanted = f"BIOMT{len(rows) + 1}" + (f" of matrix {serial}" if rows else "")
        if len(parts) < 2 or parts[0] != f"BIOMT{len(rows) + 1}" or (rows and parts[1] != serial):
            raise refuse(number, line, wanted)
        if not rows:
            begin, serial = number, parts[1]
        values = [_number(part) for part in parts[2:6]]
        if len(values) < 4 or not all(map(math.isfinite, values)):
            raise refuse(number, line, f"four numbers of {wanted}")
        rows.append(values)
        if len(rows) == 3:
            found.append((f"in lines {begin} to {number}", np.array(rows)))
            rows = []
    if rows:
        raise InputError(
            f"Expected BIOMT1, BIOMT2 and BIOMT3 of matrix {serial} of assembly {name!r} from line {begin} of "
            f"{str(path)!r} on, got {len(rows)} of them. {_ADVICE}"
        )
    return found


def _remarks(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Lines of REMARK 350 of one assembly, and their numbers."""
    current = None
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("REMARK 350"):
            if line[10:].strip().startswith("BIOMOLECULE:"):
                current = line.partition(":")[2].strip()
            if current == name:
                yield number, line


# --- mmCIF --------------------------------------------------------------------------------------------------------


def _of_cif(gemmi: Any, block: Any, name: str, path: Path, check: Check) -> Any:
    """An assembly of its tables, whatever gemmi sees of them."""
    keys = _rows(block, _OPERATOR, ["id"])
    known = {key[0]: row for key, row in zip(keys, _rows(block, _OPERATOR, _NUMBERS), strict=False)}
    read: dict[str, Any] = {}
    made = gemmi.Assembly(name)
    for assembly, expression, chains in _rows(block, _GEN, _GEN_TAGS):
        if assembly != name:
            continue
        generator = gemmi.Assembly.Gen()
        generator.subchains = [chain.strip() for chain in chains.split(",") if chain.strip()]
        steps = _steps(expression, name, path)
        for key in dict.fromkeys(key for step in steps for key in step if key not in read):
            if key not in known:
                raise InputError(
                    f"Expected operator {key!r} of assembly {name!r} in {_OPERATOR[:-1]} of {str(path)!r}, with its "
                    f"matrix and vector; got those of {', '.join(known) or 'none'}. {_ADVICE}"
                )
            read[key] = _transform(gemmi, key, known[key], name, path)
            check(f"(operator {key!r})", np.array(read[key].mat.tolist()))
        for one in itertools.product(*steps):
            operator = gemmi.Assembly.Operator()
            # The last one comes first, as in a product of matrices.
            operator.transform = functools.reduce(lambda a, b: a.combine(b), (read[key] for key in one))
            generator.operators.append(operator)
        made.generators.append(generator)
    return made


def _transform(gemmi: Any, key: str, texts: list[str], name: str, path: Path) -> Any:
    values = [gemmi.cif.as_number(text) for text in texts]
    for tag, value, text in zip(_NUMBERS, values, texts, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"Expected a number as {_OPERATOR}{tag} of operator {key!r} of {str(path)!r}, for assembly {name!r}, "
                f"got {text!r}. {_ADVICE}"
            )
    found = gemmi.Transform()
    found.mat.fromlist([values[:3], values[3:6], values[6:9]])
    found.vec.fromlist(values[9:])
    return found


def _steps(expression: str, name: str, path: Path) -> list[list[str]]:
    """The operators of each step of 1,2 or (1-60) or (X0)(1-60)."""
    plain = re.sub(r"\s", "", expression)
    groups = [""] if not re.fullmatch(r"[^()]+|(\([^()]+\))+", plain) else re.findall(r"[^()]+", plain)
    steps = [[key for item in group.split(",") for key in _range(item)] for group in groups]
    if not all(key for step in steps for key in step):
        raise InputError(
            f"Expected an expression of operators such as 1,2 or (1-60) for assembly {name!r} of {str(path)!r}, got "
            f"{expression!r}. {_ADVICE}"
        )
    return steps


def _range(item: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)-(\d+)", item)
    return [str(k) for k in range(int(bounds[1]), int(bounds[2]) + 1)] or [""] if bounds else [item]


def _rows(block: Any, prefix: str, tags: list[str]) -> list[list[str]]:
    """Of a table, without quotes; none where a column is missing."""
    from gemmi import cif

    return [[v if cif.is_null(v) else cif.as_string(v) for v in row] for row in block.find(prefix, tags)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
