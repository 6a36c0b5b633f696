"""Recovers a microscope's settings from a micrograph: the demo as a script.

    python examples/recover_microscope.py
    mpirun -n 2 python examples/recover_microscope.py        # bitwise the same answer

Every rank runs this same file; each simulates its own share of the perturbations.
"""

import argparse
import json
from pathlib import Path

import bridge
from bridge import CryoET, Detector, Microscope, Specimen, read_micrograph

HERE = Path(__file__).parent

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--steps", type=int, default=48)
options.add_argument("--samples", type=int, default=64)
options.add_argument("--output", type=Path, default=None, help="write the recovered parameters here (JSON)")
arguments = options.parse_args()

target = read_micrograph(HERE / "data" / "demo_target.mrc")
hinge = Specimen.from_file(HERE / "data" / "6wg6.cif.gz", assembly="1")
simulator = CryoET(
    hinge.field(copies=12, field_angstrom=768.0, seed=1),
    shape=target.image.shape,
    pixel_size_angstrom=target.pixel_size_angstrom,
    microscope=Microscope(voltage_kv=300.0, cs_mm=2.7, amplitude_contrast=0.07),
    detector=Detector(dose_e_per_angstrom2=40.0, dqe=0.8, dead_pixel_fraction=0.0003),
    parameters=("defocus_um", "x_angstrom", "y_angstrom", "rotation_deg"),
    bounds={"defocus_um": (0.5, 4.0), "x_angstrom": (-80, 80), "y_angstrom": (-80, 80), "rotation_deg": (-30, 30)},
    mode="hard",  # integer counts, thresholds, a hard aperture: no derivative exists
)


def show(step):
    if bridge.is_root() and step.step % 4 == 0:
        print(f"step {step.step:4d}  loss {step.loss:.5f}  {simulator.space.mapping(step.parameters)}", flush=True)


result = bridge.fit(
    simulator,
    target.image,
    start={"defocus_um": 2.0, "x_angstrom": -10.0, "y_angstrom": 5.0, "rotation_deg": -2.5},
    seed=0,
    # Least squares with the Jacobian of the smoothed simulator.
    method=bridge.GaussNewton(steps=arguments.steps, num_samples=arguments.samples, scale=(3.0, 0.15)),
    variance=450.0,  # of a pixel: 40 e/A^2 x 9 A^2 / DQE
    watch=show,
)

if bridge.is_root():
    print(json.dumps({name: value.hex() for name, value in simulator.space.mapping(result.parameters).items()}))
    for name, value in result.to_dict()["parameters"].items():
        error = value["standard_error"]  # None where none is stated: result.warnings says why
        print(f"{name:14s} {value['value']:10.4f} +- {'?' if error is None else f'{error:.4f}'} {value['unit']}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
