"""Digests of results, for people who refactor: the same ones before and after show that no bit has changed.

    python tools/digests.py --out before.json
    ... the refactoring ...
    python tools/digests.py --compare before.json

    --only PATTERN   cases whose name matches, a regular expression: --only fit/kriging
    --ranks 1,2,3,4  numbers of ranks to run everything on besides, by the launcher beside this Python; "" for none

A line a case: a digest of the numbers that came out (dtype, shape and bytes of each array) and one of the words
(warnings, reasons, printed tables), so that another wording is told from another bit. A case is evaluated in several
ways: in one process, by a pool of two, on ranks, with rank 0 as the driver of two, and, of some fits, killed and
resumed. These must agree to the bit. A case that does not, or fails, ends the tool with exit status 1, and so does one
that differs from the file it is compared with.

Digests belong to one machine and one set of versions, which the file names: record them again on another. NaN counts
as one number, whatever its bits. What is no result is left out: durations, and which runs a store has had already.

The cases, and all that is said to `bridge`, are in `digest_cases.py`, what they run in `digest_boxes.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from digest_boxes import LIVES
from digest_cases import CASES, DRIVEN, KILLED, ON_TWO_RANKS, POOLED, Place, run_case

TIMEOUT_S = 900.0
POOL = 2
Results = dict[str, dict[str, Any]]  # case -> its parts and words, or the error


# --- a process that runs cases: this one's children ---------------------------------------------------------------


def run_ways(names: Sequence[str], ranks: int, scratch: Path) -> dict[str, Results]:
    """All cases in all ways that this process, or this many ranks, has: way -> case -> what came out."""
    import bridge

    label = "serial" if ranks == 0 else f"{ranks} rank{'s' * (ranks > 1)}"
    found: dict[str, Results] = {
        label: {n: run_case(n, Place(None, scratch / f"{label}-{i}")) for i, n in enumerate(names)}
    }
    for killed in sorted(scratch.glob("killed*")):
        way = f"{killed.name}, resumed: {label}"
        kept = {n: scratch / label / killed.name / str(i) for i, n in enumerate(KILLED)}
        found[way] = {n: run_case(n, Place(kept=kept[n])) for n in names if n in kept and kept[n].exists()}
    if ranks == 0:
        places = {n: Place(POOL, scratch / f"pool-{i}") for i, n in enumerate(names) if POOLED.search(n)}
        found["pool"] = {n: run_case(n, place) for n, place in places.items()}
    if ranks == 2:
        with bridge.driver() as leads:
            if leads:
                found["driver"] = {
                    n: run_case(n, Place(None, scratch / f"driver-{i}"))
                    for i, n in enumerate(names)
                    if DRIVEN.search(n)
                }
    return found


def die(name: str, directory: Path, ranks: int = 0) -> None:
    """Runs a fit until it has killed this process."""
    LIVES["left"] = KILLED[name] // max(1, ranks)
    run_case(name, Place(kept=directory))


def child(arguments: Sequence[str]) -> None:
    ranks, scratch, names = int(arguments[1]), Path(arguments[2]), json.loads(arguments[3])
    if arguments[0] == "kill" and ranks:
        die(names[0], scratch / f"killed on {ranks} ranks" / str(list(KILLED).index(names[0])), ranks)
    elif arguments[0] == "kill":
        import bridge

        bridge.fit  # noqa: B018  (once, before there are copies of this process)
        for name in names:
            if (process := os.fork()) == 0:
                die(name, scratch / "killed" / str(list(KILLED).index(name)))
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != -signal.SIGKILL:
                raise SystemExit(f"Expected {name} to be killed after {KILLED[name]} runs, but it ended.")
    else:
        found, rank = run_ways(names, ranks, scratch), 0
        if ranks:
            from mpi4py import MPI

            rank = MPI.COMM_WORLD.Get_rank()
        (scratch / f"out-{ranks}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def whole(parts: Mapping[str, Any]) -> str:
    """One digest of all parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12] if parts else "-"


# --- this process: starts them, compares, prints ------------------------------------------------------------------


