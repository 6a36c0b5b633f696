"""What dispatch costs and how well it shares: efficiency on two ranks, uneven runs, overhead, price of exact sums.

    python tests/benchmarks/bench_dispatch.py [overhead | exact | even | uneven]

Starts ranks by the launcher beside this Python. Each comparison is made in one process, turn by turn; medians.
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

M = 160_000


def ranks(n: int, what: str, *arguments: object) -> dict[str, Any]:
    """What one part prints, run on n ranks."""
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    command = [launcher, "-n", str(n)] if n > 1 else []
    done = subprocess.run(
        [*command, sys.executable, __file__, "_" + what, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def report(result: dict[str, Any]) -> None:
    import bridge

    if bridge.is_root():
        print(json.dumps(result), flush=True)


def spin(seconds: float) -> None:
    """Keeps a core busy for so much CPU time, however much of it others take."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


# --- parts, each run on every rank --------------------------------------------------------------------------------


def overhead(vectorized: bool, n: int = 1 << 14) -> None:
    """CPU time a row that is not the simulator's, forward and backward, 8 parameters and 16 outputs."""
    import numpy as np
    import torch

    import bridge

    A = np.ones((8, 16))
    inside = 0.0

    def f(x):
        nonlocal inside
        begin = time.process_time()
        y = x @ A
        inside += time.process_time() - begin
        return y

    simulator = bridge.as_simulator(f, vectorized=vectorized, output_shape=(16,))
    smoothed = bridge.smooth(simulator, seed=0, num_samples=n, points="mc")
    theta = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    took = []
    for step in range(8):
        inside, begin = 0.0, time.process_time()
        smoothed(theta, step=step).sum().backward()
        took.append(1e6 * (time.process_time() - begin - inside) * smoothed.dispatcher.size / n)
    report({"us": median(took[1:])})


