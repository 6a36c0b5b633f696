"""Potential maps of a particle as TEM-simulator v1.3 makes them, their projections, and these on an image's pixels.

The program's particle is a box of voxels. The real potential is that of the atoms, at least that of ice; what is not
elastic is an imaginary potential made in the same way of the atoms' cross-sections. Both are kept relative to their
mean over the box's surface. Every atom is a Gaussian cut off where it has fallen to exp(-10), no narrower than the
voxels can carry, so the maps are not those of `simulators.cryoet.specimen.potential`, which are exact.

Lengths are in nm here, as in the program, but for the atoms' own in angstrom.

Reference:
    Rullgard, Ofverstedt, Masich, Daneholt & Oktem (2011), J. Microsc. 243, 234.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import InputError
from simulators.cryoet.formats.structure import read_structure_file
from simulators.cryoet.microscope.physics import POTENTIAL_CONSTANT, REST_ENERGY_EV, wavelength_angstrom
from simulators.cryoet.specimen.potential import peng_coefficients
from simulators.cryoet.specimen.specimen import Specimen

BOHR_RADIUS_NM = 0.0529177
ICE_PER_NM3 = 33.5
"""Water molecules [1/nm^3]."""

# Gaussians end where their exponent is this.
_CUT = 10.0
# No Gaussian has a smaller B than this many squared voxels.
_SMALLEST_B = 200.0
_PADDING_ANGSTROM = 5.0
_ATOMS_AT_A_TIME = 32

# Voltages at which projected cross-sections are tabulated; between them polynomials in the logarithm.
_LOWEST_KV, _HIGHEST_KV, _NODES = 1.0, 1e4, 9

# Hydrogens on the atoms of a residue, besides one on N (none in proline) and one on CA (two in glycine). Isoleucine
# has CG1 and CG2 exchanged in v1.3, which counts here; nucleotides are those named by a letter alone.
_SIDE_CHAINS = {
    "ALA": "CB3",
    "ARG": "CB2 CG2 CD2 NE1 NH12 NH22",
    "ASN": "CB2 ND22",
    "ASP": "CB2",
    "CYS": "CB2 SG1",
    "GLN": "CB2 CG2 NE22",
    "GLU": "CB2 CG2",
    "HIS": "CB2 ND11 CD21 CE11",
    "ILE": "CB1 CG13 CG22 CD13",
    "LEU": "CB2 CG1 CD13 CD23",
    "LYS": "CB2 CG2 CD2 CE2 NZ3",
    "MET": "CB2 CG2 CE3",
    "PHE": "CB2 CD11 CD21 CE11 CE21 CZ1",
    "PRO": "CB2 CG2 CD2",
    "SER": "CB2 OG1",
    "THR": "CB1 OG11 CG23",
    "TRP": "CB2 CD11 NE11 CE31 CZ21 CZ31 CH21",
    "TYR": "CB2 CD11 CD21 CE11 CE21 OH1",
    "VAL": "CB1 CG13 CG23",
    "A": "C5'2 C4'1 C3'1 C2'1 O2'1 C1'1 C81 N62 C21",
    "G": "C5'2 C4'1 C3'1 C2'1 O2'1 C1'1 C81 N11 N22",
    "C": "C5'2 C4'1 C3'1 C2'1 O2'1 C1'1 N42 C51 C61",
    "DA": "C5'2 C4'1 C3'1 C2'2 C1'1 C81 N62 C21",
    "DG": "C5'2 C4'1 C3'1 C2'2 C1'1 C81 N11 N22",
    "DC": "C5'2 C4'1 C3'1 C2'2 C1'1 N42 C51 C61",
    "DT": "C5'2 C4'1 C3'1 C2'2 C1'1 N31 C73 C61",
}
_HYDROGENS = {name: {item[:-1]: int(item[-1]) for item in items.split()} for name, items in _SIDE_CHAINS.items()}


def riding_hydrogens(residue: str, atom: str) -> int:
    """Hydrogens that the program adds on an atom of a residue."""
    if residue == "HOH":
        return 2
    if atom in ("C", "O"):
        return 0
    if atom == "N":
        return 0 if residue == "PRO" else 1
    if atom == "CA":
        return 2 if residue == "GLY" else 1
    return _HYDROGENS.get(residue, {}).get(atom, 0)


def read_structure(
    path: str | Path,
    transforms: str | Path | None = None,
    *,
    add_hydrogen: bool = True,
    model: int | str | None = None,
    unknown_atoms: str = "error",
) -> Specimen:
    """The atoms of a PDB or mmCIF file, with water, and hydrogens where the program puts them; not centred.

    The reader is that of `Specimen.from_file`. The program itself counts all models, and leaves out atoms without an
    element in columns 77 and 78: model="all" does the former.

    Args:
        path: the file, plain or compressed.
        transforms: table of 3 x 4 matrices (after comments "rows 4", then three rows a copy) [angstrom].
        add_hydrogen: each residue's hydrogens count at the atoms that carry them.
        model, unknown_atoms: see `Specimen.from_file`.

    Raises:
        InputError: no such file, or nothing in it that can be read.
    """
    path = Path(path)
    found = read_structure_file(path, model=model, unknown_atoms=unknown_atoms, water=True)
    rows: list[tuple[float, ...]] = []
    for group in found.groups:
        name = group.residue.name
        for a in group.residue:
            riding = riding_hydrogens(name, a.name) if add_hydrogen else 0
            rows.append((*a.pos.tolist(), a.element.atomic_number, a.occ, a.b_iso, riding))
    table = np.array(rows)
    matrices = np.eye(3, 4)[None] if transforms is None else _read_transforms(Path(transforms))
    positions = np.concatenate([table[:, :3] @ m[:, :3].T + m[:, 3] for m in matrices])
    numbers, weights, b, riding_all = (np.tile(table[:, i], len(matrices)) for i in (3, 4, 5, 6))
    return Specimen.from_atoms(
        positions, numbers.astype(np.int64), weights=weights, b_factors=b, hydrogens=riding_all, name=path.name
    )


def _read_transforms(path: Path) -> Array:
    try:
        words = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        (count, width), *rows = [[float(w) for w in line] for line in words if line]
        table = np.array(rows)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Expected a table of 3 x 4 matrices ('rows 4', then the rows) at {str(path)!r}, got {error}."
        ) from error
    if width != 4 or table.shape != (count, 4) or len(table) % 3 or not np.isfinite(table).all():
        raise InputError(
            f"Expected {count:g} rows of 4 finite numbers in {str(path)!r}, three rows a copy, as its first line says "
            f"('rows 4'), got {width:g} columns announced and a table of shape {table.shape}. Is it cut short? "
            "Shifts and angles, six columns, are not read: write matrices."
        )
    return table.reshape(-1, 3, 4)


def wave_number(voltage_kv: float) -> float:
    """k = 2 pi / lambda [1/nm]."""
    return 20 * math.pi / wavelength_angstrom(voltage_kv)


def cross_section(atomic_number: int, voltage_kv: float) -> float:
    r"""Total cross-section of an atom, elastic and inelastic [nm^2].

    With g = 1 + E / E_0, t_0 = Z^{1/3} / (k a_0), t_E = 13.5 eV Z / (4 E), A = t_E^2, B = t_0^2:

        sigma = 4 pi Z^{4/3} (g / k)^2 + 4 pi Z g^2 / (k^4 a_0^2) int_0^inf [1 - (1 + u/B)^{-2}] (u + A)^{-2} du.

    Args:
        atomic_number: Z.
        voltage_kv: [kV].

    Reference:
        Rullgard et al. (2011); Reimer & Kohl, Transmission Electron Microscopy, 5th edition, section 5.2 (Lenz model).
    """
    z, k, gamma, a, b = _screening(atomic_number, voltage_kv)
    d = b - a
    integral = (a - 3 * b + 2 * b * b * math.log(b / a) / d) / (d * d)
    return 4 * math.pi * (z ** (4 / 3) * (gamma / k) ** 2 + z * (gamma / (k * k * BOHR_RADIUS_NM)) ** 2 * integral)


def differential_cross_section(atomic_number: int, voltage_kv: float, angle: Array) -> Array:
    r"""d sigma / d Omega of `cross_section`, elastic and inelastic, at angles [rad] [nm^2]."""
    z, k, gamma, a, b = _screening(atomic_number, voltage_kv)
    u = angle * angle
    screened = 1 / (1 + u / b)
    elastic = 4 * z ** (2 / 3) * (BOHR_RADIUS_NM * gamma * screened) ** 2
    inelastic = 4 * z * (gamma / (k * k * BOHR_RADIUS_NM * (u + a))) ** 2 * (1 - screened * screened)
    return elastic + inelastic


def _screening(z: int, voltage_kv: float) -> tuple[int, float, float, float, float]:
    k = wave_number(voltage_kv)
    lost = (13.5 * z / (4e3 * voltage_kv)) ** 2
    screening = (z ** (1 / 3) / (k * BOHR_RADIUS_NM)) ** 2
    return z, k, 1 + 1e3 * voltage_kv / REST_ENERGY_EV, lost, screening


def water_cross_section(voltage_kv: float) -> float:
    """sigma_O + 2 sigma_H [nm^2]."""
    return cross_section(8, voltage_kv) + 2 * cross_section(1, voltage_kv)


def ice_potential_v() -> float:
    """h^2 / (2 pi m e) n (f_O(0) + 2 f_H(0)) of the program's ice [V]."""
    zero = sum(peng_coefficients(8)[0]) + 2 * sum(peng_coefficients(1)[0])
    return POTENTIAL_CONSTANT * ICE_PER_NM3 * 1e-3 * zero


