# The same commands for people and for .ci/run; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
STAMP := .venv/stamp
# mkfs, losetup and mosquitto live there, and are not in every user's PATH.
# Most of a test's time is waiting for disks and brokers: more of them at a time than there are processors.
JOBS ?= 3
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help setup packages brokers peers demo test check bench soak clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo "PYTHON=... chooses the Python of .venv; ARGS=... goes to pytest, the demo, the benchmarks and the soak test; JOBS: tests at a time."

setup: $(STAMP) ## install what is missing: Debian packages (as root) and .venv

packages:
	@.ci/packages

# Not part of setup: only tests need them, and those skip, naming what is missing, where they cannot be had.
brokers:
	@.ci/packages requirements/debian-brokers.txt || echo "test: going on without these brokers" >&2

# Only `make bench` needs these; a row whose peer cannot be had says so.
peers:
	@.ci/packages requirements/debian-bench.txt || echo "bench: going on without these peers" >&2

# A .venv whose Python has gone (an upgrade of the system) is made again.
ifeq ($(shell test -x $(BIN)/python && echo there),)
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml snapshotter/linux/batch.c $(wildcard requirements/*.txt) .ci/venv | packages
	@.ci/venv
	@touch $@

$(STAMP)-bench: requirements/bench.txt $(STAMP)
	@.ci/venv bench
	@touch $@

demo: setup ## show it: partitions, work on them, the changes as they arrive (real partitions as root)
	@$(BIN)/python -m watcher.demo $(ARGS)

test: setup brokers ## all tests; those on real partitions need root
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: setup ## lint, format, types, and who may import whom
	@echo "ruff check"; $(BIN)/ruff check --quiet .
	@echo "ruff format --check"; $(BIN)/ruff format --quiet --check .
	@echo "mypy"; $(BIN)/mypy --no-error-summary
	@echo "imports"; $(BIN)/python -m pytest --quiet --no-header --no-summary -p no:cacheprovider tests/test_imports.py

bench: setup peers $(STAMP)-bench ## measure side by side with others (root): bench/results/local/table.md (FULL=1: a million files)
	@$(BIN)/python -m bench $(ARGS)

soak: setup ## hours of random work and faults
	@$(BIN)/python -m bench.soak $(ARGS)

clean: ## remove .venv, what was compiled, and all caches
	@rm -rf .venv build dist *.egg-info snapshotter/linux/_batch*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
