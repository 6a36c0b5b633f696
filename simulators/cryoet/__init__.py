"""An embedded cryo-EM simulator: atoms to micrographs, with exact gradients to check against in its smooth mode."""

from simulators.cryoet.deformation import Deformation, Domain, elastic_modes
from simulators.cryoet.detector import Detector
from simulators.cryoet.files import Micrograph, Stack, read_micrograph, read_stack, write_micrograph, write_stack
from simulators.cryoet.information import CramerRao, cramer_rao
from simulators.cryoet.maps import DensityMap
from simulators.cryoet.optics import Microscope, contrast_transfer
from simulators.cryoet.parameters import PARAMETER_NAMES, Pose
from simulators.cryoet.potential import projected_potential
from simulators.cryoet.relion import RelionSeries, read_relion_series
from simulators.cryoet.relion_particles import RelionParticles, read_relion_particles
from simulators.cryoet.simulator import CryoET
from simulators.cryoet.specimen import Residues, Specimen
from simulators.cryoet.temsim import TEMSIM_PARAMETER_NAMES, Camera, Placement, TEMSim, counted
from simulators.cryoet.temsim_optics import Optics, Sample
from simulators.cryoet.temsim_potential import read_structure
from simulators.cryoet.tilt_files import RecordedSeries, read_tilt_series, write_tilt_series
from simulators.cryoet.tilt_parameters import SERIES_PARAMETER_NAMES, Particle
from simulators.cryoet.tilt_scheme import TiltScheme
from simulators.cryoet.tilt_series import TiltSeries
from simulators.cryoet.volume import Volume

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
    "contrast_transfer",
    "counted",
    "cramer_rao",
    "elastic_modes",
    "projected_potential",
    "read_micrograph",
    "read_relion_particles",
    "read_relion_series",
    "read_stack",
    "read_structure",
    "read_tilt_series",
    "write_micrograph",
    "write_stack",
    "write_tilt_series",
]
