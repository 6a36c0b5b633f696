"""Two values of every argument of every registered simulator, and every kind of thing inside every kind of thing."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import json
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import bridge
from bridge.simulator.function import as_simulator
from bridge.simulator.identity import identity_of

# --- simulators ---------------------------------------------------------------------------------------------------

PDB = "ATOM      1  CA  ALA A   1       1.000   2.000   3.000  1.00 20.00           C\n"
HELIX = {"helix": True, "num_subunits": 6}
DECK: dict[str, dict[str, Any]] = {
    "sample": {"diameter": 1000, "thickness_center": 50, "thickness_edge": 150},
    "particle P": {"source": "pdb", "voxel_size": 0.1, "pdb_file_in": "one.pdb"},
    "particleset": {"particle_type": "P", "particle_coords": "file", "coord_file_in": "places.txt"},
    "geometry": {"gen_tilt_data": True, "ntilts": 1, "theta_start": 0, "theta_incr": 0, "geom_errors": "none"},
    "electronbeam": {"acc_voltage": 200, "energy_spread": 1.3, "gen_dose": True, "dose_per_im": 6000.0},
    "optics": {
        "magnification": 15000,
        "gen_defocus": True,
        "defocus_nominal": 5,
        "cs": 2,
        "cc": 2,
        "aperture": 50,
        "focal_length": 2.75,
        "cond_ap_angle": 0.1,
    },
    "detector": {
        "det_pix_x": 24,
        "det_pix_y": 16,
        "pixel_size": 15,
        "gain": 10,
        "use_quantization": True,
        "dqe": 0.4,
        "mtf_a": 0.7,
        "mtf_b": 0.2,
        "mtf_c": 0.1,
        "mtf_alpha": 10,
        "mtf_beta": 40,
    },
}
# Two values of an argument, and what else has to be said for them to mean something.
Two = tuple[Any, Any] | tuple[Any, Any, dict[str, Any]]


def files(folder: Path) -> Path:
    """Writes what the simulators read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shift in (("one", "1.000"), ("two", "1.500")):
        (folder / f"{name}.pdb").write_text(PDB.replace("1.000   2", f"{shift}   2"), encoding="utf-8")
        (folder / f"program-{name}").write_text(f"#!/bin/sh\necho {name}\n", encoding="utf-8")
        (folder / f"program-{name}").chmod(0o755)
    two = "".join(f"MODEL     {i:4d}\n{PDB.replace('3.000', f'{i}.000')}ENDMDL\n" for i in (1, 2))
    (folder / "models.pdb").write_text(two, encoding="utf-8")
    (folder / "places.txt").write_text("1 6\n1.5 -2.0 0 10 40 20\n", encoding="utf-8")
    (folder / "copies.txt").write_text("6 4\n" + 2 * "1 0 0 5\n0 1 0 0\n0 0 1 0\n", encoding="utf-8")
    other = {**DECK, "optics": {**DECK["optics"], "cs": 3}}
    for name, deck in (("deck", DECK), ("other", other)):
        lines = [f"=== {head} ===\n" + "".join(f"{k} = {_word(v)}\n" for k, v in deck[head].items()) for head in deck]
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def _word(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def arguments(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Two], dict[str, Two]]]:
    """Simulator -> what it is made with, two values of what its outputs depend on, and of what they do not."""
    import trimesh

    box, ball = trimesh.creation.box(), trimesh.creation.icosphere(1)
    scene: dict[str, Two] = {
        "mesh": (box, ball),
        "size": ((8, 8), (8, 9)),
        "outputs": (("silhouette", "depth"), ("depth", "silhouette")),
        "camera": ("turntable", "turntable-log"),
        "lens": (20.0, 25.0),
        "vary": (("camera",), ("camera", "light")),
        "fixed": ({"elevation_deg": 5.0}, {"elevation_deg": 6.0}),
        "base_pose": (np.eye(4), np.diag([-1.0, 1.0, -1.0, 1.0]), {"camera": "se3"}),
        "inside": ("render", "raise"),
        "antialias": (0, 4),
        "colour": ((0.8, 0.8, 0.8), (0.8, 0.8, 0.9), {"outputs": "rgb"}),
        "background": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.5), {"outputs": "rgb"}),
        "background_depth": (0.0, 1.0),
        "normalise": (True, False, {"mesh": ball.copy().apply_scale(3.0)}),
        "up": ("y", "z", {"mesh": trimesh.creation.box((1, 2, 3))}),
        "two_sided": (False, True),
    }
    image: dict[str, Two] = {"shape": ((16, 16), (16, 18)), "noise": ("none", "poisson")}
    bending = {"modes": 1, "cutoff_angstrom": 60.0, "mode_angstrom": [0.5]}
    no_part: dict[str, Two] = {"natural_scale": (None, {"defocus_um": 0.3}), "device": ("cpu", "meta")}
    atoms = {"positions": [[0.0, 0.0, 0.0], [1.0, 0.0, 2.0]], "numbers": [6, 8]}
    return {
        "raster": ({"mesh": box, "size": (8, 8)}, scene, {}),
        "pyrender": (
            {"mesh": box, "size": (8, 8)},
            scene | {"shading": ("lambert", "pbr"), "platform": ("egl", "osmesa")},
            {"device": (None, 1)},
        ),
        "cryoet": (
            {"specimen": HELIX, "shape": (16, 16)},
            image
            | {
                "specimen": (HELIX, HELIX | {"num_subunits": 7}),
                "pixel_size_angstrom": (3.0, 3.5),
                "microscope": ({}, {"cs_mm": 2.0}),
                "detector": ({}, {"gain": 2.0}),
                "parameters": (("defocus_um",), ("x_angstrom",)),
                "bounds": ({"defocus_um": (0.0, 0.001)}, {"defocus_um": (0.0, 5.0)}),
                "mode": ("hard", "smooth"),
                "pose": ({}, {"rotation_deg": 3.0}),
                "deformation": ({}, bending),
                "margin_pixels": (3, 12),
            },
            no_part,
        ),
        "cryoet-tilt-series": (
            {"particles": [{"specimen": HELIX}] * 2, "scheme": {"uniform": [-2, 2, 2]}, "shape": (16, 16)},
            image
            | {
                "particles": ([{"specimen": HELIX}], [{"specimen": HELIX, "x_angstrom": 1.0}]),
                "scheme": ({"uniform": [-2, 2, 2]}, {"uniform": [2, -2, -2]}),
                "pixel_size_angstrom": (8.0, 8.5),
                "microscope": ({}, {"cs_mm": 2.0}),
                "detector": ({}, {"gain": 2.0}),
                "parameters": (("defocus_um",), ("tilt_axis_deg",)),
                "bounds": (
                    {"defocus_um": (0.0, 0.001)},
                    {"defocus_um": (0.0, 5.0)},
                    {"microscope": {"defocus_um": 0.0005}},
                ),
                "mode": ("hard", "smooth"),
                "tilt_axis_deg": (0.0, 1.0),
                "x_tilt_deg": (0.0, 1.0),
                "pre_tilt_deg": (0.0, 1.0),
                "thickness_angstrom": (1000.0, 900.0),
                "mean_free_path_angstrom": (3150.0, 3000.0),
                "shifts_angstrom": (None, [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]),
                "radiation_damage": (True, False),
                "margin_pixels": (3, 8),
                "deformation": ({}, bending),
                "deformed": ([0], [1], {"deformation": bending}),
            },
            no_part,
        ),
        "temsim": (
            {"particle": folder / "one.pdb", "shape": (16, 16)},
            image
            | {
                "particle": (folder / "one.pdb", folder / "two.pdb"),
                "transforms": (None, folder / "copies.txt"),
                "add_hydrogen": (True, False),
                "model": (1, 2, {"particle": folder / "models.pdb"}),
                "voxel_size_nm": (0.1, 0.2),
                "pixel_size_nm": (0.5, 0.6),
                "optics": ({}, {"cs_mm": 1.0}),
                "sample": ({}, {"thickness_center_nm": 40.0}),
                "camera": ({}, {"gain": 2.0}),
                "placement": ({}, {"x_nm": 1.0}),
                "parameters": (("x_nm",), ("y_nm",)),
            },
            {
                "bounds": (None, {"x_nm": (-1.0, 1.0)}),
                "natural_scale": (None, {"x_nm": 2.0}),
                "device": ("cpu", "meta"),
                "unknown_atoms": ("error", "skip"),  # of which there are none
            },
        ),
        "tem-simulator": (
            {"deck": folder / "deck.txt", "parameters": ("x_nm",), "binary": folder / "program-one"},
            {
                "deck": (folder / "deck.txt", folder / "other.txt"),
                "parameters": (("x_nm",), ("y_nm",)),
                "noise": ("none", "noisy"),
                "binary": (folder / "program-one", folder / "program-two"),
                "exact_imag": (False, True),
                "dialect": ("v1.3", "phase-plate"),
                "angles": ("zxz", "zyz"),
                "identity": ("one", "two"),
            },
            {
                "bounds": ({}, {"x_nm": (-1.0, 1.0)}),
                "natural_scale": ({}, {"x_nm": 2.0}),
                "timeout_s": (1.0, 2.0),
                "cache": (None, folder / "cache"),
                "build_timeout_s": (1.0, 2.0),
                "scratch": (None, folder / "scratch"),
                "keep": ("failed", "all"),
                "outside": ("clip", "raise"),
            },
        ),
        "abtem": (
            {"atoms": atoms, "shape": (16, 16)},
            image
            | {
                "atoms": (atoms, atoms | {"numbers": [6, 7]}),
                "pixel_size_angstrom": (1.0, 1.5),
                "parameters": (("defocus_um",), ("x_angstrom",)),
                "settings": ({}, {"cs_mm": 1.0}),
                "oversampling": (4, 2),
                "slice_thickness_angstrom": (2.0, 1.0),
                "parametrization": ("lobato", "kirkland"),
                "margin_pixels": (16, 8),
                "centre": (True, False),
            },
            {"bounds": ({}, {"defocus_um": (0.5, 2.0)})},
        ),
    }


