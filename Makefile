# `make demo` and `make test` set everything up first; nothing else has to be typed. `make` lists the rest.
#
# Variables, all optional:
#   PYTHON        the interpreter to build the environment with (3.11 or later)
#   VENV          where the environment goes
#   TORCH_INDEX   a further package index to take torch from, for a chosen build of it, for example
#                 make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   PYTEST_ARGS   more arguments for pytest, for example PYTEST_ARGS="-x -k cryoet"
#   CHECK         the tests of `make check`
#   BENCH         the benchmark scripts to run
#   RANKS         processes of `make overnight`
#   MPI           the wheel that `make mpi` installs

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_ARGS ?=
# As many tests at once as there are cores, up to four: many start several processes themselves.
PARALLEL ?= --numprocesses=auto --maxprocesses=4 --dist=worksteal
# What finds most mistakes in a minute: structure, truths in closed form, bits on ranks, a fit by each method, formats.
CHECK ?= tests/test_structure.py tests/bridge/test_errors.py tests/bridge/test_first_mistakes.py \
    tests/bridge/estimators/test_truth_matrix.py tests/bridge/dispatch/test_dispatch.py tests/bridge/smoothing/test_torch.py \
    tests/bridge/storage/test_store.py tests/bridge/fitting/methods/test_gaussian_process.py \
    tests/bridge/fitting/methods/test_trust_region.py tests/adapters/render/test_cameras.py \
    tests/adapters/render/test_pose_metrics.py tests/adapters/tem/test_deck.py tests/simulators/test_paths.py \
    tests/simulators/cryoet/microscope tests/simulators/cryoet/formats/test_mrc.py
MPI ?= impi-rt
RANKS ?= 2
BENCH ?= $(sort $(wildcard tests/benchmarks/bench_*.py))

BIN := $(VENV)/bin
export PYTHON VENV TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-slow bench overnight lint format mpi wheel constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

# One environment serves the demo, the tests and the linters: what is shown is what is tested, and torch, which is
# nine tenths of the download, is installed once. The script decides by itself whether anything has to be done.
setup: ## install what is missing, into $(VENV) (every other target does this first)
	@bash tools/setup.sh

demo: setup ## run the demonstration, examples/demo.toml
	$(BIN)/python -m bridge fit --fresh examples/demo.toml

check: lint ## lint, and the tests that find most mistakes (about a minute on two cores)
	$(BIN)/python -m pytest $(PARALLEL) --quiet $(CHECK) $(PYTEST_ARGS)

test: setup ## run the tests (under ten minutes on two cores)
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-slow: setup ## run the tests marked slow, which `make test` leaves out
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(PYTEST_ARGS) || \
	    { [ $$? = 5 ] && echo "no test is marked slow"; }  # 5: pytest found none

bench: setup ## run the benchmarks, one after another (BENCH=tests/benchmarks/... for one of them)
	@for script in $(BENCH); do echo "$(BIN)/python $$script"; $(BIN)/python $$script || exit 1; done

overnight: setup ## redo the pose of 768 teapots, three methods, three budgets, into docs/pose_of_teapots (RANKS=2)
	$(BIN)/mpirun -n $(RANKS) $(BIN)/python tests/benchmarks/bench_pose.py big --results docs/pose_of_teapots

lint: setup ## check style, format, types and import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## put the sources into the format that `make lint` asks for
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

mpi: setup ## install one more MPI for the tests to be repeated with (MPI=impi-rt)
	$(BIN)/python -m pip install --no-deps --prefix "$(VENV)/mpi/$(MPI)" $(MPI)

wheel: setup ## build the wheel into dist/
	rm -rf build  # setuptools would pack what an earlier build left there
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

constraints: ## pin today's newest fitting versions in constraints.txt (torch stays as pinned)
	@bash tools/pin.sh

clean: ## remove what the other targets made, the environment included
	rm -rf build dist demo runs ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find bridge simulators adapters tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -f "$(VENV)/.setup-stamp" ]; then echo rm -rf "$(VENV)"; rm -rf "$(VENV)"; fi
