"""The variance study: its cells, its errors against theory, and what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import variance_study as study

from bridge.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
INFORMATION = {"gaussian": 1, "logistic": 1 / 3, "gumbel": 1, "cauchy": 1 / 2, "laplace": 1}


def cell(name, distribution="gaussian", points="mc", antithetic=False, covariate="none"):
    return study.Cell(name, distribution, points, antithetic, covariate)


def test_there_are_447_published_cells():
    cells = [*study.published("sorting"), *study.published("paths")]
    assert len(cells) == len(set(cells)) == 447
    count = {
        (p, g): sum((c.problem, c.distribution == "gumbel") == (p, g) for c in cells)
        for p, g in {(c.problem, c.distribution == "gumbel") for c in cells}
    }
    assert count == {
        ("sorting 3", False): 5 * 24,
        ("sorting 3", True): 12,
        ("sorting 5", False): 5 * 21,
        ("sorting 5", True): 12,
        ("paths 8", False): 5 * 18,
        ("paths 8", True): 9,
        ("paths 12", False): 5 * 18,
        ("paths 12", True): 9,
    }
    for c in cells:
        assert c.feasible_size(256) is not None


def test_every_cell_can_be_made_and_the_infeasible_ones_are_refused():
    for c in study.published("sorting"):
        c.smoothed(c.feasible_size(64))
    with pytest.raises(InputError, match="symmetric"):
        cell("sorting 3", "gumbel", antithetic=True).smoothed(64)
    with pytest.raises(InputError, match=r"243 and 1024"):
        study.jacobians(cell("sorting 5", points="rqmc-cartesian").smoothed(256), np.zeros(5), 1)


@pytest.mark.parametrize("distribution", sorted(INFORMATION))
@pytest.mark.parametrize("name", ["sorting 3", "sorting 5"])
def test_errors_of_plain_monte_carlo_are_what_theory_says(name, distribution):
    """|F|^2 = n is constant, so the mean square error is exactly (n E|s|^2 - |J|^2) / N."""
    n, size = int(name[-1]), 64
    row = study.measure(cell(name, distribution), size, 256)
    truth, _ = study.oracle(name, distribution)
    exact = np.sqrt((n * n * INFORMATION[distribution] - np.sum(truth**2)) / size)
    assert row.rms == pytest.approx(exact, abs=4.5 * row.rms_error)
    assert row.rms_error < 0.06 * exact  # it could tell leave-one-out or antithetic pairs from it


def test_covariates_of_dependent_rows_are_what_theory_says():
    """Scores that sum to zero: f(x) is the same as none, leave-one-out is none times N / (N - 1)."""
    for points, antithetic in (("mc", True), ("qmc-latin", False), ("rqmc-latin", True)):
        none, fx, loo = (
            study.jacobians(cell("sorting 5", "logistic", points, antithetic, c).smoothed(16), np.arange(5) / 3, 8)
            for c in study.COVARIATES
        )
        np.testing.assert_allclose(fx, none, atol=1e-12)
        np.testing.assert_allclose(loo, none * 16 / 15, atol=1e-12)


def rows():
    return study.read_csv(ROOT / "docs" / "variance_study" / "cells.csv")


def test_the_committed_results_are_whole_and_reproducible():
    everything = rows()
    assert len({(r.problem, r.distribution, r.strategy) for r in everything if r.published}) == 447
    assert all(r.rms > 0 and r.rms_error > 0 for r in everything)
    for c in (cell("sorting 3", "laplace", "rqmc-latin", covariate="loo"), cell("sorting 5", "auto", "auto")):
        if c.points == "auto":
            c = study.Cell("sorting 5", "gumbel", *study.BEYOND["auto"], "auto")
        (known,) = (
            r
            for r in everything
            if (r.problem, r.distribution, r.strategy, r.n) == (c.problem, c.distribution, c.name, 64)
        )
        assert study.measure(c, 64, known.repetitions).rms == pytest.approx(known.rms, rel=1e-5)


def test_auto_is_never_worse_than_leave_one_out():
    by = {(r.problem, r.distribution, r.strategy, r.n): r for r in rows()}
    compared = 0
    for (problem, distribution, strategy, n), auto in by.items():
        if strategy == "auto":
            plain = by[problem, distribution, "mc + loo", n]
            # 72 comparisons: four standard errors.
            assert auto.rms < plain.rms + 4 * np.hypot(auto.rms_error, plain.rms_error)
            assert auto.rms < 1.02 * plain.rms
            compared += 1
    assert compared == 4 * 6 * 3


def test_rows_needed_for_an_error():
    curve = [(64, 1.0), (256, 0.5), (1024, 0.125)]
    assert study.sizes_for(curve, 0.5) == pytest.approx(256)
    assert study.sizes_for(curve, 0.25) == pytest.approx(512)
    assert study.sizes_for(curve, 2.0) == pytest.approx(16)
    assert study.sizes_for(curve, 0.03125) == pytest.approx(4096)


def test_it_writes_tables_and_figures(tmp_path):
    cells = [c for c in (*study.published("sorting"), *study.beyond("sorting")) if c.problem == "sorting 3"]
    chosen = [c for c in cells if c.name in ("mc + loo", "auto", "rqmc-latin + loo")]
    found = study.study(chosen, (64, 256, 1024), 4, workers=1)
    study.write_csv(found, tmp_path / "cells.csv")
    again = study.read_csv(tmp_path / "cells.csv")
    assert [(r.strategy, r.n, r.published) for r in again] == [(r.strategy, r.n, r.published) for r in found]
    study.write_page(again, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n| gaussian | ") == 3
    assert (tmp_path / "sorting_3.png").stat().st_size > 10_000
