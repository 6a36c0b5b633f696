"""First mistakes, each told in a sentence: a keyword that is nearly right, a value of another kind."""

from __future__ import annotations

import difflib
import inspect
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from bridge.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")

# What others call it: those of our words that may be meant, in the order in which they are looked for.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "iterations",
            "n_steps",
            "num_steps",
            "nsteps",
            "n_iter",
            "niter",
            "num_iterations",
            "max_iter",
            "maxiter",
            "max_iterations",
            "max_steps",
            "epochs",
        ),
        ("steps",),
    ),
    **dict.fromkeys(("lr", "rate", "step_size"), ("learning_rate",)),
    **dict.fromkeys(("n_samples", "samples", "nsamples", "n", "batch_size", "population", "popsize"), ("num_samples",)),
    **dict.fromkeys(
        ("max_evals", "max_evaluations", "maxfun", "maxfev", "n_calls", "num_runs", "runs"), ("max_runs", "budget")
    ),
    **dict.fromkeys(("budget",), ("max_runs",)),
    **dict.fromkeys(("sigma", "std", "noise", "stddev"), ("variance", "scale")),
    **dict.fromkeys(("epsilon", "eps", "smoothing", "width"), ("scale",)),
    **dict.fromkeys(("x0", "theta", "theta0", "initial", "init", "guess"), ("start",)),
    **dict.fromkeys(("data", "observed", "y", "observation"), ("target",)),
    **dict.fromkeys(("tol", "ftol", "xtol", "rtol", "atol"), ("tolerance",)),
    "steps": ("rounds",),
    "num_samples": ("round_size",),
    **dict.fromkeys(("n_workers", "num_workers", "processes", "n_jobs", "jobs", "pool", "threads"), ("workers",)),
    **dict.fromkeys(("callback", "on_iteration"), ("on_step",)),
    **dict.fromkeys(("checkpoint", "checkpoints"), ("resume",)),
    **dict.fromkeys(("target_error", "accuracy", "precision"), ("error",)),
    **dict.fromkeys(("min_ok", "min_success"), ("at_least",)),
    **dict.fromkeys(("starts", "n_starts", "multistart"), ("num_starts",)),
    **dict.fromkeys(("coarse", "low_fidelity"), ("surrogate",)),
    **dict.fromkeys(("reps", "repeats"), ("replicates",)),
    **dict.fromkeys(("verbose", "verbosity", "quiet"), ("progress",)),
    **dict.fromkeys(("output", "out", "folder", "path", "run", "dir"), ("directory",)),
    **dict.fromkeys(("timeout", "time_limit"), ("timeout_s", "max_seconds")),
    **dict.fromkeys(("random_state", "rng", "random_seed"), ("seed",)),
    **dict.fromkeys(("freeze", "frozen", "constant"), ("fixed",)),
    **dict.fromkeys(("algorithm", "solver"), ("method",)),
    **dict.fromkeys(("lower", "upper", "limits", "ranges"), ("bounds",)),
    **dict.fromkeys(("parameter_names", "params", "parameters"), ("names",)),
    **dict.fromkeys(("batched", "vectorised", "vectorize"), ("vectorized",)),
}
_PLACES = {
    "workers": "on=bridge.Workers(8), or on=8",
    **dict.fromkeys(("timeout_s", "own_directory"), "on=bridge.Workers(8, {}=...), or on=bridge.Isolated({}=...)"),
    "isolate": 'on="process"',
    "ranks": "on=bridge.Ranks(...), and start the program by mpirun",
    "executor": "on=executor",
    **dict.fromkeys(("comm", "schedule", "leaf_size", "step_limit_s"), "on=bridge.Ranks({}=...)"),
    "ranks_per_evaluation": "on=bridge.Ranks(per_evaluation=...)",
    "store": "memory=bridge.Store(...), or memory=bridge.Memory(store=...)",
    **dict.fromkeys(("keep_mb", "rank_mb"), "memory=bridge.Memory({}=...)"),
    **dict.fromkeys(("retries", "missing"), "failures=bridge.Raise({}=...), or failures=bridge.Drop({}=...)"),
    "at_least": "failures=bridge.Drop(at_least=...)",
    "penalty": "failures=bridge.Penalty(...)",
}
# Settings that live on an object, by the function that takes it: how they are written.
_HOMES: dict[str, dict[str, str]] = {
    "bridge.smooth": {
        **_PLACES,
        "antithetic": 'points="antithetic"',
        "steps": "the step at each call, smoothed(theta, step=...)",
        "forward": "bridge.smooth(...).straight_through()",
        "loss": "bridge.smooth_loss(simulator, loss, ...)",
    },
    "bridge.fit": {
        **_PLACES,
        **dict.fromkeys(("steps", "num_samples"), "method=bridge.Adam({}=...), or another method"),
        **dict.fromkeys(("rounds", "round_size", "restarts", "reuse"), "method=bridge.Kriging({}=...)"),
        **dict.fromkeys(("scale", "tolerance"), "method=bridge.Kriging({}=...), or another method"),
        **dict.fromkeys(
            ("learning_rate", "halving", "blur", "points", "distribution", "covariate", "replicates", "surrogate"),
            "method=bridge.Adam({}=...), or another descent",
        ),
        "optimiser": "method=bridge.Torch(optimiser=...)",
        "full_scale": "method=bridge.Natural(full_scale=...)",
        **dict.fromkeys(("mask", "whiten", "robust"), "misfit=bridge.LeastSquares({}=...)"),
        "loss": "misfit=loss, a function of output and target",
        "max_runs": "stop=bridge.Stop(runs=...)",
        "max_seconds": "stop=bridge.Stop(seconds=...)",
        "error": "stop=bridge.Stop(error=...)",
        "title": "run=bridge.Run(directory, title=...)",
        "antithetic": 'method=bridge.Adam(points="antithetic"), or another descent',
        **dict.fromkeys(("directory", "resume", "overwrite", "every_s"), "run=bridge.Run(directory, ...)"),
        **dict.fromkeys(("progress", "on_step"), "watch=, which takes words, observers and functions"),
        "num_starts": "start=bridge.Starts(number, given)",
    },
}
_OF_SEEDS = ("seed", "seeds", "rng", "random_state", "key")
# What a simulator says of itself, and not who calls it.
_OF_SIMULATORS = ("names", "units", "bounds", "natural_scale", "output_shape", "vectorized", "seeded", "structure")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is meant, or nothing."""
    known = list(known)
    for other in (word, word.replace("-", "_"), word.replace("_", "-")):
        if other.lower() in (k.lower() for k in known):
            return next(k for k in known if k.lower() == other.lower())
    for other in _SYNONYMS.get(word.lower(), ()):
        if other in known:
            return other
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'steps'?", or nothing where no known word is near."""
    meant = nearest(word, known)
    square = ", its square" if meant == "variance" and word in _SYNONYMS else ""
    return f" Did you mean {meant!r}{square}?" if meant and meant != word else ""


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str], takes_simulator: bool = True) -> None:
    """Raises InputError for the first keyword of `what` that is not known; it says which is meant.

    Args:
        takes_simulator: whether a word may be one that its simulator says of itself.
    """
    known, homes = list(known), _HOMES.get(what.replace("smooth_loss", "smooth"), {})
    for word in given:
        if word in known:
            continue
        if word not in _OF_SIMULATORS and (home := nearest(word, [*known, *homes])) in homes:
            raise InputError(f"Unknown argument {word!r} of {what}. Give {homes[home].replace('{}', home)}.")
        meant, of_simulator = did_you_mean(word, known), nearest(word, _OF_SIMULATORS)
        if takes_simulator and (of_simulator == word or (of_simulator and not meant)):
            raise InputError(
                f"Unknown argument {word!r} of {what}. The simulator says it: give "
                f"bridge.as_simulator(f, {of_simulator}=...) in place of f."
            )
        if meant:
            raise InputError(f"Unknown argument {word!r} of {what}.{meant}")
        raise InputError(f"Unknown argument {word!r} of {what}. Known: {', '.join(known)}.")


