# The two commands of the README, and what contributors use. PYTHON chooses the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One thread a process: the processes of a test run or a quickstart share the cores between them.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-all lint types contract wheel clean

# torch first and by its pin: any looser requirement pulls several GB of CUDA packages.
$(BIN)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(BIN)/.train: $(BIN)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e ".[train]"
	touch $@

$(BIN)/.all: $(BIN)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e ".[all]"
	touch $@ $(BIN)/.train

quickstart: $(BIN)/.train
	$(BIN)/python tools/quickstart.py

test: $(BIN)/.all
	$(BIN)/python -m pytest -n 2

test-all: $(BIN)/.all
	$(BIN)/python -m pytest -n 2 -m "not gpu"

lint: $(BIN)/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.all
	$(BIN)/mypy

contract: $(BIN)/.all
	$(BIN)/lint-imports

wheel: $(BIN)/.all
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info quickstart
