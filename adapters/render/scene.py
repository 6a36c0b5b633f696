"""What the rendering adapters draw: meshes read, checked and placed, and the images that are asked for.

Shared by the adapters that render, so that both see the same objects in the same place. Needs trimesh only when used.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adapters.render.mesh_files import check_vertices, placed_meshes, read_meshes
from adapters.render.teapot import teapot_mesh
from bridge.errors import InputError, SetupError

OutputName = Literal["silhouette", "mask", "depth", "normals", "rgb", "rgba"]
CHANNELS = {"silhouette": 1, "mask": 1, "depth": 1, "normals": 3, "rgb": 3, "rgba": 4}

AMBIENT = 0.2  # share of the light that comes from everywhere
_LARGEST_SIDE = 16384  # of an image, as OpenGL implementations have it
# Renderers compute squares of coordinates in single precision.
LARGEST_COORDINATE = 1e15


@dataclass(frozen=True)
class Scene:
    """Meshes by object, placed; an object moves and is labelled as one.

    Attributes:
        objects: the trimesh.Trimesh geometries of each object.
        names: of the objects, as their files or scenes call them; not always distinct.
        centres: (n, 3) centre of each object's bounding box.
        radii: (n,) largest distance of a vertex of an object from its centre.
        radius: largest distance of a vertex from the origin, which cameras look at.
    """

    objects: tuple[tuple[Any, ...], ...]
    names: tuple[str, ...]
    centres: NDArray[np.float64]
    radii: NDArray[np.float64]
    radius: float

    @property
    def num_faces(self) -> int:
        return sum(len(mesh.faces) for meshes in self.objects for mesh in meshes)


def load_scene(mesh: Any, *, normalise: bool, up: str) -> Scene:
    """Reads meshes, checks them, turns them y up, and centres and scales them if asked.

    Args:
        mesh: "teapot", a path, a trimesh.Trimesh, a trimesh.Scene, or a sequence of these. Each entry of a sequence is
            one object; in a single file or scene each geometry is.
        normalise: move the centre of the bounding box of all to the origin and scale the farthest vertex to distance 1.
        up: "y" or "z".

    Raises:
        InputError: what is to be drawn is unreadable, empty, not finite, of no size or far too large.
        SetupError: trimesh is missing.
    """
    if isinstance(mesh, list | tuple):
        if not mesh:
            raise InputError("Expected at least one mesh, got an empty list.")
        objects = [_geometries(entry) for entry in mesh]
        names = [_name(entry, meshes) for entry, meshes in zip(mesh, objects, strict=True)]
    else:
        objects = [[geometry] for geometry in _geometries(mesh)]
        names = [_name(mesh, meshes) for meshes in objects]
    if any(_see_through(g) for geometries in objects for g in geometries):
        warnings.warn(
            "Expected opaque surfaces, got alpha below 1: everything is drawn opaque. Leave parts out of the mesh that "
            "should not be seen.",
            RuntimeWarning,
            stacklevel=3,
        )
    radius = _place([g for geometries in objects for g in geometries], normalise=normalise, up=up)
    centres, radii = [], []
    for geometries in objects:
        for geometry in geometries:
            _give_normals(geometry)
        vertices = np.concatenate([g.vertices[np.unique(g.faces)] for g in geometries])
        centres.append((vertices.min(axis=0) + vertices.max(axis=0)) / 2)
        radii.append(np.linalg.norm(vertices - centres[-1], axis=1).max())
    return Scene(tuple(map(tuple, objects)), tuple(names), np.array(centres), np.array(radii), radius)


def _name(source: Any, meshes: list[Any]) -> str:
    """What an object is called: by its node where it is one, else by its file."""
    own = meshes[0].metadata.get("object") or meshes[0].metadata.get("name")
    if own and len(meshes) == 1:
        return str(own)
    if isinstance(source, str | os.PathLike):
        return Path(source).stem
    return str(own or type(source).__name__.lower())


def _geometries(mesh: Any) -> list[Any]:
    """Copies of all triangle meshes behind `mesh`, in one frame."""
    trimesh = import_trimesh()
    if isinstance(mesh, str) and mesh == "teapot":
        meshes, what = [teapot()], "the teapot"
    elif isinstance(mesh, str | os.PathLike):
        path = Path(mesh)
        if not path.is_file():
            raise InputError(f'Expected a mesh file or "teapot", got {str(mesh)!r}, which is not a file.')
        what = f"the file {str(path)!r}"
        try:
            meshes = read_meshes(path, trimesh)
        except Exception as error:  # readers of a dozen formats raise whatever they like
            said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError) and error.name == "charset_normalizer":
                said = "bytes that are no text"  # trimesh would guess at its encoding
            raise InputError(
                f"Expected a readable mesh file, got {str(path)!r}: {said.rstrip('.')}. Formats: GLB, OBJ, PLY, STL, "
                "...; try `trimesh.load_scene` on it, or repair it and export it anew."
            ) from error
    elif isinstance(mesh, trimesh.Scene):
        meshes, what = placed_meshes(mesh, list(mesh.graph.nodes_geometry)), "the scene"
    elif isinstance(mesh, trimesh.Trimesh):
        meshes, what = [mesh.copy()], "the mesh"
    else:
        raise InputError(
            f'Expected "teapot", a path, a trimesh.Trimesh or a trimesh.Scene as mesh, got {type(mesh).__name__}.'
        )
    meshes = [m for m in meshes if isinstance(m, trimesh.Trimesh) and len(m.faces)]
    if not meshes:
        raise InputError(f"Expected triangles, got none in {what}. Point clouds and curves cannot be rendered.")
    for m in meshes:
        try:
            check_vertices(m)
        except ValueError as error:
            raise InputError(f"{str(error).capitalize()} in {what}. Repair the mesh.") from error
        if not np.isfinite(m.vertices).all():  # of no face
            m.remove_unreferenced_vertices()
        material = getattr(m.visual, "material", None)
        if isinstance(material, trimesh.visual.material.MultiMaterial):
            m.visual.material = material.to_pbr()
    return meshes


def _give_normals(mesh: Any) -> None:
    """Gives normals to vertices whose faces' normals cancel: of a sheet with two sides, those of one of them."""
    normals, faces = np.array(mesh.vertex_normals), np.asarray(mesh.faces)
    none = np.linalg.norm(normals, axis=1) < 0.5
    if not none[faces].any():
        return
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    normals[none] = import_trimesh().Trimesh(mesh.vertices, faces[np.sort(first)], process=False).vertex_normals[none]
    # Else that of any of its faces; all to one side, as what is interpolated between opposite ones has no direction.
    none = np.linalg.norm(normals, axis=1) < 0.5
    one = mesh.face_normals * np.sign(mesh.face_normals.sum(axis=1, keepdims=True) + 1e-9)
    for corner in faces.T:
        which = none[corner] & (np.linalg.norm(one, axis=1) > 0.5)
        normals[corner[which]] = one[which]
    mesh.vertex_normals = normals


