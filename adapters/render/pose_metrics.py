"""How wrong a pose is: angles, translations, distances of model points, reprojection, overlap of masks.

Poses are rigid motions (..., 4, 4), object to camera, as `RasterSimulator.object_to_camera` gives them; leading axes
are batches that broadcast. Needs numpy and scipy alone. What cannot be a pose, a point or a mask, NaN among it, is an
`InputError` in every function; units are the caller's: poses and points in the same one, angles in degrees.

Reference: ADD and ADI are due to Hinterstoisser et al. (ACCV 2012); all are usual in the BOP benchmark of object poses
(Hodan et al., ECCV 2018).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import ConvexHull, QhullError, cKDTree

from adapters.render.cameras import Orthographic, Perspective, Pinhole, inverse_pose
from bridge.errors import InputError


def rotation_angle_deg(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Angle of the rotation that leads from one orientation to the other (the geodesic distance on SO(3)).

        2 asin(|R_1 - R_2|_F / (2 sqrt 2)),

    which keeps all digits at small angles, where acos((trace - 1) / 2) loses half of them.

    Args:
        first, second: (..., 3, 3) rotations, or (..., 4, 4) poses.

    Returns:
        (...) [deg], 0 to 180.

    Raises:
        InputError: not rotations.
    """
    a, b = _rotations(first), _rotations(second)
    _fit(a.shape[:-2], b.shape[:-2])
    chord = np.sqrt(((a - b) ** 2).sum(axis=(-2, -1)))
    return np.rad2deg(2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1)))


def axis_angle_deg(first: ArrayLike, second: ArrayLike, axis: ArrayLike) -> NDArray[np.float64]:
    """Angle between the directions in which two orientations turn an axis of the object.

    This is the smallest rotation angle between them for an object that looks alike however it is turned about the axis:
    min over phi of the angle of R_2^T R_1 R(axis, phi) is the angle between R_1 axis and R_2 axis.

    Args:
        first, second: (..., 3, 3) or (..., 4, 4).
        axis: (3,) in the object's coordinates.

    Returns:
        (...) [deg], 0 to 180.
    """
    u = _direction(axis)
    a, b = _rotations(first) @ u, _rotations(second) @ u
    _fit(a.shape[:-1], b.shape[:-1])
    # From the half angle's tangent, accurate for all angles: |a - b| / |a + b|.
    difference, total = np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1)
    return np.rad2deg(2 * np.arctan2(difference, total))


def direction_angle_deg(
    azimuth_deg: ArrayLike, elevation_deg: ArrayLike, true_azimuth_deg: ArrayLike, true_elevation_deg: ArrayLike
) -> NDArray[np.float64]:
    """Angle between two viewing directions of a turntable camera, (...) [deg]."""
    angles = (azimuth_deg, elevation_deg, true_azimuth_deg, true_elevation_deg)
    a, e, b, f = (np.deg2rad(_numbers("angles", angle)) for angle in angles)
    _fit(a.shape, e.shape, b.shape, f.shape)
    # The haversine: sin^2(angle / 2).
    half = np.sin((e - f) / 2) ** 2 + np.cos(e) * np.cos(f) * np.sin((a - b) / 2) ** 2
    return np.rad2deg(2 * np.arcsin(np.sqrt(np.clip(half, 0, 1))))