def made(name: str, base: Mapping[str, Any], argument: str, two: Two, which: int) -> str:
    """The identity of a simulator with the first or the second value of an argument."""
    context = two[2] if len(two) == 3 else {}
    return identity_of(bridge.make(name, **{**base, **context, argument: two[which]}))


# --- things inside things -----------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    first: Any
    second: int = 0


@dataclasses.dataclass
class Settings:
    compared: int = 0
    hidden: Any = dataclasses.field(default=None, compare=False, repr=False)


class Plain:
    def __init__(self, content: Any) -> None:
        self.content = content

    def method(self, x: Any) -> Any:
        return x, self.content


class Slotted:
    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


class Callable_(Plain):  # noqa: N801
    def __call__(self, x: Any) -> Any:
        return x, self.content


class Net(torch.nn.Module):
    def __init__(self, content: Any) -> None:
        super().__init__()
        self.content = content


def plain(x: Any, c: Any = None, y: Any = None, *, k: Any = None) -> Any:
    return x, c, y, k


def closed(c: Any) -> Callable[..., Any]:
    return lambda x: (x, c)


def deeper(c: Any) -> Callable[..., Any]:
    def inner(x: Any) -> Any:
        return [(y, c) for y in x]

    return lambda x: inner(x)


def default(c: Any) -> Callable[..., Any]:
    def f(x: Any, c: Any = c) -> Any:
        return x, c

    return f


