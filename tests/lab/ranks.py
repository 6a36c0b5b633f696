"""Contracts whose ranks are forks of a process that has torch imported already: a second in place of many."""

from __future__ import annotations

import pytest


class OnForkedRanks:
    """To be inherited before a contract of `bridge.testing`: its fits are resumed on two ranks."""

    ranks = (2,)

    @pytest.fixture(autouse=True)
    def ranks_to_fork(self, run_ranks):
        self.run_ranks = run_ranks

    def launch(self, number, program, *arguments):
        done = self.run_ranks(number, program, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout
