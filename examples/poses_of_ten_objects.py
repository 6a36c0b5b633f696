"""Finds the poses of ten objects at once from one image with occlusion: 60 parameters, few renders.

    python examples/poses_of_ten_objects.py --seeds 0:4 --budget 1000
    python examples/poses_of_ten_objects.py --seeds 0:4 --budget 4000 --method cma     # or cma-separable, cma-local
    mpirun -n 2 python examples/poses_of_ten_objects.py --seeds 0:4             # ranks share the renders of smoothing

Ten solids of different shape and colour lie in a heap; some hide parts of others. Each is known by a rough pose, off by
20 to 35 degrees and by 15 to 30 % of its diameter, as a detector would give it. Wanted are its rotation within 5
degrees (up to its symmetry: a cone may be turned about its axis) and its position within 5 % of its diameter.

The image is an RGB-D camera's: colours with Lambert shading, and depth. Silhouettes would not do: in a heap they merge
into one. Colours tell which object is seen, depth and shading which way it is turned and how far away it is.

"smoothing" takes Gauss-Newton steps on the smoothed Jacobian while the scale falls. A render shows all objects, each in
its own part of the image, so that objects which do not touch are perturbed together and told apart by place: with c
colours of the graph of neighbours, a Jacobian of 60 columns costs 12 c renders, 24 to 48 for any number of objects
(Curtis, Powell and Reid's compression of sparse Jacobians). "cma" is CMA-ES on the loss of the image, "cma-separable"
its variant with a diagonal covariance, "cma-local" ten of them, one an object, which share each render and are told
the loss near their own object: it uses the same knowledge as smoothing does.

References: arXiv 2410.08125; Curtis, Powell and Reid, IMA J. Appl. Math. 13 (1974) 117; Hansen, arXiv 1604.00772.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

import bridge
from bridge import Parameter, ParameterSpace, PyrenderSimulator, RasterSimulator, cameras, pose_metrics, teapot

Array = NDArray[np.float64]
Poses = tuple[Array, Array]  # rotations (10, 3, 3) and positions (10, 3)

SIZE, POOL = 96, 3  # pixels, and pixels of a block whose mean enters the fit
DISTANCE, HALF_ANGLE_DEG = 6.0, 20.0
RADIUS = 0.5  # of every object's bounding sphere
WINDOW = 0.3  # around it, where the object is looked for
UNIT = np.array([10.0, 10.0, 10.0, 0.06, 0.06, 0.06])  # natural units of one object: deg, and 12 % of its radius
DEPTH_WEIGHT = 0.5  # colours are in [0, 1], depths differ by a few radii
SUCCESS_DEG, SUCCESS_SHARE = 5.0, 0.05

SCALES = (1.6, 0.15)  # of the smoothing, first and last [natural units]
STEPS = 16  # of Gauss-Newton from one start
POLISH_SCALES, POLISH_STEPS = (0.25, 0.05), 6  # of a turn of all objects; the next such turn has half the scales
FINEST = 0.25
DAMPING = (0.1, 0.002)  # of Gauss-Newton, as shares of a parameter's own curvature and of the mean one
LONGEST_STEP = 2.0  # of an object, in scales
ARRIVED = 0.01  # squared difference from the target, a pixel where the object is seen
CANDIDATES = 24  # poses that are tried for an object that went astray
SPREAD = 2.0  # their standard deviation around the rough pose [natural units]


# --- the objects ----------------------------------------------------------------------------------------------


def _bar(*boxes: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    """Boxes (extents, centre) side by side, as one mesh."""
    return trimesh.util.concatenate([trimesh.creation.box(e).apply_translation(c) for e, c in boxes])


def objects() -> list[tuple[str, Any, pose_metrics.Symmetry]]:
    """Name, mesh (centred, of radius `RADIUS`, coloured) and symmetry of the ten."""
    z, x = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)
    round_, both_ways = pose_metrics.Symmetry.revolution(z), pose_metrics.Symmetry.revolution(z, flip=True)
    boxlike = pose_metrics.Symmetry.dihedral(2, z, x)
    found = [
        ("teapot", teapot(3), pose_metrics.Symmetry()),
        ("brick", trimesh.creation.box((2.0, 1.4, 0.8)), boxlike),
        ("cylinder", trimesh.creation.cylinder(radius=0.5, height=1.6, sections=24), both_ways),
        ("cone", trimesh.creation.cone(radius=0.7, height=1.6, sections=24), round_),
        ("torus", trimesh.creation.torus(1.0, 0.35, major_sections=24, minor_sections=12), both_ways),
        ("hook", _bar(((0.5, 2, 0.5), (0, 0, 0)), ((0.9, 0.5, 0.5), (0.7, -0.75, 0))), pose_metrics.Symmetry()),
        ("stairs", _bar(*(((0.6, 0.6 * n, 1.0), (0.6 * n, 0.3 * n, 0)) for n in (1, 2, 3))), pose_metrics.Symmetry()),
        ("egg", trimesh.creation.icosphere(2).apply_scale([1.0, 0.65, 0.45]), boxlike),
        ("pill", trimesh.creation.capsule(height=1.4, radius=0.5, count=[16, 12]), both_ways),
        ("flag", _bar(((0.3, 2.4, 0.3), (0, 0, 0)), ((1.0, 0.7, 0.2), (0.6, 0.8, 0))), pose_metrics.Symmetry()),
    ]
    palette = [
        [0.9, 0.9, 0.9],
        [0.9, 0.2, 0.2],
        [0.2, 0.8, 0.2],
        [0.3, 0.4, 1.0],
        [0.9, 0.8, 0.1],
        [0.1, 0.8, 0.8],
        [0.9, 0.3, 0.9],
        [1.0, 0.55, 0.1],
        [0.55, 0.35, 0.2],
        [0.55, 0.6, 0.3],
    ]
    for (_, mesh, _), colour in zip(found, palette, strict=True):
        mesh.vertices -= mesh.bounds.mean(axis=0)
        mesh.vertices *= RADIUS / np.linalg.norm(mesh.vertices, axis=1).max()
        mesh.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(baseColorFactor=[*colour, 1.0], metallicFactor=0.0)
        )
    return found


# --- the task -------------------------------------------------------------------------------------------------


class Heap:
    """True poses, rough poses to start from, and renders that are counted; seed -> everything.

    A pose of all objects is (rotations (10, 3, 3), positions (10, 3)); moves are (k, 10, 6) rotation vectors [deg] and
    shifts in the camera's axes, applied from the left.
    """

    def __init__(self, seed: int, backend: str = "raster") -> None:
        self.names, meshes, self.symmetries = map(list, zip(*objects(), strict=True))
        self.count = len(meshes)
        self.diameters = np.array([pose_metrics.diameter(m.vertices) for m in meshes])
        options: dict[str, Any] = {
            "size": (SIZE, SIZE),
            "lens": HALF_ANGLE_DEG,
            "fixed": {"distance": DISTANCE},
            "normalise": False,
            "background_depth": DISTANCE + 1,
        }
        kind = {"raster": RasterSimulator, "pyrender": PyrenderSimulator}[backend]
        self.simulator = kind(meshes, outputs=("rgb", "depth", "mask"), vary="objects", **options)
        masks = RasterSimulator(meshes, outputs="mask", vary="objects", **options)
        rng = np.random.default_rng([17, seed])
        self.truth = self._heap(rng, masks)
        axis = rng.normal(size=(self.count, 6))
        axis[:, :3] *= (rng.uniform(20, 35, self.count) / np.linalg.norm(axis[:, :3], axis=1))[:, None]
        away = rng.uniform(0.15, 0.3, self.count) * self.diameters
        axis[:, 3:] *= (away / np.linalg.norm(axis[:, 3:], axis=1))[:, None]
        self.start = moved(self.truth, axis)
        self.target = self.images(parameters(*self.truth)[None])[0][0]
        self.renders = 0  # of a search, counted where it asks for them: ranks share them

    def _heap(self, rng: np.random.Generator, masks: Any) -> Poses:
        """Poses in which parts of some objects are hidden, but no more than half of any."""
        while True:
            positions = rng.uniform([-1.5, -1.5, -0.7], [1.5, 1.5, 0.7], (self.count, 3))
            gaps = np.linalg.norm(positions[:, None] - positions, axis=2) + 9 * np.eye(self.count)
            if gaps.min() < 0.75:
                continue
            turns = Rotation.random(self.count, rng=rng).as_matrix()
            together = parameters(turns, positions)
            # Alone: the others far away to the side.
            alone = np.tile(together.reshape(self.count, 6), (self.count, 1, 1))
            alone[~np.eye(self.count, dtype=bool), 3] += 40
            rows = np.concatenate([together[None], alone.reshape(self.count, -1)])
            seen = masks(rows, np.zeros(len(rows), np.uint64))[:, 0]
            share = np.array([(seen[0] == k + 1).sum() / (seen[k + 1] == k + 1).sum() for k in range(self.count)])
            if share.min() >= 0.5 and share.mean() <= 0.93:
                self.visible = share
                return turns, positions

    def images(self, rows: Array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(k, 4, 96, 96) colours and weighted depths, and (k, 96, 96) which object is seen, of (k, 60) parameters."""
        images = self.simulator(np.ascontiguousarray(rows), np.zeros(len(rows), np.uint64))
        images[:, 3] = (images[:, 3] - DISTANCE) * np.float32(DEPTH_WEIGHT)
        return images[:, :4], images[:, 4]

    def errors(self, poses: Poses) -> tuple[Array, Array]:
        """(10,) rotation errors, up to symmetry [deg]; (10,) distances as shares of the diameters."""
        turns = [s.rotation_angle_deg(a, b) for s, a, b in zip(self.symmetries, poses[0], self.truth[0], strict=True)]
        return np.array(turns), np.linalg.norm(poses[1] - self.truth[1], axis=1) / self.diameters

    def near(self, positions: Array, margin: float) -> NDArray[np.bool_]:
        """(10, 32, 32): the blocks of pixels that an object's bounding sphere may touch, with `margin` around it."""
        focal = SIZE / 2 / np.tan(np.deg2rad(HALF_ANGLE_DEG))
        depth = DISTANCE - positions[:, 2]
        column, row = SIZE / 2 + focal * positions[:, 0] / depth, SIZE / 2 - focal * positions[:, 1] / depth
        reach = focal * (RADIUS + margin) / (depth - RADIUS) + POOL
        centre = (np.arange(SIZE // POOL) + 0.5) * POOL
        across, down = centre - column[:, None], centre - row[:, None]
        return down[:, :, None] ** 2 + across[:, None, :] ** 2 < (reach**2)[:, None, None]


def parameters(turns: Array, positions: Array) -> Array:
    """(..., 60) parameters of the renderer for rotations (..., 10, 3, 3) and positions (..., 10, 3)."""
    vectors = Rotation.from_matrix(turns.reshape(-1, 3, 3)).as_rotvec(degrees=True).reshape(positions.shape)
    return np.concatenate([vectors, positions], axis=-1).reshape(*positions.shape[:-2], -1)


def moved(poses: Poses, moves: Array) -> Poses:
    """Poses after moves (..., 10, 6)."""
    return cameras.rotation_from_vector(np.deg2rad(moves[..., :3])) @ poses[0], poses[1] + moves[..., 3:]


def rows_of(poses: Poses, moves: Array) -> Array:
    """(k, 60) parameters of the renderer after moves (k, 10, 6)."""
    return parameters(*moved(poses, moves))


def pooled(images: NDArray[np.float32]) -> NDArray[np.float32]:
    total = sum(images[..., i::POOL, j::POOL] for i in range(POOL) for j in range(POOL))
    return np.asarray(total, dtype=np.float32) / np.float32(POOL**2)


# --- smoothing ------------------------------------------------------------------------------------------------


def colouring(near: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n,) colours 0, 1, ...: objects whose parts of the image overlap have different ones (greedy)."""
    flat = near.reshape(len(near), -1).astype(np.int64)
    touch = flat @ flat.T > 0
    colours = np.full(len(near), -1)
    for k in np.argsort(-touch.sum(axis=1), kind="stable"):
        taken = set(colours[touch[k]])
        colours[k] = next(c for c in range(len(near)) if c not in taken)
    return colours


@dataclass(frozen=True)
class Together:
    """The heap as a function of one move a colour, which all objects of that colour make: a `bridge.Simulator`.

    Objects of colour -1 stay.
    """

    heap: Heap
    poses: Poses
    colours: NDArray[np.int64]

    row_by_row = True
    output_shape = (4, SIZE // POOL, SIZE // POOL)

    @property
    def space(self) -> ParameterSpace:
        names = [(c, i) for c in range(self.colours.max() + 1) for i in range(6)]
        return ParameterSpace(tuple(Parameter(f"colour{c}_{i}", natural_scale=UNIT[i]) for c, i in names))

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        moves = np.zeros((len(inputs), self.heap.count, 6))
        moves[:, self.colours >= 0] = inputs.reshape(len(inputs), -1, 6)[:, self.colours[self.colours >= 0]]
        return pooled(self.heap.images(rows_of(self.poses, moves))[0])


class Search:
    """Gauss-Newton on smoothed Jacobians, within a budget of renders."""

    def __init__(self, heap: Heap, seed: int, budget: int) -> None:
        self.heap, self.seed, self.budget = heap, seed, budget
        self.step = 0
        self.target = pooled(heap.target[None])[0]
        self.windows = heap.near(heap.start[1], WINDOW)  # where an object is looked for

    def judge(self, poses: Poses, moves: Array) -> tuple[Array, Array]:
        """After moves (k, 10, 6): (k, 10) losses of the windows, and of the pixels where each object is seen."""
        self.heap.renders += len(moves)
        images, seen = self.heap.images(rows_of(poses, moves))
        difference = ((images - self.heap.target) ** 2).sum(axis=1)
        blocks = pooled(difference[:, None])[:, 0]
        windows = np.stack([blocks[:, window].mean(axis=1) for window in self.windows], axis=1)
        own = np.ones_like(windows)
        for k in range(self.heap.count):
            mine = seen == k + 1
            area = mine.sum(axis=(1, 2))
            own[area > 0, k] = ((difference * mine).sum(axis=(1, 2))[area > 0]) / area[area > 0]
        return windows, own

    def descend(self, poses: Poses, active: NDArray[np.bool_], steps: int, scales: tuple[float, float]) -> Poses:
        """Moves the active objects while the scale falls; stops early where the budget ends."""
        for i in range(steps):
            scale = scales[0] * (scales[1] / scales[0]) ** (i / max(steps - 1, 1))
            near = self.heap.near(poses[1], 3 * scale * UNIT[3])[active]
            colours = np.full(self.heap.count, -1)
            colours[active] = colouring(near)
            dimension = 6 * (int(colours.max()) + 1)
            # Pairs along orthogonal directions: the fewest renders that give all columns.
            cost = 2 * dimension
            if self.heap.renders + cost > self.budget:
                break
            smoothed = bridge.smooth(
                Together(self.heap, poses, colours),
                seed=self.seed,
                num_samples=cost,
                points="antithetic-orthogonal",
                on=bridge.Ranks(leaf_size=12),
            )
            estimate = smoothed.estimate(torch.zeros(dimension, dtype=torch.float64), step=self.step, scale=scale)
            residual = self.target - estimate.value.numpy()
            columns = estimate.jacobian().numpy().reshape(*residual.shape, -1, 6)[..., colours[active], :]
            # What an object does outside its own part of the image is another's of its colour.
            jacobian = (columns * near.transpose(1, 2, 0)[..., None] * UNIT).reshape(residual.size, -1)
            moves = np.zeros((self.heap.count, 6))
            moves[active] = gauss_newton(jacobian, residual.ravel()).reshape(-1, 6)
            moves *= np.minimum(1, LONGEST_STEP * scale / np.linalg.norm(moves, axis=1).clip(1e-12))[:, None]
            poses = moved(poses, UNIT * moves)
            self.heap.renders += cost
            self.step += 1
        return poses


def gauss_newton(jacobian: Array, residual: Array) -> Array:
    curvature = jacobian.T @ jacobian
    diagonal = np.diag(curvature)
    damping = DAMPING[0] * diagonal + DAMPING[1] * diagonal.mean() + 1e-12
    return np.linalg.solve(curvature + np.diag(damping), jacobian.T @ residual)


def chosen(mask: NDArray[np.bool_], these: Poses, those: Poses) -> Poses:
    """Of each object the pose in `these` where `mask` is true, else that in `those`."""
    return np.where(mask[:, None, None], these[0], those[0]), np.where(mask[:, None], these[1], those[1])


def smoothing(heap: Heap, seed: int, budget: int) -> Poses:
    """All objects from their rough poses; then, by turns, those that went astray from others, or all at small scales.

    What a turn finds is kept for the objects whose windows of the image it brings nearer to the target.
    """
    search, rng = Search(heap, seed, budget), np.random.default_rng([11, seed])
    everyone, still = np.ones(heap.count, dtype=bool), np.zeros((1, heap.count, 6))
    poses = search.descend(heap.start, everyone, STEPS, SCALES)
    reserve = POLISH_STEPS * heap.renders // STEPS  # for a last turn at small scales
    (windows,), (own,) = search.judge(poses, still)
    turn, finer = 0, 1.0
    while True:
        turn += 1
        left = budget - heap.renders - 2
        astray = own > ARRIVED
        if astray.any() and turn % 3 and left > CANDIDATES + 12 * STEPS + reserve:
            moves = np.zeros((CANDIDATES, heap.count, 6))
            moves[:, astray] = SPREAD * UNIT * rng.normal(size=(CANDIDATES, astray.sum(), 6))
            rough = chosen(astray, heap.start, poses)
            best = search.judge(rough, moves)[0].argmin(axis=0)  # one render tries a candidate of each
            tried = moved(rough, moves[best, np.arange(heap.count)])
            tried = search.descend(tried, astray, STEPS, SCALES)
        elif left > reserve:
            tried = search.descend(poses, everyone, POLISH_STEPS, (finer * POLISH_SCALES[0], finer * POLISH_SCALES[1]))
            finer = max(finer / 2, FINEST)
        else:
            return search.descend(poses, everyone, POLISH_STEPS, POLISH_SCALES) if left > reserve / 3 else poses
        (found,), _ = search.judge(tried, still)
        poses = chosen(found < windows, tried, poses)
        (windows,), (own,) = search.judge(poses, still)


# --- evolution ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of CMA-ES: population, and first step [natural units]."""

    popsize: int
    sigma: float


WHOLE, SEPARABLE, LOCAL = Settings(12, 0.3), Settings(24, 0.3), Settings(24, 0.3)


def differences(heap: Heap, moves: Array) -> Array:
    """(k, 32, 32) squared differences from the target after moves (k, 10, 6) from the start, in blocks of pixels."""
    heap.renders += len(moves)
    images, _ = heap.images(rows_of(heap.start, moves))
    return ((pooled(images) - pooled(heap.target[None])) ** 2).sum(axis=1, dtype=np.float64)


def strategy(size: int, settings: Settings, seed: list[int], separable: bool = False) -> Any:
    import cma

    options = {
        "popsize": settings.popsize,
        "seed": int(np.random.default_rng(seed).integers(1, 2**31)),
        "verbose": -9,
        "CMA_diagonal": separable,
        "tolfun": 1e-9,
        "tolx": 1e-3,
    }
    return cma.CMAEvolutionStrategy(np.zeros(size), settings.sigma, options)


def cma_es(heap: Heap, seed: int, budget: int, separable: bool = False) -> Poses:
    """CMA-ES on the loss of the whole image, from the rough poses; again from there where it stops early."""
    settings = SEPARABLE if separable else WHOLE
    best, best_loss, restart = np.zeros((heap.count, 6)), np.inf, 0
    while heap.renders + settings.popsize <= budget:
        search = strategy(6 * heap.count, settings, [13, seed, restart], separable)
        while not search.stop() and heap.renders + settings.popsize <= budget:
            asked = search.ask()
            moves = np.array(asked).reshape(-1, heap.count, 6) * UNIT
            losses = differences(heap, moves).mean(axis=(1, 2))
            search.tell(asked, losses.tolist())
            if losses.min() < best_loss:
                best, best_loss = moves[losses.argmin()], float(losses.min())
        restart += 1
    return moved(heap.start, best)


def cma_local(heap: Heap, seed: int, budget: int) -> Poses:
    """Ten searches that share each render; each is told the loss in its own object's window, and starts again alone."""
    near = heap.near(heap.start[1], WINDOW)
    restarts = np.zeros(heap.count, dtype=int)
    searches = [strategy(6, LOCAL, [13, seed, k, 0]) for k in range(heap.count)]
    best, best_loss = np.zeros((heap.count, 6)), np.full(heap.count, np.inf)
    while heap.renders + LOCAL.popsize <= budget:
        asked = [search.ask() for search in searches]
        moves = np.array(asked).transpose(1, 0, 2) * UNIT
        each = differences(heap, moves)
        for k, search in enumerate(searches):
            losses = each[:, near[k]].mean(axis=1)
            search.tell(asked[k], losses.tolist())
            if losses.min() < best_loss[k]:
                best[k], best_loss[k] = search.result.xfavorite * UNIT, losses.min()
            if search.stop():
                restarts[k] += 1
                searches[k] = strategy(6, LOCAL, [13, seed, k, int(restarts[k])])
    # Neighbours have moved since the best was found: where a search is still the first, its mean is newer.
    means = np.array([search.result.xfavorite for search in searches]) * UNIT
    return moved(heap.start, np.where((restarts == 0)[:, None], means, best))


# --- the comparison -------------------------------------------------------------------------------------------


METHODS: dict[str, Callable[[Heap, int, int], Poses]] = {
    "smoothing": smoothing,
    "cma": cma_es,
    "cma-separable": partial(cma_es, separable=True),
    "cma-local": cma_local,
}


@dataclass(frozen=True)
class Outcome:
    """What came out for one heap: errors of each object [deg; share of its diameter], and its poses."""

    seed: int
    renders: int
    angles_deg: list[float]
    shares: list[float]
    turns: list[Any]
    positions: list[Any]

    @property
    def found(self) -> list[bool]:
        pairs = zip(self.angles_deg, self.shares, strict=True)
        return [angle < SUCCESS_DEG and share < SUCCESS_SHARE for angle, share in pairs]


def solve(method: str, seed: int, budget: int, backend: str) -> Outcome:
    heap = Heap(seed, backend)
    poses = METHODS[method](heap, seed, budget)
    angles, shares = heap.errors(poses)
    return Outcome(seed, heap.renders, angles.tolist(), shares.tolist(), poses[0].tolist(), poses[1].tolist())


def summary(method: str, budget: int, outcomes: list[Outcome]) -> str:
    found = np.array([o.found for o in outcomes])
    error = found.mean(axis=1).std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
    angle, share = np.median([o.angles_deg for o in outcomes]), np.median([o.shares for o in outcomes])
    return (
        f"{method}, {budget} renders: {10 * found.mean():.2f} +- {10 * error:.2f} of 10 objects found, all ten in "
        f"{found.all(axis=1).sum()} of {len(found)} heaps; median errors {angle:.2f} deg and "
        f"{100 * share:.2f} % of the diameter"
    )


def draw(outcome: Outcome, path: Path) -> None:
    """Target, start, fit, and their difference; colours above, depths below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heap = Heap(outcome.seed)
    fit = np.array(outcome.turns), np.array(outcome.positions)
    images, _ = heap.images(np.stack([parameters(*heap.truth), parameters(*heap.start), parameters(*fit)]))
    colours, depths = images[:, :3].transpose(0, 2, 3, 1), images[:, 3] / DEPTH_WEIGHT
    figure, axes = pyplot.subplots(2, 4, figsize=(7.2, 3.9))
    titles = ("target", "start", f"fit: {sum(outcome.found)} of {heap.count}", "|fit - target|")
    for column, title in enumerate(titles):
        last = column == 3
        axes[0, column].imshow(np.abs(colours[2] - colours[0]) if last else colours[column])
        shown = np.abs(depths[2] - depths[0]) if last else -depths[column]
        axes[1, column].imshow(shown, cmap="gray", vmin=0 if last else -1.2, vmax=1.2)
        axes[0, column].set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("colour", fontsize=9)
    axes[1, 0].set_ylabel("depth", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", default="0:4", help="FIRST:END; the settings were tuned on seeds from 1000 on")
    options.add_argument("--budget", type=int, default=1000, help="renders a heap")
    options.add_argument("--method", choices=list(METHODS), default="smoothing")
    options.add_argument("--backend", choices=["raster", "pyrender"], default="raster")
    options.add_argument("--output", type=Path, help="write every outcome here (JSON)")
    options.add_argument("--picture", type=Path, help="draw the first heap here (PNG)")
    arguments = options.parse_args()
    first, _, end = arguments.seeds.partition(":")
    outcomes = [
        solve(arguments.method, seed, arguments.budget, arguments.backend) for seed in range(int(first), int(end))
    ]
    if not bridge.is_root():
        return
    print(summary(arguments.method, arguments.budget, outcomes))
    if arguments.output:
        arguments.output.write_text(json.dumps([vars(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(outcomes[0], arguments.picture)


if __name__ == "__main__":
    main()
