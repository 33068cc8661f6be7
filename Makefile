# Each target sets up .venv first: a fresh machine needs make, Python 3.11 or 3.12 and a package index.
SHELL := /bin/bash
# Run, not looked up: a shim on the path may stand for a Python that is not installed.
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3 python,$(shell $(p) -c '$(USABLE)' >/dev/null 2>&1 && echo $(p))))
BIN := .venv/bin

.PHONY: .venv demo test lint lock clean

demo: .venv
	$(BIN)/python -m nadaptor.demo $(ARGS)

test: .venv
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv
	$(BIN)/ruff check .
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

lock:
	uv pip compile --universal --python-version 3.11 --upgrade --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --extra train --extra test pyproject.toml --quiet \
	  | sed '1i # Every package that make .venv installs, for Python 3.11 and 3.12. Made by: make lock' \
	  > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
