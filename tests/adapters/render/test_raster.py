"""The rasteriser against geometry with closed forms, against pyrender, and against batches, threads and processes."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from adapters.render.pyrender import PyrenderSimulator
from adapters.render.raster import RasterSimulator
from adapters.render.scene import teapot
from bridge.errors import InputError, SetupError
from bridge.simulator.protocol import Simulator, computes_row_by_row
from bridge.simulator.registry import make
from bridge.testing import check_simulator

trimesh = pytest.importorskip("trimesh", reason="trimesh is optional (extra `render`)")
pytest.importorskip("numba", reason="numba is optional (extra `render`)")

gl = pytest.mark.gl
POSES = np.array([[0, 0, 4, 20], [40, 20, 4, 20], [-100, -35, 3, 25], [170, 80, 6, 12.0]])
ALL = ("silhouette", "mask", "depth", "normals", "rgb", "rgba")


def render(simulator: Any, rows: Any) -> NDArray[np.float32]:
    rows = np.atleast_2d(np.asarray(rows, dtype=np.float64))
    return simulator(rows, np.zeros(len(rows), np.uint64))


def sphere(subdivisions: int = 5) -> Any:
    return trimesh.creation.icosphere(subdivisions=subdivisions, radius=1.0)


def square(half: float, z: float = 0.0) -> Any:
    corners = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)


def pixel_directions(size: int, half_angle_deg: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tangents of the horizontal and vertical angle of each pixel's centre."""
    t = np.tan(np.deg2rad(half_angle_deg)) * ((np.arange(size) + 0.5) / size * 2 - 1)
    return np.meshgrid(t, -t)


# --- closed forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "half_angle"), [(4.0, 20.0), (2.0, 40.0), (10.0, 7.0)])
@pytest.mark.parametrize("two_sided", [True, False])
def test_silhouette_of_a_sphere_is_the_analytic_disc(distance: float, half_angle: float, two_sided: bool) -> None:
    size = 256
    image = render(
        RasterSimulator(sphere(), size=(size, size), two_sided=two_sided), [25.0, -40.0, distance, half_angle]
    )
    assert image.shape == (1, 1, size, size)
    assert set(np.unique(image)) == {0.0, 1.0}
    # The tangent cone has the half angle asin(1/d); its section at unit distance is a disc of radius 1/sqrt(d^2 - 1).
    radius = size / 2 / np.sqrt(distance**2 - 1) / np.tan(np.deg2rad(half_angle))
    assert image.sum() == pytest.approx(np.pi * radius**2, rel=3e-3)
    wrong = size / 2 / np.sqrt((1.01 * distance) ** 2 - 1) / np.tan(np.deg2rad(half_angle))
    assert image.sum() != pytest.approx(np.pi * wrong**2, rel=3e-3)


def test_depth_and_normals_of_a_sphere() -> None:
    size, distance, half_angle = 129, 5.0, 10.0
    simulator = RasterSimulator(sphere(), size=(size, size), outputs=("depth", "normals"), background_depth=-1.0)
    image = render(simulator, [70.0, 10.0, distance, half_angle])[0]
    depth = image[0]
    u, v = pixel_directions(size, half_angle)
    # z (u, v, 1) lies on the sphere around (0, 0, d): z^2 (1 + u^2 + v^2) - 2 z d + d^2 - 1 = 0, the nearer root.
    a, discriminant = 1 + u**2 + v**2, distance**2 - (1 + u**2 + v**2) * (distance**2 - 1)
    inside = discriminant > 0.02
    expected = (distance - np.sqrt(np.where(inside, discriminant, 0))) / a
    assert np.abs(depth - expected)[inside].max() < 3e-3
    assert (depth[discriminant < -0.02] == -1).all()
    # The normal of a sphere is where it is seen, from its centre; camera axes have z backward.
    truth = np.stack([expected * u, expected * v, distance - expected])
    assert np.abs(image[1:] - truth)[:, inside].max() < 5e-3
    assert (image[1:, discriminant < -0.02] == 0).all()


