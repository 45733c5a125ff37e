# Two commands for a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast lint bench aot clean help

help:
	@echo "make demo   upgrade an SAE of SmolLM2-135M, beside a fair control -> out/demo/report.html"
	@echo "make test   lint, types and every test that needs no GPU"
	@echo "make bench  gate fits against other methods; which gate and recipe beats the control"
	@echo "make aot    compile every kernel configuration for sm_80, sm_90, sm_100 and print the table"

# constraints.txt pins what was tested; torch first, so that nothing else can pull another build of it.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[host,test]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/rsae demo --out out/demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not network"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench_gates.py
	$(BIN)/python benchmarks/gate_forms.py

aot: $(INSTALLED)
	$(BIN)/python -m rsae_triton.kernels.aot

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
