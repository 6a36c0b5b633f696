"""The rasteriser's inner loops, compiled by numba. Imported only when something is rendered.

Vertices are snapped to 1/256 of a pixel, as OpenGL implementations do, and edges are integers from there on: triangles
that share an edge neither leave a gap nor overlap, and nothing depends on the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_SUB = 256  # positions in a pixel
_HALF = _SUB // 2
_SHIFT = 8
# Triangles are cut where they leave a square of this half side [pixel]: products of edges then fit 64 bits.
_GUARD = float(2**20)
_MOST_CORNERS = 16  # of a triangle cut by five planes: eight


def _compiled(function: Callable[..., Any]) -> Any:
    """numba's compiler without Python objects or threads; what it makes is cached where that is possible.

    The cache lies beside this file, else in the user's cache directory; where neither can be written each process
    compiles anew.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function: no locator available"
        return numba.njit(**options)(function)


@_compiled
def _transform(positions, start, matrices, lens, perspective, near, camera, screen, visible):
    """Vertices to camera axes (x right, y up, z forward), and to snapped pixels; whether all of them are visible.

    Not visible are vertices in front of the near plane or too far from the image: triangles with one are clipped.
    """
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    px, py, pz = positions[0], positions[1], positions[2]
    out_x, out_y, out_z = camera[0], camera[1], camera[2]
    column, row = screen[0], screen[1]
    largest = _GUARD * _SUB
    hidden = 0
    for o in range(len(start) - 1):
        m = matrices[o]
        a00, a01, a02, a03 = m[0, 0], m[0, 1], m[0, 2], m[0, 3]
        a10, a11, a12, a13 = m[1, 0], m[1, 1], m[1, 2], m[1, 3]
        a20, a21, a22, a23 = -m[2, 0], -m[2, 1], -m[2, 2], -m[2, 3]
        for i in range(start[o], start[o + 1]):
            x = a00 * px[i] + a01 * py[i] + a02 * pz[i] + a03
            y = a10 * px[i] + a11 * py[i] + a12 * pz[i] + a13
            z = a20 * px[i] + a21 * py[i] + a22 * pz[i] + a23
            out_x[i], out_y[i], out_z[i] = x, y, z
            scale = 1.0 / z if perspective else 1.0
            u = (cx + fx * x * scale) * _SUB
            v = (cy - fy * y * scale) * _SUB
            # NaN and infinity (z = 0) fail these comparisons, and never become integers.
            seen = z >= near and abs(u) < largest and abs(v) < largest
            visible[i] = seen
            hidden += 1 - seen
            column[i] = np.int32(np.floor((u if seen else 0.0) + 0.5))
            row[i] = np.int32(np.floor((v if seen else 0.0) + 0.5))
    return hidden == 0


@_compiled
def _pixels(x0, y0, x1, y1, x2, y2, height, width):
    """First and last row and column of the pixels whose centres lie in the bounding box of snapped corners."""
    first_i = max((min(y0, y1, y2) + _HALF - 1) >> _SHIFT, 0)
    last_i = min((max(y0, y1, y2) - _HALF) >> _SHIFT, height - 1)
    first_j = max((min(x0, x1, x2) + _HALF - 1) >> _SHIFT, 0)
    last_j = min((max(x0, x1, x2) - _HALF) >> _SHIFT, width - 1)
    return first_i, last_i, first_j, last_j


@_compiled
def _edge(sign, px, py, qx, qy, x, y):
    """The edge from p to q at the pixel centre (x, y): its value, and its changes by a column and by a row.

    The value is twice the area of (p, q, centre), less one where the edge is not a top or left one, so that centres
    with three values of 0 or more belong to the triangle. `sign` is that of the triangle's area: rows grow downwards,
    and what is negative runs anticlockwise to the eye.
    """
    dx, dy = sign * (qx - px), sign * (qy - py)
    top_left = (dy < 0) | ((dy == 0) & (dx > 0))
    return dx * (y - py) - dy * (x - px), top_left - 1, -dy * _SUB, dx * _SUB


