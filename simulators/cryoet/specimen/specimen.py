"""Specimens: rigid sets of atoms, from a file, built in, or as a field of copies.

Axes: +x is the direction of columns, +y of rows, the beam runs along +z. Lengths are in angstrom.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from simulators.cryoet.formats.gemmi import import_gemmi
from simulators.cryoet.formats.structure import Group, read_structure_file

if TYPE_CHECKING:
    from simulators.cryoet.specimen.maps import DensityMap

_HYDROGENS = ("riding", "file", "none")
_FILE_KEYS = ("file", "assembly", "hydrogens", "model", "unknown_atoms")
_HELIX_KEYS = ("helix", "num_subunits")
_FIELD_KEYS = ("copies", "field_angstrom", "seed", "spacing_angstrom")

# Mean composition of one residue of a protein (from the frequencies of amino acids in UniProt), by atomic number.
_RESIDUE = {6: 4.94, 7: 1.36, 8: 1.48, 16: 0.04}
_RESIDUE_HYDROGENS = 7.76


@dataclass(frozen=True, eq=False)
class Residues:
    """Which residue each of n atoms belongs to: what deformations are defined by.

    Args:
        index: (n,) the residue's number, counted from 0 through all chains.
        chains: (n,) the name of its chain.
        numbers: (n,) its number in the file.
        nodes: (n,) bool, True for one atom of each residue, where an elastic network has its node: the C-alpha atom,
            the phosphorus of a nucleotide, else the residue's first.
    """

    index: NDArray[np.int64]
    chains: NDArray[np.str_]
    numbers: NDArray[np.int64]
    nodes: NDArray[np.bool_]

    def __post_init__(self) -> None:
        kinds = {"index": np.int64, "chains": np.str_, "numbers": np.int64, "nodes": np.bool_}
        n = len(self.index)
        for key, kind in kinds.items():
            array: NDArray[Any] = np.array(getattr(self, key), dtype=kind)
            if array.shape != (n,):
                raise InputError(f"Expected {n} entries of Residues.{key}, one an atom, got shape {array.shape}.")
            array.flags.writeable = False
            object.__setattr__(self, key, array)
        found = np.bincount(self.index[self.nodes], minlength=int(self.index.max(initial=-1)) + 1)
        if (self.index < 0).any() or not (found == 1).all():
            raise InputError("Expected residues counted from 0, each with one node, got others. Correct the arrays.")

    @classmethod
    def single(cls, n: int) -> Residues:
        """Each of n atoms is a residue by itself, and a node."""
        index = np.arange(n)
        return cls(index, np.full(n, "A"), index + 1, np.ones(n, dtype=np.bool_))

    def tiled(self, copies: int) -> Residues:
        """Those of several copies, one after another."""
        step = int(self.index.max()) + 1
        index = np.concatenate([self.index + i * step for i in range(copies)])
        return Residues(index, np.tile(self.chains, copies), np.tile(self.numbers, copies), np.tile(self.nodes, copies))


@dataclass(frozen=True, eq=False)
class Specimen:
    """A rigid set of n atoms (or beads) around the origin.

    Args:
        positions: (n, 3) x, y, z [angstrom].
        atomic_numbers: (n,) integers.
        weights: (n,) occupancy; for beads the number of atoms that a bead stands for.
        b_factors: (n,) isotropic B [angstrom^2].
        hydrogens: (n,) mean number of hydrogens that ride on each atom, besides those that are atoms themselves.
        labels: (n,) integer label of the copy an atom belongs to.
        name: for messages and file labels.
        residues: what atoms belong together; None where each is by itself.
    """

    positions: NDArray[np.float64]
    atomic_numbers: NDArray[np.int64]
    weights: NDArray[np.float64]
    b_factors: NDArray[np.float64]
    hydrogens: NDArray[np.float64]
    labels: NDArray[np.int64]
    name: str = "specimen"
    residues: Residues | None = None
    _digest: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        kinds = {"atomic_numbers": np.int64, "labels": np.int64}
        for key in ("positions", "atomic_numbers", "weights", "b_factors", "hydrogens", "labels"):
            array = np.ascontiguousarray(getattr(self, key), dtype=kinds.get(key, np.float64))
            array = array.copy() if array is getattr(self, key) and array.flags.writeable else array
            array.flags.writeable = False
            object.__setattr__(self, key, array)
        n = len(self.positions)
        if n == 0 or self.positions.shape != (n, 3):
            raise InputError(
                f"Expected positions of shape (n, 3) with n >= 1, got {self.positions.shape}. Give x, y, z an atom."
            )
        for key in ("atomic_numbers", "weights", "b_factors", "hydrogens", "labels"):
            array = getattr(self, key)
            if array.shape != (n,) or not np.isfinite(array).all():
                raise InputError(
                    f"Expected {n} finite {key}, one an atom, got an array of shape {array.shape}. Correct the array."
                )
        if not np.isfinite(self.positions).all():
            raise InputError("Expected finite positions, got NaN or infinity. Remove those atoms.")
        if self.residues is not None and len(self.residues.index) != n:
            raise InputError(f"Expected residues of {n} atoms, got those of {len(self.residues.index)}.")
        if (self.b_factors < 0).any():
            raise InputError(f"Expected B factors >= 0, got {self.b_factors.min():g}. Correct the structure.")

    @classmethod
    def from_atoms(
        cls,
        positions: ArrayLike,
        elements: ArrayLike,
        *,
        weights: ArrayLike = 1.0,
        b_factors: ArrayLike = 0.0,
        hydrogens: ArrayLike = 0.0,
        name: str = "atoms",
        residues: Residues | None = None,
    ) -> Specimen:
        """A specimen from arrays, as they stand (not centred).

        Args:
            positions: (n, 3) [angstrom].
            elements: (n,) atomic numbers.
            weights, b_factors, hydrogens: numbers or (n,), see `Specimen`.
            name: for messages.
            residues: see `Specimen`.
        """
        xyz = np.asarray(positions, dtype=np.float64)
        n = len(xyz)
        w, b, h = (np.broadcast_to(np.asarray(v, dtype=np.float64), (n,)) for v in (weights, b_factors, hydrogens))
        return cls(xyz, np.asarray(elements), w, b, h, np.zeros(n, dtype=np.int64), name, residues)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        assembly: str | None = "1",
        *,
        hydrogens: str = "riding",
        model: int | str | None = None,
        unknown_atoms: str = "error",
    ) -> Specimen:
        """Reads PDB or mmCIF, plain or compressed, and centres it on its mean position weighted by mass.

        Water is left out: it belongs to the solvent. Alternative locations count with their occupancies, and so do
        models whose occupancies add up to 1; see `simulators.cryoet.formats.structure`.

        Args:
            path: the file.
            assembly: name of the biological assembly; None for the atoms of the file as they stand.
            hydrogens: "riding" (each residue's hydrogens that the file lacks ride on its carbons and nitrogens, in
                equal parts), "file" (only those in the file) or "none".
            model: number of one model of the file, or "all"; by default all where their occupancies add up to 1, else
                the first one and a warning.
            unknown_atoms: "error", or "skip" to leave out atoms of unknown elements.

        Returns:
            the specimen, centred.

        Raises:
            InputError: no such file, not readable, no atoms, an unknown atom, model or assembly.
        """
        path = Path(path)
        if hydrogens not in _HYDROGENS:
            raise InputError(f"Unknown hydrogens={hydrogens!r}. Known: {', '.join(_HYDROGENS)}.")
        found = read_structure_file(path, assembly=assembly, model=model, unknown_atoms=unknown_atoms)
        return _from_groups(found.groups, path, hydrogens)

    @classmethod
    def helix(cls, num_subunits: int = 245) -> Specimen:
        """A bead model of a helical virus like tobacco mosaic virus, its axis along +x; needs no file.

        Rise 1.408 angstrom a subunit, 49 subunits in 3 turns, radius 20 to 90 angstrom; each subunit is eight beads of
        radial position 25, 34, ..., 88 angstrom, which share 158 residues of mean composition.

        Args:
            num_subunits: number of subunits; 245 are 345 angstrom long.
        """
        if not isinstance(num_subunits, int) or num_subunits < 1:
            raise InputError(f"Expected num_subunits >= 1, an integer, got {num_subunits!r}.")
        index = np.arange(num_subunits)
        radii = 25.0 + 9.0 * np.arange(8)
        # A slight twist of the subunit with radius, as in the virus, makes the model chiral at low resolution too.
        angle = 2 * np.pi * 3 / 49 * index[:, None] + np.deg2rad(0.3) * (radii - 55.0)[None, :]
        along = np.broadcast_to(1.408 * (index - (num_subunits - 1) / 2)[:, None], angle.shape)
        xyz = np.stack((along, radii * np.cos(angle), radii * np.sin(angle)), axis=-1).reshape(-1, 3)
        n, heavy = len(xyz), sum(_RESIDUE.values())
        positions = np.repeat(xyz, len(_RESIDUE), axis=0)
        elements = np.tile(list(_RESIDUE), n)
        weights = np.tile(list(_RESIDUE.values()), n) * (158 / len(radii))
        bead, kinds = np.repeat(np.arange(n), len(_RESIDUE)), len(_RESIDUE)
        subunit = np.repeat(index, len(radii) * kinds) + 1
        residues = Residues(bead, np.full(len(bead), "A"), subunit, np.arange(len(bead)) % kinds == 0)
        # A bead is a Gaussian of 5 angstrom standard deviation: B = 8 pi^2 u^2.
        return cls.from_atoms(
            positions,
            elements,
            weights=weights,
            b_factors=8 * np.pi**2 * 5.0**2,
            hydrogens=_RESIDUE_HYDROGENS / heavy,
            name=f"helix of {num_subunits} subunits",
            residues=residues,
        )

    @classmethod
    def from_options(cls, options: Specimen | DensityMap | str | Path | Mapping[str, Any]) -> Specimen | DensityMap:
        """A specimen from plain data, as a job file holds it.

        Args:
            options: a `Specimen` or `DensityMap`; "helix"; a path; or a mapping with `file` (and the other
                arguments of `from_file`) or `helix = true` (and `num_subunits`), and for a field `copies`,
                `field_angstrom`, `seed`, `spacing_angstrom`; or a mapping with `map` and the arguments of
                `DensityMap.from_file`.
        """
        from simulators.cryoet.specimen.maps import DensityMap

        if isinstance(options, Specimen | DensityMap):
            return options
        if isinstance(options, str | Path) and str(options).removesuffix(".gz").removesuffix(".bz2").endswith(
            (".mrc", ".map", ".ccp4")
        ):
            return DensityMap.from_file(options)  # says what else it has to know
        if isinstance(options, Mapping) and "map" in options:
            return DensityMap.from_options(options)
        if isinstance(options, str | Path):
            return cls.helix() if str(options) == "helix" else cls.from_file(options)
        if not isinstance(options, Mapping):
            raise InputError(f'Expected a specimen, a path, "helix" or a table, got {type(options).__name__}.')
        known = (*_FILE_KEYS, *_HELIX_KEYS, *_FIELD_KEYS)
        for key in options:
            if key not in known:
                raise InputError(f"Unknown key {key!r} of specimen. Known keys: {', '.join(known)}.")
        if ("file" in options) == bool(options.get("helix", False)):
            raise InputError("Expected either file = ... or helix = true in specimen, got both or neither.")
        wrong = [k for k in (_HELIX_KEYS[1:] if "file" in options else _FILE_KEYS[1:]) if k in options]
        if wrong:
            raise InputError(f"{', '.join(wrong)} does not belong to this kind of specimen. Remove it.")
        base = {k: v for k, v in options.items() if k in (*_FILE_KEYS[1:], *_HELIX_KEYS[1:])}
        specimen = cls.from_file(options["file"], **base) if "file" in options else cls.helix(**base)
        layout = {k: v for k, v in options.items() if k in _FIELD_KEYS}
        if not layout:
            return specimen
        missing = [k for k in ("copies", "field_angstrom", "seed") if k not in layout]
        if missing:
            raise InputError(f"Expected copies, field_angstrom and seed for a field; missing: {', '.join(missing)}.")
        return specimen.field(**layout)

    @property
    def num_atoms(self) -> int:
        """Number of atoms or beads, riding hydrogens not counted."""
        return len(self.positions)

    @property
    def identity_parts(self) -> Any:
        """What images depend on: the atoms, and where they deform what belongs together."""
        return self.digest, self.residues

    @property
    def digest(self) -> str:
        """Hash of everything that the image depends on; the key of caches."""
        if not self._digest:
            state = hashlib.blake2b(digest_size=16)
            for key in ("positions", "atomic_numbers", "weights", "b_factors", "hydrogens", "labels"):
                state.update(getattr(self, key).tobytes())
            self._digest.append(state.hexdigest())
        return self._digest[0]

    def transformed(self, rotation: ArrayLike | None = None, shift: ArrayLike = (0.0, 0.0, 0.0)) -> Specimen:
        """The specimen rotated about the origin, x -> R x, then shifted.

        Args:
            rotation: (3, 3) active rotation matrix; None for none.
            shift: (3,) [angstrom].
        """
        matrix = np.eye(3) if rotation is None else np.asarray(rotation, dtype=np.float64)
        if matrix.shape != (3, 3) or not np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-8):
            raise InputError("Expected a (3, 3) orthogonal rotation matrix. Normalise it first.")
        return replace(self, positions=self.positions @ matrix.T + np.asarray(shift, dtype=np.float64))

    def field(self, copies: int, field_angstrom: float, seed: int, spacing_angstrom: float | None = None) -> Specimen:
        """Several copies, each turned at random, at random places of the x-y plane: one rigid specimen.

        Orientations are uniform on the rotation group; places are uniform in a square about the origin, subject to
        the distance between any two.

        Args:
            copies: number of copies.
            field_angstrom: edge of the square within which whole copies lie [angstrom].
            seed: of orientations and places.
            spacing_angstrom: least distance of two centres in the plane; by default the diameter of the sphere
                around one copy, so that copies cannot overlap in projection [angstrom].

        Returns:
            the specimen of all copies.

        Raises:
            InputError: they do not fit.
        """
        if not isinstance(copies, int) or copies < 1:
            raise InputError(f"Expected copies >= 1, an integer, got {copies!r}.")
        if not isinstance(seed, int) or seed < 0:
            raise InputError(f"Expected seed >= 0, an integer, got {seed!r}.")
        radius = float(np.linalg.norm(self.positions, axis=1).max()) + 2.0
        spacing = 2 * radius if spacing_angstrom is None else float(spacing_angstrom)
        free = float(field_angstrom) - 2 * radius
        if not (free > 0 or (copies == 1 and free > -1e-9)):
            raise InputError(
                f"Expected a field wider than one copy ({2 * radius:.0f} angstrom), got {field_angstrom:g} angstrom. "
                "Widen field_angstrom."
            )
        if not np.isfinite(spacing) or spacing < 0:
            raise InputError(f"Expected spacing_angstrom >= 0, got {spacing_angstrom!r}.")
        random = np.random.Generator(np.random.Philox(key=seed))
        centres = _places(random, copies, free, spacing)
        if len(centres) < copies:
            raise InputError(
                f"Expected room for {copies} copies at least {spacing:.0f} angstrom apart in a field of "
                f"{field_angstrom:g} angstrom, found it for {len(centres)}. Take fewer copies, a wider field or a "
                "smaller spacing_angstrom."
            )
        parts = [self.transformed(_random_rotation(random), (*centre, 0.0)) for centre in centres]
        stride = int(self.labels.max()) + 1
        return Specimen(
            np.concatenate([p.positions for p in parts]),
            np.tile(self.atomic_numbers, copies),
            np.tile(self.weights, copies),
            np.tile(self.b_factors, copies),
            np.tile(self.hydrogens, copies),
            np.concatenate([self.labels + i * stride for i in range(copies)]),
            f"{copies} copies of {self.name}",
            None if self.residues is None else self.residues.tiled(copies),
        )


def _from_groups(groups: Sequence[Group], path: Path, hydrogens: str) -> Specimen:
    gemmi = import_gemmi()
    rows: list[tuple[float, ...]] = []
    owners: list[tuple[int, str, int, bool]] = []
    # One number for a residue that several models have a share of: it deforms as one.
    numbers: dict[tuple[object, str], int] = {}
    count = 0
    for group in groups:
        residue = group.residue
        atoms = [a for a in residue if hydrogens != "none" or not a.is_hydrogen()]
        if not atoms:
            continue
        riding = _riding(gemmi, residue) if hydrogens == "riding" else 0.0
        mine = numbers.get((group.key, residue.name)) if group.model else None
        node = _node(atoms) if mine is None else None
        if mine is None:
            mine = numbers[group.key, residue.name] = count
            count += 1
        owners += [(mine, group.chain, residue.seqid.num or 0, i == node) for i in range(len(atoms))]
        for a in atoms:
            carried = riding if a.element.atomic_number in (6, 7) else 0.0
            rows.append((*a.pos.tolist(), a.element.atomic_number, a.occ, a.b_iso, carried))
    if not rows:
        raise InputError(f"Expected atoms other than hydrogen in {str(path)!r}, found none. Choose another structure.")
    table = np.array(rows)
    elements = table[:, 3].astype(np.int64)
    mass = np.array([gemmi.Element(int(z)).weight for z in elements]) * table[:, 4]
    if not mass.sum() > 0:
        raise InputError(f"Expected occupancies > 0 in {str(path)!r}, got none. Correct the structure.")
    centred = table[:, :3] - np.average(table[:, :3], axis=0, weights=mass)
    residues = Residues(*(np.array(column) for column in zip(*owners, strict=True)))
    return Specimen.from_atoms(
        centred,
        elements,
        weights=table[:, 4],
        b_factors=table[:, 5],
        hydrogens=table[:, 6],
        name=path.name,
        residues=residues,
    )


def _node(atoms: Sequence[Any]) -> int:
    """Which of a residue's atoms stands for it in an elastic network."""
    for name, atomic_number in (("CA", 6), ("P", 15)):
        for i, atom in enumerate(atoms):
            if atom.name == name and atom.element.atomic_number == atomic_number:
                return i
    return 0


