"""pyrender as a simulator: silhouettes, masks, depths, normals and colours of meshes.

Headless: EGL first, OSMesa second. Importing this module needs neither pyrender nor OpenGL; a simulator loads them
when it renders, in the process and thread that render. `adapters.render.raster` makes the same images without OpenGL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.render import pyrender_compat as compat
from adapters.render import scene as scenes
from adapters.render.cameras import ViewModel, Views
from adapters.render.scene import CHANNELS, OutputName, teapot

__all__ = ["PyrenderSimulator", "teapot"]

_BATCH = 64  # images that are converted together
# What to draw (see `pyrender_renderer`), samples a pixel, and what to read: GL's name, GL's type, pixels by row.
_Drawing = tuple[int, int, list[tuple[int, int, NDArray[Any]]]]


@final
class PyrenderSimulator:
    """Images of meshes as a function of camera, objects, light and colours; a `bridge.Simulator`.

    The parameters and what they mean are `adapters.render.cameras.ViewModel`'s. Outputs are stacked along the channels
    in the
    order asked for, and never squeezed: (k, channels, height, width) float32, top row first.

    * "silhouette", 1 channel: 1 where an object covers the pixel's centre, else 0; with `antialias=4` the covered
      fraction of four points. Any pixel is a step function of the parameters without antialiasing.
    * "mask", 1 channel: the number of the object that is seen, 1, 2, ..., and 0 for none; never antialiased.
    * "depth", 1 channel: distance from the camera's plane along its axis, in the scene's (normalised) units;
      `background_depth` where there is nothing. Never antialiased.
    * "normals", 3 channels: unit normals in camera axes, turned to the camera; 0 where there is nothing. Never
      antialiased. Interpolated between vertices; a mesh coloured by face has flat ones.
    * "rgb", 3 channels in [0, 1].
    * "rgba", 4 channels: the same on black (premultiplied), and the covered fraction. Surfaces are opaque: alpha of
      colours, materials and textures is left out, with a warning.

    Row i depends on `inputs[i]` alone, whatever the batch, thread or process; the seed is not used.

    Each thread of each process gets an OpenGL context of its own when it first renders, and holds it as current only
    during a call. Instances can be pickled, forked and spawned; the meshes travel along, the context does not.

    Where EGL lists hardware devices, each process takes one by its local rank (OMPI_COMM_WORLD_LOCAL_RANK,
    MPI_LOCALRANKID or SLURM_LOCALID; EGL_DEVICE_ID overrides), and warns where a software renderer answers all the
    same. This part is untested on hardware: it has been written from documentation, and run with software renderers
    only.

    Args:
        mesh: "teapot", a path to a mesh file (GLB, OBJ, PLY, STL and what else trimesh reads), a trimesh.Trimesh or
            trimesh.Scene, or a list of these; copied. Each entry of a list is one object; in a single file or scene
            each geometry is, in the file's order (`object_names`).
        size: (height, width) [pixel].
        outputs: "silhouette", "mask", "depth", "normals", "rgb", "rgba": one name or several.
        camera, lens, vary, fixed, base_pose, inside: see `adapters.render.cameras.ViewModel`.
        shading: of rgb: "lambert", colour (0.2 + 0.8 intensity max(0, n.l)) with the normal n turned to the camera and
            the direction l to the light, not gamma-corrected; or "pbr" (pyrender's own; slower).
        antialias: 0, or 4 samples a pixel for silhouette, rgb and rgba.
        colour: RGB in [0, 1] of meshes that bring none.
        background: RGB in [0, 1].
        background_depth: depth of pixels without object.
        normalise: move the centre of the bounding box to the origin and scale the farthest vertex to distance 1.
        up: axis of the mesh that points up, "y" (glTF) or "z" (many CAD files).
        two_sided: draw back faces too. False leaves them out, which is right where only closed bodies that are turned
            outside are seen, from outside.
        platform: "auto", "egl" or "osmesa"; PYOPENGL_PLATFORM is honoured under "auto".
        device: number of the GPU among EGL's hardware devices; by default by local rank.

    Raises:
        InputError: unknown option, unreadable mesh.
        SetupError: trimesh is missing; at the first call: pyrender or a usable OpenGL is missing.
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
        shading: Literal["lambert", "pbr"] = "lambert",
        antialias: Literal[0, 4] = 0,
        colour: Sequence[float] = (0.8, 0.8, 0.8),
        background: Sequence[float] = (0.0, 0.0, 0.0),
        background_depth: float = 0.0,
        normalise: bool = True,
        up: Literal["y", "z"] = "y",
        two_sided: bool = True,
        platform: Literal["auto", "egl", "osmesa"] = "auto",
        device: int | None = None,
    ) -> None:
        self._size, self.outputs = scenes.shared_options(size, outputs, antialias, up)
        scenes.among("shading", shading, ("lambert", "pbr"))
        scenes.among("platform", platform, ("auto", "egl", "osmesa"))
        self._shading = shading
        self._antialias = antialias
        self._colour = scenes.rgb_triple("colour", colour)
        self._background = scenes.rgb_triple("background", background)
        self._background_depth = float(background_depth)
        self._platform = platform
        self._device = device
        self._scene = scenes.load_scene(mesh, normalise=normalise, up=up)
        self._two_sided = bool(two_sided)
        self._camera = camera
        self._model = ViewModel(
            self._scene,
            self._size,
            camera=camera,
            lens=lens,
            vary=vary,
            fixed=fixed,
            base_pose=base_pose,
            inside=inside,
            colour=self._colour,
        )
        self.space = self._model.space
        self.output_shape = (sum(CHANNELS[name] for name in self.outputs), *self._size)
        self._local = threading.local()

    @property
    def identity_parts(self) -> dict[str, Any]:
        """What images depend on: not on which GPU draws them."""
        return {name: value for name, value in self.__getstate__().items() if name != "_device"}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __repr__(self) -> str:
        faces, camera = self._scene.num_faces, self._camera
        return f"PyrenderSimulator({faces} faces, outputs={self.outputs}, size={self._size}, camera={camera!r})"

    @property
    def radius(self) -> float:
        """Largest distance of a vertex from the point that the camera looks at; 1 for a normalised mesh."""
        return self._scene.radius

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
            SetupError: pyrender or a usable OpenGL is missing.
        """
        views = self._model.views(inputs)
        images = np.empty((len(views), *self.output_shape), dtype=np.float32)
        if not len(views):
            return images
        to_camera, projections = self._from_centres(views), _projections(views, self._size)
        with self._session() as session:
            for start in range(0, len(views), _BATCH):
                rows = range(start, min(start + _BATCH, len(views)))
                drawings, pixels = self._plan(len(rows))
                for i, row in enumerate(rows):
                    self._arrange(session, views, row, to_camera[row], projections[row])
                    self._render(session, drawings, i)
                self._compose(pixels, views, slice(rows.start, rows.stop), images[rows.start : rows.stop])
        return images

    def opengl(self) -> str:
        """Platform and renderer that answer in this process, such as "egl: llvmpipe (LLVM 15.0.6, 256 bits)"."""
        session = self._session()
        return f"{compat.choose_platform(self._platform)}: {session.gl_renderer}"

    def _session(self) -> Any:
        """This thread's session; a new one in a new thread, and in a forked child."""
        session = self._local.__dict__.get("session")
        if session is not None and session.pid == os.getpid():
            return session
        compat.load(self._platform)
        from adapters.render.pyrender_renderer import Session, abandon

        if session is not None:
            abandon(session)
        session = Session(
            compat.choose_platform(self._platform),
            self._device,
            self._size,
            self._build_scene,
            lambert=self._shading == "lambert",
            two_sided=self._two_sided,
        )
        if self._device is None and self._platform != "osmesa":
            compat.warn_of_software(session.gl_renderer)
        self._local.session = session
        return session

    def _build_scene(self) -> Any:
        """A pyrender scene (meshes, a camera, a light that moves with the camera), and what it holds of each object."""
        import pyrender

        from adapters.render.pyrender_renderer import Drawn
        from adapters.render.pyrender_renderer import Scene as DrawnScene

        # 3 is pyrender's customary intensity.
        scene = DrawnScene(bg_color=[*self._background, 0.0], ambient_light=[scenes.AMBIENT] * 3)
        objects = []
        for meshes, centre in zip(self._scene.objects, self._scene.centres, strict=True):
            nodes, materials = [], []
            # Varied colours are factors on what a mesh brings; one that brings none is white under them.
            base = (1.0, 1.0, 1.0) if self._model.paints else self._colour
            plain = pyrender.MetallicRoughnessMaterial(
                baseColorFactor=[*base, 1.0], metallicFactor=0.0, roughnessFactor=0.8
            )
            for mesh in meshes:
                own = mesh.visual.defined
                smooth = not (own and mesh.visual.kind == "face")  # a colour a face needs vertices of its own
                # trimesh leaves out translations that it thinks small.
                centred = mesh.copy()
                centred.vertices = mesh.vertices - centre
                centred.vertex_normals = mesh.vertex_normals
                drawn = pyrender.Mesh.from_trimesh(centred, material=None if own else plain, smooth=smooth)
                for primitive in drawn.primitives:
                    primitive.material.doubleSided = False  # decided for all outputs alike, in the renderer
                    primitive.material.alphaMode = "OPAQUE"  # pyrender blends by default
                    factor = np.array(primitive.material.baseColorFactor, dtype=np.float64)
                    materials.append((primitive.material, factor))
                nodes.append(scene.add(drawn))
            objects.append(Drawn(tuple(nodes), tuple(materials)))
        scene.main_camera_node = scene.add(pyrender.PerspectiveCamera(yfov=1.0))
        if self._shading == "pbr":
            scene.add(pyrender.DirectionalLight(intensity=3.0), parent_node=scene.main_camera_node)
        return scene, objects

    def _from_centres(self, views: Views) -> NDArray[np.float64]:
        """(k, objects, 4, 4): from axes about each object's centre, which OpenGL holds, to camera axes."""
        poses = np.array(self._model.object_to_camera(views))
        poses[..., :3, 3] += (poses[..., :3, :3] @ self._scene.centres[..., None])[..., 0]
        return poses

    def _arrange(
        self, session: Any, views: Views, row: int, to_camera: NDArray[np.float64], projection: NDArray[np.float64]
    ) -> None:
        """Puts objects, light and colours where one row wants them, seen from the camera."""
        scene = session.scene
        for drawn, pose in zip(session.objects, to_camera, strict=True):
            for node in drawn.nodes:
                scene.poses[node] = pose
        if views.colours is not None:
            for drawn, colour in zip(session.objects, views.colours[row], strict=True):
                for material, factor in drawn.materials:
                    material.baseColorFactor = factor * [*colour, 1.0]
        light = None
        if views.light is not None:
            light = np.append(views.light[row], views.intensity[row])
            for node in scene.light_nodes:
                scene.set_pose(node, _towards(views.light[row]))
                node.light.intensity = 3.0 * views.intensity[row]
        session.renderer.look(projection, light)

    def _plan(self, k: int) -> tuple[list[_Drawing], dict[str, NDArray[Any]]]:
        """What is drawn and read for each of k rows, and the pixels of all rows, bottom row first, by what they say."""
        from OpenGL import GL

        from adapters.render.pyrender_renderer import COLOUR, DEPTH, NORMALS, SEGMENTATION

        drawings: list[_Drawing] = []
        pixels: dict[str, NDArray[Any]] = {}
        wanted = set(self.outputs)

        def read(name: str, what: int, number: int, dtype: Any, *channels: int) -> tuple[int, int, NDArray[Any]]:
            pixels[name] = np.empty((k, *self._size, *channels), dtype=dtype)
            return int(what), int(number), pixels[name]

        depth = ("depth", GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT, np.float32)
        if wanted & {"rgb", "rgba"}:
            reads = [read("colour", GL.GL_RGB, GL.GL_UNSIGNED_BYTE, np.uint8, 3)]
            # Without antialiasing one drawing serves all outputs.
            if not self._antialias and wanted & {"depth", "silhouette", "rgba"}:
                reads.append(read(*depth))
            drawings.append((COLOUR, self._antialias, reads))
        if "depth" in wanted and "depth" not in pixels:
            drawings.append((DEPTH, 0, [read(*depth)]))
        if "mask" in wanted:
            drawings.append((SEGMENTATION, 0, [read("ids", GL.GL_RGB, GL.GL_UNSIGNED_BYTE, np.uint8, 3)]))
        if "normals" in wanted:
            drawings.append((NORMALS, 0, [read("normals", GL.GL_RGBA, GL.GL_FLOAT, np.float32, 4)]))
        if wanted & {"silhouette", "rgba"} and ("depth" not in pixels or self._antialias):
            reads = [read("covered", GL.GL_RED, GL.GL_UNSIGNED_BYTE, np.uint8)]
            drawings.append((SEGMENTATION, self._antialias, reads))
        return drawings, pixels

    def _render(self, session: Any, drawings: list[_Drawing], i: int) -> None:
        """Draws what is arranged, and reads it as row i."""
        for kind, samples, reads in drawings:
            session.renderer.draw(session.scene, kind, samples, session.nodes)
            for what, number, into in reads:
                session.renderer.read(what, number, into[i])

    def _compose(self, pixels: dict[str, NDArray[Any]], views: Views, rows: slice, images: NDArray[np.float32]) -> None:
        """The outputs of all rows from what was read, top row first."""
        channel = scenes.split_channels(self.outputs, images.swapaxes(0, 1))  # name -> (channels, rows, height, width)
        if "depth" in channel:
            z = np.full(pixels["depth"].shape, self._background_depth, np.float32)
            for buffer, near, far, flat in zip(pixels["depth"], views.near[rows], views.far[rows], z, strict=True):
                seen = np.flatnonzero(buffer)  # a part of the pixels; the others hold the background
                value = buffer.take(seen).astype(np.float64)
                flat.put(seen, near / value if views.perspective else far - value * (far - near))
            channel["depth"][0] = z[:, ::-1]
        pixels = {name: buffer[:, ::-1] for name, buffer in pixels.items()}
        byte = np.float32(255)
        if "mask" in channel:
            ids = pixels["ids"]
            np.add(ids[..., 1], ids[..., 2] * np.float32(256), out=channel["mask"][0])
        if "normals" in channel:
            vectors = np.moveaxis(pixels["normals"], -1, 0)
            channel["normals"][:] = np.where(vectors[3] > 0, vectors[:3], 0)
        if "covered" in pixels:
            alpha = pixels["covered"] / byte
        elif "depth" in pixels:
            alpha = np.float32(pixels["depth"] > 0)
        if "silhouette" in channel:
            channel["silhouette"][0] = alpha
        if "colour" in pixels:
            colour = np.moveaxis(pixels["colour"], -1, 0)
            if "rgb" in channel:
                np.divide(colour, byte, out=channel["rgb"])
            if "rgba" in channel:
                behind = (1 - alpha) * np.float32(self._background).reshape(3, 1, 1, 1)
                channel["rgba"][:3] = np.where(alpha > 0, np.maximum(colour / byte - behind, 0), 0)
                channel["rgba"][3] = alpha


