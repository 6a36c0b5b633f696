"""What tests of fits share: a small simulator with names and natural scales, and a fit that is killed and resumed."""

import numpy as np
import pytest

import bridge

X = np.linspace(0, 3, 25)
TRUTH = np.array([2.0, 1.2, 0.5])
START = [1.6, 0.9, 0.7]


class Killed(BaseException):
    pass


def decay(theta):
    return theta[0] * np.exp(-theta[1] * X) + theta[2]


def circuit(t):
    """The response to a step, at times t, of (r, l, c) in series: it depends on l c and r / l alone."""

    def response(p):
        r, inductance, c = p
        w, a = 1 / np.sqrt(inductance * c), r / (2 * inductance)
        s = np.sqrt(complex(w * w - a * a))
        return np.real(1 - np.exp(-a * t) * (np.cos(s * t) + a / s * np.sin(s * t)))

    return response


def named(function, **settings):
    return bridge.as_simulator(function, names=["a", "rate", "b"], natural_scale=[0.3, 0.3, 0.2], **settings)


def killed_and_resumed(fit, folder, at):
    """`fit(run, **settings)` undisturbed, and killed after step `at` and resumed: bitwise the same."""
    whole = fit(folder / "whole")

    def die(record):
        if record.step == at:
            raise Killed

    with pytest.raises(Killed):
        fit(bridge.Run(folder / "killed", every_s=0), watch=die)
    seen = []
    resumed = fit(folder / "killed", watch=seen.append)
    assert tuple(seen) == resumed.history
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()
    assert (resumed.covariance is None) == (whole.covariance is None)
    if whole.covariance is not None:
        assert resumed.covariance.tobytes() == whole.covariance.tobytes()
    return whole, resumed