@_compiled
def _cover(x0, y0, x1, y1, x2, y2, cull, covered):
    """Sets the pixels of one triangle to 1; the corners are snapped."""
    height, width = covered.shape
    first_i, last_i, first_j, last_j = _pixels(x0, y0, x1, y1, x2, y2, height, width)
    if first_i > last_i or first_j > last_j:
        return
    if first_i == last_i and first_j == last_j and covered[first_i, first_j] != 0:
        return
    area = (x1 - x0) * (y2 - y0) - (y1 - y0) * (x2 - x0)
    if area == 0 or (cull and area > 0):
        return
    sign = np.int64(1) if area > 0 else np.int64(-1)
    x, y = first_j * _SUB + _HALF, first_i * _SUB + _HALF
    e0, bias0, right0, down0 = _edge(sign, x1, y1, x2, y2, x, y)
    e1, bias1, right1, down1 = _edge(sign, x2, y2, x0, y0, x, y)
    e2, bias2, right2, down2 = _edge(sign, x0, y0, x1, y1, x, y)
    e0, e1, e2 = e0 + bias0, e1 + bias1, e2 + bias2
    for i in range(first_i, last_i + 1):
        f0, f1, f2 = e0, e1, e2
        for j in range(first_j, last_j + 1):
            if (f0 | f1 | f2) >= 0:
                covered[np.uint64(i), np.uint64(j)] = 1.0
            f0, f1, f2 = f0 + right0, f1 + right1, f2 + right2
        e0, e1, e2 = e0 + down0, e1 + down1, e2 + down2


@_compiled
def _fill(x0, y0, q0, x1, y1, q1, x2, y2, q2, cull, face, best, owner):
    """Enters one triangle where it is nearer than what was there: q = 1/z or -z, which is linear on the screen."""
    height, width = best.shape
    first_i, last_i, first_j, last_j = _pixels(x0, y0, x1, y1, x2, y2, height, width)
    if first_i > last_i or first_j > last_j:
        return
    area = (x1 - x0) * (y2 - y0) - (y1 - y0) * (x2 - x0)
    if area == 0 or (cull and area > 0):
        return
    sign = np.int64(1) if area > 0 else np.int64(-1)
    x, y = first_j * _SUB + _HALF, first_i * _SUB + _HALF
    e0, bias0, right0, down0 = _edge(sign, x1, y1, x2, y2, x, y)
    e1, bias1, right1, down1 = _edge(sign, x2, y2, x0, y0, x, y)
    e2, bias2, right2, down2 = _edge(sign, x0, y0, x1, y1, x, y)
    # q is a plane over the pixels: its value at the first centre and its slopes.
    per_area = 1.0 / (sign * area)
    q = q0 + (e1 * (q1 - q0) + e2 * (q2 - q0)) * per_area
    q_right = (right1 * (q1 - q0) + right2 * (q2 - q0)) * per_area
    q_down = (down1 * (q1 - q0) + down2 * (q2 - q0)) * per_area
    e0, e1, e2 = e0 + bias0, e1 + bias1, e2 + bias2
    for i in range(first_i, last_i + 1):
        f0, f1, f2 = e0, e1, e2
        for j in range(first_j, last_j + 1):
            if (f0 | f1 | f2) >= 0:
                here = q + (i - first_i) * q_down + (j - first_j) * q_right
                if here > best[np.uint64(i), np.uint64(j)]:
                    best[np.uint64(i), np.uint64(j)] = here
                    owner[np.uint64(i), np.uint64(j)] = face
            f0, f1, f2 = f0 + right0, f1 + right1, f2 + right2
        e0, e1, e2 = e0 + down0, e1 + down1, e2 + down2


@_compiled
def _select(faces, screen, visible, all_visible, height, width, candidates):
    """Numbers of the faces whose bounding box holds a pixel's centre, and of those to be clipped; how many they are.

    Most faces of a fine mesh fall between the centres. Sorting them out first and without branches spares the processor
    a wrong guess at every other face.
    """
    column, row = screen[0], screen[1]
    count = 0
    for f in range(len(faces)):
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        x0, x1, x2, y0, y1, y2 = column[a], column[b], column[c], row[a], row[b], row[c]
        first_i = (min(y0, y1, y2) + np.int32(_HALF - 1)) >> np.int32(_SHIFT)
        last_i = (max(y0, y1, y2) - np.int32(_HALF)) >> np.int32(_SHIFT)
        first_j = (min(x0, x1, x2) + np.int32(_HALF - 1)) >> np.int32(_SHIFT)
        last_j = (max(x0, x1, x2) - np.int32(_HALF)) >> np.int32(_SHIFT)
        keep = (first_i <= last_i) & (first_j <= last_j) & (last_i >= 0) & (last_j >= 0)
        keep &= (first_i < height) & (first_j < width)
        if not all_visible:
            keep |= not (visible[a] and visible[b] and visible[c])
        candidates[count] = f
        count += np.int64(keep)
    return count


