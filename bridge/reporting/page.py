"""A page of HTML about a fit, for people: one file that needs nothing else.

Every file is written beside its place and moved there whole, so that nothing half-written is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bridge.errors import OutputError, SetupError
from bridge.reporting.figures import (
    convergence,
    curves,
    need_matplotlib,
    png,
    smoothed_for_eyes,
    with_gaps,
)
from bridge.reporting.result import FitResult
from bridge.reporting.summary import correlation_table, parameter_table, story, table, versions
from bridge.storage.files import write_whole

_FEW = 24  # numbers of an output that are a table
_CITATION = (
    "F. Petersen, C. Borgelt, A. Mishra, S. Ermon: Generalizing Stochastic Smoothing for Differentiation and Gradient "
    "Estimation. arXiv 2410.08125."
)


@runtime_checkable
class Drawable(Protocol):
    """A simulator that can show its outputs to people."""

    def draw(self, output: NDArray[Any]) -> NDArray[Any]:
        """An output as a picture: (H, W) of any range, or (H, W, 3) colours from 0 to 1 or, as uint8, to 255."""
        ...


def write_report(
    result: FitResult,
    target: NDArray[Any],
    path: Path,
    *,
    simulator: object = None,
    title: str = "",
    settings: Mapping[str, Any] | None = None,
    command: str = "",
) -> Path:
    """One HTML file about a fit that needs nothing else: no network, no script, pictures inside.

    Args:
        result: of `bridge.fit`. target: what it was fitted to; masked numbers are gaps.
        path: of the file.
        simulator: draws outputs where it is `Drawable`; without, images, stacks, curves and few numbers are shown as
            they are.
        title: heading.
        settings: name -> value, of the fit.
        command: that repeats the fit.

    Returns:
        the path. Without matplotlib the page has words and tables, and says what is missing.
    """
    heading = title or "A fit"
    target = with_gaps(target)
    parts = [f"<h1>{escape(heading)}</h1>", f"<p>{escape(story(result))}</p>"]
    parts += [f'<p class="warn">{escape(w)}</p>' for w in result.warnings]
    parts += ["<h2>Parameters</h2>", parameter_table(result), correlation_table(result)]
    if shares := result.largest_shares():
        rows = [[", ".join(map(str, index)), f"{100 * share:.3g} %"] for index, share in shares]
        parts += ["<h3>The outputs that the loss comes from</h3>", table(["output", "share"], rows, (1,))]
    try:
        parts += ["<h2>Outputs</h2>", _outputs(result, target, simulator)]
        parts += ["<h2>Convergence</h2>", convergence(result)]
    except SetupError as error:
        parts.append(f'<p class="warn">No pictures. {escape(str(error))}</p>')
    told = {"method": result.method, **(settings or {})}
    parts += ["<h2>Settings</h2>", table(["setting", "value"], [[k, str(v)] for k, v in told.items() if v != ""])]
    parts += ["<h2>To repeat and to cite</h2>"]
    if command:
        parts.append(f"<pre><code>{escape(command)}</code></pre>")
    parts += [table(["software", "version"], versions()), f"<p>The method: {escape(_CITATION)}</p>"]
    template, style = (
        files("bridge.reporting").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css")
    )
    page = Template(template).substitute(title=escape(heading), style=style, body="\n".join(parts))
    return write_whole(path, lambda p: p.write_text(page, encoding="utf-8", errors="replace"))


def _outputs(result: FitResult, target: NDArray[Any], simulator: object) -> str:
    series = {"target": target, "start": np.asarray(result.start_output), "fit": np.asarray(result.output)}
    failed = [name for name, output in series.items() if not np.isfinite(output).any()]
    words = "".join(f'<p class="warn">The run at the {escape(n)} failed: there is no output.</p>' for n in failed)
    shape = target.shape
    if isinstance(simulator, Drawable):
        try:
            drawn = {n: _checked_picture(simulator.draw(o)) for n, o in series.items() if n not in failed}
            return words + _pictures(drawn, "as the simulator draws it")
        except SetupError:
            raise
        except Exception as error:  # somebody else's code: a report without this picture is better than none
            words += f'<p class="warn">draw() of the simulator failed: {escape(f"{type(error).__name__}: {error}")}</p>'
    if target.size <= _FEW:
        rows = [
            [", ".join(map(str, i)), *(f"{s.ravel()[k]:.6g}" for s in series.values())]
            for k, i in enumerate(np.ndindex(shape or (1,)))
        ]
        return words + table(["index", *series], rows, (1, 2, 3))
    shown = {n: o for n, o in series.items() if n not in failed}
    if target.ndim == 1 or (min(shape[-2:]) < 8 and shape[-1] not in (3, 4)):
        return words + curves(shown)
    if target.ndim == 3 and shape[-1] in (3, 4) and min(shape[:2]) >= 8:
        top = 255.0 if np.nanmax(target) > 1.5 else 1.0
        return words + _pictures({n: np.clip(o[..., :3] / top, 0, 1) for n, o in shown.items()}, "in its colours")
    if target.ndim == 2:
        return words + _pictures(shown, "")
    count = int(np.prod(shape[:-2]))
    for k in np.unique(np.linspace(0, count - 1, 4).astype(int)):
        slices = {n: o.reshape(count, *shape[-2:])[k] for n, o in shown.items()}
        words += f"<h3>Slice {k + 1} of {count}</h3>" + _pictures(slices, "")
    return words


def _checked_picture(picture: NDArray[Any]) -> NDArray[np.float64]:
    image = np.asarray(picture)
    if (image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3)) or 0 in image.shape:
        raise OutputError(f"Expected a picture of shape (H, W) or (H, W, 3) from draw, got {image.shape}.")
    scale = 255.0 if image.dtype == np.uint8 and image.ndim == 3 else 1.0
    return np.asarray(image, dtype=np.float64) / scale


def _pictures(series: Mapping[str, NDArray[Any]], how: str) -> str:
    """Target, start and fit with one range of grey, and what the fit leaves of the target."""
    need_matplotlib()
    shown = dict(series)
    residual = series["target"] - series["fit"] if {"target", "fit"} <= set(series) else None
    grey = next(iter(series.values())).ndim == 2
    if grey and residual is not None and np.nanstd(residual) > np.nanstd(series["fit"]):
        shown = {n: smoothed_for_eyes(o, 1.5) for n, o in series.items()}
        how = (how + ", " if how else "") + "blurred by 1.5 pixels, as there is more noise than picture"
    finite = np.concatenate([o[np.isfinite(o)] for o in shown.values()])
    low, high = np.percentile(finite, [0.5, 99.5]) if grey else (0.0, 1.0)
    scale = f"black {low:.4g}, white {high:.4g}" if grey else ""
    text = ""
    for name, image in shown.items():
        said = ", ".join(part for part in (how, scale) if part)
        text += _figure(png(image, float(low), float(high), "gray"), name, said)
    if residual is not None:
        flat = residual if grey else residual.mean(axis=2)
        spread = float(np.nanstd(flat)) or 1.0
        said = f"target - fit, blue to red: -4 to +4 standard deviations of {spread:.3g}"
        text += _figure(png(flat, -4 * spread, 4 * spread, "RdBu_r"), "residual", said)
    return f'<div class="pictures">{text}</div>'


def _figure(uri: str, name: str, said: str) -> str:
    caption = f"<b>{escape(name)}</b>" + (f": {escape(said)}" if said else "")
    return f'<figure><img src="{uri}" alt="{escape(name)}"><figcaption>{caption}</figcaption></figure>'
