"""The command-line adapter, against real programs: small scripts that each test writes itself."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from adapters import process
from adapters.external import ExternalSimulator, Profile
from adapters.template import Row, Template, TextTemplate
from bridge.errors import EvaluationError, EvaluationTimeoutError, InputError, OutputError, SetupError
from bridge.simulator.protocol import Simulator
from bridge.simulator.space import Parameter, ParameterSpace

# Programs of constant outputs stand for any.
pytestmark = pytest.mark.filterwarnings("ignore:TextTemplate has no placeholder")

SPACE = ParameterSpace((Parameter("mass_kg", "kg"), Parameter("angle_deg", "deg")))
X = np.array([[1.5, 30.0], [-2.25, 1e-17]])
SEEDS = np.array([7, 2**64 - 1], dtype=np.uint64)

# Reads "mass angle seed" from in.txt and writes an array of two numbers and the seed's two halves.
PROGRAM = """
import struct, sys
import numpy as np

mass, angle, seed = open("in.txt").read().split()
seed = int(seed)
print("working on", mass)
np.save("out.npy", np.array([float(mass) * 2, float(angle), seed >> 32, seed & 0xFFFFFFFF], dtype=np.float64))
"""
INPUT = {"in.txt": "{mass_kg} {angle_deg} {seed}\n"}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def make(tmp_path: Path, scratch: Path) -> Callable[..., ExternalSimulator]:
    """`make(program_text, output="out.npy", shape=(4,), **profile)`: a simulator that runs a Python program."""

    def build(
        program: str,
        *,
        output: str = "out.npy",
        shape: tuple[int, ...] | None = (4,),
        template: Template | None = None,
        **profile: Any,
    ) -> ExternalSimulator:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(program), encoding="utf-8")
        profile = {"timeout_s": 60.0, "scratch": scratch} | profile
        return ExternalSimulator(
            template or TextTemplate(output, INPUT), Profile((sys.executable, str(path)), **profile), SPACE, shape
        )

    return build


def left(scratch: Path) -> list[Path]:
    return sorted(scratch.iterdir())


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_run_gets_its_parameters_and_seed_to_the_last_bit(make: Any, scratch: Path) -> None:
    simulator = make(PROGRAM)
    assert isinstance(simulator, Simulator)
    outputs = simulator(X, SEEDS)
    assert outputs.dtype == np.float64
    assert outputs.tolist() == [[3.0, 30.0, 0, 7], [-4.5, 1e-17, 2**32 - 1, 2**32 - 1]]
    assert left(scratch) == []


def test_no_rows_give_no_outputs(make: Any) -> None:
    assert make(PROGRAM)(np.empty((0, 2)), np.empty(0, np.uint64)).shape == (0, 4)


def test_shape_can_be_left_to_the_first_row(make: Any) -> None:
    assert make(PROGRAM, shape=None)(X, SEEDS).shape == (2, 4)


def test_it_travels_as_a_pickle(make: Any) -> None:
    simulator = make(PROGRAM)
    again = pickle.loads(pickle.dumps(simulator))
    assert again == simulator
    assert np.array_equal(again(X, SEEDS), simulator(X, SEEDS))


def test_failure_names_program_parameters_status_host_directory_and_last_words(make: Any, scratch: Path) -> None:
    simulator = make(
        """
        import sys
        for i in range(100): print("step", i)
        print("mesh is tangled", file=sys.stderr)
        sys.exit(3)
        """
    )
    with pytest.raises(EvaluationError) as caught:
        simulator(X, SEEDS)
    assert not isinstance(caught.value, OutputError)
    (directory,) = left(scratch)
    message = str(caught.value)
    for part in (
        "exit status 3",
        sys.executable,
        "mass_kg = 1.5 kg",
        "angle_deg = 30.0 deg",
        "seed 7",
        os.uname().nodename,
        str(directory),
        "step 99",
        "mesh is tangled",
    ):
        assert part in message
    assert "step 79\n" not in message
    # What is kept is enough to repeat the run by hand.
    assert (directory / "in.txt").read_text() == "1.5 30.0 7\n"
    assert (directory / "stdout.txt").read_text().startswith("step 0\n")


@pytest.mark.parametrize(("keep", "after_success", "after_failure"), [("failed", 0, 1), ("all", 1, 1), ("none", 0, 0)])
def test_directories_are_kept_as_the_profile_says(
    make: Any, scratch: Path, keep: str, after_success: int, after_failure: int
) -> None:
    make(PROGRAM, keep=keep)(X[:1], SEEDS[:1])
    assert len(left(scratch)) == after_success
    for directory in left(scratch):
        shutil.rmtree(directory)
    with pytest.raises(EvaluationError, match="removed" if keep == "none" else "directory"):
        make("raise SystemExit(1)", keep=keep)(X, SEEDS)
    assert len(left(scratch)) == after_failure


def test_a_signal_is_named(make: Any) -> None:
    with pytest.raises(EvaluationError, match=r"killed by signal 11 \(SIGSEGV\)"):
        make("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")(X, SEEDS)


# A parent that ignores the polite signal, and a grandchild that does too.
STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleeper], stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path({pids!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
{then}
"""