def translation_error(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """|t_1 - t_2| of poses (..., 4, 4), in their unit."""
    a, b = _poses(first), _poses(second)
    _fit(a.shape[:-2], b.shape[:-2])
    return np.linalg.norm(a[..., :3, 3] - b[..., :3, 3], axis=-1)


def add(points: ArrayLike, first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Average distance of model points: mean over x of |P_1 x - P_2 x|.

    A pose is commonly called correct where this is below a tenth of the object's diameter.

    Args:
        points: (n, 3) points of the object.
        first, second: (..., 4, 4) poses.

    Returns:
        (...) in the points' unit.
    """
    a, b = _poses(first), _poses(second)
    _fit(a.shape[:-2], b.shape[:-2])
    difference = _moved(points, a) - _moved(points, b)
    return np.linalg.norm(difference, axis=-1).mean(axis=-1)


def adi(points: ArrayLike, estimate: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Average distance to the nearest point, for objects with symmetries: mean over x of min over y |P x - P* y|.

    Args:
        points: (n, 3) points of the object.
        estimate, truth: (..., 4, 4) poses P and P*. The error is not symmetric in them.

    Returns:
        (...) in the points' unit. It underestimates errors of objects that are not symmetric.
    """
    x = _points(points)
    p, q = _poses(estimate), _poses(truth)
    _fit(p.shape[:-2], q.shape[:-2])
    p, q = np.broadcast_arrays(p, q)
    # Distances do not change under a common motion: one tree, of the points at rest, serves all poses.
    tree = cKDTree(x)
    relative = inverse_pose(q) @ p
    errors = [tree.query(_moved(x, motion))[0].mean() for motion in relative.reshape(-1, 4, 4)]
    return np.array(errors).reshape(p.shape[:-2])


def reprojection_error(
    points: ArrayLike, first: ArrayLike, second: ArrayLike, lens: ArrayLike | Pinhole
) -> NDArray[np.float64]:
    """Mean distance in the image between the projections of model points under two poses.

    Args:
        points: (n, 3) points of the object.
        first, second: (..., 4, 4) poses, object to camera; OpenGL axes, the camera looks along -z.
        lens: (f_x, f_y, c_x, c_y) [pixel], or a `Pinhole`.

    Returns:
        (...) [pixel].

    Raises:
        InputError: a point is not in front of the camera.
    """
    if isinstance(lens, Pinhole):
        lens = (lens.fx, lens.fy, lens.cx, lens.cy)
    elif isinstance(lens, Perspective | Orthographic):
        raise InputError(f"Expected lens as (fx, fy, cx, cy) or Pinhole, got {lens!r}, which knows no pixels.")
    numbers = _numbers("lens as (fx, fy, cx, cy)", lens)
    if numbers.shape != (4,) or not (numbers[:2] > 0).all():
        raise InputError(f"Expected lens as (fx, fy, cx, cy) with positive focal lengths, got {lens!r}.")
    poses = _poses(first), _poses(second)
    _fit(poses[0].shape[:-2], poses[1].shape[:-2])
    images = []
    for pose in poses:
        seen = _moved(points, pose)
        depth = -seen[..., 2:]
        if not (depth > 0).all():
            raise InputError("Expected all points in front of the camera (z < 0 in OpenGL axes), got some behind it.")
        images.append(seen[..., :2] / depth * numbers[:2])
    return np.linalg.norm(images[0] - images[1], axis=-1).mean(axis=-1)


def mask_iou(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of masks (..., height, width), sum min(p, t) / sum max(p, t); 1 where both are empty.

    Args:
        first, second: values in [0, 1]: silhouettes, or fractions of pixels.

    Raises:
        InputError: other values or NaN, sizes that differ.
    """
    p, t = _numbers("masks", first), _numbers("masks", second)
    if p.ndim < 2 or p.shape[-2:] != t.shape[-2:] or 0 in p.shape[-2:]:
        raise InputError(f"Expected masks (..., height, width) of one size, got {p.shape} and {t.shape}.")
    _fit(p.shape[:-2], t.shape[:-2])
    for mask in (p, t):
        if mask.size and (mask.min() < 0 or mask.max() > 1):
            raise InputError(
                f"Expected masks with values in [0, 1], got {mask.min():g} to {mask.max():g}. Divide images of bytes "
                "by 255; compare numbers of objects with one number (mask == 2)."
            )
    both = np.minimum(p, t).sum(axis=(-2, -1))
    either = np.maximum(p, t).sum(axis=(-2, -1))
    return np.where(either > 0, both / np.where(either > 0, either, 1), 1.0)


def diameter(points: ArrayLike) -> float:
    """Largest distance between two points (n, 3)."""
    x = _points(points)
    if len(x) > 16:
        with suppress(QhullError):  # flat or straight: all points are compared
            x = x[ConvexHull(x).vertices]
    return float(max(np.sqrt(((x - row) ** 2).sum(axis=1).max()) for row in x))


def _identity() -> NDArray[np.float64]:
    return np.eye(3)[None]


@final
@dataclass(frozen=True)
class Symmetry:
    """Rotations about the object's origin that leave it as it is.

    Args:
        rotations: (s, 3, 3) a finite group, the identity among them.
        axis: (3,) where given: any rotation about it is a symmetry as well.

    Raises:
        InputError: not rotations, not closed under products, or rotations that do not keep the axis (up to its sign).
    """

    rotations: NDArray[np.float64] = field(default_factory=_identity)
    axis: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        group = _rotations(self.rotations)
        if group.ndim != 3 or not len(group):
            raise InputError(f"Expected symmetries of shape (s, 3, 3), got {np.shape(self.rotations)}.")
        products = (group[:, None] @ group).reshape(-1, 1, 3, 3)
        if self.axis is None:
            distance = np.abs(products - group).max(axis=(-2, -1)).min(axis=1)
            if distance.max() > 1e-6 or np.abs(group - np.eye(3)).max(axis=(-2, -1)).min() > 1e-6:
                raise InputError(
                    "Expected a group of rotations, got a set that lacks the identity or products of its members."
                )
        else:
            u = _direction(self.axis)
            if np.abs(np.abs((group @ u) @ u) - 1).max() > 1e-6:
                raise InputError("Expected rotations that map the axis onto itself or its opposite, got others.")
            object.__setattr__(self, "axis", u)
        object.__setattr__(self, "rotations", group)

    @classmethod
    def cyclic(cls, order: int, axis: ArrayLike = (0.0, 1.0, 0.0)) -> Symmetry:
        """C_n: `order` turns about an axis."""
        return cls(_turns(axis, order))

    @classmethod
    def dihedral(cls, order: int, axis: ArrayLike, across: ArrayLike) -> Symmetry:
        """D_n: `order` turns about an axis, and half turns about `across`, which is perpendicular to it."""
        turns = _turns(axis, order)
        return cls(np.concatenate([turns, turns @ _turns(across, 2)[1]]))

    @classmethod
    def revolution(cls, axis: ArrayLike = (0.0, 1.0, 0.0), *, flip: bool = False) -> Symmetry:
        """Any turn about an axis; with `flip` also half turns across it, as of a cylinder."""
        u = _direction(axis)
        helper = np.eye(3)[int(np.argmin(np.abs(u)))]
        across = np.cross(u, helper)
        return cls(_turns(across, 2) if flip else _identity(), u)

    def rotation_angle_deg(self, estimate: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
        """min over symmetries S of the angle between R and R* S, (...) [deg]."""
        estimate, truth = _rotations(estimate), _rotations(truth)
        if self.axis is None:
            angles = [rotation_angle_deg(estimate, truth @ s) for s in self.rotations]
        else:
            angles = [axis_angle_deg(estimate, truth @ s, self.axis) for s in self.rotations]
        return np.min(angles, axis=0)

    def add(self, points: ArrayLike, estimate: ArrayLike, truth: ArrayLike, *, turns: int = 64) -> NDArray[np.float64]:
        """min over symmetries S of the mean over x of |P x - P* S x|; a continuous axis is tried at `turns` angles.

        The result is then too large by at most pi / turns times the points' mean distance from the axis.
        """
        truth = _poses(truth)
        along = _identity() if self.axis is None else _turns(self.axis, turns)
        smallest = None
        for s in self.rotations:
            for turn in along:
                motion = np.eye(4)
                motion[:3, :3] = s @ turn
                error = add(points, estimate, truth @ motion)
                smallest = error if smallest is None else np.minimum(smallest, error)
        assert smallest is not None
        return smallest


def _turns(axis: ArrayLike, order: int) -> NDArray[np.float64]:
    """(order, 3, 3): turns by 0, 360 / order, ... deg about an axis."""
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or order < 1:
        raise InputError(f"Expected a positive order of the symmetry as an integer, got {order!r}.")
    x, y, z = _direction(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = 2 * np.pi * np.arange(order)[:, None, None] / order
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def _direction(axis: ArrayLike) -> NDArray[np.float64]:
    u = _numbers("an axis", axis)
    length = np.linalg.norm(u)
    if u.shape != (3,) or not (np.isfinite(length) and length > 0):
        raise InputError(f"Expected an axis as three numbers, not all zero, got {axis!r}.")
    return u / length


def _numbers(what: str, value: ArrayLike) -> NDArray[np.float64]:
    if np.ma.is_masked(value):
        raise InputError(f"Expected {what} as plain numbers, got masked ones. Fill them, or leave them out.")
    if value is None or (isinstance(value, list | tuple) and any(v is None for v in value)):
        raise InputError(f"Expected {what} as real numbers, got None. A function without a return statement gives it.")
    try:
        array = np.asarray(value)
        array = array.astype(np.float64) if array.dtype.kind in "biufO" else array
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor with a gradient or on a device
        raise InputError(f"Expected {what} as real numbers, got {type(value).__name__}: {error}.") from error
    if array.dtype != np.float64:
        raise InputError(f"Expected {what} as real numbers, got dtype {array.dtype}.")
    if not np.isfinite(array).all():
        number = int(array.size - np.isfinite(array).sum())
        raise InputError(f"Expected {what} as finite numbers, got NaN or infinity in {number} of {array.size}.")
    return array


def _fit(*shapes: tuple[int, ...]) -> None:
    """Refuses batches that do not broadcast."""
    try:
        np.broadcast_shapes(*shapes)
    except ValueError as error:
        said = " and ".join(map(str, shapes))
        raise InputError(f"Expected batches that fit each other, got leading axes {said}.") from error


def _rotations(value: ArrayLike) -> NDArray[np.float64]:
    matrix = _numbers("rotations", value)
    if matrix.shape[-2:] == (4, 4):
        _check_last_row(matrix)
        matrix = matrix[..., :3, :3]
    if matrix.shape[-2:] != (3, 3):
        raise InputError(f"Expected rotations (..., 3, 3) or poses (..., 4, 4), got shape {matrix.shape}.")
    off = np.abs(matrix @ np.swapaxes(matrix, -1, -2) - np.eye(3)).max(initial=0)
    if off > 1e-5:
        raise InputError(
            f"Expected rotations (orthogonal, of determinant 1), got R R^T that is off the identity by {off:.2g}. Take "
            "scales out, and write rotations with six digits or more."
        )
    if not (np.linalg.det(matrix) > 0).all():
        raise InputError("Expected rotations (orthogonal, of determinant 1), got a mirror image of determinant -1.")
    return matrix


def _poses(value: ArrayLike) -> NDArray[np.float64]:
    pose = _numbers("poses", value)
    if pose.shape[-2:] != (4, 4):
        raise InputError(f"Expected poses (..., 4, 4), got shape {pose.shape}.")
    _rotations(pose)
    return pose


def _check_last_row(pose: NDArray[np.float64]) -> None:
    if np.abs(pose[..., 3, :] - [0, 0, 0, 1]).max(initial=0) > 1e-9:
        row = pose.reshape(-1, 4, 4)[:, 3]
        row = row[np.abs(row - [0, 0, 0, 1]).max(axis=1).argmax()]
        raise InputError(
            f"Expected poses with the last row 0 0 0 1, got {row.tolist()}. The translation belongs into the last "
            "column: transpose matrices that have it below."
        )


def _points(value: ArrayLike) -> NDArray[np.float64]:
    points = _numbers("points", value)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise InputError(f"Expected points (n, 3), at least one, got shape {points.shape}.")
    return points


def _moved(points: ArrayLike, pose: ArrayLike) -> NDArray[np.float64]:
    """(..., n, 3): points under poses."""
    motion = _poses(pose)
    return _points(points) @ np.swapaxes(motion[..., :3, :3], -1, -2) + motion[..., None, :3, 3]
