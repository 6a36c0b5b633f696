"""Pictures of a fit: a PNG of target, start, fit and residual; images and curves for a page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import SetupError
from bridge.reporting.result import FitResult
from bridge.reporting.text import printable
from bridge.storage.files import write_whole

MOST_PANELS = 12  # of parameters
_INK = "#010203"  # of charts: becomes the colour of the page's text, light or dark


def need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SetupError(
            "Expected matplotlib for pictures. Install it: pip install 'simulation-bridge[report]'."
        ) from error


def smoothed_for_eyes(image: NDArray[Any], sigma: float) -> NDArray[np.float64]:
    from scipy import ndimage

    picture = np.asarray(image, dtype=np.float64)
    known = np.isfinite(picture)
    if not known.all():  # they would take their neighbours along
        picture = np.where(known, picture, np.median(picture[known]) if known.any() else 0.0)
    return np.asarray(ndimage.gaussian_filter(picture, sigma))


def with_gaps(target: NDArray[Any]) -> NDArray[np.float64]:
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
    target = with_gaps(target)
    if target.ndim == 2:
        axes = top.subplots(1, 4)
        blurred = [smoothed_for_eyes(image, 1.5) for image in (target, result.start_output, result.output)]
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


def png(image: NDArray[Any], low: float, high: float, cmap: str) -> str:
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


def convergence(result: FitResult) -> str:
    need_matplotlib()
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
    panels = sorted(np.argsort(-np.nan_to_num(moved), kind="stable")[:MOST_PANELS].tolist())
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
        words += f" Of {result.space.dimension} parameters the {MOST_PANELS} that moved most, in natural units."
    return f'{chart}<p class="soft">{words}</p>'


def curves(series: Mapping[str, NDArray[Any]]) -> str:
    need_matplotlib()
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