@pytest.mark.parametrize("with_pidfd", [True, False])
def test_a_hang_ends_at_the_limit_with_all_its_descendants(
    make: Any, tmp_path: Path, with_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_pidfd:  # an older kernel

        def refuse(pid: int) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(process.os, "pidfd_open", refuse)
    pids = tmp_path / "pids"
    program = STUBBORN.format(pids=str(pids), then="time.sleep(600)")
    with pytest.raises(EvaluationTimeoutError, match=r"within 3 s.*(\n.*)*mass_kg = 1.5 kg") as caught:
        make(program, timeout_s=3.0, kill_grace_s=0.1)(X, SEEDS)
    assert isinstance(caught.value, TimeoutError)
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: gone(pid))


def test_a_run_that_ends_leaves_no_descendants_either(make: Any, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = STUBBORN.format(pids=str(pids), then="import numpy; numpy.save('out.npy', numpy.zeros(4)); os._exit(0)")
    make(program)(X[:1], SEEDS[:1])
    grandchild = int(pids.read_text().split()[1])
    wait_until(lambda: gone(grandchild))


def test_an_interrupt_ends_the_run_as_well(make: Any, tmp_path: Path, scratch: Path) -> None:
    # A shell that starts the tests in the background has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pids = tmp_path / "pids"
    simulator = make(STUBBORN.format(pids=str(pids), then="time.sleep(600)"))

    def interrupt() -> None:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            simulator(X, SEEDS)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: gone(pid))
    assert left(scratch) == []


def test_missing_output_lists_what_is_there(make: Any, scratch: Path) -> None:
    with pytest.raises(OutputError, match=r"out\.npy, got in\.txt, other\.npy, stderr\.txt, stdout\.txt"):
        make("open('other.npy', 'w')")(X, SEEDS)
    assert len(left(scratch)) == 1


@pytest.mark.parametrize(
    ("output", "program", "said"),
    [
        (
            "out.npy",
            "import numpy; numpy.save('o.npy', numpy.ones(4)); "
            "open('out.npy', 'wb').write(open('o.npy', 'rb').read()[:-9])",
            "ValueError",
        ),
        ("out.npy", "open('out.npy', 'wb')", "EOFError"),
        ("out.npy", "import numpy; numpy.save('out.npy', numpy.array([None] * 4), allow_pickle=True)", "pickle"),
        ("out.npy", "import numpy; numpy.save('out.npy', numpy.ones(4) * 1j)", "complex"),
        ("out.npy", "import numpy; numpy.save('out.npy', numpy.array(['a'] * 4))", "ValueError"),
        ("out.txt", "open('out.txt', 'w').write('1 2\\n3')", "ValueError"),
        ("out.txt", "open('out.txt', 'w').write('1 2 three 4')", "three"),
        ("out.txt", "open('out.txt', 'w')", "empty file"),
        ("out.txt", "open('out.txt', 'w').write('1 2 3')", r"shape \(4,\), got \(3,\)"),
    ],
    ids=["cut short", "empty npy", "objects", "complex", "strings", "ragged", "words", "empty text", "half"],
)
def test_unreadable_output(make: Any, output: str, program: str, said: str) -> None:
    with pytest.raises(OutputError, match=said):
        make(program, output=output)(X, SEEDS)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "got None. .*return statement"),
        ({"a": 1.0}, "dict with the keys 'a'"),
        (np.ma.masked_array([1.0, -9999.0], mask=[False, True]), "1 of 2 that are NaN"),
    ],
)
@pytest.mark.parametrize("shape", [None, (2,), ()])
def test_a_reader_that_returns_no_numbers(tmp_path: Path, shape: Any, value: Any, said: str) -> None:
    template = TextTemplate("stdout.txt", INPUT, read=lambda path: value)
    simulator = ExternalSimulator(template, Profile(("echo", "1"), scratch=tmp_path), SPACE, shape)
    if isinstance(value, np.ma.MaskedArray) and shape == ():
        said = "shape"
    with pytest.raises(EvaluationError, match=said):
        simulator(X, SEEDS)


