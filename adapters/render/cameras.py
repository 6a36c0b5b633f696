"""Lenses, cameras, and the parameters that a rendered image depends on; shared by the adapters that render.

Axes are OpenGL's: a camera looks along its -z, x to the right, y up. World: y up. Images have their first row on top;
pixel (i, j) has its centre at x = j + 0.5, y = i + 0.5, so that the image's centre is (width / 2, height / 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adapters.render.scene import LARGEST_COORDINATE, Scene, among
from bridge.arrays import is_number
from bridge.errors import InputError
from bridge.simulator.space import Parameter, ParameterSpace

CAMERAS = ("turntable", "turntable-log", "se3")
GROUPS = ("camera", "objects", "light", "colours")
NEAR = 1e-6  # distance of the near plane [distance of what is farthest]
DISTANCE = 4.0  # of a camera from the origin where nothing else is said [radius of the scene]


@dataclass(frozen=True)
class Perspective:
    """A pinhole camera by its angle of view: f_x = f_y = (height / 2) / tan(half angle), centred.

    Args:
        half_angle_deg: half the vertical angle of view [deg].

    Raises:
        InputError: the half angle is not between 0 and 90 deg.
    """

    half_angle_deg: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.half_angle_deg < 90:
            raise InputError(
                f"Expected half the angle of view between 0 and 90 deg, both excluded, got {self.half_angle_deg}."
            )


@dataclass(frozen=True)
class Pinhole:
    """A pinhole camera by its intrinsics: x = f_x X / Z + c_x, y = c_y - f_y Y / Z with depth Z [pixel].

    (0, 0) is the corner of the image, (0.5, 0.5) the centre of its first pixel. Where pixel centres have whole
    coordinates, as OpenCV has it, add 0.5 to c_x and c_y.

    Raises:
        InputError: not finite, or a focal length that is not positive.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy)
        if not (np.isfinite(numbers).all() and self.fx > 0 and self.fy > 0):
            raise InputError(f"Expected finite intrinsics with positive focal lengths, got (fx, fy, cx, cy) {numbers}.")


@dataclass(frozen=True)
class Orthographic:
    """A parallel projection: x = X height / (2 half_height) + width / 2 [pixel].

    Args:
        half_height: half the height of what the image shows [unit of the scene].

    Raises:
        InputError: not positive and finite.
    """

    half_height: float

    def __post_init__(self) -> None:
        if not (is_number(self.half_height) and self.half_height > 0):
            raise InputError(f"Expected a positive, finite half_height, got {self.half_height!r}.")


Lens = Perspective | Pinhole | Orthographic


def as_lens(value: Any) -> Lens | str | None:
    """A lens from plain data: a number is half the angle of view [deg], four numbers are (fx, fy, cx, cy) [pixel].

    None and "orthographic" stay what they are: a lens whose one number is a parameter.

    Raises:
        InputError: anything else.
    """
    if value is None or isinstance(value, Perspective | Pinhole | Orthographic) or value == "orthographic":
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Perspective(float(value))
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 4:
        return Pinhole(*map(float, value))
    raise InputError(
        'Expected lens as a number (half the angle of view in deg), four numbers (fx, fy, cx, cy), "orthographic", '
        f"Perspective, Pinhole, Orthographic or None, got {value!r}."
    )


@dataclass(frozen=True)
class Views:
    """What k rows of parameters show.

    Attributes:
        camera: (k, 4, 4) camera to world.
        objects: (k, n, 4, 4) motion of each object in the world; None where objects stay.
        lens: (k, 4) f_x, f_y, c_x, c_y [pixel]; for a parallel projection pixels a unit in place of f.
        perspective: of which kind the lens is.
        near, far: (k,) planes; nothing is beyond the far one, and what is in front of the near one is not seen.
        light: (k, 3) direction to the light in camera axes; None where the camera carries it.
        intensity: (k,) of the light; 1 is normal.
        colours: (k, n, 3) factors on the objects' colours; None where they keep their own.
    """

    camera: NDArray[np.float64]
    objects: NDArray[np.float64] | None
    lens: NDArray[np.float64]
    perspective: bool
    near: NDArray[np.float64]
    far: NDArray[np.float64]
    light: NDArray[np.float64] | None
    intensity: NDArray[np.float64]
    colours: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.camera)


