"""The command line: `bridge` or, where a system program has that name, `python -m bridge`.

Exit codes: 0 done, 1 uncaught error, 2 usage, input or set-up, 3 failed evaluations, 70 a bug (ranks in different
places), 75 stopped by a signal, Ctrl-C or the end of the allocation (the same command goes on), 130 by a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import bridge
from bridge.checks import did_you_mean
from bridge.errors import BridgeError, InputError, exit_code, exit_status
from bridge.interrupts import Held
from bridge.simulator import registry

if TYPE_CHECKING:
    from pathlib import Path

    from bridge.cli.job import Job
    from bridge.reporting.live import Observer


_PACKAGES = ("numpy", "scipy", "torch", "gemmi", "mrcfile", "pyrender", "trimesh", "numba", "matplotlib", "mpi4py")


_EPILOG = """\
a first fit:   bridge fit job.toml        the file says which simulator, target and start
your own code: name = "mysim.py:projectile" in the file, or bridge.fit(f, target, start, seed=0) in Python
exit codes:    0 done, 1 uncaught error, 2 usage or input, 3 failed simulations, 75 stopped (the same command goes on)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser, known = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    if not words[0].startswith("-") and words[0] not in known:
        parser.error(f"unknown command {words[0]!r}.{_meant(words[0], known)} Known: {', '.join(known)}.")
    options = parser.parse_args(words)
    try:
        if options.command == "list":
            print("\n".join(registry.list_simulators()))
            return 0
        if options.command == "info":
            return _info(options.name)
        if options.command == "doctor":
            return _doctor()
        if options.command == "check":
            return _check(options)
        if options.command == "study":
            return _study(options)
        if options.command == "plan":
            return _plan(options)
        if options.command == "run":
            return _run(options.script, options.arguments, options.driver)
        return _fit(options)
    except BridgeError as error:
        print(f"bridge: {error}", file=sys.stderr)
        return exit_code(type(error))
    except KeyboardInterrupt:
        print("bridge: interrupted", file=sys.stderr)
        return 130