def test_a_program_that_removes_its_directory(tmp_path: Path) -> None:
    for place in ("$PWD", "$(dirname $PWD)"):
        template = TextTemplate("stdout.txt", INPUT)
        profile = Profile(("sh", "-c", f'rm -rf "{place}"'), scratch=tmp_path / "scratch")
        with pytest.raises(OutputError, match=r"has removed its own directory(?s:.*)which is gone"):
            ExternalSimulator(template, profile, SPACE, (2,))(X, SEEDS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/nonexistent/lab-shell -x\necho 1\n", "interpreter that its first line names, '/nonexistent/lab-shell'"),
        ("#!/bin/sh\r\necho 1\r\n", "end as on Windows"),
        ("echo 1\n", "no first line such as #!/bin/sh.*Profile..'sh'"),
    ],
)
def test_a_script_that_cannot_start(tmp_path: Path, text: str, said: str) -> None:
    script = tmp_path / "prog.sh"
    script.write_bytes(text.encode())
    script.chmod(0o755)
    simulator = ExternalSimulator(TextTemplate("stdout.txt", INPUT), Profile((str(script),)), SPACE, ())
    with pytest.raises(SetupError, match=rf"{said}(?s:.*)not started"):
        simulator(X, SEEDS)


def test_a_parameter_that_no_text_has_is_told() -> None:
    with pytest.warns(UserWarning, match=r"no placeholder for angle_deg: .*\{angle_deg\}"):
        ExternalSimulator(TextTemplate("o.npy", {"in.txt": "{mass_kg:.3f} {seed}"}), Profile(("echo",)), SPACE, ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        template = TextTemplate("o.npy", {"in.txt": "{mass_kg}"}, arguments=("--angle={angle_deg}",))
        ExternalSimulator(template, Profile(("echo",)), SPACE, ())


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": "5"},
        {"timeout_s": True},
        {"timeout_s": float("nan")},
        {"threads": "2"},
        {"threads": 1.5},
        {"kill_grace_s": "1"},
        {"kill_grace_s": None},
        {"keep_at_most": "3"},
        {"keep_at_most": 1.5},
        {"scratch": 5},
        {"env": None},
        {"env": ["A"]},
        {"argv": None},
        {"argv": 3},
    ],
)
def test_settings_of_another_type_are_refused_in_words(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"Expected .*{next(iter(settings))}"):
        Profile(**{"argv": ("echo",)} | settings)


@pytest.mark.parametrize("shape", [5, "ab", (1.5,), (-1,)])
def test_shapes_of_another_type_are_refused_in_words(shape: Any) -> None:
    with pytest.raises(InputError, match="output_shape"):
        ExternalSimulator(TextTemplate("o.npy", INPUT), Profile(("echo",)), SPACE, shape)
    for wrong in ({"output": None}, {"inputs": "in.txt"}, {"inputs": {"a": 1}}, {"arguments": (1,)}):
        with pytest.raises(InputError, match=f"Expected {next(iter(wrong))}"):
            TextTemplate(**{"output": "o.npy"} | wrong)  # type: ignore[arg-type]


