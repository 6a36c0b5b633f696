"""The pyrender adapter against geometry with closed forms, and against forks, threads, ranks and missing libraries."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.render import pyrender_compat as compat
from adapters.render.pyrender import PyrenderSimulator
from adapters.render.scene import teapot
from adapters.render.teapot import newell_patches, teapot_mesh
from bridge.errors import InputError, SetupError
from bridge.simulator.protocol import Simulator
from bridge.simulator.registry import make

trimesh = pytest.importorskip("trimesh", reason="trimesh is optional (extra `render`)")
pytest.importorskip("pyglet", reason="pyrender is optional (extra `render`)")

gl = pytest.mark.gl
POSES = np.array([[0, 0, 4, 20], [40, 20, 4, 20], [-100, -35, 3, 25], [170, 80, 6, 12.0]])


def render(simulator: PyrenderSimulator, rows: Any) -> NDArray[np.float32]:
    rows = np.atleast_2d(np.asarray(rows, dtype=np.float64))
    return simulator(rows, np.zeros(len(rows), np.uint64))


def sphere(subdivisions: int = 5) -> Any:
    return trimesh.creation.icosphere(subdivisions=subdivisions, radius=1.0)


def pixel_directions(size: int, half_angle_deg: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tangents of the horizontal and vertical angle of each pixel's centre."""
    t = np.tan(np.deg2rad(half_angle_deg)) * ((np.arange(size) + 0.5) / size * 2 - 1)
    return np.meshgrid(t, -t)