def known_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: an unknown keyword is an `InputError` that names the near one, in place of a bare TypeError."""
    known = list(inspect.signature(function).parameters)
    what = f"bridge.{function.__name__}"

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        refuse_unknown(what, kwargs, known)
        return function(*args, **kwargs)

    return inner


class Settings(ABCMeta):
    """The metaclass of objects with settings: a call that is nearly right is told what is meant."""

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        signature, name = inspect.signature(cls.__init__), cls.__name__
        known = list(signature.parameters)[1:]
        if not any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values()):
            refuse_unknown(name, kwargs, known, takes_simulator=False)
        try:
            signature.bind(None, *args, **kwargs)
        except TypeError as error:
            listed = ", ".join(known) or "none"
            raise InputError(f"Expected the settings of {name} ({listed}), got another call: {error}.") from error
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @property
    def __signature__(cls) -> inspect.Signature:
        """What `help` and editors show, in place of that of the call above."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least so much; text and booleans are none."""
    try:
        return not isinstance(value, bool | str) and int(value) == value and value >= least
    except (TypeError, ValueError, OverflowError):
        return False


def as_whole(value: Any) -> Any:
    """A number such as 100.0 or 1e2 as an int; anything else as it is, for others to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def can_be_called_with(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes so many arguments by position, as far as it can be known."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # written in C
        return True
    return True


def is_number(value: Any) -> bool:
    """Whether a value can be taken for one real number; text and booleans cannot."""
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool | str)


def checked_function(function: Callable[..., Any], given: tuple[str, ...], declared: Mapping[str, bool]) -> None:
    """Refuses a function that cannot be called with as many arguments as it will be, and says what to do.

    Args:
        given: what it will be called with: theta, seed, comm.
        declared: the settings of `as_simulator` that say so.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*given)
    except TypeError:
        pass
    else:
        return
    name = getattr(function, "__name__", type(function).__name__)
    empty, positional = inspect.Parameter.empty, (0, 1)  # POSITIONAL_ONLY, POSITIONAL_OR_KEYWORD
    needed = [p.name for p in signature.parameters.values() if p.kind in positional and p.default is empty]
    shown = f"{name}{signature}"
    expected = f"Expected a function f({', '.join(given)}), got {shown}."
    if not declared["seeded"] and len(needed) == 2 and needed[1].lower() in _OF_SEEDS:
        raise InputError(
            f"{expected} If {needed[1]!r} is the seed of its noise, declare it: "
            f"bridge.as_simulator({name}, seeded=True)."
        )
    if declared["seeded"] and len(needed) == len(given) - 1:
        raise InputError(
            f"{expected} With seeded=True it is called with its seed as well: add an argument, def "
            f"{name}({', '.join([*needed, 'seed'])}), or leave seeded=True out."
        )
    if len(needed) > len(given):
        theta, more = given[0], needed[: len(needed) - len(given) + 1]
        lost = ", ".join(["*" + theta, *given[1:]])
        raise InputError(
            f"{expected} All parameters come as one array: unpack it, {', '.join(more)} = {theta}, or give "
            f"lambda {', '.join(given)}: {name}({lost})."
        )
    raise InputError(f"{expected} Give it these arguments, in this order.")
