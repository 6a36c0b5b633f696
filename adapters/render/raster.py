"""A rasteriser as a simulator: the images of `adapters.render.pyrender` without OpenGL, in any process and thread.

Importing this module needs numpy alone; a simulator loads trimesh when it is made and numba when it renders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.render import scene as scenes
from adapters.render.cameras import ViewModel, Views
from adapters.render.scene import CHANNELS, OutputName, Scene
from bridge.errors import SetupError

# Four points of a pixel, (x, y) from its upper left corner: where OpenGL implementations commonly have them.
_SAMPLES = ((0.375, 0.875), (0.875, 0.625), (0.125, 0.375), (0.625, 0.125))


@final
class RasterSimulator:
    """Images of meshes as a function of camera, objects, light and colours; a `bridge.Simulator`.

    The parameters and what they mean are `adapters.render.cameras.ViewModel`'s. Outputs are stacked along the channels
    in the
    order asked for, and never squeezed: (k, channels, height, width) float32, top row first.

    * "silhouette", 1 channel: 1 where an object covers the pixel's centre, else 0; a step function of the parameters.
      With `antialias=4` the covered fraction of four points a pixel.
    * "mask", 1 channel: the number of the object that is seen, 1, 2, ..., and 0 for none; never antialiased.
    * "depth", 1 channel: distance from the camera's plane along its axis, in the scene's (normalised) units;
      `background_depth` where there is nothing. Never antialiased.
    * "normals", 3 channels: unit normals in camera axes, turned to the camera; 0 where there is nothing. Never
      antialiased. Interpolated between vertices, as colours are shaded by them; a mesh coloured by face has flat ones.
    * "rgb", 3 channels in [0, 1]: colour (0.2 + 0.8 intensity max(0, n.l)), n the normal turned to the camera and l the
      direction to the light; not gamma-corrected. Textures are sampled at the vertices.
    * "rgba", 4 channels: the same on black (premultiplied), and the covered fraction. Surfaces are opaque: alpha of
      colours, materials and textures is left out, with a warning.

    Triangles are cut at the near plane, so that a camera may be close to an object or inside. Edges obey OpenGL's rules
    (centres, top-left, 1/256 pixel), so that silhouettes agree with pyrender's but for the odd pixel.

    Row i depends on `inputs[i]` alone, bit for bit, whatever the batch, thread or process; the seed is not used. One
    thread works; the interpreter's lock is released meanwhile.

    Args:
        mesh: "teapot", a path to a mesh file (GLB, OBJ, PLY, STL and what else trimesh reads), a trimesh.Trimesh or
            trimesh.Scene, or a list of these; copied. Each entry of a list is one object; in a single file or scene
            each geometry is, in the file's order (`object_names`).
        size: (height, width) [pixel].
        outputs: "silhouette", "mask", "depth", "normals", "rgb", "rgba": one name or several.
        camera, lens, vary, fixed, base_pose, inside: see `adapters.render.cameras.ViewModel`.
        antialias: 0, or 4 samples a pixel.
        colour: RGB in [0, 1] of meshes that bring none.
        background: RGB in [0, 1].
        background_depth: depth of pixels without object.
        normalise: move the centre of the bounding box to the origin and scale the farthest vertex to distance 1.
        up: axis of the mesh that points up, "y" (glTF) or "z" (many CAD files).
        two_sided: draw back faces too. False leaves them out, which is right where only closed bodies that are turned
            outside are seen, from outside.

    Raises:
        InputError: unknown option, unreadable mesh.
        SetupError: trimesh is missing; at the first call: numba is missing.
    """

    row_by_row = True

    def __init__(
        self,
        mesh: Any = "teapot",
        *,
        size: Sequence[int] = (64, 64),
        outputs: OutputName | Sequence[OutputName] = ("silhouette",),
        camera: Literal["turntable", "turntable-log", "se3"] = "turntable",
        lens: Any = None,
        vary: Sequence[str] | str = ("camera",),
        fixed: Mapping[str, float] | None = None,
        base_pose: ArrayLike | None = None,
        inside: Literal["render", "raise"] = "render",
        antialias: Literal[0, 4] = 0,
        colour: Sequence[float] = (0.8, 0.8, 0.8),
        background: Sequence[float] = (0.0, 0.0, 0.0),
        background_depth: float = 0.0,
        normalise: bool = True,
        up: Literal["y", "z"] = "y",
        two_sided: bool = True,
    ) -> None:
        self._size, self.outputs = scenes.shared_options(size, outputs, antialias, up)
        self._antialias = antialias
        self._background = np.array(scenes.rgb_triple("background", background))
        self._background_depth = float(background_depth)
        plain = scenes.rgb_triple("colour", colour)
        scene = scenes.load_scene(mesh, normalise=normalise, up=up)
        self._model = ViewModel(
            scene,
            self._size,
            camera=camera,
            lens=lens,
            vary=vary,
            fixed=fixed,
            base_pose=base_pose,
            inside=inside,
            colour=plain,
        )
        self._camera = camera
        self._num_faces, self._radius = scene.num_faces, scene.radius
        self._cull = not two_sided
        # Varied colours are factors on what a mesh brings; a mesh that brings none is white under them.
        self._geometry = _flatten(scene, (1.0, 1.0, 1.0) if self._model.paints else plain)
        self.space = self._model.space
        self.output_shape = (sum(CHANNELS[name] for name in self.outputs), *self._size)

    def __repr__(self) -> str:
        faces, camera = self._num_faces, self._camera
        return f"RasterSimulator({faces} faces, outputs={self.outputs}, size={self._size}, camera={camera!r})"

    @property
    def radius(self) -> float:
        """Largest distance of a vertex from the point that the camera looks at; 1 for a normalised mesh."""
        return self._radius

    @property
    def object_names(self) -> tuple[str, ...]:
        """What each object is called, by its node in a scene, or by its file: object0, ..., number 1, ... in masks."""
        return self._model.object_names

    def object_to_camera(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """(k, objects, 4, 4): from each object's placed coordinates to OpenGL camera axes, for pose metrics."""
        return self._model.object_to_camera(self._model.views(inputs))

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Renders k views.

        Args:
            inputs: (k, d) parameters, in the order of `space`.
            seeds: (k,), not used: rendering is deterministic.

        Returns:
            (k, channels, height, width) float32.

        Raises:
            InputError: parameters for which there is no image.
            SetupError: numba is missing.
        """
        views = self._model.views(inputs)
        images = np.empty((len(views), *self.output_shape), dtype=np.float32)
        if not len(views):
            return images
        smooth = [name for name in self.outputs if self._antialias and name in ("silhouette", "rgb", "rgba")]
        plain = [name for name in self.outputs if name not in smooth]
        if not smooth:
            self._render(views, self.outputs, (0.5, 0.5), images)
            return images
        parts = scenes.split_channels(self.outputs, images.swapaxes(0, 1))
        for names, samples in ((plain, ((0.5, 0.5),)), (smooth, _SAMPLES)):
            if names:
                channels = sum(CHANNELS[name] for name in names)
                part, mean = (np.zeros((len(views), channels, *self._size), dtype=np.float32) for _ in range(2))
                for sample in samples:
                    self._render(views, names, sample, part)
                    mean += part / np.float32(len(samples))
                for name, value in scenes.split_channels(tuple(names), mean.swapaxes(0, 1)).items():
                    parts[name][:] = value
        return images

    def _render(
        self, views: Views, names: Sequence[str], sample: tuple[float, float], images: NDArray[np.float32]
    ) -> None:
        """Renders views as seen in one point (x, y) of each pixel; (0.5, 0.5) is its centre."""
        lens = views.lens.copy()
        lens[:, 2:] += 0.5 - np.array(sample)
        first, number = {}, 0
        for name in names:
            first[name] = number
            number += CHANNELS[name]
        k = len(views)
        objects = len(self._geometry["start"]) - 1
        g = self._geometry
        _kernels().render(
            g["positions"],
            g["start"],
            g["normals"],
            g["colours"],
            g["faces"],
            g["face_object"],
            self._cull,
            # Copies: numba compiles anew for what cannot be written and for another order in memory.
            np.array(self._model.object_to_camera(views), order="C"),
            lens,
            views.perspective,
            views.near,
            views.light is None,
            np.zeros((k, 3)) if views.light is None else np.array(views.light, order="C"),
            views.intensity,
            views.colours is not None,
            np.ones((k, objects, 3)) if views.colours is None else np.array(views.colours, order="C"),
            scenes.AMBIENT,
            self._background,
            self._background_depth,
            *(first.get(name, -1) for name in ("silhouette", "mask", "depth", "normals", "rgb", "rgba")),
            images,
        )


def _kernels() -> Any:
    try:
        from adapters.render import raster_kernels
    except ImportError as error:
        raise SetupError(
            f"Expected numba, but it cannot be imported: {error}. Install it: "
            '`pip install "simulation-bridge[render]"`.'
        ) from error
    return raster_kernels


def _own_colours(mesh: Any) -> NDArray[np.float64]:
    """(n, 3) colours of vertices in [0, 1]: those that the mesh has, or its material's factor times its texture."""
    if mesh.visual.kind == "vertex":
        return mesh.visual.vertex_colors[:, :3] / 255.0
    trimesh = scenes.import_trimesh()
    material = mesh.visual.material
    if not isinstance(material, trimesh.visual.material.PBRMaterial):
        material = material.to_pbr()
    colours = np.ones((len(mesh.vertices), 3))
    if material.baseColorFactor is not None:
        colours *= trimesh.visual.color.to_rgba(material.baseColorFactor)[:3] / 255.0
    texture = material.to_color(mesh.visual.uv) if material.baseColorTexture is not None else None
    if texture is not None and np.ndim(texture) == 2:
        colours *= texture[:, :3] / 255.0
    return colours


