# `make demo` and `make test` set up what they need by themselves and can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FOR_DEMO := $(VENV)/.demo
FOR_TESTS := $(VENV)/.dev
WEIGHTS := $(VENV)/.smollm2
GEMMA := $(VENV)/.gemma3
# Threads that wait by spinning take the cores from each other where anything else runs.
export OMP_WAIT_POLICY ?= PASSIVE
export NO_MKDOCS_2_WARNING := 1
# Two processes with a thread each: models this small give a second thread little to do.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --durations 60 --durations-min 5 --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check docs bench study notebooks clean

# First what takes a minute, then SmolLM2; a run that was interrupted goes on where it was.
demo: $(FOR_DEMO)
	$(BIN)/eigenlens run --out runs/demo-arith-tiny
	@$(MAKE) --no-print-directory $(WEIGHTS)
	$(BIN)/eigenlens run --model smollm2-135m --task int_add --task-arg low=10 --task-arg high=30 \
	  --task-arg n_train=300 --task-arg n_validation=50 --task-arg n_test=50 \
	  --out runs/demo

# Without checking shapes and types at run time, which takes two fifths of the time.
test: $(FOR_TESTS)
	EIGENLENS_TYPES=unchecked $(PYTEST) -m "not slow and not real"

# With it, after every gate, and the slow tests and those on SmolLM2's own weights as well.
test-all: check $(WEIGHTS)
	$(PYTEST)

check: $(FOR_TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

docs: $(FOR_TESTS)
	$(BIN)/mkdocs serve

bench: $(FOR_TESTS) $(WEIGHTS)
	$(BIN)/eigenlens bench --model smollm2-135m --out runs/bench.json

# Every published number again, about sixteen hours; what was interrupted goes on. Text comes from the
# Hub, or from the folder that EIGENLENS_DATA names.
study: $(FOR_DEMO) $(WEIGHTS) $(GEMMA)
	$(BIN)/eigenlens experiment all --out figures

notebooks: $(FOR_TESTS) $(WEIGHTS)
	$(BIN)/python tests/notebook_runner.py

$(FOR_DEMO): pyproject.toml constraints-demo.txt
	@$(PYTHON) tools/install.py demo
	@touch $@

$(FOR_TESTS): pyproject.toml constraints.txt
	@$(PYTHON) tools/install.py dev
	@touch $@ $(FOR_DEMO)

$(WEIGHTS) $(GEMMA): $(VENV)/.%:
	@$(PYTHON) tools/install.py $*
	@touch $@

clean:
	rm -rf $(VENV) runs site