def test_depth_of_planes_is_exact_under_both_projections() -> None:
    box = trimesh.creation.box(extents=(2, 2, 2))
    simulator = RasterSimulator(box, outputs="depth", normalise=False)
    assert render(simulator, [0.0, 0.0, 5.0, 8.0]) == pytest.approx(np.full((1, 1, 64, 64), 4.0), abs=1e-6)
    parallel = RasterSimulator(box, outputs="depth", normalise=False, lens="orthographic")
    image = render(parallel, [0.0, 0.0, 2.0])[0, 0]
    assert image[16:48, 16:48] == pytest.approx(4 * np.sqrt(3) - 1, abs=1e-6)  # from four radii away
    assert (image > 0).sum() == 32 * 32  # half the height shown is twice the box's


def test_lambert_is_its_formula() -> None:
    size, half_angle = 65, 30.0
    options: dict[str, Any] = {"size": (size, size), "colour": (1.0, 0.5, 0.25), "normalise": False}
    image = render(
        RasterSimulator(square(9), outputs="rgb", **options), [[0, 0, 3, half_angle], [180, 0, 3, half_angle]]
    )
    u, v = pixel_directions(size, half_angle)
    cosine = 1 / np.sqrt(1 + u**2 + v**2)
    expected = np.array([1, 0.5, 0.25])[:, None, None] * (0.2 + 0.8 * cosine)
    assert np.abs(image - expected).max() < 1e-6
    lit = RasterSimulator(
        square(9), outputs="rgb", vary="light", fixed={"distance": 3, "half_angle_deg": 30}, **options
    )
    images = render(lit, [[0, 0, 1], [60, 0, 1], [0, 60, 0.5], [100, 0, 1], [0, 0, 5]])
    for image_, cosine_ in zip(images, [1, 0.5, 0.25, 0, 5], strict=True):
        expected = np.minimum(np.array([1, 0.5, 0.25]) * (0.2 + 0.8 * cosine_), 1)
        assert np.abs(image_ - expected[:, None, None]).max() < 1e-6


def test_rgba_is_rgb_on_black_with_its_coverage() -> None:
    options: dict[str, Any] = {"outputs": ("rgb", "rgba", "silhouette"), "background": (0.2, 0.4, 0.6)}
    for antialias in (0, 4):
        image = render(RasterSimulator(antialias=antialias, **options), POSES)
        rgb, rgba, covered = image[:, :3], image[:, 3:7], image[:, 7:]
        assert np.array_equal(rgba[:, 3:], covered)
        behind = np.array([0.2, 0.4, 0.6])[:, None, None] * (1 - covered)
        assert np.abs(rgba[:, :3] + behind - rgb).max() < 1e-6
        assert set(np.unique(4 * covered)) == ({0, 4} if antialias == 0 else {0, 1, 2, 3, 4})


def test_antialiasing_is_nearer_to_the_covered_area() -> None:
    row, size = [0.0, 0.0, 4.0, 20.0], 64
    u, v = pixel_directions(16 * size, row[3])
    disc = ((u**2 + v**2) * (row[2] ** 2 - 1) < 1).reshape(size, 16, size, 16).mean(axis=(1, 3))
    plain, fine = (render(RasterSimulator(sphere(), antialias=n), row)[0, 0] for n in (0, 4))
    assert np.abs(fine - disc).sum() < 0.5 * np.abs(plain - disc).sum()


# --- edges ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-1.3, 1.3), st.floats(-1.3, 1.3)), min_size=1, max_size=6), st.booleans())
def test_triangles_that_share_edges_cover_each_pixel_once(points: list[tuple[float, float]], pixels: bool) -> None:
    from scipy.spatial import Delaunay

    # A triangulation of the whole image, and inner points, some of them on pixel centres and edges.
    inner = np.round(np.array(points) * 16) / 16 if pixels else np.array(points)
    corners = np.concatenate([inner, [[-2, -2], [2, -2], [2, 2], [-2, 2]]])
    corners = np.unique(corners, axis=0)
    faces = Delaunay(corners, qhull_options="QJ Qbb Qc").simplices
    vertices = np.column_stack([corners, np.zeros(len(corners))])
    total = np.zeros((32, 32))
    for face in faces:
        alone = trimesh.Trimesh(vertices[face], [[0, 1, 2]], process=False)
        simulator = RasterSimulator(
            alone, size=(32, 32), normalise=False, lens="orthographic", camera="se3", fixed={"half_height": 1.0}
        )
        total += render(simulator, np.zeros(6))[0, 0]
    assert (total == 1).all()


