"""An embedded cryo-EM simulator: atoms to micrographs, with exact gradients to check against in its smooth mode."""

from simulators.cryoet.detector import Detector
from simulators.cryoet.files import Micrograph, read_micrograph, write_micrograph
from simulators.cryoet.information import CramerRao, cramer_rao
from simulators.cryoet.optics import Microscope, contrast_transfer
from simulators.cryoet.potential import projected_potential
from simulators.cryoet.simulator import PARAMETER_NAMES, CryoET, Pose
from simulators.cryoet.specimen import Specimen

__all__ = [
    "PARAMETER_NAMES",
    "CramerRao",
    "CryoET",
    "Detector",
    "Micrograph",
    "Microscope",
    "Pose",
    "Specimen",
    "contrast_transfer",
    "cramer_rao",
    "projected_potential",
    "read_micrograph",
    "write_micrograph",
]
