# Each target sets up .venv first: a fresh machine needs make, Python 3.11 or 3.12 and a package index.
SHELL := /bin/bash
# Python 3.11 first: for its jax, conftest.py has a flag by which the tests compile faster.
# Run, not looked up: a shim on the path may stand for a Python that is not installed.
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3 python,$(shell $(p) -c '$(USABLE)' >/dev/null 2>&1 && echo $(p))))
BIN := .venv/bin
# A training step is faster on a CPU where Linux has huge pages for who asks; see README.md.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: .venv demo test test-quick test-torch test-oldest test-newest docs results drills lint lock clean

demo: .venv
	$(BIN)/python -m nadaptor.demo $(ARGS)

# Files in the order of tests/conftest.py, the longest first, and not in that of their test counts.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv
	$(BIN)/python $(PYTEST) $(ARGS)

test-quick: .venv
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

# What needs torch, in an environment of its own: torch is large, and torchax is made for Python 3.11.
test-torch: .venv-torch/.installed
	.venv-torch/bin/python -m pytest -m torch tests $(ARGS)

# The site in build/site; a warning is an error.
docs: .venv/.docs
	$(BIN)/python -m sphinx -E -c docs . build/site --fail-on-warning --keep-going -q

.venv/.docs: requirements-docs.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt && touch $@

# The tables of the result files, put into the pages.
results: .venv
	$(BIN)/python docs/results.py

# The suite with warnings as errors on the oldest jax of the lock and on the newest, each in an
# environment of its own: Python 3.11 has the one and 3.12 the other.
test-oldest: .venv-3.11/.installed
	.venv-3.11/bin/python $(PYTEST) $(ARGS)

test-newest: .venv-3.12/.installed
	.venv-3.12/bin/python $(PYTEST) $(ARGS)

# Hours: it goes on where it was stopped, and writes the table of docs/drills.md.
drills: .venv
	$(BIN)/python -m benchmarks.drills $(ARGS)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q tests/test_random_graphs.py

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

.venv: .venv/.installed

# The stamp is written last, so that an interrupted or failed installation is started afresh.
.venv/.installed: requirements.lock pyproject.toml
	@"$(PYTHON)" -c '$(USABLE)' 2>/dev/null || { echo "nadaptor needs Python 3.11 or 3.12 with its venv\
	 module, and found none; name one with: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "installing the pinned packages into .venv with $(PYTHON), about a minute"
	@rm -rf .venv; \
	{ "$(PYTHON)" -m venv .venv \
	&& $(BIN)/python -m pip install --quiet --requirement requirements.lock \
	&& $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable . \
	&& touch $@; } || { rm -rf .venv; exit 1; }

.venv-3.%/.installed: requirements.lock pyproject.toml
	@echo "installing the pinned packages into .venv-3.$*, about a minute"
	@rm -rf .venv-3.$*; \
	{ python3.$* -m venv .venv-3.$* \
	&& .venv-3.$*/bin/python -m pip install --quiet --requirement requirements.lock \
	&& .venv-3.$*/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable . \
	&& touch $@; } || { rm -rf .venv-3.$*; exit 1; }

TORCH_PYTHON ?= python3.11
TORCH_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/

# With torch's own page of wheels at hand pip takes the one without CUDA, which sorts above the other.
.venv-torch/.installed: requirements.lock requirements-torch.txt pyproject.toml
	@echo "installing the pinned packages and torch into .venv-torch, some minutes and 2 GB"
	@rm -rf .venv-torch; \
	{ "$(TORCH_PYTHON)" -m venv .venv-torch \
	&& .venv-torch/bin/python -m pip install --quiet --requirement requirements.lock \
	&& .venv-torch/bin/python -m pip install --quiet --retries 0 --find-links $(TORCH_WHEELS) \
	  --requirement requirements-torch.txt \
	&& .venv-torch/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable . \
	&& touch $@; } || { rm -rf .venv-torch; exit 1; }

lock:
	uv pip compile --universal --python-version 3.11 --upgrade --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --extra train --extra test pyproject.toml --quiet \
	  | sed '1i # Every package that make .venv installs, for Python 3.11 and 3.12. Made by: make lock' \
	  > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv .venv-torch .venv-3.* build dist *.egg-info .pytest_cache .ruff_cache