def _meant(word: str, known: Sequence[str]) -> str:
    if word.endswith(".toml"):
        return f" Did you mean 'bridge fit {word}'?"
    if word.endswith(".py"):
        return f" Did you mean 'bridge run {word}'?"
    return did_you_mean(word, known)


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the commands that it knows."""
    parser = argparse.ArgumentParser(
        prog="bridge",
        description="Gradients through simulators that cannot be differentiated.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bridge {bridge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str, more: str = "") -> argparse.ArgumentParser:
        said = f"{what[0].upper()}{what[1:]}. {more}".strip()
        return commands.add_parser(name, help=what, description=said)

    command("list", "the simulators that are known by name")
    info = command("info", "what a simulator is, and its arguments")
    info.add_argument("name", help="one of `bridge list`, or of your own: mysim.py:function")
    check = command(
        "check",
        "whether a simulator gives the same numbers again: on a second call, in another order, in another process",
    )
    check.add_argument("name", help="one of `bridge list`, of your own (mysim.py:function), or a job file (TOML)")
    check.add_argument(
        "--at", metavar="VALUES", help="where: 1.5,0.2 or a=1.5,b=0.2 (default: a job's start, else the middle)"
    )
    check.add_argument("--seed", type=int, default=0)
    fit = command(
        "fit",
        "recover parameters from a target, as a job file says",
        "Stopped or killed, it goes on at the same command. A finished fit is shown again, not run again.",
    )
    fit.add_argument("file", help="job file (TOML); examples/demo.toml is one")
    fit.add_argument("-o", "--output", help="directory for the results, in place of the file's")
    fit.add_argument(
        "--progress",
        default="auto",
        choices=("auto", "lines", "off"),
        help="a live view on a terminal (auto, the default); lines for logs; off",
    )
    fit.add_argument("--method", help="in place of the file's: auto, kriging, gauss-newton, adam, ...")
    fit.add_argument("--max-runs", type=int, metavar="N", help="simulator runs to spend, in place of the file's")
    fit.add_argument("-q", "--quiet", action="store_true", help="no progress: --progress off")
    fit.add_argument("--jsonl", metavar="FILE", help="one JSON object a step, while it runs")
    fit.add_argument("--tensorboard", metavar="DIRECTORY", help="scalars for TensorBoard, while it runs")
    fit.add_argument(
        "--reuse",
        metavar="DIRECTORY",
        action="append",
        default=[],
        help="begin with the evaluations of an earlier fit of the same simulator (may be repeated)",
    )
    again = fit.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in the directory: the default")
    again.add_argument("--fresh", action="store_true", help="begin anew, and lose the run in the directory")
    run = command("run", "run a Python script, so that a failure on one rank ends the job on all")
    run.add_argument("--driver", action="store_true", help="rank 0 runs the script, a serial one; the others help it")
    run.add_argument("script", help="a Python script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the script")
    study = command("study", "which estimator suits the simulator of a job file")
    study.add_argument("file", help="job file (TOML): its simulator and start")
    study.add_argument("--budget", type=int, default=4096, help="simulator runs to spend (default: 4096)")
    study.add_argument("--scale", type=float, default=1.0, help="of the noise, in natural units (default: 1)")
    study.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    study.add_argument("-o", "--output", default="study", help="directory for study.md, study.csv and study.png")
    plan = command("plan", "how many ranks suit a simulator: step time and efficiency, predicted")
    plan.add_argument("--cost", required=True, help="of one evaluation, with its unit: 50ms, 2s, 3min, 1h")
    plan.add_argument("--samples", type=int, default=64, help="N, evaluations of a step (default: 64)")
    plan.add_argument("--outputs", type=int, default=1, help="m, numbers of an output (default: 1)")
    plan.add_argument("--parameters", type=int, default=8, help="d (default: 8)")
    plan.add_argument("--ranks", default="1,2,4,...,4096", help="which (default: 1,2,4,...,4096)")
    plan.add_argument("--cv", type=float, default=0.0, help="standard deviation / mean of the cost (default: 0)")
    plan.add_argument("--batch", type=int, default=1, help="parameter vectors of one call (default: 1)")
    plan.add_argument("--leaf-size", type=int, help="as in bridge.smooth")
    plan.add_argument(
        "--schedule", default="auto", choices=("auto", "static", "dynamic"), help="as in bridge.smooth (default: auto)"
    )
    plan.add_argument("--float64", action="store_true", help="outputs of 8 bytes a number, not 4")
    plan.add_argument("--failing", type=float, default=0.0, help="probability that an evaluation fails (default: 0)")
    plan.add_argument("--mtbf", help="mean time between failures of a node: 5y (default: none)")
    plan.add_argument("--latency", default="10us", help="of a message (default: 10us)")
    plan.add_argument("--bandwidth", type=float, default=10.0, help="between two ranks, GB/s (default: 10)")
    plan.add_argument("--ranks-per-node", type=int, default=64, help="of the cluster (default: 64)")
    command("doctor", "what this machine has: versions, MPI, threads")
    return parser, list(commands.choices)


def _info(name: str) -> int:
    import inspect

    from bridge.simulator.protocol import Simulator

    found = registry.find(name)
    if isinstance(found, Simulator) and not inspect.isclass(found):
        print(f"{name}: {found!r}")
        space = found.space
        for p in () if space is None else space.parameters:
            print(f"  {p.name} [{p.lower:g}, {p.upper:g}] {p.unit}".rstrip())
        return 0
    print(f"{name}: {found.__module__}.{found.__qualname__}{inspect.signature(found)}\n")
    print(inspect.getdoc(found) or "It has no docstring.")
    return 0


def _fit(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from bridge.cli.job import load_job
    from bridge.reporting.live import JSONLines, TensorBoard, view
    from bridge.storage.run import correct_status

    observers: list[Observer] = list(view("off" if options.quiet else options.progress))
    if options.jsonl:
        observers.append(JSONLines(options.jsonl))
    if options.tensorboard:
        observers.append(TensorBoard(options.tensorboard))
    job = load_job(options.file, options.output)
    given = {"method": options.method, "max_runs": options.max_runs, "reuse": options.reuse}
    job = replace(job, settings={**job.settings, **{name: value for name, value in given.items() if value}})
    code = 1
    try:
        code = _fitted(job, options, observers, given)
    except BridgeError as error:
        code = exit_code(type(error))
        raise
    except SystemExit as error:
        code = exit_status(error)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        with Held():
            correct_status(job.directory / "run", code)
    return code


def _fitted(job: Job, options: argparse.Namespace, observers: Sequence[Observer], given: Mapping[str, Any]) -> int:
    import shlex

    from bridge.cli.job import is_finished, run_job
    from bridge.dispatch import is_root
    from bridge.reporting.page import write_report
    from bridge.simulator.protocol import simulator_name

    finished = not options.fresh and is_finished(job)
    result, written = run_job(job, observers, resume=not options.fresh, overwrite=options.fresh)
    if not is_root():
        return 75 if result.stop_reason == "interrupted" else 0
    if written:
        settings = {"simulator": simulator_name(job.simulator), "target": job.target_file.name, **job.settings}
        more = [word for directory in options.reuse for word in ("--reuse", directory)]
        for name in ("method", "max_runs"):
            more += [f"--{name.replace('_', '-')}", str(given[name])] if given[name] else []
        command = shlex.join(["python", "-m", "bridge", "fit", options.file, *more])
        written.append(
            write_report(
                result,
                job.target,
                job.directory / "report.html",
                simulator=job.simulator,
                title=job.title,
                settings=settings,
                command=command,
            )
        )
    print(result)
    if written:
        print("written: " + ", ".join(str(p) for p in written))
    if result.stop_reason == "interrupted":
        print("The fit was interrupted: the same command goes on.")
        return 75
    if finished:
        print("This fit was finished before; nothing was run again. --fresh begins it anew, after a change say.")
    return 0


def _run(script: str, arguments: Sequence[str], drive: bool) -> int:
    """The script as `__main__`, under the rules that a job of several ranks needs from its first line on.

    An exception ends all ranks, with the traceback, also before the script has called bridge; so does `sys.exit` of one
    rank alone. A rank that is at its end while others still make collective calls raises a `CollectiveError` on all.
    """
    from pathlib import Path

    from bridge.dispatch import get_dispatcher
    from bridge.dispatch.world import driver

    path = Path(script)
    if not path.is_file():
        raise InputError(f"Expected a Python script, got {script!r}, which is no file.")
    dispatcher = get_dispatcher()
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)
    if drive:
        with driver() as main:
            return _as_main(path) if main else 0
    status = _as_main(path)
    if dispatcher.size > 1:
        try:
            dispatcher.begin("end of the script", f"exit status {status}")
        except BridgeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return status


def _as_main(path: Path) -> int:
    """Runs a script; its exit status."""
    import runpy

    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        return exit_status(error)
    except BaseException as error:
        # A `BridgeError` too is shown with its traceback, as under plain Python; under MPI this ends all ranks.
        with contextlib.suppress(SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            return 130
        return exit_code(type(error)) if isinstance(error, BridgeError) else 1
    return 0


def _check(options: argparse.Namespace) -> int:
    """0 where all is as it should be, else 3, as where a run fails."""
    from bridge.cli.job import load_job, make_simulator
    from bridge.simulator.protocol import simulator_name
    from bridge.testing import examine

    if options.name.endswith(".toml"):
        job = load_job(options.name)
        simulator, start = job.simulator, job.start
    else:
        names = [part.partition("=")[0] for part in (options.at or "").split(",") if "=" in part]
        simulator, start = make_simulator(options.name, names=names), None
    findings = examine(simulator, _place(simulator, start, options.at), seed=options.seed)
    print(simulator_name(simulator))
    for finding in findings:
        mark = {True: "ok", False: "NO", None: "  "}[finding.good]
        print(f"  {mark:3}{finding.what}: {finding.words}")
    return 3 if any(finding.good is False for finding in findings) else 0


def _place(simulator: Any, start: Mapping[str, float] | None, at: str | None) -> list[float]:
    """Where a simulator is looked at."""
    space = simulator.space
    if at is not None:
        parts = [part.strip() for part in at.split(",")]
        try:
            if "=" in at and space is not None:
                named = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in parts)}
                return [float(value) for value in space.vector(named)]
            values = [float(part.rpartition("=")[2]) for part in parts]
        except ValueError as error:
            raise InputError(f"Expected numbers in --at, such as 1.5,0.2 or a=1.5,b=0.2, got {at!r}.") from error
        if space is not None and len(values) != space.dimension:
            raise InputError(
                f"Expected {space.dimension} numbers in --at ({', '.join(space.names)}), got {len(values)}."
            )
        return values
    if start is not None:
        return [float(value) for value in space.vector(start)]
    if space is None:
        raise InputError("Expected --at, such as --at 1.5,0.2: the simulator does not say what its parameters are.")
    middle = []
    for p in space.parameters:
        finite = [bound for bound in (p.lower, p.upper) if -1e300 < bound < 1e300]
        middle.append(sum(finite) / len(finite) if finite else p.natural_scale or 1.0)
    return middle


def _study(options: argparse.Namespace) -> int:
    from pathlib import Path

    from bridge.cli.job import load_job
    from bridge.dispatch import is_root
    from bridge.storage.files import write_whole
    from bridge.studies import study

    job = load_job(options.file)
    result = study(job.simulator, job.start, seed=options.seed, budget=options.budget, scale=options.scale)
    if is_root():
        folder = Path(options.output)
        write_whole(folder / "study.md", lambda p: p.write_text(result.table(), encoding="utf-8"))
        write_whole(folder / "study.csv", lambda p: p.write_text(result.csv(), encoding="utf-8"))
        result.draw(folder / "study.png")
        print(result.table())
        print(f"{result.num_evaluations} simulations; written: {folder}/study.md, study.csv, study.png")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from bridge.planning import advice
    from bridge.planning.cost_model import Machine, Workload

    workload = Workload(
        cost_s=advice.parse_seconds(options.cost),
        num_samples=options.samples,
        num_outputs=options.outputs,
        dimension=options.parameters,
        cv=options.cv,
        batch=options.batch,
        leaf_size=options.leaf_size,
        schedule=options.schedule,
        bytes_per_number=8 if options.float64 else 4,
        failure_probability=options.failing,
        node_mtbf_s=None if options.mtbf is None else advice.parse_seconds(options.mtbf),
    )
    machine = Machine(
        latency_s=advice.parse_seconds(options.latency),
        bandwidth=1e9 * options.bandwidth,
        ranks_per_node=options.ranks_per_node,
    )
    ranks = advice.parse_ranks(options.ranks)
    print(advice.describe(workload) + "\n")
    print(advice.table(workload, machine, ranks) + "\n")
    print(advice.advise(workload, machine))
    return 0


def _doctor() -> int:
    """Collective under MPI: what each rank has; rank 0 prints."""
    from importlib import metadata

    import torch

    from bridge.dispatch import get_dispatcher
    from bridge.dispatch.world import launched_size, local_device

    dispatcher = get_dispatcher()
    threads, scratch = torch.get_num_threads(), tempfile.gettempdir()
    lines = dispatcher.each(
        f"{socket.gethostname()}, cores {_ranges(sorted(os.sched_getaffinity(0)))}, {threads} thread(s), device "
        f"{local_device()}, scratch {scratch} ({shutil.disk_usage(scratch).free / 1e9:.1f} GB free)"
    )
    if dispatcher.rank != 0:
        return 0
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package:<11}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<11}not installed")
    print(f"cuda       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print(f"OpenGL     {_opengl()}")
    print(f"MPI        {dispatcher.library}")
    print(f"launcher   {launched_size()} rank(s), as many as are seen: it belongs to that MPI")
    print(f"simulators {', '.join(registry.list_simulators())}")
    external = os.environ.get("TEM_SIMULATOR") or shutil.which("TEM-simulator")
    print(f"programs   TEM-simulator: {external or 'not found (TEM_SIMULATOR names it)'}")
    for rank, line in enumerate(lines):
        print(f"rank {rank:<6}{line}")
    if threads * dispatcher.local_size > (os.cpu_count() or 1):
        print(
            f"           {dispatcher.local_size} ranks of {threads} thread(s) on {os.cpu_count()} cores are too many: "
            "start fewer, or set BRIDGE_THREADS."
        )
    return 0


def _opengl() -> str:
    """What OpenGL there is, tried in a process of its own: a broken driver may take it along."""
    from bridge.environment import child_environment

    program = (
        "import os; os.environ.setdefault('PYOPENGL_PLATFORM', 'egl'); "
        "from adapters.render.pyrender import PyrenderSimulator; import pyrender; "
        "from OpenGL.GL import glGetString, GL_RENDERER; r = pyrender.OffscreenRenderer(8, 8); "
        "r._platform.make_current(); print(glGetString(GL_RENDERER).decode())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=child_environment(1)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({type(error).__name__})"
    said = (done.stdout.strip() or done.stderr.strip() or "?").splitlines()[-1]
    return said if done.returncode == 0 else f"none ({said})"


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


if __name__ == "__main__":
    sys.exit(main())