@dataclass(frozen=True, eq=False)
class Maps:
    """A particle's box of voxels; index [x, y, z].

    Args:
        voxel_nm: edge of a voxel.
        potential: (nx, ny, nz) real potential of the atoms, before ice is put around them [V].
        densities: of each element, Gaussians of unit weight [1/nm^3].
    """

    voxel_nm: float
    potential: Array
    densities: dict[int, NDArray[np.float32]]

    @classmethod
    def build(cls, specimen: Specimen, voxel_nm: float) -> Maps:
        """Puts each atom's Gaussians on the voxels of a box with a margin of 5 angstrom."""
        voxel = 10 * voxel_nm
        low = specimen.positions.min(axis=0) - _PADDING_ANGSTROM
        extent = specimen.positions.max(axis=0) + _PADDING_ANGSTROM - low
        shape = np.maximum(np.ceil(extent / voxel).astype(np.int64), 1)
        if shape.max() > 1000:
            raise InputError(
                f"Expected a box of at most 1000 voxels a side, got {shape.tolist()}. Enlarge voxel_size_nm."
            )
        points = (specimen.positions - (low + 0.5 * (extent - (shape - 1) * voxel))) / voxel
        potential, densities = np.zeros(tuple(shape)), {}
        smallest = _SMALLEST_B * voxel**2
        for z in sorted(
            {1, *specimen.atomic_numbers.tolist()}
            if specimen.hydrogens.any()
            else set(specimen.atomic_numbers.tolist())
        ):
            number = specimen.weights * ((specimen.atomic_numbers == z) + (z == 1) * specimen.hydrogens)
            here = np.flatnonzero(number)
            a, b = (np.array(values) for values in peng_coefficients(z))
            widths = np.maximum(specimen.b_factors[here, None] + np.append(b, 20.0), smallest)
            density, rest = np.zeros(tuple(shape)), np.zeros(tuple(shape))
            # Where all Gaussians of an element are as narrow as may be, the potential is its density times a number.
            plain = (widths == smallest).all(axis=1)
            add_gaussians(density, points[here[plain]], number[here[plain], None], np.array([smallest]) / voxel**2)
            potential += POTENTIAL_CONSTANT * a.sum() * density
            kinds, which = np.unique(widths[~plain], axis=0, return_inverse=True)
            for i, kind in enumerate(kinds):
                mine = here[~plain][which.reshape(-1) == i]
                add_gaussians(density, points[mine], number[mine, None], kind[-1:] / voxel**2)
                add_gaussians(rest, points[mine], number[mine, None] * a, kind[:-1] / voxel**2)
            potential += POTENTIAL_CONSTANT * rest
            # Per voxel so far.
            densities[z] = (density / voxel_nm**3).astype(np.float32)
        return cls(voxel_nm, potential / voxel**3, densities)

    def real(self) -> Array:
        """The real potential among ice, relative to the surface of the box [V]."""
        return _relative(np.maximum(self.potential, ice_potential_v()))

    def absorbing(self, voltage_kv: float) -> Array:
        """Cross-sections a volume, at least ice's, over water's cross-section, relative to the surface [1/nm^3]."""
        water = water_cross_section(voltage_kv)
        total = sum(np.float32(cross_section(z, voltage_kv) / water) * n for z, n in self.densities.items())
        return _relative(np.maximum(np.asarray(total, dtype=np.float64), ICE_PER_NM3))