@_compiled
def _clip(a, b, c, camera, lens, perspective, near, polygon, other):
    """The part of a triangle beyond the near plane and within the guard band, as a polygon; its number of corners.

    Sutherland and Hodgman's algorithm, plane by plane. A cut edge is always followed from its visible end, so that the
    two triangles on either side of it are cut in the same point.
    """
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    count = 3
    for k in range(3):
        polygon[0, k], polygon[1, k], polygon[2, k] = camera[k, a], camera[k, b], camera[k, c]
    for plane in range(5):
        made = 0
        for n in range(count):
            x, y, z = polygon[n, 0], polygon[n, 1], polygon[n, 2]
            m = n + 1 if n + 1 < count else 0
            x_, y_, z_ = polygon[m, 0], polygon[m, 1], polygon[m, 2]
            w, w_ = (z, z_) if perspective else (1.0, 1.0)
            if plane == 0:
                here, there = z - near, z_ - near
            elif plane == 1:
                here, there = (_GUARD - cx) * w - fx * x, (_GUARD - cx) * w_ - fx * x_
            elif plane == 2:
                here, there = (_GUARD + cx) * w + fx * x, (_GUARD + cx) * w_ + fx * x_
            elif plane == 3:
                here, there = (_GUARD - cy) * w + fy * y, (_GUARD - cy) * w_ + fy * y_
            else:
                here, there = (_GUARD + cy) * w - fy * y, (_GUARD + cy) * w_ - fy * y_
            if here >= 0:
                other[made, 0], other[made, 1], other[made, 2] = x, y, z
                made += 1
            if (here >= 0) != (there >= 0):
                if here >= 0:
                    t = here / (here - there)
                    other[made, 0], other[made, 1], other[made, 2] = (
                        x + t * (x_ - x),
                        y + t * (y_ - y),
                        z + t * (z_ - z),
                    )
                else:
                    t = there / (there - here)
                    other[made, 0], other[made, 1], other[made, 2] = (
                        x_ + t * (x - x_),
                        y_ + t * (y - y_),
                        z_ + t * (z - z_),
                    )
                if plane == 0:
                    other[made, 2] = near
                made += 1
        count = made
        for n in range(count):
            polygon[n, 0], polygon[n, 1], polygon[n, 2] = other[n, 0], other[n, 1], other[n, 2]
        if count == 0:
            return 0
    return count


@_compiled
def _draw(
    faces,
    cull,
    camera,
    screen,
    visible,
    all_visible,
    lens,
    perspective,
    near,
    deep,
    covered,
    best,
    owner,
    candidates,
    polygon,
    other,
):
    """Draws all faces of one view: with `deep` into `best` and `owner` (see `_fill`), else into `covered`."""
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    column, row, depth = screen[0], screen[1], camera[2]
    height, width = best.shape if deep else covered.shape
    count = _select(faces, screen, visible, all_visible, height, width, candidates)
    for n in range(count):
        f = candidates[n]
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        if all_visible or (visible[a] and visible[b] and visible[c]):
            x0, y0 = np.int64(column[a]), np.int64(row[a])
            x1, y1 = np.int64(column[b]), np.int64(row[b])
            x2, y2 = np.int64(column[c]), np.int64(row[c])
            if not deep:
                _cover(x0, y0, x1, y1, x2, y2, cull, covered)
            elif perspective:
                q0, q1, q2 = 1.0 / depth[a], 1.0 / depth[b], 1.0 / depth[c]
                _fill(x0, y0, q0, x1, y1, q1, x2, y2, q2, cull, f, best, owner)
            else:
                _fill(x0, y0, -depth[a], x1, y1, -depth[b], x2, y2, -depth[c], cull, f, best, owner)
            continue
        corners = _clip(a, b, c, camera, lens, perspective, near, polygon, other)
        for m in range(corners):  # to pixels, in place
            x, y, z = polygon[m, 0], polygon[m, 1], polygon[m, 2]
            scale = 1.0 / z if perspective else 1.0
            polygon[m, 0] = np.floor((cx + fx * x * scale) * _SUB + 0.5)
            polygon[m, 1] = np.floor((cy - fy * y * scale) * _SUB + 0.5)
            polygon[m, 2] = scale if perspective else -z
        x0, y0 = np.int64(polygon[0, 0]), np.int64(polygon[0, 1])
        for m in range(1, corners - 1):
            x1, y1 = np.int64(polygon[m, 0]), np.int64(polygon[m, 1])
            x2, y2 = np.int64(polygon[m + 1, 0]), np.int64(polygon[m + 1, 1])
            if deep:
                q0, q1, q2 = polygon[0, 2], polygon[m, 2], polygon[m + 1, 2]
                _fill(x0, y0, q0, x1, y1, q1, x2, y2, q2, cull, f, best, owner)
            else:
                _cover(x0, y0, x1, y1, x2, y2, cull, covered)


