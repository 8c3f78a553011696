# Every target makes its own virtual environment first (VENV), installs the pinned versions of constraints.txt into
# it once, and again only after pyproject.toml, constraints.txt or the plugins' sources changed.
VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.moe-export-installed
PLUGIN_SOURCES := $(shell find plugins -type f -not -path 'plugins/cpu/tests/*' -not -path 'plugins/gpu/*' -not -name '*.pyc')

# One compute thread per test process: JOBS processes share the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: help venv demo test test-slow test-all sanitize cross-aarch64 lint format docs clean

help:
	@echo "make demo       build, verify, measure and run the shipped example model; prints where the report lies"
	@echo "make test       all tests but the slow ones"
	@echo "make test-slow  the slow tests, as CI runs them"
	@echo "make test-all   every test, with those that CI leaves out for their time"
	@echo "make cross-aarch64  the CPU plugin built for aarch64, its kernels checked under qemu"
	@echo "make sanitize   the CPU plugin's kernels under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff fix and format"
	@echo "make docs       write the generated pages of docs/"
	@echo "make venv       only make $(VENV)"
	@echo "make clean      remove what demo and tests left (not $(VENV))"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, $(PYTHON) is " + v + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt $(PLUGIN_SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

venv: $(STAMP)

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" tools/demo.sh

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not nightly" --durations=15

test-all: $(STAMP)
	$(PYTEST) --durations=15

sanitize: $(STAMP)
	tools/sanitize.sh $(VENV)

cross-aarch64: $(BIN)/python
	tools/cross_aarch64.sh $(VENV)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	for script in tools/generate_*_doc.py; do $(BIN)/python $$script || exit; done

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -type d -prune -exec rm -rf {} +
