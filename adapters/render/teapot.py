"""The teapot of Martin Newell (1975), from its 32 bicubic Bezier patches.

Newell's control points are highly regular: body, rim, lid and bottom are profiles turned through four quarter
circles, handle and spout are two mirrored halves. So they are written here by their profiles, and the patches are made
from them.
Units and axes are Newell's: z up, spout towards +x, height 3.15.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# One row of a turned patch is (radius, middle, height): the quarter circle's control points are (radius, 0),
# (radius, middle), (middle, radius), (0, radius). Newell took middle = 0.56 radius (the knob's 0.45 is rounded).
_RIM = ((1.4, 0.784, 2.4), (1.3375, 0.749, 2.53125), (1.4375, 0.805, 2.53125), (1.5, 0.84, 2.4))
_UPPER_BODY = ((1.5, 0.84, 2.4), (1.75, 0.98, 1.875), (2.0, 1.12, 1.35), (2.0, 1.12, 0.9))
_LOWER_BODY = ((2.0, 1.12, 0.9), (2.0, 1.12, 0.45), (1.5, 0.84, 0.225), (1.5, 0.84, 0.15))
_KNOB = ((0.0, 0.0, 3.15), (0.8, 0.45, 3.15), (0.0, 0.0, 2.85), (0.2, 0.112, 2.7))
_LID = ((0.2, 0.112, 2.7), (0.4, 0.224, 2.55), (1.3, 0.728, 2.55), (1.3, 0.728, 2.4))
_BOTTOM = ((0.0, 0.0, 0.0), (1.425, 0.798, 0.0), (1.5, 0.84, 0.075), (1.5, 0.84, 0.15))

# One row of a mirrored patch is (x, z) of its first edge, (x, z) of its second edge, and the half width.
_UPPER_HANDLE = (
    (-1.6, 2.025, -1.5, 2.25, 0.3),
    (-2.3, 2.025, -2.5, 2.25, 0.3),
    (-2.7, 2.025, -3.0, 2.25, 0.3),
    (-2.7, 1.8, -3.0, 1.8, 0.3),
)
_LOWER_HANDLE = (
    (-2.7, 1.8, -3.0, 1.8, 0.3),
    (-2.7, 1.575, -3.0, 1.35, 0.3),
    (-2.5, 1.125, -2.65, 0.9375, 0.3),
    (-2.0, 0.9, -1.9, 0.6, 0.3),
)
_LOWER_SPOUT = (
    (1.7, 1.425, 1.7, 0.6, 0.66),
    (2.6, 1.425, 3.1, 0.825, 0.66),
    (2.3, 2.1, 2.4, 2.025, 0.25),
    (2.7, 2.4, 3.3, 2.4, 0.25),
)
_UPPER_SPOUT = (
    (2.7, 2.4, 3.3, 2.4, 0.25),
    (2.8, 2.475, 3.525, 2.49375, 0.25),
    (2.9, 2.475, 3.45, 2.5125, 0.15),
    (2.8, 2.4, 3.2, 2.4, 0.15),
)


def _turned(rows: tuple[tuple[float, float, float], ...], sense: int) -> list[NDArray[np.float64]]:
    """Four patches from a profile, turned clockwise (`sense=-1`) or anticlockwise (+1) seen from above."""
    quarter = np.array([[(r, 0.0, z), (r, sense * b, z), (b, sense * r, z), (0.0, sense * r, z)] for r, b, z in rows])
    turn = np.array([[0.0, -sense, 0.0], [sense, 0.0, 0.0], [0.0, 0.0, 1.0]])
    patches = [quarter]
    for _ in range(3):
        patches.append(patches[-1] @ turn.T)
    return patches


def _mirrored(rows: tuple[tuple[float, float, float, float, float], ...]) -> list[NDArray[np.float64]]:
    """Two patches, one on either side of the plane y = 0."""
    half = np.array([[(a, 0.0, b), (a, -w, b), (c, -w, d), (c, 0.0, d)] for a, b, c, d, w in rows])
    return [half, half[:, ::-1] * (1.0, -1.0, 1.0)]


def newell_patches() -> NDArray[np.float64]:
    """Control points of the 32 patches, (32, 4, 4, 3) float64: rim, body, handle, spout, lid, bottom."""
    patches = [p for rows in (_RIM, _UPPER_BODY, _LOWER_BODY) for p in _turned(rows, -1)]
    patches += [p for rows in (_UPPER_HANDLE, _LOWER_HANDLE, _LOWER_SPOUT, _UPPER_SPOUT) for p in _mirrored(rows)]
    patches += [p for rows in (_KNOB, _LID) for p in _turned(rows, -1)]
    patches += _turned(_BOTTOM, +1)
    return np.stack(patches)


def teapot_mesh(segments: int = 10) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Tessellates the teapot.

    S(u, v) = sum_ij B_i(u) B_j(v) P_ij with the cubic Bernstein polynomials B, on a grid of `segments` x `segments`
    cells a patch, two triangles a cell; triangles that degenerate at the poles are dropped.

    Args:
        segments: cells along a patch's edge; 10 gives 6,320 triangles, 6 about 2,200.

    Returns:
        vertices, (n, 3) float64, y up, spout towards +x; faces, (m, 3) int64, anticlockwise seen from outside. The
        surface is open: handle and spout pierce the body, the lid stands clear of the rim.
    """
    t = np.linspace(0.0, 1.0, segments + 1)
    bernstein = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    points = np.einsum("ui,vj,pijc->puvc", bernstein, bernstein, newell_patches()).reshape(-1, 3)
    # Rounding merges the seams of neighbouring patches (equal up to the last bits); + 0.0 turns -0 into 0.
    merged, index = np.unique(np.round(points, 9) + 0.0, axis=0, return_inverse=True)
    grid = index.reshape(-1, segments + 1, segments + 1)
    a, b, c, d = grid[:, :-1, :-1], grid[:, 1:, :-1], grid[:, 1:, 1:], grid[:, :-1, 1:]
    faces = np.concatenate([np.stack([a, c, b], -1).reshape(-1, 3), np.stack([a, d, c], -1).reshape(-1, 3)])
    degenerate = (faces[:, 0] == faces[:, 1]) | (faces[:, 1] == faces[:, 2]) | (faces[:, 2] == faces[:, 0])
    x, y, z = merged.T
    return np.stack([x, z, -y], axis=1), faces[~degenerate].astype(np.int64)
