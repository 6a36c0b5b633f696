"""The planner's model against measured steps, and the planner's numbers of this machine.

    python tests/benchmarks/bench_plan.py             # 1 to 4 ranks here: 3 minutes; writes docs/cluster/
    python tests/benchmarks/bench_plan.py --hosts     # besides on two virtual hosts with slow cables (tools/hosts.sh)

Simulators sleep, so that ranks beyond the number of cores are no lie; what bridge itself does is computed, and there
more ranks than cores show. Writes docs/cluster/efficiency.png and plan.csv, and puts its tables into the
README.md there.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "cluster"
N, D = 64, 8
RANKS = (1, 2, 3, 4)
# (cost, outputs, coefficient of variation, schedule)
CASES = [
    *((cost, m, 0.0, "auto") for m in (100, 160_000) for cost in (0.001, 0.01, 0.05)),
    (0.01, 100, 0.7, "static"),
    (0.01, 100, 0.7, "dynamic"),
]
HOST_CASES = [(0.01, 100, 0.0, "static"), (0.01, 160_000, 0.0, "static"), (0.01, 100, 0.7, "dynamic")]
DELAYS_S = (0.0, 0.0002, 0.001)


# --- on the ranks -----------------------------------------------------------------------------------------------------


def machine_numbers() -> dict[str, float]:
    """Of this machine, on two ranks: what `bridge.planning.cost_model.Machine` wants to know."""
    import numpy as np
    import torch

    import bridge
    from bridge.dispatch import get_dispatcher
    from bridge.estimators.design import make_design
    from bridge.estimators.weights import make_weights

    dispatcher = get_dispatcher()

    def quick(action: Any, repeats: int) -> float:
        """The lower quartile: what it takes when nothing comes between."""
        taken = []
        for _ in range(repeats):
            begin = time.perf_counter()
            action()
            taken.append(time.perf_counter() - begin)
        return statistics.quantiles(taken, n=4)[0]

    one, short, long = np.zeros(1), torch.zeros(250_000), torch.zeros(4_000_000)
    # In blocks: a rank that comes late finds the other's message there already.
    latency = quick(lambda: [dispatcher.scatter_add(one) for _ in range(30)], 10) / 30

    def there_and_back(tensor: torch.Tensor) -> None:
        dispatcher.transfer(tensor, 0, 1)
        dispatcher.transfer(tensor, 1, 0)

    small, large = quick(lambda: there_and_back(short), 20) / 2, quick(lambda: there_and_back(long), 10) / 2
    total, part = torch.zeros(20_000_000), torch.ones(20_000_000)
    add = quick(lambda: total.add_(part), 5) / (3 * 4 * total.numel())

    # A step in which the simulator does nothing, without other ranks.
    from mpi4py import MPI

    alone = MPI.COMM_SELF
    nothing = np.zeros(1)
    simulator = bridge.as_simulator(lambda x: nothing, output_shape=(1,))
    theta, v = torch.zeros(D, requires_grad=True), torch.ones(1)

    def step_time(n: int, leaf: int) -> float:
        smoothed = bridge.smooth(simulator, seed=0, num_samples=n, on=bridge.Ranks(leaf_size=leaf, comm=alone))
        smoothed(theta, 0).backward(v)
        return quick(lambda: smoothed(theta, 1).backward(v), 9)

    def preparation(n: int) -> float:
        strategy = bridge.smooth(simulator, seed=0, num_samples=n, on=bridge.Ranks(comm=alone)).strategy
        return quick(lambda: make_weights(strategy, make_design(strategy, 1, 0, D).nodes, None, None, None), 9)

    row = max(0.0, (preparation(4096) - preparation(1024)) / 3072)
    few, many = step_time(N, 1), step_time(1024, 1)
    slope = max(row, (many - few) / (1024 - N))
    evaluation, step = slope - row, max(0.0, few - N * slope)
    return {
        "latency_s": latency,
        "bandwidth": (long.numel() - short.numel()) * 4 / max(1e-9, large - small),
        "add_s_per_byte": add,
        "evaluation_overhead_s": evaluation,
        "step_overhead_s": step,
        "row_overhead_s": row,
    }


def measured_step(cost: float, m: int, cv: float, schedule: str) -> dict[str, float]:
    """Median time of a forward and a backward pass, and what an evaluation really took."""
    import numpy as np
    import torch

    import bridge
    from bridge.dispatch import get_dispatcher

    dispatcher = get_dispatcher()
    output = np.random.default_rng(0).normal(size=m).astype(np.float32)
    sigma = math.sqrt(math.log1p(cv**2))
    slept: list[float] = []

    def simulator(x: Any) -> Any:
        # A run's time is a function of its parameters, as it is of real ones.
        draw = np.random.default_rng(x.view(np.uint64)).standard_normal() if cv else 0.0
        begin = time.perf_counter()
        time.sleep(cost * math.exp(sigma * draw - sigma**2 / 2))
        slept.append(time.perf_counter() - begin)
        return output

    known = bridge.as_simulator(simulator, output_shape=(m,))
    smoothed = bridge.smooth(known, seed=0, num_samples=N, scale=0.1, on=bridge.Ranks(schedule=schedule))
    theta, v = torch.zeros(D, requires_grad=True), torch.ones(m)
    smoothed(theta, 0).backward(v)
    slept.clear()
    taken = []
    for step in range(1, 4 if cost >= 0.05 else 7 if not cv else 13):
        dispatcher.scatter_add(np.zeros(1))
        begin = time.perf_counter()
        smoothed(theta, step).backward(v)
        taken.append(time.perf_counter() - begin)
    total = dispatcher.scatter_add(np.array([sum(slept), float(len(slept))]))
    # With uneven runs steps differ: what is predicted is their mean.
    typical = statistics.mean(taken) if cv else statistics.median(taken)
    return {"step_s": typical, "cost_s": float(total[0] / total[1])}


def on_a_rank(task: str) -> None:
    from bridge.dispatch import is_root

    what = json.loads(task)
    result = machine_numbers() if what == "machine" else [measured_step(*case) for case in what]
    if is_root():
        print("RESULT", json.dumps(result), flush=True)


# --- from outside -----------------------------------------------------------------------------------------------------


def run(ranks: int, what: Any, delay_s: float | None = None) -> Any:
    """Runs a task on ranks here, or, with a delay, on two virtual hosts."""
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec") or "mpiexec"
    environment = {
        **os.environ,
        "MPIEXEC": mpiexec,
        "BRIDGE_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    launch = [mpiexec, "-n", str(ranks)]
    if delay_s is not None:
        launch = ["bash", str(ROOT / "tools" / "hosts.sh"), "2", str(ranks)]
        environment["DELAY_S"] = str(delay_s) if delay_s else ""
    command = [*launch, sys.executable, __file__, "--task", json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command[:5])} ...: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(lines[0].removeprefix("RESULT "))


def compare(cases: list[Any], ranks: int, machine: Any, where: str, delay_s: float | None = None) -> list[Any]:
    """Rows of measured and predicted steps; an evaluation's cost is what it took in these same steps."""
    from bridge.planning.cost_model import Workload, predict

    rows = []
    for case, measured in zip(cases, run(ranks, cases, delay_s), strict=True):
        (nominal, m, cv, schedule), cost = case, measured["cost_s"]
        workload = Workload(
            cost_s=cost,
            num_samples=N,
            num_outputs=m,
            dimension=D,
            cv=cv,
            schedule=schedule,  # type: ignore[arg-type]
        )
        predicted = predict(workload, machine, ranks)
        rows.append(
            {
                "where": where,
                "cost_ms": 1e3 * nominal,
                "slept_ms": round(1e3 * cost, 3),
                "cv": cv,
                "schedule": "dynamic" if workload.dynamic else "static",
                "outputs": m,
                "samples": N,
                "ranks": ranks,
                "predicted_ms": round(1e3 * predicted.step_s, 2),
                "measured_ms": round(1e3 * measured["step_s"], 2),
                "predicted_efficiency": round(predicted.efficiency, 3),
                "measured_efficiency": round(N * cost / (ranks * measured["step_s"]), 3),
                "limited_by": predicted.bottleneck,
            }
        )
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[Any]) -> str:
    lines = [
        "| a run | cv, schedule | outputs | ranks | predicted | measured | ratio | efficiency predicted | measured |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['cost_ms']:g} ms | {r['cv']:g}, {r['schedule']} | {r['outputs']:,} | {r['ranks']} | "
            f"{r['predicted_ms']:.4g} ms | {r['measured_ms']:.4g} ms | {r['measured_ms'] / r['predicted_ms']:.2f} | "
            f"{r['predicted_efficiency']:.2f} | {r['measured_efficiency']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Any], machine: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    from bridge.planning.advice import seconds
    from bridge.planning.cost_model import Machine, Workload, predict

    ranks = sorted({*range(1, 65), *np.unique(np.geomspace(1, 10_000, 160).astype(int)).tolist()})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.85, 5))
    for colour, cost in zip(colours[::2], (0.001, 0.01, 0.05), strict=True):
        here = [r for r in rows if r["outputs"] == 160_000 and r["cost_ms"] == 1e3 * cost and r["where"] == "here"]
        workload = Workload(cost_s=here[0]["slept_ms"] / 1e3, num_samples=N, num_outputs=160_000, dimension=D)
        predicted = [predict(workload, machine, r).efficiency for r in ranks]
        axes[0].plot(ranks, predicted, color=colour, label=f"a run of {seconds(cost)}")
        axes[0].plot(
            [r["ranks"] for r in here], [r["measured_efficiency"] for r in here], "o", color=colour, mec="k", ms=5
        )
    axes[0].set_title(f"This machine, N = {N}: model (lines), measured (points)", fontsize=10)
    n = 4096
    for colour, cost in zip(colours[::2], (0.01, 0.1, 10.0), strict=True):
        for leaf, style in ((1, "-"), (None, ":")):
            workload = Workload(
                cost_s=cost,
                num_samples=n,
                num_outputs=160_000,
                dimension=D,
                cv=0.2,
                leaf_size=leaf,
                keep_bytes=1e10 if leaf else 24e6,
            )
            predicted = [predict(workload, Machine(), r).efficiency for r in ranks]
            label = f"a run of {seconds(cost)}" if leaf else None
            axes[1].plot(ranks, predicted, style, color=colour, label=label, lw=1.5 if leaf else 1.0)
    axes[1].set_title(
        f"A cluster (model alone), N = {n:,}, cv 0.2: leaf_size=1, kept;\ndotted: the defaults, 32 units, streamed",
        fontsize=10,
    )
    for axis, corner in zip(axes, ("upper right", "lower left"), strict=True):
        axis.set(xscale="log", xlabel="ranks", xlim=(0.9, 11_000), ylim=(0, 1.05))
        axis.axhline(0.8, color="0.7", lw=0.8, zorder=0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc=corner)
    axes[0].set_ylabel("efficiency: N cost / (ranks x step)")
    figure.savefig(FOLDER / "efficiency.png", dpi=130)