@_compiled
def _weights(x, y, perspective, lens, a, b, c, camera):
    """Barycentric coordinates of the point of a face that is seen at (x, y) of the image, inside the face.

    The ray through the pixel, d, meets the plane of the corners A, B, C at weights proportional to det(d, B, C),
    det(d, C, A), det(d, A, B): no division by depth, so that corners behind the camera do no harm.
    """
    u, v = (x - lens[2]) / lens[0], (lens[3] - y) / lens[1]
    from_x, from_y = (0.0, 0.0) if perspective else (u, v)
    dx, dy = (u, v) if perspective else (0.0, 0.0)
    ax, ay, az = camera[0, a] - from_x, camera[1, a] - from_y, camera[2, a]
    bx, by, bz = camera[0, b] - from_x, camera[1, b] - from_y, camera[2, b]
    cx, cy, cz = camera[0, c] - from_x, camera[1, c] - from_y, camera[2, c]
    wa = dx * (by * cz - bz * cy) + dy * (bz * cx - bx * cz) + (bx * cy - by * cx)
    wb = dx * (cy * az - cz * ay) + dy * (cz * ax - cx * az) + (cx * ay - cy * ax)
    wc = dx * (ay * bz - az * by) + dy * (az * bx - ax * bz) + (ax * by - ay * bx)
    if wa + wb + wc < 0:
        wa, wb, wc = -wa, -wb, -wc
    # Snapping moves edges by up to 1/512 pixel, and a centre may lie that far outside.
    wa, wb, wc = max(wa, 0.0), max(wb, 0.0), max(wc, 0.0)
    total = wa + wb + wc
    if total == 0:
        return 1.0, 0.0, 0.0
    return wa / total, wb / total, wc / total


@_compiled
def _normal(wa, wb, wc, a, b, c, camera, normals, matrix):
    """The interpolated normal in camera axes (z backward), of length 1; the face's own where there is none."""
    x = wa * normals[a, 0] + wb * normals[b, 0] + wc * normals[c, 0]
    y = wa * normals[a, 1] + wb * normals[b, 1] + wc * normals[c, 1]
    z = wa * normals[a, 2] + wb * normals[b, 2] + wc * normals[c, 2]
    nx = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] * z
    ny = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] * z
    nz = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2] * z
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    if length < 1e-6:
        ux, uy, uz = camera[0, b] - camera[0, a], camera[1, b] - camera[1, a], camera[2, a] - camera[2, b]
        vx, vy, vz = camera[0, c] - camera[0, a], camera[1, c] - camera[1, a], camera[2, a] - camera[2, c]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        if length == 0:
            return 0.0, 0.0, 1.0
    return nx / length, ny / length, nz / length


