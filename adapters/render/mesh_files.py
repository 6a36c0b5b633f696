"""Meshes from files: what trimesh reads, in the file's order, and cured of what its readers do not see.

Cured are text in other encodings, indices of OBJ files that count from the end, and faces of many corners, which
trimesh cuts into a fan from the first corner: that leaves a polygon which is not convex.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

_TEXT = ("obj", "off", "stl", "ply")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Face lines that trimesh would misread: indices of 0 or below, and other than three corners.
_UNUSUAL = re.compile(r"^f(?= |$)(?:.* -|.* 0+(?:[/ ]|$)|.*/-|(?: [^ \n]+){0,2} *$|(?: [^ \n]+){4})", re.MULTILINE)


def read_meshes(path: Path, trimesh: Any) -> list[Any]:
    """The triangle meshes of a file, placed, in the order in which the file has them.

    `metadata["object"]` of each is its name. Meshes of nothing but points or curves are left out.

    Raises:
        Exception: whatever trimesh's readers raise; ValueError where a face makes no sense.
    """
    kind = path.suffix[1:].lower()
    options: dict[str, Any] = {}
    source: Any = str(path)
    if kind in _TEXT:
        data = path.read_bytes()
        if kind == "obj":
            text = _cured_obj(decode(data))
            # What the file calls an object is one here, and each material within it.
            options["split_objects"] = re.search(r"^o ", text, re.MULTILINE) is not None
            data = text.encode()
        elif kind == "off":
            data = _cured_off(decode(data)).encode()
        else:
            data = _as_utf8(kind, data)
        source = io.BytesIO(data)
        source.name = path.name  # names a mesh without one
        options |= {"file_type": kind, "resolver": _resolver(path, trimesh)}
    if kind in ("glb", "gltf"):
        scene = trimesh.load_scene(source)
        nodes = _gltf_order(scene, path, trimesh)
    else:
        # trimesh drops faces with NaN as it tidies up: this must be looked at before.
        scene = trimesh.load_scene(source, process=False, **options)
        for mesh in scene.geometry.values():
            if isinstance(mesh, trimesh.Trimesh):
                if kind == "ply":
                    _cut_ply(mesh)
                check_vertices(mesh)
                mesh.process()
        nodes = list(scene.graph.nodes_geometry)
        if kind == "obj":
            nodes.reverse()  # its reader works through the file from the end
    meshes = placed_meshes(scene, nodes)
    for mesh in meshes:
        if mesh.metadata["object"] == path.name or re.fullmatch(r"geometry_\d+", mesh.metadata["object"]):
            mesh.metadata["object"] = path.stem
    return meshes


def placed_meshes(scene: Any, nodes: Sequence[Any]) -> list[Any]:
    """The geometries of a scene's nodes, in this order, placed and with their names."""
    placed = []
    for node in nodes:
        transform, geometry = scene.graph[node]
        mesh = scene.geometry[geometry].copy()
        if not hasattr(mesh, "faces"):
            continue
        mesh.apply_transform(transform)
        if np.allclose(transform, np.eye(4), rtol=0, atol=1e-8):  # trimesh then does nothing, whatever the unit is
            mesh.vertices = mesh.vertices @ transform[:3, :3].T + transform[:3, 3]
        # Several primitives of one glTF mesh hang on nodes that are named at random.
        parent = scene.graph.transforms.parents.get(node)
        random = node != geometry and re.fullmatch(rf"{re.escape(str(parent))}_[0-9A-Fa-f]{{6}}", str(node))
        mesh.metadata["object"] = str(geometry if random else node)
        placed.append(mesh)
    return placed


def check_vertices(mesh: Any) -> None:
    """Refuses faces that have no corners, or corners that are nowhere.

    Raises:
        ValueError: with what is wrong.
    """
    faces, count = np.asarray(mesh.faces), len(mesh.vertices)
    if not len(faces):
        return
    if faces.min() < 0 or faces.max() >= count:
        raise ValueError(f"expected faces between vertices 0 and {count - 1}, got {faces.min()} to {faces.max()}")
    bad = ~np.isfinite(mesh.vertices).all(axis=1)
    if bad.any() and bad[faces].any():
        number = int(bad[faces].any(axis=1).sum())
        raise ValueError(f"expected finite vertices, got NaN or infinity in {number} of {len(faces)} faces")


