"""Ours in several journals, before and after changes, against the first of them and against a peer in it.

    python tests/benchmarks/race/compare.py before.jsonl after.jsonl ... [--peer DFO-LS]

Runs and rounds: geometric means of the ratios, what was not solved counting as forty times (d + 1) runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from race.profiles import OURS, Hit, Instance, area, area_difference, common, hits, median_ratio, table
from race.run import read

MOST = 40  # (d + 1) runs, and a quarter of it in rounds
Found = dict[Instance, Hit]


def capped(hit: Hit, of: str) -> float:
    most = MOST * (hit.dimension + 1)
    return min(hit.runs, most) if of == "runs" else min(hit.rounds, most / 4)


def ratio(a: Found, b: Found, of: str) -> str:
    logs = np.array([np.log(capped(a[at], of) / capped(b[at], of)) for at in common(a, b)])
    return f"{np.exp(logs.mean()):.3f} +- {np.exp(logs.mean()) * logs.std() / len(logs) ** 0.5:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("journals", nargs="+", type=Path)
    parser.add_argument("--peer", default="DFO-LS")
    options = parser.parse_args(arguments)
    # What is known of the least losses is shared.
    lines = {path: read(path) for path in options.journals}
    together = [{**x, "solver": f"{path}:{x['solver']}"} for path in lines for x in lines[path]]
    found = hits(together)
    first = found[f"{options.journals[0]}:{OURS}"]
    peer = found.get(f"{options.journals[0]}:{options.peer}", {})
    rows = []
    for path in options.journals:
        mine = found[f"{path}:{OURS}"]
        difference, low, high = area_difference(mine, peer)
        rows.append(
            [
                str(path),
                str(len(common(mine, first))),
                f"{area(mine):.3f}",
                f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]",
                *(f"{median_ratio(mine, peer, of):.2f}" for of in ("runs", "rounds")),
                *(ratio(mine, first, of) for of in ("runs", "rounds")),
            ]
        )
    head = [
        "journal",
        "instances",
        "area",
        f"less {options.peer}'s, 95 %",
        "median runs",
        "median rounds",
        "runs",
        "rounds",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
