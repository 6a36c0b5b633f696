"""pyrender as a simulator: a mesh seen by a turntable camera, as silhouette, depth and colour images.

Headless: EGL first, OSMesa second. Importing this module needs neither pyrender nor OpenGL; a simulator loads them
when it renders, in the process and thread that render.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from adapters import _pyrender_compat as compat
from adapters._teapot import teapot_mesh
from bridge.errors import InputError, SetupError
from bridge.simulator import Parameter, ParameterSpace

OutputName = Literal["silhouette", "depth", "rgb"]
CHANNELS = {"silhouette": 1, "depth": 1, "rgb": 3}


def teapot(segments: int = 10) -> Any:
    """The Newell teapot as a `trimesh.Trimesh`: y up, spout towards +x, Newell's units; see `adapters._teapot`."""
    if segments < 1:
        raise InputError(f"Expected at least one segment a patch, got {segments}.")
    vertices, faces = teapot_mesh(segments)
    return _trimesh().Trimesh(vertices, faces, process=False)


def turntable_space(camera: str, radius: float) -> ParameterSpace:
    """The parameters of a camera on a turntable around an object of the given radius; see `PyrenderSimulator`.

    Raises:
        InputError: unknown camera.
    """
    elevation = Parameter("elevation_deg", "deg", natural_scale=10.0, description="camera above the horizon")
    azimuth = Parameter("azimuth_deg", "deg", natural_scale=10.0, description="camera turned about the vertical")
    if camera == "turntable":
        distance = Parameter("distance", "", 0.05 * radius, 200 * radius, 0.6 * radius, description="of the camera")
        half_angle = Parameter("half_angle_deg", "deg", 0.5, 85.0, 2.5, description="half the vertical angle of view")
        return ParameterSpace((azimuth, elevation, distance, half_angle))
    if camera == "turntable-log":
        size = np.log(radius)
        height = Parameter(
            "log_half_height", "", size - 5, size + 5, 0.15, description="log of half the height seen at the object"
        )
        log_distance = Parameter("log_distance", "", size - 3, size + 5.3, 0.15, description="log of the distance")
        return ParameterSpace((height, elevation, azimuth, log_distance))
    raise InputError(f"Unknown camera {camera!r}. Known: turntable, turntable-log.")


def _turntable_pose(azimuth_deg: float, elevation_deg: float, distance: float) -> NDArray[np.float64]:
    """Camera to world, (4, 4): R_y(azimuth) R_x(-elevation) after a step of `distance` back along +z.

    Written out, so that no elevation is singular: beyond 90 deg the camera goes over the top and hangs upside down.
    """
    ca, sa = np.cos(np.deg2rad(azimuth_deg)), np.sin(np.deg2rad(azimuth_deg))
    ce, se = np.cos(np.deg2rad(elevation_deg)), np.sin(np.deg2rad(elevation_deg))
    right, up, back = (ca, 0.0, -sa), (-sa * se, ce, -ca * se), (sa * ce, se, ca * ce)
    pose = np.eye(4)
    pose[:3, :3] = np.array([right, up, back]).T
    pose[:3, 3] = distance * pose[:3, 2]
    return pose