# --- text -----------------------------------------------------------------------------------------------------


def decode(data: bytes) -> str:
    """Text of any encoding, for the sake of its numbers: marked Unicode, UTF-8, or one byte a character."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data.decode(encoding)
    if b"\0" in data[:64]:  # UTF-16 without a mark, as every other byte of what is ASCII is 0
        return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _as_utf8(kind: str, data: bytes) -> bytes:
    """A file that is text, or has a text header, with nothing in it that is not UTF-8."""
    if kind == "ply" and not data.startswith(tuple(mark for mark, _ in _BOMS)):
        header, mark, body = data.partition(b"end_header")
        if b"format ascii" not in header:
            return decode(header).encode() + mark + body
    if kind == "stl":
        count = int.from_bytes(data[80:84], "little")
        if len(data) == 84 + 50 * count:
            return data
        words = decode(data).lower()
        if "facet" not in words:
            raise ValueError(f"expected text, or {84 + 50 * count} bytes for {count} triangles, got {len(data)} bytes")
        _check_stl(words)
    return decode(data).encode()


def _check_stl(words: str) -> None:
    """Refuses what trimesh would leave out without a word: faces with NaN, and a solid that does not end."""
    if re.search(r"^\s*vertex.*(?:nan|inf)", words, re.MULTILINE):
        raise ValueError("expected finite vertices, got NaN or infinity")
    facets, vertices, solids, ends = (
        len(re.findall(rf"^\s*{word}\b", words, re.MULTILINE)) for word in ("facet", "vertex", "solid", "endsolid")
    )
    if vertices != 3 * facets or solids != ends:
        raise ValueError(
            f"expected three corners in each of {facets} facets, and the end of each of {solids} solids, "
            f"got {vertices} and {ends}; the file may have been cut off"
        )


def _resolver(path: Path, trimesh: Any) -> Any:
    """trimesh's way to the files beside a mesh, where material libraries are in UTF-8."""
    base = trimesh.resolvers.FilePathResolver

    @final
    class Resolver(base):  # type: ignore[misc, valid-type]
        def get(self, name: str) -> bytes:
            data = super().get(name.strip())
            return decode(data).encode() if name.strip().lower().endswith(".mtl") else data

    return Resolver(str(path))


# --- OBJ ------------------------------------------------------------------------------------------------------


