"""Where simulators compute: all on one device, the same images and derivatives on each, and noise from one stream.

Without a GPU a device is pretended: tensors that say that they are on "lazy:0", compute on the processor, and refuse
others of more than one number. It shows what would be mixed, not what a GPU would round differently. Where there is a
GPU the same tests run on it (`-m gpu`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bridge.errors import InputError
from simulators.cryoet import (
    CryoET,
    Deformation,
    DensityMap,
    Detector,
    Particle,
    Specimen,
    TEMSim,
    TiltScheme,
    TiltSeries,
)

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

FAR = torch.device("lazy:0")
SEEDS = np.array([3], dtype=np.uint64)


class Far(torch.Tensor):
    """A tensor that says it is elsewhere."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> Far:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=FAR, storage_offset=here.storage_offset()
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


# torch has tensors that are conjugate, negative or nought by a mark alone, and looks at it before it dispatches to a
# wrapper, which has no mark. Products with a conjugate, as backward has them, would be those without, and the noughts
# of forward derivatives have no memory. So these are computed at once.
AT_ONCE = {
    torch.ops.aten._conj.default: torch.ops.aten._conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
    torch.ops.aten._efficientzerotensor.default: torch.ops.aten.zeros.default,
}


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    func = AT_ONCE.get(func, func)
    leaves, target = tree_leaves((args, kwargs)), kwargs.get("device")
    far = any(isinstance(x, Far) for x in leaves)
    if far and func is not torch.ops.aten._to_copy.default:
        mixed = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Far) and x.ndim > 0]
        if mixed:
            raise RuntimeError(f"{func}: tensors on {FAR} and on {mixed[0].device}")
    if target is not None:
        far, kwargs = torch.device(target) == FAR, {**kwargs, "device": torch.device("cpu")}
    given = tree_map(lambda x: x.here if isinstance(x, Far) else x, (args, kwargs))
    out = func(*given[0], **given[1])
    if isinstance(args[0] if args else None, Far) and func._schema.name.endswith("_"):
        return args[0]
    return tree_map(lambda x: Far(x) if isinstance(x, torch.Tensor) else x, out) if far else out


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with Elsewhere() if request.param == "pretended" else nullcontext():
        yield str(FAR) if request.param == "pretended" else "cuda"


def beads() -> Specimen:
    places = np.random.default_rng(1).uniform(-20, 20, (20, 3))
    return Specimen.from_atoms(places, [6] * 20, weights=60.0, b_factors=200.0)


def cloud() -> DensityMap:
    z, y, x = np.mgrid[-6:7, -6:7, -6:7]
    return DensityMap(6.0 * np.exp(-0.1 * x**2 - 0.05 * (y - 1) ** 2 - 0.08 * z**2), (4.0,) * 3, (-24.0,) * 3)


def micrograph(device: str, mode: str, **changes: Any) -> CryoET:
    names = ("defocus_um", "x_angstrom", "rotation_deg", "astigmatism_um")
    settings = dict(
        shape=(24, 28),
        pixel_size_angstrom=4.0,
        parameters=names,
        mode=mode,
        margin_pixels=8,
        detector=Detector(mtf=0.4, dead_pixel_fraction=0.01, gain=50.0),
        device=device,
    )
    return CryoET(**{"specimen": beads(), **settings, **changes})


def tilts(device: str, mode: str, **changes: Any) -> TiltSeries:
    names = ("defocus_um", "z_angstrom[0]", "shift_x_angstrom[1]", "tilt_axis_deg")
    particles = [Particle(beads(), -20.0, 5.0, 0.0, 10.0, 20.0, 30.0), Particle(beads(), 30.0, -8.0, 40.0)]
    settings = dict(
        scheme=TiltScheme((-30.0, 20.0), (1, 0)),
        shape=(24, 24),
        pixel_size_angstrom=6.0,
        parameters=names,
        mode=mode,
        margin_pixels=8,
        detector=Detector(gain=50.0),
        device=device,
    )
    return TiltSeries(particles, **{**settings, **changes})