def test_wrong_shape_gives_advice(make: Any) -> None:
    with pytest.raises(OutputError, match=r"shape \(4,\), got \(\)\..*declare output_shape=\(\)"):
        make("import numpy; numpy.save('out.npy', 1.0)")(X, SEEDS)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite(make: Any, value: str) -> None:
    program = f"import numpy; numpy.save('out.npy', numpy.array([1, {value!r}, 2, {value!r}], dtype=float))"
    with pytest.raises(EvaluationError, match="2 of 4") as caught:
        make(program)(X, SEEDS)
    assert not isinstance(caught.value, OutputError)


def test_a_talkative_program_does_not_block(make: Any) -> None:
    simulator = make(PROGRAM + "\nfor s in (sys.stdout, sys.stderr):\n    s.write(('x' * 99 + '\\n') * 100_000)\n")
    assert simulator(X, SEEDS).shape == (2, 4)


def test_endless_lines_do_not_swell_the_message(make: Any) -> None:
    with pytest.raises(EvaluationError) as caught:
        make("print('x' * 10_000_000); raise SystemExit(1)")(X, SEEDS)
    assert len(str(caught.value)) < 5_000


def test_standard_input_and_output(make: Any) -> None:
    template = TextTemplate("stdout.txt", INPUT, stdin="in.txt")
    simulator = make("print(*[float(w) for w in input().split()])", template=template, shape=(3,))
    assert simulator(X[:1], SEEDS[:1]).tolist() == [[1.5, 30.0, 7.0]]
    nothing = make("import sys; print(len(sys.stdin.read()))", output="stdout.txt", shape=())
    assert nothing(X[:1], SEEDS[:1]).tolist() == [0.0]


def test_arguments_are_filled_and_never_split(make: Any) -> None:
    template = TextTemplate("out.txt", arguments=("--mass={mass_kg:.2f}", "a  b; $(echo no) {seed}", "{{}}"))
    program = """
    import json, sys
    json.dump(sys.argv[1:], open("out.txt", "w"))
    """
    template = TextTemplate(template.output, arguments=template.arguments, read=_lengths_of_words)
    outputs = make(program, template=template, shape=(3,))(X[:1], SEEDS[:1])
    assert outputs.tolist() == [[len("--mass=1.50"), len("a  b; $(echo no) 7"), len("{}")]]


def _lengths_of_words(path: Path) -> list[int]:
    return [len(word) for word in json.loads(path.read_text())]


def test_integer_parameters_are_rounded(tmp_path: Path) -> None:
    space = ParameterSpace((Parameter("count", kind="integer"),))
    template = TextTemplate("stdout.txt", arguments=("{count}",))
    profile = Profile((sys.executable, "-c", "import sys; print(int(sys.argv[1]))"), scratch=tmp_path)
    outputs = ExternalSimulator(template, profile, space, ())(np.array([[2.4], [2.6]]), SEEDS)
    assert outputs.tolist() == [2.0, 3.0]


# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
@pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")
def test_formats_by_extension(make: Any) -> None:
    csv = make("open('out.csv', 'w').write('1,2\\n3,4\\n')", output="out.csv", shape=(2, 2))
    assert csv(X[:1], SEEDS[:1]).tolist() == [[[1, 2], [3, 4]]]
    pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")
    program = """
    import mrcfile, numpy
    with mrcfile.new("out.mrc") as f: f.set_data(numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    {cut}
    """
    whole = make(program.format(cut=""), output="out.mrc", shape=(2, 3))
    assert whole(X[:1], SEEDS[:1]).tolist() == [[[0, 1, 2], [3, 4, 5]]]
    with pytest.raises(OutputError):
        make(program.format(cut="open('out.mrc', 'r+b').truncate(1030)"), output="out.mrc")(X[:1], SEEDS[:1])