def keyword(c: Any) -> Callable[..., Any]:
    def f(x: Any, *, c: Any = c) -> Any:
        return x, c

    return f


def attribute(c: Any) -> Callable[..., Any]:
    def f(x: Any) -> Any:
        return x, f.c  # type: ignore[attr-defined]

    f.c = c  # type: ignore[attr-defined]
    return f


def class_attribute(c: Any) -> Any:
    class Local:
        content = c

        def __call__(self, x: Any) -> Any:
            return x, self.content

    return Local()


def method_closure(c: Any) -> Any:
    class Local:
        def __call__(self, x: Any) -> Any:
            return x, c

    return Local()


def global_variable(c: Any) -> Callable[..., Any]:
    names: dict[str, Any] = {"__name__": "__main__", "c": c}
    exec("def f(x): return x, c", names)
    return names["f"]


def of_module(c: Any) -> Callable[..., Any]:
    module = types.ModuleType("users_own")
    module.c = c  # type: ignore[attr-defined]
    names: dict[str, Any] = {"__name__": "__main__", "users_own": module}
    exec("def f(x): return x, users_own.c", names)
    return names["f"]


def wrapped(c: Any) -> Callable[..., Any]:
    return functools.wraps(plain)(closed(c))


def in_object_array(c: Any) -> Any:
    array = np.empty(2, dtype=object)
    array[0] = c
    return array


