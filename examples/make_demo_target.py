"""Simulates the demo's target once: a noisy micrograph, and beside it the truth, which the fit never reads.

python examples/make_demo_target.py
"""

import json
from pathlib import Path

import numpy as np

from bridge import load_simulator

HERE = Path(__file__).parent
TRUTH = {"defocus_um": 1.6, "x_angstrom": 8.0, "y_angstrom": -12.0, "rotation_deg": 3.5}

sim = load_simulator(HERE / "demo.toml").replace(noise="full")
theta = sim.space.vector(TRUTH)
image = sim(theta[None], np.array([20240817], dtype=np.uint64))[0]
sim.write_output(str(HERE / "data" / "demo_target.mrc"), image.astype(np.int16))
(HERE / "data" / "demo_truth.json").write_text(json.dumps(TRUTH, indent=2) + "\n", encoding="utf-8")
print(f"mean {image.mean():.1f}, standard deviation {image.std():.1f} counts")