def turntable_pose(azimuth_deg: ArrayLike, elevation_deg: ArrayLike, distance: ArrayLike) -> NDArray[np.float64]:
    """Camera to world, (..., 4, 4): R_y(azimuth) R_x(-elevation) after a step of `distance` back along +z.

    Written out, so that no elevation is singular: beyond 90 deg the camera goes over the top and hangs upside down.
    """
    a, e, d = np.broadcast_arrays(np.deg2rad(azimuth_deg), np.deg2rad(elevation_deg), np.asarray(distance, float))
    ca, sa, ce, se, zero = np.cos(a), np.sin(a), np.cos(e), np.sin(e), np.zeros_like(d)
    pose = np.zeros((*d.shape, 4, 4))
    for column, axis in enumerate(((ca, zero, -sa), (-sa * se, ce, -ca * se), (sa * ce, se, ca * ce))):
        for row, value in enumerate(axis):
            pose[..., row, column] = value
    pose[..., :3, 3] = d[..., None] * pose[..., :3, 2]
    pose[..., 3, 3] = 1
    return pose


def rotation_from_vector(vector: ArrayLike) -> NDArray[np.float64]:
    """exp([w]_x) = I + (sin t / t) [w]_x + ((1 - cos t) / t^2) [w]_x^2, t = |w| (Rodrigues).

    Args:
        vector: (..., 3) rotation vectors [rad].

    Returns:
        (..., 3, 3).
    """
    w = np.asarray(vector, dtype=np.float64)
    t = np.sqrt((w * w).sum(axis=-1))
    cross = np.zeros((*w.shape, 3))
    cross[..., 2, 1], cross[..., 0, 2], cross[..., 1, 0] = w[..., 0], w[..., 1], w[..., 2]
    cross -= np.swapaxes(cross, -1, -2)
    # np.sinc(x) = sin(pi x) / (pi x), 1 at 0; 1 - cos t = 2 sin^2(t / 2).
    first, second = np.sinc(t / np.pi), 0.5 * np.sinc(t / (2 * np.pi)) ** 2
    return np.eye(3) + first[..., None, None] * cross + second[..., None, None] * (cross @ cross)