@final
class PyrenderSimulator:
    """Images of a mesh as a function of the camera; a `bridge.Simulator`.

    Camera "turntable", parameters (azimuth_deg, elevation_deg, distance, half_angle_deg): the camera looks at the
    centre of the object from `distance` (sin a cos e, sin e, cos a cos e), y up: at azimuth 0 it stands on +z with +x
    to its right; a growing azimuth moves it towards +x, so that what is in front moves to the left of the image; a
    growing elevation raises it. `half_angle_deg` is half the vertical angle of view. Camera "turntable-log", parameters
    (log_half_height, elevation_deg, azimuth_deg, log_distance) with log_half_height = log(distance tan(half angle)),
    separates apparent size from perspective; searches for a pose succeed more often in it.

    Outputs are stacked along the channels in the order asked for, and never squeezed: (k, channels, height, width)
    float32, top row first.

    * "silhouette", 1 channel: 1 where the object covers the pixel's centre, else 0; with `antialias=4` the covered
      fraction of four points. Any pixel is a step function of the parameters without antialiasing.
    * "depth", 1 channel: distance from the camera's plane along its axis, in the object's (normalised) units;
      `background_depth` where there is nothing. Never antialiased.
    * "rgb", 3 channels in [0, 1].

    Row i depends on `inputs[i]` alone, whatever the batch, thread or process; the seed is not used.

    Each thread of each process gets an OpenGL context of its own when it first renders, and holds it as current only
    during a call. Instances can be pickled, forked and spawned; the mesh travels along, the context does not.

    Where EGL lists hardware devices, each process takes one by its local rank (OMPI_COMM_WORLD_LOCAL_RANK,
    MPI_LOCALRANKID or SLURM_LOCALID; EGL_DEVICE_ID overrides). This part is untested on hardware: it has been written
    from documentation, and run with software renderers only.

    Args:
        mesh: "teapot", a path to a mesh file (GLB, OBJ, PLY, STL and what else trimesh reads), or a trimesh.Trimesh or
            trimesh.Scene; copied.
        size: (height, width) [pixel].
        outputs: "silhouette", "depth", "rgb": one name or several.
        camera: "turntable" or "turntable-log".
        shading: of rgb: "lambert" (light at the camera, both sides of a face alike; colours are not gamma-corrected) or
            "pbr" (pyrender's own, with a directional light from the camera; slower).
        antialias: 0, or 4 samples a pixel for silhouette and rgb.
        colour: RGB in [0, 1] of meshes that bring none.
        background: RGB in [0, 1].
        background_depth: depth of pixels without object.
        normalise: move the centre of the bounding box to the origin and scale the farthest vertex to distance 1.
        up: axis of the mesh that points up, "y" (glTF) or "z" (many CAD files).
        two_sided: draw back faces too; by default exactly when a mesh is not closed, where they can be seen.
        platform: "auto", "egl" or "osmesa"; PYOPENGL_PLATFORM is honoured under "auto".
        device: number of the GPU among EGL's hardware devices; by default by local rank.

    Raises:
        InputError: unknown option, unreadable mesh.
        SetupError: trimesh is missing; at the first call: pyrender or a usable OpenGL is missing.
    """

    def __init__(
        self,
        mesh: Any = "teapot",
        *,
        size: Sequence[int] = (64, 64),
        outputs: OutputName | Sequence[OutputName] = ("silhouette",),
        camera: Literal["turntable", "turntable-log"] = "turntable",
        shading: Literal["lambert", "pbr"] = "lambert",
        antialias: Literal[0, 4] = 0,
        colour: Sequence[float] = (0.8, 0.8, 0.8),
        background: Sequence[float] = (0.0, 0.0, 0.0),
        background_depth: float = 0.0,
        normalise: bool = True,
        up: Literal["y", "z"] = "y",
        two_sided: bool | None = None,
        platform: Literal["auto", "egl", "osmesa"] = "auto",
        device: int | None = None,
    ) -> None:
        self.outputs: tuple[str, ...] = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        if not self.outputs or len(set(self.outputs)) != len(self.outputs) or not set(self.outputs) <= set(CHANNELS):
            raise InputError(f"Expected distinct outputs among {', '.join(CHANNELS)}, got {outputs!r}.")
        _among("shading", shading, ("lambert", "pbr"))
        _among("antialias", antialias, (0, 4))
        _among("up", up, ("y", "z"))
        _among("platform", platform, ("auto", "egl", "osmesa"))
        if len(size) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in size):
            raise InputError(f"Expected size=(height, width) as two positive integers, got {size!r}.")
        self._size = (int(size[0]), int(size[1]))
        self._shading = shading
        self._antialias = antialias
        self._colour = _rgb("colour", colour)
        self._background = _rgb("background", background)
        self._background_depth = float(background_depth)
        self._platform = platform
        self._device = device
        self._meshes = _load_meshes(mesh)
        self._radius = _place(self._meshes, normalise=normalise, up=up)
        closed = all(m.is_watertight and m.is_winding_consistent and m.volume > 0 for m in self._meshes)
        self._two_sided = not closed if two_sided is None else bool(two_sided)
        self._camera = camera
        self.space = turntable_space(camera, self._radius)
        self.output_shape = (sum(CHANNELS[name] for name in self.outputs), *self._size)
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __repr__(self) -> str:
        faces = sum(len(m.faces) for m in self._meshes)
        return f"PyrenderSimulator({faces} faces, outputs={self.outputs}, size={self._size}, camera={self._camera!r})"

    @property
    def radius(self) -> float:
        """Largest distance of a vertex from the point that the camera looks at; 1 for a normalised mesh."""
        return self._radius

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        """Renders k views.

        Args:
            inputs: (k, 4) camera parameters, in the order of `space`.
            seeds: (k,), not used: rendering is deterministic.

        Returns:
            (k, channels, height, width) float32.
        """
        inputs = np.asarray(inputs, dtype=np.float64)
        if inputs.ndim != 2 or inputs.shape[1] != self.space.dimension:
            raise InputError(
                f"Expected inputs of shape (k, {self.space.dimension}) ({', '.join(self.space.names)}), "
                f"got {inputs.shape}."
            )
        views = [self._view(row) for row in inputs]
        images = np.empty((len(views), *self.output_shape), dtype=np.float32)
        if views:
            with self._session() as session:
                for image, view in zip(images, views, strict=True):
                    self._render(session, image, *view)
        return images

    def opengl(self) -> str:
        """Platform and renderer that answer in this process, such as "egl: llvmpipe (LLVM 15.0.6, 256 bits)"."""
        session = self._session()
        return f"{compat.choose_platform(self._platform)}: {session.gl_renderer}"

    def _view(self, row: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
        """(pose, distance, tangent of the half angle) of one row of parameters."""
        if self._camera == "turntable":
            azimuth, elevation, distance, half_angle = row
            tangent = float(np.tan(np.deg2rad(half_angle))) if 0 < half_angle < 90 else np.nan
        else:
            log_height, elevation, azimuth, log_distance = row
            distance, tangent = np.exp(log_distance), float(np.exp(log_height - log_distance))
        if not (np.isfinite(row).all() and distance > 0 and np.isfinite(tangent) and tangent > 0):
            raise InputError(
                f"Expected finite parameters, a positive distance and a half angle between 0 and 90 deg, got "
                f"{self.space.mapping(row)}. Bound the search (outside='clip' does) or use camera='turntable-log'."
            )
        return _turntable_pose(azimuth, elevation, distance), float(distance), tangent

    def _session(self) -> Any:
        """This thread's session; a new one in a new thread, and in a forked child."""
        session = self._local.__dict__.get("session")
        if session is not None and session.pid == os.getpid():
            return session
        compat.load(self._platform)
        from adapters._pyrender_renderer import Session, abandon

        if session is not None:
            abandon(session)
        self._local.session = Session(
            compat.choose_platform(self._platform),
            self._device,
            self._size,
            self._build_scene,
            lambert=self._shading == "lambert",
            two_sided=self._two_sided,
        )
        return self._local.session

    def _build_scene(self) -> Any:
        """A pyrender scene: the meshes, one camera, and a light that moves with the camera."""
        import pyrender

        # The ambient term is the same 0.2 in both shadings; 3 is pyrender's customary intensity.
        scene = pyrender.Scene(bg_color=[*self._background, 1.0], ambient_light=[0.2, 0.2, 0.2])
        plain = pyrender.MetallicRoughnessMaterial(
            baseColorFactor=[*self._colour, 1.0], metallicFactor=0.0, roughnessFactor=0.8
        )
        for mesh in self._meshes:
            own = mesh.visual.defined
            smooth = not (own and mesh.visual.kind == "face")  # a colour a face needs vertices of its own
            drawn = pyrender.Mesh.from_trimesh(mesh, material=None if own else plain, smooth=smooth)
            for primitive in drawn.primitives:
                primitive.material.doubleSided = False  # decided for all outputs alike, in the renderer
            scene.add(drawn)
        camera = pyrender.PerspectiveCamera(yfov=1.0, znear=0.1, zfar=10.0)
        scene.main_camera_node = scene.add(camera)
        if self._shading == "pbr":
            scene.add(pyrender.DirectionalLight(intensity=3.0), parent_node=scene.main_camera_node)
        return scene

    def _render(
        self, session: Any, image: NDArray[np.float32], pose: NDArray[np.float64], distance: float, tangent: float
    ) -> None:
        from OpenGL import GL

        from adapters._pyrender_renderer import COLOUR, DEPTH, SEGMENTATION

        scene, renderer = session.scene, session.renderer
        camera = scene.main_camera_node.camera
        # Planes that just enclose the object: the depth buffer's 24 bits are spent on it alone.
        margin = 1.001 * self._radius
        near = max(distance - margin, 1e-3 * self._radius)
        far = max(distance + margin, 2 * near)
        camera.znear, camera.zfar, camera.yfov = near, far, 2 * np.arctan(tangent)
        scene.set_pose(scene.main_camera_node, pose)

        def draw(kind: int, samples: int) -> None:
            renderer.draw(scene, kind, samples, session.nodes)

        def read_depth() -> NDArray[np.float32]:
            buffer = np.empty(self._size, dtype=np.float32)
            renderer.read(GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT, buffer)
            return buffer[::-1]

        buffer: NDArray[np.float32] | None = None
        channel = {}
        first = 0
        for name in self.outputs:
            channel[name] = image[first : first + CHANNELS[name]]
            first += CHANNELS[name]
        if "rgb" in channel:
            draw(COLOUR, self._antialias)
            pixels = np.empty((*self._size, 3), dtype=np.uint8)
            renderer.read(GL.GL_RGB, GL.GL_UNSIGNED_BYTE, pixels)
            np.divide(pixels[::-1].transpose(2, 0, 1), np.float32(255), out=channel["rgb"])
            # Without antialiasing one drawing serves all outputs.
            if not self._antialias and len(channel) > 1:
                buffer = read_depth()
        if "depth" in channel:
            if buffer is None:
                draw(DEPTH, 0)
                buffer = read_depth()
            # z = f n / (f - b (f - n)) for the buffer's b in [0, 1]; in float64, as the difference cancels.
            z = far * near / (far - buffer.astype(np.float64) * (far - near))
            channel["depth"][0] = np.where(buffer < 1, z, self._background_depth)
        if "silhouette" in channel:
            if buffer is None or self._antialias:
                draw(SEGMENTATION, self._antialias)
                covered = np.empty(self._size, dtype=np.uint8)
                renderer.read(GL.GL_RED, GL.GL_UNSIGNED_BYTE, covered)
                np.divide(covered[::-1], np.float32(255), out=channel["silhouette"][0])
            else:
                channel["silhouette"][0] = buffer < 1


def _trimesh() -> Any:
    try:
        import trimesh
    except ImportError as error:
        raise SetupError(
            f"Expected trimesh, but it cannot be imported: {error}. Install it: "
            '`pip install "simulation-bridge[render]"`.'
        ) from error
    return trimesh


def _among(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise InputError(f"Unknown {name}={value!r}. Known: {', '.join(map(str, known))}.")


def _rgb(name: str, value: Sequence[float]) -> tuple[float, float, float]:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (3,) or not ((array >= 0) & (array <= 1)).all():
        raise InputError(f"Expected {name} as three numbers in [0, 1], got {value!r}.")
    return (float(array[0]), float(array[1]), float(array[2]))


def _load_meshes(mesh: Any) -> list[Any]:
    """Copies of all triangle meshes behind `mesh`, in one frame."""
    trimesh = _trimesh()
    if isinstance(mesh, str) and mesh == "teapot":
        meshes, what = [teapot()], "the teapot"
    elif isinstance(mesh, str | os.PathLike):
        path = Path(mesh)
        if not path.is_file():
            raise InputError(f'Expected a mesh file or "teapot", got {str(mesh)!r}, which is not a file.')
        try:
            meshes, what = trimesh.load_scene(path).dump(), f"the file {str(path)!r}"
        except Exception as error:  # readers of a dozen formats raise whatever they like
            raise InputError(
                f"Expected a readable mesh file, got {str(path)!r}: {type(error).__name__}: {error}. Formats: GLB, "
                "OBJ, PLY, STL, ...; try `trimesh.load_scene` on it."
            ) from error
    elif isinstance(mesh, trimesh.Scene):
        meshes, what = mesh.dump(), "the scene"
    elif isinstance(mesh, trimesh.Trimesh):
        meshes, what = [mesh.copy()], "the mesh"
    else:
        raise InputError(
            f'Expected "teapot", a path, a trimesh.Trimesh or a trimesh.Scene as mesh, got {type(mesh).__name__}.'
        )
    meshes = [m for m in meshes if isinstance(m, trimesh.Trimesh) and len(m.faces)]
    if not meshes:
        raise InputError(f"Expected triangles, got none in {what}. Point clouds and curves cannot be rendered.")
    if not all(np.isfinite(m.vertices).all() for m in meshes):
        raise InputError(f"Expected finite vertices, got NaN or infinity in {what}. Repair the mesh.")
    return meshes


def _place(meshes: list[Any], *, normalise: bool, up: str) -> float:
    """Turns the meshes y up, centres and scales them if asked; the radius about the origin."""
    transform = np.eye(4)
    if up == "z":
        transform[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    vertices = np.concatenate([m.vertices[np.unique(m.faces)] for m in meshes]) @ transform[:3, :3].T
    if normalise:
        centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
        vertices = vertices - centre
        scale = float(np.linalg.norm(vertices, axis=1).max())
        if not scale > 0:
            raise InputError("Expected a mesh of positive size, got all vertices in one point. Check its units.")
        transform = np.diag([1 / scale] * 3 + [1.0]) @ _shift(-centre) @ transform
        vertices = vertices / scale
    for mesh in meshes:
        mesh.apply_transform(transform)
    return float(np.linalg.norm(vertices, axis=1).max())


def _shift(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix
