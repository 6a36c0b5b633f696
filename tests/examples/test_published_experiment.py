"""The published experiment's example: its losses and its points in closed form; it finds the truth, on any ranks."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "published_experiment.py"

# A wedge of alanines, denser than ice, without symmetry.
PARTICLE = "".join(
    f"ATOM  {i:5d} {' NCO'[1 + i % 3]:>2}   ALA A{i:4d}    {2.0 * x:8.3f}{2.0 * y:8.3f}{2.0 * z:8.3f}"
    f"  1.00 20.00          {' NCO'[1 + i % 3]:>2}\n"
    for i, (x, y, z) in enumerate(np.ndindex(24, 12, 6), start=1)
    if x + 2 * y < 32
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("published_experiment")


@pytest.fixture(scope="module")
def particle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("particle") / "p.pdb"
    path.write_text(PARTICLE)
    return path


def arguments_of(example: ModuleType, particle: Path, parameters: int, size: int = 64) -> Any:
    return example.parser().parse_args(
        ["--parameters", str(parameters), "--size", str(size), "--structure", str(particle)]
    )


def test_the_cross_integrates_cubics_and_differentiates_quadratics_exactly(example: ModuleType) -> None:
    rng = np.random.default_rng(0)
    L = rng.normal(size=(3, 3)) + 2 * np.eye(3)
    A, b, x = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=3)

    def quadratic(theta: np.ndarray) -> Any:
        return np.array([theta @ A @ theta + b @ theta, theta[0] ** 3])

    for n in (6, 12):
        smoothed = bridge.smooth(quadratic, seed=1, num_samples=n, points=example.Cross(), scale=torch.as_tensor(L))
        estimate = smoothed.estimate(torch.as_tensor(x), step=n)
        C = L @ L.T
        # E[(x + L e)^T A (x + L e)] = x^T A x + tr(A C), E[(x + s e)^3] = x^3 + 3 x s^2.
        expected = [x @ A @ x + b @ x + np.trace(A @ C), x[0] ** 3 + 3 * x[0] * C[0, 0]]
        np.testing.assert_allclose(estimate.value.numpy(), expected, rtol=1e-10)
        np.testing.assert_allclose(estimate.jacobian().numpy()[0], (A + A.T) @ x + b, rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="multiple of 6"):
        bridge.smooth(quadratic, seed=1, num_samples=4, points=example.Cross()).estimate(torch.as_tensor(x))


@pytest.fixture(scope="module")
def noisy(example: ModuleType, particle: Path) -> Any:
    return example.make_problem(arguments_of(example, particle, 4), "3")


@pytest.fixture(scope="module")
def clean_image(noisy: Any) -> torch.Tensor:
    inner = noisy.simulator.inner
    return torch.as_tensor(inner(inner.reference[None], np.zeros(1, np.uint64))[0].astype(np.float64))


def test_residuals_are_in_units_of_the_noise(noisy: Any, clean_image: torch.Tensor) -> None:
    # Of the 4096 squares of a unit normal the mean is 1 +- 0.022; those of correlated noise scatter more.
    for loss, tolerance in (("l2", 0.2), ("poisson", 1.0), ("whitened", 0.12)):
        mean = 2 * noisy.value(clean_image, loss) / clean_image.numel()
        # Poisson's does not know that the MTF filters the noise, too.
        assert abs(mean - 1) < tolerance, loss
    white = noisy.residual(clean_image, "whitened")
    rows = (white[1:] * white[:-1]).mean() / white.square().mean()
    plain = noisy.residual(clean_image, "l2")
    assert abs(float(rows)) < 0.08
    assert float((plain[1:] * plain[:-1]).mean() / plain.square().mean()) > 0.2  # what there is to whiten


def test_the_correlation_does_not_see_gain_and_offset(noisy: Any, clean_image: torch.Tensor) -> None:
    value = noisy.value(clean_image, "ncc")
    assert noisy.value(0.3 * clean_image + 500.0, "ncc") == pytest.approx(value, rel=1e-9)
    assert noisy.value(0.3 * clean_image + 500.0, "whitened") > 10 * value
    white = [noisy._white(x - x.mean()).reshape(-1) for x in (clean_image, noisy.target)]
    ours, theirs = (x - x.mean() for x in white)
    rho2 = float((ours @ theirs) ** 2 / (ours @ ours) / (theirs @ theirs))
    assert value == pytest.approx(0.5 * float(theirs @ theirs) * (1 - rho2), rel=1e-9)


def test_the_deviance_is_that_of_counts(noisy: Any, clean_image: torch.Tensor) -> None:
    m, n = (x.numpy() / noisy.camera.gain for x in (1.2 * clean_image, noisy.target))
    deviance = 2 * (m - n + n * np.log(n / m)).sum() * noisy.camera.dqe
    assert noisy.value(1.2 * clean_image, "poisson") == pytest.approx(0.5 * deviance, rel=1e-9)
    # The square root's derivative is finite where an image meets the target.
    residual, slopes = noisy.linearised(noisy.target, torch.ones((*noisy.target.shape, 1), dtype=torch.float64))
    assert np.isfinite(residual).all()
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("loss", ["l2", "poisson", "whitened", "ncc"])
def test_linearised_residuals_are_derivatives(
    example: ModuleType, noisy: Any, clean_image: torch.Tensor, loss: str
) -> None:
    problem = example.Problem(noisy.simulator, noisy.target, noisy.camera, loss)
    direction = torch.as_tensor(np.random.default_rng(0).normal(size=clean_image.shape)) * 100
    residual, slopes = problem.linearised(clean_image, direction[..., None])
    h = 1e-5
    there, back = (problem.residual(clean_image + s * h * direction).reshape(-1).numpy() for s in (1, -1))
    np.testing.assert_allclose(slopes[:, 0], (there - back) / (2 * h), rtol=1e-5, atol=1e-6 * np.abs(slopes).max())
    np.testing.assert_array_equal(residual, problem.residual(clean_image).reshape(-1).numpy())


def test_found_means_from_there_on(example: ModuleType) -> None:
    names, aim = ("voltage_kv", "x_nm"), np.array([300.0, 0.0])

    def after(*points: tuple[float, float]) -> Any:
        answers = [example.Answer(10 * (i + 1), i + 1, np.array(p), 0.0) for i, p in enumerate(points)]
        hit = example.found_after(answers, aim, names)
        return hit and hit.runs

    assert after((300, 0.05), (303, 0.0), (305.9, 0.099)) == 10
    assert after((300, 0.0), (300, 0.2), (301, 0.0)) == 30
    assert after((300, 0.0), (306.1, 0.0)) is None


@pytest.mark.parametrize("parameters", [2, 4])
def test_queries_stay_in_the_box_and_are_counted(example: ModuleType, particle: Path, parameters: int) -> None:
    problem = example.make_problem(arguments_of(example, particle, parameters, 32), "clean")
    simulator = problem.simulator
    space = simulator.inner.space
    corner = simulator.coordinates(space.upper)
    np.testing.assert_allclose(simulator.parameters(simulator.coordinates(space.upper)), space.upper, rtol=1e-12)
    smoothed = bridge.smooth(simulator, seed=0, num_samples=4 * parameters, points=example.Cross(), scale=0.1)
    estimate = smoothed.estimate(torch.as_tensor(corner))
    assert 0.5 <= estimate.clipped_fraction <= 1  # of each pair one point at least is outside
    assert np.isfinite(estimate.value.numpy()).all()


@pytest.mark.mpi
def test_the_truth_is_found_alike_on_one_rank_and_on_two(
    tmp_path: Path, particle: Path, run_ranks: Any, run_alone: Any
) -> None:
    arguments = ["--parameters", "2", "--size", "64", "--structure", str(particle), "--starts", "20:22"]
    done = run_alone(EXAMPLE, *arguments, "--targets", "clean", "--out", tmp_path / "alone", timeout=240)
    assert done.returncode == 0, done.stderr
    alone = (tmp_path / "alone" / "answers_2.csv").read_text()
    rows = list(csv.DictReader(alone.splitlines()))
    assert len(rows) == 2
    for row in rows:
        assert int(row["runs_to_least_loss"]) <= 48
        assert abs(float(row["voltage_kv"]) - 300) < 6
        assert abs(float(row["x_nm"])) < 0.1
    ranks = run_ranks(2, EXAMPLE, *arguments, "--targets", "clean", "--out", tmp_path / "shared", timeout=240)
    assert ranks.returncode == 0, ranks.stderr
    assert (tmp_path / "shared" / "answers_2.csv").read_text() == alone
