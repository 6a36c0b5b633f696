"""The command line: `bridge` or, where a system program has that name, `python -m bridge`.

Exit codes: 0 done, 1 uncaught error, 2 usage, input or set-up, 3 failed evaluations, 70 a bug (ranks in different
places), 75 stopped by a signal, Ctrl-C or the end of the allocation (the same command goes on), 130 by a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import bridge
from bridge.checks import did_you_mean
from bridge.errors import BridgeError, InputError, exit_code, exit_status
from bridge.interrupts import Held
from bridge.simulator import registry

if TYPE_CHECKING:
    from bridge.cli.job import Job
    from bridge.reporting.observers import Observer


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
        return _COMMANDS[options.command].run(options)
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
    for name, command in _COMMANDS.items():
        said = f"{command.what[0].upper()}{command.what[1:]}. {command.more}".strip()
        command.options(commands.add_parser(name, help=command.what, description=said))
    return parser, list(_COMMANDS)


# --- the commands: what each takes, and what it does ---------------------------------------------------------------


def _no_options(parser: argparse.ArgumentParser) -> None:
    pass


def _list(options: argparse.Namespace) -> int:
    print("\n".join(registry.list_simulators()))
    return 0


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="one of `bridge list`, or of your own: mysim.py:function")


def _info(options: argparse.Namespace) -> int:
    import inspect

    from bridge.simulator.protocol import Simulator

    name = options.name
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


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="job file (TOML); examples/demo.toml is one")
    parser.add_argument("-o", "--output", help="directory for the results, in place of the file's")
    parser.add_argument(
        "--watch",
        metavar="WHAT",
        action="append",
        default=[],
        help="auto, a live view on a terminal (the default); lines, for logs; off; jsonl:FILE, one JSON object a step; "
        "tensorboard:DIRECTORY; or the name of an observer of your own; may be repeated",
    )
    parser.add_argument("--method", help="in place of the file's: auto, kriging, gauss-newton, adam, ...")
    parser.add_argument("--max-runs", type=int, metavar="N", help="simulator runs to spend, in place of the file's")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress: --watch off")
    parser.add_argument(
        "--reuse",
        metavar="DIRECTORY",
        action="append",
        default=[],
        help="begin with the evaluations of an earlier fit of the same simulator (may be repeated)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in the directory: the default")
    again.add_argument("--fresh", action="store_true", help="begin anew, and lose the run in the directory")


def _fit(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from bridge.cli.job import load_job
    from bridge.reporting.observers import CHOICES, view
    from bridge.storage.run import correct_status

    choices = [
        *(["off"] if options.quiet else ["auto"] if not set(options.watch) & set(CHOICES) else []),
        *options.watch,
    ]
    observers = [observer for choice in choices for observer in view(choice)]
    job = load_job(options.file, options.output)
    job = replace(job, settings={**job.settings, **_in_place(job.settings, options)})
    code = 1
    try:
        code = _fitted(job, options, observers)
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


def _in_place(settings: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says in place of the file."""
    from dataclasses import replace

    from bridge.fitting.methods.kriging import Kriging
    from bridge.fitting.stop import make_stop

    given: dict[str, Any] = {}
    if options.method:
        given["method"] = options.method
    if options.max_runs:
        given["stop"] = replace(make_stop(settings.get("stop")), runs=options.max_runs)
    if options.reuse:
        method = given.get("method", settings.get("method", "auto"))
        if not isinstance(method, Kriging) and method not in ("auto", "kriging"):
            raise InputError(
                f"Expected method kriging with --reuse, got {method!r}, which has no use for earlier runs."
            )
        given["method"] = replace(method if isinstance(method, Kriging) else Kriging(), reuse=options.reuse)
    return given


