"""Evaluations of earlier runs, for a fit to begin with.

A run of the simulator at some parameters says what comes out there, whatever it was made for: another target, another
start, a smoothed gradient. So all evaluations of the same simulator count that lie within the bounds and, where
parameters are fixed or tied, exactly on the set that is left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.reduced import ReducedSimulator
from bridge.simulator.space import ParameterSpace
from bridge.storage.store import Key, Store

Source = str | os.PathLike[str] | Store

_log = logging.getLogger("bridge")


class Earlier(NamedTuple):
    """What is known already.

    Attributes:
        parameters: (n, d) of the fit, without what is fixed or tied. outputs: (n, m).
    """

    parameters: Array
    outputs: Array


class _Row(NamedTuple):
    order: tuple[bytes, int]
    phi: Array
    loss: float
    store: Store
    key: Key
    place: int  # in its call


def sources(reuse: Source | Sequence[Source]) -> list[Source]:
    """What `reuse=` names, one or several."""
    return [reuse] if isinstance(reuse, str | os.PathLike | Store) else list(reuse)


def described(source: Source) -> str:
    return str(source.directory) if isinstance(source, Store) else str(source)


def earlier_rows(
    reuse: Sequence[Source],
    simulator: Simulator,
    space: ParameterSpace,
    shape: tuple[int, ...],
    losses: Callable[[Array], Array],
    most: int,
    name: str,
    but: str | os.PathLike[str] | None = None,
) -> Earlier:
    """The evaluations in some directories that a fit can begin with, in an order that does not depend on theirs.

    Args:
        reuse: stores, directories of stores, of runs, or of the results of `bridge fit`.
        simulator: of the fit. space: its parameters, without what is fixed or tied. shape: of an output.
        losses: (k, m) outputs -> (k,) their losses.
        most: of more rows than this, those nearest to the best one are taken (natural units).
        name: under which the simulator's evaluations are filed.
        but: the fit's own directory.

    Raises:
        InputError: a directory that does not exist, is the fit's own, or has evaluations of other simulators alone, or
            with outputs of another shape alone.
    """
    rows: dict[tuple[bytes, int], _Row] = {}
    seen = 0
    for source in reuse:
        store = source if isinstance(source, Store) else Store(_directory(source), above_s=0.0)
        if but is not None and store.directory.resolve() == (Path(but) / "evaluations").resolve():
            raise InputError(
                f"Expected reuse of other runs, got the fit's own directory {str(but)!r}. Give it another."
            )
        for row in _usable(store, described(source), simulator, name, space, shape, losses):
            seen += 1
            rows.setdefault(row.order, row)
    chosen = [rows[order] for order in sorted(rows)]
    if len(chosen) > most:
        z = np.array([row.phi for row in chosen]) / space.natural_scale
        best = int(np.argmin([row.loss for row in chosen]))
        nearest = np.argsort(((z - z[best]) ** 2).sum(axis=1), kind="stable")[:most]
        chosen = [chosen[i] for i in sorted(nearest)]
    kept, outputs = [], []
    for row in chosen:
        F = row.store.get(row.key)
        if F is not None:  # else it has gone since
            kept.append(row.phi)
            outputs.append(F.to("cpu").numpy()[row.place].astype(np.float64).reshape(-1))
    _log.info("%d of %d evaluations within the bounds are used again", len(kept), seen)
    if not kept:
        _log.warning("no evaluations to use again in %s", ", ".join(map(described, reuse)))
        return Earlier(np.zeros((0, space.dimension)), np.zeros((0, int(np.prod(shape)))))
    return Earlier(np.array(kept), np.array(outputs))


def _directory(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if not path.is_dir():
        raise InputError(f"Expected the directory of an earlier run or of a store in reuse, got {str(path)!r}.")
    return next((p for p in (path / "evaluations", path / "run" / "evaluations") if p.is_dir()), path)


def _usable(
    store: Store,
    where: str,
    simulator: Simulator,
    name: str,
    space: ParameterSpace,
    shape: tuple[int, ...],
    losses: Callable[[Array], Array],
) -> Iterator[_Row]:
    names = store.names()
    if names and name not in names:
        raise InputError(
            f"Expected evaluations of {name!r} in {where}, got those of {', '.join(map(repr, sorted(names)))}. If "
            f"its code was only rewritten, give {simulator_name(simulator)!r} an attribute `identity`: a text that "
            "stays while its outputs do."
        )
    other: tuple[int, ...] | None = None
    fits = False
    for record in store.records(name):
        if tuple(record.outputs.shape[1:]) != shape:
            other = tuple(record.outputs.shape[1:])
            continue
        fits = True
        phi = _reduced(simulator, record.inputs)
        good = np.isfinite(phi).all(axis=1) & ((phi >= space.lower) & (phi <= space.upper)).all(axis=1)
        if not good.any():
            continue
        loss = losses(record.outputs.numpy().astype(np.float64).reshape(len(phi), -1))
        key = store.key(record.name, record.inputs, record.seeds)
        for i in np.flatnonzero(good & np.isfinite(loss)):
            yield _Row((phi[i].tobytes(), int(record.seeds[i])), phi[i], float(loss[i]), store, key, int(i))
    if other is not None and not fits:
        raise InputError(
            f"Expected earlier outputs of shape {shape}, as the target has, got {other} from {name!r} in {where}. Give "
            "the directory of a run with such outputs."
        )


def _reduced(simulator: Simulator, theta: Array) -> Array:
    """(k, d) of a fit from the (k, d') of the whole simulator; NaN off the set that fixed and tied parameters leave."""
    if not isinstance(simulator, ReducedSimulator):
        return theta
    first = [int(np.argmax(column)) for column in simulator.lift.T]
    phi = np.ascontiguousarray(theta[:, first])
    return np.asarray(np.where((simulator.forwarded(phi) == theta).all(axis=1)[:, None], phi, np.nan))
