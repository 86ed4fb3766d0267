# The repository's commands. Everything runs in .venv, which the first command creates with the pinned versions of
# constraints.txt and a later one refreshes when constraints.txt or pyproject.toml changed.
#   make test ARGS="-k allocator"     hands ARGS to pytest
#   make venv PYTHON=python3.12       picks the interpreter of a new .venv

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Only errors of pip are shown: this is one command of a longer output. The notice about a newer pip is noise too.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install -qq

# One thread per test process: the models are tiny, and 2 workers with a thread per core each would fight for the cores.
export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help venv check format test chromium demo evidence mutants clean

help:
	@echo "make demo     profile tests/configs/baseline.yaml on whatever this machine has"
	@echo "make check    formatting, lint, types, layers"
	@echo "make test     the tests; those marked gpu only where CUDA is, those in a browser only where Chromium is"
	@echo "make evidence every measurement that was committed, predicted anew without a GPU (11 minutes of one core; ARGS=--quick)"
	@echo "make mutants  changes of the code that no test notices: a seeded sample (half a minute each; ARGS=\"--count 20 --seed 1\")"
	@echo "make chromium for the tests in a browser, where root may install it (Debian); make test does so first"
	@echo "make format   let ruff rewrite the code"
	@echo "make venv     create or refresh .venv"
	@echo "make clean    remove .venv and the caches"

venv: $(STAMP)
	@:

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' is missing or older than Python 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	        echo "make: '$(PYTHON)' has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	    $(PYTHON) -m venv $(VENV); }
	@echo "make: installing into $(VENV) (the first time about a minute, longer where PyTorch is downloaded)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Only what cannot be done is said; the browser tests are then skipped, or fail where CI=true.
chromium: $(STAMP)
	@PYTHONPATH=tests $(BIN)/python -m browser.install

test: $(STAMP) chromium
	$(BIN)/python -m pytest -n 2 $(ARGS)

evidence: $(STAMP)
	$(BIN)/python benchmarks/evidence.py $(ARGS)

mutants: $(STAMP)
	$(BIN)/python tests/mutants.py $(ARGS)

demo: $(STAMP)
	$(BIN)/wanvram profile tests/configs/baseline.yaml --force -o profiler_logs/demo

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