def _cured_obj(text: str) -> str:
    """An OBJ file with single spaces and without comments, and, where it needs that, faces of three positive indices.

    Raises:
        ValueError: a face with fewer than three corners, or of vertices that do not exist.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    # Only data go on in the next line: in some encodings a name may end with the byte of a backslash.
    text = re.sub(r"^[ \t]*[vflp](?:[^\n]*\\\n)+", lambda m: m[0].replace("\\\n", " "), text, flags=re.MULTILINE)
    text = re.sub(r"[ \t\\]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*([a-z_]+)[ \t]+", r"\1 ", text, flags=re.MULTILINE)
    if re.search(r"^[vf][^\n]*(?:[\t\f\v#]|  )", text, flags=re.MULTILINE):
        text = re.sub(r"^[vf].*$", lambda m: " ".join(m[0].partition("#")[0].split()), text, flags=re.MULTILINE)
    short = re.search(r"^v(?: [^ \n]+){0,2}$", text, flags=re.MULTILINE)
    if short:
        raise ValueError(f"expected vertices of three coordinates, got {short[0]!r}")
    if not _UNUSUAL.search(text):
        return text
    lines = text.split("\n")
    vertices = np.array([line.split()[1:4] for line in lines if line.startswith("v ")], dtype=np.float64)
    count = {"v": 0, "vt": 0, "vn": 0}
    places, faces = [], []
    for number, line in enumerate(lines):
        key, _, rest = line.partition(" ")
        if key in count:
            count[key] += 1
        elif key == "f":
            places.append(number)
            faces.append(_corners(rest.split(), count, len(vertices), number))
    corners = [np.array([corner[0] for corner in face]) - 1 for face in faces]
    cut = cut_polygons(vertices, corners)
    for number, face, triangles in zip(places, faces, cut, strict=True):
        words = ["/".join("" if index is None else str(index) for index in corner) for corner in face]
        lines[number] = "\n".join("f " + " ".join(words[i] for i in triangle) for triangle in triangles)
    return "\n".join(lines)


def _corners(words: list[str], count: dict[str, int], vertices: int, number: int) -> list[tuple[int | None, ...]]:
    """The corners of a face, (vertex, texture, normal) each, counted from 1; negative ones count from here back."""
    if len(words) < 3:
        raise ValueError(f"expected faces of three corners or more, got {' '.join(words)!r}")
    corners: list[tuple[int | None, ...]] = []
    for word in words:
        corner: list[int | None] = []
        for part, kind in zip(word.split("/"), count, strict=False):
            if part == "" and kind != "v":
                corner.append(None)
                continue
            index = int(part)
            index = index if index > 0 else count[kind] + 1 + index
            # Vertices may come after their faces; how many of the others there are does not matter here.
            if index < 1 or int(part) == 0 or (kind == "v" and index > vertices):
                raise ValueError(f"expected faces of existing corners, got {kind} {part} in {' '.join(words)!r}")
            corner.append(index)
        corners.append(tuple(corner))
    return corners


# --- polygons -------------------------------------------------------------------------------------------------


def cut_polygons(vertices: NDArray[np.float64], faces: Sequence[NDArray[Any]]) -> list[list[tuple[int, int, int]]]:
    """Triangles of each face, as numbers of its corners: a fan where that is right, else by ear clipping."""
    fans = {n: [(0, i, i + 1) for i in range(1, n - 1)] for n in {len(face) for face in faces}}
    cut = [fans[len(face)] for face in faces]
    lengths = np.array([len(face) for face in faces])
    for n in fans:
        if n < 4:
            continue
        which = np.flatnonzero(lengths == n)
        loops = vertices[np.stack([faces[i] for i in which])]
        for i in which[~_fans_fit(loops)]:
            cut[i] = _clip_ears(vertices[faces[i]])
    return cut


def _fans_fit(loops: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the polygons (m, n, 3) can be seen as a whole from their first corner: there the fan is right."""
    spokes = loops[:, 1:] - loops[:, :1]
    swept = np.cross(spokes[:, :-1], spokes[:, 1:])
    normal = swept.sum(axis=1, keepdims=True)
    # Each triangle turns as the whole does. The normal's length is an area, too: rounding is small against its square.
    return ((swept * normal).sum(axis=2) >= -1e-9 * (normal**2).sum(axis=2)).all(axis=1)


def _clip_ears(loop: NDArray[np.float64]) -> list[tuple[int, int, int]]:
    """Triangles of one simple polygon (n, 3) in space, in its own sense of turning; none where it has no area."""
    import mapbox_earcut

    edges = np.roll(loop, -1, axis=0) - loop
    normal = np.cross(loop - loop[0], edges).sum(axis=0)
    if not np.linalg.norm(normal) > 0:
        return []
    # Seen along the axis that the polygon faces most.
    axis = int(np.argmax(np.abs(normal)))
    plane = np.ascontiguousarray(np.delete(loop - loop[0], axis, axis=1))
    indices = mapbox_earcut.triangulate_float64(plane, np.array([len(loop)], dtype=np.uint32)).reshape(-1, 3)
    turned = np.cross(loop[indices[:, 1]] - loop[indices[:, 0]], loop[indices[:, 2]] - loop[indices[:, 0]]) @ normal
    indices[turned < 0] = indices[turned < 0][:, ::-1]
    return [(int(a), int(b), int(c)) for a, b, c in indices]


def _cured_off(text: str) -> str:
    """An OFF file of triangles alone, and as it was where it has no other faces."""
    head, mark, body = text.partition("OFF")
    lines = [line for line in re.sub(r"#.*", "", body).splitlines() if line.strip()]
    vertices, faces = map(int, lines[0].split()[:2])
    words = [line.split() for line in lines[1 + vertices : 1 + vertices + faces]]
    whole = sum(len(word) > int(word[0]) for word in words)
    if whole < faces or any(int(word[0]) < 3 for word in words):
        raise ValueError(
            f"expected {faces} faces of three corners or more, got {whole}; the file may have been cut off"
        )
    if all(word[0] == "3" for word in words):
        return text
    loops = [np.array(word[1 : 1 + int(word[0])], dtype=np.int64) for word in words]
    positions = np.array([line.split()[:3] for line in lines[1 : 1 + vertices]], dtype=np.float64)
    _check_range(loops, len(positions))
    cut = cut_polygons(positions, loops)
    triangles = [face[list(t)] for face, triangles in zip(loops, cut, strict=True) for t in triangles]
    body = [f"3 {a} {b} {c}" for a, b, c in triangles]
    return "\n".join([head + mark, f"{vertices} {len(body)} 0", *lines[1 : 1 + vertices], *body]) + "\n"