def _flatten(scene: Scene, plain: tuple[float, float, float]) -> dict[str, NDArray[Any]]:
    """All vertices and faces of a scene in a few arrays, object after object."""
    positions, normals, colours, faces, face_object, start = [], [], [], [], [], [0]
    for number, meshes in enumerate(scene.objects):
        for mesh in meshes:
            first = sum(map(len, positions))
            own = mesh.visual.defined
            if own and mesh.visual.kind == "face":  # a colour a face needs vertices of its own
                corners = mesh.faces.reshape(-1)
                positions.append(mesh.vertices[corners])
                normals.append(np.repeat(mesh.face_normals, 3, axis=0))
                colours.append(np.repeat(mesh.visual.face_colors[:, :3] / 255.0, 3, axis=0))
                faces.append(first + np.arange(len(corners)).reshape(-1, 3))
            else:
                positions.append(np.asarray(mesh.vertices))
                normals.append(np.asarray(mesh.vertex_normals))
                if own:
                    colours.append(_own_colours(mesh))
                else:
                    colours.append(np.tile(plain, (len(mesh.vertices), 1)))
                faces.append(first + np.asarray(mesh.faces))
            face_object.append(np.full(len(mesh.faces), number))
        start.append(sum(map(len, positions)))
    return {
        "positions": np.ascontiguousarray(np.concatenate(positions).T, dtype=np.float64),
        "normals": np.ascontiguousarray(np.concatenate(normals), dtype=np.float64),
        "colours": np.ascontiguousarray(np.concatenate(colours), dtype=np.float64),
        "faces": np.ascontiguousarray(np.concatenate(faces), dtype=np.int32),
        "face_object": np.ascontiguousarray(np.concatenate(face_object), dtype=np.int32),
        "start": np.array(start, dtype=np.int64),
    }
