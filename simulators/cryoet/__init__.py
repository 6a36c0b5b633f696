"""An embedded cryo-EM simulator: atoms to micrographs, with exact gradients to check against in its smooth mode."""

from simulators.cryoet.detector import Detector
from simulators.cryoet.files import Micrograph, Stack, read_micrograph, read_stack, write_micrograph, write_stack
from simulators.cryoet.information import CramerRao, cramer_rao
from simulators.cryoet.optics import Microscope, contrast_transfer
from simulators.cryoet.potential import projected_potential
from simulators.cryoet.simulator import PARAMETER_NAMES, CryoET, Pose
from simulators.cryoet.specimen import Specimen
from simulators.cryoet.tilt_files import write_tilt_series
from simulators.cryoet.tilt_parameters import SERIES_PARAMETER_NAMES, Particle
from simulators.cryoet.tilt_scheme import TiltScheme
from simulators.cryoet.tilt_series import TiltSeries
from simulators.cryoet.volume import Volume

__all__ = [
    "PARAMETER_NAMES",
    "SERIES_PARAMETER_NAMES",
    "CramerRao",
    "CryoET",
    "Detector",
    "Micrograph",
    "Microscope",
    "Particle",
    "Pose",
    "Specimen",
    "Stack",
    "TiltScheme",
    "TiltSeries",
    "Volume",
    "contrast_transfer",
    "cramer_rao",
    "projected_potential",
    "read_micrograph",
    "read_stack",
    "write_micrograph",
    "write_stack",
    "write_tilt_series",
]
