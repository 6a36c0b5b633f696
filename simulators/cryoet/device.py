"""Where a simulator computes: on the processor, or on a device that torch knows ("cuda", "cuda:1").

Tables that do not depend on the inputs are made on the processor, in double precision, and copied once; inputs, all
that is computed of them, and outputs stay on the device.

None of this has been run on a GPU: tests pretend one, on which images, counts, and derivatives in both directions are
those of the processor. That says what would be mixed, not what a GPU rounds differently.
"""

from __future__ import annotations

import torch

from bridge.errors import InputError
from bridge.simulator.space import ParameterSpace

CPU = torch.device("cpu")


def checked_device(owner: str, device: str | torch.device) -> torch.device:
    """The device by name, with its number, as tensors on it name it.

    Raises:
        InputError: torch does not know it, or does not have it here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f'Expected {owner}.device as "cpu", or one that torch has here ("cuda", "cuda:1"), got {device!r}: {said}'
        ) from error


def checked_theta(space: ParameterSpace, theta: object, device: torch.device) -> torch.Tensor:
    """`theta` itself, if it is (..., d), float32 or float64, and on the simulator's device.

    Raises:
        InputError: it is not.
    """
    d = space.dimension
    if not isinstance(theta, torch.Tensor) or theta.ndim == 0 or theta.shape[-1] != d:
        got = tuple(theta.shape) if isinstance(theta, torch.Tensor) else type(theta).__name__
        raise InputError(f"Expected theta as a tensor of shape (..., {d}) ({', '.join(space.names)}), got {got}.")
    if theta.dtype not in (torch.float32, torch.float64):
        raise InputError(f"Expected theta in float32 or float64, got {theta.dtype}. Convert it.")
    if theta.device != device:
        raise InputError(
            f"Expected theta on {device}, where the simulator computes, got it on {theta.device}. Move it "
            "(theta.to(...)), or give the simulator device=..."
        )
    return theta
