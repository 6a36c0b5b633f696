"""What the images of a tilt series cost: 41 images of 256 x 256 pixels, for one, two and eight particles; one thread.

python tests/benchmarks/bench_tilt_series.py [repetitions]
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch

from simulators.cryoet import Particle, Specimen, TiltSeries


def main(repetitions: int) -> None:
    torch.set_num_threads(1)
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


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
