"""What a run leaves behind: recovered parameters (JSON), the fitted output, the picture; and progress on the terminal.

Every file is written beside its place and moved there whole, so that nothing half-written is left.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import SetupError
from bridge.files import write_whole
from bridge.fitting import FitResult, FitStep
from bridge.simulator import ParameterSpace


def _smooth_for_eyes(image: NDArray[Any], sigma: float) -> NDArray[np.float64]:
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(np.asarray(image, dtype=np.float64), sigma))


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
    target = np.asarray(target, dtype=np.float64)
    if target.ndim == 2:
        axes = top.subplots(1, 4)
        blurred = [_smooth_for_eyes(image, 1.5) for image in (target, result.start_output, result.output)]
        low, high = np.percentile(np.stack(blurred), [0.5, 99.5])
        for ax, image, name in zip(axes, blurred, ("target", "start", "fit"), strict=False):
            ax.imshow(image, cmap="gray", vmin=low, vmax=high)
            ax.set_title(f"{name} (blurred by 1.5 px to be seen)", fontsize=10)
        residual = target - result.output
        deviation = float(residual.std()) or 1.0
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


class Progress:
    """Shows a fit on the terminal: a live line where there is one, else a line now and then."""

    def __init__(self, space: ParameterSpace, steps: int, shown: bool = True) -> None:
        self._space, self._steps, self._shown = space, steps, shown
        self._live: Any = None
        self._task: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._live = Bar(
                TextColumn("fit"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._task = self._live.add_task("", total=steps)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, step: FitStep) -> None:
        if not self._shown:
            return
        values = zip(self._space.parameters, step.parameters, strict=True)
        text = f"loss {step.loss:.5g}  " + "  ".join(f"{p.name} {v:.4g}" for p, v in values)
        if self._live is not None:
            self._live.update(self._task, completed=step.step + 1, description=text)
        elif step.step % max(1, self._steps // 15) == 0:
            print(f"step {step.step:4d}/{self._steps}  {text}", file=sys.stderr, flush=True)


def summary(result: FitResult) -> str:
    """The recovered parameters as a table in plain text."""
    lines = [f"{'parameter':<24}{'recovered':>14}{'std. error':>12}{'start':>12}  unit"]
    for i, p in enumerate(result.space.parameters):
        error = "-" if result.standard_error is None else f"{result.standard_error[i]:.2g}"
        lines.append(f"{p.name:<24}{result.parameters[i]:>14.6g}{error:>12}{result.start[i]:>12.6g}  {p.unit}")
    lines.append(
        f"{result.stop_reason} after {len(result.history)} steps, {result.num_evaluations} simulations, "
        f"{result.wall_s:.1f} s"
    )
    return "\n".join(lines)
