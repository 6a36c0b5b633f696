"""Processes that a rank starts: their environment, without the launcher's variables and with threads limited; how they
ended; and the number of threads that a rank has itself."""

from __future__ import annotations

import os
import signal

from bridge.children import keep_directory, marked, own_directory
from bridge.errors import InputError

__all__ = [
    "child_environment",
    "describe_status",
    "device_index",
    "keep_directory",
    "marked",
    "own_directory",
    "step_limit",
    "thread_count",
]

# A child that starts MPI of its own must not believe that it is a rank of ours: it would hang, or take our job down.
_LAUNCHER = ("OMPI_", "PMIX_", "PMI_", "PMI2_", "PRTE_", "HYDRA_", "HYDI_", "MPIR_", "MPI_LOCAL", "I_MPI_HYDRA")
# The user's policy for a launcher that the child may start itself ...
_POLICY = ("OMPI_ALLOW_", "OMPI_MCA_", "PRTE_MCA_")
# ... except what Open MPI 4's launcher writes under the same prefix (from its sources; not tested here).
_LAUNCHER_MCA = tuple(f"OMPI_MCA_{name}" for name in ("ess", "orte_", "pmix", "initial_wdir", "shmem_RUNTIME_QUERY"))
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def child_environment(threads: int | None, keep_slurm: bool = False) -> dict[str, str]:
    """This process's environment without the launcher's variables.

    Args:
        threads: of OpenMP and the BLAS libraries; None leaves what is set.
        keep_slurm: keep SLURM_*, which a child that is started with srun needs.
    """
    launcher = _LAUNCHER if keep_slurm else (*_LAUNCHER, "SLURM_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(launcher) or (name.startswith(_POLICY) and not name.startswith(_LAUNCHER_MCA))
    }
    if threads is not None:
        environment |= dict.fromkeys(_THREADS, str(threads))
    return environment


def thread_count() -> int:
    """BRIDGE_THREADS, 1 where it is not set.

    Raises:
        InputError: it is not a positive integer.
    """
    text = os.environ.get("BRIDGE_THREADS", "1")
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"Expected a positive integer in the environment variable BRIDGE_THREADS, got {text!r}.")
    return int(text)


def step_limit() -> float | None:
    """BRIDGE_STEP_LIMIT_S [s], None where it is not set.

    Raises:
        InputError: it is not a positive number.
    """
    text = os.environ.get("BRIDGE_STEP_LIMIT_S")
    try:
        limit = None if text is None else float(text)
    except ValueError:
        limit = -1.0
    if limit is not None and not limit > 0:
        raise InputError(f"Expected a positive number of seconds in BRIDGE_STEP_LIMIT_S, got {text!r}.")
    return limit


def device_index(local_rank: int, available: int) -> int | None:
    """The GPU (and EGL device) of a rank, among those that it sees: None where there is none.

    A launcher that has given each rank its own shows it one; else the ranks of a node take turns.
    """
    return None if available == 0 else local_rank % available


def describe_status(status: int) -> str:
    """How a process ended, in words; `status` as in `subprocess`, negative for a signal."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"killed by signal {-status}"
