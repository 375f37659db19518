# Everything sets itself up: `make demo` and `make test` (in minutes; `make test-all` runs everything) need Python 3.10 to 3.12, pip and make, nothing else.

VENV ?= .venv
PYTHON ?= python3
SEED ?= 0
RUN ?= demo_run
KILLS ?= 50
MINUTES ?= 120
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo docs test test-slow test-all coverage soak lint types clean

demo: $(VENV)/installed
	$(VENV)/bin/nnUNetUDA_demo -o $(RUN) -seed $(SEED)

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

# LIMIT=20 skips what has not begun after 20 minutes
test-slow: $(VENV)/installed
	$(PYTEST) -m slow $(if $(LIMIT),--minutes $(LIMIT))

test-all: test test-slow

# the share of lines that the tests of `make test` run, by file
coverage: $(VENV)/installed
	$(PYTEST) -m "not slow" --cov --cov-report term:skip-covered

soak: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python tests/soak.py -kills $(KILLS) -minutes $(MINUTES)

docs: $(VENV)/documenting
	$(VENV)/bin/mkdocs build --strict

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(MAKE) types

# the package as it is when installed, with trainers/ and dataset_conversion/ in it
types: $(VENV)/installed
	rm -rf .types && mkdir -p .types/nnunet_uda
	ln -s $(CURDIR)/nnunet_uda/* $(CURDIR)/trainers $(CURDIR)/dataset_conversion .types/nnunet_uda
	cd .types && $(abspath $(VENV))/bin/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p nnunet_uda

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --upgrade pip
	$(VENV)/bin/python -m pip install -e ".[dev]"
	touch $@

$(VENV)/documenting: $(VENV)/installed
	$(VENV)/bin/python -m pip install -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(RUN) site .types .mypy_cache
