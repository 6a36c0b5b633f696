"""Trains a network that reads an object's pose off an image, through the renderer and without a single label.

    python examples/pose_network.py                                            # a minute of one core
    python examples/pose_network.py --methods smoothing evolution separable-cma supervised --picture curve.png
    mpirun -n 2 python examples/pose_network.py                                # ranks share the renders of smoothing

A small convolutional network, 13,156 weights, maps a shaded image of the teapot to its pose: a rotation vector of up to
40 degrees, uniform in the ball, and a shift of up to 0.6 radii along the line of sight, at four radii. It is trained on
images alone: the pose that it says is rendered, and the loss is the squared difference between that image and the one
that it was shown. The renderer cannot be differentiated; `bridge.smooth` stands in its place, a batch of poses at a
time: 16 images a step, and 8 renders for each, pairs along as many orthogonal directions as a pose has numbers.

256 images that are never trained on tell how good it is: the angle between true and found orientation, and the distance
between true and found position.

"smoothing" trains by backpropagation through the smoothed renderer. "evolution" (the evolution strategy of Salimans et
al.: pairs of perturbations of all weights, ranked losses, Adam) and "separable-cma" search the weights with the same
loss and the same number of renders; CMA-ES with a full covariance would need a matrix of 173 million numbers.
"supervised" is told the true poses of the images that "smoothing" sees: a bound.

References: arXiv 2410.08125; Salimans, Ho, Chen, Sidor, Sutskever, arXiv 1703.03864; Ros and Hansen, PPSN X (2008).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import bridge
from bridge import PyrenderSimulator, RasterSimulator, pose_metrics, teapot

Array = NDArray[np.float64]

SIZE, POOL = 48, 3  # pixels, and pixels of a block whose mean is seen
REACH = np.array([40.0, 40.0, 40.0, 0.6])  # of the rotation vector [deg] and the shift [radii]
BATCH = 16  # images a step
SAMPLES = 8  # renders an image
SCALES = (1.0, 0.3)  # of the smoothing, first and last [natural units: 10 deg, 0.4 radii]
RATE = 6e-3  # of Adam, at first; it falls to 0 as a cosine
HELD_OUT, LOOKS = 256, 20  # images that are never trained on, and how often they are looked at


class Camera:
    """The renderer: poses to brightnesses in blocks of pixels; a `bridge.Simulator`."""

    row_by_row = True
    output_shape = (1, SIZE // POOL, SIZE // POOL)

    def __init__(self, backend: str) -> None:
        kind = {"raster": RasterSimulator, "pyrender": PyrenderSimulator}[backend]
        lamp = {"light_azimuth_deg": 40.0, "light_elevation_deg": 30.0}
        self.simulator = kind(
            teapot(3),
            size=(SIZE, SIZE),
            outputs="rgb",
            camera="se3",
            lens=18.0,
            colour=(1, 1, 1),
            fixed={"shift_x": 0.0, "shift_y": 0.0, **lamp},
        )
        self.space = self.simulator.space

    def sharp(self, rows: Array) -> NDArray[np.float32]:
        """(k, 48, 48) brightnesses of (k, 4) poses."""
        return self.simulator(rows, np.zeros(len(rows), np.uint64))[:, 0]

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        images = self.sharp(inputs)
        total = sum(images[:, i::POOL, j::POOL] for i in range(POOL) for j in range(POOL))
        return np.asarray(total, dtype=np.float32)[:, None] / np.float32(POOL**2)

    def images(self, rows: Array) -> torch.Tensor:
        return torch.from_numpy(self(rows, np.zeros(len(rows), np.uint64)))


def draw_poses(key: list[int], count: int) -> Array:
    """(count, 4): rotation vectors uniform in a ball [deg], and shifts [radii]."""
    rng = np.random.default_rng([19, *key])
    vector = rng.normal(size=(count, 3))
    vector *= (rng.uniform(size=count) ** (1 / 3) / np.linalg.norm(vector, axis=1))[:, None]
    return REACH * np.concatenate([vector, rng.uniform(-1, 1, (count, 1))], axis=1)


def network(seed: int) -> nn.Module:
    """From (n, 1, 16, 16) to (n, 4), a pose in units of `REACH`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def read_poses(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(n, 4) float64 poses that the network reads off images."""
    poses: torch.Tensor = net(images).to(torch.float64) * torch.from_numpy(REACH)
    return poses


# --- four ways to train it ------------------------------------------------------------------------------------
# Each changes the network in place and yields, now and then, how many renders it has asked for.


def _adam(net: nn.Module, steps: int) -> tuple[Any, Any]:
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)


def smoothing(net: nn.Module, camera: Camera, seed: int, budget: int) -> Iterator[int]:
    """Backpropagation: through the smoothed renderer, and on through the network."""
    smoothed = bridge.smooth(
        camera, seed=seed, num_samples=SAMPLES, points="antithetic-orthogonal", on=bridge.Ranks(leaf_size=SAMPLES)
    )
    cost = BATCH * (1 + SAMPLES)
    steps = budget // cost
    optimiser, schedule = _adam(net, steps)
    for step in range(steps):
        images = camera.images(draw_poses([1, seed, step], BATCH))
        scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** (step / steps)
        rendered = smoothed(read_poses(net, images), step=step, scale=scale)
        optimiser.zero_grad()
        ((rendered - images) ** 2).mean().backward()
        optimiser.step()
        schedule.step()
        yield (step + 1) * cost


def supervised(net: nn.Module, camera: Camera, seed: int, budget: int) -> Iterator[int]:
    """The same images, and told their poses."""
    cost = BATCH * (1 + SAMPLES)  # as if they cost what they cost "smoothing"
    steps = budget // cost
    optimiser, schedule = _adam(net, steps)
    for step in range(steps):
        poses = draw_poses([1, seed, step], BATCH)
        found = read_poses(net, camera.images(poses))
        optimiser.zero_grad()
        (((found - torch.from_numpy(poses)) / torch.from_numpy(REACH)) ** 2).mean().backward()
        optimiser.step()
        schedule.step()
        yield (step + 1) * cost


def losses_of(vectors: list[Array], net: nn.Module, camera: Camera, images: torch.Tensor) -> Array:
    """Loss of each vector of weights on a batch of images, with the renderer as it is."""
    with torch.no_grad():
        found = []
        for vector in vectors:
            vector_to_parameters(torch.from_numpy(vector).float(), net.parameters())
            found.append(read_poses(net, images).numpy())
        rendered = camera.images(np.clip(np.concatenate(found), camera.space.lower, camera.space.upper))
        squared = (rendered.reshape(len(vectors), *images.shape) - images) ** 2
        return squared.mean(dim=(1, 2, 3, 4)).double().numpy()


@dataclass(frozen=True)
class Evolution:
    """Settings of a search in the weights: vectors of weights in a generation, images of each, first step, rate."""

    population: int
    batch: int
    sigma: float
    rate: float = 0.0


STRATEGY, CMA = Evolution(32, 8, 0.03, 0.01), Evolution(32, 8, 0.1)  # the best of four and of three


def evolution(net: nn.Module, camera: Camera, seed: int, budget: int) -> Iterator[int]:
    """Salimans et al.: the gradient of the loss smoothed over all weights, from pairs and ranks; Adam."""
    settings, rng = STRATEGY, np.random.default_rng([23, seed])
    mean = parameters_to_vector(net.parameters()).detach().double().requires_grad_()
    cost = settings.batch * (1 + settings.population)
    optimiser = torch.optim.Adam([mean], lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, budget // cost)
    for step in range(budget // cost):
        images = camera.images(draw_poses([1, seed, step], settings.batch))
        noise = rng.normal(size=(settings.population // 2, len(mean)))
        noise = np.concatenate([noise, -noise])
        centre = mean.detach().numpy()
        losses = losses_of(list(centre + settings.sigma * noise), net, camera, images)
        ranks = losses.argsort().argsort() / (len(losses) - 1) - 0.5
        mean.grad = torch.from_numpy(ranks @ noise / (len(losses) * settings.sigma))
        optimiser.step()
        schedule.step()
        vector_to_parameters(mean.detach().float(), net.parameters())
        yield (step + 1) * cost


def separable_cma(net: nn.Module, camera: Camera, seed: int, budget: int) -> Iterator[int]:
    """CMA-ES with a diagonal covariance; each generation is told its losses on images of its own."""
    import cma

    settings = CMA
    options = {
        "popsize": settings.population,
        "CMA_diagonal": True,
        "seed": seed + 1,
        "verbose": -9,
        "tolfun": 0.0,
        "tolflatfitness": 10**9,
        "tolstagnation": 10**9,
    }
    search = cma.CMAEvolutionStrategy(parameters_to_vector(net.parameters()).tolist(), settings.sigma, options)
    cost = settings.batch * (1 + settings.population)
    for step in range(budget // cost):
        images = camera.images(draw_poses([1, seed, step], settings.batch))
        asked = search.ask()
        search.tell(asked, losses_of(asked, net, camera, images).tolist())
        vector_to_parameters(torch.from_numpy(search.mean).float(), net.parameters())
        yield (step + 1) * cost


METHODS: dict[str, Callable[[nn.Module, Camera, int, int], Iterator[int]]] = {
    "smoothing": smoothing,
    "evolution": evolution,
    "separable-cma": separable_cma,
    "supervised": supervised,
}


# --- how good it is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """At the held-out images after so many renders: median and mean angle [deg], median distance [radii]."""

    renders: int
    angle_deg: float
    mean_angle_deg: float
    distance: float


@dataclass(frozen=True)
class Training:
    method: str
    seed: int
    looks: list[Look]
    before: Array  # (256, 4) poses read off the held-out images
    after: Array


def train(method: str, camera: Camera, seed: int, budget: int) -> Training:
    truth = draw_poses([0], HELD_OUT)
    images = camera.images(truth)
    net = network(seed)

    def read() -> Array:
        with torch.no_grad():
            return read_poses(net, images).numpy()

    def look(renders: int) -> Look:
        true, found = (camera.simulator.object_to_camera(rows)[:, 0] for rows in (truth, read()))
        angles, distances = pose_metrics.rotation_angle_deg(true, found), pose_metrics.translation_error(true, found)
        return Look(renders, float(np.median(angles)), float(angles.mean()), float(np.median(distances)))

    before, looks, done = read(), [look(0)], 0
    for renders in METHODS[method](net, camera, seed, budget):
        done = renders
        if renders >= len(looks) * budget / LOOKS:
            looks.append(look(renders))
    if looks[-1].renders < done:
        looks.append(look(done))
    return Training(method, seed, looks, before, read())


def summary(training: Training) -> str:
    first, last = training.looks[0], training.looks[-1]
    return (
        f"{training.method}, seed {training.seed}: median angle {first.angle_deg:.1f} -> {last.angle_deg:.1f} deg "
        f"(mean {last.mean_angle_deg:.1f}), median distance {first.distance:.3f} -> {last.distance:.3f} radii, "
        f"{last.renders:,} renders"
    )


def picture(trainings: list[Training], camera: Camera, path: Path) -> None:
    """Errors against renders; images, and what the first network says of them before and after training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = 5
    figure = pyplot.figure(figsize=(8.4, 3.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.05, 1))
    axis = left.subplots()
    for number, method in enumerate(dict.fromkeys(t.method for t in trainings)):
        for i, training in enumerate(t for t in trainings if t.method == method):
            line = ([look.renders / 1000 for look in training.looks], [look.angle_deg for look in training.looks])
            axis.plot(*line, color=f"C{number}", linewidth=1.2, label=method if i == 0 else None)
    axis.set(xlabel="renders [thousands]", ylabel="held-out median angle [deg]", ylim=(0, None))
    axis.legend(fontsize=8, ncols=2, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    rows = [draw_poses([0], HELD_OUT), trainings[0].before, trainings[0].after]
    for line, poses, name in zip(right.subplots(3, shown), rows, ("image", "before", "after"), strict=True):
        for cell, image in zip(line, camera.sharp(poses[:shown]), strict=True):
            cell.imshow(image, cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=["smoothing"])
    options.add_argument("--seeds", default="0:1", help="FIRST:END; the settings were tuned on seeds from 1000 on")
    options.add_argument("--budget", type=int, default=100_000, help="renders of a training")
    options.add_argument("--backend", choices=["raster", "pyrender"], default="raster")
    options.add_argument("--output", type=Path, help="write all curves here (JSON)")
    options.add_argument("--picture", type=Path, help="draw curves and images here (PNG)")
    arguments = options.parse_args()
    first, _, end = arguments.seeds.partition(":")
    torch.set_num_threads(1)  # on any number of ranks, so that all compute the same
    camera, trainings = Camera(arguments.backend), []
    for method in arguments.methods:
        for seed in range(int(first), int(end)):
            trainings.append(train(method, camera, seed, arguments.budget))
            if bridge.is_root():
                print(summary(trainings[-1]), flush=True)
    if not bridge.is_root():
        return
    if arguments.output:
        curves = [{"method": t.method, "seed": t.seed, "looks": [vars(look) for look in t.looks]} for t in trainings]
        arguments.output.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    if arguments.picture:
        picture(trainings, camera, arguments.picture)


if __name__ == "__main__":
    main()