# Where a value can be, and still be seen by a call.
FUNCTIONS: list[Callable[[Any], Any]] = [
    closed,
    deeper,
    default,
    keyword,
    attribute,
    class_attribute,
    method_closure,
    global_variable,
    of_module,
    wrapped,
    Callable_,
    lambda c: Plain(c).method,
    lambda c: functools.partial(plain, c=c),
    lambda c: functools.partial(plain, 0, c),
    lambda c: functools.lru_cache(closed(c)),
    lambda c: np.vectorize(closed(c)),
    lambda c: functools.partial(functools.partial(plain, k=c), 1),
]
CONTAINERS: list[Callable[[Any], Any]] = [
    lambda c: [0, c],
    lambda c: (0, c),
    lambda c: {"key": c},
    lambda c: types.MappingProxyType({"key": c}),
    lambda c: collections.OrderedDict(key=c),
    lambda c: collections.deque([c]),
    lambda c: collections.defaultdict(list, key=c),
    Plain,
    Slotted,
    Net,
    Pair,
    lambda c: Settings(hidden=c),
    closed,
    in_object_array,
    lambda c: types.SimpleNamespace(content=c),
    lambda c: functools.partial(plain, c),
]
_RECORD = [("a", "i4"), ("b", ">f8"), ("c", "O")]
LEAVES: list[Any] = [
    None,
    ...,
    False,
    True,
    0,
    1,
    -1,
    2**70,
    1.0,
    0.0,
    -0.0,
    float("nan"),
    float("inf"),
    1j,
    0j,
    "",
    "a",
    "b",
    b"",
    b"a",
    bytearray(b"a"),
    (),
    [],
    {},
    set(),
    frozenset(),
    {1, 2},
    frozenset({1, 2}),
    {"x", "y", "z"},
    {"x", "y", "w"},
    {("p", 1): 2},
    {("p", 2): 2},
    range(3),
    range(4),
    slice(1, 2),
    Colour.RED,
    Colour.BLUE,
    np.float64(1.0),
    np.float32(1.0),
    np.int64(1),
    np.zeros(3),
    np.zeros((3, 1)),
    np.zeros(3, "f4"),
    np.zeros(3, ">f8"),
    np.zeros(3, bool),
    np.ones(3),
    np.zeros(0),
    np.array(["a", "b"]),
    np.array(["a", "c"]),
    np.array([(1, 2.0, [3])], dtype=_RECORD),
    np.array([(1, 2.0, [4])], dtype=_RECORD),
    np.array([(1, 3.0, [3])], dtype=_RECORD),
    np.ma.array([1, 2], mask=[False, True]),
    np.ma.array([1, 2], mask=[False, False]),
    np.datetime64("2020-01-01"),
    np.datetime64("2020-01-02"),
    np.dtype("f8"),
    np.dtype("f4"),
    torch.zeros(3),
    torch.ones(3),
    torch.zeros(3, dtype=torch.bfloat16),
    torch.eye(2).to_sparse(),
    (2 * torch.eye(2)).to_sparse(),
    torch.float32,
    torch.float64,
    decimal.Decimal("1.5"),
    decimal.Decimal("1.50"),
    fractions.Fraction(1, 3),
    fractions.Fraction(1, 2),
    datetime.date(2020, 1, 2),
    datetime.timedelta(1),
    re.compile("a"),
    re.compile("b"),
    re.compile("a", re.I),
    np.random.default_rng(0),
    np.random.default_rng(1),
    np.random.RandomState(0),
    np.sin,
    np.cos,
    len,
    abs,
    int,
    float,
    collections.Counter("ab"),
    collections.Counter("abb"),
    collections.deque([1], 5),
    collections.deque([1], 6),
    plain,
    closed,
    Plain,
    Slotted,
    Pair,
    Colour,
    Settings,
    sys,
    re,
]


def identity(function: Any) -> str:
    return identity_of(as_simulator(function))


def everything(folder: Path) -> dict[str, str]:
    """Identities of all sorts of simulators by name, to be compared with another process's."""
    found = {}
    for name, (base, _, _) in arguments(files(folder)).items():
        found[name] = identity_of(bridge.make(name, **base))
    for i, leaf in enumerate(LEAVES):
        found[f"leaf {i}"] = identity(closed(leaf))
    for i, function in enumerate(FUNCTIONS):
        for j, container in enumerate(CONTAINERS):
            found[f"function {i} {j}"] = identity(function(container({"one", "two", "three"})))
    return found


if __name__ == "__main__":
    print(json.dumps(everything(Path(sys.argv[1]))))
