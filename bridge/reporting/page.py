"""What a run leaves behind for people: the picture, the table in plain text, and a page of HTML about all of it.

Every file is written beside its place and moved there whole, so that nothing half-written is left.
"""

from __future__ import annotations

import base64
import contextlib
import io
import platform
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bridge.errors import OutputError, SetupError
from bridge.reporting.result import FitResult
from bridge.reporting.text import describe_end, format_duration, format_value, printable
from bridge.storage.files import write_whole


def _smooth_for_eyes(image: NDArray[Any], sigma: float) -> NDArray[np.float64]:
    from scipy import ndimage

    picture = np.asarray(image, dtype=np.float64)
    known = np.isfinite(picture)
    if not known.all():  # they would take their neighbours along
        picture = np.where(known, picture, np.median(picture[known]) if known.any() else 0.0)
    return np.asarray(ndimage.gaussian_filter(picture, sigma))


def _with_gaps(target: NDArray[Any]) -> NDArray[np.float64]:
    """A target as numbers; NaN where it is masked."""
    return np.asarray(np.ma.filled(np.ma.asarray(target).astype(np.float64), np.nan))


def draw_fit(result: FitResult, target: NDArray[Any], path: Path, title: str = "") -> Path:
    """A PNG of target, start, fit and residual side by side (outputs of two dimensions), and the convergence.

    Noisy images are shown lightly blurred, and say so; the residual is target - fit, unblurred, in units of its
    standard deviation.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError(
            "Expected matplotlib for the picture. Install it: pip install 'simulation-bridge[report]'."
        ) from error

    figure = Figure(figsize=(15, 8.2), layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(1.25, 1)))
    if title:
        figure.suptitle(title)
    target = _with_gaps(target)
    if target.ndim == 2:
        axes = top.subplots(1, 4)
        blurred = [_smooth_for_eyes(image, 1.5) for image in (target, result.start_output, result.output)]
        low, high = np.percentile(np.stack(blurred), [0.5, 99.5])
        for ax, image, name in zip(axes, blurred, ("target", "start", "fit"), strict=False):
            ax.imshow(image, cmap="gray", vmin=low, vmax=high)
            ax.set_title(f"{name} (blurred by 1.5 px to be seen)", fontsize=10)
        residual = target - result.output
        deviation = float(np.nanstd(residual)) or 1.0
        drawn = axes[3].imshow(residual / deviation, cmap="RdBu_r", vmin=-4, vmax=4)
        axes[3].set_title(f"residual / {deviation:.3g}", fontsize=10)
        top.colorbar(drawn, ax=axes[3], shrink=0.7)
        for ax in axes:
            ax.set_xticks([])
            ax.set_yticks([])
    else:
        ax = top.subplots()
        for series, name in ((target, "target"), (result.start_output, "start"), (result.output, "fit")):
            ax.plot(np.ravel(series), label=name, lw=1)
        ax.legend()
    d = result.space.dimension
    axes = bottom.subplots(1, 1 + d)
    steps = [h.step for h in result.history]
    axes[0].plot(steps, [h.loss for h in result.history], lw=1.2)
    axes[0].set_title("loss", fontsize=10)
    axes[0].set_xlabel("step")
    for i, (ax, parameter) in enumerate(zip(axes[1:], result.space.parameters, strict=True)):
        values = np.array([h.parameters[i] for h in result.history] + [result.parameters[i]])
        width = np.array([h.scale for h in result.history] + [result.history[-1].scale]) * parameter.natural_scale
        at = [*steps, steps[-1] + 1]
        ax.fill_between(at, values - width, values + width, alpha=0.2, lw=0, label="smoothing scale")
        ax.plot(at, values, lw=1.2)
        ax.set_title(parameter.name, fontsize=10)
        ax.set_xlabel("step")
        ax.set_ylabel(parameter.unit)
    axes[1].legend(fontsize=8)
    return write_whole(path, lambda p: figure.savefig(p, dpi=90, format="png"))


# --- the page -------------------------------------------------------------------------------------------------

_FEW, _MANY = 24, 12  # numbers of an output that are a table; parameters that get a panel of their own
_INK = "#010203"  # of charts: becomes the colour of the page's text, light or dark
_PACKAGES = ("simulation-bridge", "numpy", "scipy", "torch", "matplotlib", "mpi4py")
_CITATION = (
    "F. Petersen, C. Borgelt, A. Mishra, S. Ermon: Generalizing Stochastic Smoothing for Differentiation and Gradient "
    "Estimation. arXiv 2410.08125."
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #d5d9de; --soft: #59636e; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --page: #14171a; --line: #3a4047; --soft: #a0a8b0; --warn: #f0b354; } }
body { color: var(--ink); background: var(--page); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); font-size: 1.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; } .correlation td { text-align: center; padding: .25rem .5rem; color: #111; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; flex: 1 1 13rem; max-width: 24rem; }
figure img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
svg { width: 100%; height: auto; }
figcaption, .soft { color: var(--soft); font-size: .9rem; } .warn { color: var(--warn); } pre { white-space: pre-wrap; }
"""


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
    target = _with_gaps(target)
    parts = [f"<h1>{escape(heading)}</h1>", f"<p>{escape(_story(result))}</p>"]
    parts += [f'<p class="warn">{escape(w)}</p>' for w in result.warnings]
    parts += ["<h2>Parameters</h2>", _parameter_table(result), _correlation_table(result)]
    if shares := result.largest_shares():
        rows = [[", ".join(map(str, index)), f"{100 * share:.3g} %"] for index, share in shares]
        parts += ["<h3>The outputs that the loss comes from</h3>", _table(["output", "share"], rows, (1,))]
    try:
        parts += ["<h2>Outputs</h2>", _outputs(result, target, simulator)]
        parts += ["<h2>Convergence</h2>", _convergence(result)]
    except SetupError as error:
        parts.append(f'<p class="warn">No pictures. {escape(str(error))}</p>')
    told = {"method": result.method, **(settings or {})}
    parts += ["<h2>Settings</h2>", _table(["setting", "value"], [[k, str(v)] for k, v in told.items() if v != ""])]
    parts += ["<h2>To repeat and to cite</h2>"]
    if command:
        parts.append(f"<pre><code>{escape(command)}</code></pre>")
    parts += [_table(["software", "version"], _versions()), f"<p>The method: {escape(_CITATION)}</p>"]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    return write_whole(path, lambda p: p.write_text(page, encoding="utf-8", errors="replace"))


