"""The race: its problems have the answers they claim, runs and rounds are counted right, profiles are arithmetic."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares

from bridge.errors import InputError, SetupError

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from race import more_wild, page, peers, practice, problems, profiles, run
from race.counting import Counter, SpentError, Watched
from race.profiles import Hit
from race.small import SIZE, populations

NEEDS = {"microscope-2": "gemmi", "microscope-4": "gemmi", "tilt-series": "gemmi", "teapot": "trimesh"}


def made(name: str, seed: int = 3) -> problems.Problem:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return problems.make(name, seed)


# --- problems -----------------------------------------------------------------------------------------------------

# Sums of squares at the starts, as Moré, Garbow and Hillstrom, and Moré and Wild, have them.
AT_START = {
    "rosenbrock": 24.2,
    "helical-valley": 2500.0,
    "powell-singular": 215.0,
    "freudenstein-roth": 400.5,
    "bard": 41.6817,
    "box": 1031.154,
    "brown-dennis": 7926693.3,
    "osborne-2": 2.093420,
    "bdqrtic": 904.0,
    "cube": 56.5,
    "watson": 16.43083,
    "chebyquad": 0.04642817,
}


@pytest.mark.parametrize("name", more_wild.FUNCTIONS)
def test_published_functions_have_their_published_values_and_minima(name: str) -> None:
    function = more_wild.FUNCTIONS[name]
    start = np.array(function.start)
    assert (function.residuals(start) ** 2).sum() == pytest.approx(AT_START[name], rel=1e-6)
    solved = least_squares(function.residuals, start, method="lm", xtol=1e-14, ftol=1e-14, max_nfev=5000)
    assert solved.cost == pytest.approx(function.minimum, rel=2e-6, abs=1e-12)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6))
def test_the_noise_oscillates_between_minus_one_and_one(x: list[float]) -> None:
    assert -1 <= more_wild.oscillation(np.array(x)) <= 1


def test_variants_are_what_was_published() -> None:
    function, x = more_wild.FUNCTIONS["bard"], np.array([0.3, 1.2, -0.7])
    f = function.residuals(x)
    noisy = more_wild.residuals(function, "deterministic", x, 0)
    assert (noisy**2).sum() == pytest.approx((1 + 1e-3 * more_wild.oscillation(x)) * (f**2).sum(), rel=1e-13)
    absolute = more_wild.residuals(function, "nonsmooth", x, 0)
    assert 0.5 * (absolute**2).sum() == pytest.approx(np.abs(f).sum(), rel=1e-13)
    draws = np.array([more_wild.residuals(function, "stochastic", x, s) for s in range(4000)]) / f
    assert draws.mean() == pytest.approx(1, abs=5 * 1e-2 / draws.size**0.5)
    assert draws.std() == pytest.approx(1e-2, rel=0.02)
    np.testing.assert_array_equal(
        more_wild.residuals(function, "stochastic", x, 7), more_wild.residuals(function, "stochastic", x, 7)
    )


def test_residuals_that_overflow_are_cut() -> None:
    function = more_wild.FUNCTIONS["box"]
    f = more_wild.true_residuals(function, "smooth", np.array([-1e4, 2e4, 1.0]))
    assert np.isfinite(f).all()
    assert np.abs(f).max() == more_wild.LARGEST


@pytest.mark.parametrize("name", practice.FUNCTIONS)
def test_functions_to_practise_with_have_the_minima_they_state(name: str) -> None:
    function = practice.FUNCTIONS[name]
    start = np.array(function.start)
    solved = least_squares(function.residuals, start, method="lm", xtol=1e-14, ftol=1e-14, max_nfev=5000)
    assert solved.cost >= function.minimum * (1 - 2e-6) - 1e-12
    # From its start the trigonometric one has other minima, and Biggs' a long way.
    far = name in ("trigonometric", "biggs", "gulf")
    assert far or solved.cost == pytest.approx(function.minimum, rel=1e-4, abs=1e-12)


def test_no_problem_of_the_race_is_one_to_practise_with() -> None:
    assert not set(problems.NAMES) & set(problems.PRACTICE)
    assert not set(more_wild.FUNCTIONS) & set(practice.FUNCTIONS)


@pytest.mark.parametrize("name", practice.SIMULATORS)
def test_simulators_to_practise_with_are_solved_at_the_truth_and_not_at_the_start(name: str) -> None:
    for seed in range(4):
        problem = problems.make(name, seed)
        both = np.stack([problem.truth, problem.start])
        space = problem.simulator.space
        assert ((both >= space.lower) & (both <= space.upper)).all()
        outputs = problem.simulator(both, np.array([1, 2], dtype=np.uint64))
        assert outputs.shape[1:] == problem.target.shape
        at_truth, at_start = problem.distance(both, outputs)
        assert abs(at_truth) < 1e-9
        assert at_start > 1


@pytest.mark.parametrize("name", problems.SIMULATORS)
def test_the_truth_solves_the_problem_and_the_start_does_not(name: str) -> None:
    problem = made(name)
    assert problem.truth is not None
    both = np.stack([problem.truth, problem.start])
    space = problem.simulator.space
    assert ((both >= space.lower) & (both <= space.upper)).all()
    outputs = problem.simulator(both, np.array([1, 2], dtype=np.uint64))
    assert outputs.shape[1:] == problem.target.shape == problem.simulator.output_shape
    at_truth, at_start = problem.distance(both, outputs)
    assert at_truth == pytest.approx(0, abs=1e-9)
    assert at_start > (1 if problem.criterion == "fixed" else 0)
    # The target is the simulator's at the truth, but for noise of the declared variance.
    misfit = 0.5 * ((outputs[0] - problem.target) ** 2).sum() / problem.variance
    m = problem.target.size
    if misfit > 1e-9:
        assert 0.2 < misfit / (m / 2) < 2.5 if m < 100 else misfit == pytest.approx(m / 2, rel=0.06)
    assert 0.5 * ((outputs[1] - problem.target) ** 2).sum() / problem.variance > 1.1 * misfit


@pytest.mark.parametrize("name", problems.PUBLISHED)
def test_the_loss_of_a_published_problem_is_that_of_its_function(name: str) -> None:
    problem = problems.make(name, 5)
    function, variant = more_wild.FUNCTIONS[name.split(":")[0]], name.split(":")[1]
    x = problem.start
    f = function.residuals(x)
    value = np.abs(f).sum() if variant == "nonsmooth" else 0.5 * (f**2).sum()
    assert problem.distance(x[None], np.empty(0))[0] == pytest.approx(value, rel=1e-12)
    seen = problem.simulator(x[None], np.array([9], dtype=np.uint64))[0]
    assert 0.5 * (seen**2).sum() == pytest.approx(value, rel=0.1 if problem.noisy else 1e-12)
    # The start is about a natural scale from the published one.
    moved = (x - function.start) / problem.simulator.space.natural_scale
    assert 0.05 < np.abs(moved).max() < 4


@pytest.mark.parametrize("name", ["disc", "noisy-sines", "staircase", "predators", "bard:stochastic"])
def test_a_seed_is_a_problem(name: str) -> None:
    a, again, other = problems.make(name, 1), problems.make(name, 1), problems.make(name, 2)
    np.testing.assert_array_equal(a.start, again.start)
    np.testing.assert_array_equal(a.target, again.target)
    assert not np.array_equal(a.start, other.start)
    rows, seeds = np.stack([a.start, a.start, other.start]), np.array([4, 5, 4], dtype=np.uint64)
    together = a.simulator(rows, seeds)
    one_by_one = np.concatenate([again.simulator(rows[i : i + 1], seeds[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(together, one_by_one)
    assert np.array_equal(together[0], together[1]) == (name in ("disc", "staircase"))


def test_counts_of_predators_are_whole_and_their_mean_is_the_mean_field() -> None:
    theta = np.tile(np.linspace(-0.1, 0.1, 8), (200, 1))
    counts = populations(theta, np.arange(200, dtype=np.uint64))
    np.testing.assert_array_equal(counts, np.round(counts))
    expected = populations(theta[:1], None)[0]
    # Fluctuations feed back: the mean field is not quite the mean.
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.05 * SIZE)
    assert (counts.std(axis=0) > 0.01 * SIZE).all()


def test_an_unknown_problem_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="Known: disc, noisy-sines"):
        problems.make("disk", 0)


# --- counting -----------------------------------------------------------------------------------------------------


def test_runs_and_rounds_are_counted_and_the_budget_is_kept() -> None:
    problem = problems.make("bard:smooth", 0)
    counter = Counter(problem, 0, 10)
    loss = counter.loss(counter.start)
    assert loss == pytest.approx(problem.distance(problem.start[None], np.empty(0))[0])
    counter.losses(np.tile(counter.start, (6, 1)))
    assert (counter.runs, counter.rounds) == (7, 2)
    with pytest.raises(SpentError):
        counter.losses(np.tile(counter.start, (4, 1)))  # three of them are paid for
    assert (counter.runs, counter.rounds, counter.spent) == (10, 3, "budget")
    with pytest.raises(SpentError):
        counter.loss(counter.start)
    assert counter.runs == 10
    assert counter.way() == [(1, 1, loss)]


def test_a_design_asked_for_one_by_one_is_one_round() -> None:
    problem = problems.make("bard:smooth", 0)
    counter = Counter(problem, 0, 10)
    counter.design = 4
    for _ in range(6):
        counter.loss(counter.start)
    assert (counter.runs, counter.rounds) == (6, 3)


def test_points_outside_are_moved_onto_the_bounds_and_time_is_limited() -> None:
    problem = problems.make("disc", 0)
    counter = Counter(problem, 0, 10)
    far = counter.losses(np.array([[1e9, np.nan, 3.0]]))
    inside = counter.losses(np.array([[counter.upper[0], 0.0, 3.0]]))
    assert far[0] == inside[0]
    counter.own_cpu_s = -1.0
    with pytest.raises(SpentError):
        counter.loss(counter.start)
    assert counter.spent == "time"


def test_the_way_holds_the_nearest_points_and_rounds_may_be_told() -> None:
    problem = problems.make("disc", 0)
    counter = Counter(problem, 0, 10)
    truth = problem.truth / counter.natural
    simulator = Watched(counter)
    for step in (2.0, 4.0, 1.0, 0.0):
        simulator(((truth + step) * counter.natural)[None], np.zeros(1, dtype=np.uint64))
    expected = [(1, 1, 16.0), (3, 3, 8.0), (4, 4, 0.0)]  # four pixels are eight tolerances
    assert counter.way() == [(a, b, pytest.approx(c, abs=1e-9)) for a, b, c in expected]
    counter.ends = [2, 4]
    assert [w[1] for w in counter.way()] == [1, 2, 2]
    counter.ends = [2, 3]
    assert [w[1] for w in counter.way()] == [1, 2, 3]  # what follows the last round is one more


def test_a_minimum_that_is_not_the_least_stops_nobody() -> None:
    problem = made("freudenstein-roth:smooth")
    counter = Counter(problem, 0, 10)
    for x in ([11.412779, -0.896805], [5.0, 4.0]):
        assert counter.spent == ""
        counter.loss(np.array(x) / problem.simulator.space.natural_scale)
    with pytest.raises(SpentError, match="solved"):
        counter.loss(counter.start)


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_ours_finds_a_pose_among_many_minima(seed: int) -> None:
    """48 x 48 pixels of a silhouette, off by 40 to 90 degrees, within 5 degrees after, within 150 runs."""
    line = run.run_one("body", peers.SOLVERS["ours"], seed)
    runs, _, distance = line["way"][-1]
    assert distance < 1
    assert runs <= 150


def test_a_solver_that_raises_keeps_what_it_evaluated_and_has_failed() -> None:
    def broken(counter: Counter, seed: int) -> None:
        counter.loss(counter.start)
        raise FloatingPointError("lost")

    line = {**run.run_one("disc", peers.Solver(broken), 0), "solver": "broken"}
    assert line["error"] == "FloatingPointError: lost"
    assert line["runs"] == 1
    found = profiles.hits([line])["broken"]["disc", 0]
    assert found.runs == np.inf
    assert found.area == 0


def test_a_solver_that_hits_is_told_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = problems.make("disc", 0).truth

    def knows(counter: Counter, seed: int) -> None:
        for step in (3.0, 0.1, 0.0):
            counter.loss((truth + step) / counter.natural)

    line = {**run.run_one("disc", peers.Solver(knows), 0), "solver": "knows"}
    assert (line["runs"], line["rounds"], line["spent"], line["error"]) == (2, 2, "solved", "")
    found = profiles.hits([line])["knows"]["disc", 0]
    assert (found.runs, found.rounds, found.dimension) == (2, 2, 3)


def test_a_missing_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dfols", None)
    with pytest.raises(SetupError, match=r"DFO-LS.*simulation-bridge\[race\]"):
        run.run_one("disc", peers.SOLVERS["DFO-LS"], 0)


def test_kalman_inversion_solves_a_linear_problem_in_a_few_rounds() -> None:
    problem = problems.make("bdqrtic:smooth", 0)

    def linear(inputs: Any) -> Any:
        return inputs[:, :3] @ np.array([[1.0, 2, 0], [0, 1, 1], [1, 0, -1], [2, 1, 1]]).T

    space = problem.simulator.space
    simulator = replace(
        problem.simulator,
        function=linear,
        seeded=False,
        output_shape=(4,),
        space=replace(space, parameters=space.parameters[:3]),
    )
    truth = np.array([0.3, -0.2, 0.4])
    one = replace(
        problem,
        simulator=simulator,
        target=linear(truth[None])[0],
        start=np.zeros(3),
        least=None,
        distance=lambda inputs, outputs: np.abs(inputs - truth).max(axis=1),
    )
    counter = Counter(one, 0, 120)
    with pytest.raises(SpentError):
        peers.kalman(counter, 0)
    assert counter.rounds == 10  # of twelve runs
    assert counter.way()[-1][2] < 0.02  # an eighth of the spread that is left: it falls by a fifth a round


# --- the journal --------------------------------------------------------------------------------------------------


def test_a_race_goes_on_where_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "race.jsonl"
    command = ["--journal", str(journal), "--solvers", "random,ensemble Kalman", "--problems", "disc,bard:smooth"]
    run.main([*command, "--seeds", "0:1"])
    first = run.read(journal)
    assert [(x["problem"], x["solver"]) for x in first] == [
        ("disc", "random"),
        ("disc", "ensemble Kalman"),
        ("bard:smooth", "random"),
        ("bard:smooth", "ensemble Kalman"),
    ]
    assert all(not x["error"] and (x["runs"] == 240) == (x["spent"] != "solved") for x in first)
    assert "solved" in {x["spent"] for x in first}
    assert [x["rounds"] for x in first] == [1, 3, 1, 4]  # of twelve members, until it is solved
    whole = journal.read_text()
    journal.write_text(whole[:-30])  # killed while writing
    assert run.read(journal) == first[:-1]
    run.main([*command, "--seeds", "0:2"])
    assert "5 to run, 3 in the journal" in capsys.readouterr().out
    again = run.read(journal)
    assert [(x["problem"], x["solver"], x["seed"]) for x in again[3:5]] == [
        ("bard:smooth", "ensemble Kalman", 0),
        ("disc", "random", 1),
    ]
    assert again[3]["way"] == first[3]["way"]
    assert len(again) == 8


def test_a_journal_that_is_broken_in_the_middle_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "race.jsonl"
    journal.write_text('{"a": 1}\n{"b"\n{"c": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        run.read(journal)


def test_dear_solvers_and_problems_have_fewer_seeds() -> None:
    tasks = run.tasks(["pycma", "BoTorch TuRBO"], ["disc", "tilt-series"], range(20))
    assert sum(t[:2] == ("disc", "pycma") for t in tasks) == 20
    assert sum(t[:2] == ("tilt-series", "pycma") for t in tasks) == run.SEEDS["tilt-series"]
    assert sum(t[1] == "BoTorch TuRBO" for t in tasks) == 2 * peers.SOLVERS["BoTorch TuRBO"].seeds
    assert [t[2] for t in tasks] == sorted(t[2] for t in tasks)


# --- profiles -----------------------------------------------------------------------------------------------------


def line(solver: str, problem: str, seed: int, way: list[tuple[int, int, float]], **changes: Any) -> dict[str, Any]:
    return {
        "solver": solver,
        "problem": problem,
        "seed": seed,
        "way": way,
        "criterion": "loss",
        "tau": 1e-3,
        "least": None,
        "start": 100.0,
        "dimension": 1,
        "group": "published",
        "own_cpu_s": 0.5,
        "version": "",
        "spent": "",
        "error": "",
        **changes,
    }


def test_the_test_of_more_and_wild_takes_the_least_that_any_solver_met() -> None:
    lines = [
        line("a", "p", 0, [(1, 1, 100.0), (4, 2, 1.05), (9, 3, 1.0)]),
        line("b", "p", 0, [(1, 1, 100.0), (30, 30, 1.2)]),
    ]
    assert profiles.least_known(lines) == {("p", 0): 1.0}
    found = profiles.hits(lines)  # wanted: 1 + 0.001 * 99
    assert found["a"]["p", 0] == Hit(4, 2, 1)
    assert found["b"]["p", 0].runs == np.inf
    assert profiles.hits(lines, tau=0.1)["b"]["p", 0] == Hit(30, 30, 1)
    lines[0]["least"] = 0.0
    assert profiles.least_known(lines) == {("p", 0): 0.0}
    assert profiles.hits(lines)["a"]["p", 0].runs == np.inf


def test_a_solver_that_evaluated_nothing_has_failed() -> None:
    found = profiles.hits([line("a", "p", 0, []), line("b", "p", 0, [(2, 1, 0.0)])])
    assert found["a"]["p", 0].runs == np.inf
    assert found["b"]["p", 0].runs == 2


def test_areas_are_those_of_the_profiles() -> None:
    found = {("p", 0): Hit(2, 1, 1), ("p", 1): Hit(60, 5, 1), ("q", 0): Hit(np.inf, np.inf, 3), ("r", 0): Hit(80, 7, 3)}
    # alpha: 1 and 30 of p, 20 of r; p counts once.
    alphas = np.array([0.5, 1, 20, 29, 30, 60])
    np.testing.assert_allclose(profiles.profile(found, alphas), np.array([0, 0.5, 1.5, 1.5, 2, 2]) / 3)
    np.testing.assert_allclose(profiles.profile(found, np.array([1, 6, 7.0]), rounds=True), np.array([0.5, 1, 2]) / 3)
    grid = (np.arange(60_000) + 0.5) / 1000
    assert profiles.area(found) == pytest.approx(profiles.profile(found, grid).mean(), abs=1e-4)
    assert profiles.area(found) == pytest.approx(((59 + 30) / 2 + 0 + 40) / 60 / 3)


def test_performance_profiles_start_at_the_share_of_victories() -> None:
    found = {
        "a": {("p", 0): Hit(10, 1, 1), ("q", 0): Hit(40, 1, 1), ("r", 0): Hit(np.inf, np.inf, 1)},
        "b": {("p", 0): Hit(30, 1, 1), ("q", 0): Hit(20, 1, 1), ("r", 0): Hit(np.inf, np.inf, 1)},
    }
    ratios = np.array([1, 2, 3.0])
    np.testing.assert_allclose(profiles.performance(found, "a", ratios), [1 / 3, 2 / 3, 2 / 3])
    np.testing.assert_allclose(profiles.performance(found, "b", ratios), [1 / 3, 1 / 3, 2 / 3])


def test_ratios_of_what_was_not_solved_are_infinite_or_nothing() -> None:
    never = Hit(np.inf, np.inf, 1)
    a = {("p", i): h for i, h in enumerate([Hit(10, 2, 1), Hit(10, 2, 1), never, never])}
    b = {("p", i): h for i, h in enumerate([Hit(40, 4, 1), never, Hit(5, 1, 1), never])}
    assert profiles.median_ratio(a, b, "runs") == 0.25  # of 0.25, 0 and infinity
    assert profiles.median_ratio(b, a, "rounds") == 2
    assert profiles.median_ratio({("p", 2): never}, b, "runs") == np.inf
    assert np.isnan(profiles.median_ratio({("p", 3): never}, b, "runs"))
    assert profiles.medians({**a, ("q", 0): never}, {**b, ("p", 3): Hit(3, 3, 1)}, "rounds") == (np.inf, 3.5)
    assert profiles.medians({("p", 0): a["p", 0]}, b, "runs") == (10, 40)


def test_intervals_hold_the_difference_and_exclude_what_is_not() -> None:
    assert profiles.bootstrap([np.full(5, 0.25)] * 4, 0) == (0.25, 0.25)
    rng = np.random.default_rng(0)
    cover = []
    for trial in range(60):
        # Problems differ by 1, seeds by 1: the mean of 12 problems and 6 seeds has variance (1 + 1/6) / 12.
        groups = [m + rng.standard_normal(6) for m in 2 + rng.standard_normal(12)]
        low, high = profiles.bootstrap(groups, trial, 500)
        assert low > 0
        cover.append(low <= 2 <= high)
    assert 0.8 < np.mean(cover) <= 1


def test_differences_are_paired_and_taken_where_both_have_run() -> None:
    a = {("p", 0): Hit(12, 1, 1), ("p", 1): Hit(24, 1, 1), ("q", 0): Hit(2, 1, 1)}
    b = {("p", 0): Hit(24, 1, 1), ("p", 1): Hit(36, 1, 1)}
    assert profiles.area_difference(a, b) == pytest.approx((0.1, 0.1, 0.1))
    assert np.isnan(profiles.area_difference(a, {})).all()


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_says_where_a_peer_is_better(tmp_path: Path) -> None:
    lines = []
    for seed in range(4):
        fixed = {"criterion": "fixed", "group": "simulators", "dimension": 3}
        lines += [
            line("ours", "disc", seed, [(40 + seed, 4, 0.5)], **fixed),
            line("DFO-LS", "disc", seed, [(8, 5, 0.9)], **fixed),
            line("ours", "bard:smooth", seed, [(1, 1, 50.0), (6, 2, 0.0)], dimension=3),
            line("DFO-LS", "bard:smooth", seed, [(1, 1, 50.0), (60, 57, 0.0)], dimension=3),
        ]
    journal = tmp_path / "race.jsonl"
    journal.write_text("".join(json.dumps(x) + "\n" for x in lines))
    parts = ("areas", "runs", "rounds", "tolerances", "ratios", "each", "better", "effort")
    text = "".join(f"before\n<!-- {part} -->\nold\n<!-- end -->\n" for part in parts)
    (tmp_path / "README.md").write_text(text)
    pytest.importorskip("matplotlib")
    page.main([str(journal), "--page", str(tmp_path)])
    written = (tmp_path / "README.md").read_text()
    assert "old" not in written
    assert written.count("before") == len(parts)
    assert "* disc: DFO-LS (+0.14)" in written
    assert "bard:smooth: DFO-LS" not in written
    assert "| disc | 4/4, 42 / 4 | 4/4, 8 / 5 |" in written
    assert (tmp_path / "profiles.png").stat().st_size > 10_000
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert rows[1] == "disc,ours,4,4,41.5,4,0.8271,0.5"
    # What was run twice counts once; and what is packed is all of it.
    page.main([str(tmp_path / "race.jsonl.xz"), str(journal), "--page", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == written
    assert sorted(map(json.dumps, run.read(tmp_path / "race.jsonl.xz"))) == sorted(map(json.dumps, lines))
    with pytest.raises(InputError, match="<!-- areas -->"):
        page.fill("nothing", {"areas": "x"})
