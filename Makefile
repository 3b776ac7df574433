# make demo | test | prove | lint | docs | bench: each creates .venv on first use and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test prove lint docs speed clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first, at its pinned version: anything else may fetch gigabytes of CUDA packages
$(VENV)/.torch: $(BIN)/python constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.demo  ## the whole pipeline on real sentences: prints the result table, writes demo/report.html
	$(BIN)/pituning run recipes/demo.yaml

test: $(VENV)/.test  ## the whole suite, slow tests included, in two processes
	$(BIN)/python -m pytest -n 2

prove: $(VENV)/.test  ## the invariants of every interpolation, over 10,000 random cases (half an hour)
	PITUNING_CASES=10000 $(BIN)/python -m pytest tests/interpolation/test_invariants.py

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## API reference into docs/api
	$(BIN)/pdoc --docformat google --output-directory docs/api pituning '!pituning.report'

speed: $(VENV)/.test  ## step time of interpolations against one expert
	$(BIN)/python benchmarks/speed/interpolation.py

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