def _story(result: FitResult) -> str:
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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
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


def _parameter_table(result: FitResult) -> str:
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
    return _table(["parameter", "value", "standard error", "unit", "start", "bounds", "notes"], rows, (1, 2, 4))


def _correlation_table(result: FitResult) -> str:
    """Red for positive and blue for negative correlations; of many parameters the strongest pairs only."""
    correlation = _correlation(result)
    names, d = result.space.names, result.space.dimension
    if correlation is None or d < 2:
        return ""
    if d > _MANY:
        pairs = sorted(((i, j) for i in range(d) for j in range(i)), key=lambda ij: -abs(correlation[ij]))[:10]
        rows = [[names[j], names[i], f"{correlation[i, j]:+.3f}"] for i, j in pairs]
        return "<h3>The strongest correlations</h3>" + _table(["parameter", "with", "correlation"], rows, (2,))
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


def _versions() -> list[list[str]]:
    rows = [["python", platform.python_version()]]
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            rows.append([package, metadata.version(package)])
    return rows


def _png(image: NDArray[Any], low: float, high: float, cmap: str) -> str:
    """A data URI; large images are averaged over blocks to 640 pixels at most."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    k = -(-max(image.shape[:2]) // 640)
    h, w = image.shape[0] // k * k, image.shape[1] // k * k
    if k > 1 and h and w:
        image = image[:h, :w].reshape(h // k, k, w // k, k, *image.shape[2:]).mean(axis=(1, 3))
    if image.ndim == 2:
        image = colormaps[cmap](np.nan_to_num((image - low) / ((high - low) or 1.0)))
    buffer = io.BytesIO()
    imsave(buffer, np.clip(np.nan_to_num(image), 0, 1), format="png", metadata={"Software": "bridge"})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Any) -> str:
    """Of a figure drawn in `_INK`; the colour becomes the page's."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has fonts that matplotlib lacks
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * lines), layout="constrained")
    axes = np.asarray(figure.subplots(lines, columns, squeeze=False)).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes:
        for spine in ax.spines.values():
            spine.set_color(_INK)
        ax.tick_params(colors=_INK, which="both", labelsize=8)
    return figure, list(axes[:count])


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")