def add_gaussians(grid: Array, points: Array, weights: Array, b: Array) -> None:
    """Adds Gaussians of unit volume (in voxels), (4 pi / B)^{3/2} exp(-4 pi^2 r^2 / B), within exp(-10) of the widest.

    Args:
        grid: (nx, ny, nz), changed in place; what falls outside is lost.
        points: (n, 3) centres, inside the grid [voxels].
        weights: (n, c).
        b: (c,) [voxels^2].
    """
    if not len(points):
        return
    exponents = 4 * np.pi**2 / b
    heights = weights * (exponents / np.pi) ** 1.5
    reach = math.floor(math.sqrt(_CUT / exponents.min()))
    steps = np.arange(-reach, reach + 2)
    # A margin, so that no cube needs clipping.
    wide = np.zeros(tuple(n + 2 * reach + 2 for n in grid.shape))
    size = len(steps)
    for start in range(0, len(points), _ATOMS_AT_A_TIME):
        chunk, height = points[start : start + _ATOMS_AT_A_TIME], heights[start : start + _ATOMS_AT_A_TIME]
        base = np.floor(chunk).astype(np.int64)
        # (n, 3, size): squared distances along each axis.
        squares = (base[:, :, None] + steps - chunk[:, :, None]) ** 2
        total = np.zeros((len(chunk), size, size, size))
        for c, exponent in enumerate(exponents):
            e = np.exp(-exponent * squares)
            cubes = (e[:, 0, :, None] * e[:, 1, None, :])[..., None] * e[:, 2, None, None, :]
            cubes *= height[:, c, None, None, None]
            total += cubes
        x2, y2, z2 = squares[:, 0, :, None, None], squares[:, 1, None, :, None], squares[:, 2, None, None, :]
        total *= (x2 + y2) + z2 <= _CUT / exponents.min()
        for (i, j, k), cube in zip(base.tolist(), total, strict=True):
            wide[i : i + size, j : j + size, k : k + size] += cube
    inner = tuple(slice(reach, reach + n) for n in grid.shape)
    grid += wide[inner]


