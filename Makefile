# Two commands for a fresh machine with Python 3.11, 3.12 or 3.13: `make demo` and `make test`.
PYTHON ?= $(shell for one in python3.11 python3.12 python3.13 python3; do \
	$$one -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$one && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS := .venv-docs
DIST := .venv-dist
# SAELens needs transformer-lens < 4: an environment of its own, with version 4 beside it.
INTEROP := .venv-interop
LENS4 := $(INTEROP)/transformer-lens-4
PEERS := .venv-peers
DASHBOARD := .venv-dashboard
# With the peers where they are installed.
BENCH_BIN = $(if $(wildcard $(PEERS)/.installed),$(PEERS)/bin,$(BIN))

.PHONY: demo test test-all test-fast test-cpus test-interop test-dashboard test-gpu gpu-check lint bench bench-demo bench-gpu bench-steps peers experiments aot aot-record routes fuzz faults soak first-steps docs docs-publish dist notebooks audit clean help

help:
	@echo "make demo   upgrade an SAE of SmolLM2-135M, beside a fair control -> out/demo/report.html"
	@echo "make test   lint, types, documentation, every test that needs no GPU, and how many lines they cover"
	@echo "make test-all  the tests with every set of parameters"
	@echo "make test-cpus  the numeric tests as four kinds of processor compute them"
	@echo "make test-interop  SAELens, dictionary_learning, sparsify, SAEBench, TransformerLens 3 and 4, run as they are"
	@echo "make test-dashboard  SAEDashboard, in an environment of its own"
	@echo "make bench  speed on the CPU: a training step and its parts, all contenders, under ten minutes on two cores"
	@echo "make bench-demo  the demo end to end, timed, into the same result"
	@echo "make bench-steps  whole training steps on the CPU beside other libraries' (make peers installs them)"
	@echo "make bench-gpu  the same on a CUDA device, under eight minutes; make peers adds SAELens and sparsify"
	@echo "make experiments  gate fits against other methods; which gate and recipe beats the control"
	@echo "make aot    compile every kernel configuration for sm_80, sm_90, sm_100; the table goes into docs/machine-code.md"
	@echo "make fuzz   coverage-guided fuzzing of every file reader, ten minutes (FUZZ_SECONDS)"
	@echo "make faults every writer, killed and refused at every call to the file system"
	@echo "make soak   20,000 training steps with stressed coefficients; make audit asks pip-audit about the dependencies"
	@echo "make first-steps  README and the tutorial word for word, in a fresh clone and environment"
	@echo "make dist  wheel and sdist, checked by twine and installed in a clean environment; make notebooks runs the notebooks"
	@echo "make docs   the documentation as a site, warnings are errors -> site/"
	@echo "make gpu-check  ten minutes on a CUDA device with nothing installed: right, and how fast -> out/gpu-check"
	@echo "make test-gpu  the kernels on a CUDA device: tests, sanitizer, graphs, timings"

# constraints.txt pins what was tested; torch first, so that nothing else can pull another build of it.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; give PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[host,test]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/rsae demo --out out/demo

# A worker on every core, with one thread each (tests/conftest.py). Tests of one group (a fixture that a module shares, or
# `xdist_group`) run on one worker.
WORKERS ?= auto
SPREAD := -n $(WORKERS) --maxprocesses 4 --dist loadgroup
PYTEST := $(BIN)/python -m pytest $(SPREAD)

# Both environments are made, and lint and docs run, side by side. `whole`: what `make test-all` alone runs.
test:
	$(MAKE) --no-print-directory --jobs 2 lint docs
	$(PYTEST) -m "not whole" --cov --cov-report=term
	$(BIN)/python tests/processors.py --short -- $(SPREAD)

test-all: $(INSTALLED)
	$(PYTEST)

test-cpus: $(INSTALLED)
	$(BIN)/python tests/processors.py -- $(SPREAD)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow and not whole and not network"

$(INTEROP)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,interop]'
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check tabulate zstandard
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0 sae-bench==0.6.0
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(LENS4) transformer-lens==4.3.0
	touch $@

test-interop: $(INTEROP)/.installed
	$(INTEROP)/bin/python -m pytest tests/interop tests/teachers tests/integrations tests/sae/test_export.py
	PYTHONPATH=$(LENS4) $(INTEROP)/bin/python -m pytest tests/integrations/test_splicing.py tests/integrations/test_examples.py

# SAEDashboard needs transformer-lens 2, and with it numpy 1.
$(DASHBOARD)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DASHBOARD)
	$(DASHBOARD)/bin/pip install --quiet --disable-pip-version-check -e . sae-dashboard==0.8.0 'sae-lens==6.54.*' \
	'pyarrow<22' 'pandas<3' pytest pytest-xdist
	touch $@