def inverse_pose(pose: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverse of rigid motions (..., 4, 4): (R^T, -R^T t)."""
    inverse = np.zeros_like(pose)
    turned = np.swapaxes(pose[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = turned
    inverse[..., :3, 3] = -(turned @ pose[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


@dataclass(frozen=True)
class _Free:
    """A parameter, its group, and its value where it is not varied."""

    group: str
    parameter: Parameter
    default: float


def _camera_parameters(camera: str, lens: Lens | str | None, radius: float) -> list[tuple[Parameter, float]]:
    degree = "deg"
    elevation = Parameter("elevation_deg", degree, natural_scale=10.0, description="camera above the horizon"), 0.0
    azimuth = Parameter("azimuth_deg", degree, natural_scale=10.0, description="camera turned about the vertical"), 0.0
    size, shown = np.log(radius), 1.5 * radius
    if camera == "turntable":
        parameters = [azimuth, elevation]
        if lens != "orthographic" and not isinstance(lens, Orthographic):
            distance = Parameter("distance", "", 0.05 * radius, 200 * radius, 0.6 * radius, description="of the camera")
            parameters.append((distance, DISTANCE * radius))
        if lens is None:
            text = "half the vertical angle of view"
            parameters.append((Parameter("half_angle_deg", degree, 0.5, 85.0, 2.5, description=text), 20.0))
        if lens == "orthographic":
            text = "half the height that the image shows"
            half = Parameter("half_height", "", 0.01 * radius, 200 * radius, 0.2 * radius, description=text)
            parameters.append((half, shown))
        return parameters
    if camera == "turntable-log":
        parameters = [elevation, azimuth]
        if lens in (None, "orthographic"):
            text = "log of half the height seen at the object"
            height = Parameter("log_half_height", "", size - 5, size + 5, 0.15, description=text)
            parameters.insert(0, (height, float(np.log(shown))))
        if lens != "orthographic" and not isinstance(lens, Orthographic):
            text = "log of the distance"
            distance = Parameter("log_distance", "", size - 3, size + 5.3, 0.15, description=text)
            parameters.append((distance, float(np.log(DISTANCE * radius))))
        return parameters
    parameters = [
        (
            Parameter(
                f"rotation_{axis}_deg", degree, natural_scale=10.0, description=f"about the camera's {axis} axis"
            ),
            0.0,
        )
        for axis in "xyz"
    ]
    for axis, scale in (("x", 0.1), ("y", 0.1), ("z", 0.4)):
        text = f"of the scene along the camera's {axis} axis"
        shift = Parameter(f"shift_{axis}", "", -200 * radius, 200 * radius, scale * radius, description=text)
        parameters.append((shift, 0.0))
    if lens == "orthographic":
        half = Parameter("half_height", "", 0.01 * radius, 200 * radius, 0.2 * radius)
        parameters.append((half, shown))
    return parameters


def _all_parameters(
    camera: str, lens: Lens | str | None, scene: Scene, colour: tuple[float, float, float]
) -> list[_Free]:
    found = [_Free("camera", *entry) for entry in _camera_parameters(camera, lens, scene.radius)]
    for i, radius in enumerate(scene.radii):
        text = f"of {scene.names[i]!r}"
        for axis in "xyz":
            turn = Parameter(f"object{i}_rotation_{axis}_deg", "deg", natural_scale=10.0, description=text)
            found.append(_Free("objects", turn, 0.0))
        for axis in "xyz":
            bound, scale = 100 * scene.radius, 0.1 * max(radius, 1e-6 * scene.radius)
            shift = Parameter(f"object{i}_shift_{axis}", "", -bound, bound, scale, description=text)
            found.append(_Free("objects", shift, 0.0))
    text = "of the light to the {}, seen from the objects towards the camera"
    for name, side in (("azimuth", "right"), ("elevation", "top")):
        direction = Parameter(f"light_{name}_deg", "deg", natural_scale=10.0, description=text.format(side))
        found.append(_Free("light", direction, 0.0))
    found.append(_Free("light", Parameter("light_intensity", "", 0.0, 10.0, 0.1, description="1 is normal"), 1.0))
    for i, meshes in enumerate(scene.objects):
        default = (1.0, 1.0, 1.0) if any(mesh.visual.defined for mesh in meshes) else colour
        for name, value in zip(("red", "green", "blue"), default, strict=True):
            text = f"of {scene.names[i]!r}"
            found.append(_Free("colours", Parameter(f"object{i}_{name}", "", 0.0, 1.0, 0.1, description=text), value))
    return found


@final
class ViewModel:
    """Rows of parameters to `Views`; the parameter space of a rendering adapter.

    Camera "turntable", parameters (azimuth_deg, elevation_deg, distance, half_angle_deg): the camera looks at the
    origin from `distance` (sin a cos e, sin e, cos a cos e), y up: at azimuth 0 it stands on +z with +x to its right; a
    growing azimuth moves it towards +x, so that what is in front moves to the left of the image; a growing elevation
    raises it. Camera "turntable-log", parameters (log_half_height, elevation_deg, azimuth_deg, log_distance) with
    log_half_height = log(distance tan(half angle)), separates apparent size from perspective; searches for a pose
    succeed more often in it. A given `lens` takes the angle of view out of the parameters; "orthographic" takes the
    distance out and puts the half height shown in.

    Camera "se3", parameters (rotation_x_deg, rotation_y_deg, rotation_z_deg, shift_x, shift_y, shift_z) = (w, u): the
    tangent space of rigid motions at a base pose (R_0, t_0), scene to camera, with the axes of the base camera:
    x_camera = exp([w]_x) R_0 x + t_0 + u. The lens is fixed, `Perspective(20)` where none is given.

    Group "objects", six numbers (w, u) an object: x -> c + exp([w]_x) (x - c) + u in world axes, c the centre of the
    object's bounding box. Group "light", (light_azimuth_deg, light_elevation_deg, light_intensity): light from the
    direction (sin a cos e, sin e, cos a cos e) in camera axes, from the camera itself at (0, 0). Where nothing of this
    group is varied or fixed the camera's centre carries the light. Group "colours": red, green, blue of each object in
    [0, 1], factors on the colours that a mesh brings.

    Args:
        scene: the objects.
        size: (height, width) [pixel].
        camera: "turntable", "turntable-log" or "se3".
        lens: see `as_lens`.
        vary: groups whose parameters are the simulator's inputs, in this order.
        fixed: values of parameters, by name, that are not inputs: of a group that is not varied, or taken out of one
            that is.
        base_pose: (4, 4) camera to world of "se3"; by default on +z at four radii, looking at the origin.
        inside: what becomes of a camera within an object's bounding sphere: "render" what it sees beyond a near plane
            at a millionth of the distance of what is farthest in front of it, or "raise" an `InputError`.
        colour: value, where neither varied nor fixed, of the colours of objects that bring none.

    Raises:
        InputError: unknown names, fixed values that leave no image, a pose that is no rigid motion.
    """

    def __init__(
        self,
        scene: Scene,
        size: tuple[int, int],
        *,
        camera: str,
        lens: Any,
        vary: Sequence[str] | str,
        fixed: Mapping[str, float] | None,
        base_pose: ArrayLike | None,
        inside: str,
        colour: tuple[float, float, float],
    ) -> None:
        among("camera", camera, CAMERAS)
        among("inside", inside, ("render", "raise"))
        groups = (vary,) if isinstance(vary, str) else tuple(vary)
        if not groups or len(set(groups)) != len(groups) or not set(groups) <= set(GROUPS):
            raise InputError(f"Expected vary as distinct names among {', '.join(GROUPS)}, got {vary!r}.")
        if base_pose is not None and camera != "se3":
            raise InputError(f'Expected base_pose with camera="se3" only, got it with camera={camera!r}.')
        self._lens = as_lens(lens)
        if camera == "se3" and self._lens is None:
            self._lens = Perspective()
        self._scene, self._size, self._camera, self._inside = scene, size, camera, inside
        self.perspective = not (self._lens == "orthographic" or isinstance(self._lens, Orthographic))
        parameters = _all_parameters(camera, self._lens, scene, colour)
        self._index = {entry.parameter.name: i for i, entry in enumerate(parameters)}
        self._defaults = np.array([entry.default for entry in parameters])
        fixed = dict(fixed or {})
        for name, value in fixed.items():
            if name not in self._index:
                raise InputError(f"Unknown parameter {name!r} in fixed. Known: {', '.join(self._index)}.")
            if not np.isfinite(value):
                raise InputError(f"Expected a finite value for {name} in fixed, got {value!r}.")
            self._defaults[self._index[name]] = value
        free = [
            i
            for group in groups
            for i, entry in enumerate(parameters)
            if entry.group == group and entry.parameter.name not in fixed
        ]
        if not free:
            raise InputError(f"Expected parameters to vary, got all of {', '.join(groups)} fixed.")
        self._free = np.array(free)
        self.space = ParameterSpace(tuple(parameters[i].parameter for i in free))
        used = set(groups) | {parameters[self._index[name]].group for name in fixed}
        self.moves_objects, self.moves_light, self.paints = (g in used for g in ("objects", "light", "colours"))
        start = turntable_pose(0.0, 0.0, DISTANCE * scene.radius) if base_pose is None else _rigid(base_pose)
        self._base = inverse_pose(start)
        with np.errstate(all="ignore"):
            columns = dict(zip(self._index, self._defaults[:, None].copy(), strict=True))
            _, valid = self._lenses(columns, self._poses(columns)[1])
        if not valid.all():
            raise InputError(f"Expected a positive distance and a half angle between 0 and 90 deg, got fixed={fixed}.")

    @property
    def object_names(self) -> tuple[str, ...]:
        return self._scene.names

    def views(self, inputs: NDArray[np.float64]) -> Views:
        """The views of (k, d) parameters; row i depends on `inputs[i]` alone.

        Raises:
            InputError: wrong shape; parameters that are not finite, a distance or an angle of view that is not
                positive; a camera inside an object where that is to raise.
        """
        inputs = np.asarray(inputs, dtype=np.float64)
        if inputs.ndim != 2 or inputs.shape[1] != self.space.dimension:
            raise InputError(
                f"Expected inputs of shape (k, {self.space.dimension}) ({', '.join(self.space.names)}), "
                f"got {inputs.shape}."
            )
        k = len(inputs)
        full = np.tile(self._defaults, (k, 1))
        full[:, self._free] = inputs
        # Columns side by side in memory: numpy may take another, differently rounded loop where they are not.
        columns = dict(zip(self._index, full.T.copy(), strict=True))
        with np.errstate(all="ignore"):  # what overflows is told below, with its parameters
            camera, distance = self._poses(columns)
            lens, valid = self._lenses(columns, distance)
            objects = self._motions(columns) if self.moves_objects else None
        valid &= np.isfinite(inputs).all(axis=1) & (np.abs(camera) < LARGEST_COORDINATE).all(axis=(1, 2))
        if objects is not None:
            valid &= (np.abs(objects) < LARGEST_COORDINATE).all(axis=(1, 2, 3))
        if not valid.all():
            row = inputs[int(np.flatnonzero(~valid)[0])]
            raise InputError(
                f"Expected finite parameters, positions below {LARGEST_COORDINATE:g}, a positive distance and a half "
                f"angle between 0 and 90 deg, got {self.space.mapping(row)}. Bound the search (outside='clip' does) or "
                "use camera='turntable-log'."
            )
        near, far = self._planes(inputs, camera, objects)
        light = None
        if self.moves_light:
            light = turntable_pose(columns["light_azimuth_deg"], columns["light_elevation_deg"], 1.0)[:, :3, 2]
        colours = None
        if self.paints:
            names = [f"object{i}_{c}" for i in range(len(self._scene.objects)) for c in ("red", "green", "blue")]
            colours = np.stack([columns[name] for name in names], axis=1).reshape(k, len(names) // 3, 3)
        intensity = columns["light_intensity"]
        return Views(camera, objects, lens, self.perspective, near, far, light, intensity, colours)

    def object_to_camera(self, views: Views) -> NDArray[np.float64]:
        """(k, n, 4, 4): from each object's placed coordinates to camera axes."""
        world_to_camera = inverse_pose(views.camera)[:, None]
        if views.objects is None:
            return np.broadcast_to(world_to_camera, (len(views), len(self._scene.objects), 4, 4))
        return world_to_camera @ views.objects

    def _poses(self, columns: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(k, 4, 4) camera to world, and (k,) distance of a turntable."""
        if self._camera == "se3":
            w = np.stack([columns[f"rotation_{axis}_deg"] for axis in "xyz"], axis=1)
            u = np.stack([columns[f"shift_{axis}"] for axis in "xyz"], axis=1)
            to_camera = np.zeros((len(w), 4, 4))
            to_camera[:, :3, :3] = rotation_from_vector(np.deg2rad(w)) @ self._base[:3, :3]
            to_camera[:, :3, 3] = self._base[:3, 3] + u
            to_camera[:, 3, 3] = 1
            return inverse_pose(to_camera), np.ones(len(w))
        azimuth = columns["azimuth_deg"]
        distance = np.full(len(azimuth), DISTANCE * self._scene.radius)
        if "distance" in columns:
            distance = columns["distance"]
        elif "log_distance" in columns:
            distance = np.exp(columns["log_distance"])
        return turntable_pose(azimuth, columns["elevation_deg"], distance), distance

    def _lenses(
        self, columns: Mapping[str, Any], distance: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(k, 4) f_x, f_y, c_x, c_y and which rows have a lens at all."""
        height, width = self._size
        lens = np.empty((len(distance), 4))
        lens[:, 2:] = width / 2, height / 2
        if isinstance(self._lens, Pinhole):
            lens[:] = self._lens.fx, self._lens.fy, self._lens.cx, self._lens.cy
        else:
            if isinstance(self._lens, Perspective):
                shown = np.full(len(distance), np.tan(np.deg2rad(self._lens.half_angle_deg)))
            elif isinstance(self._lens, Orthographic):
                shown = np.full(len(distance), self._lens.half_height)
            elif "half_angle_deg" in columns:
                half = columns["half_angle_deg"]
                shown = np.where((half > 0) & (half < 90), np.tan(np.deg2rad(half)), np.nan)
            elif "half_height" in columns:
                shown = columns["half_height"]
            elif self.perspective:
                shown = np.exp(columns["log_half_height"] - columns["log_distance"])
            else:
                shown = np.exp(columns["log_half_height"])
            lens[:, :2] = (height / 2 / shown)[:, None]
        return lens, (distance > 0) & np.isfinite(lens).all(axis=1) & (lens[:, :2] > 0).all(axis=1)

    def _motions(self, columns: Mapping[str, Any]) -> NDArray[np.float64]:
        """(k, n, 4, 4) motion of each object in the world."""
        count = len(self._scene.objects)

        def stack(pattern: str) -> NDArray[np.float64]:
            each = [[columns[pattern.format(i, axis)] for axis in "xyz"] for i in range(count)]
            return np.ascontiguousarray(np.moveaxis(np.array(each), 2, 0))

        motion = np.zeros((len(columns["light_intensity"]), count, 4, 4))
        turn = rotation_from_vector(np.deg2rad(stack("object{}_rotation_{}_deg")))
        centre = self._scene.centres
        motion[..., :3, :3] = turn
        motion[..., :3, 3] = centre + stack("object{}_shift_{}") - (turn @ centre[..., None])[..., 0]
        motion[..., 3, 3] = 1
        return motion

    def _planes(
        self, inputs: NDArray[np.float64], camera: NDArray[np.float64], objects: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The far plane behind all objects, and the near one at a millionth of its distance.

        A parallel projection has the near plane in front of all objects where they are in front of the camera.
        """
        centres = np.broadcast_to(self._scene.centres, (len(camera), *self._scene.centres.shape))
        if objects is not None:
            centres = (objects[..., :3, :3] @ self._scene.centres[..., None])[..., 0] + objects[..., :3, 3]
        away = centres - camera[:, None, :3, 3]
        depth = -(away * camera[:, None, :3, 2]).sum(axis=2)
        # Rounding is small against both: an object may be a point, or far from the origin.
        margin = self._scene.radii + 1e-3 * self._scene.radii.max() + 1e-9 * np.linalg.norm(away, axis=2)
        inside = ((away**2).sum(axis=2) < self._scene.radii**2).any(axis=1)
        if self._inside == "raise" and inside.any():
            row = inputs[int(np.flatnonzero(inside)[0])]
            raise InputError(
                "Expected a camera outside the objects' bounding spheres, got one inside at "
                f'{self.space.mapping(row)}. Move it away, or allow it with inside="render".'
            )
        far = np.maximum((depth + margin).max(axis=1), 1e-6 * self._scene.radii.max() + 1e-30)
        near = NEAR * far
        if not self.perspective:
            near = np.maximum((depth - margin).min(axis=1), near)
            far = np.maximum(far, 2 * near)
        return near, far


def _rigid(pose: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(pose, dtype=np.float64)
    if (
        matrix.shape != (4, 4)
        or not np.isfinite(matrix).all()
        or not np.allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-6)
        or np.linalg.det(matrix[:3, :3]) < 0
        or not np.allclose(matrix[3], [0, 0, 0, 1])
    ):
        raise InputError(f"Expected base_pose as a (4, 4) rigid motion, camera to world, got {matrix.tolist()}.")
    return matrix
