r"""Structures that deform: the lowest modes of an elastic network, and domains that turn about a hinge.

r_j -> turns(r_j + sum_k a_k u_jk),    u_k a mode of the network, a_k its amplitude.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import scipy.spatial
import torch
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.space import Parameter
from simulators.cryoet.device import CPU
from simulators.cryoet.microscope.optics import check_range
from simulators.cryoet.specimen.specimen import Residues, Specimen

# Below this many coordinates all eigenvectors are computed at once.
_DENSE_BELOW = 100
# An eigenvalue is zero below this part of the Hessian's mean diagonal.
_ZERO = 1e-7

STRUCTURE = {
    "mode_angstrom": Parameter(
        "mode_angstrom[k]", "angstrom", -5.0, 5.0, 1.0, "continuous", "amplitude of elastic-network mode k (RMS)"
    ),
    "domain_deg": Parameter("domain_deg[j]", "deg", -45.0, 45.0, 2.0, "continuous", "turn of domain j about its hinge"),
}


def hessian(points: ArrayLike, cutoff_angstrom: float = 15.0) -> scipy.sparse.csr_matrix:
    r"""Hessian of an anisotropic network: springs of strength 1 at rest between points within the cut-off.

    E = 1/2 sum_{i<j} (|r_i - r_j| - d_ij)^2,    H_ij = -n n^T for i != j,    H_ii = -sum_j H_ij,

    with n the unit vector from i to j.

    Args:
        points: (n, 3) [angstrom].
        cutoff_angstrom: [angstrom].

    Returns:
        (3n, 3n), symmetric, coordinates in the order x, y, z of each point.

    Raises:
        InputError: two points coincide.

    Reference:
        Atilgan et al. (2001), Biophys. J. 80, 505, equations 3 to 6.
    """
    xyz = np.asarray(points, dtype=np.float64)
    n = len(xyz)
    pairs = scipy.spatial.cKDTree(xyz).query_pairs(cutoff_angstrom, output_type="ndarray")
    # The tree's order is its own business; sums must not depend on it.
    i, j = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
    apart = xyz[j] - xyz[i]
    length = np.linalg.norm(apart, axis=1)
    if (length < 1e-6).any():
        k = int(np.argmin(length))
        raise InputError(f"Expected nodes at different places, got {i[k]} and {j[k]} at the same. Remove one.")
    unit = apart / length[:, None]
    blocks = unit[:, :, None] * unit[:, None, :]
    own = np.zeros((n, 3, 3))
    np.add.at(own, i, blocks)
    np.add.at(own, j, blocks)
    every = np.arange(n)
    rows = np.concatenate((i, j, every))
    columns = np.concatenate((j, i, every))
    values = np.concatenate((-blocks, -blocks, own))
    axis = np.arange(3)
    at = np.broadcast_to(3 * rows[:, None, None] + axis[:, None], values.shape)
    to = np.broadcast_to(3 * columns[:, None, None] + axis, values.shape)
    return scipy.sparse.csr_matrix((values.ravel(), (at.ravel(), to.ravel())), shape=(3 * n, 3 * n))


def rigid_motions(points: ArrayLike) -> Array:
    """An orthonormal basis (3n, 6) of the shifts and infinitesimal rotations of n points that are not on a line."""
    xyz = np.asarray(points, dtype=np.float64)
    centred = xyz - xyz.mean(axis=0)
    motions = np.zeros((len(xyz), 3, 6))
    for axis in range(3):
        motions[:, axis, axis] = 1.0
        motions[:, :, 3 + axis] = np.cross(np.eye(3)[axis], centred)
    basis, upper = np.linalg.qr(motions.reshape(-1, 6))
    size = np.abs(np.diag(upper))
    if len(xyz) < 3 or size[3:].min() < 1e-6 * size[3:].max():
        raise InputError("Expected at least three nodes that are not on a line: others have no rotation to speak of.")
    return basis


class Modes(NamedTuple):
    """Result of `elastic_modes`.

    Attributes:
        eigenvalues: (K,) rising; the squared frequencies for unit masses and springs.
        vectors: (K, n, 3), orthonormal, without rigid motion.
    """

    eigenvalues: Array
    vectors: Array


def elastic_modes(points: ArrayLike, number: int, cutoff_angstrom: float = 15.0) -> Modes:
    """The softest modes of an elastic network, without the six rigid motions.

    Args:
        points: (n, 3) nodes [angstrom].
        number: how many.
        cutoff_angstrom: of the springs [angstrom].

    Returns:
        the modes. A mode's sign, which is arbitrary, is such that sum_j w_j u_j.(r_j - mean) > 0 for fixed random w, in
        whatever frame. Modes of equal frequency, as symmetric structures have, are some basis of theirs.

    Raises:
        InputError: fewer modes than asked for, or the network is in pieces or has a hinge without a spring.
    """
    xyz = np.asarray(points, dtype=np.float64)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or not np.isfinite(xyz).all():
        raise InputError(f"Expected finite nodes of shape (n, 3), got shape {xyz.shape}.")
    free = 3 * len(xyz) - 6
    if not 1 <= number <= free:
        raise InputError(f"Expected 1 to {max(free, 0)} modes of {len(xyz)} nodes, got {number}.")
    matrix, rigid = hessian(xyz, cutoff_angstrom), rigid_motions(xyz)
    stiff = float(matrix.diagonal().mean())
    generic = np.random.Generator(np.random.Philox(key=0)).standard_normal(3 * len(xyz))
    # The same bits in any process, however many threads its algebra would take.
    with threadpool_limits(1):
        if len(generic) < _DENSE_BELOW or number > free // 4:
            lifted = matrix.toarray() + 10 * stiff * rigid @ rigid.T if stiff > 0 else np.zeros(matrix.shape)
            values, vectors = scipy.linalg.eigh(lifted, subset_by_index=(0, number - 1))
        else:
            values, vectors = _softest(matrix, rigid, number, 1e-4 * stiff, generic)
    if not values[0] > _ZERO * stiff:
        raise InputError(
            f"Expected a network whose only free motions are rigid ones, got {int((values <= _ZERO * stiff).sum())} "
            f"others or more: it is in pieces. Take a cut-off of more than {cutoff_angstrom:g} angstrom, or one piece."
        )
    modes = vectors.T.reshape(number, -1, 3)
    outwards = (modes * (xyz - xyz.mean(axis=0))).sum(axis=2) @ generic[: len(xyz)]
    return Modes(values, modes * np.where(outwards < 0, -1.0, 1.0)[:, None, None])


def _softest(
    matrix: scipy.sparse.csr_matrix, rigid: Array, number: int, shift: float, start: Array
) -> tuple[Array, Array]:
    """Smallest eigenvalues beside those of `rigid`: Lanczos with (H + shift)^-1, in the rigid motions' complement."""
    size = matrix.shape[0]
    solve = scipy.sparse.linalg.splu((matrix + shift * scipy.sparse.identity(size)).tocsc()).solve

    def internal(v: Array) -> Array:
        return v - rigid @ (rigid.T @ v)

    inverse = scipy.sparse.linalg.LinearOperator(
        (size, size), matvec=lambda v: internal(solve(internal(v.reshape(-1)))), dtype=np.float64
    )
    values, vectors = scipy.sparse.linalg.eigsh(inverse, k=number, which="LA", v0=internal(start), tol=1e-12)
    order = np.argsort(-values, kind="stable")
    return 1 / values[order] - shift, vectors[:, order]


Place = tuple[str, int] | tuple[float, float, float]


@dataclass(frozen=True)
class Domain:
    """A part of a structure that turns as a rigid body about a hinge.

    Args:
        hinge: two points of the axis, each a residue's node as (chain, number) or x, y, z [angstrom] in the specimen's
            frame; a positive turn is right-handed about the direction from the first to the second.
        chain: name of the chain; None for all.
        residues: first and last number of the residues, both included; None for all.
    """

    hinge: tuple[Place, Place]
    chain: str | None = None
    residues: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if self.chain is None and self.residues is None:
            raise InputError("Expected a chain or residues of a domain, got neither: all atoms turn by the pose.")
        if isinstance(self.hinge, str) or len(self.hinge) != 2:
            raise InputError(f"Expected a hinge as two points, got {self.hinge!r}.")
        put(self, "hinge", tuple(_checked_place(place) for place in self.hinge))
        if self.residues is not None:
            good = not isinstance(self.residues, str) and len(self.residues) == 2
            if not good or not all(isinstance(i, int) for i in self.residues) or self.residues[0] > self.residues[1]:
                raise InputError(f"Expected residues as (first, last), integers, got {self.residues!r}.")
            put(self, "residues", tuple(self.residues))


def _checked_place(place: Any) -> Place:
    items = () if isinstance(place, str) else tuple(place)
    if len(items) == 2 and isinstance(items[0], str) and isinstance(items[1], int):
        return items
    if len(items) == 3 and all(isinstance(v, int | float) and np.isfinite(v) for v in items):
        return (float(items[0]), float(items[1]), float(items[2]))
    raise InputError(f"Expected a point of a hinge as (chain, number) or (x, y, z), got {place!r}.")


@dataclass(frozen=True)
class Deformation:
    """How a structure may deform: parameters `mode_angstrom[k]`, k < modes, and `domain_deg[j]`, one for each domain.

    The amplitude of a mode is the root mean square displacement of the network's nodes, one for each residue; the
    residue's other atoms move with its node. Amplitudes are added up, as modes are orthogonal: the nodes' RMS
    displacement by several modes is sqrt(sum a_k^2). Displacements are straight lines, so that bonds are stretched by
    large amplitudes. Domains turn after that, in their order, each about its hinge in the undeformed structure.

    Of a specimen of several copies (`Specimen.field`) all deform alike, each in its own frame.

    Args:
        modes: number of modes, the softest ones.
        cutoff_angstrom: of the springs between nodes [angstrom].
        domains: `Domain`s or tables of their fields.
        mode_angstrom: amplitudes where they are not varied; empty for zeros [angstrom].
        domain_deg: turns of the domains where they are not varied; empty for zeros [degree].
    """

    modes: int = 0
    cutoff_angstrom: float = 15.0
    domains: Sequence[Domain | Mapping[str, Any]] = ()
    mode_angstrom: Sequence[float] = ()
    domain_deg: Sequence[float] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not isinstance(self.modes, int) or not 0 <= self.modes <= 1000:
            raise InputError(f"Expected modes as an integer in [0, 1000], got {self.modes!r}.")
        check_range("Deformation", "cutoff_angstrom", self.cutoff_angstrom, 0.0, 1e4, open_lower=True)
        if isinstance(self.domains, Mapping | str):
            raise InputError(f"Expected domains as a list, got {self.domains!r}.")
        put(self, "domains", tuple(_domain(domain) for domain in self.domains))
        for name, number in (("mode_angstrom", self.modes), ("domain_deg", len(self.domains))):
            given = tuple(getattr(self, name)) or (0.0,) * number
            if len(given) != number:
                raise InputError(f"Expected {number} values of Deformation.{name}, got {len(given)}.")
            for value in given:
                check_range("Deformation", name, value, -180.0, 180.0)
            put(self, name, tuple(float(v) for v in given))

    @property
    def values(self) -> dict[str, float]:
        """The settings by parameter name, in the order of the parameters."""
        table = {"mode_angstrom": self.mode_angstrom, "domain_deg": self.domain_deg}
        return {f"{name}[{i}]": value for name, values in table.items() for i, value in enumerate(values)}

    def of(self, specimen: Specimen) -> Motion:
        """The motions of a specimen's atoms; computed once for each specimen.

        Raises:
            InputError: a domain or hinge that the specimen does not have, or a network in pieces.
        """
        return _motion(self, specimen)

    def applied(self, specimen: Specimen, values: Mapping[str, float] | None = None) -> Specimen:
        """The deformed specimen.

        Args:
            specimen: undeformed.
            values: by parameter name; those left out have the values given to the constructor.
        """
        known = self.values
        for name in values or {}:
            if name not in known:
                raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(known) or 'none'}.")
        return self.of(specimen).specimen({**known, **(values or {})})