def _convergence(result: FitResult) -> str:
    _need_matplotlib()
    from matplotlib import rc_context

    if not result.history:
        return "<p>No step was finished.</p>"
    # At most 400 points of a line, the last one among them.
    chosen = np.unique(np.linspace(0, len(result.history) - 1, 400).astype(int))
    history = [result.history[i] for i in chosen]
    runs = np.array([h.num_evaluations for h in history])
    values = np.array([h.parameters for h in history])
    losses = np.array([h.loss for h in history])
    moved = np.abs(values - values[-1]).max(axis=0) / result.space.natural_scale
    panels = sorted(np.argsort(-np.nan_to_num(moved), kind="stable")[:_MANY].tolist())
    # Text stays text: smaller, and to be searched. The salt makes two files of one fit the same.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bridge", "text.color": _INK}):
        figure, axes = _panels(1 + len(panels))
        axes[0].plot(runs, losses, color="#3b82c4")
        finite = losses[np.isfinite(losses)]
        if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
            axes[0].set_yscale("log")
        axes[0].set_title("loss", color=_INK, fontsize=10)
        for ax, i in zip(axes[1:], panels, strict=True):
            p = result.space.parameters[i]
            width = np.array([np.nan if h.standard_error is None else h.standard_error[i] for h in history])
            ax.fill_between(runs, values[:, i] - width, values[:, i] + width, alpha=0.3, lw=0, color="#3b82c4")
            ax.plot(runs, values[:, i], color="#3b82c4")
            ax.axhline(result.parameters[i], color=_INK, lw=0.7, ls=":")
            ax.set_title(_plain(p.name + (f" [{p.unit}]" if p.unit else "")), color=_INK, fontsize=10)
        for ax in axes:
            ax.set_xlabel("simulations", color=_INK, fontsize=8)
        chart = _svg(figure)
    words = "Bands are one standard error, where the method knew it; dotted is the end."
    if len(panels) < result.space.dimension:
        words += f" Of {result.space.dimension} parameters the {_MANY} that moved most, in natural units."
    return f'{chart}<p class="soft">{words}</p>'


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
        return words + _table(["index", *series], rows, (1, 2, 3))
    shown = {n: o for n, o in series.items() if n not in failed}
    if target.ndim == 1 or (min(shape[-2:]) < 8 and shape[-1] not in (3, 4)):
        return words + _curves(shown)
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
    _need_matplotlib()
    shown = dict(series)
    residual = series["target"] - series["fit"] if {"target", "fit"} <= set(series) else None
    grey = next(iter(series.values())).ndim == 2
    if grey and residual is not None and np.nanstd(residual) > np.nanstd(series["fit"]):
        shown = {n: _smooth_for_eyes(o, 1.5) for n, o in series.items()}
        how = (how + ", " if how else "") + "blurred by 1.5 pixels, as there is more noise than picture"
    finite = np.concatenate([o[np.isfinite(o)] for o in shown.values()])
    low, high = np.percentile(finite, [0.5, 99.5]) if grey else (0.0, 1.0)
    scale = f"black {low:.4g}, white {high:.4g}" if grey else ""
    text = ""
    for name, image in shown.items():
        said = ", ".join(part for part in (how, scale) if part)
        text += _figure(_png(image, float(low), float(high), "gray"), name, said)
    if residual is not None:
        flat = residual if grey else residual.mean(axis=2)
        spread = float(np.nanstd(flat)) or 1.0
        said = f"target - fit, blue to red: -4 to +4 standard deviations of {spread:.3g}"
        text += _figure(_png(flat, -4 * spread, 4 * spread, "RdBu_r"), "residual", said)
    return f'<div class="pictures">{text}</div>'


def _figure(uri: str, name: str, said: str) -> str:
    caption = f"<b>{escape(name)}</b>" + (f": {escape(said)}" if said else "")
    return f'<figure><img src="{uri}" alt="{escape(name)}"><figcaption>{caption}</figcaption></figure>'


def _curves(series: Mapping[str, NDArray[Any]]) -> str:
    _need_matplotlib()
    from matplotlib import rc_context

    length = next(iter(series.values())).shape[-1]
    rows = {n: o.reshape(-1, length) for n, o in series.items()}
    count = len(next(iter(rows.values())))
    chosen = np.unique(np.linspace(0, count - 1, min(6, count)).astype(int))
    step = -(-length // 2000)
    colours = {"target": _INK, "start": "#b58a3a", "fit": "#3b82c4"}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bridge", "text.color": _INK}):
        figure, axes = _panels(len(chosen))
        for ax, k in zip(axes, chosen, strict=True):
            for name, lines in rows.items():
                ax.plot(np.arange(length)[::step], lines[k, ::step], lw=1, label=name, color=colours[name])
            ax.set_title(f"{k + 1} of {count}" if count > 1 else "", color=_INK, fontsize=10)
        axes[0].legend(fontsize=8, framealpha=0)
        return _svg(figure)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "Expected matplotlib for pictures. Install it: pip install 'simulation-bridge[report]'."
        ) from error
