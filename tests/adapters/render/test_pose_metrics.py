"""Pose metrics against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from adapters.render import pose_metrics as metrics
from adapters.render.cameras import Perspective, Pinhole
from adapters.render.pose_metrics import Symmetry
from bridge.errors import InputError

CUBE = np.array([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)])


def pose(vector_deg: Any = (0, 0, 0), shift: Any = (0, 0, 0)) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(vector_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def random_poses(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(count, 3)) - [0, 0, 10]
    return poses


# --- angles and translations ----------------------------------------------------------------------------------


@given(st.floats(0, 180), st.integers(0, 100))
def test_the_angle_between_rotations_is_the_angle_turned(angle: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis), degrees=True).as_matrix()
    first = random_poses(1, seed)[0, :3, :3]
    # Near 180 deg the sine is flat: half the digits are left.
    tolerance = 1e-10 if angle < 179 else 1e-5
    assert metrics.rotation_angle_deg(first, first @ turn) == pytest.approx(angle, abs=tolerance)
    assert metrics.rotation_angle_deg(turn @ first, first) == pytest.approx(angle, abs=tolerance)


def test_small_angles_keep_their_digits() -> None:
    assert metrics.rotation_angle_deg(pose((1e-7, 0, 0)), np.eye(4)) == pytest.approx(1e-7, rel=1e-6)
    assert metrics.axis_angle_deg(pose((1e-7, 0, 0)), np.eye(4), (0, 0, 1)) == pytest.approx(1e-7, rel=1e-6)


def test_translations_and_batches() -> None:
    many = random_poses(6, 0).reshape(2, 3, 4, 4)
    assert metrics.translation_error(many, np.eye(4)) == pytest.approx(np.linalg.norm(many[..., :3, 3], axis=-1))
    assert metrics.rotation_angle_deg(many, many[:1]).shape == (2, 3)
    assert metrics.translation_error(pose(shift=(3, 4, 0)), pose()) == 5
    for function in (metrics.add, metrics.adi):
        batched = function(CUBE, many, many[::-1])
        alone = [[function(CUBE, many[i, j], many[1 - i, j]) for j in range(3)] for i in range(2)]
        assert batched == pytest.approx(np.array(alone))


def test_viewing_directions() -> None:
    assert metrics.direction_angle_deg(350, 0, 20, 0) == pytest.approx(30)
    assert metrics.direction_angle_deg(0, 80, 180, 80) == pytest.approx(20)  # over the pole
    assert metrics.direction_angle_deg(0, 100, 180, 80) == pytest.approx(0, abs=1e-6)  # the same place
    rng = np.random.default_rng(0)
    a, e, b, f = np.deg2rad(rng.uniform(-90, 90, (4, 100)))
    first, second = (np.stack([np.sin(x) * np.cos(y), np.sin(y), np.cos(x) * np.cos(y)]) for x, y in ((a, e), (b, f)))
    expected = np.rad2deg(np.arccos((first * second).sum(axis=0)))
    assert metrics.direction_angle_deg(*np.rad2deg([a, e, b, f])) == pytest.approx(expected, abs=1e-6)


# --- points ---------------------------------------------------------------------------------------------------


def test_add_of_a_translation_is_its_length_and_of_a_rotation_its_chords() -> None:
    truth = random_poses(1, 1)[0]
    moved = truth.copy()
    moved[:3, 3] += [1, 2, 2]
    assert metrics.add(CUBE, moved, truth) == pytest.approx(3)
    # A turn by t about z moves a point at distance sqrt 2 from the axis by 2 sqrt 2 sin(t / 2).
    assert metrics.add(CUBE, pose((0, 0, 40)), pose()) == pytest.approx(2 * np.sqrt(2) * np.sin(np.deg2rad(20)))


def test_adi_does_not_see_symmetries_and_is_never_above_add() -> None:
    assert metrics.adi(CUBE, pose((0, 90, 0)), pose()) == pytest.approx(0, abs=1e-12)
    assert metrics.add(CUBE, pose((0, 90, 0)), pose()) == pytest.approx(2)
    # A shift by less than half an edge: the nearest corner is the point's own.
    assert metrics.adi(CUBE, pose(shift=(0.3, 0, 0)), pose()) == pytest.approx(0.3)
    # By more than that: half of the corners are nearer to their neighbours.
    assert metrics.adi(CUBE, pose(shift=(1.6, 0, 0)), pose()) == pytest.approx((0.4 + 1.6) / 2)
    first, second = random_poses(20, 2), random_poses(20, 3)
    second[:, :3, 3] = first[:, :3, 3] + 0.1
    assert (metrics.adi(CUBE, first, second) <= metrics.add(CUBE, first, second) + 1e-12).all()
    brute = [
        np.linalg.norm((CUBE @ p[:3, :3].T + p[:3, 3])[:, None] - (CUBE @ q[:3, :3].T + q[:3, 3]), axis=2)
        .min(axis=1)
        .mean()
        for p, q in zip(first, second, strict=True)
    ]
    assert metrics.adi(CUBE, first, second) == pytest.approx(np.array(brute))


def test_reprojection() -> None:
    lens = (200.0, 100.0, 32.0, 32.0)
    # At depth 10 a shift by (0.3, 0.4) is one of (6, 4) pixels, for every point of a plane.
    plane = CUBE[CUBE[:, 2] == 1] * [1, 1, 0]
    first, second = pose(shift=(0, 0, -10)), pose(shift=(0.3, 0.4, -10))
    assert metrics.reprojection_error(plane, first, second, lens) == pytest.approx(np.hypot(6, 4))
    assert metrics.reprojection_error(CUBE, first, first, lens) == 0
    with pytest.raises(InputError, match="in front"):
        metrics.reprojection_error(CUBE, first, pose(), lens)
    with pytest.raises(InputError, match="fx, fy, cx, cy"):
        metrics.reprojection_error(CUBE, first, first, (1, 0, 0, 0))


def test_diameter() -> None:
    assert metrics.diameter(CUBE) == pytest.approx(2 * np.sqrt(3))
    rng = np.random.default_rng(0)
    points = rng.normal(size=(300, 3))
    brute = np.linalg.norm(points[:, None] - points, axis=2).max()
    assert metrics.diameter(points) == pytest.approx(brute)
    assert metrics.diameter(points * [1, 1, 0]) == pytest.approx(
        np.linalg.norm((points[:, None] - points) * [1, 1, 0], axis=2).max()
    )


def test_overlap_of_masks() -> None:
    first, second = np.zeros((2, 8, 8))
    first[:, :4] = 1
    second[:, 2:6] = 1
    assert metrics.mask_iou(first, second) == pytest.approx(1 / 3)
    assert metrics.mask_iou(first, first) == 1
    assert metrics.mask_iou(first * 0, second * 0) == 1
    assert metrics.mask_iou(first, 0 * first) == 0
    assert metrics.mask_iou(first / 2, first) == pytest.approx(0.5)
    assert metrics.mask_iou(np.stack([first, second]), second) == pytest.approx([1 / 3, 1])
    with pytest.raises(InputError, match="of one size"):
        metrics.mask_iou(first, np.zeros((8, 9)))


# --- symmetries -----------------------------------------------------------------------------------------------


def test_finite_symmetries() -> None:
    square = Symmetry.cyclic(4, (0, 0, 1))
    assert len(square.rotations) == 4
    for angle, left in ((0, 0), (30, 30), (50, 40), (90, 0), (135, 45), (-100, 10)):
        assert square.rotation_angle_deg(pose((0, 0, angle)), pose()) == pytest.approx(left, abs=1e-6)
    assert square.rotation_angle_deg(pose((180, 0, 0)), pose()) == pytest.approx(180)
    prism = Symmetry.dihedral(4, (0, 0, 1), (1, 0, 0))
    assert len(prism.rotations) == 8
    assert prism.rotation_angle_deg(pose((180, 0, 0)), pose()) == pytest.approx(0, abs=1e-5)
    assert prism.add(CUBE, pose((180, 0, 0)), pose()) == pytest.approx(0, abs=1e-12)
    assert prism.add(CUBE, pose((0, 0, 80), (0, 0, 2)), pose()) == pytest.approx(
        float(metrics.add(CUBE, pose((0, 0, -10), (0, 0, 2)), pose()))
    )
    # Nothing changes where the object has none.
    first, second = random_poses(5, 4), random_poses(5, 5)
    assert Symmetry().rotation_angle_deg(first, second) == pytest.approx(metrics.rotation_angle_deg(first, second))
    assert Symmetry().add(CUBE, first, second) == pytest.approx(metrics.add(CUBE, first, second))
    # A symmetric turn of the estimate changes nothing.
    turned = first.copy()
    turned[:, :3, :3] = first[:, :3, :3] @ prism.rotations[5]
    assert prism.rotation_angle_deg(turned, second) == pytest.approx(prism.rotation_angle_deg(first, second), abs=1e-6)


def test_a_continuous_axis_leaves_the_tilt() -> None:
    bottle = Symmetry.revolution((0, 1, 0))
    for turn in (0, 33, 180):
        estimate = pose((0, 0, 25)) @ pose((0, turn, 0))
        assert bottle.rotation_angle_deg(estimate, pose()) == pytest.approx(25)
    assert bottle.rotation_angle_deg(pose((180, 0, 0)), pose()) == pytest.approx(180)
    assert Symmetry.revolution((0, 1, 0), flip=True).rotation_angle_deg(pose((170, 0, 0)), pose()) == pytest.approx(10)
    # It is the smallest angle over all turns about the axis.
    first, second = random_poses(4, 6), random_poses(4, 7)
    turns = Rotation.from_rotvec([[0, a, 0] for a in np.arange(0, 360, 0.25)], degrees=True).as_matrix()
    swept = np.min([metrics.rotation_angle_deg(first[:, :3, :3] @ t, second) for t in turns], axis=0)
    assert bottle.rotation_angle_deg(first, second) == pytest.approx(swept, abs=0.01)
    ring = np.array([[np.cos(a), 0.3, np.sin(a)] for a in np.linspace(0, 2 * np.pi, 360, endpoint=False)])
    spun = pose((0, 77, 0), (0, 0.5, 0))
    assert metrics.add(ring, spun, pose()) > 1
    error = float(bottle.add(ring, spun, pose()))
    assert 0.5 <= error <= 0.5 + np.pi / 64


def test_what_is_no_symmetry_is_refused() -> None:
    with pytest.raises(InputError, match="group"):
        Symmetry(np.stack([np.eye(3), pose((0, 0, 40))[:3, :3]]))
    with pytest.raises(InputError, match="axis onto itself"):
        Symmetry(pose((40, 0, 0))[None, :3, :3], np.array([0.0, 0, 1]))
    with pytest.raises(InputError, match="positive order"):
        Symmetry.cyclic(0)
    with pytest.raises(InputError, match="not all zero"):
        Symmetry.revolution((0, 0, 0))


def _scaled() -> np.ndarray:
    return pose() * [[1000.0]] + np.diag([0, 0, 0, -999.0])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: metrics.rotation_angle_deg(np.eye(2), np.eye(2)), "rotations .* or poses"),
        (lambda: metrics.rotation_angle_deg(-np.eye(3), np.eye(3)), "mirror image of determinant -1"),
        (lambda: metrics.rotation_angle_deg(np.full((3, 3), np.nan), np.eye(3)), "NaN or infinity in 9 of 9"),
        (lambda: metrics.rotation_angle_deg(1.01 * np.eye(3), np.eye(3)), "off the identity by 0.02.*Take scales out"),
        (lambda: metrics.rotation_angle_deg(_scaled(), np.eye(3)), "Take scales out"),
        (lambda: metrics.rotation_angle_deg("abc", np.eye(3)), "rotations as real numbers"),
        (lambda: metrics.rotation_angle_deg(np.eye(3) * 1j, np.eye(3)), "real numbers, got dtype complex"),
        (lambda: metrics.rotation_angle_deg(random_poses(3, 0), random_poses(2, 0)), r"leading axes \(3,\) and \(2,\)"),
        (lambda: metrics.axis_angle_deg(np.eye(3), np.eye(3), (0, np.nan, 1)), "finite"),
        (lambda: metrics.axis_angle_deg(random_poses(3, 0), random_poses(2, 0), (0, 0, 1)), "leading axes"),
        (lambda: metrics.direction_angle_deg(np.nan, 0, 0, 0), "angles as finite"),
        (lambda: metrics.direction_angle_deg(np.zeros(2), np.zeros(3), 0, 0), "leading axes"),
        (lambda: metrics.translation_error(np.eye(3), np.eye(3)), "poses"),
        (lambda: metrics.translation_error(pose(shift=(0, np.inf, 0)), pose()), "poses as finite"),
        (lambda: metrics.translation_error(pose(shift=(1, 2, 3)).T, pose()), "last row 0 0 0 1.*transpose"),
        (lambda: metrics.rotation_angle_deg(pose(shift=(1, 2, 3)).T, pose()), "last row 0 0 0 1.*transpose"),
        (lambda: metrics.axis_angle_deg(pose(), pose(shift=(1, 0, 0)).T, (0, 0, 1)), "last row 0 0 0 1.*transpose"),
        (lambda: metrics.Symmetry.cyclic(2).rotation_angle_deg(pose(shift=(1, 0, 0)).T, pose()), "last row 0 0 0 1"),
        (lambda: metrics.rotation_angle_deg(None, pose()), "got None"),
        (lambda: metrics.add(np.zeros((1, 3)), pose(), [None, None]), "got None"),
        (lambda: metrics.direction_angle_deg(1.0, None, 1.0, 1.0), "angles as real numbers, got None"),
        (lambda: metrics.translation_error(random_poses(3, 0), random_poses(2, 0)), "leading axes"),
        (lambda: metrics.add(np.zeros((0, 3)), pose(), pose()), "points"),
        (lambda: metrics.add(np.zeros((3, 5)), pose(), pose()), r"points \(n, 3\)"),
        (lambda: metrics.add([[0, 0, np.nan]], pose(), pose()), "points as finite"),
        (lambda: metrics.add(CUBE, random_poses(3, 0), random_poses(2, 0)), "leading axes"),
        (lambda: metrics.adi(CUBE, random_poses(3, 0), random_poses(2, 0)), "leading axes"),
        (lambda: metrics.adi(CUBE, _scaled(), pose()), "Take scales out"),
        (lambda: metrics.reprojection_error(CUBE, pose(), pose(), Perspective(20.0)), "knows no pixels"),
        (lambda: metrics.reprojection_error(CUBE, pose(), pose(), (1, 1, np.nan, 0)), "lens .* as finite"),
        (lambda: metrics.reprojection_error(CUBE, pose(), pose(), "wide"), "lens .* as real"),
        (lambda: metrics.mask_iou(np.full((4, 4), 255, np.uint8), np.ones((4, 4))), r"in \[0, 1\], got 255 to 255"),
        (lambda: metrics.mask_iou(np.ones((4, 4)), np.arange(16).reshape(4, 4)), "one number"),
        (lambda: metrics.mask_iou(np.full((4, 4), np.nan), np.ones((4, 4))), "NaN"),
        (lambda: metrics.mask_iou(np.full((4, 4), -0.1), np.ones((4, 4))), "got -0.1"),
        (lambda: metrics.mask_iou(np.ma.masked_less(np.eye(4), 0.5), np.ones((4, 4))), "masked"),
        (lambda: metrics.mask_iou(np.ones((4, 0)), np.ones((4, 0))), "height, width"),
        (lambda: metrics.mask_iou(np.ones((2, 4, 4)), np.ones((3, 4, 4))), "leading axes"),
        (lambda: metrics.diameter([[0, 0, np.inf]]), "finite"),
        (lambda: Symmetry(np.full((1, 3, 3), np.nan)), "finite"),
        (lambda: Symmetry.cyclic(2.5), "integer"),  # type: ignore[arg-type]
        (lambda: Symmetry.cyclic(2).add(CUBE, random_poses(3, 0), random_poses(2, 0)), "leading axes"),
        (lambda: Symmetry.cyclic(2).rotation_angle_deg(np.zeros((3, 3)), np.eye(3)), "off the identity"),
    ],
)
def test_what_is_no_pose_no_point_and_no_mask_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()


def test_what_is_one_is_taken_in_any_number_type() -> None:
    assert metrics.mask_iou(np.ones((4, 4), bool), np.ones((4, 4), np.uint8)) == 1
    assert metrics.mask_iou(np.ones((0, 4, 4)), np.ones((4, 4))).shape == (0,)
    turned = pose((10, 20, 30)).astype(np.float32)
    assert metrics.rotation_angle_deg(turned, turned.astype(np.float64)) == pytest.approx(0, abs=1e-4)
    assert metrics.rotation_angle_deg(np.eye(3, dtype=int), np.eye(3).tolist()) == 0
    assert metrics.translation_error(np.zeros((0, 4, 4)), pose()).shape == (0,)
    away, moved = pose(shift=(0, 0, -4)), pose(shift=(1, 0, -4))
    lens = Pinhole(50.0, 60.0, 32.0, 20.0)
    expected = metrics.reprojection_error(CUBE, away, moved, (50, 60, 32, 20))
    assert metrics.reprojection_error(CUBE, away, moved, lens) == expected > 0
