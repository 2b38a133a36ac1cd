PYTHON ?= python

.PHONY: check docs docs-again faults format format-check gpu layers lint links types test slow study wheel

check: format-check layers lint types test

format:
	$(PYTHON) -m ruff format .

format-check:
	$(PYTHON) -m ruff format --check .

lint:
	$(PYTHON) -m ruff check .

# Which room may import which: the contracts in pyproject.toml.
layers:
	lint-imports

types:
	$(PYTHON) -m basedpyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

# Built into dist/, and tried where nothing but it and its dependencies is installed.
wheel:
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .
	$(PYTHON) -m pytest -m slow -n 0 tests/test_release.py

# The site, into build/docs; it fails on a warning. Needs pip install -e '.[docs]'.
SPHINX = $(PYTHON) -m sphinx -q -W --keep-going -c docs -d build/doctrees

docs:
	$(SPHINX) -b html . build/docs
	@echo "build/docs/index.html"

docs-again:
	rm -rf build/docs build/doctrees build/jupyter
	$(MAKE) docs

# The links to elsewhere, by asking for each.
links:
	$(SPHINX) -b linkcheck -D nb_execution_mode=off . build/links

study:
	$(PYTHON) -m pytest -m study -n 0

# Kills, signals, full disks, damage, hostile input: all of it (FAULTS_KILLS=50 each).
faults:
	$(PYTHON) -m pytest tests/faults -m "slow or not slow" -s

# On a machine with one CUDA GPU, without network or installation: tests, then times, in
# under nine minutes. GPU=cpu tries the path of it. Everything is left in GPU_OUT.
GPU ?= cuda
GPU_OUT ?= build/gpu

gpu:
	bash benchmarks/gpu.sh $(PYTHON) $(GPU) $(GPU_OUT) $(GPU_FLAGS)
