"""What a micrograph of the cryo-EM simulator costs: milliseconds of CPU and of wall time, on one thread.

    python tests/benchmarks/bench_cryoet.py

Images of 400 x 400 pixels of 3 angstrom of twelve copies of PDB 6WG6; defocus, x, y and rotation change from image to
image, the projected potential is cached. Parameters are float32 inside, as in a fit. The defocus may be up to 4 um, so
that the margin is 56 pixels and the images are computed on 512 x 512. The kinds take turns, so that a load that comes
and goes meets them alike. To be met: 15 ms of CPU for the clean hard image.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from simulators.cryoet import CryoET, Specimen, TEMSim

HINGE = Path(__file__).resolve().parents[2] / "examples" / "data" / "6wg6.cif.gz"
REPEATS = 41


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall time [ms]."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def report(label: str, times: list[tuple[float, float]]) -> None:
    numbers = np.array(times)
    three = (np.median(numbers, axis=0), numbers.min(axis=0), numbers.max(axis=0))
    print(f"{label:<34}" + "".join(f"{row[k]:>9.1f}" for k in range(2) for row in three))


def main() -> None:
    torch.set_num_threads(1)
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, load before: {load}; {REPEATS} repeats")
    print(f"{'milliseconds':<34}{'CPU: median, min, max':>27}{'wall: median, min, max':>27}")

    hinges = Specimen.from_file(HINGE).field(copies=12, field_angstrom=1100.0, seed=1)
    hard = CryoET(hinges, shape=(400, 400), pixel_size_angstrom=3.0)
    hard.projection()  # imports and tables, once a process
    smooth = hard.replace(mode="smooth")
    cases = {
        "clean, hard": hard,
        "noisy (poisson), hard": hard.replace(noise="poisson"),
        "noisy (full), hard": hard.replace(noise="full"),
        "clean, smooth": smooth,
        "clean, hard, 256 x 256": hard.replace(shape=(256, 256)),
    }
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(REPEATS + 1, 1, 4)) * hard.space.natural_scale + hard.reference
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in cases}
    for i, theta in enumerate(inputs):
        for label, sim in cases.items():
            once = timed(lambda s=sim, x=theta, seed=i: s(x, np.array([seed], dtype=np.uint64)))  # type: ignore[misc]
            if i:  # the first of each kind fills caches
                times[label].append(once)
    for label, rows in times.items():
        report(label, rows)

    # Voltage, focal length, x and y change, so that nothing but the projection is kept from image to image.
    temsim = TEMSim(Specimen.from_file(HINGE))
    report("maps and projection, TEMSim (1)", [timed(temsim.projection)])
    settings = rng.normal(size=(REPEATS + 1, 1, 4)) * temsim.space.natural_scale + temsim.reference
    for label, sim in (("clean, TEMSim", temsim), ("noisy (full), TEMSim", temsim.replace(noise="full"))):
        runs = [timed(lambda s=sim, x=x, i=i: s(x, np.array([i], dtype=np.uint64))) for i, x in enumerate(settings)]  # type: ignore[misc]
        report(label, runs[1:])

    theta = torch.from_numpy(inputs[0, 0])
    gradient = [timed(lambda: torch.func.jacfwd(smooth.image)(theta)) for _ in range(5)]
    report("all four derivatives, smooth (5)", gradient)
    field = {"copies": 12, "field_angstrom": 1100.0, "seed": 1}
    report("file to specimen (5)", [timed(lambda: Specimen.from_file(HINGE).field(**field)) for _ in range(5)])  # type: ignore[arg-type]
    # A particle's projection is not built by the constructor, but at the first image.
    for kind in (CryoET, TEMSim):
        report(
            f"file to simulator, {kind.__name__} (5)",
            [timed(lambda k=kind: k(Specimen.from_file(HINGE))) for _ in range(5)],
        )  # type: ignore[misc]
    for mode in ("hard", "smooth"):
        build = [timed(lambda m=mode: CryoET(hinges, shape=(400, 400), mode=m).projection()) for _ in range(5)]  # type: ignore[misc]
        report(f"projection, {mode} (5)", build)
    print("load after:", " ".join(f"{x:.2f}" for x in os.getloadavg()))


if __name__ == "__main__":
    main()