def test_a_pixel_is_covered_where_its_centre_is() -> None:
    # A rectangle whose edges pass through pixel centres: top and left edges belong to it, bottom and right ones do not.
    lens = (1.0, 1.0, 0.0, 0.0)  # at depth 1, x = X and y = -Y [pixel]
    corners = [[1.5, -1.5, 0], [4.5, -1.5, 0], [4.5, -3.5, 0], [1.5, -3.5, 0]]
    mesh = trimesh.Trimesh(corners, [[0, 3, 2], [0, 2, 1]], process=False)
    pose = np.eye(4)
    pose[2, 3] = 1.0
    simulator = RasterSimulator(mesh, size=(6, 8), lens=lens, camera="se3", base_pose=pose, normalise=False)
    expected = np.zeros((6, 8))
    expected[1:3, 1:4] = 1
    assert np.array_equal(render(simulator, np.zeros(6))[0, 0], expected)


# --- the near plane -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [(0, 0, 0), (0.3, -0.2, 0.5), (-0.9, 0.95, 0.1)])
def test_inside_a_box_every_wall_is_where_it_is(position: tuple[float, float, float]) -> None:
    size = 65
    box = trimesh.creation.box(extents=(2, 2, 2))
    pose = np.eye(4)
    pose[:3, 3] = position
    # The tangent of half the angle is 3: most of the view are side walls that begin behind the camera.
    simulator = RasterSimulator(
        box,
        size=(size, size),
        outputs=("depth", "silhouette"),
        lens=float(np.rad2deg(np.arctan(3))),
        camera="se3",
        base_pose=pose,
        normalise=False,
        two_sided=True,
    )
    depth, covered = render(simulator, np.zeros(6))[0]
    u, v = pixel_directions(size, np.rad2deg(np.arctan(3)))
    x, y, z = position
    with np.errstate(divide="ignore"):
        expected = np.minimum.reduce(
            [
                np.full_like(u, z + 1),
                np.where(u > 0, 1 - x, 1 + x) / np.abs(u),
                np.where(v > 0, 1 - y, 1 + y) / np.abs(v),
            ]
        )
    assert (covered == 1).all()
    # Where two walls meet a pixel may be given to either: their depths differ by less than a pixel there.
    assert np.abs(depth / expected - 1).max() < 0.02
    assert np.quantile(np.abs(depth / expected - 1), 0.9) < 1e-4


def test_a_floor_under_the_camera_reaches_to_the_horizon_and_not_above() -> None:
    size, height = 64, 0.5
    floor = trimesh.Trimesh(
        [[-900, 0, -900], [900, 0, -900], [900, 0, 900], [-900, 0, 900]], [[0, 2, 1], [0, 3, 2]], process=False
    )
    pose = np.eye(4)
    pose[:3, 3] = (0, height, 0)
    simulator = RasterSimulator(
        floor,
        size=(size, size),
        outputs=("depth", "silhouette"),
        camera="se3",
        lens=45.0,
        base_pose=pose,
        normalise=False,
    )
    depth, covered = render(simulator, np.zeros(6))[0]
    _, v = pixel_directions(size, 45.0)
    with np.errstate(divide="ignore"):
        expected = np.where(v < 0, height / -v, np.inf)
    seen = expected < 900
    assert np.array_equal(covered == 1, seen)
    assert seen.any()
    # Half a pixel below the horizon, corners snapped by up to 1/512 pixel move the depth by up to 0.4 %.
    assert depth[seen] == pytest.approx(expected[seen], rel=5e-3)
    assert depth[v < -0.1] == pytest.approx(expected[v < -0.1] * seen[v < -0.1], rel=1e-3)


def test_triangles_behind_the_camera_and_around_its_plane_leave_nothing() -> None:
    for corners in ([[-1, -1, 2], [1, -1, 2], [0, 1, 2]], [[-1, -1, 0], [1, -1, 0], [0, 1, 0]]):
        mesh = trimesh.Trimesh(corners, [[0, 1, 2]], process=False)
        simulator = RasterSimulator(
            mesh, camera="se3", lens=45.0, base_pose=np.eye(4), normalise=False, outputs=("silhouette", "rgb")
        )
        assert (render(simulator, np.zeros(6)) == 0).all()


