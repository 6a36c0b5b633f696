"""What the target does not determine, in words, and what to do about it.

A parameter without a finite error is one of several things: outputs do not change with it; noise hides so far whether
they do; it goes together with others along a valley; or its natural scale is such that it hardly moves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.uncertainty import Stated
from bridge.simulator.space import ParameterSpace

# Changes of the outputs over a natural scale, beside those by noise alone: more than this is told apart from them.
_TOLD = 2.0
# Beside those of the parameter that acts the most: less than this may be nothing at all, or a scale that is far off.
_NOTHING = 1e-6
# Part in a direction from which on a parameter is named, and errors along a valley beside those across.
_NAMED = 0.1
# Natural scales over which outputs change as much as is left of the target: they are far too small, or too large.
_SMALL, _LARGE = 1e3, 1e-4
# Of changes over natural scales, one beside the other, that are far apart.
_APART = 1e5


def identifiability_warnings(
    stated: Stated | None, space: ParameterSpace, theta: Array, at_bound: NDArray[np.bool_]
) -> tuple[str, ...]:
    """What the target does not determine, and what to do about it."""
    if stated is None:
        return ()
    natural = space.natural_scale
    covariance = stated.covariance * np.outer(natural, natural)
    said, error = [note.text for note in stated.notes], np.sqrt(np.diag(covariance))
    advice = "Fix it (fixed=), give it a prior, or add data that depend on it."
    unclear = stated.unclear if stated.unclear.size else np.zeros(len(error), dtype=bool)
    open_ = np.isinf(error)
    alone = np.array([acts_alone(stated, i) for i in range(len(error))])
    for i, (p, value, e) in enumerate(zip(space.parameters, theta, error, strict=True)):
        unit = f" {p.unit}" if p.unit else ""
        # At a bound, or where none is stated for another reason, only what is next to nothing is worth a word.
        nothing = np.isnan(e) and _nothing(stated, i)
        hidden = open_[i] or (unclear[i] and not (stated.notes and np.isnan(error).all()))
        if (nothing or hidden) and not at_bound[i] and not alone[i]:
            said.append(_not_seen(stated, space, i, advice))
        elif unclear[i] and np.isfinite(e):
            more = "stop=bridge.Stop(runs=...)" if stated.by_model else "num_samples= of the method"
            said.append(
                f"Noise hides so far how well {p.name} can be told apart from the others: its standard error is "
                f"{e:.3g}{unit} or more. Make more runs ({more}), or fix some of the others (fixed=)."
            )
        elif np.isfinite(e) and e > 0.5 * min(p.upper - p.lower, 20 * natural[i]):
            said.append(f"{p.name} is hardly determined by the target: its standard error is {e:.3g}{unit}. {advice}")
        if at_bound[i]:
            said.append(f"{p.name} ended at its bound {value:g}{unit}: no standard error of it is stated there.")
    together = np.flatnonzero((open_ | unclear & np.isnan(error)) & alone)
    if len(together) == 1 and _by_itself(stated, int(together[0])):
        said.append(_of_little_effect(stated, space, int(together[0]), advice))
    elif len(together):
        said.append(_valley(stated, space, together.tolist(), bool(open_.any())))
    if np.isfinite(error).all() and (error > 0).all() and not len(together):
        correlation = covariance / np.outer(error, error)
        for i, j in np.argwhere(np.triu(np.abs(correlation) > 0.98, 1)).tolist():
            said.append(_pair(space, correlation, error, i, j))
    if not np.isfinite(error[~at_bound]).all():
        said += _scales(stated, space)
        if not said:
            said.append("No standard error is stated: the numbers that it is made of are too large or too small.")
    return tuple(said)


def acts_alone(stated: Stated, i: int) -> bool:
    """Whether outputs change with a parameter by more than noise, the others held."""
    if not stated.sensitivity.size:
        return False
    most = float(stated.sensitivity.max(initial=0.0))
    return bool(stated.sensitivity[i] > max(_TOLD * stated.hidden[i], _NOTHING * most, 1e-300))


def _nothing(stated: Stated, i: int) -> bool:
    """Whether outputs do not change with a parameter, or by less than a millionth of what another one does."""
    if not stated.sensitivity.size:
        return False
    return bool(stated.sensitivity[i] + _TOLD * stated.hidden[i] <= _NOTHING * float(stated.sensitivity.max()))


def _not_seen(stated: Stated, space: ParameterSpace, i: int, advice: str) -> str:
    """Of a parameter with which outputs change by no more than noise: nothing there, or nothing seen so far."""
    p, natural = space.parameters[i], float(space.natural_scale[i])
    unit = f" {p.unit}" if p.unit else ""
    over = f"over its natural scale of {natural:g}{unit}"
    change, noise = (float(x[i]) if x.size else 0.0 for x in (stated.sensitivity, stated.hidden))
    most = int(np.argmax(stated.sensitivity)) if stated.sensitivity.size else i
    if change <= 0 or (most == i and noise <= 0):
        return f"{p.name} is not determined by the target: outputs do not depend on it. {advice}"
    if _TOLD * noise < _NOTHING * float(stated.sensitivity[most]):
        return (
            f"{p.name} is not determined by the target: {over} outputs do not depend on it, or by less than a "
            f"millionth of what {space.names[most]} does. {advice} If it should matter, its natural scale is far too "
            "small."
        )
    if stated.run_noise > 0 and change + _TOLD * noise < stated.run_noise:
        return (
            f"{p.name} is not determined by the target: {over} outputs do not change by more than the noise of a run. "
            f"{advice}"
        )
    error = stated.least[i] * natural if stated.least.size else np.nan
    least = f"its standard error is {error:.3g}{unit} or more" if np.isfinite(error) else "its error is not known"
    if stated.by_model:
        variance = "" if np.isinf(stated.dof) else "give variance= if you know it, "
        return (
            f"{p.name} acts on the outputs by hardly more than noise, which hides so far how much: {least}. Make more "
            f"runs (stop=bridge.Stop(runs=...)), {variance}or give {p.name} a larger natural scale."
        )
    return (
        f"{p.name} acts on the outputs by hardly more than the noise of the estimated Jacobian: {least}. Use "
        f"more samples (num_samples= of the method), a larger last scale (scale=), a larger natural scale of {p.name}, "
        "or method='kriging'."
    )


def _valley(stated: Stated, space: ParameterSpace, which: list[int], flat: bool) -> str:
    """Of parameters that act on the outputs, but not apart from each other."""
    direction = stated.open_direction if stated.open_direction.size else np.eye(len(space.names))[which[0]]
    step = direction * space.natural_scale
    named = [i for i in range(len(step)) if abs(direction[i]) > _NAMED * np.abs(direction).max()]
    along = ", ".join(f"{space.names[i]} by {step[i]:+.3g}" for i in named)
    names, hardly = ", ".join(space.names[i] for i in which), "not" if flat else "hardly more than noise"
    one_by_one = "is not determined by itself" if len(which) == 1 else "are not determined one by one"
    return (
        f"{names} {one_by_one} by the target: outputs change with each, but {hardly} where parameters change together, "
        f"{along}. Fix one (fixed=), give a prior, or add data that tell them apart."
    )


def _by_itself(stated: Stated, i: int) -> bool:
    """Whether a direction that is not determined is that of one parameter, the others being next to nothing in it."""
    part = np.abs(stated.open_direction)
    return bool(part.size > 1 and np.argmax(part) == i and np.delete(part, i).max() < _NAMED)


def _of_little_effect(stated: Stated, space: ParameterSpace, i: int, advice: str) -> str:
    p, most = space.parameters[i], int(np.argmax(stated.sensitivity))
    unit, natural = f" {p.unit}" if p.unit else "", float(space.natural_scale[i])
    share = float(stated.sensitivity[i] / stated.sensitivity[most])
    beside = f" ({share:.1g} of what {space.names[most]} does)" if most != i else ""
    return (
        f"{p.name} is not determined by the target: over its natural scale of {natural:g}{unit} outputs change by next "
        f"to nothing{beside}, and by nothing that other parameters cannot make up for. {advice}"
    )


def _pair(space: ParameterSpace, correlation: Array, error: Array, i: int, j: int) -> str:
    a, b = space.names[i], space.names[j]
    return (
        f"{a} and {b} are known together only: their correlation is {correlation[i, j]:+.3f}. Along the valley {a} "
        f"changes by {error[i]:.3g} with {b} by {np.sign(correlation[i, j]) * error[j]:+.3g}."
    )


def _scales(stated: Stated, space: ParameterSpace) -> list[str]:
    """Natural scales that are far off, and better ones, from how much outputs change."""
    change, size = stated.sensitivity, stated.target_norm
    if not change.size or not size > 0:
        return []
    acting = np.array([acts_alone(stated, i) for i in range(len(change))]) & ~np.isinf(np.diag(stated.covariance))
    with np.errstate(divide="ignore", over="ignore"):
        scales = np.where(acting, size / np.maximum(change, 1e-300), 1.0)
    apart = change.max() > _APART * np.where(change > 1e-14 * change.max(), change, np.inf).min()
    off = acting & ((scales > _SMALL) | (scales < _LARGE) | apart)
    if not off.any():
        return []
    better = ", ".join(f"{space.names[i]} {scales[i] * space.natural_scale[i]:.1g}" for i in np.flatnonzero(off))
    unseen = [space.names[i] for i in np.flatnonzero(~acting)]
    more = f", and a far larger one for {', '.join(unseen)}" if unseen else ""
    return [
        "Natural scales do not fit the outputs, which change by far more, or far less, than the target's own size over "
        f"one of them. Try natural_scale= of about: {better}{more}."
    ]