def _riding(gemmi: Any, residue: Any) -> float:
    """Missing hydrogens of a residue for each of its carbons and nitrogens (occupancies count)."""
    known = gemmi.find_tabulated_residue(residue.name)
    carriers = sum(a.occ for a in residue if a.element.atomic_number in (6, 7))
    if carriers == 0 or not (known.is_amino_acid() or known.is_nucleic_acid()):
        return 0.0
    present = sum(a.occ for a in residue if a.is_hydrogen())
    # The table has the free monomer; the chain lacks one water of it. A residue that is only partly built carries its
    # share, by mass.
    built = sum(a.occ * a.element.weight for a in residue if not a.is_hydrogen())
    whole = known.weight - 1.008 * known.hydrogen_count - 15.999
    return max((known.hydrogen_count - 2) * min(built / whole, 1.0) - present, 0.0) / carriers


def _places(random: np.random.Generator, copies: int, free: float, spacing: float) -> NDArray[np.float64]:
    """Dart throwing with restarts; the fullest attempt is returned, so that the caller can say how many fit."""
    best = np.zeros((0, 2))
    for _ in range(20):
        centres, found = np.zeros((copies, 2)), 0
        for _ in range(200 * copies):
            # One dart at a time: the orientations are drawn after the last that counts, so that drawing darts in bulk
            # would change every field, and with it what a micrograph made from one shows.
            trial = (random.random(2) - 0.5) * max(free, 0.0)
            gaps = centres[:found] - trial
            if ((gaps * gaps).sum(axis=1) >= spacing**2).all():
                centres[found] = trial
                found += 1
                if found == copies:
                    return centres
        best = centres[:found] if found > len(best) else best
    return best


def _random_rotation(random: np.random.Generator) -> NDArray[np.float64]:
    """Uniform on the rotation group: a normalised Gaussian quaternion (Shoemake 1992)."""
    w, x, y, z = (q := random.standard_normal(4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
