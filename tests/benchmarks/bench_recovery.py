"""The main job from ten starts: what is recovered, against five times the Cramer-Rao bound.

    python tests/benchmarks/bench_recovery.py [processes]

Each start is off by at least 0.3 um, 15 A, 15 A and 5 degrees, with signs and sizes drawn from a fixed seed. The
tolerance of each parameter is the wider of 5 x its bound and 20 nm, 0.5 A, 0.5 A, 0.25 degrees.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

import bridge
from bridge.cli.job import load_job

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LEAST = np.array([0.3, 15.0, 15.0, 5.0])
FLOOR = np.array([0.02, 0.5, 0.5, 0.25])
STARTS = 10


def recover(number: int) -> tuple[np.ndarray, np.ndarray, int, float, float]:
    job = load_job(EXAMPLES / "demo.toml")
    truth = job.simulator.space.vector(json.loads((EXAMPLES / "data" / "demo_truth.json").read_text()))
    rng = np.random.default_rng([number, 11])
    offset = rng.choice([-1.0, 1.0], 4) * LEAST * rng.uniform(1.0, 1.2, 4)
    wall, cpu = time.perf_counter(), time.process_time()
    result = bridge.fit(job.simulator, job.target, truth + offset, **job.settings)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return offset, result.parameters - truth, result.num_evaluations, wall, cpu


def main() -> None:
    from simulators.cryoet import cramer_rao

    processes = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1
    job = load_job(EXAMPLES / "demo.toml")
    truth = job.simulator.space.vector(json.loads((EXAMPLES / "data" / "demo_truth.json").read_text()))
    bound = cramer_rao(job.simulator.replace(mode="smooth"), truth).standard_deviation
    tolerance = np.maximum(5 * bound, FLOOR)
    print(f"{'':>6} {'defocus um':>20} {'x A':>18} {'y A':>18} {'rotation deg':>18}")
    print(f"{'bound':>6} {bound[0]:>20.4f} {bound[1]:>18.3f} {bound[2]:>18.3f} {bound[3]:>18.4f}")
    print(f"{'within':>6} {tolerance[0]:>20.4f} {tolerance[1]:>18.3f} {tolerance[2]:>18.3f} {tolerance[3]:>18.4f}")
    good = 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for number, (offset, error, runs, wall, cpu) in enumerate(pool.imap(recover, range(STARTS))):
            ok = bool((np.abs(error) <= tolerance).all())
            good += ok
            cells = " ".join(f"{o:>+8.2f} -> {e:>+7.4f}" for o, e in zip(offset, error, strict=True))
            print(
                f"{number:>6} {cells}  {'ok' if ok else 'MISSED'}  {runs} runs, {wall:.0f} s wall, {cpu:.0f} s CPU",
                flush=True,
            )
    print(f"{good} of {STARTS} recovered")


if __name__ == "__main__":
    main()
