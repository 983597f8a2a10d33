# Two commands: `make train` (the main job on a built-in corpus) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
JOBS   ?= 2
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train test test-all torture lint bench clean help

help:
	@echo "make train     set up $(VENV) and train on the built-in corpus (about three minutes; ARGS='key=value ...')"
	@echo "make test      set up $(VENV) and run the tests (minutes)"
	@echo "make test-all  the tests and the heavy ones"
	@echo "make torture   the tests of reliability in their large sizes (hours): kills, signals, damage, a long run"
	@echo "make bench     every benchmark whose figures the docs quote"
	@echo "make lint      ruff: rules and format"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "hasten needs Python 3.10 or newer; this is $$($(PYTHON) --version). Name another: make PYTHON=python3.12 train"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "This Python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)."; exit 2; }

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing hasten into $(VENV) (PyTorch is the large part) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing hasten and what its tests need into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.ready $@

train: $(VENV)/.ready
	@$(BIN)/hasten train $(ARGS)

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m 'not heavy' -n $(JOBS) --dist loadfile $(ARGS)

test-all: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(ARGS)

torture: $(VENV)/.ready-dev
	@echo "Tests of reliability in their large sizes; docs/reliability.md says what each does. This takes hours."
	HASTEN_TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m torture -s $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/bench_loop.py
	$(BIN)/python benchmarks/bench_loader.py
	$(BIN)/python benchmarks/bench_prepare.py
	$(BIN)/python benchmarks/bench_mask.py
	$(PIP) --no-deps --target build/packing-peers -r benchmarks/requirements-packing.txt
	$(BIN)/python benchmarks/bench_packing.py --peers build/packing-peers
	$(BIN)/python benchmarks/bench_lengths.py --out build/lengths
	$(PIP) -r benchmarks/requirements-peers.txt
	$(BIN)/python benchmarks/bench_optimizers.py --quick
	$(BIN)/python benchmarks/bench_optimizer_steps.py --out benchmarks/results/latest_optimizer_steps
	$(BIN)/python benchmarks/bench_state_format.py --out build/state_format
	$(BIN)/python benchmarks/bench_statistics.py --out build/statistics
	$(BIN)/python benchmarks/bench_compare.py --out build/compare
	$(BIN)/python benchmarks/bench_plan.py --out build/plan
	$(BIN)/python benchmarks/bench_restart.py --out build/restart

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
