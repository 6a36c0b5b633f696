"""An embedded cryo-EM simulator: atoms to micrographs, with exact gradients to check against in its smooth mode."""

from simulators.cryoet.formats.micrographs import (
    Micrograph,
    Stack,
    read_micrograph,
    read_stack,
    write_micrograph,
    write_stack,
)
from simulators.cryoet.information import CramerRao, cramer_rao
from simulators.cryoet.microscope.detector import Detector
from simulators.cryoet.microscope.optics import Microscope, contrast_transfer, frequencies, transfer_function
from simulators.cryoet.microscope.physics import focal_spread_angstrom, interaction_constant, wavelength_angstrom
from simulators.cryoet.parameters import PARAMETER_NAMES, Pose
from simulators.cryoet.simulator import CryoET
from simulators.cryoet.specimen.deformation import Deformation, Domain, elastic_modes
from simulators.cryoet.specimen.maps import DensityMap
from simulators.cryoet.specimen.potential import add_linear, displaced_voxels, ice_potential, projected_potential
from simulators.cryoet.specimen.specimen import Residues, Specimen
from simulators.cryoet.specimen.volume import Volume
from simulators.cryoet.temsim.optics import Optics, Sample
from simulators.cryoet.temsim.potential import read_structure
from simulators.cryoet.temsim.simulator import TEMSIM_PARAMETER_NAMES, Camera, Placement, TEMSim, counted
from simulators.cryoet.tilt.parameters import SERIES_PARAMETER_NAMES, Particle
from simulators.cryoet.tilt.read import RecordedSeries, read_tilt_series
from simulators.cryoet.tilt.relion import RelionSeries, read_relion_series
from simulators.cryoet.tilt.relion_particles import RelionParticles, read_relion_particles
from simulators.cryoet.tilt.scheme import TiltScheme
from simulators.cryoet.tilt.series import TiltSeries
from simulators.cryoet.tilt.write import write_tilt_series

__all__ = [
    "PARAMETER_NAMES",
    "SERIES_PARAMETER_NAMES",
    "TEMSIM_PARAMETER_NAMES",
    "Camera",
    "CramerRao",
    "CryoET",
    "Deformation",
    "DensityMap",
    "Detector",
    "Domain",
    "Micrograph",
    "Microscope",
    "Optics",
    "Particle",
    "Placement",
    "Pose",
    "RecordedSeries",
    "RelionParticles",
    "RelionSeries",
    "Residues",
    "Sample",
    "Specimen",
    "Stack",
    "TEMSim",
    "TiltScheme",
    "TiltSeries",
    "Volume",
    "add_linear",
    "contrast_transfer",
    "counted",
    "cramer_rao",
    "displaced_voxels",
    "elastic_modes",
    "focal_spread_angstrom",
    "frequencies",
    "ice_potential",
    "interaction_constant",
    "projected_potential",
    "read_micrograph",
    "read_relion_particles",
    "read_relion_series",
    "read_stack",
    "read_structure",
    "read_tilt_series",
    "transfer_function",
    "wavelength_angstrom",
    "write_micrograph",
    "write_stack",
    "write_tilt_series",
]
