"""What the estimator adds to a simulator: CPU time for each sample and memory, at d=8, m=160,000, float32.

    python tests/benchmarks/bench_estimator.py

The simulator hands out prepared outputs, so that nearly all the time is the estimator's; the time of a bare loop over
the same simulator is subtracted. Forward and backward; fixed scale. Each row is its own process, so that the peak
memory (beyond the process before the first step) is that of this N alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

D, M = 8, 160_000
REPEATS = 7


def measure(n: int) -> dict[str, float]:
    import numpy as np
    import torch

    import bridge

    rng = np.random.default_rng(0)
    prepared = rng.normal(size=(4, M)).astype(np.float32)
    count = 0

    def simulator(x):
        nonlocal count
        count += 1
        return prepared[count % 4]

    smoothed = bridge.smooth(simulator, seed=0, num_samples=n, scale=0.1)
    theta = torch.zeros(D, dtype=torch.float32, requires_grad=True)
    v = torch.ones(M)
    bare, whole = [], []
    bridge.smooth(simulator, seed=0, num_samples=2, scale=0.1)(theta).backward(v)  # first use: imports, threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(REPEATS):
        begin = time.process_time()
        for _ in range(n):
            simulator(None)
        bare.append(time.process_time() - begin)
        begin = time.process_time()
        smoothed(theta, step).backward(v)
        whole.append(time.process_time() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    added = sorted(w - b for w, b in zip(whole, bare, strict=True))
    return {
        "n": n,
        "median_us": 1e6 * added[REPEATS // 2] / n,
        "min_us": 1e6 * added[0] / n,
        "max_us": 1e6 * added[-1] / n,
        "peak_mb": (peak - before) / 1024,
    }


def main() -> None:
    print(f"d={D}, m={M}, float32, forward and backward, {REPEATS} repeats")
    print("     N   us CPU a sample: median, min, max; peak MB")
    for n in (16, 64, 256, 1024, 4096):
        run = subprocess.run([sys.executable, __file__, str(n)], capture_output=True, text=True, check=True)
        row = json.loads(run.stdout)
        us = "".join(f"{row[k]:>9.0f}" for k in ("median_us", "min_us", "max_us"))
        print(f"{row['n']:>6} {us} {row['peak_mb']:>8.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        main()
