# Every target sets up what it needs: a virtual environment in .venv, and the package built into it.
PYTHON ?= python3
# On machines with an NVIDIA GPU any release from 2.8 on; this one is what the tests run with.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc poc_kernels -type f -not -name '*.pyc')
RESULT ?= bench/results/projection-cpu

.PHONY: demo test lint format bench clean

demo: $(VENV)/installed
	$(BIN)/poc-kernels verify
	@echo
	$(BIN)/poc-kernels demo

test: $(VENV)/installed-dev
	$(BIN)/pytest --cov --cov-report=term $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

bench: $(VENV)/installed-dev
	mkdir -p $(dir $(RESULT))
	$(BIN)/pytest bench --benchmark-json=$(RESULT).json
	$(BIN)/python bench/report.py $(RESULT).json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

# torch first: what is installed after it must not pull another one.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' numpy  # torch warns without numpy
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet '.[dev]'
	@touch $(VENV)/installed $@
