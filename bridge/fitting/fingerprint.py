"""What a result depends on: a run goes on under the same settings alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from bridge.estimators.covariates import get_covariate
from bridge.estimators.distributions import get_distribution
from bridge.estimators.points import Antithetic, get_points
from bridge.fitting.methods.base import FitTask, Method, MethodRun
from bridge.fitting.misfit import Misfit
from bridge.fitting.target import LinearMap
from bridge.simulator.function import as_simulator
from bridge.simulator.identity import identity_of, identity_of_function
from bridge.simulator.protocol import simulator_name
from bridge.smoothing.surrogate import as_surrogate


def fingerprint(task: FitTask, method: Method, run: MethodRun) -> dict[str, Any]:
    """All settings of a fit, as plain data that are the same in another process."""
    problem, misfit, prior = task.problem, task.problem.misfit, task.problem.misfit.prior
    functions = {"loss": misfit.loss, "whiten": misfit.whiten}
    others = {} if misfit.robust is None or _is_ours(misfit.robust) else {"robust": misfit.robust}
    plain = run.smoothed[0]
    return {
        "simulator": simulator_name(problem.simulator),
        "identity": plain.execution.filing(plain.simulator).name,
        **{f"code of {k}": identity_of_function(f, k) for k, f in functions.items() if callable(f)},
        **{f"code of {k}": identity_of_function(f, k) for k, f in others.items()},
        "seed": task.seed,
        "method": method.name,
        **({} if _is_ours(method) else {"code of the method": identity_of_function(type(method), "method")}),
        **_of_method(method, misfit),
        "stop_at_error": task.stop.error,
        "start": problem.starts.tolist(),
        "target": _digest(misfit.target),
        "partial": misfit.partial,
        "mask": None if misfit.masked is None else _digest(misfit.masked),
        "max_runs": task.stop.runs,
        "prior": [prior.information.tolist(), prior.mean.tolist()],
        "robust": repr(misfit.robust),
        "variance": _digest(misfit.variance) if problem.known_noise else None,  # else it is ones
        "whiten": _digest(_whitened(misfit.whiten, _probe(misfit))),
        "failures": repr(task.failures),
        "leaf_size": task.place.ranks.leaf_size,
        "natural_scale": problem.natural.tolist(),
        **run.described,
    }


def _of_method(method: Method, misfit: Misfit) -> dict[str, Any]:
    """The settings of a method; functions among them by what they are, and maps of outputs by what they do as well."""
    found: dict[str, Any] = {}
    for setting in fields(method):  # type: ignore[arg-type]
        name, value = setting.name, getattr(method, setting.name)
        if name == "blur":
            found[name] = [_of_blur(given, misfit) for given in value or ()]
            for i, given in enumerate(value or ()):
                if callable(given):
                    found[f"code of {name}[{i}]"] = identity_of_function(given, f"{name}[{i}]")
        elif name == "surrogate" and value is not None:
            cheap = as_surrogate(value)
            found[name] = [identity_of(as_simulator(cheap.simulator)), cheap.samples, cheap.weight]
        elif name in _NAMED and isinstance(value, str) and not _is_ours(found_as := _NAMED[name](value)):
            # A name is not enough: what it stands for may change.
            found[name] = [value, identity_of_function(found_as, name)]
        elif name == "reuse":
            continue  # taken in once, and described by itself
        elif value is None or isinstance(value, bool | int | float | str | tuple | list | Mapping):
            found[name] = value
        else:
            found[f"code of {name}"] = identity_of_function(value, name)
    return found


def _of_blur(given: float | LinearMap, misfit: Misfit) -> Any:
    return given if isinstance(given, int | float) else _digest(given(_whitened(misfit.whiten, _probe(misfit))))


# What is given by name, and may be somebody else's.
_NAMED: dict[str, Callable[[str], Any]] = {
    "distribution": get_distribution,
    "points": get_points,
    "covariate": get_covariate,
}


def _is_ours(value: Any) -> bool:
    """Whether a name says all of it."""
    value = value.base if isinstance(value, Antithetic) else value
    return type(value).__module__.partition(".")[0] == "bridge"


def _probe(misfit: Misfit) -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, misfit.target.numel(), dtype=torch.float64).reshape(misfit.target.shape)


def _whitened(whiten: LinearMap | None, x: torch.Tensor) -> torch.Tensor:
    return x if whiten is None else whiten(x)


def _digest(tensor: torch.Tensor) -> str:
    array = tensor.detach().contiguous().numpy()
    return hashlib.blake2b(f"{array.shape}".encode() + array.tobytes(), digest_size=16).hexdigest()
