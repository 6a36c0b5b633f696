"""The command line: `bridge` or, where a system program has that name, `python -m bridge`.

Exit codes: 0 done, 1 uncaught error, 2 usage, input or set-up, 3 failed evaluations, 70 a bug (ranks in different
places), 75 stopped by a signal, Ctrl-C or the end of the allocation (what is finished was written: `--resume`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import bridge
from bridge import registry
from bridge.errors import BridgeError, InputError, exit_code

if TYPE_CHECKING:
    from pathlib import Path


_PACKAGES = ("numpy", "scipy", "torch", "gemmi", "mrcfile", "pyrender", "trimesh", "numba", "matplotlib", "mpi4py")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bridge", description="Gradients through simulators that cannot be differentiated."
    )
    parser.add_argument("--version", action="version", version=f"bridge {bridge.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the simulators that are known by name")
    info = commands.add_parser("info", help="what a simulator is, and its arguments")
    info.add_argument("name")
    fit = commands.add_parser("fit", help="recover parameters from a target, as a job file says")
    fit.add_argument("file", help="job file (TOML)")
    fit.add_argument("-o", "--output", help="directory for the results, in place of the file's")
    fit.add_argument(
        "--progress",
        default="auto",
        choices=("auto", "lines", "off"),
        help="a live view on a terminal; lines for logs; off",
    )
    fit.add_argument(
        "--method", help="in place of the file's: auto, kriging, trust-region, gauss-newton, adam, torch or natural"
    )
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
    again.add_argument("--resume", action="store_true", help="go on with the run in the directory, if there is one")
    again.add_argument("--fresh", action="store_true", help="begin anew, even where an unfinished run is lost")
    run = commands.add_parser("run", help="run a Python script, so that a failure on one rank ends the job on all")
    run.add_argument("--driver", action="store_true", help="rank 0 runs the script, a serial one; the others help it")
    run.add_argument("script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the script")
    study = commands.add_parser("study", help="which estimator suits the simulator of a job file")
    study.add_argument("file", help="job file (TOML): its simulator and start")
    study.add_argument("--budget", type=int, default=4096, help="simulator runs to spend (default: 4096)")
    study.add_argument("--scale", type=float, default=1.0, help="of the noise, in natural units (default: 1)")
    study.add_argument("--seed", type=int, default=0)
    study.add_argument("-o", "--output", default="study", help="directory for study.md, study.csv and study.png")
    plan = commands.add_parser("plan", help="how many ranks suit a simulator: step time and efficiency, predicted")
    plan.add_argument("--cost", required=True, help="of one evaluation, with its unit: 50ms, 2s, 3min, 1h")
    plan.add_argument("--samples", type=int, default=64, help="N, evaluations of a step (default: 64)")
    plan.add_argument("--outputs", type=int, default=1, help="m, numbers of an output (default: 1)")
    plan.add_argument("--parameters", type=int, default=8, help="d (default: 8)")
    plan.add_argument("--ranks", default="1,2,4,...,4096", help="which (default: 1,2,4,...,4096)")
    plan.add_argument("--cv", type=float, default=0.0, help="standard deviation / mean of the cost (default: 0)")
    plan.add_argument("--batch", type=int, default=1, help="parameter vectors of one call (default: 1)")
    plan.add_argument("--leaf-size", type=int, help="as in bridge.smooth")
    plan.add_argument("--schedule", default="auto", choices=("auto", "static", "dynamic"))
    plan.add_argument("--float64", action="store_true", help="outputs of 8 bytes a number, not 4")
    plan.add_argument("--failing", type=float, default=0.0, help="probability that an evaluation fails (default: 0)")
    plan.add_argument("--mtbf", help="mean time between failures of a node: 5y (default: none)")
    plan.add_argument("--latency", default="10us", help="of a message (default: 10us)")
    plan.add_argument("--bandwidth", type=float, default=10.0, help="between two ranks, GB/s (default: 10)")
    plan.add_argument("--ranks-per-node", type=int, default=64)
    commands.add_parser("doctor", help="what this machine has: versions, MPI, threads")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            print("\n".join(registry.list_simulators()))
            return 0
        if options.command == "info":
            return _info(options.name)
        if options.command == "doctor":
            return _doctor()
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


def _info(name: str) -> int:
    import inspect

    factory = registry.find(name)
    print(f"{name}: {factory.__module__}.{factory.__qualname__}{inspect.signature(factory)}\n")
    print(inspect.getdoc(factory) or "")
    return 0


def _fit(options: argparse.Namespace) -> int:
    import shlex
    from dataclasses import replace

    from bridge.dispatch import is_root
    from bridge.job import load_job, run_job
    from bridge.progress import JSONLines, Observer, TensorBoard, view
    from bridge.report import summary, write_report
    from bridge.simulator import simulator_name

    observers: list[Observer] = list(view("off" if options.quiet else options.progress))
    if options.jsonl:
        observers.append(JSONLines(options.jsonl))
    if options.tensorboard:
        observers.append(TensorBoard(options.tensorboard))
    job = load_job(options.file, options.output)
    given = {"method": options.method, "max_runs": options.max_runs, "reuse": options.reuse}
    job = replace(job, settings={**job.settings, **{name: value for name, value in given.items() if value}})
    result, written = run_job(job, observers, resume=options.resume, overwrite=options.fresh)
    if is_root():
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
        print(summary(result))
        print("written: " + ", ".join(str(p) for p in written))
    return 75 if result.stop_reason == "interrupted" else 0


def _run(script: str, arguments: Sequence[str], drive: bool) -> int:
    """The script as `__main__`, under the rules that a job of several ranks needs from its first line on.

    An exception ends all ranks, with the traceback, also before the script has called bridge; so does `sys.exit` of one
    rank alone. A rank that is at its end while others still make collective calls raises a `CollectiveError` on all.
    """
    from pathlib import Path

    from bridge.dispatch import get_dispatcher
    from bridge.dispatch.driver import driver

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
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        # A `BridgeError` too is shown with its traceback, as under plain Python; under MPI this ends all ranks.
        sys.excepthook(type(error), error, error.__traceback__)
        return exit_code(type(error)) if isinstance(error, BridgeError) else 1
    return 0


def _study(options: argparse.Namespace) -> int:
    from pathlib import Path

    from bridge.dispatch import is_root
    from bridge.files import write_whole
    from bridge.job import load_job
    from bridge.studying import study

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
    from bridge import advising
    from bridge.planning import Machine, Workload

    workload = Workload(
        cost_s=advising.parse_seconds(options.cost),
        num_samples=options.samples,
        num_outputs=options.outputs,
        dimension=options.parameters,
        cv=options.cv,
        batch=options.batch,
        leaf_size=options.leaf_size,
        schedule=options.schedule,
        bytes_per_number=8 if options.float64 else 4,
        failure_probability=options.failing,
        node_mtbf_s=None if options.mtbf is None else advising.parse_seconds(options.mtbf),
    )
    machine = Machine(
        latency_s=advising.parse_seconds(options.latency),
        bandwidth=1e9 * options.bandwidth,
        ranks_per_node=options.ranks_per_node,
    )
    ranks = advising.parse_ranks(options.ranks)
    print(advising.describe(workload) + "\n")
    print(advising.table(workload, machine, ranks) + "\n")
    print(advising.advise(workload, machine))
    return 0


def _doctor() -> int:
    """Collective under MPI: what each rank has; rank 0 prints."""
    from importlib import metadata

    import torch

    from bridge.dispatch import get_dispatcher
    from bridge.dispatch.base import launched_size, local_device

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
        "from adapters.pyrender import PyrenderSimulator; import pyrender; r = pyrender.OffscreenRenderer(8, 8); "
        "from OpenGL.GL import glGetString, GL_RENDERER; "
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
