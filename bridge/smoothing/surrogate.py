"""Two fidelities: a cheap surrogate g of a simulator f as a control variate with a mean of its own.

With T an unbiased estimator of what is linear in the outputs (value, Jacobian, products with it, derivatives in L), N
rows of f, the same N rows of g, and M further rows of g that are independent of them,

    T = T_N[f] - alpha (T_N[g] - T_M[g])

is unbiased for every number alpha, whatever g is: the bracket has mean zero. For independent rows

    Var T = Var(f - alpha g) / N + alpha^2 Var(g) / M,    least at alpha = Cov(f, g) / (Var(g) (1 + N / M)).

Replicate r of T is made of the r-th replicates of the three parts, so that the spread of the replicates is the standard
error of the whole.

alpha = "auto": replicate r takes the alpha that the others suggest, alpha_-r. It is a function of rows that replicate r
has no part in, so that E[alpha_-r (T_r[g] - T'_r[g])] = E[alpha_-r] * 0: still unbiased. An alpha from the same rows
would be biased by O(1/N); one from the step before would make results depend on the order of calls.

Reference: Giles, Acta Numerica 24 (2015) 259 (two levels); Gorodetsky et al., J. Comput. Phys. 408 (2020) 109257
(approximate control variates).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
import torch

from bridge.arrays import Array
from bridge.checks import Settings, is_whole
from bridge.errors import InputError, OutputError
from bridge.estimators.strategy import Strategy, default_leaf_size
from bridge.evaluation.execution import Execution
from bridge.evaluation.linear_forms import Evaluated, LinearForms
from bridge.simulator.function import as_simulator
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.space import ParameterSpace

# (simulator, strategy, execution) -> its evaluation at the parameters at hand.
Evaluate = Callable[[Simulator, Strategy, Execution], Evaluated]

# Fewer replicates tell too little about how f and g go together.
_LEAST_REPLICATES = 4


@final
@dataclass(frozen=True)
class Surrogate(metaclass=Settings):
    """A cheap stand-in g for a simulator f: the same code on a coarser grid, an emulator.

    The estimate becomes that of f - alpha g at the same rows, plus alpha times that of g at others. It is as unbiased
    as without, whatever g is.

    Attributes:
        simulator: g, of the same parameters and shape of output; it runs as f does (`on`, `memory`).
        samples: M, runs of g at rows of its own; it runs at the rows of f as well.
        weight: alpha. 1 suits a g close to f in value. "auto" estimates for each replicate, from the others, the one of
            least variance, and so needs replicates (8, or 4).
    """

    simulator: Callable[..., Any] | Simulator
    samples: int = 1024
    weight: float | Literal["auto"] = 1.0


def as_surrogate(given: Callable[..., Any] | Simulator | Surrogate) -> Surrogate:
    """A cheap simulator with the defaults, or the surrogate that is given."""
    return given if isinstance(given, Surrogate) else Surrogate(given)


@dataclass(frozen=True)
class StandIn:
    """A surrogate that has been checked; made by `bridge.smooth`.

    Attributes:
        simulator: g.
        num_samples: M, further rows of g, in one replicate.
        weight: alpha.
    """

    simulator: Simulator
    num_samples: int
    weight: float | Literal["auto"]

    def strategy(self, fine: Strategy) -> Strategy:
        """That of the further rows: as the simulator's, but their perturbations are others.

        Common seeds of the simulator are the same ones: given the seed, the bracket still has mean zero.
        """
        leaf = max(fine.leaf_size, default_leaf_size(self.num_samples * fine.replicates))
        leaf = min(self.num_samples, leaf)
        return replace(fine, num_samples=self.num_samples, leaf_size=leaf, stream=1)


def make_stand_in(given: Surrogate, simulator: Simulator, strategy: Strategy) -> StandIn:
    """Checks at the door that a surrogate fits a simulator.

    Raises:
        InputError: other parameters or outputs, narrower bounds, or settings under which the sum makes no sense.
    """
    surrogate, R, weight = as_simulator(given.simulator), strategy.replicates, given.weight
    if not is_whole(given.samples, 1) or given.samples % R:
        raise InputError(
            f"Expected samples of the surrogate to be a multiple of replicates={R}, got {given.samples!r}."
        )
    if isinstance(weight, str) and weight != "auto":
        raise InputError(f"Expected the weight of the surrogate to be a number or 'auto', got {weight!r}.")
    if not isinstance(weight, str) and not np.isfinite(weight):
        raise InputError(f"Expected a finite weight of the surrogate, got {weight!r}.")
    if weight == "auto" and R < _LEAST_REPLICATES:
        raise InputError(
            f"Expected at least {_LEAST_REPLICATES} replicates with weight='auto' of the surrogate, which takes each "
            f"replicate's weight from the others, got {R}. Pass replicates=8, or a number as weight."
        )
    if strategy.missing == "ignore":
        raise InputError("Expected missing='raise' with a surrogate, got 'ignore': both need the same numbers.")
    if strategy.covariate.needs_outputs:
        raise InputError(
            f"Expected a covariate other than {strategy.covariate.name!r} with a surrogate: its weights depend on the "
            "outputs."
        )
    fine, coarse = simulator.space, surrogate.space
    if fine is not None and coarse is not None:
        _check_space(fine, coarse)
    if None not in (simulator.output_shape, surrogate.output_shape):
        check_shape(simulator, simulator.output_shape or (), surrogate, surrogate.output_shape or ())
    samples = int(given.samples) // R
    # What the points cannot do is refused here, as it is for the simulator's rows.
    d = 1 if fine is None else fine.dimension
    strategy.points.nodes(strategy.distribution, samples, d, np.random.default_rng(0))
    return StandIn(surrogate, samples, "auto" if isinstance(weight, str) else float(weight))


def _check_space(fine: ParameterSpace, coarse: ParameterSpace) -> None:
    if fine.names != coarse.names:
        raise InputError(
            f"Expected a surrogate of the same parameters as the simulator, {', '.join(fine.names)}, got "
            f"{', '.join(coarse.names)}."
        )
    for name, a, b in zip(fine.names, fine.parameters, coarse.parameters, strict=True):
        if coarse.outside != "ignore" and (b.lower > a.lower or b.upper < a.upper):
            raise InputError(
                f"Expected bounds of the surrogate that hold those of the simulator, [{a.lower:g}, {a.upper:g}] for "
                f"{name}, got [{b.lower:g}, {b.upper:g}]. Both are queried at the same points: widen the surrogate's."
            )


def check_shape(simulator: Simulator, fine: tuple[int, ...], surrogate: Simulator, coarse: tuple[int, ...]) -> None:
    """Refuses a surrogate whose outputs are of another shape."""
    if fine != coarse:
        raise InputError(
            f"Expected outputs of shape {fine} from the surrogate {simulator_name(surrogate)!r}, as from "
            f"{simulator_name(simulator)!r}, got {coarse}. Bring a coarse output to the fine grid: repeat or "
            "interpolate its pixels."
        )


@final
class Corrected(LinearForms):
    """T_N[f] - alpha (T_N[g] - T_M[g]).

    Attributes:
        parts: the evaluations of f at N rows, g at the same ones, g at M others. The latter two have been multiplied
            by -alpha and alpha.
        weights: (problems,) the alpha of each replicate of each vector.
        account: failures are those of f.
    """

    def __init__(
        self,
        simulator: Simulator,
        strategy: Strategy,
        execution: Execution,
        surrogate: StandIn,
        evaluate: Evaluate,
        weights: Array | None = None,
    ) -> None:
        """Evaluates all three; the cheap ones first. Collective.

        Args:
            evaluate: makes an evaluation at the parameters at hand.
            weights: (problems,) in place of the surrogate's own.
        """
        cheap = replace(execution, role="surrogate ")
        paired = evaluate(surrogate.simulator, strategy, cheap)
        if simulator.output_shape is not None:
            check_shape(simulator, simulator.output_shape, surrogate.simulator, paired.output_shape)
        others = evaluate(surrogate.simulator, surrogate.strategy(strategy), cheap)
        fine = evaluate(simulator, strategy, execution)
        check_shape(simulator, fine.output_shape, surrogate.simulator, paired.output_shape)
        if weights is None:
            if surrogate.weight == "auto":
                ratio = strategy.num_samples / surrogate.num_samples
                weights = np.concatenate([_cross_fitted(fine, paired, b, ratio) for b in range(fine.num_vectors)])
            else:
                weights = np.full(len(fine.problems), surrogate.weight)
        paired.multiply(-weights)
        others.multiply(weights)
        self.parts = (fine, paired, others)
        # Where replicates take each other's weight, ranks agree on the first one's bits.
        self.weights = others.factors
        account = replace(
            fine.account,
            num_surrogate_evaluations=paired.account.num_evaluations + others.account.num_evaluations,
            num_surrogate_failed=paired.account.num_failed + others.account.num_failed,
        )
        super().__init__(fine.strategy, fine.problems, fine.output_shape, account, fine.has_scale, fine.streamed)

    def value(self, b: int) -> torch.Tensor:
        return _sum([part.value(b) for part in self.parts])

    def replicate_values(self, b: int) -> torch.Tensor:
        return _sum([part.replicate_values(b) for part in self.parts])

    def replicate_jacobians(self, b: int) -> list[torch.Tensor]:
        return [_sum(list(J)) for J in zip(*(part.replicate_jacobians(b) for part in self.parts), strict=True)]

    def vjp(self, pairs: Sequence[tuple[int, torch.Tensor]]) -> list[tuple[Array, Array | None]]:
        results = []
        for three in zip(*(part.vjp(pairs) for part in self.parts), strict=True):
            scale = [L for _, L in three if L is not None]
            results.append((_add([x for x, _ in three]), _add(scale) if scale else None))
        return results

    def jvp(self, triples: Sequence[tuple[int, Array, Array | None]]) -> list[torch.Tensor]:
        return [_sum(list(three)) for three in zip(*(part.jvp(triples) for part in self.parts), strict=True)]

    def hvp(self, triples: Sequence[tuple[int, torch.Tensor, Array]]) -> list[Array]:
        return [_add(list(three)) for three in zip(*(part.hvp(triples) for part in self.parts), strict=True)]

    def curvature(self, triples: Sequence[tuple[int, Array, Array]]) -> list[torch.Tensor]:
        return [_sum(list(three)) for three in zip(*(part.curvature(triples) for part in self.parts), strict=True)]


def _sum(three: Sequence[torch.Tensor]) -> torch.Tensor:
    # f - g first: where the surrogate is the simulator itself, that is exactly zero.
    f, g, others = three
    try:
        return (f + g) + others
    except RuntimeError as error:
        raise OutputError(
            f"Expected outputs on one device, got {f.device} from the simulator and {g.device} from the surrogate."
        ) from error


def _add(three: Sequence[Array]) -> Array:
    f, g, others = three
    return np.asarray((f + g) + others)


def _cross_fitted(fine: Evaluated, paired: Evaluated, b: int, ratio: float) -> Array:
    """(R,) alpha of each replicate of a vector, from the other replicates' Jacobians. Collective.

    alpha_-r = sum <J_f - mean, J_g - mean> / sum |J_g - mean|^2 / (1 + N/M), over the replicates but r, all outputs and
    parameters, the latter in units of the scale (J L). That is the ratio of the variances of what is estimated,
    whatever the points: rows of a net have others than independent ones.
    """
    scale = torch.as_tensor(fine.problems[b * fine.strategy.replicates].scale.copy())

    def centred(jacobians: Sequence[torch.Tensor]) -> Array:
        rows = []
        for J in jacobians:
            wide = J.to("cpu", torch.float64)
            rows.append((wide * scale if scale.ndim == 1 else wide @ scale).reshape(-1))
        stacked = torch.stack(rows)
        return (stacked - stacked.mean(dim=0)).numpy()

    F, G = centred(fine.replicate_jacobians(b)), centred(paired.replicate_jacobians(b))
    weights = np.zeros(len(F))
    for r in range(len(F)):
        f, g = np.delete(F, r, axis=0), np.delete(G, r, axis=0)
        f, g = f - f.mean(axis=0), g - g.mean(axis=0)
        square = float(np.sum(g * g))
        if square > 0:
            weights[r] = float(np.sum(f * g)) / square / (1 + ratio)
    return weights
