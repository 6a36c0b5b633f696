"""What a simulator is: a black box from parameters to an array, and the space its parameters live in.

Shape words used everywhere: `d` parameters, `k` rows of one call, `m` numbers in one output.
This module needs numpy alone, so that adapters can be imported where torch is not installed.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import real_array
from bridge.checks import checked_function, did_you_mean, is_number, known_keywords
from bridge.errors import EvaluationError, InputError, OutputError
from bridge.simulator.repeatability import Watch

Kind = Literal["continuous", "staircase", "integer"]
Outside = Literal["clip", "raise", "ignore"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a simulator.

    Args:
        name: identifier; by convention it ends with its unit (`defocus_um`).
        unit: unit as text, "" where there is none.
        lower, upper: the closed domain in which the simulator may be queried.
        natural_scale: a change of this size matters to the simulator [the parameter's unit]. A plain number given
            as the smoothing scale is in these units, so that 300 kV may stand beside 1 A. None where nothing is said:
            a smoothing then takes 1, and `bridge.fit` goes by the bounds, the start and what the first runs show.
        kind: "continuous", "staircase" (constant between steps) or "integer".
        description: one line for `bridge info`.
    """

    name: str
    unit: str = ""
    lower: float = -np.inf
    upper: float = np.inf
    natural_scale: float | None = None
    kind: Kind = "continuous"
    description: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"Expected a parameter name, got {self.name!r}. Names are text: {str(self.name)!r}.")
        if not self.name:
            raise InputError("Expected a parameter name, got an empty string. Give every parameter a name.")
        if not self.lower < self.upper:
            raise InputError(
                f"Expected lower < upper for parameter {self.name!r}, got [{self.lower}, {self.upper}]. "
                "Exchange or widen the bounds."
            )
        if self.natural_scale is not None and not (np.isfinite(self.natural_scale) and self.natural_scale > 0):
            raise InputError(
                f"Expected a positive, finite natural_scale for parameter {self.name!r}, got {self.natural_scale}."
            )
        if self.kind not in ("continuous", "staircase", "integer"):
            raise InputError(
                f"Unknown kind {self.kind!r} of parameter {self.name!r}. Known: continuous, staircase, integer."
            )


