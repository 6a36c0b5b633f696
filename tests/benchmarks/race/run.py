"""Runs the race and writes its journal: one line of JSON for each problem, seed and solver.

    python tests/benchmarks/race/run.py --journal race.jsonl
    python tests/benchmarks/race/run.py --journal race.jsonl --solvers ours,DFO-LS --problems disc,published --seeds 0:5
    python tests/benchmarks/race/page.py race.jsonl --page docs/race

Lines that are in the journal already are not run again. One seed after the other, so that an interrupted race is a
race over fewer seeds. Peers: `pip install 'simulation-bridge[race]'`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np

from bridge.errors import InputError, SetupError
from race import problems
from race.counting import Counter, SpentError
from race.peers import SOLVERS, Solver

HANGS_S = 600  # of wall time: a solver that evaluates nothing any more
# Seeds of dear problems, for all solvers.
SEEDS = {"tilt-series": 3}


def _hangs(signum: int, frame: Any) -> None:
    raise SpentError(f"no end after {HANGS_S} s")


def run_one(name: str, solver: Solver, seed: int) -> dict[str, Any]:
    """One line of the journal; a solver that raises keeps what it had evaluated until then.

    Raises:
        SetupError: the solver is not installed.
    """
    problem = problems.make(name, seed)
    budget = min(problem.budget, solver.most_runs or problem.budget)
    counter = Counter(problem, seed, budget)
    error = ""
    begin = time.monotonic()
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(HANGS_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solver.solve(counter, seed)
    except SetupError:
        raise
    except Exception as reason:
        if not counter.spent:
            error = "".join(traceback.format_exception_only(reason)).strip()[-300:]
    finally:
        signal.alarm(0)
    own = counter.cpu_s
    outputs = problem.simulator(problem.start[None], np.zeros(1, dtype=np.uint64))
    way = [(run, number, float(f"{value:.12g}")) for run, number, value in counter.way()]
    return {
        "problem": name,
        "solver": "",
        "seed": seed,
        "version": solver.version,
        "group": problem.group,
        "dimension": problem.dimension,
        "budget": problem.budget,
        "allowed": budget,
        "criterion": problem.criterion,
        "tau": problem.tau,
        "least": problem.least,
        "start": float(problem.distance(problem.start[None], outputs)[0]),
        "runs": counter.runs,
        "rounds": len(counter.ends) or counter.rounds,
        "way": way,
        "own_cpu_s": round(own, 4),
        "simulator_cpu_s": round(counter.simulator_cpu_s, 4),
        "wall_s": round(time.monotonic() - begin, 3),
        "spent": counter.spent,
        "error": error,
    }


def _work(task: tuple[str, str, int]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    name, solver, seed = task
    return {**run_one(name, SOLVERS[solver], seed), "solver": solver}


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a journal, also of a packed one (.xz); a last one that was cut short is left out."""
    content = path.read_bytes() if path.exists() else b""
    lines = (lzma.decompress(content) if path.suffix == ".xz" else content).decode().splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number + 1 < len(lines):
                raise InputError(
                    f"Expected JSON in line {number + 1} of {path}, got {line[:60]!r}. Remove it."
                ) from error
    return found


def selected(text: str, known: list[str], groups: dict[str, list[str]], what: str) -> list[str]:
    chosen: list[str] = []
    for word in text.split(","):
        if word not in known and word not in groups:
            raise InputError(f"Unknown {what} {word!r}. Known: {', '.join([*groups, *known])}.")
        chosen += groups.get(word, [word])
    return list(dict.fromkeys(chosen))


def tasks(solvers: list[str], names: list[str], seeds: range) -> list[tuple[str, str, int]]:
    """Seed by seed."""
    return [
        (name, solver, seed)
        for seed in seeds
        for name in names
        for solver in solvers
        if seed < min(SEEDS.get(name, seed + 1), SOLVERS[solver].seeds or seed + 1)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--solvers", default="all", help=f'"all", "peers", or some of {", ".join(SOLVERS)}')
    parser.add_argument("--problems", default="all", help='"all", "simulators", "published", "practice", or names')
    parser.add_argument("--seeds", default="0:20", help="first:end")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    everybody = list(SOLVERS)
    solvers = selected(options.solvers, everybody, {"all": everybody, "peers": everybody[1:]}, "solver")
    groups = {
        "all": list(problems.NAMES),
        "simulators": list(problems.SIMULATORS),
        "published": list(problems.PUBLISHED),
        "practice": list(problems.PRACTICE),
    }
    names = selected(options.problems, [*problems.NAMES, *problems.PRACTICE], groups, "problem")
    first, end = map(int, options.seeds.split(":"))
    done = {(line["problem"], line["solver"], line["seed"]) for line in read(options.journal)}
    left = [task for task in tasks(solvers, names, range(first, end)) if task not in done]
    print(f"{len(left)} to run, {len(done)} in the journal", flush=True)
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    if options.journal.exists():  # a last line that was cut short would spoil the next one
        text = options.journal.read_bytes()
        os.truncate(options.journal, text.rfind(b"\n") + 1)
    with open(options.journal, "a", encoding="utf-8") as journal:
        if options.jobs == 1:
            for task in left:
                _note(journal, _work(task))
            return
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for line in pool.imap_unordered(_work, left):
                _note(journal, line)


def _note(journal: Any, line: dict[str, Any]) -> None:
    journal.write(json.dumps(line) + "\n")
    journal.flush()
    if line["error"]:
        print(line["problem"], line["solver"], line["seed"], line["error"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
