"""A stand-in for TEM-simulator: the same command line, deck, rules, log, bad manners and files; another, tiny physics.

    python tem_stand_in.py [--mode=MODE] [--dialect=zyz] [--calls=FILE] INPUT

As the real program does, it ends with exit status 0 whatever happens, complains on its standard output and goes on
where it can, cuts lines off after 200 characters, ignores unknown keys, and writes the wrong machine stamp. It uses the
standard library alone, so that it starts in 20 ms.

The image of tilt t, at pixel centres (x, y) [nm], the sample's centre being (0, 0), is

    gain dose px^2 exp(-m) [1 - 0.1 (200 / V) (1 + 0.1 df) sum_p B(x - x_p, y - y_p)] [1 + 0.01 floor(10 f)],

with m the mean of the imaginary maps (0 without), df the defocus [um], f the focal length [mm], and B = exp(-r^2 / 8)
plus half of the same at 3 nm from it in the direction in which the particle's own z axis is seen: that of
R_z(psi) R_x(theta) R_z(phi) (0, 0, 1), with R_y for R_x in the other dialect. A map made from a PDB
file has 4^3 voxels of 0.01 n in the real and 0.2 n / V in the imaginary one, for n ATOM records.

MODE is a way to fail: see `fail` below. FILE gets a line for each start: "maps" or "micrographs".
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import struct
import sys
import time
from array import array
from pathlib import Path

INF = math.inf
# component -> key -> (type, lower, upper, required or default)
REAL, REQ = ("d", -INF, INF), "required"
RULES: dict[str, dict[str, tuple[str, float, float, object]]] = {
    "simulation": {f"generate_{k}": ("b", 0, 0, False) for k in ("micrographs", "volumes", "particle_maps")}
    | {"log_file": ("s", 0, 0, None), "rand_seed": ("i", -INF, INF, None)},
    "sample": {k: ("d", 0, INF, REQ) for k in ("diameter", "thickness_center", "thickness_edge")}
    | {k: (*REAL, 0.0) for k in ("offset_x", "offset_y")},
    "particle": {
        "source": ("s", 0, 0, REQ),
        "use_imag_pot": ("b", 0, 0, True),
        "famp": ("d", 0, 1, None),
        "use_defocus_corr": ("b", 0, 0, False),
        "voxel_size": ("d", 0.01, 10, None),
        "add_hydrogen": ("b", 0, 0, True),
        "map_file_format": ("s", 0, 0, "mrc"),
        "smoothness": ("d", 0, 10, None),
        "make_positive": ("b", 0, 0, None),
    }
    | {k: ("l", 1, 1000, None) for k in ("nx", "ny", "nz")}
    | {k: (*REAL, None) for k in ("contrast_re", "contrast_im")}
    | {
        k: ("s", 0, 0, None)
        for k in (
            "map_file_re_in",
            "map_file_im_in",
            "map_file_re_out",
            "map_file_im_out",
            "pdb_file_in",
            "pdb_transf_file_in",
            "map_file_byte_order",
            "map_axis_order",
        )
    },
    "particleset": {
        "particle_type": ("s", 0, 0, REQ),
        "particle_coords": ("s", 0, 0, None),
        "coord_file_in": ("s", 0, 0, None),
        "num_particles": ("l", 0, 1e6, None),
    },
    "geometry": {
        "gen_tilt_data": ("b", 0, 0, REQ),
        "ntilts": ("l", 1, 1e6, None),
        "tilt_axis": (*REAL, 0.0),
        "geom_errors": ("s", 0, 0, REQ),
    }
    | {k: (*REAL, None) for k in ("theta_start", "theta_incr")}
    | {k: ("s", 0, 0, None) for k in ("tilt_mode", "geom_file_in", "error_file_in")}
    | {k: ("d", 0, INF, 0.0) for k in ("tilt_err", "align_err_rot", "align_err_tr")},
    "electronbeam": {
        "acc_voltage": ("d", 1, 1e4, REQ),
        "energy_spread": ("d", 0, INF, REQ),
        "gen_dose": ("b", 0, 0, REQ),
        "total_dose": ("d", 0, INF, None),
        "dose_per_im": ("d", 0, INF, None),
        "dose_sd": ("d", 0, 1, 0.0),
        "dose_file_in": ("s", 0, 0, None),
    },
    "optics": {
        "magnification": ("d", 1, INF, REQ),
        "gen_defocus": ("b", 0, 0, REQ),
        "defocus_nominal": (*REAL, None),
        "defocus_syst_error": ("d", 0, INF, 0.0),
        "defocus_nonsyst_error": ("d", 0, INF, 0.0),
        "defocus_file_in": ("s", 0, 0, None),
        "cs": (*REAL, REQ),
        "cc": (*REAL, REQ),
        "aperture": ("d", 0, INF, REQ),
        "focal_length": ("d", 0.01, INF, REQ),
        "cond_ap_angle": ("d", 0, INF, REQ),
    },
    "detector": {
        "det_pix_x": ("l", 1, 1e4, REQ),
        "det_pix_y": ("l", 1, 1e4, REQ),
        "padding": ("l", 0, 1000, 20),
        "pixel_size": ("d", 0.01, 1000, REQ),
        "gain": ("d", 0, INF, REQ),
        "dqe": ("d", 0.01, 1, REQ),
        "use_quantization": ("b", 0, 0, REQ),
        "image_file_out": ("s", 0, 0, REQ),
    }
    | {k: ("d", 0, 1, REQ) for k in ("mtf_a", "mtf_b", "mtf_c")}
    | {k: ("d", 0, INF, REQ) for k in ("mtf_alpha", "mtf_beta")}
    | {k: ("d", 0, 10, 1.0) for k in ("mtf_p", "mtf_q")}
    | {k: ("s", 0, 0, None) for k in ("image_file_format", "image_axis_order", "image_file_byte_order")},
}
options = {k: v for k, _, v in (a[2:].partition("=") for a in sys.argv[1:-1])}
log_path: Path | None = None


class Stop(Exception):  # noqa: N818
    """The real program gives up; its exit status is 0 all the same."""


def log(text: str) -> None:
    if log_path is not None:
        with log_path.open("a") as file:
            file.write("".join(f"# {line}\n" for line in text.split("\n")))


def warn(text: str) -> None:
    print(text)
    log(text)


def lines_of(path: str) -> list[str]:
    try:
        return [line[:200] for line in Path(path).read_text().splitlines()]
    except OSError:
        warn(f"Could not open file {path} for reading.")
        raise Stop from None


def read_deck(path: str) -> list[tuple[str, str, dict[str, object]]]:
    blocks: list[tuple[str, str, dict[str, object]]] = []
    current: dict[str, object] | None = None
    for number, line in enumerate(lines_of(path), start=1):
        if not line or line[0] == "#":
            continue
        if line[0] == "=":
            words = [*line.replace("=", " ").split(), ""]
            current = None
            if words[0] not in RULES:
                warn(f"Unknown component {words[0]}\nSkipping input block {words[0]} {words[1]}.")
                continue
            current = {k: r[3] for k, r in RULES[words[0]].items() if r[3] is not REQ and r[3] is not None}
            blocks.append((words[0], words[1], current))
            continue
        key, equals, value = line.partition("=")
        if current is None:
            continue
        if not equals or not value.strip():
            warn(f"Unable to parse input line {number}")
            continue
        key, value = key.strip(), value.strip()
        value = value[1:].partition('"')[0] if value[0] == '"' else value.split()[0]
        rules = RULES[blocks[-1][0]]
        if blocks[-1][0] == "optics" and options.get("dialect") == "zyz":
            rules = rules | {"phase_shift": ("d", 0, 180, 0.0), "phase_plate_spot": ("d", 0, 1, 0.0)}
        if key not in rules:
            warn(f"Unknown parameter {blocks[-1][0]}:{key}")
            continue
        kind, low, high, _ = rules[key]
        if kind == "b" and value not in ("yes", "no"):
            warn(f"Warning: Boolean variable {key} must be yes or no.")
        elif kind == "b":
            current[key] = value == "yes"
        elif kind == "s":
            current[key] = value
        else:
            try:
                current[key] = float(value)
            except ValueError:
                current[key] = 0.0  # what strtod makes of it
            if not low <= float(str(current[key])) <= high:
                current[f"illegal {key}"] = True
    return blocks


def check(kind: str, name: str, block: dict[str, object]) -> None:
    bad = False
    for key, (_, low, high, default) in RULES[kind].items():
        if default is REQ and key not in block:
            warn(f"Parameter {key} undefined in {kind} {name}")
            bad = True
        if f"illegal {key}" in block:
            warn(f"Parameter {key} in {kind} {name} has illegal value {block[key]}. Value must be in [{low},{high}].")
            bad = True
    if bad:
        warn(f"Error initializing {kind}: incomplete input data.")
        raise Stop


def table(path: object) -> list[list[float]]:
    lines = [line for line in lines_of(str(path)) if line[:1] != "#"]
    rows, columns = (int(word) for word in lines[0].split()[:2])
    return [[float(word) for word in line.split()[:columns]] for line in lines[1 : rows + 1]]


def header(nx: int, ny: int, nz: int, pixel_angstrom: float, extra: int) -> bytearray:
    raw = bytearray(1024 + extra)
    struct.pack_into("<4i", raw, 0, nx, ny, nz, 2)
    struct.pack_into("<3i3f3f3i", raw, 28, nx, ny, nz, *(n * pixel_angstrom for n in (nx, ny, nz)), 90, 90, 90, 1, 2, 3)
    struct.pack_into("<i", raw, 92, extra)
    raw[208:216] = b"MAP \x44\x11\0\0"
    raw[224:238] = b"A stand-in for"
    return raw


def write_map(path: object, value: float, voxel_nm: float) -> None:
    Path(str(path)).write_bytes(header(4, 4, 4, 10 * voxel_nm, 0) + array("f", [value] * 64).tobytes())
    log(f"Particle map written to file {path}.")


def mean_of_map(path: object) -> float:
    try:
        raw = Path(str(path)).read_bytes()
    except OSError:
        warn(f"Error reading data from file {path}.")
        raise
    nx, ny, nz, _ = struct.unpack_from("<4i", raw)
    data = array("f", raw[1024 : 1024 + 4 * nx * ny * nz])
    return sum(data) / len(data)


def particle_maps(block: dict[str, object], voltage: float) -> float:
    """Makes or reads the maps of a particle; the mean of the imaginary one."""
    imaginary = bool(block["use_imag_pot"])
    if block["source"] == "map":
        mean_of_map(block["map_file_re_in"])
        return mean_of_map(block["map_file_im_in"]) if imaginary else 0.0
    atoms = sum(line.startswith("ATOM") for line in lines_of(str(block["pdb_file_in"])))
    if "pdb_transf_file_in" in block:
        table(block["pdb_transf_file_in"])
    if "slow" in options:
        time.sleep(float(options["slow"]))
    voxel = float(str(block["voxel_size"]))
    if "map_file_re_out" in block:
        write_map(block["map_file_re_out"], 0.01 * atoms, voxel)
    if imaginary and "map_file_im_out" in block:
        write_map(block["map_file_im_out"], 0.2 * atoms / voltage, voxel)
    return 0.2 * atoms / voltage if imaginary else 0.0


def turned(matrix: list[list[float]], axis: str, degrees: float) -> list[list[float]]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    r = {
        "z": [[c, -s, 0], [s, c, 0], [0, 0, 1]],
        "x": [[1, 0, 0], [0, c, -s], [0, s, c]],
        "y": [[c, 0, s], [0, 1, 0], [-s, 0, c]],
    }[axis]
    return [[sum(matrix[i][k] * r[k][j] for k in range(3)) for j in range(3)] for i in range(3)]


def ball(x: float, y: float) -> float:
    return math.exp(-(x * x + y * y) / 8)


IDENTITY = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]


def micrographs(blocks: list[tuple[str, str, dict[str, object]]]) -> None:
    one = {kind: block for kind, _, block in blocks}
    detectors = [block for kind, _, block in blocks if kind == "detector"]
    if not detectors or any(kind not in one for kind in ("sample", "geometry", "electronbeam", "optics")):
        warn("Incomplete input data for generating micrographs.")
        raise Stop
    geometry, beam, optics = one["geometry"], one["electronbeam"], one["optics"]
    for kind, name, block in blocks:
        check(kind, name, block)
    n = int(float(str(geometry.get("ntilts", 0))))
    if geometry["gen_tilt_data"]:
        start, step, axis = (float(str(geometry[k])) for k in ("theta_start", "theta_incr", "tilt_axis"))
        tilts = [[-axis, start + step * i, axis] for i in range(n)]
    else:
        tilts = table(geometry["geom_file_in"])
    n = n or len(tilts)
    errors = table(geometry["error_file_in"]) if geometry["geom_errors"] == "file" else [[0.0] * 5] * n
    if beam["gen_dose"]:
        if "total_dose" not in beam and "dose_per_im" not in beam:
            warn("Electron dose must be specified as total dose or dose per image.")
            raise Stop
        total = beam.get("total_dose")
        doses = [[float(str(beam["dose_per_im"])) if total is None else float(str(total)) / n]] * n
    else:
        doses = table(beam["dose_file_in"])
    gen_defocus = optics["gen_defocus"]
    defoci = [[float(str(optics["defocus_nominal"]))]] * n if gen_defocus else table(optics["defocus_file_in"])
    if min(len(tilts), len(errors), len(doses), len(defoci)) < n:
        warn("Too few data in input file.")
        raise Stop
    particles = [row for kind, _, b in blocks if kind == "particleset" for row in table(b["coord_file_in"])]
    files = []
    for d in detectors:
        nx, ny = int(float(str(d["det_pix_x"]))), int(float(str(d["det_pix_y"])))
        pixel = 1e3 * float(str(d["pixel_size"])) / float(str(optics["magnification"]))
        raw = header(nx, ny, 0, 10 * pixel, 2 * n)
        for t in range(n):
            struct.pack_into("<h", raw, 1024 + 2 * t, round(100 * tilts[t][1]))
        Path(str(d["image_file_out"])).write_bytes(raw)
        files.append((d, nx, ny, pixel))
    voltage = float(str(beam["acc_voltage"]))
    log("\nGenerating micrographs.")
    try:
        mu = sum(particle_maps(block, voltage) for kind, _, block in blocks if kind == "particle")
    except OSError:
        warn("Particle not found.\nError computing projection.")
        log("\nSimulation complete.")
        return
    middle = "y" if options.get("dialect") == "zyz" else "x"
    for t in range(n):
        base = turned(IDENTITY, "z", errors[t][0])
        for axis_name, angle in zip("zxz", reversed(tilts[t]), strict=True):
            base = turned(base, axis_name, angle)
        places = []
        for p in particles:
            x, y, _ = (sum(base[i][k] * p[k] for k in range(3)) for i in range(3))
            m = turned(turned(turned(base, "z", p[5]), middle, p[4]), "z", p[3])
            places.append((x + errors[t][3], y + errors[t][4], 3 * m[0][2], 3 * m[1][2]))
        for d, nx, ny, pixel in files:
            mean = float(str(d["gain"])) * doses[t][0] * pixel * pixel * math.exp(-mu)
            mean *= 1 + 0.01 * math.floor(10 * float(str(optics["focal_length"])))
            contrast = 0.1 * (200 / voltage) * (1 + 0.1 * defoci[t][0])
            values = array("f")
            for j in range(ny):
                for i in range(nx):
                    x, y = (i - (nx - 1) / 2) * pixel, (j - (ny - 1) / 2) * pixel
                    blob = sum(ball(x - a, y - b) + 0.5 * ball(x - a - u, y - b - v) for a, b, u, v in places)
                    value = mean * (1 - contrast * blob)
                    if d["use_quantization"]:
                        value += random.gauss(0, math.sqrt(mean / float(str(d["dqe"]))))
                    values.append(value)
            with open(str(d["image_file_out"]), "r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(values.tobytes())
                file.seek(8)
                file.write(struct.pack("<i", t + 1))
                file.seek(36)
                file.write(struct.pack("<i", t + 1))
    fail(options.get("mode", ""), str(detectors[0]["image_file_out"]))
    log("\nSimulation complete.")


def fail(mode: str, image: str) -> None:
    """The ways in which images go wrong."""
    path = Path(image)
    if mode == "nan":
        raw = bytearray(path.read_bytes())
        raw[-4:] = struct.pack("<f", math.nan)
        path.write_bytes(raw)
    elif mode == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif mode == "cut-header":
        path.write_bytes(path.read_bytes()[:100])
    elif mode == "no-image":
        path.unlink()
    elif mode == "one-image-less":
        raw = bytearray(path.read_bytes())
        raw[8:12] = struct.pack("<i", struct.unpack_from("<i", raw, 8)[0] - 1)
        path.write_bytes(raw)
    elif mode == "unfinished":
        raise Stop
    elif mode == "hang":
        time.sleep(600)
    elif mode == "crash":
        os.abort()
    elif mode == "exit-1":
        sys.exit(1)
    elif mode == "stderr":
        print("a note of the launcher", file=sys.stderr)


def main() -> None:
    global log_path
    blocks = read_deck(sys.argv[-1])
    simulation = next((block for kind, _, block in blocks if kind == "simulation"), {})
    if "log_file" in simulation and options.get("mode") != "no-log":
        log_path = Path(str(simulation["log_file"]))
        log("Log file created by a stand-in for TEM-simulator.")
    random.seed(int(float(str(simulation.get("rand_seed", 0)))))
    what = "maps" if simulation.get("generate_particle_maps") else "micrographs"
    if "calls" in options:
        with open(options["calls"], "a") as file:
            file.write(what + "\n")
    if what == "maps":
        voltage = next((float(str(b["acc_voltage"])) for kind, _, b in blocks if kind == "electronbeam"), 0.0)
        for kind, _, block in blocks:
            if kind == "particle" and options.get("mode") != "no-maps":
                particle_maps(block, voltage)
    if simulation.get("generate_micrographs"):
        micrographs(blocks)


if __name__ == "__main__":
    with contextlib.suppress(Stop):
        main()