@_compiled
def _shade(
    faces,
    face_object,
    normals,
    colours,
    camera,
    matrices,
    lens,
    perspective,
    best,
    owner,
    headlight,
    light,
    intensity,
    painted,
    factors,
    ambient,
    background,
    background_depth,
    silhouette,
    mask,
    depth,
    normal,
    rgb,
    rgba,
    image,
):
    """Fills the channels of one view from what is seen in each pixel; a channel number of -1 is not wanted."""
    height, width = best.shape
    for i in range(height):
        for j in range(width):
            f = owner[i, j]
            if f < 0:
                if silhouette >= 0:
                    image[silhouette, i, j] = 0
                if mask >= 0:
                    image[mask, i, j] = 0
                if depth >= 0:
                    image[depth, i, j] = background_depth
                for k in range(3):
                    if normal >= 0:
                        image[normal + k, i, j] = 0
                    if rgb >= 0:
                        image[rgb + k, i, j] = background[k]
                    if rgba >= 0:
                        image[rgba + k, i, j] = 0
                if rgba >= 0:
                    image[rgba + 3, i, j] = 0
                continue
            o = face_object[f]
            z = 1.0 / best[i, j] if perspective else -best[i, j]
            if silhouette >= 0:
                image[silhouette, i, j] = 1
            if mask >= 0:
                image[mask, i, j] = o + 1
            if depth >= 0:
                image[depth, i, j] = z
            if normal < 0 and rgb < 0 and rgba < 0:
                continue
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            x, y = j + 0.5, i + 0.5
            wa, wb, wc = _weights(x, y, perspective, lens, a, b, c, camera)
            nx, ny, nz = _normal(wa, wb, wc, a, b, c, camera, normals, matrices[o])
            # To the camera, and the side of the face that it sees.
            tx, ty, tz = 0.0, 0.0, 1.0
            if perspective:
                tx, ty = -(x - lens[2]) / lens[0], -(lens[3] - y) / lens[1]
                length = np.sqrt(tx * tx + ty * ty + 1.0)
                tx, ty, tz = tx / length, ty / length, 1.0 / length
            if nx * tx + ny * ty + nz * tz < 0:
                nx, ny, nz = -nx, -ny, -nz
            if normal >= 0:
                image[normal, i, j] = nx
                image[normal + 1, i, j] = ny
                image[normal + 2, i, j] = nz
            if rgb < 0 and rgba < 0:
                continue
            if headlight:
                cosine = nx * tx + ny * ty + nz * tz
            else:
                cosine = max(nx * light[0] + ny * light[1] + nz * light[2], 0.0)
            bright = ambient + (1 - ambient) * intensity * cosine
            for k in range(3):
                base = wa * colours[a, k] + wb * colours[b, k] + wc * colours[c, k]
                if painted:
                    base *= factors[o, k]
                value = min(base * bright, 1.0)
                if rgb >= 0:
                    image[rgb + k, i, j] = value
                if rgba >= 0:
                    image[rgba + k, i, j] = value
            if rgba >= 0:
                image[rgba + 3, i, j] = 1


@_compiled
def render(
    positions,
    start,
    normals,
    colours,
    faces,
    face_object,
    cull,
    matrices,
    lenses,
    perspective,
    nears,
    headlight,
    lights,
    intensities,
    painted,
    factors,
    ambient,
    background,
    background_depth,
    silhouette,
    mask,
    depth,
    normal,
    rgb,
    rgba,
    images,
):
    """Renders k views into `images` (k, channels, height, width) float32, which is filled throughout.

    Args:
        positions: (3, vertices) float64; normals, colours: (vertices, 3) float64.
        start: (objects + 1,) first vertex of each object.
        faces: (m, 3) int32; face_object: (m,) int32.
        cull: leave back faces out.
        matrices: (k, objects, 4, 4) object to camera, OpenGL axes; lenses: (k, 4) f_x, f_y, c_x, c_y.
        headlight: the light is at the camera's centre, and `lights` (k, 3) is not used.
        painted: multiply colours by `factors` (k, objects, 3).
        silhouette, ..., rgba: number of the first channel of each output, -1 where it is not wanted.
    """
    k, _, height, width = images.shape
    count = positions.shape[1]
    camera = np.empty((3, count), np.float64)
    screen = np.empty((2, count), np.int32)
    visible = np.empty(count, np.bool_)
    candidates = np.empty(len(faces), np.int32)
    polygon = np.empty((_MOST_CORNERS, 3), np.float64)
    other = np.empty((_MOST_CORNERS, 3), np.float64)
    deep = mask >= 0 or depth >= 0 or normal >= 0 or rgb >= 0 or rgba >= 0
    best = np.empty((height, width) if deep else (0, 0), np.float64)
    owner = np.empty((height, width) if deep else (0, 0), np.int32)
    for r in range(k):
        lens, near, image = lenses[r], nears[r], images[r]
        all_visible = _transform(positions, start, matrices[r], lens, perspective, near, camera, screen, visible)
        if deep:
            best[:] = -np.inf
            owner[:] = -1
        else:
            image[silhouette] = 0
        _draw(
            faces,
            cull,
            camera,
            screen,
            visible,
            all_visible,
            lens,
            perspective,
            near,
            deep,
            image[max(silhouette, 0)],
            best,
            owner,
            candidates,
            polygon,
            other,
        )
        if deep:
            _shade(
                faces,
                face_object,
                normals,
                colours,
                camera,
                matrices[r],
                lens,
                perspective,
                best,
                owner,
                headlight,
                lights[r],
                intensities[r],
                painted,
                factors[r],
                ambient,
                background,
                background_depth,
                silhouette,
                mask,
                depth,
                normal,
                rgb,
                rgba,
                image,
            )
