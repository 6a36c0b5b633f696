"""How many ranks suit a simulator, in words: what `python -m bridge plan` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bridge.errors import InputError
from bridge.planning.cost_model import Machine, Workload, predict


def most_ranks(workload: Workload, machine: Machine, efficiency: float = 0.8) -> int:
    """The largest number of ranks at which a step is that efficient; 0 if one rank is not.

    Looked for among those with which every rank has the same number of units, or all but the last have.
    """
    shares: list[int] = []
    k = 1
    while k < workload.units:
        shares.append(k)
        k += max(1, k // 8)
    for share in [*shares, workload.units]:
        ranks = -(-workload.units // share)
        if predict(workload, machine, ranks).efficiency >= efficiency:
            return ranks
    return 0


def advise(workload: Workload, machine: Machine, efficiency: float = 0.8) -> str:
    """How many ranks suit, what limits their number, and what to change to use more; in words."""
    best = most_ranks(workload, machine, efficiency)
    percent = f"{efficiency:.0%}".replace("%", " %")
    if best == 0:
        one = predict(workload, machine, 1)
        return (
            f"Not even one rank simulates for {percent} of its time ({one.efficiency:.0%}: {one.bottleneck}). More "
            "ranks shorten the step, but none is used well: the simulator is fast for what is done with its outputs."
        )
    at = predict(workload, machine, best)
    text = f"Up to {best:,} rank(s) are {percent} efficient or more (a step of {seconds(at.step_s)})."
    if best >= workload.units:
        text += f" More have nothing to do: there are {workload.units:,} units of {workload.unit_rows} row(s)."
    else:
        text += f" What limits more: {predict(workload, machine, min(2 * best, workload.units)).bottleneck}."
    found = [(name, most_ranks(other, machine, efficiency)) for name, other in _changes(workload)]
    helps: list[tuple[str, int]] = []
    for name, ranks in sorted(found, key=lambda pair: -pair[1]):
        # Of the leaf sizes, and of those that do more at once, only what does more than what is simpler.
        kind = name.split("=")[0] if " and " not in name else name
        if ranks > best and kind not in [other.split("=")[0] for other, _ in helps]:
            helps.append((name, ranks))
    if helps:
        text += " To use more: " + "; ".join(f"{name}, up to {ranks:,}" for name, ranks in helps) + "."
    return text


def _changes(workload: Workload) -> list[tuple[str, Workload]]:
    """What could be changed to use more ranks, in the words of `bridge.smooth`."""
    n = workload.num_samples
    sizes = [size for size in (1, 2, 4, 8, 16) if size < workload.unit_rows]
    changes = [(f"on=bridge.Ranks(leaf_size={size})", replace(workload, leaf_size=size)) for size in sizes]
    if workload.streamed:
        needed = workload.evaluations * workload.num_outputs * workload.bytes_per_number
        megabytes = math.ceil(needed / 1e6)
        kept = replace(workload, keep_bytes=1e6 * megabytes)
        changes.append((f"memory=bridge.Memory(keep_mb={megabytes}) (over all ranks)", kept))
        if sizes:
            both = f"memory=bridge.Memory(keep_mb={megabytes}) and on=bridge.Ranks(leaf_size=1)"
            changes.append((both, replace(kept, leaf_size=1)))
    if workload.cv > 0 and not workload.dynamic:
        changes.append(("on=bridge.Ranks(schedule='dynamic')", replace(workload, schedule="dynamic")))
    more = f"num_samples={4 * n} and on=bridge.Ranks(leaf_size=1)"
    changes.append((more, replace(workload, num_samples=4 * n, leaf_size=1)))
    changes.append((f"a batch of {4 * workload.batch} parameter vectors", replace(workload, batch=4 * workload.batch)))
    return changes


# --- times and numbers, read and written ---------------------------------------------------------------------------

_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "y": 365.25 * 86400.0}


def parse_seconds(text: str) -> float:
    """A time such as 50ms, 1.5 s, 2min, 3h, 30d, 5y [s]; the unit is required.

    Raises:
        InputError: it is not.
    """
    word = text.strip()
    digits = word.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = word[len(digits) :]
    try:
        number = float(digits)
    except ValueError:
        number = math.nan
    if unit not in _UNITS or not (math.isfinite(number) and number >= 0):
        raise InputError(f"Expected a time with a unit ({', '.join(_UNITS)}), such as 50ms or 2min, got {text!r}.")
    return number * _UNITS[unit]


def parse_ranks(text: str) -> list[int]:
    """Numbers of ranks: 1,2,4,8 or 1,2,4,...,1000 (by the last ratio) or 10,20,30,...,100 (by equal differences).

    Raises:
        InputError: it is neither.
    """
    words = [word.strip() for word in text.split(",")]
    try:
        before = [int(word) for word in (words[: words.index("...")] if "..." in words else words)]
        after = [int(word) for word in words[words.index("...") + 1 :]] if "..." in words else []
    except ValueError:
        before, after = [], []
    if "..." in words:
        ratio = before[-1] / before[-2] if len(before) > 1 and before[-2] > 0 else 0.0
        steps = np.diff(before)
        even = len(steps) > 1 and len(set(steps)) == 1
        if len(after) != 1 or not (ratio > 1):
            before = []
        while before and before[-1] < after[0]:
            following = before[-1] + int(steps[-1]) if even else math.ceil(before[-1] * ratio)
            before.append(min(following, after[0]))
    if not before or min(before) < 1:
        raise InputError(f"Expected numbers of ranks such as 1,2,8 or 1,2,4,...,1000, got {text!r}.")
    return before


def seconds(value: float) -> str:
    """A time in words: 1.2 ms, 3.4 s, 5.6 min, 7.8 h."""
    for unit, size, limit in (("us", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 120.0), ("min", 60.0, 7200.0)):
        if value < limit:
            return f"{value / size:.3g} {unit}"
    return f"{value / 3600:.3g} h"


def describe(workload: Workload) -> str:
    """What a step is, in a line."""
    kind = "streamed" if workload.streamed else "kept"
    spread = f" (cv {workload.cv:g})" if workload.cv else ""
    schedule = "dynamic" if workload.dynamic else "static"
    return (
        f"{workload.evaluations:,} evaluations of {seconds(workload.cost_s)}{spread} in {workload.units:,} units of "
        f"{workload.unit_rows} row(s), {workload.num_outputs:,} outputs ({kind}), {schedule} schedule"
    )


def table(workload: Workload, machine: Machine, ranks: Sequence[int]) -> str:
    """Step time, efficiency, speed-up and bottleneck for each number of ranks."""
    lines = [f"{'ranks':>8}  {'step':>9}  {'efficiency':>10}  {'speed-up':>9}  {'idle':>6}  limited by"]
    for number in ranks:
        p = predict(workload, machine, number)
        lines.append(
            f"{p.ranks:>8,}  {seconds(p.step_s):>9}  {100 * p.efficiency:>8.1f} %  {p.speed_up:>9,.4g}  "
            f"{p.idle_ranks:>6,}  {p.bottleneck}"
        )
    return "\n".join(lines)
