"""The alignment of a tilt series: its columns are the Jacobian, its nuisances vanish, it aligns, on any ranks alike."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import bridge
from simulators.cryoet import Specimen

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "align_tilt_series.py"
POSE = ((30.0, -20.0, 40.0, 25.0, 60.0, -40.0),)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("align_tilt_series")


@pytest.fixture(scope="module")
def layout(example: ModuleType) -> Any:
    return example.Layout(Specimen.helix(98), POSE, images=3, largest_deg=40.0, size=72, pixel=7.0)


def test_columns_hold_all_of_the_jacobian(example: ModuleType, layout: Any) -> None:
    """Of the smooth mode, against automatic differentiation in one image's own parameters and the axis."""
    series, theta = layout.series("smooth"), example.truth(layout, 7)
    box = bridge.as_simulator(example.Columns(series, theta), natural_scale=example.UNITS[:4].tolist())
    smoothed = bridge.smooth(box, seed=0, num_samples=8, points="antithetic-orthogonal", scale=0.02)
    columns = smoothed.estimate(torch.zeros(4)).jacobian()
    names, n, t = list(series.space.names), layout.images, 1
    for k, name in enumerate([f"{kind}[{t}]" for kind in example.KINDS] + ["tilt_axis_deg"]):
        tangent = torch.zeros(3 * n + 1, dtype=torch.float64)
        tangent[names.index(name)] = 1.0
        point = torch.from_numpy(example.inputs(series, theta))
        _, exact = torch.func.jvp(series.image, (point,), (tangent,))
        seen = slice(None) if k == 3 else slice(t, t + 1)  # the axis is that of all images
        error = columns[seen, ..., k].to(torch.float64) - exact[seen]
        assert float(error.square().sum() / exact.square().sum()) < 0.03**2, name
        assert k == 3 or float(exact[[0, 2]].abs().max()) == 0.0


def test_gain_offset_and_background_vanish(example: ModuleType) -> None:
    random = torch.Generator().manual_seed(0)
    model, slopes = (
        torch.rand(2, 32, 32, generator=random, dtype=torch.float64),
        torch.rand(2, 4, 32, 32, generator=random, dtype=torch.float64),
    )
    u = torch.linspace(-1, 1, 32, dtype=torch.float64)
    target = 50 + 3.0 * model + 2.0 * u - 5.0 * u[:, None]
    misfit = example.Misfit(target.numpy(), 1)
    _, gradient, squares = misfit.normal(model, slopes, free_gain=True)
    assert np.abs(squares).max() < 1e-18 * float((target**2).sum())
    assert np.abs(gradient).max() < 1e-9
    # What looks like gain, offset or background is no evidence of a parameter.
    flat = torch.stack((model, torch.ones_like(model), u.expand_as(model), slopes[:, 0]), 1)
    normal, _, _ = misfit.normal(model, flat, free_gain=True)
    assert np.abs(normal[:, :3]).max() < 1e-9
    assert normal[:, 3, 3].min() > 0.1
    # With the gain taken from the means, the model's contrast counts.
    _, _, left = misfit.normal(model, slopes, free_gain=False)
    assert left.min() > 1.0