def _domain(options: Domain | Mapping[str, Any]) -> Domain:
    if isinstance(options, Domain):
        return options
    known = [item.name for item in fields(Domain)]
    if not isinstance(options, Mapping) or not set(options) <= set(known) or "hinge" not in options:
        raise InputError(f"Expected a domain as a table of {', '.join(known)}, with a hinge, got {options!r}.")
    return Domain(**options)


@dataclass(frozen=True, eq=False)
class Motion:
    """What a `Deformation` does to the n atoms of a specimen.

    Args:
        specimen_at_rest: undeformed.
        modes: (K, n, 3) displacements of atoms at an amplitude of 1 angstrom.
        eigenvalues: (K,) of the network.
        turning: (J, n) bool: the atoms of each domain.
        hinges, axes: (J, n, 3) a point of each atom's axis and its direction, a unit vector.
        digest: a hash of all that.
    """

    specimen_at_rest: Specimen
    modes: Array
    eigenvalues: Array
    turning: NDArray[np.bool_]
    hinges: Array
    axes: Array
    digest: str = field(init=False)
    _tables: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        state = hashlib.blake2b(self.specimen_at_rest.digest.encode(), digest_size=16)
        for array in (self.modes, self.turning, self.hinges, self.axes):
            state.update(array.tobytes())
        object.__setattr__(self, "digest", state.hexdigest())

    def positions(self, values: Mapping[str, float | torch.Tensor], device: torch.device = CPU) -> torch.Tensor:
        """The atoms' places (n, 3) float64 [angstrom], differentiable in `values`, which are by parameter name."""
        if device not in self._tables:
            arrays = (self.specimen_at_rest.positions, self.modes, self.turning, self.hinges, self.axes)
            self._tables[device] = tuple(torch.from_numpy(array.copy()).to(device) for array in arrays)
        moved, modes, turning, hinges, axes = self._tables[device]
        for k, mode in enumerate(modes):
            moved = moved + mode * number(values[f"mode_angstrom[{k}]"], device)
        for j, (mask, point, axis) in enumerate(zip(turning, hinges, axes, strict=True)):
            angle = torch.deg2rad(number(values[f"domain_deg[{j}]"], device))
            arm = moved - point
            along = axis * (axis * arm).sum(dim=1, keepdim=True)
            # Rodrigues: the part along the axis stays, the other turns.
            turned = along + torch.cos(angle) * (arm - along) + torch.sin(angle) * torch.linalg.cross(axis, arm)
            moved = torch.where(mask[:, None], point + turned, moved)
        return moved

    def specimen(self, values: Mapping[str, float]) -> Specimen:
        """The deformed specimen; `values` by parameter name."""
        with torch.no_grad():
            return replace(self.specimen_at_rest, positions=self.positions(values).numpy().copy())

    def farthest(self, largest: Mapping[str, float]) -> Array:
        """By how much each atom can move at most (n,) [angstrom], at values up to `largest` in size, by name."""
        far = np.zeros(self.specimen_at_rest.num_atoms)
        for k, mode in enumerate(self.modes):
            far += largest[f"mode_angstrom[{k}]"] * np.linalg.norm(mode, axis=1)
        for j, mask in enumerate(self.turning):
            arm = self.specimen_at_rest.positions - self.hinges[j]
            distance = np.linalg.norm(np.cross(self.axes[j], arm), axis=1) + far
            chord = 2 * np.sin(np.deg2rad(min(largest[f"domain_deg[{j}]"], 180.0)) / 2)
            far += np.where(mask, chord * distance, 0.0)
        return far