def _relative(values: Array) -> Array:
    """The values less their mean over the surface of the box; the surface counts each voxel once."""
    inner = values[1:-1, 1:-1, 1:-1]
    surface = values.size - inner.size
    return values - (values.sum() - inner.sum()) / surface


def rotation(phi_deg: float, theta_deg: float, psi_deg: float) -> Array:
    """R_z(psi) R_x(theta) R_z(phi), from the particle's axes to the image's."""

    def turn(degrees: float, i: int, j: int) -> Array:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        matrix = np.eye(3)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
        return matrix

    return turn(psi_deg, 0, 1) @ turn(theta_deg, 1, 2) @ turn(phi_deg, 0, 1)


@dataclass(frozen=True, eq=False)
class Projected:
    """Projections of a particle's maps in one orientation, on a grid of voxels.

    Args:
        layers: (1 + nodes, n0, n1): the real potential [V nm], and the absorbing one at each node [1/nm^2].
        basis: (2, 2) columns: the image's x and y of a step along each axis of the grid [nm].
        nodes: log of the voltages of the nodes.
    """

    layers: Array
    basis: Array
    nodes: Array

    @classmethod
    def build(cls, maps: Maps, turn: Array) -> Projected:
        """Projects along the beam: columns of the box's axis nearest to it, sheared to the others' plane."""
        beam = turn[2]
        # Of equal ones x comes before y and y before z, as in the program.
        along = int(np.argmax(np.abs(beam)))
        first, second = (i for i in range(3) if i != along)
        slopes = np.array([-beam[first] / beam[along], -beam[second] / beam[along]])
        low, high = math.log(_LOWEST_KV), math.log(_HIGHEST_KV)
        nodes = 0.5 * (low + high) - 0.5 * (high - low) * np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
        length = maps.voxel_nm * math.sqrt(1 + float(slopes @ slopes))
        volumes = (maps.real(), *(maps.absorbing(math.exp(e)) for e in nodes))
        layers = [_sheared_sum(np.moveaxis(v, (first, second, along), (0, 1, 2)), slopes) * length for v in volumes]
        return cls(np.stack(layers), maps.voxel_nm * turn[:2][:, [first, second]], nodes)

    def at(self, voltage_kv: float, strength: float) -> Array:
        """(2, n0, n1): phase and logarithm of the amplitude lost, before they come onto pixels.

        Args:
            voltage_kv: [kV].
            strength: phase a projected potential [rad / (V nm)].
        """
        # Barycentric weights of Chebyshev points of the first kind.
        place = np.arange(_NODES) + 0.5
        weights = (-1.0) ** np.arange(_NODES) * np.sin(np.pi * place / _NODES)
        gaps = math.log(voltage_kv) - self.nodes
        if (np.abs(gaps) < 1e-12).any():
            shares = (np.abs(gaps) < 1e-12).astype(np.float64)
        else:
            shares = weights / gaps / (weights / gaps).sum()
        lost = np.tensordot(shares, self.layers[1:], axes=1)
        # The amplitude falls by half the cross-section a volume.
        return np.stack((strength * self.layers[0], 0.5 * water_cross_section(voltage_kv) * lost))


