# Everything sets itself up: `make demo` and `make test` need Python 3.10 to 3.12, pip and make, nothing else.

VENV ?= .venv
PYTHON ?= python3
SEED ?= 0
RUN ?= demo_run
KILLS ?= 50
MINUTES ?= 120
JOBS ?= 2

.PHONY: demo test test-slow soak lint clean

demo: $(VENV)/installed
	$(VENV)/bin/nnUNetUDA_demo -o $(RUN) -seed $(SEED)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow

soak: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python tests/soak.py -kills $(KILLS) -minutes $(MINUTES)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --upgrade pip
	$(VENV)/bin/python -m pip install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(RUN)
