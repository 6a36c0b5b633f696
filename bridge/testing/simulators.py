"""What is asked of a simulator."""

from __future__ import annotations

from typing import ClassVar

import cloudpickle
import numpy as np
from numpy.typing import ArrayLike

from bridge.errors import InputError
from bridge.simulator.identity import identity_of
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.testing.examination import Finding, examine


class SimulatorContract:
    """The contract of `bridge.Simulator`, for a test class that names one.

        class TestMine(bridge.testing.SimulatorContract):
            made = Mine()
            inputs = [[0.1, 2.0], [0.3, 1.0], [0.2, 1.5]]

    Attributes:
        made: the simulator. inputs: (k, d), k >= 2, inside its bounds.
        others: simulators that give other outputs somewhere, so that their identities must be others.
        elsewhere: whether it is run in another process as well.
    """

    made: ClassVar[Simulator]
    inputs: ClassVar[ArrayLike]
    others: ClassVar[tuple[Simulator, ...]] = ()
    elsewhere: ClassVar[bool] = True

    def test_rows_are_outputs_of_their_own(self) -> None:
        check_simulator(self.made, self.inputs)

    def test_outputs_are_a_function_of_parameters_and_seed(self) -> None:
        bad = [f"{finding.what}: {finding.words}" for finding in self._found() if finding.good is False]
        assert not bad, bad

    def _found(self) -> list[Finding]:
        return examine(self.made, np.asarray(self.inputs, dtype=np.float64)[0], elsewhere=self.elsewhere)

    def test_a_single_row_has_the_declared_shape(self) -> None:
        x = np.array(self.inputs, dtype=np.float64)
        (one,) = np.asarray(self.made(x[:1], np.zeros(1, dtype=np.uint64)))
        shape = self.made.output_shape
        assert shape is None or one.shape == tuple(shape), f"declares {shape}, got {one.shape}"

    def test_its_space_holds_the_inputs(self) -> None:
        space, x = self.made.space, np.array(self.inputs, dtype=np.float64)
        if space is not None:
            assert space.dimension == x.shape[1]
            assert ((x >= space.lower) & (x <= space.upper)).all(), "inputs lie outside the bounds"

    def test_its_identity_is_the_same_after_calls_and_on_the_way_to_another_process(self) -> None:
        before, x = identity_of(self.made), np.array(self.inputs, dtype=np.float64)
        copy: Simulator = cloudpickle.loads(cloudpickle.dumps(self.made))
        assert identity_of(copy) == before, "a copy by cloudpickle has another identity"
        seeds = np.arange(len(x), dtype=np.uint64)
        here, there = np.asarray(self.made(x, seeds)), np.asarray(copy(x.copy(), seeds.copy()))
        assert np.array_equal(here, there), "a copy by cloudpickle gives other outputs"
        assert identity_of(self.made) == before, "calls have changed its identity: it keeps something between them"

    def test_others_have_other_identities(self) -> None:
        names = [identity_of(one) for one in (self.made, *self.others)]
        assert len(set(names)) == len(names), f"different simulators are filed under one name: {names}"


def check_simulator(simulator: Simulator, inputs: ArrayLike, seeds: ArrayLike | None = None) -> None:
    """The contract of `bridge.Simulator`: shapes, finite numbers, rows independent of each other, arguments untouched.

    Args:
        simulator: to be checked.
        inputs: (k, d), k >= 2, inside the simulator's bounds.
        seeds: (k,); 0, 1, ... when left out.
    """
    x = np.array(inputs, dtype=np.float64, order="C")
    s = np.arange(len(x), dtype=np.uint64) if seeds is None else np.asarray(seeds, dtype=np.uint64)
    name = simulator_name(simulator)
    if len(x) < 2:
        raise InputError(f"Expected at least two rows to compare, got {len(x)}.")
    given = x.copy()
    together = np.asarray(simulator(given, s.copy()))
    assert (given == x).all(), f"{name} changed its inputs"
    assert len(together) == len(x), f"{name} returned {len(together)} outputs for {len(x)} rows"
    if simulator.output_shape is not None:
        assert together.shape[1:] == simulator.output_shape, (
            f"{name} declares output_shape={simulator.output_shape} and returned {together.shape[1:]}"
        )
    assert np.isfinite(together).all(), f"{name} returned NaN or infinity"
    for i in range(len(x)):
        alone = np.asarray(simulator(x[i : i + 1].copy(), s[i : i + 1].copy()))[0]
        assert np.array_equal(alone, together[i]), f"{name}: row {i} depends on the rows beside it"
