"""Plain functions as simulators."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import real_array
from bridge.checks import checked_function, is_number, known_keywords
from bridge.errors import EvaluationError, InputError, OutputError
from bridge.simulator.protocol import BlockStructure, Simulator
from bridge.simulator.repeatability import Watch
from bridge.simulator.space import Outside, Parameter, ParameterSpace


def makes_memory(simulator: Simulator) -> bool:
    """Whether each call's outputs are in memory of their own."""
    return isinstance(simulator, FunctionSimulator) and not simulator.vectorized


def _function_of(simulator: Simulator) -> FunctionSimulator | None:
    """The function that does the work, behind whatever wraps it; None where something else does it."""
    while not isinstance(simulator, FunctionSimulator):
        inner = getattr(simulator, "inner", None)
        if inner is None:
            return None
        simulator = inner
    return simulator


def may_be_noisy(simulator: Simulator) -> bool:
    """Whether outputs may depend on the seed: not those of a function that is not given one."""
    function = _function_of(simulator)
    return function is None or function.seeded


def unwatched(simulator: Simulator) -> None:
    """Has nobody look at a function's first calls: another process does (see `repeatability`)."""
    if (function := _function_of(simulator)) is not None:
        function.watch.done = True


def counts_runs(simulator: Simulator) -> None:
    """Has no run of a function made once more, since every run counts (see `repeatability`)."""
    if (function := _function_of(simulator)) is not None:
        function.watch.frugal = True


# Blocks of memory for outputs that are not given back, and their bytes but for the newest.
_HELD, _HELD_BYTES = 4, 24_000_000


class _Block:
    """Memory that is free again once nothing else refers to it."""

    def __init__(self, size: int) -> None:
        self.memory: NDArray[np.uint8] = np.empty(size + 64, dtype=np.uint8)
        self.start = -self.memory.ctypes.data % 64
        self._alone = sys.getrefcount(self.memory)  # an array or a tensor in it is one more

    def has_room(self, size: int) -> bool:
        return self.memory.size >= size + 64 and sys.getrefcount(self.memory) == self._alone


class _Memory(threading.local):
    """Memory for outputs, used again once nothing refers to it: fresh pages cost more than what is written to them."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []

    def __reduce__(self) -> tuple[type[_Memory], tuple[()]]:
        return _Memory, ()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array that starts on a multiple of 64 bytes, as torch wants it (an aligned copy is saved later)."""
        if dtype.hasobject:
            return np.empty(shape, dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        free = [block for block in self._blocks if block.has_room(size)]
        if free:
            block = min(free, key=lambda block: block.memory.size)
        else:
            block = _Block(size)
            self._blocks.append(block)
            while len(self._blocks) > _HELD or sum(b.memory.size for b in self._blocks[:-1]) > _HELD_BYTES:
                del self._blocks[0]
        return block.memory[block.start : block.start + size].view(dtype).reshape(shape)


class _With:
    """A function with a last argument filled in, under its own name."""

    def __init__(self, function: Callable[..., Any], last: Any) -> None:
        self.function, self.last = function, last
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__wrapped__ = function

    @property
    def identity_parts(self) -> Any:
        return self.function  # who runs it together is no part of what it is

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, self.last)


def _advice(error: Exception) -> str:
    """What to do about a function that raised."""
    if isinstance(error, IndexError) and "too many indices" in str(error):
        return (
            "It is called with one vector, (d,). If it takes all rows at once, (k, d), declare "
            "bridge.as_simulator(f, vectorized=True)."
        )
    if isinstance(error, TypeError) and "must be Tensor, not numpy" in str(error):
        return "It is called with a numpy array: begin with theta = torch.as_tensor(theta)."
    return "Call it there by itself to see the whole traceback."


