"""The volumes of a tilt series' particles: each structure is built once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from bridge.errors import InputError
from simulators.cryoet.specimen.deformation import Deformation
from simulators.cryoet.specimen.specimen import Specimen
from simulators.cryoet.specimen.volume import Volume, VolumeBuilder
from simulators.cryoet.tilt.parameters import Particle

# How many volumes of varied structures are kept.
_STRUCTURES = 4


@dataclass(frozen=True, eq=False)
class ParticleVolumes:
    """Builds volumes and keeps them.

    Args:
        particles: of the series.
        pixel_size_angstrom: of the images [angstrom].
        hard_solvent: see `Volume.build`.
        deformation: how the structure of the particles `deformed` may deform, all alike.
        deformed: indices of these particles, which are of one specimen.
        largest: of each of the deformation's parameters, its largest size; there is room for that.
        device: of the derivatives.
    """

    particles: Sequence[Particle]
    pixel_size_angstrom: float
    hard_solvent: bool
    deformation: Deformation
    deformed: tuple[int, ...]
    largest: Mapping[str, float]
    device: torch.device
    _volumes: dict[tuple[str, tuple[float, ...]], Volume] = field(default_factory=dict, init=False, repr=False)
    _builder: list[VolumeBuilder] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.deformation.values:
            specimens = {self._specimen(i).digest for i in self.deformed}
            if len(specimens) != 1:
                raise InputError(
                    f"Expected deformed particles of one specimen, got {len(specimens)}. Give deformed=[...], the "
                    "numbers of those that deform alike."
                )
            self.deformation.of(self._specimen(self.deformed[0]))  # what is wrong with it is said now

    def _specimen(self, particle: int) -> Specimen:
        return cast(Specimen, self.particles[particle].specimen)

    def of(self, values: Mapping[str, float | torch.Tensor], *, differentiable: bool) -> list[Volume]:
        """The volume of each particle at values of the deformation's parameters, by name.

        Args:
            values: numbers, or 0-d tensors.
            differentiable: in these; then the varied structure's volume is built anew.
        """
        found: dict[tuple[str, tuple[float, ...]], Volume] = {}
        volumes = []
        for i in range(len(self.particles)):
            bent = i in self.deformed and bool(self.deformation.values)
            at = tuple(float(values[name]) for name in self.deformation.values) if bent and not differentiable else ()
            key = (f"bent {self._specimen(i).digest}" if bent else self._specimen(i).digest), at
            if key not in found:
                found[key] = self._moved(values) if bent and differentiable else self._kept(key, i, bent)
            volumes.append(found[key])
        return volumes

    def _moved(self, values: Mapping[str, float | torch.Tensor]) -> Volume:
        motion = self.deformation.of(self._specimen(self.deformed[0]))
        return self._made().differentiable(motion.positions(values, self.device))

    def _kept(self, key: tuple[str, tuple[float, ...]], particle: int, bent: bool) -> Volume:
        if key not in self._volumes:
            specimen = self._specimen(particle)
            if bent:
                for old in [k for k in self._volumes if k[0] == key[0]][: 1 - _STRUCTURES]:
                    del self._volumes[old]
                values = dict(zip(self.deformation.values, key[1], strict=True))
                with torch.no_grad():
                    self._volumes[key] = self._made().build(self.deformation.of(specimen).positions(values).numpy())
            else:
                pixel, hard = self.pixel_size_angstrom, self.hard_solvent
                self._volumes[key] = Volume.build(specimen, pixel, hard_solvent=hard)
        return self._volumes[key]

    def _made(self) -> VolumeBuilder:
        if not self._builder:
            specimen = self._specimen(self.deformed[0])
            away = np.linalg.norm(specimen.positions, axis=1) + self.deformation.of(specimen).farthest(self.largest)
            builder = VolumeBuilder(specimen, self.pixel_size_angstrom, self.hard_solvent, float(away.max()))
            self._builder.append(builder)
        return self._builder[0]
