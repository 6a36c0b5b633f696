"""Evaluates problems: the rows of designs are run, and added up by weights.

The outputs stay on the rank that computed them. Two ways, chosen from N, d, m and settings, never from the ranks:

* kept: each rank keeps its rows of F. The forward pass reduces m numbers; a VJP exchanges the N scalars <v, F_i>.
* streamed: rows are added to F^T [a, W] as they come and dropped; the sums, (1 + d) m numbers, are reduced once.
"""

from __future__ import annotations

from bridge.evaluation.kept import Kept, KeptSums, sum_kept
from bridge.evaluation.request import Drawn, Request, draw
from bridge.evaluation.run_rows import Ran, run_rows
from bridge.evaluation.streamed import Stream, Streamed, StreamedSums


def evaluate_problems(request: Request) -> Kept | Streamed:
    """Evaluates all rows of all problems, each on one rank. Collective.

    Raises:
        InputError: what is asked for is not finite, or the simulator refuses it.
        EvaluationError, OutputError: a run failed, or gave something unusable; the same on every rank.
    """
    drawn = draw(request)
    ran = run_rows(drawn.task, drawn)
    sums = _collect(drawn, ran)
    return Streamed(drawn, ran.known, sums) if isinstance(sums, StreamedSums) else Kept(drawn, ran.known, sums)


def _collect(drawn: Drawn, ran: Ran) -> KeptSums | StreamedSums:
    """The sums over all ranks, by trees of one shape. Collective."""
    if isinstance(ran.rows, Stream):
        return ran.rows.finish(ran.known.owner)
    return sum_kept(drawn, ran.rows, ran.runner.failures)