@dataclass(frozen=True)
class FunctionSimulator:
    """A plain function seen as a `Simulator`; made by `as_simulator`."""

    function: Callable[..., Any]
    space: ParameterSpace | None = None
    output_shape: tuple[int, ...] | None = None
    vectorized: bool = False
    seeded: bool = False
    structure: BlockStructure | None = None
    parallel: bool = False
    identity: str | None = None
    memory: _Memory = field(default_factory=_Memory, repr=False, compare=False)
    watch: Watch = field(default_factory=Watch, repr=False, compare=False)

    def bound(self, comm: Any) -> FunctionSimulator:
        if not self.parallel:
            raise InputError(
                f"Expected a simulator that takes a communicator, got {self.name!r}. Declare it with "
                "as_simulator(f, parallel=True); it is then called as f(theta, comm)."
            )
        return replace(self, function=_With(self.function, comm), parallel=False)

    @property
    def identity_parts(self) -> Any:
        # The same function makes something else of a number than of an array.
        ways = [way for way in ("vectorized", "seeded") if getattr(self, way)]
        return self.function, *ways

    @property
    def row_by_row(self) -> bool:
        return not self.vectorized

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any:
        if self.parallel:
            raise InputError(f"Expected on=bridge.Ranks(per_evaluation=...) for {self.name!r}, which is parallel.")
        # What several ranks run together is not run again on the word of one of them.
        if self.watch.done or isinstance(self.function, _With) or len(inputs) == 0:
            return self._outputs(inputs, seeds)
        return self.watch.over(self.name, self._outputs, inputs, seeds, seeded=self.seeded, vectorized=self.vectorized)

    def _outputs(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any:
        if self.vectorized:
            return self.function(inputs, seeds) if self.seeded else self.function(inputs)
        # Each output is copied as it comes: the function may hand out the same memory every time.
        function, seeded, source = self.function, self.seeded, f"from simulator {self.name!r}"
        stacked: NDArray[Any] | None = None
        for i, (x, seed) in enumerate(zip(inputs, seeds.tolist(), strict=True)):
            try:
                # A copy: a function that changes its argument must not change the design.
                given = function(x.copy(), seed) if seeded else function(x.copy())
            except Exception as error:
                raise EvaluationError(
                    f"Simulator {self.name!r} raised {type(error).__name__}: {error} at parameters {x.tolist()}, "
                    f"seed {seed}. {_advice(error)}"
                ) from error
            result = real_array(given, source)
            if stacked is None:
                shape, dtype = result.shape, result.dtype
                stacked = self.memory.empty((len(inputs), *shape), dtype)
            elif result.shape != shape:
                raise OutputError(
                    f"Expected outputs of one shape from {self.name!r}, got {shape} and {result.shape}. "
                    "Pad or interpolate the output to a fixed shape."
                )
            elif result.dtype != dtype:
                stacked = stacked.astype(np.result_type(stacked, result), copy=False)
                dtype = stacked.dtype
            stacked[i] = result
        return np.empty(0) if stacked is None else stacked


@known_keywords
def as_simulator(
    function: Callable[..., Any] | Simulator,
    *,
    names: Sequence[str] | None = None,
    units: Sequence[str] | Mapping[str, str] | None = None,
    bounds: Bounds | None = None,
    natural_scale: Sequence[float] | Mapping[str, float] | None = None,
    output_shape: tuple[int, ...] | None = None,
    outside: Outside = "clip",
    vectorized: bool = False,
    seeded: bool = False,
    structure: BlockStructure | None = None,
    parallel: bool = False,
    identity: str | None = None,
    repeatable: bool = False,
) -> Simulator:
    """Wraps a function as a simulator.

    Args:
        function: `f(theta)` with theta (d,) float64 -> array of any fixed shape; with `vectorized=True`,
            `f(inputs)` with inputs (k, d) -> (k, *output_shape); with `seeded=True` a further argument, the seed
            (int) or seeds (k,). A `Simulator` is returned unchanged when nothing else is given.
        names: one a parameter; p0, p1, ... where only units, bounds or scales are given, and not by name.
        units: unit of each parameter. Like bounds and natural scales: one a parameter, or name -> unit of some.
        bounds: (lower, upper) of each parameter; None (or -inf, inf) where there is no bound.
        natural_scale: of each parameter, see `Parameter`.
        output_shape: shape of one output; learned from the first call when left out.
        outside: "clip", "raise" or "ignore", see `ParameterSpace`.
        structure: which outputs each parameter touches, where that is known.
        repeatable: f is known to give the same again, so that its first row is not run once more to see whether it does
            (see `bridge.simulator.repeatability`).
        parallel: the function is an MPI program itself: its last argument is the communicator (mpi4py) of the ranks
            that call it together, see `bridge.Ranks(per_evaluation=...)`; the first rank's result counts.
        identity: a text under which evaluations are filed; change it whenever outputs do. Needed where what the
            function uses cannot be seen (an open file, a connection), see docs/reuse.md.

    Returns:
        a `Simulator`.

    Raises:
        InputError: not callable, a function of other arguments, or lists of different lengths.
    """
    described = {"names": names, "units": units, "bounds": bounds, "natural_scale": natural_scale}
    given = {key: value for key, value in described.items() if value is not None}
    if isinstance(function, Simulator):
        others = output_shape, structure, identity
        if given or vectorized or seeded or parallel or any(other is not None for other in others):
            raise InputError(
                f"{type(function).__name__} is a Simulator already and describes itself; call as_simulator on a "
                "plain function, or drop the other arguments."
            )
        return function
    if not callable(function):
        hint = ""
        if isinstance(function, str):
            file, _, name = function.partition(".py:")
            hint = f" bridge.make({function!r}, ...) makes the one of that name."
            hint = f" Give the function itself: from {file.replace('/', '.')} import {name}." if name else hint
        raise InputError(f"Expected a function or a Simulator, got {type(function).__name__}.{hint}")
    if inspect.isclass(function):
        raise InputError(f"Expected a function or a Simulator, got the class {function.__name__}. Make an instance.")
    if identity is not None and not (isinstance(identity, str) and identity):
        raise InputError(f"Expected identity as a text that is not empty, got {identity!r}.")
    arguments = ("inputs" if vectorized else "theta", *(("seed",) * seeded), *(("comm",) * parallel))
    checked_function(function, arguments, {"seeded": seeded})
    space = ParameterSpace(_parameters(given), outside=outside) if given else None
    return FunctionSimulator(
        function, space, output_shape, vectorized, seeded, structure, parallel, identity, watch=Watch(done=repeatable)
    )


Pair = tuple[float | None, float | None] | None
Bounds = Sequence[Pair] | Mapping[str, Pair]


def _parameters(given: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """From the lists and mappings of `as_simulator`, of which there is at least one."""
    lists = {key: value for key, value in given.items() if not isinstance(value, Mapping)}
    for key, value in lists.items():
        if isinstance(value, str):
            apart = [part.strip() for part in value.split(",")]
            raise InputError(f"Expected a list of {key}, one a parameter, got the text {value!r}. Give {key}={apart}.")
        if is_number(value) or not hasattr(value, "__len__"):
            raise InputError(f"Expected a list of {key}, one a parameter, got {value!r}. Give {key}=[{value!r}, ...].")
    if isinstance(given.get("names"), Mapping):
        raise InputError(f"Expected names as a list, got {given['names']!r}. Give names={list(given['names'])}.")
    pairs = lists.get("bounds")
    if pairs is not None and len(pairs) and all(is_number(x) for x in pairs):
        raise InputError(
            f"Expected bounds as one (lower, upper) a parameter, got {pairs!r}. For the same bounds everywhere give "
            f"bounds=[{tuple(pairs)!r}, ...], as often as there are parameters."
        )
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"Expected lists of one length (one entry a parameter), got {lengths}.")
    keys = list(dict.fromkeys(name for value in given.values() if isinstance(value, Mapping) for name in value))
    names = lists.get("names")
    if names is None:
        names = keys or [f"p{i}" for i in range(next(iter(lengths.values())))]
        if lengths and len(names) != next(iter(lengths.values())):
            raise InputError(f"Expected lists of {len(names)} entries, for {', '.join(names)}, got {lengths}.")
    plain = ParameterSpace(tuple(Parameter(name) for name in names))
    of: dict[str, list[Any]] = {}
    for key, nothing in (("units", ""), ("bounds", None), ("natural_scale", None)):
        value = given.get(key)
        if isinstance(value, Mapping):
            for name in value:
                plain.index(name)
            value = [value.get(name, nothing) for name in plain.names]
        of[key] = [nothing] * plain.dimension if value is None else list(value)
    parameters = []
    for name, unit, pair, scale in zip(plain.names, of["units"], of["bounds"], of["natural_scale"], strict=True):
        parameter = Parameter(name, unit, *_bound(name, pair))
        if scale is not None:
            if not is_number(scale):
                raise InputError(f"Expected a number as natural_scale of parameter {name!r}, got {scale!r}.")
            parameter = replace(parameter, natural_scale=float(scale))
        parameters.append(parameter)
    return tuple(parameters)


def _bound(name: str, pair: Any) -> tuple[float, float]:
    """(lower, upper), infinite where there is None."""
    if pair is None:
        return -np.inf, np.inf
    entries = list(pair) if hasattr(pair, "__len__") and not isinstance(pair, str) else []
    if len(entries) != 2 or not all(x is None or is_number(x) for x in entries):
        raise InputError(
            f"Expected (lower, upper) as bounds of parameter {name!r}, numbers or None, got {pair!r}. Give (0, None) "
            "for a lower bound alone."
        )
    lower, upper = entries
    return -np.inf if lower is None else float(lower), np.inf if upper is None else float(upper)