def test_projections_far_outside_the_image_are_cut_without_overflow() -> None:
    # Corners near the camera's plane lie millions of pixels away.
    mesh = trimesh.Trimesh([[-1e4, -1, -0.02], [1e4, -1, -0.02], [0, 1e4, -1e4]], [[0, 1, 2]], process=False)
    for lens in (0.01, 45.0, 89.9):
        simulator = RasterSimulator(
            mesh,
            size=(33, 33),
            camera="se3",
            lens=lens,
            base_pose=np.eye(4),
            normalise=False,
            outputs=("silhouette", "depth"),
        )
        covered, depth = render(simulator, np.zeros(6))[0]
        # The plane y + 1 = -(z + 0.02) (1e4 + 1) / (1e4 - 0.02) holds the triangle: solve for the depth at each pixel.
        u, v = pixel_directions(33, lens)
        slope = (1e4 + 1) / (1e4 - 0.02)
        with np.errstate(divide="ignore"):
            expected = (1 + 0.02 * slope) / (slope - v)
        inside = (expected > 0.02) & (expected < 1e4) & (np.abs(u * expected) < 1e4 * (1 - expected / 1e4))
        assert (covered[inside] == 1).mean() > 0.97 if inside.any() else (covered == 0).all()
        # At 89.9 deg the horizon is 7 / 256 pixel from the middle row's centre, and corners are rounded to 1 / 256.
        rel = 0.02 if lens < 80 else 0.07
        assert depth[inside & (covered == 1)] == pytest.approx(expected[inside & (covered == 1)], rel=rel)


# --- pyrender -------------------------------------------------------------------------------------------------


