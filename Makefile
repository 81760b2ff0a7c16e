# Everything runs in .venv, which the first target that needs it sets up; PYTHON=python3.12 chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test check test-slow bench bench-full tables docs clean

# ESAM on handwritten digits, on two ranks: continues where it was stopped; `rm -r runs/digits_esam` starts anew.
train: .venv/installed data/digits/dataset.json
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m esam_dist train configs/digits_esam.yaml

# What every change must pass: about ten minutes on two cores. A file's tests stay on one worker, for their fixtures.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The full matrix, the quick set included.
test-slow: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ''

bench: .venv/installed data/digits/dataset.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

# Hours, for a machine that nobody else uses: every mode on every network, on all cores.
bench-full: .venv/installed data/digits/dataset.json
	$(BIN)/python -m benchmarks --full

# The tables of the documentation: config keys and costs.
tables: .venv/installed
	$(BIN)/python -m docs.tables

# The documentation as a site, in site/; a link or an anchor that leads nowhere is an error.
docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

# All but the data and the runs.
clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps imagecorruptions-imaug
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

data/digits/dataset.json: | .venv/installed
	$(BIN)/esam-dist prepare digits data/digits