def start(what: str, ranks: int, scratch: Path, names: Sequence[str]) -> None:
    """Runs a child, or ranks, to the end: a good one, but of ranks that kill themselves (`what` is "kill")."""
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if ranks and launcher is None:
        raise SystemExit("Expected mpiexec beside this Python or on PATH for --ranks, got none. Use --ranks ''.")
    command = [*([str(launcher), "-n", str(ranks)] if ranks else []), sys.executable, str(Path(__file__).resolve())]
    # Open MPI refuses root, and more ranks than cores, unless told so; other launchers ignore these.
    more = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
        # For a pool's children.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]),
    }
    log = scratch / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, "--child", what, str(ranks), str(scratch), json.dumps(list(names))],
            env={**os.environ, **more},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=scratch,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status is None or (status == 0) == (what == "kill" and ranks > 0):
        words = f"did not end within {TIMEOUT_S:g} s" if status is None else f"ended with status {status}"
        raise SystemExit(
            f"{what} on {ranks or 'no'} ranks {words}:\n{log.read_text(encoding='utf-8', errors='replace')[-4000:]}"
        )


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def collect(names: Sequence[str], rank_counts: Sequence[int], scratch: Path) -> dict[str, Results]:
    """way -> case -> what came out, the ways of ranks with each rank's."""
    to_kill = [name for name in KILLED if name in names]
    if to_kill:
        start("kill", 0, scratch, to_kill)
        for name in to_kill if 2 in rank_counts else ():
            if name in ("fit/kriging", "fit/gauss-newton"):
                start("kill", 2, scratch, [name])
    found: dict[str, Results] = {}
    for ranks in (0, *rank_counts):
        begin, used = time.monotonic(), cpu_seconds()
        label = "serial" if ranks == 0 else f"{ranks} rank{'s' * (ranks > 1)}"
        for killed in sorted(scratch.glob("killed*")):
            shutil.copytree(killed, scratch / label / killed.name)
        start("run", ranks, scratch, [n for n in names if ranks in (0, 2) or not ON_TWO_RANKS.search(n)])
        for rank in range(max(1, ranks)):
            ways = json.loads((scratch / f"out-{ranks}-{rank}.json").read_text(encoding="utf-8"))
            found |= {f"{way}{f' (rank {rank})' * (rank > 0)}": results for way, results in ways.items()}
        print(
            f"{label}: {time.monotonic() - begin:.0f} s, {cpu_seconds() - used:.0f} s of CPU time",
            file=sys.stderr,
            flush=True,
        )
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


def show(found: Mapping[str, Results]) -> bool:
    """Prints a line a case, and what is not the same in each way; whether all is."""
    good, serial = True, found["serial"]
    for name, result in serial.items():
        ways = [way for way, results in found.items() if name in results]
        lines = []
        for way in ways:
            other = found[way][name]
            if "error" in other or "error" in result:
                if other != result or way == "serial":
                    lines.append(f"    failed, {way}: {other.get('error', 'not here')}")
                continue
            for kind in ("numbers", "words"):
                if parts := differing(result[kind], other[kind]):
                    lines.append(f"    differs over ways in {kind}, {way}: {', '.join(parts)}")
        digests = "failed" if "error" in result else f"{whole(result['numbers'])}  words {whole(result['words'])}"
        print(f"{name:<40} {digests:<32} {len(ways)} ways", *lines, sep="\n", flush=True)
        good = good and not lines
    return good


def compare(now: Results, before: Results) -> bool:
    """Prints what differs, with the sums of sizes before and after, is new or gone; whether all is equal."""
    equal, lines = 0, []
    for name in dict.fromkeys([*before, *now]):
        if name not in now or name not in before:
            lines.append(f"{'gone' if name not in now else 'new':<7} {name}")
            continue
        a, b = before[name], now[name]
        if a == b and "error" not in a:
            equal += 1
            continue
        if "error" in a or "error" in b:
            lines.append(f"differs {name}: {a.get('error', 'worked before')} -> {b.get('error', 'works')}")
            continue
        parts = []
        for part in differing(a["numbers"], b["numbers"]):
            sizes = [f"{x[part][1]!r}" if part in x else "nothing" for x in (a["numbers"], b["numbers"])]
            parts.append(f"{part} ({' -> '.join(sizes)})")
        words = differing(a["words"], b["words"])
        spoken = f"{'and ' if parts else 'only '}words of {', '.join(words)}" if words else ""
        lines.append(f"differs {name}: {'; '.join(filter(None, [*parts, spoken]))}")
    print(*lines, f"{equal} cases equal, {len(lines)} not", sep="\n")
    return not lines


def machine() -> dict[str, str]:
    versions = {name: metadata.version(name) for name in ("numpy", "scipy", "torch")}
    return {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.processor()}", **versions}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="See the top of this file.")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the digests there")
    parser.add_argument("--compare", type=Path, metavar="FILE.json", help="compare with these")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name matches")
    parser.add_argument("--ranks", default="1,2,3,4", help="numbers of ranks; '' for none")
    given = parser.parse_args(arguments)
    before = json.loads(given.compare.read_text(encoding="utf-8")) if given.compare else None
    names = [name for name in CASES if re.search(given.only, name)]
    if not names:
        raise SystemExit(f"Expected a pattern that matches a case, got {given.only!r}. All: {', '.join(CASES)}.")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="digests-") as scratch:
        found = collect(names, [int(n) for n in given.ranks.split(",") if n], Path(scratch))
    good = show(found)
    print(f"{len(names)} cases: {time.monotonic() - begin:.0f} s, {cpu_seconds():.0f} s of CPU time", file=sys.stderr)
    if given.out:
        text = json.dumps({"machine": machine(), "cases": found["serial"]}, indent=1, sort_keys=True)
        given.out.write_text(text + "\n", encoding="utf-8")
    if before is not None:
        if before["machine"] != machine():
            print(f"recorded elsewhere: {before['machine']}, this is {machine()}")
        matching = {name: old for name, old in before["cases"].items() if re.search(given.only, name)}
        good = compare(found["serial"], matching) and good
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        sys.exit(main())