def _sheared_sum(volume: Array, slopes: Array) -> Array:
    """Sum over the last axis, each layer moved by the slopes and shared bilinearly among four pixels."""
    n0, n1, n2 = volume.shape
    size = [math.ceil(n + n2 * abs(float(s)) + 1) for n, s in zip((n0, n1), slopes, strict=True)]
    total = np.zeros(size)
    starts = [0.5 * (m - n) - 0.5 * (n2 - 1) * float(s) for m, n, s in zip(size, (n0, n1), slopes, strict=True)]
    if not slopes.any() or np.abs(slopes).max() * n2 < 1e-9:
        volume, n2, slopes = volume.sum(axis=2, keepdims=True), 1, np.zeros(2)
        starts = [0.5 * (m - n) for m, n in zip(size, (n0, n1), strict=True)]
    for k in range(n2):
        place = [start + k * float(s) for start, s in zip(starts, slopes, strict=True)]
        i, j = (math.floor(p) for p in place)
        t, u = place[0] - i, place[1] - j
        layer = volume[:, :, k]
        for di, wi in ((0, 1 - t), (1, t)):
            for dj, wj in ((0, 1 - u), (1, u)):
                if wi * wj:
                    total[i + di : i + di + n0, j + dj : j + dj + n1] += wi * wj * layer
    return total


