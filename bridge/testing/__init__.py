"""Contracts for what people add, each a suite to inherit in tests of their own; ground truth; what `bridge check` does.

    class TestEpanechnikov(bridge.testing.DistributionContract):
        made = Epanechnikov()

pytest collects the inherited tests. Each of them holds for all of ours (`tests/contracts/`). One file a kind.
"""

from bridge.testing.common import Contract as Contract
from bridge.testing.covariates import CovariateContract as CovariateContract
from bridge.testing.distributions import DistributionContract as DistributionContract
from bridge.testing.examination import Finding as Finding
from bridge.testing.examination import examine as examine
from bridge.testing.executors import ExecutorContract as ExecutorContract
from bridge.testing.methods import MethodContract as MethodContract
from bridge.testing.observers import ObserverContract as ObserverContract
from bridge.testing.points import PointSetContract as PointSetContract
from bridge.testing.robust_losses import RobustLossContract as RobustLossContract
from bridge.testing.simulators import SimulatorContract as SimulatorContract
from bridge.testing.simulators import check_simulator as check_simulator
from bridge.testing.truth import Quadrature as Quadrature
from bridge.testing.truth import assert_mean as assert_mean
from bridge.testing.truth import mean_differs as mean_differs
