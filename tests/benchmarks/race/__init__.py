"""A race of `bridge.fit` against other people's solvers, see docs/race/README.md."""
