"""Pictures of `pose_of_a_teapot.py`: target, start, fit and difference, and the way from one to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def draw(fits: list[tuple[Any, Array]], path: Path) -> None:
    """A row for each (task, pose found): target, start, fit and difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(fits), 4, figsize=(6, 1.55 * len(fits) + 0.2), squeeze=False)
    for line, (task, pose) in zip(axes, fits, strict=True):
        start, fit = task.render(np.array([task.start, pose]))
        images = (task.target, start, fit, fit - task.target)
        for axis, image, lowest in zip(line, images, (0, 0, 0, -1), strict=True):
            axis.imshow(image, cmap="RdBu" if lowest else "gray", vmin=lowest, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        line[1].set_xlabel(f"off by {off_deg(task.start):.0f} deg", fontsize=8)
        line[2].set_xlabel(f"off by {off_deg(pose):.2f} deg", fontsize=8)
        line[3].set_xlabel(f"pixels that differ: {np.abs(images[3]).sum():.0f}", fontsize=8)
    for axis, title in zip(axes[0], ("target", "start", "fit", "fit - target"), strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def animate(tasks: list[Any], path: Path, zoom: int = 2) -> None:
    """A GIF with a row for each task, and a frame for each pose of its path: target, current pose, difference.

    In the difference, blue is missing and red too much.
    """
    from PIL import Image, ImageDraw

    side, gap, head = 64 * zoom, 6, 14
    frames = []
    for number in range(max(len(task.path) for task in tasks)):
        frame = Image.new("RGB", (3 * (side + gap) + gap, len(tasks) * (side + head + gap)), "white")
        pen = ImageDraw.Draw(frame)
        for row, task in enumerate(tasks):
            pose = task.path[min(number, len(task.path) - 1)]
            image, top = task.render(pose[None])[0], row * (side + head + gap)
            more = np.clip(image - task.target, -1, 1)
            difference = np.stack([1 + np.minimum(more, 0), 1 - abs(more), 1 - np.maximum(more, 0)], axis=-1)
            texts = ("target", f"off by {off_deg(pose):.1f} deg", "difference")
            for column, (shown, text) in enumerate(zip((task.target, image, difference), texts, strict=True)):
                left = gap + column * (side + gap)
                pen.text((left, top + 1), text, fill="black")
                tile = Image.fromarray((255 * np.clip(shown, 0, 1)).astype(np.uint8)).convert("RGB")
                frame.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, top + head))
        frames.append(frame.quantize(32))
    lasts = [900] + [180] * (len(frames) - 2) + [2500]  # [ms]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=lasts, loop=0, optimize=True)


def off_deg(pose: Array) -> float:
    """sqrt(el^2 + az^2) of a pose in the order of "turntable-log"."""
    return float(np.hypot(pose[1], pose[2]))
