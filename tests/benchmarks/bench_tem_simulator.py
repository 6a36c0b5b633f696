"""TEM-simulator through the adapter: what a run costs with cached maps, and what the adapter adds to the program.

    TEM_SIMULATOR=/path/to/TEM-simulator python tests/benchmarks/bench_tem_simulator.py FOLDER [runs]

FOLDER holds a deck, input.txt, and what it names; its particle comes from a PDB file. Runs of all kinds take turns.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from adapters.tem.simulator import TEMSimulator


def cpu_s() -> tuple[float, float]:
    """CPU of this process, and of its ended children [s]."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime


def main(folder: Path, runs: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bridge-bench-") as scratch:
        kinds = {
            f"{noise}, {'rescaled' if changed else 'same'} voltage": (
                TEMSimulator(
                    folder / "input.txt", ["voltage_kv"], noise=noise, cache=folder / "cache", scratch=scratch
                ),
                1.5 if changed else 1.0,
            )
            for noise in ("none", "noisy", "both")
            for changed in (False, True)
        }
        first = next(iter(kinds.values()))[0]
        start = time.perf_counter()
        first.prepare()
        print(f"maps, built or found: {time.perf_counter() - start:.2f} s; output shape of a run: {first.output_shape}")
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        own: dict[str, list[float]] = {name: [] for name in kinds}
        program: dict[str, list[float]] = {name: [] for name in kinds}
        for seed in range(runs + 1):
            for name, (simulator, factor) in kinds.items():
                before, start = cpu_s(), time.perf_counter()
                simulator(factor * simulator.reference[None], np.array([seed], dtype=np.uint64))
                wall, after = time.perf_counter() - start, cpu_s()
                if seed:  # the first round fills the page cache
                    seconds[name].append(wall)
                    own[name].append(after[0] - before[0])
                    program[name].append(after[1] - before[1])
        print(f"{'run':28} wall: median, min [s]   CPU: program, adapter [s]")
        for name in kinds:
            wall, mine, its = seconds[name], statistics.median(own[name]), statistics.median(program[name])
            print(f"{name:28} {statistics.median(wall):12.3f} {min(wall):8.3f} {its:17.3f} {mine:9.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
