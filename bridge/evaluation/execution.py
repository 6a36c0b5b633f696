"""How runs are carried out, and how they fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from bridge.arrays import Array
from bridge.estimators.design import Design
from bridge.estimators.strategy import FailureRule, Strategy
from bridge.simulator.identity import Filing
from bridge.simulator.protocol import Simulator
from bridge.storage.store import Store

Schedule = Literal["auto", "static", "dynamic"]
STATUSES = ("ok", "error", "timeout", "non-finite")


class Failure(NamedTuple):
    """How a run failed: one of `STATUSES`, and why."""

    status: str
    why: str


@dataclass(frozen=True)
class Tolerance:
    """Which runs count as failed, and what becomes of them.

    Attributes:
        failures: "raise": a run that fails ends the evaluation. With the others it is data.
        errors_raise: a run that raises ends the evaluation whatever `failures` says, which is then about numbers alone:
            those that are not finite, or not smaller than `largest`.
        missing: "ignore" takes single NaN for numbers that an output lacks.
        penalty: what stands in the place of a failed output; None where nothing does.
        min_ok: share of the runs that have to succeed.
    """

    failures: FailureRule = "raise"
    errors_raise: bool = False
    largest: float = math.inf
    missing: Literal["raise", "ignore"] = "raise"
    penalty: float | None = None
    min_ok: float = 0.0

    @classmethod
    def of(cls, strategy: Strategy) -> Tolerance:
        """That of the runs of a smoothing."""
        return cls(
            failures=strategy.failures,
            errors_raise=strategy.errors_raise,
            largest=strategy.largest,
            missing=strategy.missing,
            penalty=strategy.penalty,
            min_ok=strategy.min_ok,
        )

    @property
    def tolerates_errors(self) -> bool:
        """Whether a run that raises is data."""
        return self.failures != "raise" and not self.errors_raise

    @property
    def filling(self) -> float:
        """What stands in memory in the place of a failed output: the penalty, or a zero that has no weight."""
        return 0.0 if self.penalty is None else self.penalty


@dataclass(frozen=True)
class Execution:
    """How runs are carried out, of which no result depends in any bit; see `bridge.smooth`.

    Attributes:
        keep_bytes: outputs up to this size are kept, larger ones streamed where that is smaller.
        memory_bytes: kept outputs of a rank beyond this go to a file on its local disk.
        schedule: who evaluates what, see `Dispatcher.claims`.
        retries: further attempts at a run that raises.
        store: finished evaluations on disk.
        step_limit_s: after so long all ranks show where they are, and the job ends.
        role: before the simulator's name in the store: two simulators of one name may be at work.
        filings: by id of the simulator, see `filing`.
    """

    keep_bytes: int = 24_000_000
    memory_bytes: float = math.inf
    schedule: Schedule = "auto"
    retries: int = 0
    store: Store | None = None
    step_limit_s: float | None = None
    role: str = ""
    filings: dict[int, tuple[Simulator, Filing]] = field(default_factory=dict, repr=False, compare=False)

    def filing(self, simulator: Simulator) -> Filing:
        """Under which name a simulator's evaluations are filed: what it was when this was first asked.

        Raises:
            InputError: something in it cannot be seen.
        """
        if id(simulator) not in self.filings:
            self.filings[id(simulator)] = simulator, Filing(simulator)
        return self.filings[id(simulator)][1]


@dataclass(frozen=True)
class Problem:
    """One replicate of one parameter vector: its scale and its draws."""

    theta: Array
    scale: Array
    design: Design


_default_device: ContextVar[torch.device] = ContextVar("default_device")


def ordinary_torch() -> AbstractContextManager[None]:
    """Keeps torch's settings of the caller away from sums: autocast would round them, memory made in inference mode
    could not be used outside of it, and a default device is not where arrays of numpy are."""
    ordinary = (
        not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and torch.get_default_device().type == "cpu"
    )
    return nullcontext() if ordinary else _made_ordinary()


@contextmanager
def _made_ordinary() -> Iterator[None]:
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        device = torch.get_default_device()
        if device.type != "cpu":
            stack.callback(_default_device.reset, _default_device.set(device))
            stack.enter_context(torch.device("cpu"))
        yield


def torch_of_simulators() -> AbstractContextManager[Any]:
    """A simulator may differentiate inside, wherever it is called from, and has the caller's default device."""
    device = _default_device.get(None)
    return torch.enable_grad() if device is None else _on(device)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    with torch.enable_grad(), device:
        yield