def main() -> None:
    from bridge.planning.cost_model import Machine

    numbers = run(2, "machine")
    machine = Machine(**numbers)
    print(f"machine: {json.dumps({k: float(f'{v:.3g}') for k, v in numbers.items()})}", file=sys.stderr)
    rows: list[Any] = []
    for ranks in RANKS:
        rows += compare(CASES, ranks, machine, "here")
    hosts: list[Any] = []
    links = []
    for delay in DELAYS_S if "--hosts" in sys.argv else ():
        between = run(2, "machine", delay)
        there = replace(machine, latency_s=between["latency_s"], bandwidth=between["bandwidth"])
        links.append((delay, there))
        hosts += compare(HOST_CASES, 2, there, f"2 hosts, delay {1e3 * delay:g} ms", delay)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "plan.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows + hosts)
    draw(rows, machine)
    text = report(rows, hosts, machine, links)
    print(text)
    page = FOLDER / "README.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- measured -->\n")
    page.write_text(f"{before}<!-- measured -->\n{text}<!-- end -->{rest.split('<!-- end -->')[1]}", encoding="utf-8")


def report(rows: list[Any], hosts: list[Any], machine: Any, links: list[Any]) -> str:
    """What goes into docs/cluster/README.md."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[2]
    busy = ", **busy with other work: steps are too long**" if load > 0.75 * cores else ""
    text = (
        f"Measured on {cores} cores ({platform.machine()}) at a load of {load:.1f}{busy}; N = {N}, d = {D}, float32,\n"
        f"simulators that sleep. The machine: a message takes {1e6 * machine.latency_s:.0f} us and "
        f"{machine.bandwidth / 1e9:.1f} GB/s; addition {1 / machine.add_s_per_byte / 1e9:.1f} GB/s;\nbridge's own time "
        f"{1e3 * machine.step_overhead_s:.1f} ms a step, {1e6 * machine.evaluation_overhead_s:.0f} us an evaluation, "
        f"{1e6 * machine.row_overhead_s:.2f} us a row.\n\n{markdown(rows)}\n"
    )
    for delay, there in links:
        mine = [r for r in hosts if r["where"] == f"2 hosts, delay {1e3 * delay:g} ms"]
        text += (
            f"\nTwo virtual hosts, a delay of {1e3 * delay:g} ms between them: a message takes "
            f"{1e6 * there.latency_s:.0f} us and {there.bandwidth / 1e9:.2f} GB/s.\n\n{markdown(mine)}\n"
        )
    return text


if __name__ == "__main__":
    if "--task" in sys.argv:
        on_a_rank(sys.argv[sys.argv.index("--task") + 1])
    else:
        main()
