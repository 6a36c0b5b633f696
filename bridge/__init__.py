"""Gradients through simulators that cannot be differentiated.

Everything that people write is here: `bridge.fit`, `bridge.smooth`, simulators (`bridge.CryoET`), what wraps a program
(`bridge.ExternalSimulator`), errors. `import bridge` is light: a name is imported when it is first used, so that
adapters work where torch is not installed, and MPI is not touched before it is needed. The names are listed in
`__init__.pyi`.

The rooms behind them, each importing only from those below it:

* `bridge.cli`: the command line.
* `bridge.testing`: contracts that people inherit in tests of what they add; ground truth.
* `bridge.fitting`, `bridge.studies`: parameters from a target; which estimator suits a simulator.
* `bridge.smoothing`: sums of outputs as tensors, under autograd.
* `bridge.planning`: how many ranks are worth having.
* `bridge.reporting`: what a fit says, and who listens.
* `bridge.evaluation`: rows to outputs, outputs to sums.
* `bridge.storage`: what survives the process, runs and evaluations.
* `bridge.dispatch`: which rank evaluates what, and sums in a fixed order.
* `bridge.estimators`: all that is known before a run, distributions, points, scales, designs, weights.
* `bridge.simulator`: what a simulator is, what wraps it, which one it is, its name.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    from bridge.public_names import public, public_names

    return public_names() if name == "__all__" else public(name)


def __dir__() -> list[str]:
    from bridge.public_names import public_names

    return public_names()