@pytest.fixture
def in_subprocess(tmp_path: Path) -> Callable[..., str]:
    """Runs a program in a fresh interpreter, where nothing has loaded OpenGL yet; what it printed."""

    def run(program: str, *arguments: str, **env: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(program), encoding="utf-8")
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYOPENGL_PLATFORM", "LP_NUM_THREADS")}
        done = subprocess.run(
            [sys.executable, str(path), *arguments],
            env=inherited | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# --- the teapot -----------------------------------------------------------------------------------------------


def test_teapot_has_newells_extent_and_a_consistent_orientation() -> None:
    assert newell_patches().shape == (32, 4, 4, 3)
    vertices, faces = teapot_mesh(10)
    assert (len(vertices), len(faces)) == (3241, 6320)
    # Known of the teapot: from the table to the top of the lid 3.15, body of radius 2, handle to -3.
    assert vertices.min(axis=0) == pytest.approx([-3.0, 0.0, -2.0], abs=0.01)
    assert vertices[:, [1, 2]].max(axis=0) == pytest.approx([3.15, 2.0], abs=0.01)
    assert 3.4 < vertices[:, 0].max() < 3.45
    mesh = teapot(10)
    assert mesh.is_winding_consistent
    assert mesh.volume > 0


def test_teapot_is_mirror_symmetric_and_converges() -> None:
    vertices, _ = teapot_mesh(6)
    mirrored = vertices * (1, 1, -1) + 0.0
    assert {tuple(v) for v in np.round(vertices, 8) + 0.0} == {tuple(v) for v in np.round(mirrored, 8) + 0.0}
    areas = [teapot(n).area for n in (5, 10, 20)]
    # Errors of a second-order scheme fall by four as the cells are halved.
    assert (areas[1] - areas[0]) / (areas[2] - areas[1]) == pytest.approx(4, rel=0.2)


def test_neighbouring_patches_of_the_body_meet() -> None:
    patches = newell_patches()
    for first in range(0, 12, 4):  # rim and body, each of four quarters
        for q in range(4):
            here, there = patches[first + q], patches[first + (q + 1) % 4]
            assert np.allclose(here[:, 3], there[:, 0], atol=1e-12)


# --- geometry -------------------------------------------------------------------------------------------------


@gl
@pytest.mark.parametrize(("distance", "half_angle"), [(4.0, 20.0), (2.0, 40.0), (10.0, 7.0)])
def test_silhouette_of_a_sphere_is_the_analytic_disc(distance: float, half_angle: float) -> None:
    size = 256
    image = render(PyrenderSimulator(sphere(), size=(size, size)), [25.0, -40.0, distance, half_angle])
    assert image.shape == (1, 1, size, size)
    assert set(np.unique(image)) <= {0.0, 1.0}
    # The tangent cone has the half angle asin(1/d); its section at unit distance is a disc of radius 1/sqrt(d^2 - 1).
    radius = size / 2 / np.sqrt(distance**2 - 1) / np.tan(np.deg2rad(half_angle))
    assert image.sum() == pytest.approx(np.pi * radius**2, rel=3e-3)
    # Power: the same tolerance tells a distance wrong by 1 % apart.
    wrong = size / 2 / np.sqrt((1.01 * distance) ** 2 - 1) / np.tan(np.deg2rad(half_angle))
    assert image.sum() != pytest.approx(np.pi * wrong**2, rel=3e-3)


@gl
def test_depth_of_a_sphere() -> None:
    size, distance, half_angle = 129, 5.0, 10.0
    depth = render(
        PyrenderSimulator(sphere(), size=(size, size), outputs="depth", background_depth=-1.0),
        [70.0, 10.0, distance, half_angle],
    )[0, 0]
    assert depth[size // 2, size // 2] == pytest.approx(distance - 1, abs=5e-4)
    # z (u, v, 1) lies on the sphere around (0, 0, d): z^2 (1 + u^2 + v^2) - 2 z d + d^2 - 1 = 0, the nearer root.
    u, v = pixel_directions(size, half_angle)
    a, discriminant = 1 + u**2 + v**2, distance**2 - (1 + u**2 + v**2) * (distance**2 - 1)
    inside = discriminant > 0.02
    expected = (distance - np.sqrt(np.where(inside, discriminant, 0))) / a
    assert np.abs(depth - expected)[inside].max() < 3e-3
    assert (depth[discriminant < -0.02] == -1).all()


@gl
def test_depth_of_a_plane_is_exact() -> None:
    box = trimesh.creation.box(extents=(2, 2, 2))
    depth = render(PyrenderSimulator(box, outputs="depth", normalise=False), [0.0, 0.0, 5.0, 8.0])
    assert depth == pytest.approx(np.full_like(depth, 4.0), abs=2e-6)


@gl
@pytest.mark.parametrize("camera", ["turntable", "turntable-log"])
def test_points_appear_where_the_documented_camera_sees_them(camera: Any) -> None:
    rng = np.random.default_rng(5)
    height, width = 161, 240
    for point in rng.uniform(-1, 1, (6, 3)):
        ball = trimesh.creation.icosphere(subdivisions=3, radius=0.05)
        ball.apply_translation(point)
        simulator = PyrenderSimulator(ball, size=(height, width), camera=camera, normalise=False)
        azimuth, elevation, distance, half_angle = rng.uniform([-180, -85, 6, 15], [180, 85, 9, 20])
        tangent = np.tan(np.deg2rad(half_angle))
        row = [azimuth, elevation, distance, half_angle]
        if camera == "turntable-log":
            row = [np.log(distance * tangent), elevation, azimuth, np.log(distance)]
        image = render(simulator, row)[0, 0]
        # An independent camera: position as documented, then looking at the origin with y up.
        a, e = np.deg2rad([azimuth, elevation])
        position = distance * np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
        forward = -position / distance
        right = np.cross(forward, [0, 1, 0])
        right /= np.linalg.norm(right)
        up = np.cross(right, forward)
        x, y, z = (point - position) @ np.stack([right, up, forward]).T
        expected = (height / 2 * (1 - y / z / tangent), width / 2 + height / 2 * x / z / tangent)
        assert np.argwhere(image).mean(axis=0) + 0.5 == pytest.approx(expected, abs=0.6)


@gl
def test_a_growing_azimuth_moves_the_front_to_the_left_and_elevation_moves_it_down() -> None:
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.1)
    ball.apply_translation([0, 0, 1])
    images = render(
        PyrenderSimulator(ball, normalise=False), [[0, 0, 5, 20], [20, 0, 5, 20], [0, 20, 5, 20], [90, 0, 5, 20]]
    )
    at = [np.argwhere(image[0]).mean(axis=0) - 31.5 for image in images]
    assert at[0] == pytest.approx([0, 0], abs=0.3)
    assert at[1][1] < -3
    assert at[2][0] > 3
    assert at[3][1] < at[1][1]


@gl
def test_elevations_beyond_the_pole_are_continuous() -> None:
    simulator = PyrenderSimulator(size=(128, 128))
    images = render(simulator, [[30, 90 + h, 4, 20] for h in (-1e-4, 0, 1e-4)])
    assert np.abs(np.diff(images, axis=0)).sum() <= 4


@gl
def test_the_log_camera_sees_the_same() -> None:
    az, el, d, half = POSES.T
    logs = np.stack([np.log(d * np.tan(np.deg2rad(half))), el, az, np.log(d)], axis=1)
    raw = PyrenderSimulator(outputs=("silhouette", "depth"))
    log = PyrenderSimulator(outputs=("silhouette", "depth"), camera="turntable-log")
    assert log.space.names == ("log_half_height", "elevation_deg", "azimuth_deg", "log_distance")
    a, b = render(raw, POSES), render(log, logs)
    # exp(log(d)) may differ from d in its last bit, and a pixel on the edge with it.
    assert (np.abs(a - b) > 1e-5).sum() <= 2
    for corner in (log.space.lower, log.space.upper):
        assert np.isfinite(render(log, np.where(np.isfinite(corner), corner, 0.0))).all()


@gl
def test_scale_and_position_of_a_normalised_mesh_do_not_matter() -> None:
    big = teapot()
    big.apply_transform(np.diag([1000.0, 1000.0, 1000.0, 1.0]))
    big.apply_translation([5e3, -2e3, 1e3])
    simulator = PyrenderSimulator(big)
    assert simulator.radius == pytest.approx(1)
    assert (render(simulator, POSES) != render(PyrenderSimulator(), POSES)).sum() <= 2


@gl
def test_z_up_meshes_stand_up() -> None:
    # Turned upright, a mesh with z up is the same mesh with y up.
    lying = teapot()
    lying.apply_transform([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert np.array_equal(render(PyrenderSimulator(lying, up="z"), POSES), render(PyrenderSimulator(), POSES))


# --- shading --------------------------------------------------------------------------------------------------


@gl
def test_lambert_is_its_formula() -> None:
    size, half_angle = 65, 30.0
    box = trimesh.creation.box(extents=(20, 20, 2))
    image = render(
        PyrenderSimulator(box, size=(size, size), outputs="rgb", colour=(1.0, 0.5, 0.0), normalise=False),
        [0.0, 0.0, 3.0, half_angle],
    )[0]
    # The face z = 1 fills the view. Normals of a box's vertices are averaged; seen head on, only at the centre is the
    # direction known, so compare there, and the colours' ratios everywhere.
    assert image[:, size // 2, size // 2] == pytest.approx([1.0, 0.5, 0.0], abs=0.01)
    assert np.abs(image[1] - image[0] / 2).max() <= 1 / 255
    assert (image[2] == 0).all()
    flat = trimesh.Trimesh([[-9, -9, 0], [9, -9, 0], [9, 9, 0], [-9, 9, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    image = render(
        PyrenderSimulator(flat, size=(size, size), outputs="rgb", colour=(1, 1, 1), normalise=False),
        [[0.0, 0.0, 3.0, half_angle], [180.0, 0.0, 3.0, half_angle]],  # front and back
    )
    u, v = pixel_directions(size, half_angle)
    cosine = 1 / np.sqrt(1 + u**2 + v**2)
    assert np.abs(image - (0.2 + 0.8 * cosine)).max() <= 1.01 / 255


@gl
def test_background_and_plain_colour() -> None:
    image = render(PyrenderSimulator(outputs="rgb", background=(0.2, 0.4, 0.6)), POSES[0])[0]
    assert image[:, 0, 0] == pytest.approx([0.2, 0.4, 0.6], abs=1 / 255)


@gl
@pytest.mark.parametrize("shading", ["lambert", "pbr"])
@pytest.mark.parametrize("kind", ["vertex", "face", "texture", "material"])
def test_colours_that_a_mesh_brings(kind: str, shading: Any) -> None:
    box = trimesh.creation.box()
    red = [255, 0, 0, 255]
    if kind == "vertex":
        box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=[red] * len(box.vertices))
    elif kind == "face":
        box.visual = trimesh.visual.ColorVisuals(box, face_colors=[red] * len(box.faces))
    elif kind == "texture":
        image = pytest.importorskip("PIL.Image", reason="pillow is optional").new("RGB", (4, 4), (255, 0, 0))
        box.visual = trimesh.visual.TextureVisuals(uv=np.full((len(box.vertices), 2), 0.5), image=image)
    else:
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=red, metallicFactor=0.0)
        box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(box.vertices), 2)), material=material)
    red_, green, blue = render(PyrenderSimulator(box, outputs="rgb", shading=shading), POSES[1])[0]
    assert red_.max() > 0.3  # trimesh multiplies textures by a diffuse 0.4 unless told otherwise
    assert green.max() < 0.3 * red_.max()
    assert blue.max() < 0.3 * red_.max()


@gl
def test_antialiasing_refines_silhouettes_and_leaves_depth_alone() -> None:
    row, size = [0.0, 0.0, 4.0, 20.0], 64
    outputs = ("silhouette", "depth", "rgb")
    plain = render(PyrenderSimulator(sphere(), size=(size, size), outputs=outputs), row)[0]
    fine = render(PyrenderSimulator(sphere(), size=(size, size), outputs=outputs, antialias=4), row)[0]
    assert np.abs(4 * fine[0] - np.round(4 * fine[0])).max() < 0.02
    assert 0 < ((fine[0] > 0.1) & (fine[0] < 0.9)).mean() < 0.2
    # The same shader, but another pass than the colours': equal up to the odd pixel on the edge.
    assert (np.abs(plain[1] - fine[1]) > 1e-5).sum() <= 2
    area = np.pi * (size / 2) ** 2 / (row[2] ** 2 - 1) / np.tan(np.deg2rad(row[3])) ** 2
    assert fine[0].sum() == pytest.approx(area, rel=5e-3)
    assert np.abs(fine[2:] - plain[2:]).max() > 0.1


@gl
def test_one_pass_gives_what_several_give() -> None:
    alone = {name: render(PyrenderSimulator(outputs=name), POSES) for name in ("silhouette", "depth", "rgb")}
    together = render(PyrenderSimulator(outputs=("rgb", "silhouette", "depth")), POSES)
    assert together.shape == (4, 5, 64, 64)
    assert np.array_equal(together[:, :3], alone["rgb"])
    assert np.array_equal(together[:, 3:4], alone["silhouette"])
    assert np.array_equal(together[:, 4:], alone["depth"])


@gl
def test_stock_shading_is_plain_pyrenders(in_subprocess: Callable[..., str]) -> None:
    # In a process of its own: deleting pyrender's own renderer closes EGL's display for everybody.
    said = in_subprocess(
        """
        import numpy as np, trimesh
        from adapters.render import pyrender_compat as compat
        from adapters.render.cameras import turntable_pose as _turntable_pose
        from adapters.render.pyrender import PyrenderSimulator
        mesh = trimesh.creation.torus(1.0, 0.3)
        options = dict(size=(96, 128), normalise=False, antialias=4, shading="pbr", platform="egl", two_sided=False)
        ours = PyrenderSimulator(mesh, outputs=("rgb", "depth"), **options)(
            np.array([[30.0, 40.0, 4.0, 20.0]]), np.zeros(1, np.uint64))[0]
        pyrender = compat.load("egl")
        scene = pyrender.Scene(bg_color=[0, 0, 0, 1.0], ambient_light=[0.2] * 3)
        material = pyrender.MetallicRoughnessMaterial(
            baseColorFactor=[0.8] * 3 + [1.0], metallicFactor=0.0, roughnessFactor=0.8)
        scene.add(pyrender.Mesh.from_trimesh(mesh, material=material))
        pose = _turntable_pose(30.0, 40.0, 4.0)
        scene.add(pyrender.PerspectiveCamera(yfov=np.deg2rad(40.0), znear=2.0, zfar=6.0), pose=pose)
        scene.add(pyrender.DirectionalLight(intensity=3.0), pose=pose)
        colour, depth = pyrender.OffscreenRenderer(128, 96).render(scene)
        print(np.abs(ours[:3] - colour.transpose(2, 0, 1) / 255).max() * 255, (colour > 0).mean())
        both = (ours[3] > 0) & (depth > 0)
        print(np.abs(ours[3] - depth)[both].max(), (ours[3] > 0).sum(), both.sum())
        """,
        PYOPENGL_PLATFORM="egl",
    )
    (worst, covered), (depth_error, ours, both) = (map(float, line.split()) for line in said.splitlines())
    assert covered > 0.05
    assert worst <= 1.01
    # pyrender's depth is one of the four samples, ours the pixel's centre.
    assert depth_error < 0.3
    assert abs(ours - both) < 0.05 * ours


# --- meshes ---------------------------------------------------------------------------------------------------


@gl
@pytest.mark.parametrize("extension", ["glb", "obj", "ply", "stl"])
def test_mesh_files(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"a mesh ü.{extension}"
    teapot(4).export(path)
    simulator = make("pyrender", mesh=str(path), size=[48, 48], outputs=["silhouette"])
    reference = PyrenderSimulator(teapot(4), size=(48, 48))
    assert (render(simulator, POSES) != render(reference, POSES)).sum() <= 4  # files keep single precision


@gl
def test_scenes_keep_their_transforms(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.2)
    for x in (-1, 1):
        matrix = np.eye(4)
        matrix[0, 3] = x
        scene.add_geometry(ball, transform=matrix)
    path = tmp_path / "scene.glb"
    scene.export(path)
    for mesh in (scene, path):
        image = render(PyrenderSimulator(mesh), [0, 0, 4, 20.0])[0, 0]
        columns = np.flatnonzero(image.any(axis=0))
        assert columns[0] + columns[-1] == pytest.approx(63, abs=1)
        assert (np.diff(columns) > 1).sum() == 1  # two balls, a gap between them


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.stl", None, "not a file"),
        ("teacup", None, "not a file"),
        ("broken.glb", b"glTF but not really", "readable"),
        ("broken.ply", b"ply\nformat nonsense 1.0\n", "readable|triangles"),
        ("notes.txt", b"hello", "readable"),
        ("empty.obj", b"# nothing\n", "readable|triangles"),
        (
            "points.ply",
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
            b"property float z\nend_header\n0 0 0\n",
            "triangles",
        ),
    ],
)
def test_bad_mesh_files(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"(?s){name}|{said}"):
        PyrenderSimulator(path)


def test_bad_meshes() -> None:
    with pytest.raises(InputError, match="ndarray"):
        PyrenderSimulator(np.zeros((3, 3)))
    with pytest.raises(InputError, match="finite"):
        PyrenderSimulator(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]], process=False))
    with pytest.raises(InputError, match="positive size"):
        PyrenderSimulator(trimesh.Trimesh(np.ones((3, 3)), [[0, 1, 2]], process=False))