BENT = dict(deformation=Deformation(1, 30.0), parameters=("mode_angstrom[0]", "defocus_um"))
CASES = [(make, mode, {}) for make in (micrograph, tilts) for mode in ("smooth", "hard")]
CASES += [(make, "smooth", BENT) for make in (micrograph, tilts)]
TILTED = dict(parameters=("x_tilt_deg", "y_tilt_deg", "x_angstrom"))
SMOOTH = [(make, {}) for make in (micrograph, tilts)] + [(make, BENT) for make in (micrograph, tilts)]
SMOOTH += [(micrograph, TILTED), (micrograph, dict(specimen=cloud(), **TILTED))]
CASES += [(micrograph, "smooth", changes) for _, changes in SMOOTH[-2:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "mode", "changes"), CASES)
def test_images_are_the_same_and_stay_there(
    device: str, make: Any, mode: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    here, there = make("cpu", mode, **changes), make(device, mode, **changes)
    theta = torch.from_numpy(here.reference).to(dtype)
    expected, image = here.image(theta), there.image(theta.to(there.device))
    assert image.device == there.device != expected.device
    assert image.dtype == dtype
    error = (image.cpu() - expected).abs().max() / (expected.max() - expected.min())
    assert float(error) < 1e-4 + (0.02 if mode == "hard" else 0.0)  # a count may round the other way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("make", "changes"), SMOOTH)
def test_gradients_are_the_same_and_stay_there(
    device: str, make: Any, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    gradients = []
    for where in ("cpu", device):
        sim = make(where, "smooth", **changes)
        theta = torch.from_numpy(sim.reference).to(sim.device, dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(sim.image(theta).square().sum(), theta)
        assert gradient.device == sim.device
        assert gradient.dtype == dtype
        gradients.append(gradient.cpu() * torch.from_numpy(sim.space.natural_scale))
    there, here = gradients[1], gradients[0]
    assert (here != 0).all()
    # A GPU rounds, and adds up, in another way.
    error = 1e-3 if dtype == torch.float32 else 1e-4
    assert float((there - here).abs().max() / here.abs().max()) < (error if device == "cuda" else 1e-12)


@pytest.mark.parametrize(("make", "changes"), SMOOTH)
def test_forward_derivatives_are_the_same_and_stay_there(device: str, make: Any, changes: dict[str, Any]) -> None:
    derivatives = []
    for where in ("cpu", device):
        sim = make(where, "smooth", **changes)
        theta, along = (torch.from_numpy(v).to(sim.device) for v in (sim.reference, sim.space.natural_scale))
        with forward_ad.dual_level():
            _, derivative = forward_ad.unpack_dual(sim.image(forward_ad.make_dual(theta, along)))
        assert derivative.device == sim.device
        derivatives.append(derivative.cpu())
    there, here = derivatives[1], derivatives[0]
    assert float((there - here).abs().max() / here.abs().max()) < (1e-4 if device == "cuda" else 1e-12)


@pytest.mark.parametrize("mode", ["smooth", "hard"])
@pytest.mark.parametrize("make", [micrograph, tilts])
def test_counted_electrons_are_those_of_the_seed(device: str, make: Any, mode: str) -> None:
    here, there = (make(where, mode, noise="full") for where in ("cpu", device))
    expected, counts = here(here.reference[None], SEEDS), there(there.reference[None], SEEDS)
    assert isinstance(counts, np.ndarray)
    # One electron more or less where rates differ in their last digits.
    assert (np.abs(counts - expected) > 1.0).mean() < 1e-3
    assert not np.array_equal(counts, there(there.reference[None], SEEDS + np.uint64(1)))


def test_temsim(device: str) -> None:
    here = TEMSim(Specimen.helix(7), shape=(32, 32))
    for noise in ("none", "full"):
        expected, counts = (
            sim(sim.reference[None], SEEDS) for sim in (here.replace(noise=noise, device=at) for at in ("cpu", device))
        )
        assert np.abs(counts / expected - 1).max() < 1e-4


def test_the_pretence_conjugates_and_can_fail() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    with Elsewhere():
        there = z.to(FAR)
        assert torch.equal((there * there.conj()).cpu(), z * z.conj())
        assert torch.equal((there.conj().imag + there.real).cpu(), z.real - z.imag)
        with pytest.raises(RuntimeError, match="on lazy:0 and on cpu"):
            torch.ones(2, device=FAR) + torch.ones(2)


def test_tensors_elsewhere_and_devices_that_are_not_there() -> None:
    with Elsewhere():
        sim = micrograph(str(FAR), "smooth")
        with pytest.raises(InputError, match=r"theta on lazy:0.*got it on cpu"):
            sim.image(torch.from_numpy(sim.reference))
    for make in (micrograph, tilts):
        with pytest.raises(InputError, match="device"):
            make("nowhere", "smooth")