def _projections(views: Views, size: tuple[int, int]) -> NDArray[np.float64]:
    """(k, 4, 4): camera axes to OpenGL's clip coordinates, so that pixels are where `Views.lens` says."""
    height, width = size
    fx, fy, cx, cy = views.lens.T
    near, far = views.near, views.far
    matrix = np.zeros((len(views), 4, 4))
    matrix[:, 0, 0], matrix[:, 1, 1] = 2 * fx / width, 2 * fy / height
    # Depth is near / z, or falls from 1 to 0 between the planes.
    if views.perspective:
        matrix[:, 0, 2], matrix[:, 1, 2] = 1 - 2 * cx / width, 2 * cy / height - 1
        matrix[:, 2, 3] = near
        matrix[:, 3, 2] = -1
    else:
        matrix[:, 0, 3], matrix[:, 1, 3] = 2 * cx / width - 1, 1 - 2 * cy / height
        matrix[:, 2, 2], matrix[:, 2, 3] = 1 / (far - near), far / (far - near)
        matrix[:, 3, 3] = 1
    return matrix


def _towards(direction: NDArray[np.float64]) -> NDArray[np.float64]:
    """A pose, (4, 4), whose +z is `direction`: pyrender's lights shine along their -z."""
    helper = np.eye(3)[int(np.argmin(np.abs(direction)))]
    right = np.cross(helper, direction)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(direction, right), direction], axis=1)
    return pose