test-dashboard: $(DASHBOARD)/.installed
	$(DASHBOARD)/bin/python -m pytest tests/interop/test_sae_dashboard.py

fuzz: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=2.3'
	TRITON_INTERPRET=1 $(BIN)/python fuzz/readers.py

# Every writer, killed and refused at every call to the file system; `make test` takes a sample.
faults: $(INSTALLED)
	FAULTS=all $(BIN)/python -m pytest -q -s tests/common/test_injector.py

soak: $(INSTALLED)
	SOAK_STEPS=20000 $(BIN)/python -m pytest -q tests/training/test_soak.py

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $$($(PYTHON) -c "import tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch $@

# The sources are parsed, not imported: torch is not needed.
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

# The site under a version, on the branch gh-pages.
DOCS_VERSION ?= dev
DOCS_ALIAS ?=

docs-publish: $(DOCS)/.installed
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check 'mike>=2,<3'
	$(DOCS)/bin/mike deploy --push --update-aliases $(DOCS_VERSION) $(DOCS_ALIAS)

# Wheel and sdist; the wheel is installed and asked for its version where nothing else is.
dist:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; give PYTHON=/path/to/python"; exit 2; }
	rm -rf dist $(DIST)
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install --quiet --disable-pip-version-check 'build>=1.2' 'twine>=6'
	$(DIST)/bin/python -m build --outdir dist .
	$(DIST)/bin/twine check --strict dist/*
	$(DIST)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd /tmp && $(CURDIR)/$(DIST)/bin/rsae --version

# README and the tutorial, word for word, in a fresh clone and a fresh environment; FIRST_STEPS is where.
FIRST_STEPS ?= out/first-steps

first-steps:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; give PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) tools/first_steps.py $(FIRST_STEPS)

# The notebooks again, with their outputs: after a change to what they show. The tutorial needs
# `rsae demo` in out/demo.
notebooks: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check nbconvert ipykernel
	$(BIN)/python tools/run_notebooks.py

# --strict: a package that no database knows fails, where pip-audit would skip it and find "no known vulnerabilities".
audit: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check pip-audit
	mkdir -p out
	$(BIN)/pip freeze --exclude-editable > out/installed.txt
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement out/installed.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# `make bench BENCH=` has the 2048 tokens that cases.py lists, in twice the time; ratios hardly change.
BENCH ?= --bench-tokens 1024

bench: $(INSTALLED)
	$(BENCH_BIN)/python -m pytest benchmarks -q --bench-out out/bench/cpu.json $(BENCH)
	$(BIN)/rsae bench --new out/bench/cpu.json

bench-gpu: $(INSTALLED)
	$(BENCH_BIN)/python -m pytest benchmarks -q --bench-device cuda --bench-minutes 7 --bench-out out/bench/gpu.json
	$(BIN)/rsae bench --new out/bench/gpu.json

# Whole training steps beside other libraries' (`make peers` first), a quarter of an hour; docs/steps.md and README.
bench-steps: $(INSTALLED)
	$(BENCH_BIN)/python benchmarks/bench_steps.py

# The demo end to end, minutes; added to the result of `make bench`.
bench-demo: $(INSTALLED)
	$(BENCH_BIN)/python -m pytest benchmarks/test_usage.py -k test_demo -q --bench-out out/bench/cpu.json --bench-resume \
	--bench-minutes 20

# Other libraries' SAEs as contenders, in an environment of their own: some ask for versions that clash with ours.
peers: $(PEERS)/.installed

$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[host,test,peers]'
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check nnsight
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0
	touch $@

experiments: $(INSTALLED)
	$(BIN)/python benchmarks/bench_gates.py
	for teacher in relu jumprelu topk; do $(BIN)/python benchmarks/gate_forms.py --teacher $$teacher || exit; done

AOT := $(BIN)/python -m rsae_triton.kernels.aot --recorded tests/kernels/machine_code.json --page docs/machine-code.md

aot: $(INSTALLED)
	$(AOT)

aot-record: $(INSTALLED)
	$(AOT) --record

# Which of two ways the GPU at hand is faster: measured rows for rsae_triton/ops/routes.json.
routes: $(INSTALLED)
	$(BIN)/python -m rsae_triton.commands.routes

# The system's python3, whatever it is: torch, triton, numpy and safetensors are enough.
gpu-check:
	python3 tools/gpu_check.py --out out/gpu-check

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) $(INTEROP) $(PEERS) $(DASHBOARD) $(DOCS) $(DIST) site build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
