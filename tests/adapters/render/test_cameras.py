"""Lenses, cameras and their parameters against closed forms, and against where a rendered ball appears."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.spatial.transform import Rotation

from adapters.render.cameras import (
    Orthographic,
    Perspective,
    Pinhole,
    as_lens,
    inverse_pose,
    rotation_from_vector,
    turntable_pose,
)
from adapters.render.raster import RasterSimulator
from bridge.errors import InputError

trimesh = pytest.importorskip("trimesh", reason="trimesh is optional (extra `render`)")
pytest.importorskip("numba", reason="numba is optional (extra `render`)")

HEIGHT, WIDTH = 121, 160


def ball(*centre: float, radius: float = 0.05) -> Any:
    return trimesh.creation.icosphere(subdivisions=3, radius=radius).apply_translation(centre)


def render(simulator: RasterSimulator, row: Any) -> Any:
    return simulator(np.atleast_2d(np.asarray(row, dtype=float)), np.zeros(1, np.uint64))[0]


def seen_at(simulator: RasterSimulator, row: Any, number: int = 1) -> np.ndarray:
    """(x, y) of the middle of an object in the image."""
    y, x = np.nonzero(render(simulator, row)[0] == number)
    return np.array([x.mean(), y.mean()]) + 0.5


# --- motions --------------------------------------------------------------------------------------------------


def test_rotations_are_the_exponentials_of_their_vectors() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1e-9, 1e-3, 1, np.pi, 9):
        w = rng.normal(size=3)
        w *= size / np.linalg.norm(w)
        cross = np.array([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]])
        assert rotation_from_vector(w) == pytest.approx(expm(cross), abs=1e-12)
    many = rng.normal(size=(4, 5, 3))
    assert rotation_from_vector(many)[2, 3] == pytest.approx(Rotation.from_rotvec(many[2, 3]).as_matrix(), abs=1e-12)


def test_turntables_stand_where_documented_and_look_at_the_origin() -> None:
    rng = np.random.default_rng(1)
    azimuth, elevation, distance = rng.uniform([-360, -89, 0.1], [360, 89, 9], (50, 3)).T
    pose = turntable_pose(azimuth, elevation, distance)
    a, e = np.deg2rad(azimuth), np.deg2rad(elevation)
    position = distance * np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    assert np.allclose(pose[:, :3, 3].T, position, atol=1e-12)
    origin = (inverse_pose(pose) @ [0, 0, 0, 1]).T
    assert origin == pytest.approx(np.array([0 * a, 0 * a, -distance, 0 * a + 1]), abs=1e-12)
    assert (pose[:, 1, 1] > 0).all()  # the camera's up points up
    assert pose[:, 1, 0] == pytest.approx(np.zeros(50))  # and its right is level
    assert pose @ inverse_pose(pose) == pytest.approx(np.broadcast_to(np.eye(4), (50, 4, 4)), abs=1e-12)


# --- lenses ---------------------------------------------------------------------------------------------------


def test_lenses_from_plain_data() -> None:
    assert as_lens(20) == Perspective(20.0)
    assert as_lens([100, 90, 31.5, 32]) == Pinhole(100.0, 90.0, 31.5, 32.0)
    assert as_lens("orthographic") == "orthographic"
    assert as_lens(Orthographic(2.0)) == Orthographic(2.0)
    assert as_lens(None) is None
    for bad in (True, "wide", [1, 2, 3], 0, -5, 90, (0, 1, 1, 1), (np.inf, 1, 1, 1), {}):
        with pytest.raises(InputError):
            as_lens(bad)
    for half in (0, -1, np.nan, np.inf):
        with pytest.raises(InputError, match="half_height"):
            Orthographic(half)


def test_each_lens_puts_points_where_its_formula_says() -> None:
    rng = np.random.default_rng(2)
    pinhole, parallel, angle = Pinhole(170.0, 130.0, 70.0, 55.0), Orthographic(1.5), Perspective(25.0)
    for point in rng.uniform(-0.8, 0.8, (5, 3)):
        azimuth, elevation, distance = rng.uniform([-180, -80, 5], [180, 80, 8])
        x, y, z = (inverse_pose(turntable_pose(azimuth, elevation, distance)) @ [*point, 1])[:3]
        f = HEIGHT / 2 / np.tan(np.deg2rad(25))
        s = HEIGHT / 3
        for lens, row, expected in (
            (pinhole, [azimuth, elevation, distance], (170 * x / -z + 70, 55 - 130 * y / -z)),
            (angle, [azimuth, elevation, distance], (f * x / -z + WIDTH / 2, HEIGHT / 2 - f * y / -z)),
            (None, [azimuth, elevation, distance, 25], (f * x / -z + WIDTH / 2, HEIGHT / 2 - f * y / -z)),
            (parallel, [azimuth, elevation], (s * x + WIDTH / 2, HEIGHT / 2 - s * y)),
            ("orthographic", [azimuth, elevation, 1.5], (s * x + WIDTH / 2, HEIGHT / 2 - s * y)),
        ):
            simulator = RasterSimulator(ball(*point), size=(HEIGHT, WIDTH), lens=lens, normalise=False, outputs="mask")
            assert simulator.space.dimension == len(row)
            assert seen_at(simulator, row) == pytest.approx(expected, abs=0.5)


# --- parametrisations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lens", [None, 20.0, "orthographic"])
def test_the_log_camera_sees_the_same(lens: Any) -> None:
    options: dict[str, Any] = {"outputs": ("silhouette", "depth"), "lens": lens}
    raw, log = RasterSimulator(**options), RasterSimulator(camera="turntable-log", **options)
    azimuth, elevation, distance = 40.0, -20.0, 3.0
    if lens is None:
        rows = (
            [azimuth, elevation, distance, 15],
            [np.log(distance * np.tan(np.deg2rad(15))), elevation, azimuth, np.log(distance)],
        )
    elif lens == 20.0:
        rows = ([azimuth, elevation, distance], [elevation, azimuth, np.log(distance)])
    else:
        rows = ([azimuth, elevation, 1.4], [np.log(1.4), elevation, azimuth])
    a, b = render(raw, rows[0]), render(log, rows[1])
    # exp(log(d)) may differ from d in its last bit, and a pixel on the edge with it.
    assert (np.abs(a - b) > 1e-4).sum() <= 2
    assert a[0].sum() > 100


def test_the_tangent_of_rigid_motions_is_its_formula() -> None:
    rng = np.random.default_rng(3)
    base = turntable_pose(30.0, 20.0, 5.0)
    simulator = RasterSimulator(camera="se3", base_pose=base, normalise=True)
    assert simulator.space.names == (
        "rotation_x_deg",
        "rotation_y_deg",
        "rotation_z_deg",
        "shift_x",
        "shift_y",
        "shift_z",
    )
    rows = rng.normal(size=(6, 6)) * [40, 40, 40, 0.2, 0.2, 0.2]
    rows[0] = 0
    found = simulator.object_to_camera(rows)
    assert found.shape == (6, 1, 4, 4)
    start = np.linalg.inv(base)
    for row, pose in zip(rows, found[:, 0], strict=True):
        turn = Rotation.from_rotvec(row[:3], degrees=True).as_matrix()
        assert pose[:3, :3] == pytest.approx(turn @ start[:3, :3], abs=1e-12)
        assert pose[:3, 3] == pytest.approx(start[:3, 3] + row[3:], abs=1e-12)
    # At the base pose it is the turntable, pixel by pixel.
    turntable = RasterSimulator(lens=20.0)
    assert np.array_equal(render(simulator, np.zeros(6)), render(turntable, [30.0, 20.0, 5.0]))
    # In the image: +x to the right, +y up, +z nearer; a turn about z is anticlockwise.
    balls = [ball(0.5, 0, 0, radius=0.3), ball(-3, 0, 0)]
    simulator = RasterSimulator(balls, camera="se3", normalise=False, outputs="mask", size=(65, 65))
    middle = seen_at(simulator, np.zeros(6))
    assert seen_at(simulator, [0, 0, 0, 0.5, 0, 0])[0] > middle[0] + 1
    assert seen_at(simulator, [0, 0, 0, 0, 0.5, 0])[1] < middle[1] - 1
    assert seen_at(simulator, [0, 0, 0, 0, 0, 6])[0] > middle[0] + 1
    assert seen_at(simulator, [0, 0, 90, 0, 0, 0]) == pytest.approx([32.5, 65 - middle[0]], abs=0.5)


def test_objects_move_about_their_own_centres() -> None:
    box = trimesh.creation.box((0.6, 0.2, 0.2)).apply_translation((1, 0, 0))
    simulator = RasterSimulator(
        [box, ball(-1, 0, 0, radius=0.2)], vary="objects", normalise=False, outputs="mask", size=(HEIGHT, WIDTH)
    )
    assert simulator.space.dimension == 12
    assert simulator.space.names[6:9] == ("object1_rotation_x_deg", "object1_rotation_y_deg", "object1_rotation_z_deg")
    still = render(simulator, np.zeros(12))[0]
    assert set(np.unique(still)) == {0, 1, 2}
    turned = render(simulator, np.eye(12)[2] * 90)[0]
    assert np.array_equal(still == 2, turned == 2)  # the other one stays

    def extent(image: Any) -> tuple[int, int]:
        y, x = np.nonzero(image == 1)
        return int(np.ptp(y)), int(np.ptp(x))

    high, wide = extent(still)
    assert wide > 2.5 * high
    assert extent(turned) == pytest.approx((wide, high), abs=3)
    at, moved = (seen_at(simulator, row) for row in (np.zeros(12), np.eye(12)[4] * 0.3))
    assert moved[0] == pytest.approx(at[0], abs=0.6)
    assert moved[1] < at[1] - 3
    # The pose says the same: x -> c + R (x - c) + u in the world, then the camera.
    rng = np.random.default_rng(4)
    row = rng.normal(size=12) * np.tile([30, 30, 30, 0.1, 0.1, 0.1], 2)
    world = turntable_pose(0.0, 0.0, 4 * simulator.radius)
    for number, centre in ((0, [1, 0, 0]), (1, [-1, 0, 0])):
        w, u = row[6 * number : 6 * number + 3], row[6 * number + 3 : 6 * number + 6]
        point = rng.normal(size=3)
        expected = centre + Rotation.from_rotvec(w, degrees=True).apply(point - centre) + u
        seen = simulator.object_to_camera(row[None])[0, number] @ [*point, 1]
        assert world @ seen == pytest.approx([*expected, 1], abs=1e-9)


def test_an_object_in_front_hides_the_one_behind() -> None:
    simulator = RasterSimulator(
        [ball(0, 0, 0, radius=0.5), ball(0, 0, 1, radius=0.2)], vary="objects", outputs="mask", normalise=False
    )
    behind = np.zeros(12)
    behind[11] = -2
    front, hidden = render(simulator, np.zeros(12))[0], render(simulator, behind)[0]
    assert (front == 2).sum() > 10
    assert (hidden == 2).sum() == 0
    assert (hidden == 1).sum() > (front == 1).sum()


def test_groups_are_varied_in_the_order_given_and_fixed_values_leave() -> None:
    simulator = RasterSimulator(
        vary=("light", "camera", "colours"), fixed={"distance": 3.0, "light_intensity": 0.7, "object0_green": 0.1}
    )
    assert simulator.space.names == (
        "light_azimuth_deg",
        "light_elevation_deg",
        "azimuth_deg",
        "elevation_deg",
        "half_angle_deg",
        "object0_red",
        "object0_blue",
    )
    full = RasterSimulator(vary=("light", "camera", "colours"), outputs="rgb")
    part = RasterSimulator(
        vary=("light", "camera", "colours"),
        outputs="rgb",
        fixed={"distance": 3.0, "light_intensity": 0.7, "object0_green": 0.1},
    )
    a = render(full, [20, 30, 0.7, 40, 10, 3, 20, 0.5, 0.1, 0.9])
    assert np.array_equal(a, render(part, [20, 30, 40, 10, 20, 0.5, 0.9]))
    # Without the camera among the inputs it stands where it stands by default.
    still = RasterSimulator(vary="colours", outputs="rgb")
    assert np.array_equal(render(still, [0.8, 0.8, 0.8]), render(RasterSimulator(outputs="rgb"), [0, 0, 4, 20]))
    with pytest.raises(InputError, match="all of light fixed"):
        RasterSimulator(vary="light", fixed={"light_azimuth_deg": 0, "light_elevation_deg": 0, "light_intensity": 1})


def test_every_parameter_has_a_unit_bounds_where_needed_and_a_scale_that_shows() -> None:
    for camera in ("turntable", "turntable-log", "se3"):
        for lens in (None, "orthographic"):
            simulator = RasterSimulator(
                camera=camera, lens=lens, vary=("camera", "objects", "light", "colours"), outputs=("silhouette", "rgb")
            )
            start = np.array(
                [
                    {
                        "distance": 4,
                        "log_distance": np.log(4),
                        "half_angle_deg": 20,
                        "log_half_height": np.log(1.5),
                        "half_height": 1.5,
                        "light_intensity": 1,
                        "object0_red": 0.8,
                        "object0_green": 0.8,
                        "object0_blue": 0.8,
                    }.get(name, 0.0)
                    for name in simulator.space.names
                ]
            )
            assert simulator.space.describe_outside(start) == ""
            image = render(simulator, start)
            for i, parameter in enumerate(simulator.space.parameters):
                assert (parameter.unit == "deg") == parameter.name.endswith("_deg")
                if parameter.unit != "deg" or parameter.name == "half_angle_deg":
                    assert np.isfinite([parameter.lower, parameter.upper]).all()
                row = start.copy()
                row[i] -= parameter.natural_scale
                changed = np.abs(render(simulator, row) - image).sum()
                # A parallel projection does not see how far away things are.
                unseen = lens == "orthographic" and parameter.name in ("shift_z", "object0_shift_z")
                assert changed < 1 if unseen else changed > 5, parameter.name
            for bound in (simulator.space.lower, simulator.space.upper):
                corner = np.where(np.isfinite(bound), bound, start)
                assert np.isfinite(render(simulator, corner)).all()
