"""The tables, the figure and the list of the race's page, from journals.

    python tests/benchmarks/race/page.py race.jsonl ... --page docs/race

Replaces what stands between `<!-- NAME -->` and `<!-- end -->` in README.md, and writes runs.csv, profiles.png, and all
lines packed, race.jsonl.xz, which can be read again like any journal.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from bridge.errors import InputError
from race import problems
from race.more_wild import VARIANTS
from race.peers import SOLVERS
from race.profiles import (
    OURS,
    Hits,
    Line,
    area,
    area_difference,
    chosen,
    hits,
    median_ratio,
    medians,
    performance,
    profile,
    show,
    table,
)
from race.run import read

ALPHAS = (2, 5, 10, 20, 40, 60)
ROUNDS = (2, 5, 10, 20, 50, 100)
SEQUENTIAL = ("DFO-LS", "Py-BOBYQA")


def groups(found: Hits) -> dict[str, list[str]]:
    run = {at[0] for of in found.values() for at in of}
    result = {"all": [n for n in problems.NAMES if n in run]}
    result["simulators"] = [n for n in problems.SIMULATORS if n in run]
    for variant in VARIANTS:
        result[variant] = [n for n in problems.PUBLISHED if n in run and n.endswith(f":{variant}")]
    return result


def order(found: Hits) -> list[str]:
    """Ours first, then by area."""
    return sorted(found, key=lambda solver: (solver != OURS, -area(found[solver])))


def areas(found: Hits) -> str:
    sets = groups(found)
    rows = []
    for solver in order(found):
        values = [show(area(chosen(found, names)[solver]), 3) for names in sets.values()]
        difference = "" if solver == OURS or OURS not in found else _difference(found, solver)
        rows.append([solver, str(len(found[solver])), *values, difference])
    return table(["area under the data profile", "instances", *sets, "ours less it, 95 %"], rows)


def _difference(found: Hits, solver: str) -> str:
    middle, low, high = area_difference(found[OURS], found[solver])
    return "-" if np.isnan(middle) else f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def shares(found: Hits, rounds: bool) -> str:
    at = ROUNDS if rounds else ALPHAS
    unit = "rounds" if rounds else "(d + 1) runs"
    rows = [[s, *(show(v) for v in profile(found[s], np.array(at), rounds))] for s in order(found)]
    return table([f"share solved within ... {unit}", *map(str, at)], rows)


def tolerances(lines: list[Line]) -> str:
    published = [line for line in lines if line["group"] == "published"]
    taus = (1e-1, 1e-3, 1e-5)
    found = {tau: hits(published, tau) for tau in taus}
    rows = [[s, *(show(area(found[tau][s]), 3) for tau in taus)] for s in order(found[1e-3])]
    return table(["area, published problems", *(f"tau = {tau:g}" for tau in taus)], rows)


def ratios(found: Hits) -> str:
    if OURS not in found:
        return "Ours has not run."
    rows = []
    for solver in order(found)[1:]:
        pair = found[OURS], found[solver]
        both = [" / ".join(show(v, 0) for v in medians(*pair, of)) for of in ("runs", "rounds")]
        rows.append([solver, *both, *(show(median_ratio(*pair, of)) for of in ("runs", "rounds"))])
    return table(["ours / theirs", "median runs", "median rounds", "median ratio of runs", "of rounds"], rows)


def each(found: Hits) -> str:
    """Solved share, median runs and rounds on each simulator, and over each variant of the published ones."""
    solvers = order(found)
    rows = []
    for name in groups(found)["simulators"]:
        row = [name]
        for solver in solvers:
            of = list(chosen(found, [name])[solver].values())
            row.append(_cell([h.runs for h in of], [h.rounds for h in of]))
        rows.append(row)
    return table(["solved, median runs / rounds", *solvers], rows)


def _cell(runs: list[float], rounds: list[float]) -> str:
    if not runs:
        return "-"
    solved = sum(np.isfinite(runs))
    if 2 * solved <= len(runs):  # the median is infinite
        return f"{solved}/{len(runs)}"
    return f"{solved}/{len(runs)}, {np.median(runs):.0f} / {np.median(rounds):.0f}"


def better(found: Hits) -> str:
    """Where a peer is better than ours, with 95 % confidence over seeds, or leads by 0.05."""
    if OURS not in found:
        return "Ours has not run."
    lines = []
    for name in groups(found)["all"]:
        one = chosen(found, [name])
        ahead = []
        for solver in order(found)[1:]:
            middle, _, high = area_difference(one[OURS], one[solver])
            if middle <= -0.05 or high < 0:
                ahead.append((middle, f"{solver} ({-middle:+.2f}{'' if high < 0 else ', within the noise'})"))
        if ahead:
            lines.append(f"* {name}: {', '.join(text for _, text in sorted(ahead))}")
    return "\n".join(lines) or "Nowhere, by 0.05 of area or beyond the noise of the seeds."


def effort(lines: list[Line]) -> str:
    rows = []
    for solver in order(hits(lines)):
        mine = [line for line in lines if line["solver"] == solver]
        own = np.array([line["own_cpu_s"] for line in mine])
        cut, failed = (
            sum(test) for test in zip(*((x["spent"] == "time", bool(x["error"])) for x in mine), strict=True)
        )
        versions = sorted({line["version"] for line in mine if line["version"]})
        rows.append(
            [
                solver,
                ", ".join(versions) or "own",
                str(len(mine)),
                show(float(np.median(own))),
                show(float(own.max())),
                str(cut),
                str(failed),
            ]
        )
    head = ["solver", "version", "instances", "own CPU [s]: median", "most", "cut at 60 s", "ended by an error"]
    return table(head, rows)


def write_rows(lines: list[Line], found: Hits, path: Path) -> None:
    cpu: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        cpu.setdefault((line["problem"], line["solver"]), []).append(line["own_cpu_s"])
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["problem", "solver", "seeds", "solved", "median_runs", "median_rounds", "area", "own_cpu_s"])
        for name in groups(found)["all"]:
            for solver in order(found):
                of = list(chosen(found, [name])[solver].values())
                if of:
                    out.writerow(
                        [
                            name,
                            solver,
                            len(of),
                            sum(np.isfinite(h.runs) for h in of),
                            *(f"{np.median([getattr(h, what) for h in of]):g}" for what in ("runs", "rounds")),
                            f"{np.mean([h.area for h in of]):.4f}",
                            f"{np.median(cpu[name, solver]):.3g}",
                        ]
                    )


def draw(found: Hits, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    colours = {s: "black" if s == OURS else f"C{k % 10}" for k, s in enumerate(SOLVERS)}
    sets = groups(found)
    published = [n for v in VARIANTS for n in sets[v]]
    alphas, rounds, factors = (
        np.geomspace(0.25, 60, 120),
        np.unique(np.geomspace(1, 1000, 120).round()),
        np.geomspace(1, 30, 120),
    )
    panels: list[tuple[Any, str, str, Any]] = [
        (axes[0, 0], "simulators: data profile", "runs / (d + 1)", (sets["simulators"], alphas, False)),
        (axes[0, 1], "published problems: data profile", "runs / (d + 1)", (published, alphas, False)),
        (axes[1, 0], "all: share solved against rounds", "rounds", (sets["all"], rounds, True)),
    ]
    for axis, title, label, (names, at, by_rounds) in panels:
        some = chosen(found, names)
        for solver in order(found):
            if some[solver]:
                axis.plot(
                    at,
                    profile(some[solver], at, by_rounds),
                    color=colours[solver],
                    label=solver,
                    lw=2.4 if solver == OURS else 1.2,
                    drawstyle="steps-post",
                )
        axis.set(title=title, xlabel=label, ylabel="share solved", xscale="log", ylim=(0, 1), xlim=(at[0], at[-1]))
    axis = axes[1, 1]
    for solver in order(found):
        axis.plot(
            factors,
            performance(found, solver, factors),
            color=colours[solver],
            drawstyle="steps-post",
            label=solver,
            lw=2.4 if solver == OURS else 1.2,
        )
    axis.set(
        title="all: performance profile", xlabel="runs / those of the fastest", xscale="log", ylim=(0, 1), xlim=(1, 30)
    )
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def pack(lines: list[Line], path: Path) -> None:
    """Distances with six digits."""
    short = [{**x, "way": [(run, number, float(f"{d:.6g}")) for run, number, d in x["way"]]} for x in lines]
    short.sort(key=lambda x: (x["seed"], x["problem"], x["solver"]))
    path.write_bytes(lzma.compress("".join(json.dumps(x) + "\n" for x in short).encode(), preset=9))


def fill(text: str, parts: dict[str, str]) -> str:
    """The text with what stands between `<!-- NAME -->` and `<!-- end -->` replaced.

    Raises:
        InputError: a part has no place in the text.
    """
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"Expected <!-- {name} --> and <!-- end --> in the page, got neither. Add the two lines.")
        text = pattern.sub(lambda m, part=part: m[1] + part + m[2], text)
    return text


def together(journals: list[Path]) -> list[Line]:
    """All lines; of a solver that ran an instance again, the last."""
    lines = {(x["problem"], x["solver"], x["seed"]): x for journal in journals for x in read(journal)}
    return list(lines.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("journals", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, help="folder of README.md; without it the tables are printed")
    options = parser.parse_args(arguments)
    lines = together(options.journals)
    if not lines:
        raise InputError(f"Expected lines in {', '.join(map(str, options.journals))}, got none. Run race/run.py first.")
    found = hits(lines)
    parts = {
        "areas": areas(found),
        "runs": shares(found, False),
        "rounds": shares(found, True),
        "tolerances": tolerances(lines),
        "ratios": ratios(found),
        "each": each(found),
        "better": better(found),
        "effort": effort(lines),
    }
    if options.page is None:
        print("\n\n".join(parts.values()))
        return
    page = options.page / "README.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
    write_rows(lines, found, options.page / "runs.csv")
    draw(found, options.page / "profiles.png")
    pack(lines, options.page / "race.jsonl.xz")


if __name__ == "__main__":
    main()
