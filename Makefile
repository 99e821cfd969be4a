# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := .venv/.installed

.PHONY: demo test lint gpu clean

demo: $(INSTALLED)
	$(BIN)/python -m scripts.demo

# TEST_OPTIONS: more options of pytest. CI measures coverage by them; without, tests take two fifths less time.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(TEST_OPTIONS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests that need a GPU, the bench and a training run, within 9 minutes a call; `make gpu` goes on. Nothing is
# installed: a lent machine may have no network, but its own torch. PROVE_OPTIONS: see facet prove --help.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m scripts.prove $(PROVE_OPTIONS)

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*

# Made once, and again when the dependencies change; a half-made one (no mark) is completed.
$(INSTALLED): pyproject.toml
	@echo "installing into .venv: once, 2 to 10 minutes, about 7 GB with the GPU build of torch"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
