"""Wraps a command-line program, here awk, and recovers its inputs from its output.

    python examples/wrap_a_program.py

A template says what the program's files mean, a profile how this machine runs it. Both are plain data, so the simulator
also works under MPI, in a pool, and in `bridge.fit`.
"""

import numpy as np

import bridge
from bridge import ExternalSimulator, Parameter, ParameterSpace, Profile, TextTemplate

# A damped oscillation that is recorded as integers: there is no derivative to be had from inside.
PROGRAM = 'BEGIN { while ((getline < "in.txt") > 0) v[$1] = $3; for (t = 0; t < 4; t += 0.1)' + (
    ' print int(1000 + 500 * exp(-v["decay"] * t) * sin(v["rate"] * t)) }'
)
space = ParameterSpace(
    (
        Parameter("decay", "1/s", lower=0.0, upper=2.0, natural_scale=0.1),
        Parameter("rate", "rad/s", lower=1.0, upper=9.0, natural_scale=0.3),
    )
)
template = TextTemplate(inputs={"in.txt": "decay = {decay}\nrate = {rate}\n"}, output="stdout.txt")
simulator = ExternalSimulator(template, Profile(("awk", PROGRAM), timeout_s=10), space, output_shape=(40,))

if __name__ == "__main__":
    target = simulator(np.array([[0.4, 5.0]]), np.zeros(1, np.uint64))[0]
    start = {"decay": 0.8, "rate": 4.5}
    result = bridge.fit(
        simulator, target, start, seed=0, method=bridge.GaussNewton(steps=10, num_samples=16, scale=0.3)
    )
    if bridge.is_root():
        print("recovered:", {name: round(value, 2) for name, value in space.mapping(result.parameters).items()})