def _check_range(faces: Sequence[NDArray[Any]], count: int) -> None:
    used = np.concatenate(faces)
    if used.min() < 0 or used.max() >= count:
        raise ValueError(f"expected faces between vertices 0 and {count - 1}, got {used.min()} to {used.max()}")


def _ply_polygons(mesh: Any) -> list[NDArray[Any]]:
    """The faces of a PLY file, as trimesh keeps them beside its triangles; none where there are only triangles."""
    data = mesh.metadata.get("_ply_raw", {}).get("face", {}).get("data")
    if isinstance(data, np.ndarray) and data.dtype.names:
        names = [name for name in data.dtype.names if name in ("vertex_index", "vertex_indices")] or data.dtype.names
        data = data[names[0]]["f1"]
    elif isinstance(data, dict):
        data = next((data[name] for name in ("vertex_index", "vertex_indices") if name in data), None)
    if data is None or (isinstance(data, np.ndarray) and data.ndim == 2 and data.shape[1] == 3):
        return []
    return [np.asarray(face, dtype=np.int64).reshape(-1) for face in data]


def _cut_ply(mesh: Any) -> None:
    """Replaces trimesh's fans, where they are wrong, in a mesh that was read from a PLY file.

    Raises:
        ValueError: there are fewer vertices or faces than the file's head says.
    """
    for name, element in mesh.metadata.get("_ply_raw", {}).items():
        data = element.get("data")
        found = len(next(iter(data.values())) if isinstance(data, dict) else data) if data is not None else 0
        if name in ("vertex", "face") and found < element["length"]:
            said = f"expected {element['length']} lines of element {name}, got {found}"
            raise ValueError(f"{said}; the file may have been cut off")
    polygons = _ply_polygons(mesh)
    if any(len(polygon) < 3 for polygon in polygons):
        raise ValueError("expected faces of three corners or more, got one with fewer")
    if not any(len(polygon) > 3 for polygon in polygons):
        return
    vertices = np.asarray(mesh.vertices)
    _check_range(polygons, len(vertices))
    cut = cut_polygons(vertices, polygons)
    if any(len(triangles) != len(face) - 2 or triangles[0][0] for triangles, face in zip(cut, polygons, strict=True)):
        if mesh.metadata["_ply_raw"]["vertex"]["length"] != len(vertices):
            raise ValueError("expected triangles in a file with textures by face, got polygons that are not convex")
        triangles = [face[list(t)] for face, triangles in zip(polygons, cut, strict=True) for t in triangles]
        mesh.faces = np.array(triangles)


# --- glTF -----------------------------------------------------------------------------------------------------


def _gltf_order(scene: Any, path: Path, trimesh: Any) -> list[Any]:
    """The nodes of a scene that was read from a glTF file, in the order of the file's list of nodes."""
    data = path.read_bytes()
    if data[:4] == b"glTF":
        data = data[20 : 20 + int.from_bytes(data[12:16], "little")]
    header = json.loads(decode(data))
    place: dict[Any, int] = {}
    counts: dict[Any, int] = {}
    for i, node in enumerate(header.get("nodes", [])):  # named as trimesh does it
        if node.get("mesh", 0) >= max(len(header.get("meshes", [])), 1):
            raise ValueError(f"expected existing meshes, got number {node['mesh']} in node {i}")
        place[trimesh.util.unique_name(node.get("name", str(i)), place, counts=counts)] = i
    parents = scene.graph.transforms.parents
    geometries = {name: i for i, name in enumerate(scene.geometry)}

    def key(node: Any) -> tuple[int, int]:
        at = place.get(node, place.get(parents.get(node), len(place)))
        return at, geometries.get(scene.graph[node][1], 0)

    return sorted(scene.graph.nodes_geometry, key=key)
