"""The main job, small: job file, command line, results on disk, and the example under ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bridge.cli.job import load_job
from bridge.cli.main import main
from bridge.errors import InputError

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"

JOB = """
[simulator]
name = "cryoet"
specimen = "helix"
shape = [64, 64]
pixel_size_angstrom = 4.0
mode = "hard"
[target]
file = "target.mrc"
[start]
defocus_um = 1.9
x_angstrom = -6.0
y_angstrom = 4.0
rotation_deg = 3.0
[fit]
seed = 1
method = { name = "gauss-newton", steps = 24, num_samples = 32, scale = [1.0, 0.1] }
variance = 700.0
[output]
directory = "out"
"""
TRUTH = {"defocus_um": 1.7, "x_angstrom": 3.0, "y_angstrom": -2.0, "rotation_deg": -1.0}


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(JOB, encoding="utf-8")
    from bridge.cli.job import load_simulator

    sim = load_simulator(path)
    image = sim(sim.space.vector(TRUTH)[None], np.array([3], dtype=np.uint64))[0]
    sim.write_output(str(tmp_path / "target.mrc"), image)
    return path


def test_the_command_recovers_and_writes_everything(job_file, tmp_path, capsys):
    import mrcfile

    out = tmp_path / "out"
    assert main(["fit", str(job_file), "-o", str(out), "--watch", "lines"]) == 0
    printed = capsys.readouterr()
    assert "defocus_um" in printed.out
    assert "step" in printed.err
    report = json.loads((out / "parameters.json").read_text())
    for name, tolerance in {"defocus_um": 0.02, "x_angstrom": 0.3, "y_angstrom": 0.3, "rotation_deg": 0.3}.items():
        assert abs(report["parameters"][name]["value"] - TRUTH[name]) < tolerance, report
        assert report["parameters"][name]["standard_error"] > 0
    assert report["parameters"]["defocus_um"]["unit"] == "um"
    assert report["stop_reason"] in ("converged", "max_steps")
    with mrcfile.open(out / "fit.mrc") as fitted:
        assert fitted.data.shape == (64, 64)
        assert fitted.voxel_size.x == pytest.approx(4.0)
        assert int(fitted.header.ispg) == 0
    assert mrcfile.validate(out / "fit.mrc")
    assert (out / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((out / "history.json").read_text())) == report["steps"]
    names = ["fit.mrc", "fit.png", "history.json", "parameters.json", "report.html", "run"]
    assert sorted(p.name for p in out.iterdir()) == names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("target.mrc", "missing.mrc"), "missing.mrc"),
        (('name = "cryoet"', 'name = "cryo"'), "Known simulators"),
        (("steps = 24", "stepz = 24"), "stepz"),
        (('name = "gauss-newton", ', ""), "Expected name = one of auto, kriging, .* in method, got none"),
        (("[fit]", '[fit]\nmisfit = { mask = "m.npy" }'), r'mask in \[target\]: mask = "m.npy"'),
        (("[start]", "[begin]"), "begin"),
        (('specimen = "helix"', 'specimen = "nowhere.pdb"'), "nowhere.pdb"),
        (("pixel_size_angstrom = 4.0", "pixel_size_angstrom = 3.0"), "pixel"),
        (("shape = [64, 64]", "shape = [32, 32]"), r"target of shape \(32, 32\)"),
        (("defocus_um = 1.9", "defocus = 1.9"), "defocus"),
        (('mode = "hard"', 'modus = "hard"'), "modus"),
        (("seed = 1", "seed = -1"), "seed"),
        (("[fit]", "[fit"), "TOML"),
    ],
)
def test_a_bad_job_is_refused_before_anything_is_written(job_file, tmp_path, change, words, capsys):
    job_file.write_text(JOB.replace(*change), encoding="utf-8")
    assert main(["fit", str(job_file), "-o", str(tmp_path / "out"), "-q"]) == 2
    import re

    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_malformed_targets(job_file, tmp_path):
    (tmp_path / "target.mrc").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"target\.mrc"):
        load_job(job_file)


def test_list_info_and_unknown_names(capsys):
    assert main(["list"]) == 0
    assert "cryoet" in capsys.readouterr().out
    assert main(["info", "cryoet"]) == 0
    assert "pixel_size_angstrom" in capsys.readouterr().out
    assert main(["info", "nothing"]) == 2
    assert "Known simulators" in capsys.readouterr().err
    assert main(["doctor"]) == 0


@pytest.mark.mpi
def test_the_example_is_bitwise_the_same_under_ranks(run_ranks, run_alone):
    script = EXAMPLES / "recover_microscope.py"
    arguments = ["--steps", "4", "--samples", "8"]
    alone = run_alone(script, *arguments, timeout=300)
    assert alone.returncode == 0, alone.stderr
    assert "0x1." in alone.stdout  # the parameters, every bit of them
    for ranks in (2, 3, 4):
        done = run_ranks(ranks, script, *arguments, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone.stdout, f"{ranks} ranks"
