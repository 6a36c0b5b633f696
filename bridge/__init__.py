"""Gradients through simulators that cannot be differentiated.

`import bridge` is light: each public name is imported when it is first used, so that adapters work where torch is
not installed, and MPI is not touched before it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptiveEstimate": "bridge.smoothing.adaptive",
    "BlockStructure": "bridge.simulator.protocol",
    "Distribution": "bridge.estimators.distributions",
    "Estimate": "bridge.smoothing.estimate",
    "FitResult": "bridge.reporting.result",
    "LogScale": "bridge.estimators.scale",
    "LowerTriangular": "bridge.estimators.scale",
    "PointSet": "bridge.estimators.points",
    "Run": "bridge.storage.run",
    "Store": "bridge.storage.store",
    "driver": "bridge.dispatch.driver",
    "fit": "bridge.fitting.fit",
    "is_root": "bridge.dispatch",
    "local_device": "bridge.dispatch.base",
    "smooth": "bridge.smoothing.smooth",
    "smooth_loss": "bridge.smoothing.smooth",
    "study": "bridge.studies",
    "BridgeError": "bridge.errors",
    "CollectiveError": "bridge.errors",
    "EvaluationError": "bridge.errors",
    "EvaluationTimeoutError": "bridge.errors",
    "InputError": "bridge.errors",
    "OutputError": "bridge.errors",
    "SetupError": "bridge.errors",
    "StoppedError": "bridge.errors",
    "Parameter": "bridge.simulator.protocol",
    "ParameterSpace": "bridge.simulator.protocol",
    "Simulator": "bridge.simulator.protocol",
    "as_simulator": "bridge.simulator.protocol",
    "find": "bridge.simulator.registry",
    "list_simulators": "bridge.simulator.registry",
    "make": "bridge.simulator.registry",
    "register": "bridge.simulator.registry",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}. Public names: {', '.join(sorted(_PUBLIC))}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
