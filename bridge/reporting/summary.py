"""A fit in words and tables of HTML."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from html import escape
from importlib import metadata

import numpy as np
from numpy.typing import NDArray

from bridge.reporting.result import FitResult
from bridge.reporting.text import describe_end, format_duration, format_value

# Parameters of which all correlations are shown.
_MOST_CORRELATIONS = 12
_PACKAGES = ("simulation-bridge", "numpy", "scipy", "torch", "matplotlib", "mpi4py")


def story(result: FitResult) -> str:
    d = result.space.dimension
    words = f"{d} parameter{'s' if d > 1 else ''}. The fit {describe_end(result.stop_reason)} after "
    words += f"{len(result.history)} steps and {result.num_evaluations:,} simulations"
    counts = result.counts()
    words += (f" ({'; '.join(counts)})" if counts else "") + f", in {format_duration(result.wall_s)}. "
    if result.history:
        words += f"The loss went from {result.history[0].loss:.5g} to {result.loss:.5g}. "
    if result.chi_square is not None:
        words += f"{result.how_good()[0].upper()}{result.how_good()[1:]}."
    return words.rstrip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    kind = ["n" if i in numbers else "" for i in range(len(head))]
    top = "".join(f'<th scope="col" class="{k}">{escape(h)}</th>' for h, k in zip(head, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{k}">{escape(c)}</td>' for c, k in zip(row, kind, strict=True)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _correlation(result: FitResult) -> NDArray[np.float64] | None:
    covariance = result.covariance
    if covariance is None:
        return None
    deviation = np.sqrt(np.diag(covariance))
    if not (np.isfinite(deviation).all() and (deviation > 0).all()):
        return None
    return np.asarray(covariance / np.outer(deviation, deviation))


def parameter_table(result: FitResult) -> str:
    correlation = _correlation(result)
    rows = []
    for i, p in enumerate(result.space.parameters):
        value, error = float(result.parameters[i]), None
        if result.standard_error is not None and np.isfinite(result.standard_error[i]):
            error = float(result.standard_error[i])
        notes = []
        if value <= p.lower or value >= p.upper:
            notes.append("at its bound: the optimum may lie beyond")
        if error is not None and np.isfinite(p.upper - p.lower) and error > (p.upper - p.lower) / 2:
            notes.append("not determined: the error exceeds half of the range")
        if correlation is not None:
            others = np.abs(np.delete(correlation[i], i))
            if others.size and others.max() > 0.95:
                j = int(np.flatnonzero(np.arange(len(correlation)) != i)[others.argmax()])
                notes.append(f"hard to tell from {result.space.names[j]} (correlation {correlation[i, j]:+.3f})")
        shown = "-" if error is None else format_value(error, error)
        bounds = f"{p.lower:g} to {p.upper:g}"
        rows.append(
            [p.name, format_value(value, error), shown, p.unit, f"{result.start[i]:.6g}", bounds, "; ".join(notes)]
        )
    return table(["parameter", "value", "standard error", "unit", "start", "bounds", "notes"], rows, (1, 2, 4))


def correlation_table(result: FitResult) -> str:
    """Red for positive and blue for negative correlations; of many parameters the strongest pairs only."""
    correlation = _correlation(result)
    names, d = result.space.names, result.space.dimension
    if correlation is None or d < 2:
        return ""
    if d > _MOST_CORRELATIONS:
        pairs = sorted(((i, j) for i in range(d) for j in range(i)), key=lambda ij: -abs(correlation[ij]))[:10]
        rows = [[names[j], names[i], f"{correlation[i, j]:+.3f}"] for i, j in pairs]
        return "<h3>The strongest correlations</h3>" + table(["parameter", "with", "correlation"], rows, (2,))
    body = ""
    for i, name in enumerate(names):
        cells = ""
        for r in correlation[i]:
            fade = round(255 - 150 * min(1.0, abs(float(r))))
            colour = f"rgb(255,{fade},{fade})" if r > 0 else f"rgb({fade},{fade},255)"
            cells += f'<td style="background:{colour}">{r:+.2f}</td>'
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    return (
        '<h3>Correlations</h3><div class="wide"><table class="correlation">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def versions() -> list[list[str]]:
    rows = [["python", platform.python_version()]]
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            rows.append([package, metadata.version(package)])
    return rows