def number(value: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A number as a 0-d tensor of float64; a tensor is on the device already."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


@lru_cache(maxsize=16)
def _motion(deformation: Deformation, specimen: Specimen) -> Motion:
    if not deformation.values:
        nothing = np.zeros((0, specimen.num_atoms, 3))
        return Motion(specimen, nothing, np.zeros(0), nothing[:, :, 0] > 0, nothing, nothing)
    residues = specimen.residues or Residues.single(specimen.num_atoms)
    copies = [np.flatnonzero(specimen.labels == label) for label in np.unique(specimen.labels)]
    first = copies[0]
    turns = [_frame(specimen.positions[first], specimen.positions[copy]) for copy in copies]
    n = specimen.num_atoms
    modes, eigenvalues = np.zeros((deformation.modes, n, 3)), np.zeros(deformation.modes)
    if deformation.modes:
        nodes = first[residues.nodes[first]]
        found = elastic_modes(specimen.positions[nodes], deformation.modes, deformation.cutoff_angstrom)
        place = np.zeros(int(residues.index.max()) + 1, dtype=np.int64)
        place[residues.index[nodes]] = np.arange(len(nodes))
        own = found.vectors[:, place[residues.index[first]]] * np.sqrt(len(nodes))
        for copy, (rotation, _) in zip(copies, turns, strict=True):
            modes[:, copy] = own @ rotation.T
        eigenvalues = found.eigenvalues
    domains = [d for d in deformation.domains if isinstance(d, Domain)]
    turning = np.zeros((len(domains), n), dtype=np.bool_)
    hinges, axes = np.zeros((len(domains), n, 3)), np.zeros((len(domains), n, 3))
    for j, domain in enumerate(domains):
        turning[j] = _selected(residues, domain, specimen.name)
        start, end = (_place(specimen, residues, first, place) for place in domain.hinge)
        length = float(np.linalg.norm(end - start))
        if not length > 1e-6:
            raise InputError(f"Expected a hinge through two different points, got {start.tolist()} twice.")
        for copy, (rotation, shift) in zip(copies, turns, strict=True):
            hinges[j, copy] = rotation @ start + shift
            axes[j, copy] = rotation @ ((end - start) / length)
    return Motion(specimen, modes, eigenvalues, turning, hinges, axes)


def _frame(reference: Array, copy: Array) -> tuple[Array, Array]:
    """The rigid motion x -> R x + t that brings the first copy onto another (Kabsch 1976, Acta Cryst. A32, 922)."""
    if copy is reference or np.array_equal(reference, copy):
        return np.eye(3), np.zeros(3)
    if reference.shape == copy.shape:
        middle, centre = reference.mean(axis=0), copy.mean(axis=0)
        with threadpool_limits(1):
            u, _, vt = np.linalg.svd((copy - centre).T @ (reference - middle))
        rotation = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
        shift = centre - rotation @ middle
        if np.abs(reference @ rotation.T + shift - copy).max() < 1e-6:
            return rotation, shift
    raise InputError("Expected copies of one rigid structure, got different ones. Deform before making a field.")


def _selected(residues: Residues, domain: Domain, name: str) -> NDArray[np.bool_]:
    mask = np.ones(len(residues.index), dtype=np.bool_)
    if domain.chain is not None:
        mask &= residues.chains == domain.chain
        if not mask.any():
            known = ", ".join(np.unique(residues.chains).tolist())
            raise InputError(f"Unknown chain {domain.chain!r} of {name}. Known chains: {known}.")
    if domain.residues is not None:
        numbers = residues.numbers[mask]
        mask &= (residues.numbers >= domain.residues[0]) & (residues.numbers <= domain.residues[1])
        if not mask.any():
            raise InputError(
                f"Expected residues {domain.residues[0]} to {domain.residues[1]} in {name}, found those from "
                f"{numbers.min()} to {numbers.max()}."
            )
    return mask


def _place(specimen: Specimen, residues: Residues, first: NDArray[np.int64], place: Place) -> Array:
    if len(place) == 3:
        return np.array(place, dtype=np.float64)
    chain, number = place
    here = first[(residues.chains[first] == chain) & (residues.numbers[first] == number) & residues.nodes[first]]
    if len(here) != 1:
        raise InputError(f"Expected one residue {number} of chain {chain!r} in {specimen.name}, found {len(here)}.")
    return np.asarray(specimen.positions[here[0]])