@gl
@pytest.mark.parametrize("camera", ["turntable", "orthographic", "se3", "pinhole"])
@pytest.mark.parametrize("kind", ["teapot", "closed", "open"])
def test_both_renderers_see_the_same(camera: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    box = trimesh.creation.box((1, 1, 0.5))
    ball = trimesh.creation.icosphere(2, 0.4).apply_translation([0.7, 0.3, 0])
    ring = trimesh.creation.torus(0.7, 0.2, major_sections=24, minor_sections=12)
    tube = trimesh.creation.cylinder(0.3, 1.4, sections=20)
    tube.update_faces(np.abs(tube.face_normals[:, 2]) < 0.5)  # without its lids
    mesh: Any = {"teapot": "teapot", "closed": [box, ball], "open": [ring, tube]}[kind]
    options: dict[str, Any] = {"size": (64, 80), "outputs": ALL, "vary": ("camera", "objects", "light", "colours")}
    rows = rng.uniform([-180, -85, 1.2, 12], [180, 85, 6, 40], (40, 4))
    if camera == "orthographic":
        options["lens"], rows = "orthographic", np.column_stack([rows[:, :2], rng.uniform(0.5, 2, 40)])
    elif camera == "se3":
        options |= {"camera": "se3"}
        rows = rng.uniform([-180] * 3 + [-0.5, -0.5, -2], [180] * 3 + [0.5, 0.5, 2.5], (40, 6))
    elif camera == "pinhole":
        options["lens"], rows = (150.0, 110.0, 30.0, 41.0), rows[:, :3]
    first, second = RasterSimulator(mesh, **options), PyrenderSimulator(mesh, **options)
    assert first.space == second.space
    objects = 1 if kind == "teapot" else 2
    turns = rng.normal(size=(40, objects, 6)) * [20, 20, 20, 0.1, 0.1, 0.1]
    light = rng.uniform([-90, -90, 0.5], [90, 90, 1.5], (40, 3))
    paint = rng.uniform(0.2, 1, (40, 3 * objects))
    rows = np.column_stack([rows, turns.reshape(40, -1), light, paint])
    a, b = render(first, rows), render(second, rows)
    for x, y in zip(a[:, 0], b[:, 0], strict=True):
        union = np.maximum(x, y).sum()
        assert union == 0 or np.minimum(x, y).sum() / union >= 0.995
    assert (a[:, 0].sum(axis=(1, 2)) > 30).mean() > 0.9
    both = (a[:, 1] == b[:, 1]) & (a[:, 1] > 0)
    assert (a[:, 1] != b[:, 1]).mean() < 1e-3
    # Interior pixels: their neighbours belong to the object as well.
    inner = both.copy()
    for axis in (1, 2):
        for step in (-1, 1):
            inner &= np.roll(both, step, axis)
    assert np.abs(a[:, 2] / b[:, 2].clip(1e-6) - 1)[inner].max() < 0.01
    assert np.quantile(np.abs(a[:, 3:6] - b[:, 3:6]).max(axis=1)[inner], 0.99) < 2e-3
    for part in (slice(6, 9), slice(9, 13)):
        assert np.quantile(np.abs(a[:, part] - b[:, part]), 0.999) < 2 / 255


@gl
def test_both_renderers_cut_at_the_same_near_plane() -> None:
    rng = np.random.default_rng(4)
    # Close to the teapot and inside it.
    rows = rng.uniform([-180, -80, 0.05, 20], [180, 80, 1.1, 60], (40, 4))
    a, b = (render(kind(outputs=("silhouette", "depth")), rows) for kind in (RasterSimulator, PyrenderSimulator))
    assert (a[:, 0] != b[:, 0]).mean() < 2e-3
    both = (a[:, 0] == 1) & (b[:, 0] == 1)
    assert 0.3 < both.mean() < 0.999
    # A depth buffer of 24 bits and a ratio of 1:2000 between the planes leave pyrender fewer digits.
    assert np.quantile(np.abs(a[:, 1] / b[:, 1].clip(1e-6) - 1)[both], 0.99) < 0.01


@gl
def test_both_renderers_take_samples_in_the_same_points() -> None:
    a, b = (render(kind(antialias=4), POSES) for kind in (RasterSimulator, PyrenderSimulator))
    assert np.abs(a - b).max() <= 0.25 + 0.01  # 8 bits
    assert (np.abs(a - b) > 0.01).mean() < 1e-3


# --- the contract of a simulator ------------------------------------------------------------------------------


def test_it_is_a_simulator_made_from_plain_data() -> None:
    simulator = make("raster", mesh="teapot", size=[24, 32], outputs=["depth", "rgb"], camera="turntable-log")
    assert isinstance(simulator, Simulator)
    assert computes_row_by_row(simulator)
    check_simulator(RasterSimulator(outputs=ALL), POSES)
    assert simulator.output_shape == (4, 24, 32)
    assert simulator.space.names == ("log_half_height", "elevation_deg", "azimuth_deg", "log_distance")
    assert "6320 faces" in repr(simulator)


@pytest.mark.parametrize("antialias", [0, 4])
def test_a_batch_is_its_rows_bit_for_bit(antialias: Any) -> None:
    simulator = RasterSimulator(outputs=ALL, antialias=antialias, vary=("camera", "objects", "light", "colours"))
    rng = np.random.default_rng(0)
    rows = np.tile(np.concatenate([POSES, POSES])[:, :1], simulator.space.dimension)
    rows = rng.uniform(0.1, 0.9, rows.shape)
    rows[:, :4] = np.concatenate([POSES, POSES + 0.1])
    batch = render(simulator, rows)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert np.array_equal(batch, np.concatenate([render(simulator, row) for row in rows]))
    assert np.array_equal(batch[::-1], render(simulator, rows[::-1]))
    assert render(simulator, np.empty((0, rows.shape[1]))).shape == (0, 13, 64, 64)


def test_outputs_alone_are_outputs_together() -> None:
    together = render(RasterSimulator(outputs=ALL), POSES)
    first = 0
    for name, channels in zip(ALL, (1, 1, 1, 3, 3, 4), strict=True):
        alone = render(RasterSimulator(outputs=name), POSES)
        assert np.array_equal(alone, together[:, first : first + channels])
        first += channels


def test_leaving_back_faces_out_changes_nothing_on_a_closed_mesh() -> None:
    torus = trimesh.creation.torus(1.0, 0.3)
    front, both = (render(RasterSimulator(torus, outputs=ALL, two_sided=b), POSES) for b in (False, True))
    assert np.array_equal(front, both)
    assert front[:, 0].sum() > 1000


def test_pickles_and_threads_render_the_same_bits() -> None:
    simulator = RasterSimulator(outputs=ALL)
    expected = render(simulator, POSES)
    assert np.array_equal(render(pickle.loads(pickle.dumps(simulator)), POSES), expected)
    results: list[bool] = []

    def work() -> None:
        for _ in range(5):
            results.append(np.array_equal(render(simulator, POSES), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_forked_and_fresh_processes_render_the_same_bits(tmp_path: Path) -> None:
    program = """
import hashlib, multiprocessing, sys
import numpy as np
import adapters.render.raster
assert "numba" not in sys.modules and "trimesh" not in sys.modules  # the import is light
POSES = np.array([[0, 0, 4, 20], [40, 20, 4, 20], [-100, -35, 3, 25], [170, 80, 6, 12.0]])
def digest(simulator):
    return hashlib.sha256(simulator(POSES, np.zeros(4, np.uint64)).tobytes()).hexdigest()
if __name__ == "__main__":
    simulator = adapters.render.raster.RasterSimulator(outputs=("silhouette", "depth", "rgb"))
    digests = [digest(simulator)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        digests += pool.map_async(digest, [simulator] * 4).get(90)
    print(*set(digests))
"""
    path = tmp_path / "program.py"
    path.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    here = render(RasterSimulator(outputs=("silhouette", "depth", "rgb")), POSES)
    assert done.stdout.split() == [hashlib.sha256(here.tobytes()).hexdigest()]


def test_it_is_compiled_once_for_all_kinds_of_scenes_and_options() -> None:
    from adapters.render import raster_kernels

    box = trimesh.creation.box()
    for mesh in (box, [box, box]):
        for camera in ("turntable", "se3"):
            for vary in ("camera", ("camera", "objects", "light", "colours")):
                simulator = RasterSimulator(mesh, camera=camera, vary=vary, outputs=ALL)
                for k in (1, 3):
                    render(simulator, np.full((k, simulator.space.dimension), 0.5))
    assert len(raster_kernels.render.signatures) == 1


def test_nothing_is_cached_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    from adapters.render import raster_kernels

    real = numba.njit
    asked = []

    def refuse(*_: Any, **options: Any) -> Any:
        asked.append(options.get("cache", False))
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return real(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    assert raster_kernels._compiled(lambda x: x + 1)(2) == 3
    assert asked == [True, False]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = RasterSimulator()
    monkeypatch.delitem(sys.modules, "adapters.render.raster_kernels", raising=False)
    monkeypatch.setattr("adapters.render.raster_kernels", None, raising=False)
    monkeypatch.delattr("adapters.render.raster_kernels")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(SetupError, match=r"simulation-bridge\[render\]"):
        render(simulator, POSES)
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(SetupError, match=r"simulation-bridge\[render\]"):
        RasterSimulator()


def test_colours_that_a_mesh_brings() -> None:
    red = [255, 0, 0, 255]
    for kind in ("vertex", "face", "texture", "material"):
        box = trimesh.creation.box()
        if kind == "vertex":
            box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=[red] * len(box.vertices))
        elif kind == "face":
            box.visual = trimesh.visual.ColorVisuals(box, face_colors=[red] * len(box.faces))
        elif kind == "material":
            material = trimesh.visual.material.PBRMaterial(baseColorFactor=red)
            box.visual = trimesh.visual.TextureVisuals(material=material)
        else:
            image = pytest.importorskip("PIL.Image", reason="pillow is optional").new("RGB", (4, 4), (255, 0, 0))
            box.visual = trimesh.visual.TextureVisuals(uv=np.full((len(box.vertices), 2), 0.5), image=image)
        red_, green, blue = render(RasterSimulator(box, outputs="rgb"), POSES[1])[0]
        assert red_.max() > 0.3
        assert green.max() == blue.max() == 0
        # Varied colours are factors on what the mesh brings.
        painted = RasterSimulator(
            box,
            outputs="rgb",
            vary="colours",
            fixed=dict(zip(("azimuth_deg", "elevation_deg"), POSES[1], strict=False)),
        )
        half = render(painted, [0.5, 1, 1])[0]
        assert half[0] == pytest.approx(red_ / 2, abs=1e-6)


@gl
@pytest.mark.parametrize("kind", ["vertex", "face", "texture", "pbr texture", "material", "simple material"])
def test_both_renderers_take_the_same_colours_from_a_mesh(kind: str) -> None:
    box = trimesh.creation.box()
    orange, materials = [255, 128, 26, 255], trimesh.visual.material
    uv = np.full((len(box.vertices), 2), 0.5)
    if kind == "vertex":
        box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=[orange] * len(box.vertices))
    elif kind == "face":
        box.visual = trimesh.visual.ColorVisuals(box, face_colors=[orange] * len(box.faces))
    elif kind == "material":
        box.visual = trimesh.visual.TextureVisuals(material=materials.PBRMaterial(baseColorFactor=orange))
    elif kind == "simple material":
        box.visual = trimesh.visual.TextureVisuals(material=materials.SimpleMaterial(diffuse=orange))
    else:
        image = pytest.importorskip("PIL.Image", reason="pillow is optional").new("RGB", (4, 4), tuple(orange[:3]))
        material = None
        if kind == "pbr texture":
            material = materials.PBRMaterial(baseColorTexture=image, baseColorFactor=[128, 255, 255, 255])
        box.visual = trimesh.visual.TextureVisuals(uv=uv, image=image, material=material)
    a, b = (render(renderer(box, outputs="rgb"), POSES) for renderer in (RasterSimulator, PyrenderSimulator))
    assert a.max() > 0.3
    assert np.quantile(np.abs(a - b), 0.999) < 2 / 255


@pytest.mark.parametrize("extension", ["glb", "obj", "ply", "stl"])
def test_mesh_files_and_scenes(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"a mesh ü.{extension}"
    teapot(4).export(path)
    simulator = make("raster", mesh=str(path), size=[48, 48], outputs=["silhouette"])
    reference = RasterSimulator(teapot(4), size=(48, 48))
    assert (render(simulator, POSES) != render(reference, POSES)).sum() <= 4  # files keep single precision
    if extension == "glb":
        scene = trimesh.Scene()
        for x in (-1, 1):
            matrix = np.eye(4)
            matrix[0, 3] = x
            scene.add_geometry(sphere(2), transform=matrix @ np.diag([0.2, 0.2, 0.2, 1]))
        scene.export(path)
        for mesh in (scene, path):
            image = render(RasterSimulator(mesh, outputs="mask"), [0, 0, 4, 20.0])[0, 0]
            assert set(np.unique(image)) == {0, 1, 2}  # each geometry is an object
            assert (image == 1).sum() == pytest.approx((image == 2).sum(), abs=3)


@gl
def test_meshes_that_are_no_surfaces_are_drawn_alike() -> None:
    # Three sheets on one edge, a face twice, a face of no area, an unused vertex.
    fan = trimesh.Trimesh(
        [[0, -1, 0], [0, 1, 0], [1, 0, 0], [-0.6, 0, 0.7], [-0.6, 0, -0.7], [9, 9, 9]],
        [[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 4], [2, 2, 3]],
        process=False,
    )
    a, b = (render(kind(fan, outputs=("silhouette", "depth")), POSES) for kind in (RasterSimulator, PyrenderSimulator))
    assert np.array_equal(a[:, 0], b[:, 0])
    assert a[:, 0].sum() > 100
    assert np.abs(a[:, 1] - b[:, 1]).max() < 2e-3


@gl
@pytest.mark.parametrize("unit", [1e-9, 1e12])
def test_tiny_and_gigantic_meshes_are_drawn_alike(unit: float) -> None:
    mesh = teapot(4)
    mesh.apply_scale(unit)
    for normalise in (True, False):
        options: dict[str, Any] = {"outputs": ("silhouette", "depth"), "normalise": normalise}
        first, second = RasterSimulator(mesh, **options), PyrenderSimulator(mesh, **options)
        a, b = (render(kind, [30, 20, 4 * kind.radius, 20])[0] for kind in (first, second))
        assert np.array_equal(a[0], b[0])
        assert a[0].sum() > 300
        assert b[1][b[0] == 1] == pytest.approx(a[1][b[0] == 1], rel=1e-3)


@pytest.mark.parametrize("kind", [RasterSimulator, PyrenderSimulator])
def test_what_cannot_be_rendered_is_refused(kind: Any) -> None:
    triangle = [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    nothing = trimesh.Trimesh([[0, 0, 0]], np.zeros((0, 3), int), process=False)
    for mesh, said in (
        (nothing, "triangles"),
        ([], "empty list"),
        (trimesh.Trimesh([*triangle[:2], [0, np.nan, 0]], [[0, 1, 2]], process=False), "finite"),
        (trimesh.Trimesh([*triangle[:2], [0, np.inf, 0]], [[0, 1, 2]], process=False), "finite"),
        (trimesh.Trimesh(triangle, [[0, 1, 7]], process=False), "between vertices 0 and 2"),
        (trimesh.Trimesh(np.array(triangle) * 1e200, [[0, 1, 2]], process=False), "below 1e"),
        (trimesh.Trimesh(np.ones((3, 3)), [[0, 1, 2]], process=False), "positive size"),
        (trimesh.Trimesh(np.full((3, 3), 1e6) + 1e-9, [[0, 1, 2]], process=False), "positive size"),
        (np.zeros((3, 3)), "ndarray"),
    ):
        with pytest.raises(InputError, match=said):
            kind(mesh)
    for options, said in (
        ({"size": (10**6, 64)}, "up to 16384"),
        ({"size": (-3, 64)}, "positive integers"),
        ({"size": 64}, "height, width"),
        ({"lens": 0}, "between 0 and 90"),
        ({"lens": 90.0}, "between 0 and 90"),
        ({"lens": (0, 1, 2, 3)}, "positive focal lengths"),
        ({"lens": "fisheye"}, "Expected lens"),
        ({"vary": ("pose",)}, "camera, objects, light, colours"),
        ({"vary": ()}, "camera, objects, light, colours"),
        ({"fixed": {"roll": 1}}, "Unknown parameter 'roll'"),
        ({"fixed": {"half_angle_deg": 120}}, "between 0 and 90 deg"),
        ({"fixed": {"distance": 0}}, "positive distance"),
        ({"fixed": {"distance": np.nan}}, "finite value for distance"),
        ({"base_pose": np.eye(4)}, "camera='turntable'"),
        ({"camera": "se3", "base_pose": np.ones((4, 4))}, "rigid motion"),
        ({"inside": "maybe"}, "render, raise"),
    ):
        with pytest.raises(InputError, match=said):
            kind(**options)
    wary = kind(inside="raise")
    with pytest.raises(InputError, match="outside the objects' bounding spheres"):
        wary(np.array([[0, 0, 0.5, 20.0]]), np.zeros(1, np.uint64))
    for row in ([0, 0, -1, 20], [0, 0, 4, 0], [0, 0, 4, 90], [np.nan, 0, 4, 20], [0, 0, np.inf, 20], [0, 0, 1e308, 20]):
        with pytest.raises(InputError, match="half_angle_deg"):
            kind()(np.array([row], dtype=float), np.zeros(1, np.uint64))


def test_the_callers_mesh_is_not_changed() -> None:
    mesh = teapot(2)
    before = mesh.vertices.copy()
    RasterSimulator(mesh, up="z")
    assert np.array_equal(mesh.vertices, before)


@pytest.mark.mpi
def test_ranks_render_the_same_bits(run_ranks: Any) -> None:
    done = run_ranks(
        2,
        """
import hashlib
import numpy as np
from mpi4py import MPI
from adapters.render.raster import RasterSimulator
poses = np.array([[0, 0, 4, 20], [40, 20, 4, 20], [-100, -35, 3, 25], [170, 80, 6, 12.0]])
images = RasterSimulator(outputs="rgb")(poses, np.zeros(4, np.uint64))
digests = MPI.COMM_WORLD.gather(hashlib.sha256(images.tobytes()).hexdigest())
if MPI.COMM_WORLD.rank == 0:
    print(*digests)
""",
    )
    assert done.returncode == 0, done.stderr
    here = hashlib.sha256(render(RasterSimulator(outputs="rgb"), POSES).tobytes()).hexdigest()
    assert done.stdout.split() == [here] * 2
    assert os.environ.get("NUMBA_NUM_THREADS") is None  # nothing is left in the environment
