"""The command line: `bridge` or, where a system program has that name, `python -m bridge`.

Exit codes: 0 done, 1 uncaught error, 2 usage or input, 3 failed evaluations, 75 interrupted (results were written).
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from typing import Any

import bridge
from bridge import registry
from bridge.errors import BridgeError, EvaluationError, InputError


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
    fit.add_argument("-q", "--quiet", action="store_true", help="no progress")
    run = commands.add_parser("run", help="run a Python script, so that a failure on one rank ends the job on all")
    run.add_argument("script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the script")
    study = commands.add_parser("study", help="which estimator suits the simulator of a job file")
    study.add_argument("file", help="job file (TOML): its simulator and start")
    study.add_argument("--budget", type=int, default=4096, help="simulator runs to spend (default: 4096)")
    study.add_argument("--scale", type=float, default=1.0, help="of the noise, in natural units (default: 1)")
    study.add_argument("--seed", type=int, default=0)
    study.add_argument("-o", "--output", default="study", help="directory for study.md, study.csv and study.png")
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
        if options.command == "run":
            return _run(options.script, options.arguments)
        return _fit(options.file, options.output, options.quiet)
    except BridgeError as error:
        print(f"bridge: {error}", file=sys.stderr)
        return 3 if isinstance(error, EvaluationError) else 2


def _info(name: str) -> int:
    import inspect

    factory = registry.find(name)
    print(f"{name}: {factory.__module__}.{factory.__qualname__}{inspect.signature(factory)}\n")
    print(inspect.getdoc(factory) or "")
    return 0


def _fit(file: str, output: str | None, quiet: bool) -> int:
    from bridge.dispatch import is_root
    from bridge.job import load_job, run_job
    from bridge.report import summary

    result, written = run_job(load_job(file, output), quiet)
    if is_root():
        print(summary(result))
        print("written: " + ", ".join(str(p) for p in written))
    return 75 if result.stop_reason == "interrupted" else 0


def _run(script: str, arguments: Sequence[str]) -> int:
    """The script as `__main__`, under the rules that a job of several ranks needs from its first line on.

    An exception ends all ranks, with the traceback, also before the script has called bridge; so does `sys.exit` of one
    rank alone. A rank that is at its end while others still make collective calls raises a `CollectiveError` on all.
    """
    import runpy
    from pathlib import Path

    from bridge.dispatch import get_dispatcher

    path = Path(script)
    if not path.is_file():
        raise InputError(f"Expected a Python script, got {script!r}, which is no file.")
    dispatcher = get_dispatcher()
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)
    code: Any = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        if dispatcher.size == 1:
            raise
        # A `BridgeError` too: it is shown with its traceback, as under plain Python.
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    status = 0 if code is None else code if isinstance(code, int) else 1
    if dispatcher.size > 1:
        try:
            dispatcher.begin("end of the script", f"exit status {status}")
        except BridgeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return status


def _study(options: argparse.Namespace) -> int:
    from pathlib import Path

    from bridge.dispatch import is_root
    from bridge.job import load_job
    from bridge.files import write_whole
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


def _doctor() -> int:
    from importlib import metadata

    import torch

    from bridge.dispatch import get_dispatcher
    from bridge.dispatch.base import launched_size

    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in (
        "numpy",
        "scipy",
        "torch",
        "gemmi",
        "mrcfile",
        "pyrender",
        "trimesh",
        "matplotlib",
        "mpi4py",
    ):
        try:
            print(f"{package:<11}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<11}not installed")
    dispatcher = get_dispatcher()
    print(f"cuda       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print(f"launcher   {launched_size()} rank(s); this is rank {dispatcher.rank} of {dispatcher.size}")
    print(f"threads    {torch.get_num_threads()} (BRIDGE_THREADS)")
    print(f"simulators {', '.join(registry.list_simulators())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
