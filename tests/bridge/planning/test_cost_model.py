"""The planner against closed forms, limits, and the code whose behaviour it predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, special, stats

import bridge
from bridge.cli.main import main
from bridge.evaluation.layout import Layout
from bridge.planning.advice import advise, most_ranks, parse_ranks, parse_seconds, seconds, table
from bridge.planning.cost_model import (
    Machine,
    Workload,
    broadcast_time,
    daly_interval,
    daly_slowdown,
    expected_maximum,
    list_schedule,
    predict,
)

# Nothing takes time but the simulations.
FREE = Machine(
    latency_s=0,
    bandwidth=math.inf,
    add_s_per_byte=0,
    evaluation_overhead_s=0,
    step_overhead_s=0,
    row_overhead_s=0,
    object_s=0,
)

workloads = st.builds(
    Workload,
    cost_s=st.floats(1e-4, 1e3),
    num_samples=st.integers(1, 300),
    num_outputs=st.sampled_from([1, 100, 200_000]),
    dimension=st.integers(1, 9),
    cv=st.sampled_from([0.0, 0.3, 2.0]),
    batch=st.integers(1, 3),
    leaf_size=st.sampled_from([None, 1, 4]),
    schedule=st.sampled_from(["auto", "static", "dynamic"]),
    failure_probability=st.sampled_from([0.0, 0.1]),
    node_mtbf_s=st.sampled_from([None, 1e7]),
)


# --- limits of a step ------------------------------------------------------------------------------------------------


@given(workloads, st.integers(1, 400))
def test_parts_add_up_and_no_rank_does_more_than_its_time(workload, ranks):
    p = predict(workload, Machine(), ranks)
    parts = [
        *(p.preparation_s, p.adding_s, p.search_s, p.agreement_s, p.broadcast_s, p.reduction_s, p.failures_s),
        *(p.repeats_s, p.straggling_s),
    ]
    assert all(part >= 0 for part in parts)
    assert p.uneven_s >= -1e-12 * p.step_s
    assert p.step_s == pytest.approx(p.useful_s + p.uneven_s + sum(parts))
    assert p.efficiency == pytest.approx(workload.evaluations * workload.cost_s / (ranks * p.step_s))
    assert 0 < p.efficiency <= 1 + 1e-12
    assert p.speed_up == pytest.approx(ranks * p.efficiency)


@given(st.integers(1, 300), st.sampled_from([None, 1, 3, 16]), st.integers(1, 400))
def test_even_runs_on_a_free_machine_take_the_longest_share(n, leaf, ranks):
    workload = Workload(cost_s=2.0, num_samples=n, leaf_size=leaf, schedule="static")
    p = predict(workload, FREE, ranks)
    units = -(-n // workload.unit_rows)
    most = -(-units // ranks) * workload.unit_rows
    # The last unit may have fewer rows than the others.
    assert most - workload.unit_rows < p.step_s / 2.0 <= most
    if n % workload.unit_rows == 0:
        assert p.step_s == pytest.approx(2.0 * most)


def test_one_rank_simulates_all_of_the_time_where_the_rest_is_cheap():
    assert predict(Workload(cost_s=1.0), FREE, 1).efficiency == 1.0
    slow = predict(Workload(cost_s=10.0, num_outputs=160_000), Machine(), 1)
    assert 0.999 < slow.efficiency < 1
    assert slow.bottleneck == "the simulations"
    assert slow.agreement_s == slow.broadcast_s == slow.reduction_s == slow.search_s == 0


@given(workloads, st.integers(1, 400))
def test_dearer_simulations_are_used_better(workload, ranks):
    # At one schedule: "auto" changes it with the cost.
    kind = "dynamic" if workload.dynamic else "static"
    cheap = predict(Workload(**{**vars(workload), "schedule": kind}), Machine(), ranks)
    dear = predict(Workload(**{**vars(workload), "schedule": kind, "cost_s": 1.5 * workload.cost_s}), Machine(), ranks)
    assert dear.step_s > cheap.step_s
    assert dear.efficiency >= cheap.efficiency * (1 - 1e-9)


@given(workloads, st.integers(2, 400))
def test_without_latency_messages_cost_their_bytes_alone(workload, ranks):
    slow, fast = (predict(workload, Machine(latency_s=latency), ranks) for latency in (1e-3, 0.0))
    assert fast.search_s == 0
    assert fast.step_s <= slow.step_s
    none = predict(workload, Machine(latency_s=0, bandwidth=math.inf, add_s_per_byte=0), ranks)
    assert (none.broadcast_s, none.reduction_s) == (0, 0)


def test_ranks_beyond_the_units_are_idle_and_gain_nothing():
    workload = Workload(cost_s=1.0, num_samples=1024)
    assert (workload.units, workload.unit_rows) == (32, 32)
    whole, idle = predict(workload, FREE, 32), predict(workload, FREE, 100)
    assert (whole.step_s, whole.idle_ranks) == (32.0, 0)
    assert (idle.step_s, idle.idle_ranks, idle.bottleneck) == (32.0, 68, "more ranks than units")
    assert idle.efficiency == pytest.approx(0.32)
    assert predict(Workload(cost_s=1.0, num_samples=1024, leaf_size=1), FREE, 1024).step_s == 1.0
    assert predict(Workload(cost_s=1.0, num_samples=1024, batch=4), FREE, 128).step_s == 32.0


def test_failures_of_evaluations_lengthen_them_as_a_geometric_number_of_attempts_does():
    workload = Workload(cost_s=2.0, cv=0.5, failure_probability=0.2)
    rng = np.random.default_rng(0)
    attempts = rng.geometric(0.8, 400_000)
    sigma = math.sqrt(math.log1p(0.25))
    times = rng.lognormal(math.log(2.0) - sigma**2 / 2, sigma, attempts.sum())
    totals = np.add.reduceat(times, np.append(0, np.cumsum(attempts)[:-1]))
    mean, cv = workload.with_repetitions
    assert mean == pytest.approx(totals.mean(), rel=5e-3)
    assert cv == pytest.approx(totals.std() / totals.mean(), rel=1e-2)
    assert cv != pytest.approx(0.5, rel=2e-2)
    p = predict(Workload(cost_s=2.0, failure_probability=0.2, schedule="static"), FREE, 1)
    assert p.step_s == pytest.approx(64 * 2.5)
    assert p.repeats_s == pytest.approx(64 * 0.5)


# --- what the code does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 16, 64, 65, 100, 256, 1024, 5000])
@pytest.mark.parametrize("leaf", [None, 1, 8])
def test_units_and_leaves_are_those_of_the_code(n, leaf):
    workload = Workload(cost_s=1.0, num_samples=n, leaf_size=leaf, num_outputs=10_000_000, dimension=2)
    strategy = bridge.smooth(np.sin, seed=0, num_samples=n, points="mc", on=bridge.Ranks(leaf_size=leaf)).strategy
    assert workload.unit_rows == strategy.leaf_size
    assert workload.units_in_leaf == Layout(1, n, strategy.leaf_size).units_in_leaf(workload.streamed)


@pytest.mark.parametrize(("n", "m", "d"), [(64, 160_000, 8), (16, 100, 8), (32, 300_000, 40), (256, 50_000, 3)])
def test_what_is_streamed_is_streamed_by_the_code(n, m, d):
    import torch

    calls = []

    def f(x):
        calls.append(1)
        return np.zeros(m, dtype=np.float32)

    simulator = bridge.as_simulator(f, repeatable=True)
    estimate = bridge.smooth(simulator, seed=0, num_samples=n, covariate="none", points="mc").estimate(torch.zeros(d))
    predicted = Workload(cost_s=1.0, num_samples=n, num_outputs=m, dimension=d)
    assert (len(calls), predicted.units) == (n, min(n, 64) if n <= 64 else 32)
    assert estimate.streamed == predicted.streamed


def test_the_schedule_is_that_of_the_code():
    assert not Workload(cost_s=1.9e-3, num_samples=1024).dynamic  # a run, not a call of several
    assert Workload(cost_s=2e-3).dynamic
    assert Workload(cost_s=1e-3, schedule="dynamic").dynamic
    assert not Workload(cost_s=1.0, schedule="static").dynamic


# --- stragglers ------------------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e4), st.floats(0.01, 5.0))
def test_the_longest_of_one_and_of_two_lognormal_runs(mean, cv):
    sigma = math.sqrt(math.log1p(cv**2))
    assert expected_maximum([(1, mean, cv)]) == pytest.approx(mean, rel=1e-6)
    # E[max(X, Y)] = 2 mean Phi(sigma / sqrt 2) for two alike.
    assert expected_maximum([(2, mean, cv)]) == pytest.approx(2 * mean * stats.norm.cdf(sigma / math.sqrt(2)), rel=1e-6)


@pytest.mark.parametrize("count", [3, 100, 10_000])
@pytest.mark.parametrize("cv", [0.1, 1.0])
def test_the_longest_of_many_against_the_quantiles(count, cv):
    """E[max] = int_0^1 F^-1(u) n u^(n-1) du, another integral of the same."""
    sigma = math.sqrt(math.log1p(cv**2))
    # Gauss-Legendre in v = u^n.
    nodes, weights = np.polynomial.legendre.leggauss(2000)
    u = ((nodes + 1) / 2) ** (1 / count)
    x = np.exp(sigma * special.ndtri(u) - sigma**2 / 2)
    assert expected_maximum([(count, 1.0, cv)]) == pytest.approx(float(weights @ x / 2), rel=2e-3)


def test_the_longest_of_unlike_runs():
    assert expected_maximum([(3, 2.0, 0.0), (5, 1.0, 0.0)]) == 2.0
    assert expected_maximum([]) == 0.0
    # A fixed 2 beside one lognormal: E[max(X, k)] = k + E[(X - k)+], Black and Scholes's formula at rate 0.
    s, k = math.sqrt(math.log1p(0.25)), 2.0
    d1 = (math.log(1 / k) + s * s / 2) / s
    call = stats.norm.cdf(d1) - k * stats.norm.cdf(d1 - s)
    assert expected_maximum([(4, k, 0.0), (1, 1.0, 0.5)]) == pytest.approx(k + call, rel=1e-6)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.integers(1, 20))
def test_a_list_schedule_keeps_grahams_bound(times, ranks):
    span = list_schedule(times, ranks)
    least = max(sum(times) / ranks, max(times))
    assert least * (1 - 1e-12) <= span <= (sum(times) / ranks + (1 - 1 / ranks) * max(times)) * (1 + 1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 16, 50, 64])
@pytest.mark.parametrize("cv", [0.1, 0.5, 1.5])
def test_taking_units_off_others_helps_and_is_as_good_as_simulated(ranks, cv):
    static = predict(Workload(cost_s=1.0, cv=cv, schedule="static"), FREE, ranks).step_s
    dynamic = predict(Workload(cost_s=1.0, cv=cv, schedule="dynamic"), FREE, ranks).step_s
    rng = np.random.default_rng(ranks)
    sigma = math.sqrt(math.log1p(cv**2))
    drawn = rng.lognormal(-(sigma**2) / 2, sigma, (2000, 64))
    shares = np.array_split(np.arange(64), ranks)
    simulated_static = np.mean(np.max([drawn[:, share].sum(axis=1) for share in shares], axis=0))
    simulated_dynamic = np.mean([list_schedule(times, ranks) for times in drawn[:400]])
    # The sum of a few is not quite lognormal.
    assert static == pytest.approx(simulated_static, rel=0.05)
    assert dynamic == pytest.approx(simulated_dynamic, rel=0.08)
    assert dynamic <= static


# --- messages and failures -------------------------------------------------------------------------------------------


def test_a_broadcast_is_a_tree_of_short_and_a_ring_of_long_messages():
    machine = Machine(latency_s=1e-6, bandwidth=1e10)
    assert broadcast_time(0, 1024, machine) == pytest.approx(10e-6)
    assert broadcast_time(8, 1, machine) == 0
    assert broadcast_time(1e9, 1024, machine) == pytest.approx(0.2, rel=0.01)  # 2 x 1 GB, not 10 x


def test_a_kept_sum_takes_a_message_for_each_level_of_the_tree():
    machine = Machine(latency_s=1e-3, bandwidth=math.inf, add_s_per_byte=0)
    for ranks, levels in ((1, 0), (2, 1), (4, 2), (16, 4), (64, 6)):
        p = predict(Workload(cost_s=1.0, num_samples=64), machine, ranks)
        assert p.reduction_s == pytest.approx(2e-3 * levels)  # up the tree, and the root back to all
    # Runs that end inside a subtree give up to two messages for each level.
    for ranks in (3, 5, 7, 33):
        p = predict(Workload(cost_s=1.0, num_samples=64), machine, ranks)
        assert 2 * math.log2(ranks) < p.reduction_s / 1e-3 < 3 * 6 * 2


def test_rows_of_shared_leaves_travel_one_after_another():
    machine = Machine(latency_s=0, bandwidth=1e9, add_s_per_byte=0)
    # 1,024 rows on as many ranks: 16 leaves of 64, and 63 rows of 4 MB go to the rank of each leaf.
    workload = Workload(cost_s=1.0, num_samples=1024, num_outputs=1_000_000, dimension=1, leaf_size=1)
    assert (workload.streamed, workload.units_in_leaf) == (True, 64)
    p = predict(workload, machine, 1024)
    tree, root = 4 * 8e-3, 2 * 8e-3 * 1023 / 1024  # two columns of a million
    assert p.reduction_s == pytest.approx(63 * 4e-3 + tree + root, rel=1e-6)


@pytest.mark.parametrize("checkpoint", [1e-3, 1.0, 60.0])
@pytest.mark.parametrize("mtbf", [100.0, 1e5])
def test_dalys_interval_is_where_the_wall_time_is_least(checkpoint, mtbf):
    best = optimize.minimize_scalar(
        lambda t: daly_slowdown(t, checkpoint, 30.0, mtbf),
        bounds=(1e-3, 10 * mtbf),
        method="bounded",
        options={"xatol": 1e-9 * mtbf},
    )
    interval = daly_interval(checkpoint, mtbf)
    assert interval == pytest.approx(best.x, rel=2e-3)
    # Daly's series (equation 37).
    if checkpoint < mtbf / 2:
        ratio = checkpoint / (2 * mtbf)
        series = math.sqrt(2 * checkpoint * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint
        assert interval == pytest.approx(series, rel=0.01)
    assert daly_slowdown(interval, checkpoint, 30.0, mtbf) > 1


def test_youngs_interval_and_nodes_that_fail():
    assert daly_interval(1e-3, 1e6) == pytest.approx(math.sqrt(2 * 1e-3 * 1e6), rel=1e-3)
    assert daly_slowdown(daly_interval(0.0, 1e4), 0.0, 100.0, 1e4) == pytest.approx(math.exp(0.01))
    workload = Workload(cost_s=1.0, node_mtbf_s=1e6, checkpoint_s=1.0)
    one, ten = (predict(workload, Machine(ranks_per_node=4), ranks) for ranks in (4, 40))
    without = predict(Workload(cost_s=1.0), Machine(), 40)
    factor = daly_slowdown(daly_interval(1.0, 1e5), 1.0, 60.0, 1e5)
    assert ten.step_s == pytest.approx(without.step_s * factor)
    assert ten.failures_s / ten.step_s > one.failures_s / one.step_s > 0


# --- advice and the command -------------------------------------------------------------------------------------------


def test_the_advice_names_a_number_that_holds_and_what_to_change():
    workload, machine = Workload(cost_s=0.05, num_samples=1024, num_outputs=160_000), Machine()
    best = most_ranks(workload, machine)
    assert best == 32
    assert predict(workload, machine, best).efficiency >= 0.8
    assert predict(workload, machine, 2 * best).efficiency < 0.8
    said = advise(workload, machine)
    assert "Up to 32 rank(s)" in said
    assert "32 units of 32 row(s)" in said
    changed = Workload(cost_s=0.05, num_samples=1024, num_outputs=160_000, leaf_size=1, keep_bytes=656e6)
    assert (
        f"memory=bridge.Memory(keep_mb=656) and on=bridge.Ranks(leaf_size=1), up to {most_ranks(changed, machine)}"
        in said
    )
    fast = Workload(cost_s=1e-6, num_outputs=160_000)
    assert most_ranks(fast, machine) == 0
    assert "Not even one rank" in advise(fast, machine)


def test_the_command_prints_a_table_and_a_sentence(capsys):
    assert main(["plan", "--cost", "50ms", "--samples", "1024", "--outputs", "160000", "--ranks", "1,2,4,...,100"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("1,024 evaluations of 50 ms in 32 units of 32 row(s), 160,000 outputs (streamed)")
    assert [int(line.split()[0]) for line in lines[3:11]] == [1, 2, 4, 8, 16, 32, 64, 100]
    workload = Workload(cost_s=0.05, num_samples=1024, num_outputs=160_000)
    assert table(workload, Machine(), [64]).splitlines()[1] == lines[9]
    assert lines[9].endswith("32  more ranks than units")
    assert lines[-1].startswith("Up to 32 rank(s)")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--cost", "50"],
        ["--cost", "fast"],
        ["--cost=-1s"],
        ["--cost", "0s"],
        ["--cost", "nanms"],
        ["--cost", "1s", "--samples", "0"],
        ["--cost", "1s", "--ranks", "0"],
        ["--cost", "1s", "--ranks", "1,...,8"],
        ["--cost", "1s", "--ranks", "4,2,...,8"],
        ["--cost", "1s", "--ranks", "x"],
        ["--cost", "1s", "--cv", "-1"],
        ["--cost", "1s", "--failing", "1"],
        ["--cost", "1s", "--bandwidth", "0"],
        ["--cost", "1s", "--mtbf", "0y"],
        ["--cost", "1s", "--leaf-size", "0"],
    ],
)
def test_wrong_arguments_are_refused_with_what_is_expected(capsys, wrong):
    assert main(["plan", *wrong]) == 2
    assert "Expected" in capsys.readouterr().err


def test_times_and_numbers_of_ranks_are_read_and_written():
    given_times = ("250us", "50ms", "1.5s", "2 min", "3h", "1d", "1e-3s")
    assert [parse_seconds(text) for text in given_times] == pytest.approx([250e-6, 0.05, 1.5, 120, 10800, 86400, 0.001])
    assert parse_ranks("7") == [7]
    assert parse_ranks("1, 2,4,...,10") == [1, 2, 4, 8, 10]
    assert parse_ranks("10,20,30,...,55") == [10, 20, 30, 40, 50, 55]
    assert parse_ranks("3,9,...,81") == [3, 9, 27, 81]
    assert [seconds(t) for t in (2e-6, 0.0123, 5.0, 300.0, 36000.0)] == ["2 us", "12.3 ms", "5 s", "5 min", "10 h"]