def _fitted(job: Job, options: argparse.Namespace, observers: Sequence[Observer]) -> int:
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
        settings = {"simulator": simulator_name(job.simulator), "target": job.target_file.name, **job.said}
        more = [word for directory in options.reuse for word in ("--reuse", directory)]
        more += ["--method", options.method] if options.method else []
        more += ["--max-runs", str(options.max_runs)] if options.max_runs else []
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


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="one of `bridge list`, of your own (mysim.py:function), or a job file (TOML)")
    parser.add_argument(
        "--at", metavar="VALUES", help="where: 1.5,0.2 or a=1.5,b=0.2 (default: a job's start, else the middle)"
    )
    parser.add_argument("--seed", type=int, default=0)


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


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="job file (TOML): its simulator and start")
    parser.add_argument("--budget", type=int, default=4096, help="simulator runs to spend (default: 4096)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the noise, in natural units (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    parser.add_argument("-o", "--output", default="study", help="directory for study.md, study.csv and study.png")


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


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cost", required=True, help="of one evaluation, with its unit: 50ms, 2s, 3min, 1h")
    parser.add_argument("--samples", type=int, default=64, help="N, evaluations of a step (default: 64)")
    parser.add_argument("--outputs", type=int, default=1, help="m, numbers of an output (default: 1)")
    parser.add_argument("--parameters", type=int, default=8, help="d (default: 8)")
    parser.add_argument("--ranks", default="1,2,4,...,4096", help="which (default: 1,2,4,...,4096)")
    parser.add_argument("--cv", type=float, default=0.0, help="standard deviation / mean of the cost (default: 0)")
    parser.add_argument("--batch", type=int, default=1, help="parameter vectors of one call (default: 1)")
    parser.add_argument("--leaf-size", type=int, help="as in bridge.Ranks")
    parser.add_argument(
        "--schedule", default="auto", choices=("auto", "static", "dynamic"), help="as in bridge.Ranks (default: auto)"
    )
    parser.add_argument("--float64", action="store_true", help="outputs of 8 bytes a number, not 4")
    parser.add_argument("--failing", type=float, default=0.0, help="probability that an evaluation fails (default: 0)")
    parser.add_argument("--mtbf", help="mean time between failures of a node: 5y (default: none)")
    parser.add_argument("--latency", default="10us", help="of a message (default: 10us)")
    parser.add_argument("--bandwidth", type=float, default=10.0, help="between two ranks, GB/s (default: 10)")
    parser.add_argument("--ranks-per-node", type=int, default=64, help="of the cluster (default: 64)")


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


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--driver", action="store_true", help="rank 0 runs the script, a serial one; the others help it"
    )
    parser.add_argument("script", help="a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="handed to the script")


def _run(options: argparse.Namespace) -> int:
    from bridge.cli.script import run_script

    return run_script(options.script, options.arguments, options.driver)


def _doctor(options: argparse.Namespace) -> int:
    from bridge.cli.doctor import doctor

    return doctor()


@dataclass(frozen=True)
class Command:
    """A word of the command line: what it does in a sentence, what it takes, what it does, what more help says."""

    what: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    more: str = ""


_COMMANDS = {
    "list": Command("the simulators that are known by name", _no_options, _list),
    "info": Command("what a simulator is, and its arguments", _info_options, _info),
    "check": Command(
        "whether a simulator gives the same numbers again: on a second call, in another order, in another process",
        _check_options,
        _check,
    ),
    "fit": Command(
        "recover parameters from a target, as a job file says",
        _fit_options,
        _fit,
        "Stopped or killed, it goes on at the same command. A finished fit is shown again, not run again.",
    ),
    "run": Command("run a Python script, so that a failure on one rank ends the job on all", _run_options, _run),
    "study": Command("which estimator suits the simulator of a job file", _study_options, _study),
    "plan": Command("how many ranks suit a simulator: step time and efficiency, predicted", _plan_options, _plan),
    "doctor": Command("what this machine has: versions, MPI, threads", _no_options, _doctor),
}


if __name__ == "__main__":
    sys.exit(main())