def exact(gradients: bool, seconds: float = 1e-3, n: int = 64) -> None:
    """A forward pass against two that add outputs as they come, on each rank, and then by one Allreduce.

    "bare" is a loop over random rows and their mean, nothing else. "fast" is bridge's forward pass with one partial sum
    a rank in place of the tree: the same design, weights, calls, checks and kernel, but last bits that depend on the
    number of ranks.
    """
    import numpy as np
    import torch

    import bridge
    from bridge.estimators.design import make_design
    from bridge.estimators.weights import make_weights
    from bridge.evaluation.execution import Tolerance
    from bridge.evaluation.kernels import accumulate
    from bridge.evaluation.layout import Layout
    from bridge.evaluation.rows import aligned
    from bridge.evaluation.runner import Runner, Task
    from bridge.simulator.space import ParameterSpace

    prepared = np.random.default_rng(0).normal(size=(4, M)).astype(np.float32)

    def f(x):
        spin(seconds)
        return prepared[int(abs(1e6 * x[0])) % 4]

    smoothed = bridge.smooth(f, seed=0, num_samples=n, scale=0.1, on=bridge.Ranks(schedule="static"))
    dispatcher, strategy = smoothed.dispatcher, smoothed.strategy
    theta = torch.zeros(8, dtype=torch.float64, requires_grad=gradients)

    def reduced(total):
        if dispatcher.size > 1:
            from mpi4py import MPI

            MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, total)
        return total

    def bare(step):
        eps = np.random.default_rng(step).normal(size=(n, 8))
        total = np.zeros(M, dtype=np.float32)
        for row in eps[n * dispatcher.rank // dispatcher.size : n * (dispatcher.rank + 1) // dispatcher.size]:
            total += f(0.1 * row)
        return reduced(total) / n

    def fast(step):
        dispatcher.begin("forward", f"step {step}")
        design = make_design(strategy, step, 0, 8, 0, None)
        weights = make_weights(strategy, design.nodes, None, None, None)
        columns = np.hstack([weights.value[:, None], weights.theta]) if gradients else weights.value[:, None]
        matrix = torch.as_tensor(columns.T.astype(np.float32))
        task = Task(
            smoothed.simulator,
            ParameterSpace.unnamed(8),
            smoothed.execution,
            dispatcher,
            Tolerance(),
            Layout(num_problems=1, num_samples=n),
            inputs=lambda p: 0.1 * design.nodes.eps,
            seeds=lambda p: design.seeds,
        )
        runner = Runner(task)
        total = torch.zeros((len(matrix), M))
        for out in runner.run():
            accumulate(total, aligned(matrix[:, out.start : out.start + len(out.F)]), out.F, first=False)
            runner.check_finite_sum(total[0], out)
            del out
        dispatcher.agree(None)
        return reduced(total.numpy())

    def whole(step):
        return smoothed(theta, step=step)

    took: dict[str, list[float]] = {"bare": [], "fast": [], "exact": []}
    for step in range(14):
        for name, work in (("bare", bare), ("fast", fast), ("exact", whole)):
            dispatcher.agree(None)  # all begin together
            begin = time.perf_counter()
            work(step)
            dispatcher.agree(None)
            took[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: median(times[2:]) for name, times in took.items()}
    to_bare, to_fast = (
        median(e / p for e, p in zip(took["exact"][2:], took[name][2:], strict=True)) for name in ("bare", "fast")
    )
    report({**medians, "to_bare": to_bare, "to_fast": to_fast})


def even(seconds: float = 0.05, n: int = 64) -> None:
    """64 runs of 50 ms of CPU time: efficiency = n x time of a run / (ranks x time of the forward pass).

    The time of a run is measured in the same pass, on the wall clock, so that what else the machine does counts for
    both; what is left is what ranks wait for each other and for bridge.
    """
    import numpy as np
    import torch

    import bridge

    inside = 0.0

    def f(x):
        nonlocal inside
        begin = time.perf_counter()
        spin(seconds)
        inside += time.perf_counter() - begin
        return np.full(1000, x.sum())

    smoothed = bridge.smooth(f, seed=0, num_samples=n)
    dispatcher = smoothed.dispatcher
    theta = torch.zeros(8, dtype=torch.float64)
    efficiency, wall = [], []
    for step in range(6):
        inside = 0.0
        dispatcher.agree(None)
        begin = time.perf_counter()
        smoothed(theta, step=step)
        dispatcher.agree(None)
        wall.append(time.perf_counter() - begin)
        busy = dispatcher.scatter_add(np.eye(dispatcher.size)[dispatcher.rank] * inside).sum()
        efficiency.append(float(busy) / (dispatcher.size * wall[-1]))
    report({"efficiency": median(efficiency[1:]), "wall_s": median(wall[1:])})


SETS = 8


def sleeps(seed: int, n: int = 64) -> list[float]:
    """n lognormal lengths [s]: mean 40 ms, longest 0.25 s."""
    import numpy as np

    normal = np.random.default_rng(seed).normal(size=n)
    normal -= normal.max()

    def lengths(sigma):
        return 0.25 * np.exp(sigma * normal)

    low, high = 0.0, 10.0
    while high - low > 1e-9:  # the mean falls with sigma
        sigma = (low + high) / 2
        low, high = (sigma, high) if lengths(sigma).mean() > 0.04 else (low, sigma)
    return lengths(low).tolist()


def by_a_counter(lengths: list[float], ranks: int) -> float:
    """Efficiency of a shared counter that costs nothing: whoever is free takes the next."""
    free = [0.0] * ranks
    for seconds in lengths:
        heapq.heapreplace(free, free[0] + seconds)
    return sum(lengths) / (ranks * max(free))


def efficiencies(work: Callable[[list[float], int], None], size: int) -> dict[str, list[float]]:
    """sum of sleeps / (ranks x time of `work`) for each set of sleeps, the median of three."""
    results = []
    for seed in range(SETS):
        lengths, took = sleeps(seed), []
        for repeat in range(4):
            begin = time.perf_counter()
            work(lengths, 4 * seed + repeat)
            took.append(time.perf_counter() - begin)
        results.append(sum(lengths) / (size * median(took[1:])))
    return {"efficiency": results}


def uneven(schedule: str, n: int = 64) -> None:
    """Sets of 64 sleeps by a forward pass."""
    import numpy as np
    import torch

    import bridge
    from bridge.estimators.design import make_design

    theta = torch.zeros(1, dtype=torch.float64)
    length: dict[bytes, float] = {}

    def f(x):
        time.sleep(length[x.tobytes()])
        return np.zeros(10)

    smoothed = bridge.smooth(f, seed=0, num_samples=n, points="mc", on=bridge.Ranks(schedule=schedule))
    dispatcher = smoothed.dispatcher

    def work(lengths, step):
        eps = make_design(smoothed.strategy, step, 0, 1, 0, None).nodes.eps
        length.update((x.tobytes(), seconds) for x, seconds in zip(eps, lengths, strict=True))
        with torch.no_grad():
            smoothed(theta, step=step)
        dispatcher.agree(None)

    report(efficiencies(work, dispatcher.size))


def futures() -> None:
    """The same by mpi4py.futures, whose rank 0 only hands out work."""
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:
            result = efficiencies(lambda lengths, _: list(executor.map(time.sleep, lengths)), MPI.COMM_WORLD.Get_size())
            print(json.dumps(result))


# --- tables -------------------------------------------------------------------------------------------------------


def main(wanted: list[str]) -> None:
    def on(part: str) -> bool:
        return not wanted or part in wanted

    if on("overhead"):
        print("CPU time an evaluation beyond the simulator's, forward and backward, 16,384 rows, d=8, m=16 [us]")
        for n in (1, 2):
            in_chunks, singly = (ranks(n, "overhead", v)["us"] for v in (1, 0))
            print(f"  {n} rank(s): called in chunks {in_chunks:6.1f}    row by row {singly:6.1f}", flush=True)
    if on("exact"):
        print(f"forward pass of 64 runs of 1 ms, m={M}, float32, d=8 [ms]; see `exact` in this file for the columns")
        print("                                  bare   fast  exact    exact/bare  exact/fast")
        for n in (1, 2):
            for gradients in (0, 1):
                r = ranks(n, "exact", gradients)
                label = "value and Jacobian" if gradients else "value"
                print(
                    f"  {n} rank(s), {label:<18} {r['bare']:6.1f} {r['fast']:6.1f} {r['exact']:6.1f} "
                    f"{r['to_bare']:13.3f} {r['to_fast']:11.3f}",
                    flush=True,
                )
    if on("even"):
        print("64 runs of 50 ms of CPU time")
        for n in (1, 2):
            r = ranks(n, "even")
            print(f"  {n} rank(s): efficiency {r['efficiency']:.3f}  ({r['wall_s']:.2f} s)", flush=True)
    if on("uneven"):
        print(f"64 lognormal sleeps, mean 40 ms, longest 0.25 s, 4 ranks: efficiency, mean of {SETS} sets, and each")
        rows = [("counter at no cost", [by_a_counter(sleeps(seed), 4) for seed in range(SETS)])]
        for label, part, arguments in (
            ("bridge, dynamic", "uneven", ["dynamic"]),
            ("bridge, auto", "uneven", ["auto"]),
            ("bridge, static", "uneven", ["static"]),
            ("mpi4py.futures", "futures", []),
        ):
            rows.append((label, ranks(4, part, *arguments)["efficiency"]))
        for label, values in rows:
            print(f"  {label:<19} {sum(values) / SETS:.3f}   " + " ".join(f"{v:.3f}" for v in values))


if __name__ == "__main__":
    parts = {"_overhead": overhead, "_exact": exact, "_even": even, "_uneven": uneven, "_futures": futures}
    if len(sys.argv) > 1 and sys.argv[1] in parts:
        part, arguments = parts[sys.argv[1]], sys.argv[2:]
        part(*(bool(int(a)) if a.isdigit() else a for a in arguments))
    else:
        main(sys.argv[1:])