def _see_through(mesh: Any) -> bool:
    """Whether a mesh's colours, material or texture ask to be drawn transparent somewhere."""
    visual = mesh.visual
    if not visual.defined:
        return False
    if visual.kind in ("vertex", "face"):
        return bool((getattr(visual, f"{visual.kind}_colors")[:, 3] < 255).any())
    material = visual.material
    if getattr(material, "alphaMode", "BLEND") in (None, "OPAQUE"):
        return False  # glTF: alpha has no meaning then
    colour = getattr(material, "baseColorFactor", getattr(material, "diffuse", None))
    image = getattr(material, "baseColorTexture", getattr(material, "image", None))
    try:
        dissolve = float(np.ravel(getattr(material, "kwargs", {}).get("d", 1))[-1])  # of an OBJ's material
    except (ValueError, IndexError):
        dissolve = 1.0
    return bool(
        dissolve < 1
        or (colour is not None and len(colour) == 4 and colour[3] < 255)
        or (image is not None and "A" in image.getbands() and image.getchannel("A").getextrema()[0] < 255)
    )


def _place(meshes: list[Any], *, normalise: bool, up: str) -> float:
    """Turns the meshes y up, centres and scales them if asked; the radius about the origin."""
    transform = np.eye(4)
    if up == "z":
        transform[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    vertices = np.concatenate([m.vertices[np.unique(m.faces)] for m in meshes]) @ transform[:3, :3].T
    largest = float(np.abs(vertices).max())
    if largest > LARGEST_COORDINATE:
        raise InputError(
            f"Expected vertices with coordinates below {LARGEST_COORDINATE:g}, got {largest:g}. Choose a larger unit."
        )
    if normalise:
        centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
        vertices = vertices - centre
        scale = float(np.linalg.norm(vertices, axis=1).max())
        # Below this the vertices differ by rounding errors only.
        if not scale > 1e-12 * largest:
            raise InputError("Expected a mesh of positive size, got all vertices in one point. Check its units.")
        shift = np.eye(4)
        shift[:3, 3] = -centre
        transform = np.diag([1 / scale] * 3 + [1.0]) @ shift @ transform
        vertices = vertices / scale
    radius = float(np.linalg.norm(vertices, axis=1).max())
    if not radius > 0:
        raise InputError("Expected a mesh of positive size, got all vertices in the origin. Check its units.")
    for mesh in meshes:
        mesh.apply_transform(transform)
    return radius


def teapot(segments: int = 10) -> Any:
    """The Newell teapot as a `trimesh.Trimesh`: y up, spout towards +x, Newell's units; see `adapters.render.teapot`.

    Raises:
        InputError: fewer than one segment a patch.
        SetupError: trimesh is missing.
    """
    if segments < 1:
        raise InputError(f"Expected at least one segment a patch, got {segments}.")
    vertices, faces = teapot_mesh(segments)
    return import_trimesh().Trimesh(vertices, faces, process=False)


def import_trimesh() -> Any:
    try:
        import trimesh
    except ImportError as error:
        raise SetupError(
            f"Expected trimesh, but it cannot be imported: {error}. Install it: "
            '`pip install "simulation-bridge[render]"`.'
        ) from error
    return trimesh


def shared_options(
    size: Sequence[int], outputs: OutputName | Sequence[OutputName], antialias: int, up: str
) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Checks what every rendering adapter takes; (height, width) and the names of the outputs.

    Raises:
        InputError: unknown or repeated output, impossible size, unknown antialias or up.
    """
    names: tuple[str, ...] = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not names or len(set(names)) != len(names) or not set(names) <= set(CHANNELS):
        raise InputError(f"Expected distinct outputs among {', '.join(CHANNELS)}, got {outputs!r}.")
    among("antialias", antialias, (0, 4))
    among("up", up, ("y", "z"))
    if (
        not isinstance(size, Sequence | np.ndarray)
        or len(size) != 2
        or not all(isinstance(n, int | np.integer) and not isinstance(n, bool) and 0 < n <= _LARGEST_SIDE for n in size)
    ):
        raise InputError(f"Expected size=(height, width) as two positive integers up to {_LARGEST_SIDE}, got {size!r}.")
    return (int(size[0]), int(size[1])), names


def split_channels(names: tuple[str, ...], image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Views of each output's channels in an image of shape (channels, height, width)."""
    parts, first = {}, 0
    for name in names:
        parts[name] = image[first : first + CHANNELS[name]]
        first += CHANNELS[name]
    return parts


def among(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise InputError(f"Unknown {name}={value!r}. Known: {', '.join(map(str, known))}.")


def rgb_triple(name: str, value: Sequence[float]) -> tuple[float, float, float]:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (3,) or not ((array >= 0) & (array <= 1)).all():
        raise InputError(f"Expected {name} as three numbers in [0, 1], got {value!r}.")
    return (float(array[0]), float(array[1]), float(array[2]))