def test_environment_is_the_profiles_and_ours_is_untouched(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "HYDI_CONTROL_FD", "MPIR_X", "MPI_LOCALRANKID")
    removed += ("PRTE_LAUNCHED", "I_MPI_HYDRA_ENV", "HYDRA_X", "SLURM_PROCID", "OMPI_MCA_ess_base_vpid")
    kept = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_btl", "PRTE_MCA_rmaps_default_mapping_policy", "I_MPI_PIN", "MINE")
    for name in (*removed, *kept):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    before, cwd = dict(os.environ), os.getcwd()
    program = """
    import json, os
    json.dump(dict(os.environ), open("out.json", "w"))
    """
    simulator = make(
        program,
        template=TextTemplate("out.json", read=_SeenVariables((*removed, *kept, "EXTRA", "OMP_NUM_THREADS"))),
        env={"EXTRA": "5"},
        threads=3,
        shape=(len(removed) + len(kept) + 2,),
    )
    seen = simulator(X[:1], SEEDS[:1])[0]
    assert seen.tolist() == [-1] * len(removed) + [1] * len(kept) + [5, 3]
    assert dict(os.environ) == before
    assert os.getcwd() == cwd
    assert "SLURM_PROCID" in Profile(("true",), keep_slurm=True).environment()
    assert Profile(("true",), threads=None).environment()["OMP_NUM_THREADS"] == "64"
    assert Profile(("true",), env={"OMP_NUM_THREADS": "9"}).environment()["OMP_NUM_THREADS"] == "9"


@dataclass(frozen=True)
class _SeenVariables:
    names: tuple[str, ...]

    def __call__(self, path: Path) -> list[float]:
        seen = json.loads(path.read_text())
        return [float(seen.get(name, -1)) for name in self.names]


def test_spaces_and_unicode_in_paths(tmp_path: Path) -> None:
    odd = tmp_path / "a b 'c' $d;é 漢"
    odd.mkdir()
    program = odd / "my prögram.py"
    program.write_text(PROGRAM, encoding="utf-8")
    interpreter = odd / "my python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    interpreter.chmod(0o755)
    profile = Profile((str(interpreter), str(program)), scratch=odd / "scrätch dir")
    simulator = ExternalSimulator(TextTemplate("out.npy", INPUT), profile, SPACE, (4,))
    assert simulator(X, SEEDS)[0].tolist() == [3.0, 30.0, 0, 7]


def test_a_compiled_program(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "code.c"
    source.write_text(
        '#include <stdio.h>\nint main(void) { double m, a; if (scanf("%lf %lf", &m, &a) != 2) return 2; '
        'printf("%.17g\\n", m * a); return 0; }\n'
    )
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "code")], check=True, timeout=60)
    template = TextTemplate("stdout.txt", INPUT, stdin="in.txt")
    simulator = ExternalSimulator(template, Profile((str(tmp_path / "code"),), scratch=tmp_path / "s"), SPACE, ())
    assert simulator(X, SEEDS).tolist() == [1.5 * 30.0, -2.25 * 1e-17]


def test_missing_program_is_told_before_anything_is_made(make: Any, tmp_path: Path, scratch: Path) -> None:
    for argv, where in ((("no-such-code", "x"), "PATH="), ((str(tmp_path / "absent"),), "no executable file")):
        simulator = ExternalSimulator(TextTemplate("o.npy"), Profile(argv, scratch=scratch), SPACE, ())
        with pytest.raises(SetupError, match=f"(?s){argv[0]}.*{where}"):
            simulator(X, SEEDS)
    assert not scratch.exists()
    # The child's PATH counts, not ours.
    tool = tmp_path / "bin" / "my-code"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 4\n")
    tool.chmod(0o755)
    profile = Profile(("my-code",), env={"PATH": f"{tool.parent}:{os.environ['PATH']}"}, scratch=scratch)
    assert ExternalSimulator(TextTemplate("stdout.txt"), profile, SPACE, ())(X, SEEDS).tolist() == [4.0, 4.0]


def test_relative_program_is_taken_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "code"
    tool.write_text("#!/bin/sh\npwd > where.txt\necho 4\n")
    tool.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    profile = Profile(("./code",), scratch=Path("runs"), keep="all")
    monkeypatch.chdir("/")
    ExternalSimulator(TextTemplate("stdout.txt"), profile, SPACE, ())(X[:1], SEEDS[:1])
    (directory,) = left(tmp_path / "runs")
    assert Path((directory / "where.txt").read_text().strip()).samefile(directory)