@gl
@pytest.mark.parametrize("shading", ["lambert", "pbr"])
def test_open_meshes_are_seen_from_both_sides(shading: Any) -> None:
    triangle = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    front_and_back = [[0, 0, 4, 20.0], [180, 0, 4, 20.0]]
    options: dict[str, Any] = {"outputs": ("silhouette", "depth", "rgb"), "shading": shading}
    for antialias in (0, 4):
        front, back = render(PyrenderSimulator(triangle, antialias=antialias, **options), front_and_back)
        assert (front.sum(axis=(1, 2)) > 0).all()
        assert (back[:2].sum(axis=(1, 2)) > 0).all()
        front, back = render(
            PyrenderSimulator(triangle, two_sided=False, antialias=antialias, **options), front_and_back
        )
        assert (front[:2].sum(axis=(1, 2)) > 0).all()
        assert (back == 0).all()


def test_the_callers_mesh_is_not_changed() -> None:
    mesh = teapot(2)
    before = mesh.vertices.copy()
    PyrenderSimulator(mesh, up="z")
    assert np.array_equal(mesh.vertices, before)


# --- the contract of a simulator ------------------------------------------------------------------------------


def test_it_is_a_simulator_made_from_plain_data() -> None:
    simulator = make("pyrender", mesh="teapot", size=[24, 32], outputs=["depth", "rgb"], camera="turntable-log")
    assert isinstance(simulator, Simulator)
    assert simulator.output_shape == (4, 24, 32)
    assert simulator.space.dimension == 4
    assert "6320 faces" in repr(simulator)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outputs": ()}, "silhouette, mask, depth, normals, rgb, rgba"),
        ({"outputs": "albedo"}, "silhouette, mask, depth, normals, rgb, rgba"),
        ({"outputs": ("rgb", "rgb")}, "distinct"),
        ({"size": (64,)}, "height, width"),
        ({"size": (0, 64)}, "positive"),
        ({"size": (64.0, 64)}, "integers"),
        ({"camera": "orbit"}, "turntable, turntable-log, se3"),
        ({"shading": "flat"}, "lambert, pbr"),
        ({"antialias": 8}, "0, 4"),
        ({"up": "x"}, "y, z"),
        ({"platform": "glx"}, "egl, osmesa"),
        ({"colour": (1, 2, 3)}, r"\[0, 1\]"),
        ({"background": 0.5}, "three numbers"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PyrenderSimulator(**options)


def test_parameters_are_checked() -> None:
    simulator = PyrenderSimulator()
    with pytest.raises(InputError, match="azimuth_deg, elevation_deg, distance, half_angle_deg"):
        render(simulator, [0.0, 0.0, 4.0])
    for row in ([0, 0, -1, 20], [0, 0, 4, 0], [0, 0, 4, 90], [np.nan, 0, 4, 20]):
        with pytest.raises(InputError, match="half_angle_deg"):
            render(simulator, row)


@gl
def test_a_batch_is_its_rows_bit_for_bit() -> None:
    simulator = PyrenderSimulator(outputs=("silhouette", "depth", "rgb"))
    batch = render(simulator, POSES)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert np.array_equal(batch, np.concatenate([render(simulator, row) for row in POSES]))
    assert np.array_equal(batch[::-1], render(simulator, POSES[::-1]))
    assert render(simulator, np.empty((0, 4))).shape == (0, 5, 64, 64)


@gl
def test_pickles_render_the_same() -> None:
    simulator = PyrenderSimulator(outputs=("silhouette", "rgb"))
    expected = render(simulator, POSES)
    assert np.array_equal(render(pickle.loads(pickle.dumps(simulator)), POSES), expected)


# --- contexts: several, threads, processes, ranks -------------------------------------------------------------


@gl
def test_one_renderer_goes_and_the_other_stays() -> None:
    first, second = PyrenderSimulator(), PyrenderSimulator(outputs="rgb", size=(32, 32))
    expected, other = render(first, POSES), render(second, POSES)
    del second
    gc.collect()
    assert np.array_equal(render(first, POSES), expected)
    assert np.array_equal(render(PyrenderSimulator(outputs="rgb", size=(32, 32)), POSES), other)


@gl
def test_one_renderer_goes_in_the_middle_of_the_others_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = PyrenderSimulator()
    expected = render(simulator, POSES)
    victims = [PyrenderSimulator(outputs="rgb")]
    render(victims[0], POSES)
    original = PyrenderSimulator._render

    def collect_then_render(self: Any, *arguments: Any) -> None:
        victims.clear()  # as the garbage collector may at any time
        gc.collect()
        original(self, *arguments)

    monkeypatch.setattr(PyrenderSimulator, "_render", collect_then_render)
    assert np.array_equal(render(simulator, POSES), expected)
    assert victims == []


@gl
def test_pyrenders_own_renderer_goes_and_ours_stays(in_subprocess: Callable[..., str]) -> None:
    said = in_subprocess(
        """
        import ctypes
        import numpy as np
        from adapters.render import pyrender_compat as compat
        from adapters.render.pyrender import PyrenderSimulator
        from bridge.errors import SetupError
        pyrender = compat.load("egl")
        simulator, row, seed = PyrenderSimulator(platform="egl"), np.array([[0, 0, 4, 20.0]]), np.zeros(1, np.uint64)
        before = simulator(row, seed)
        scene = pyrender.Scene()
        scene.add(pyrender.PerspectiveCamera(yfov=1.0))
        stock = pyrender.OffscreenRenderer(16, 16)
        stock.render(scene)
        print((simulator(row, seed) == before).all())
        stock.delete()
        print((simulator(row, seed) == before).all())
        pyrender.OffscreenRenderer(16, 16).render(scene)
        # Somebody who closes the display all the same is told of.
        context = simulator._session().context
        context._egl._library.eglTerminate(ctypes.c_void_p(context._display))
        try:
            simulator(row, seed)
        except SetupError as error:
            print(error)
        """,
        PYOPENGL_PLATFORM="egl",
    ).splitlines()
    assert said[:2] == ["True", "True"]
    assert "eglTerminate" in said[2]


@gl
def test_images_that_opengl_has_no_memory_for_are_refused() -> None:
    simulator = PyrenderSimulator(teapot(1), size=(16384, 16384), antialias=4)
    with pytest.raises(InputError, match="16384 x 16384 pixels of 4 samples"):
        render(simulator, POSES[:1])


@gl
def test_many_renderers_come_and_go() -> None:
    expected = None
    for _ in range(20):
        image = render(PyrenderSimulator(outputs="depth"), POSES[:1])
        expected = image if expected is None else expected
        assert np.array_equal(image, expected)


@gl
def test_threads_render_the_same_bits() -> None:
    simulator = PyrenderSimulator(outputs=("silhouette", "depth", "rgb"))
    expected = render(simulator, POSES)
    results: list[bool] = []

    def work() -> None:
        for _ in range(5):
            results.append(np.array_equal(render(simulator, POSES), expected))

    for _ in range(2):  # the second round meets identifiers of threads that have ended
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 30
    assert np.array_equal(render(simulator, POSES), expected)


_HASH = """
import hashlib, sys
import numpy as np
from adapters.render.pyrender import PyrenderSimulator

POSES = np.array([[0, 0, 4, 20], [40, 20, 4, 20], [-100, -35, 3, 25], [170, 80, 6, 12.0]])

def digest(simulator, rows=POSES):
    images = simulator(rows, np.zeros(len(rows), np.uint64))
    return hashlib.sha256(images.tobytes()).hexdigest()

def make():
    return PyrenderSimulator(outputs=("silhouette", "depth", "rgb"))
"""


def here() -> str:
    simulator = PyrenderSimulator(outputs=("silhouette", "depth", "rgb"))
    return hashlib.sha256(render(simulator, POSES).tobytes()).hexdigest()


@gl
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("before", [True, False], ids=["after a context", "before any"])
def test_children_render_the_same_bits(method: str, before: bool, in_subprocess: Callable[..., str]) -> None:
    said = in_subprocess(
        _HASH
        + """
import multiprocessing, warnings
# Python 3.12 warns of any fork beside a thread; that it works beside ours is what is tested here.
warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)

def child(simulator):
    return digest(simulator), digest(make()), digest(simulator)

if __name__ == "__main__":
    simulator = make()
    digests = [digest(simulator)] if sys.argv[2] == "True" else []
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        for three in pool.map_async(child, [simulator] * 4).get(90):
            digests += three
    digests.append(digest(simulator))
    print(*set(digests))
""",
        method,
        str(before),
    )
    assert said.split() == [here()]


@gl
@pytest.mark.mpi
def test_ranks_render_the_same_bits(run_ranks: Callable[..., Any]) -> None:
    done = run_ranks(
        2,
        _HASH
        + """
from mpi4py import MPI
digests = MPI.COMM_WORLD.gather(digest(make()))
if MPI.COMM_WORLD.rank == 0:
    print(*digests)
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [here()] * 2


# --- libraries ------------------------------------------------------------------------------------------------


def test_without_any_gl_library_the_packages_are_named(in_subprocess: Callable[..., str]) -> None:
    said = in_subprocess(
        """
        import ctypes
        real = ctypes.CDLL
        def refuse(name, *rest, **options):
            if name and ("GL" in name or "OSMesa" in name):
                raise OSError(f"{name}: cannot open shared object file: No such file or directory")
            return real(name, *rest, **options)
        ctypes.CDLL = refuse
        import numpy as np
        from adapters.render.pyrender import PyrenderSimulator
        from bridge.errors import SetupError
        simulator = PyrenderSimulator()
        for _ in range(2):
            try:
                simulator(np.array([[0, 0, 4, 20.0]]), np.zeros(1, np.uint64))
            except SetupError as error:
                print(error)
        """
    )
    first, second = said.splitlines()
    assert first == second
    for part in ("libGL.so", "libOSMesa.so", "apt-get install libegl1 libgl1 libgl1-mesa-dri", "dnf install", "pacman"):
        assert part in first


_IN_TURN = """
import os, sys, types
import numpy as np, torch
from adapters.render.pyrender import PyrenderSimulator

def render():
    image = PyrenderSimulator(size=(16, 16))(np.array([[25.0, 15.0, 4.0, 20.0]]), np.zeros(1, np.uint64))
    assert image.sum() > 20

def pyrenders():
    os.environ["PYOPENGL_PLATFORM"] = "egl"
    sys.modules["pyrender.viewer"] = types.ModuleType("pyrender.viewer")  # needs a screen
    sys.modules["pyrender.viewer"].Viewer = None
    import pyrender
    renderer = pyrender.OffscreenRenderer(16, 16)
    scene = pyrender.Scene()
    scene.add(pyrender.PerspectiveCamera(1.0))
    renderer.render(scene)

def optimise():
    theta = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([theta], lr=1e-2)
    theta.sum().backward()
    optimiser.step()
    assert "triton" in sys.modules

def compile():
    assert torch.compile(lambda x: 2 * x.sin(), backend="aot_eager")(torch.ones(3)).shape == (3,)

def triton():
    import triton

def fork():
    child = os.fork()
    if child == 0:
        try:
            render(); optimise()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

for name in sys.argv[1].split():
    globals()[name]()
print("alive")
"""


@gl
@pytest.mark.parametrize(
    "order",
    ["render fork optimise render", "optimise render", "triton render compile", "pyrenders render optimise"],
)
def test_rendering_and_pytorchs_optimisers_share_a_process(order: str, in_subprocess: Callable[..., str]) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton, whose LLVM must get on with Mesa's, is not installed: PyTorch's build for CPUs lacks it")
    assert in_subprocess(_IN_TURN, order).splitlines()[-1] == "alive"


@gl
def test_tritons_library_is_loaded_before_opengls(in_subprocess: Callable[..., str], tmp_path: Path) -> None:
    # A stand-in, so that this is looked at where there is no triton, too.
    folder = tmp_path / "triton" / "_C"
    folder.mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text("raise RuntimeError('triton itself is not imported')")
    shutil.copy(next(iter(Path(np.__file__).parent.glob("_core/_multiarray_tests*.so"))), folder / "libtriton.so")
    said = in_subprocess(
        """
        import ctypes, sys
        sys.path.insert(0, sys.argv[1])
        loaded = []
        original = ctypes.CDLL.__init__
        def noted(self, name, *args, **options):
            loaded.append(str(name))
            original(self, name, *args, **options)
        ctypes.CDLL.__init__ = noted
        import numpy as np
        from adapters.render.pyrender import PyrenderSimulator
        assert not any("triton" in name for name in loaded)  # not before anything is rendered
        PyrenderSimulator(size=(8, 8))(np.array([[0, 0, 4, 20.0]]), np.zeros(1, np.uint64))
        names = [name for name in loaded if "triton" in name or "EGL" in name or "libGL" in name or "OSMesa" in name]
        print(*names)
        """,
        str(tmp_path),
    ).split()
    assert "libtriton.so" in said[0]
    assert len(said) > 1
    assert not any("triton" in name for name in said[1:])


@gl
def test_osmesa_takes_over_and_renders_the_same_bits(in_subprocess: Callable[..., str]) -> None:
    try:
        compat._load_library("OSMesa")
    except OSError as error:
        pytest.skip(f"no OSMesa to fall back to: {error}")
    program = """
import os
from adapters.render import pyrender_compat as compat
if len(sys.argv) == 1:
    original = compat._load_library
    def without_egl(name):
        if name == "EGL":
            raise OSError("libEGL.so.1: cannot open shared object file")
        return original(name)
    compat._load_library = without_egl
    simulator = make()
else:
    simulator = PyrenderSimulator(outputs=("silhouette", "depth", "rgb"), platform=sys.argv[1])
other = PyrenderSimulator(outputs="rgb", antialias=4, size=(32, 48), platform=simulator._platform)
digest(other)
print(digest(simulator), simulator.opengl())
del other
print(digest(simulator))
"""
    for arguments in ((), ("osmesa",)):
        said = in_subprocess(_HASH + program, *arguments).splitlines()
        assert said[0].startswith(f"{here()} osmesa: ")
        assert said[1] == here()


def test_platforms_cannot_be_mixed_and_nothing_is_left_in_the_environment(in_subprocess: Callable[..., str]) -> None:
    said = in_subprocess(
        """
        import os, sys, types
        from adapters.render import pyrender_compat as compat
        from bridge.errors import SetupError
        before = dict(os.environ)
        try:
            compat.load()
        except SetupError:
            pass  # no library here
        print(dict(os.environ) == before)

        class GLXPlatform: pass
        class EGLPlatform: pass
        for platform, wanted in ((GLXPlatform(), "auto"), (EGLPlatform(), "osmesa")):
            sys.modules["OpenGL.platform"] = types.SimpleNamespace(PLATFORM=platform)
            try:
                compat.choose_platform(wanted)
            except SetupError as error:
                print(error)
        """
    ).splitlines()
    assert said[0] == "True"
    assert "GLXPlatform" in said[1]
    assert "Expected OpenGL on osmesa, got egl" in said[2]


def test_a_platform_with_a_screen_is_refused(in_subprocess: Callable[..., str]) -> None:
    said = in_subprocess(
        """
        from adapters.render import pyrender_compat as compat
        from bridge.errors import SetupError
        try:
            compat.choose_platform()
        except SetupError as error:
            print(error)
        """,
        PYOPENGL_PLATFORM="glx",
    )
    assert "needs a screen" in said


def test_missing_python_packages_are_named(in_subprocess: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(SetupError, match=r"simulation-bridge\[render\]"):
        PyrenderSimulator()


@gl
def test_missing_pyrender_is_named(in_subprocess: Callable[..., str]) -> None:
    said = in_subprocess(
        """
        import sys
        sys.modules["pyrender"] = None
        from adapters.render import pyrender_compat as compat
        from bridge.errors import SetupError
        try:
            compat.load()
        except SetupError as error:
            print(error)
        """
    )
    assert "simulation-bridge[render]" in said


@gl
def test_a_gpu_that_is_not_there_is_told() -> None:
    simulator = PyrenderSimulator(device=0)
    name = PyrenderSimulator().opengl()
    if not compat.is_software(name):
        assert simulator.opengl() == name
        return
    with pytest.warns(RuntimeWarning, match="Expected GPU 0, got the software renderer"):
        render(simulator, POSES)


def test_a_software_renderer_beside_a_gpu_is_told_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EGL_DEVICE_ID", "LIBGL_ALWAYS_SOFTWARE", "PYOPENGL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compat, "visible_gpus", lambda: ["/dev/nvidia0"])
    with pytest.warns(RuntimeWarning, match=r"/dev/nvidia0 can be seen\), got the software renderer 'llvmpipe"):
        compat.warn_of_software("llvmpipe (LLVM 15.0.6, 256 bits)")
    compat.warn_of_software("NVIDIA H100/PCIe/SSE2")  # warnings are errors: none may come
    monkeypatch.setenv("LIBGL_ALWAYS_SOFTWARE", "1")
    compat.warn_of_software("llvmpipe")
    monkeypatch.delenv("LIBGL_ALWAYS_SOFTWARE")
    monkeypatch.setattr(compat, "visible_gpus", list)
    compat.warn_of_software("llvmpipe")


@gl
def test_the_renderer_is_asked_about_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(compat, "warn_of_software", asked.append)
    simulator = PyrenderSimulator()
    render(simulator, POSES[:2])
    render(simulator, POSES[:2])
    assert asked == [simulator.opengl().partition(": ")[2]]


@gl
def test_many_objects_have_exact_numbers() -> None:
    # More than a byte's worth, in a row.
    boxes = [trimesh.creation.box((0.8, 0.8, 0.8)).apply_translation((i - 149.5, 0, 0)) for i in range(300)]
    simulator = PyrenderSimulator(
        boxes, size=(4, 1200), outputs="mask", normalise=False, lens="orthographic", antialias=4
    )
    image = render(simulator, [0.0, 0.0, 0.5])[0, 0]  # four pixels a unit
    assert np.array_equal(image[2, 2::4], np.arange(1, 301))


def test_devices_are_spread_over_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*compat._LOCAL_RANK, "EGL_DEVICE_ID"):
        monkeypatch.delenv(name, raising=False)
    mixed = [(10, False), (20, True), (30, False)]
    assert compat._choose_device(mixed, None) == 10
    assert compat._choose_device([(20, True)], None) == 20
    assert compat._choose_device([(20, True)], 3) == 20  # a warning follows
    for variable in compat._LOCAL_RANK:
        monkeypatch.setenv(variable, "3")
        assert compat._choose_device(mixed, None) == 30
        monkeypatch.delenv(variable)
    assert compat._choose_device(mixed, 1) == 30
    with pytest.raises(InputError, match="between 0 and 1"):
        compat._choose_device(mixed, 2)
    monkeypatch.setenv("EGL_DEVICE_ID", "1")
    assert compat._choose_device(mixed, None) == 20
    monkeypatch.setenv("EGL_DEVICE_ID", "9")
    with pytest.raises(InputError, match="EGL_DEVICE_ID"):
        compat._choose_device(mixed, None)
    with pytest.raises(OSError, match="no device"):
        compat._choose_device([], None)


def test_numpy_and_pyopengl_are_cured_only_once() -> None:
    try:
        pyrender = compat.load()
    except SetupError as error:
        pytest.skip(str(error))
    assert compat.load() is pyrender
    box = pyrender.Mesh.from_trimesh(trimesh.creation.box(extents=(1, 2, 3)))
    assert box.bounds.tolist() == [[-0.5, -1, -1.5], [0.5, 1, 1.5]]
    from OpenGL.plugins import FormatHandler

    kind = type(ctypes.byref(ctypes.c_int()))
    checks = FormatHandler.by_name("ctypesparameter").check
    assert checks.count(f"{kind.__module__}.{kind.__name__}") == 1
    with pytest.raises(SetupError, match="window toolkit"):
        pyrender.Viewer(None)
