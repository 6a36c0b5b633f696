"""The pictures of `align_tilt_series.py --pictures FOLDER`: montage.png, thon.png and parameters.png."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from bridge import Microscope, cryoet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]


def draw(
    scheme: tuple[float, ...],
    pixel: float,
    optics: Microscope,
    arrays: dict[str, Array],
    models: dict[str, Array],
    folder: Path,
) -> None:
    """Draws all three.

    Args:
        scheme: tilt of each image [degree].
        pixel: [angstrom].
        optics: the microscope; its defocus is each image's own.
        arrays: target (images, rows, columns); true, first, columns, with prior, bound, bound_prior (d,).
        models: the simulator's images at "first" and "columns".
        folder: made if missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    n = len(scheme)
    some = [round(k * (n - 1) / 4) for k in range(5)]

    figure, axes = plt.subplots(5, 4, figsize=(10, 12.5), layout="constrained")
    for line, t in zip(axes, some, strict=True):
        image = arrays["target"][t]
        gain = _gain(models["columns"][t], image)
        fitted = {name: image.mean() + gain * (model[t] - model[t].mean()) for name, model in models.items()}
        shown = [image, fitted["first"], fitted["columns"], image - fitted["columns"]]
        titles = ("image", "model before", "model after", "image less model after")
        width = 3 * float(_smoothed(image).std())
        for axis, picture, title in zip(line, shown, titles, strict=True):
            level = 0.0 if title.startswith("image less") else float(image.mean())
            axis.imshow(_smoothed(picture), cmap="gray", vmin=level - width, vmax=level + width)
            axis.set_xticks([])
            axis.set_yticks([])
            if t == some[0]:
                axis.set_title(title)
        line[0].set_ylabel(f"{scheme[t]:.0f} degrees")
    figure.suptitle("Five of the images, blurred by 10 angstrom to be seen")
    figure.savefig(folder / "montage.png", dpi=70)
    plt.close(figure)

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, t in zip(axes, (some[1], some[2], some[3]), strict=True):
        _thon(axis, arrays, models, t, pixel, optics)
        axis.set_title(f"{scheme[t]:.0f} degrees")
    axes[0].set_ylabel("power above the noise's")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "thon.png", dpi=90)
    plt.close(figure)

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    rows = ((0, 0.1, "x [nm]"), (1, 0.1, "y [nm]"), (2, 1e3, "defocus [nm]"))
    for axis, (kind, factor, label) in zip(axes.flat, rows, strict=False):
        part = slice(kind * n, (kind + 1) * n)
        _errors(axis, scheme, factor * (arrays["columns"] - arrays["true"])[part], factor * arrays["bound"][part])
        axis.set_ylabel(f"error in {label}")
    last, part = axes.flat[3], slice(2 * n, 3 * n)
    _errors(last, scheme, 1e3 * (arrays["with prior"] - arrays["true"])[part], 1e3 * arrays["bound_prior"][part])
    last.set_ylabel("error in defocus [nm]")
    last.set_title("defocus believed to be smooth over tilts", fontsize=10)
    last.set_ylim(axes.flat[2].get_ylim())
    for axis in axes[1]:
        axis.set_xlabel("tilt [degree]")
    figure.suptitle(
        f"Errors after the fit; bars: Cramer-Rao bounds. Tilt axis: "
        f"{arrays['columns'][3 * n] - arrays['true'][3 * n]:+.3f} (bound {arrays['bound'][3 * n]:.3f}) degrees"
    )
    figure.savefig(folder / "parameters.png", dpi=80)
    plt.close(figure)


def _smoothed(image: Array) -> Array:
    return scipy.ndimage.gaussian_filter(image, 2.0)


def _gain(model: Array, image: Array) -> float:
    contrast = model - model.mean()
    return float((contrast * image).sum() / (contrast * contrast).sum())


def _errors(axis: Axes, scheme: tuple[float, ...], error: Array, bound: Array) -> None:
    axis.errorbar(scheme, error, bound, fmt="o", markersize=3, linewidth=1)
    axis.axhline(0.0, color="0.7", linewidth=0.8)


def radial(values: Array, q: Array, edges: Array) -> Array:
    """Means over rings."""
    index = np.digitize(q.ravel(), edges) - 1
    good = (index >= 0) & (index < len(edges) - 1)
    sums = np.bincount(index[good], values.ravel()[good], len(edges) - 1)
    return sums / np.maximum(np.bincount(index[good], minlength=len(edges) - 1), 1)


def _thon(
    axis: Axes, arrays: dict[str, Array], models: dict[str, Array], t: int, pixel: float, optics: Microscope
) -> None:
    """Radial power of an image where the specimen is, above its noise, and of the model before and after the fit."""
    image = arrays["target"][t]
    q = np.hypot(np.fft.fftfreq(image.shape[0], pixel)[:, None], np.fft.fftfreq(image.shape[1], pixel)[None, :])
    edges = np.linspace(0.006, 0.062, 40)
    middle = 0.5 * (edges[1:] + edges[:-1])
    gain = _gain(models["columns"][t], image)
    seen, error = _power(image, models["columns"][t], edges, q)
    # Electrons' noise is white; its power in a pixel is their mean.
    axis.errorbar(
        middle, seen / image.mean() - 1, error / image.mean(), fmt=".", color="k", label="image", linewidth=0.8
    )
    for name, style, label in (("first", ":", "model before"), ("columns", "-", "model after")):
        power, _ = _power(gain * models[name][t], models[name][t], edges, q)
        axis.plot(middle, power / image.mean(), style, label=label)
    n = len(arrays["target"])
    top = axis.get_ylim()[1]
    for name, style, label in (("first", ":", "before"), ("columns", "-", "after")):
        own = replace(optics, defocus_um=float(arrays[name][2 * n + t]))
        ctf = radial(cryoet.contrast_transfer(own, image.shape, pixel).numpy() ** 2, q, edges)  # type: ignore[arg-type]
        axis.plot(middle, 0.25 * top * ctf, style, color="0.6", label=f"CTF^2 {label}, scaled")
    axis.set_xlabel("spatial frequency [1/angstrom]")


def _power(image: Array, model: Array, edges: Array, q: Array) -> tuple[Array, Array]:
    """Radial power, and its standard error, in a window around what the model shows."""
    window = scipy.ndimage.gaussian_filter(np.abs(model - np.median(model)), 6.0)
    window = scipy.ndimage.gaussian_filter(np.clip(window / window.max(), 0.0, 0.2), 3.0)
    level = (image * window).sum() / window.sum()
    power = np.abs(np.fft.fft2((image - level) * window)) ** 2 / (window**2).sum()
    # So many pixels of a ring are independent: the window's share of the image, half of which mirrors the other.
    share = float((window**2).sum() ** 2 / (window**4).sum()) / image.size
    number = np.maximum(np.histogram(q.ravel(), edges)[0] * share / 2, 1)
    found = radial(power, q, edges)
    return found, found / np.sqrt(number)