def test_an_unusable_scratch_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    simulator = ExternalSimulator(
        TextTemplate("stdout.txt"), Profile(("true",), scratch=tmp_path / "file" / "below"), SPACE, ()
    )
    with pytest.raises(SetupError, match="scratch"):
        simulator(X, SEEDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"argv": "code --fast 'a b'"}, r"\('code', '--fast', 'a b'\)"),
        ({"argv": ()}, "program"),
        ({"argv": ("code", 3)}, "all strings"),
        ({"argv": ("code",), "timeout_s": 0.0}, "timeout_s"),
        ({"argv": ("code",), "timeout_s": float("nan")}, "timeout_s"),
        ({"argv": ("code",), "threads": 0}, "thread"),
        ({"argv": ("code",), "keep": "some"}, "failed, all, none"),
        ({"argv": ("code",), "env": {"A": 1}}, "strings"),
    ],
)
def test_profiles_are_checked(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Profile(**arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs": {"in": "{mass}"}}, "mass_kg, angle_deg, seed"),
        ({"inputs": {"in": "{"}}, "braces"),
        ({"inputs": {"in": "{}"}}, "braces"),
        ({"inputs": {"../in": ""}}, "relative"),
        ({"inputs": {"/in": ""}}, "relative"),
        ({"stdin": "in"}, "stdin"),
        ({"arguments": "--a"}, "list"),
        ({"arguments": ("{b}",)}, "mass_kg"),
    ],
)
def test_templates_are_checked_before_any_run(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ExternalSimulator(TextTemplate("out.npy", **options), Profile(("true",)), SPACE, ())


def test_inputs_are_checked(make: Any) -> None:
    for inputs in (X[0], X[:, :1], X[:1]):
        with pytest.raises(InputError, match=r"\(k, 2\)"):
            make(PROGRAM)(inputs, SEEDS)


class _Own(Template):
    """A template of one's own; this one has a bug in `write_input` for negative masses."""

    def write_input(self, directory: Path, row: Row) -> None:
        (directory / "in.bin").write_bytes(row.vector.tobytes())
        if row.values["mass_kg"] < 0:
            raise KeyError("density")

    def read_output(self, directory: Path) -> Any:
        return np.frombuffer((directory / "in.bin").read_bytes())


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    simulator = ExternalSimulator(_Own(), Profile(("true",), scratch=tmp_path / "s"), SPACE, (2,))
    assert simulator(X[:1], SEEDS[:1]).tolist() == [X[0].tolist()]
    with pytest.raises(EvaluationError, match=r"_Own to write the input.*KeyError: 'density'(?s:.*)not started"):
        simulator(X, SEEDS)


@pytest.mark.mpi
def test_a_program_with_mpi_of_its_own_under_a_launcher(run_ranks: Any, tmp_path: Path) -> None:
    done = run_ranks(
        2,
        """
        import sys
        from pathlib import Path
        import numpy as np
        from mpi4py import MPI
        from adapters.external import ExternalSimulator, Profile
        from adapters.template import TextTemplate
        from bridge.simulator.space import Parameter, ParameterSpace

        child = "from mpi4py import MPI; print(MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank)"
        simulator = ExternalSimulator(
            TextTemplate("stdout.txt"),
            Profile((sys.executable, "-c", child), timeout_s=60, scratch=Path(sys.argv[1])),
            ParameterSpace((Parameter("x"),)),
            (2,),
        )
        assert MPI.COMM_WORLD.size == 2
        result = simulator(np.zeros((1, 1)), np.zeros(1, np.uint64)).tolist()
        results = MPI.COMM_WORLD.gather(result)
        if MPI.COMM_WORLD.rank == 0:  # two ranks' lines may interleave
            print("ranks", results, flush=True)
        """,
        tmp_path / "scratch",
    )
    assert done.returncode == 0, done.stderr
    assert "ranks [[[1.0, 0.0]], [[1.0, 0.0]]]" in done.stdout
    assert left(tmp_path / "scratch") == []
