# Each target does all its own set-up: a virtual environment in .venv, made with the first Python >= 3.11 found.
# Another interpreter: make PYTHON=/path/to/python ...

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS ?= 2

NOTEBOOKS := $(shell grep -l "^. jupyter:" analysis/*.py)

.PHONY: demo notebooks test test-fast test-all lint format types clean

# Three families at equal compute on real text: an IsoFLOP sweep of each, their laws, and what each needs of the
# Transformer's compute; report.html.
DEMO := isoflop:families=transformer:xlstm:lightning,budgets=8e10:1.3e11:2.1e11,sizes=4,ratio=30
demo: .venv/installed
	$(BIN)/scalelab sweep --config=$(DEMO) --name=demo --runs=demo --jobs=$(JOBS) --config.train.eval_every=1.0
	$(BIN)/scalelab report demo/sweeps/demo.json --out=report.html --title="Transformer, xLSTM and Lightning attention at equal compute, on the source of Python's standard library"

# analysis/*.py as notebooks with their outputs beside them. They look for published tables in $$SCALELAB_DATA.
notebooks: .venv/installed-dev
	$(BIN)/jupytext --quiet --sync $(NOTEBOOKS)
	$(BIN)/jupyter execute --inplace $(NOTEBOOKS:.py=.ipynb)

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not study"

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not study"

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python >= 3.11; name one with PYTHON=..."; exit 2; }
	@test -x $(BIN)/python || { echo "setting up .venv ..."; $(PYTHON) -m venv .venv; }
	$(PIP) -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-newest demo report.html
