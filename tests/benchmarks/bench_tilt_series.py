"""What the images of a tilt series cost, and what it saves that each has parameters of its own; one thread.

python tests/benchmarks/bench_tilt_series.py [repetitions]
python tests/benchmarks/bench_tilt_series.py blocks [images]
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch

import bridge
from simulators.cryoet import Particle, Specimen, TiltScheme, TiltSeries

KINDS = ("shift_x_angstrom", "shift_y_angstrom", "defocus_um")


def costs(repetitions: int) -> None:
    """41 images of 256 x 256 pixels, for one, two and eight particles."""
    random = np.random.default_rng(0)
    helix = Specimen.helix(60)
    places, angles = random.uniform(-800, 800, (8, 3)) * [1, 1, 0.3], random.uniform(-180, 180, (8, 3))
    particles = [Particle(helix, *place, *angle) for place, angle in zip(places, angles, strict=True)]
    print("particles  noise   CPU a series [s]: median, min   CPU an image [ms]")
    for number in (1, 2, 8):
        for noise in ("none", "full"):
            series = TiltSeries(particles[:number], shape=(256, 256), bounds={"defocus_um": (1, 4)}, noise=noise)
            inputs, seed = series.reference[None], np.zeros(1, dtype=np.uint64)
            series(inputs, seed)  # builds the volume
            seconds = []
            for _ in range(repetitions):
                start = time.process_time()
                series(inputs, seed)
                seconds.append(time.process_time() - start)
            middle = statistics.median(seconds)
            each = 1e3 * middle / series.output_shape[0]
            print(f"{number:9}  {noise:5} {middle:26.2f} {min(seconds):6.2f} {each:19.1f}")


def blocks(images: int) -> None:
    """Error of the smoothed Jacobian of shifts, defocus and axis, against the runs spent, in three ways.

    "columns": all images move alike, 4 dimensions, in pairs of orthogonal directions; "blocks": each by itself, with
    `TiltSeries.structure`; "none": the same without it. The error is that of the whole Jacobian, relative to it, each
    kind with the same weight; the median of four seeds.
    """
    names = [f"{kind}[{t}]" for kind in KINDS for t in range(images)] + ["tilt_axis_deg"]
    scheme = TiltScheme.uniform(-40.0, 40.0, 80.0 / (images - 1))
    series = TiltSeries(
        [Particle(Specimen.helix(60), 60.0, -40.0, 50.0, 25.0, 60.0, -40.0)],
        scheme,
        (48, 48),
        parameters=names,
        mode="smooth",
    )
    theta, d = torch.from_numpy(series.reference), len(names)
    exact = torch.func.jacfwd(series.image)(theta)
    unit = np.append(np.repeat([5.0, 5.0, 0.3], images), 0.5)
    kind = np.append(np.repeat(np.arange(3), images), 3)
    # Each kind has the same weight.
    norm = torch.stack([exact[..., kind == k].square().sum() for k in range(4)])[kind].sqrt()
    seeds = np.zeros(1, dtype=np.uint64)

    def moved(move: np.ndarray) -> np.ndarray:
        return series((series.reference + np.append(np.repeat(move[:3], images), move[3]))[None], seeds)[0]

    def whole(x: np.ndarray) -> np.ndarray:
        return series(x[None], seeds)[0]

    columns = bridge.as_simulator(moved, natural_scale=unit[[0, images, 2 * images, 3 * images]].tolist())
    free = bridge.as_simulator(whole, names=names, natural_scale=unit.tolist())
    blocked = bridge.as_simulator(whole, names=names, natural_scale=unit.tolist(), structure=series.structure)
    print(
        f"{d} parameters, {images} images: relative error of the Jacobian, scale 0.2\n"
        "  runs   columns    blocks      none"
    )
    for runs in (8, 16, 32, 64, 128, 256, 512):
        line = []
        for name, simulator in (("columns", columns), ("blocks", blocked), ("none", free)):
            errors = []
            for seed in range(4):
                points = "orthogonal" if name == "columns" else "auto"
                smoothed = bridge.smooth(
                    simulator, seed=seed, num_samples=runs, scale=0.2, points=bridge.Antithetic(points)
                )
                if name == "columns":
                    narrow = smoothed.estimate(torch.zeros(4, dtype=torch.float64)).jacobian()
                    found = torch.zeros_like(exact)
                    for t in range(images):
                        found[t][..., [t, images + t, 2 * images + t]] = narrow[t, ..., :3]
                    found[..., -1] = narrow[..., 3]
                else:
                    found = smoothed.estimate(theta).jacobian()
                errors.append(float(((found - exact) / norm).square().sum().sqrt()) / 2)
            line.append(statistics.median(errors))
        print(f"{runs:6}" + "".join(f"{error:10.3f}" for error in line), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["blocks"]:
        blocks(int(sys.argv[2]) if len(sys.argv) > 2 else 11)
    else:
        costs(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