def test_residuals_are_in_units_of_the_electrons_noise(example: ModuleType) -> None:
    mean = np.full((2, 64, 64), [[[30.0]], [[80.0]]]) + np.linspace(-5, 5, 64)
    counts = np.random.default_rng(0).poisson(mean).astype(np.float64)
    for factor in (1, 2, 4):
        flat = torch.ones(2, 64 // factor, 64 // factor, dtype=torch.float64)
        _, _, squares = example.Misfit(counts, factor).normal(flat, flat[:, None], free_gain=False)
        number = (64 // factor) ** 2 - 3  # less a plane
        assert np.abs(squares / number - 1).max() < 5 * np.sqrt(2 / number)


def test_blocks_make_an_arrow(example: ModuleType) -> None:
    """J^T J of all parameters, from each image's own columns."""
    random = np.random.default_rng(1)
    parts = random.normal(size=(3, 20, 6))  # three images, their own three columns and three common ones
    full = np.zeros((60, 12))
    for t, part in enumerate(parts):
        full[20 * t : 20 * t + 20, [t, 3 + t, 6 + t, 9, 10, 11]] = part
    np.testing.assert_allclose(example.assembled(np.einsum("tik,til->tkl", parts, parts)), full.T @ full)
    np.testing.assert_allclose(example.assembled(parts.sum(1)), full.sum(0))


def test_the_other_code_path_sees_the_same(example: ModuleType, layout: Any) -> None:
    """Multislice on a finer grid against the simulator's smooth mode: the contrast agrees to five per cent, but for
    what square pixels do."""
    true = example.truth(layout, 3)
    other = torch.from_numpy(example.expected(layout, true))
    series = layout.series("smooth")
    own = series.image(torch.from_numpy(example.inputs(series, true)))
    f = np.fft.fftfreq(layout.size)
    pixel = torch.from_numpy(np.sinc(f)[:, None] * np.sinc(f))
    collected = torch.fft.ifft2(torch.fft.fft2(own) * pixel).real
    inside = (slice(None), slice(6, -6), slice(6, -6))
    error = (other - collected)[inside]
    contrast = collected[inside] - collected.mean((1, 2), keepdim=True)
    assert float(error.square().mean() / contrast.square().mean()) < 0.05**2


def test_without_noise_the_truth_is_found(example: ModuleType, layout: Any) -> None:
    same = replace(layout, thresholded=True)
    true = example.truth(same, 5)
    found = example.align(same, example.DQE * example.expected(same, true), example.coarse(same, true, 5), 5)
    errors = example.by_kind(same, found.theta - true)
    assert found.runs == 8 * len(example.SCHEDULE) + example.TRIALS
    assert errors[0] < 0.3, errors  # angstrom, from up to 30
    assert errors[1] < 0.3, errors
    assert errors[2] < 0.06, errors  # um, from up to 0.3
    assert errors[3] < 0.2, errors  # degrees, from up to 2


@pytest.mark.slow
def test_astigmatism_is_found(example: ModuleType, layout: Any) -> None:
    """From none. An orthogonal direction for each column is needed: with four for six the shifts diverge."""
    same = replace(layout, thresholded=True, astigmatic=True)
    true = example.truth(same, 5)
    first = example.coarse(same, true, 5)
    np.testing.assert_array_equal(true[-2:], [0.03, 0.05])
    np.testing.assert_array_equal(first[-2:], 0.0)
    found = example.align(same, example.DQE * example.expected(same, true), first, 5)
    errors = example.by_kind(same, found.theta - true)
    assert found.runs == 12 * len(example.SCHEDULE) + example.TRIALS
    assert errors[0] < 0.3, errors
    assert errors[1] < 0.3, errors
    assert errors[2] < 0.06, errors
    assert errors[3] < 0.2, errors
    assert errors[4] < 0.01, errors  # um, from 0.041


@pytest.mark.parametrize(("option", "kinds"), [("--gain=1", 4), ("--astigmatism", 5)])
def test_the_options_of_the_command_line(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    kinds: int,
) -> None:
    """With noise, in units of the Cramer-Rao bounds; with a gain of 1 expected counts are rounded to electrons."""
    arguments = ["--images=3", "--size=64", "--pixel=8", "--subunits=98", "--single", "--targets=20:21"]
    monkeypatch.setattr("sys.argv", ["align", *arguments, option, f"--output={tmp_path / 'errors.json'}"])
    layouts = []
    monkeypatch.setattr(
        example, "align", lambda layout, *rest, inner=example.align: layouts.append(layout) or inner(layout, *rest)
    )
    example.main()
    assert {(layout.gain, layout.astigmatic) for layout in layouts} == {(1.0, False) if kinds == 4 else (1000.0, True)}
    start, *_, found, _ = json.loads((tmp_path / "errors.json").read_text())
    assert (start["method"], found["method"]) == ("start", "columns")
    assert len(found["ratio"]) == kinds
    assert max(start["ratio"]) > 30
    assert max(found["ratio"]) < 3, found
    assert ("astigmatism" in capsys.readouterr().out) == (kinds == 5)


@pytest.mark.mpi
@pytest.mark.slow
def test_series_are_aligned_alike_on_one_rank_and_on_two(example: ModuleType, run_ranks: Any) -> None:
    alone = example.Layout(Specimen.helix(98), example.MIDDLE, 5, size=64, pixel=8.0)
    information = example.fisher(alone, example.truth(alone, 20))
    results, arrays = example.compare(alone, 20, ["columns"], information)
    (errors,) = (r for r in results if r.method == "columns")
    # In units of the bounds, over five images.
    assert max(errors.ratio) < 3, errors
    # The last step is repeated here: that decision has to be the same on all ranks as well.
    assert errors.runs > 8 * len(example.SCHEDULE) + example.TRIALS
    arguments = ["--images", "5", "--size", "64", "--pixel", "8", "--subunits", "98", "--single", "--targets", "20:21"]
    ranks = run_ranks(2, EXAMPLE, *arguments, timeout=240)
    assert ranks.returncode == 0, ranks.stderr
    assert re.findall(r"parameters (\w+)", ranks.stdout) == [example.digest(arrays["columns"])]
