"""Gradients through simulators that cannot be differentiated.

`import bridge` is light: each public name is imported when it is first used, so that adapters work where torch is
not installed, and MPI is not touched before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptiveEstimate": "bridge.adaptive",
    "BlockStructure": "bridge.simulator",
    "Distribution": "bridge.distributions",
    "Estimate": "bridge.estimate",
    "FitResult": "bridge.fitting",
    "LogScale": "bridge.scale",
    "LowerTriangular": "bridge.scale",
    "PointSet": "bridge.points",
    "Run": "bridge.runs",
    "Store": "bridge.store",
    "driver": "bridge.dispatch.driver",
    "fit": "bridge.fitting",
    "is_root": "bridge.dispatch",
    "local_device": "bridge.dispatch.base",
    "smooth": "bridge.smoothing",
    "smooth_loss": "bridge.smoothing",
    "study": "bridge.studying",
    "BridgeError": "bridge.errors",
    "CollectiveError": "bridge.errors",
    "EvaluationError": "bridge.errors",
    "EvaluationTimeoutError": "bridge.errors",
    "InputError": "bridge.errors",
    "OutputError": "bridge.errors",
    "SetupError": "bridge.errors",
    "StoppedError": "bridge.errors",
    "Parameter": "bridge.simulator",
    "ParameterSpace": "bridge.simulator",
    "Simulator": "bridge.simulator",
    "as_simulator": "bridge.simulator",
    "find": "bridge.registry",
    "list_simulators": "bridge.registry",
    "make": "bridge.registry",
    "register": "bridge.registry",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}. Public names: {', '.join(sorted(_PUBLIC))}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