@dataclass(frozen=True)
class ParameterSpace:
    """The parameters of a simulator, in the order of its input columns.

    Args:
        parameters: one `Parameter` a column.
        outside: what becomes of a query outside the bounds: "clip" it to the nearest point of the domain (scores
            still use the unclipped perturbation; the fraction is reported), "raise" an `InputError`, or "ignore"
            (the simulator copes by itself).
    """

    parameters: tuple[Parameter, ...]
    outside: Outside = "clip"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        if not self.parameters:
            raise InputError("Expected at least one parameter, got none. Declare what the simulator varies.")
        names = [p.name for p in self.parameters]
        twice = sorted(n for n, count in Counter(names).items() if count > 1)
        if twice:
            raise InputError(f"Expected distinct parameter names, got {twice} more than once. Rename them.")
        if self.outside not in ("clip", "raise", "ignore"):
            raise InputError(f"Unknown outside={self.outside!r}. Known: clip, raise, ignore.")

    @classmethod
    def unnamed(cls, dimension: int) -> ParameterSpace:
        """A space of `dimension` unbounded parameters p0, p1, ... for a plain function."""
        return cls(tuple(Parameter(f"p{i}") for i in range(dimension)))

    @property
    def dimension(self) -> int:
        return len(self.parameters)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    @property
    def lower(self) -> NDArray[np.float64]:
        return np.array([p.lower for p in self.parameters], dtype=np.float64)

    @property
    def upper(self) -> NDArray[np.float64]:
        return np.array([p.upper for p in self.parameters], dtype=np.float64)

    @property
    def natural_scale(self) -> NDArray[np.float64]:
        """(d,), 1 where nothing is said."""
        return np.array([p.natural_scale or 1.0 for p in self.parameters], dtype=np.float64)

    @property
    def bounded(self) -> bool:
        return bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any())

    def index(self, name: str) -> int:
        """Column of the parameter called `name`; an unknown name lists the known ones."""
        if name not in self.names:
            meant = did_you_mean(str(name), self.names)
            raise InputError(f"Unknown parameter {name!r}. Known parameters: {', '.join(self.names)}.{meant}")
        return self.names.index(name)

    def vector(self, values: Mapping[str, float] | ArrayLike) -> NDArray[np.float64]:
        """A (d,) float64 vector from a name -> value mapping (all names, no others) or from an array-like."""
        if isinstance(values, Mapping):
            for name in values:
                self.index(name)
            missing = [n for n in self.names if n not in values]
            if missing:
                raise InputError(f"Expected a value for each parameter, got none for {', '.join(missing)}.")
            for n in self.names:
                if not is_number(values[n]):
                    raise InputError(f"Expected a number for parameter {n!r}, got {values[n]!r}.")
            return np.array([float(values[n]) for n in self.names], dtype=np.float64)
        try:
            vector = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"Expected {self.dimension} numbers ({', '.join(self.names)}), got {values!r}.") from error
        if vector.shape != (self.dimension,):
            raise InputError(
                f"Expected {self.dimension} values ({', '.join(self.names)}), got an array of shape {vector.shape}."
            )
        return vector

    def mapping(self, vector: ArrayLike) -> dict[str, float]:
        """The inverse of `vector`."""
        return {n: float(v) for n, v in zip(self.names, self.vector(vector), strict=True)}

    def describe_outside(self, vector: ArrayLike) -> str:
        """Which entries of a (d,) vector lie outside their bounds, in words; "" when none does."""
        parts = []
        for p, value in zip(self.parameters, self.vector(vector), strict=True):
            if not p.lower <= value <= p.upper:
                unit = f" {p.unit}" if p.unit else ""
                parts.append(f"{p.name} = {value:g}{unit} outside [{p.lower:g}, {p.upper:g}]")
        return "; ".join(parts)

    def checked(self, inputs: ArrayLike, seeds: ArrayLike) -> tuple[NDArray[np.float64], NDArray[Any]]:
        """What a simulator was called with, at its door.

        Args:
            inputs: (k, d).
            seeds: (k,).

        Returns:
            inputs as float64, and seeds, as arrays.

        Raises:
            InputError: wrong shape, not a number, or outside the bounds.
        """
        inputs, seeds = np.asarray(inputs, dtype=np.float64), np.asarray(seeds)
        d = self.dimension
        if inputs.ndim != 2 or inputs.shape[1] != d or seeds.shape != (len(inputs),):
            raise InputError(
                f"Expected inputs of shape (k, {d}) ({', '.join(self.names)}) and seeds of shape (k,), got "
                f"{inputs.shape} and {seeds.shape}."
            )
        inside = ((inputs >= self.lower) & (inputs <= self.upper)).all(axis=1)  # not where there is NaN
        if not inside.all():
            what = self.describe_outside(inputs[int(np.argmin(inside))]) or "not a number"
            raise InputError(f"Expected parameters inside the bounds, got {what}. Clip them, or widen bounds.")
        return inputs, seeds

    def admit(self, inputs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Brings queries into the domain as `outside` says.

        Args:
            inputs: (k, d) queries.

        Returns:
            the queries to evaluate, (k, d), and which rows were changed, (k,) bool.

        Raises:
            InputError: a query lies outside and `outside="raise"`.
        """
        if self.outside == "ignore" or not self.bounded:
            return inputs, np.zeros(len(inputs), dtype=bool)
        clipped = np.clip(inputs, self.lower, self.upper)
        changed = (clipped != inputs).any(axis=1)
        if self.outside == "raise" and changed.any():
            row = int(np.flatnonzero(changed)[0])
            raise InputError(
                f"Expected queries inside the bounds, got {self.describe_outside(inputs[row])}. Use a smaller scale, "
                'a density of compact support (distribution="triangular"), or outside="clip".'
            )
        return clipped, changed


@runtime_checkable
class Simulator(Protocol):
    """All that an outside author must satisfy (structural: no inheritance needed).

    Attributes:
        space: names, units and bounds of the d inputs; None where any number of inputs is taken.
        output_shape: shape of one output; None where it is only known after the first call.

    `__call__(inputs, seeds)` maps (k, d) float64 C-contiguous inputs and (k,) uint64 seeds to an array of shape
    (k, *output_shape). Row i of the result depends on `inputs[i]` and `seeds[i]` alone.
    """

    @property
    def space(self) -> ParameterSpace | None: ...

    @property
    def output_shape(self) -> tuple[int, ...] | None: ...

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any: ...


@runtime_checkable
class IdentityParts(Protocol):
    """Something that says of which values its outputs are made; its other attributes are no part of its identity.

    Values are gone through as attributes are; a `Path` stands for the content of that file or folder.
    """

    @property
    def identity_parts(self) -> Any: ...


class BlockStructure:
    """Which outputs each parameter touches: the other derivatives are exactly zero, and their noise is not paid for.

    The images of a tilt series that have shifts of their own are one example, independent problems in one call
    another. The variance of a VJP falls by about the number of blocks.

    Args:
        parameter_block: (d,) the block of each parameter, 0, 1, ...; -1 touches every output.
        output_block: the block of each output: an array of the output's shape, or of its first axis alone; -1 is
            touched by every parameter.
    """

    def __init__(self, parameter_block: ArrayLike, output_block: ArrayLike) -> None:
        self.parameter_block = np.asarray(parameter_block)
        self._output_block = np.asarray(output_block)
        for what, blocks in (("parameter_block", self.parameter_block), ("output_block", self._output_block)):
            if blocks.dtype.kind not in "iu" or blocks.size == 0 or blocks.min() < -1:
                raise InputError(f"Expected {what} to be integers from -1 up, got {blocks.tolist()}.")
        if self.parameter_block.ndim != 1:
            raise InputError(f"Expected one block a parameter, got shape {self.parameter_block.shape}.")

    def __repr__(self) -> str:
        return (
            f"BlockStructure({len(np.unique(self.parameter_block))} blocks of {len(self.parameter_block)} parameters)"
        )

    def _blocks(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        blocks = self._output_block
        if blocks.shape != shape and shape[:1] == blocks.shape:
            blocks = np.broadcast_to(blocks.reshape((-1,) + (1,) * (len(shape) - 1)), shape)
        if blocks.shape != shape:
            raise InputError(
                f"Expected output_block of shape {shape} or {shape[:1]}, as outputs have, got {blocks.shape}."
            )
        return blocks.reshape(-1).astype(np.int64)

    def outputs(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """(m,) block of each output, counted from 0 (0 is what every parameter touches)."""
        return self._blocks(shape) + 1

    def touched(self, blocks: int) -> NDArray[np.bool_]:
        """(blocks, d): whether parameter j touches block g of `outputs`."""
        g = np.arange(blocks)[:, None] - 1
        own = self.parameter_block[None, :]
        return np.asarray((g == -1) | (own == -1) | (g == own))

    def of_parameters(self, parameter_block: ArrayLike) -> BlockStructure:
        """The same blocks of outputs, for other parameters."""
        return BlockStructure(parameter_block, self._output_block)

    def seen(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, blocks) sums over each block to (n, d): the sum over what each parameter touches."""
        touched = self.touched(sums.shape[1])
        return np.stack([(sums * touched[:, j]).sum(axis=1) for j in range(touched.shape[1])], axis=1)

    def mask(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """(d, m): whether parameter j touches output o."""
        block = self.outputs(shape)
        return self.touched(int(block.max()) + 1)[block].T


@runtime_checkable
class Structured(Protocol):
    """A simulator that knows which outputs each parameter touches."""

    @property
    def structure(self) -> BlockStructure | None: ...


@runtime_checkable
class RowByRow(Protocol):
    """A simulator that says whether it computes its rows one by one: then any grouping of rows gives the same bits."""

    @property
    def row_by_row(self) -> bool: ...


def computes_row_by_row(simulator: Simulator) -> bool:
    """Whether rows may be grouped at will; a simulator that does not say so might compute with all rows of a call."""
    return isinstance(simulator, RowByRow) and simulator.row_by_row


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


@runtime_checkable
class Parallel(Protocol):
    """A simulator that is itself parallel: `bound(comm)` is the same one, run by the ranks of a communicator."""

    def bound(self, comm: Any) -> Simulator: ...


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
            raise InputError(f"Expected smooth(..., ranks_per_evaluation=...) for {self.name!r}, which is parallel.")
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
            that call it together, see `ranks_per_evaluation` of `bridge.smooth`; the first rank's result counts.
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
        hint = f" bridge.make({function!r}, ...) makes the one of that name." if isinstance(function, str) else ""
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


def simulator_name(simulator: Simulator) -> str:
    """A name for messages: that of the wrapped function or simulator, else the class's."""
    name = getattr(simulator, "name", None)
    return name if isinstance(name, str) else type(simulator).__name__


@runtime_checkable
class FileFormat(Protocol):
    """What a simulator may know besides: the files in which its outputs live (`bridge fit` uses it)."""

    output_suffix: str

    def read_output(self, path: str) -> NDArray[Any]: ...

    def write_output(self, path: str, output: NDArray[Any]) -> None: ...