def on_pixels(
    layers: Array, basis: Array, offset: Sequence[float], shape: tuple[int, int], pixel_nm: float
) -> tuple[Array, tuple[slice, slice]]:
    """Mean of a projection over the pixels of an image, by two shears; where the grids are parallel, exactly.

    Args:
        layers: (c, n0, n1) on the particle's grid, constant within a cell.
        basis: (2, 2), see `Projected`.
        offset: the image's x and y of the grid's centre, from the image's centre [nm].
        shape: (rows, columns) of the image.
        pixel_nm: [nm].

    Returns:
        (c, h, w), and the rows and columns of the image that it fills; elsewhere the particle is not.
    """
    sizes, best = (shape[1], shape[0]), None
    for i in range(4):
        own, image = (i % 2, 1 - i % 2), (i // 2, 1 - i // 2)
        w = np.linalg.solve(basis[:, own], np.column_stack((pixel_nm * np.eye(2)[:, image], -np.asarray(offset))))
        if abs(w[1, 1]) < 1e-12:
            continue
        c01 = w[0, 1] / w[1, 1]
        c00 = w[0, 0] - c01 * w[1, 0]
        if abs(c00) < 1e-12:
            continue
        skew = max(abs(c00), abs(w[1, 1]), 1 / abs(c00), 1 / abs(w[1, 1]))
        if best is None or skew < best[0]:
            best = skew, own, image, (c00, c01, w[0, 2] - c01 * w[1, 2]), (w[1, 1], w[1, 0], w[1, 2])
    if best is None:
        raise InputError("Expected an orientation with a projection of finite area, got a singular basis.")
    _, own, image, (c00, c01, c02), (d0, d1, d2) = best
    values = layers if own == (0, 1) else layers.transpose(0, 2, 1)
    n0, n1 = values.shape[1:]
    m0, m1 = sizes[image[0]], sizes[image[1]]
    # Lines are where v1.3 takes them: half a cell before their centres, which matters to sheared grids alone.
    lines = np.arange(n1) - 0.5 * n1
    starts = c02 + c01 * lines
    j_low, j_high = _filled(starts, c00, n0, m0)
    once = _means(values.transpose(0, 2, 1), starts, c00, m0, j_low, j_high)  # (c, n1, j)
    starts = d2 + d1 * (np.arange(j_low, j_high) - 0.5 * m0)
    i_low, i_high = _filled(starts, d0, n1, m1)
    twice = _means(once.transpose(0, 2, 1), starts, d0, m1, i_low, i_high)  # (c, j, i)
    ranges = {image[0]: slice(j_low, j_high), image[1]: slice(i_low, i_high)}
    return (twice if image == (1, 0) else twice.transpose(0, 2, 1)), (ranges[1], ranges[0])


def _filled(starts: Array, step: float, n: int, m: int) -> tuple[int, int]:
    """The pixels, of m of width `step` centred at `starts`, that n cells of width 1 about 0 can touch."""
    if not len(starts):
        return 0, 0
    ends = (np.array([-0.5 * n, 0.5 * n])[:, None] - np.array([starts.min(), starts.max()])) / step + 0.5 * m
    low, high = max(0, math.floor(ends.min())), min(m, math.ceil(ends.max()))
    return (low, high) if low < high else (0, 0)


def _means(values: Array, starts: Array, step: float, m: int, low: int, high: int) -> Array:
    """(c, lines, high - low): means over pixels of functions that are constant on cells of width 1 about 0."""
    c, lines, n = values.shape
    sums = np.zeros((c, lines, n + 1))
    np.cumsum(values, axis=2, out=sums[:, :, 1:])
    edges = starts[:, None] + step * (np.arange(low, high + 1) - 0.5 * m) + 0.5 * n
    edges = np.clip(edges, 0, n)
    cell = np.minimum(edges.astype(np.int64), n - 1)
    line = np.arange(lines)[:, None]
    integral = sums[:, line, cell] + (edges - cell) * values[:, line, cell]
    return np.diff(integral, axis=2) / step
