# make demo | demo-text | test | prove | lint | docs | speed: each creates .venv on first use and installs what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-text test prove lint docs speed clean

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

demo: $(VENV)/.demo  ## the whole method on pictures: prints the result table, writes demo/report.html
	$(BIN)/pituning demo

demo-text: $(VENV)/.demo  ## the same on real sentences, with MiniLM: writes runs/text-demo/report.html
	$(BIN)/pituning run recipes/text/demo.yaml

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

speed: $(VENV)/.test  ## speed and memory against their bars (hours), then the page docs/speed.md
	$(BIN)/python -m benchmarks.speed run
	$(BIN)/python -m benchmarks.speed report

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
