"""The errors of the package: what was expected, what came, what to do.

Every error that a user can cause derives from `BridgeError`, so that one `except` catches them all, and from the
built-in exception that it specialises, so that code which knows nothing of this package handles it as well.
"""

from __future__ import annotations


class BridgeError(Exception):
    """Base of every error raised on purpose by bridge, its simulators and its adapters."""


class SetupError(BridgeError, RuntimeError):
    """The machine or the installation lacks something: a launcher, a library, an optional package."""


class InputError(BridgeError, ValueError):
    """An argument, a file or a setting is not what was expected; nothing has been evaluated."""


class EvaluationError(BridgeError, RuntimeError):
    """An evaluation of a simulator failed: it raised, ended abnormally, or gave non-finite numbers."""


class NonFiniteError(EvaluationError):
    """A simulator gave NaN, infinity, or numbers too large to be squared."""


class OutputError(EvaluationError):
    """An evaluation ended, but its output is missing, unreadable or of the wrong shape."""


class EvaluationTimeoutError(EvaluationError, TimeoutError):
    """An evaluation took longer than its profile allows."""


class CollectiveError(BridgeError, RuntimeError):
    """Ranks called bridge in different orders or with different arguments."""


class StoppedError(BridgeError):
    """A signal has asked the run to stop: what is finished is saved, and the run can be resumed."""


EXIT_CODES: tuple[tuple[type[BridgeError], int], ...] = (
    (StoppedError, 75),
    (EvaluationError, 3),
    (CollectiveError, 70),
)


def exit_code(kind: type[BridgeError]) -> int:
    """The exit code of a program that one of these errors ends: 2 where input or set-up is wrong, 3 failed evaluations,
    70 a bug, 75 stopped by a signal or a time limit, to be started again."""
    return next((code for base, code in EXIT_CODES if issubclass(kind, base)), 2)


def exit_status(leaving: SystemExit) -> int:
    """The exit status of a process that this ends."""
    code = leaving.code
    return 0 if code is None else code if isinstance(code, int) else 1
