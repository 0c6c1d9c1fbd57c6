# Each command works from a bare checkout; needs only Python 3.11 or newer with venv.
# Kept to what GNU Make 3.81 (macOS) understands.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.SILENT:

PYTHON ?= python3.13 python3.12 python3.11 python3
VENV ?= .venv
# What the tests have at hand; some skip without the extras peers, lm-eval and tpu-aot.
TEST_EXTRAS ?= test
EXTRAS ?=
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin
comma := ,
INSTALLED_TEST := $(VENV)/.installed-$(subst $(comma),-,$(TEST_EXTRAS))
INSTALLED_DOCS := $(VENV)/.installed-docs
# What follows is silent; a line every few seconds says that it works.
WATCHED := (while sleep 4; do echo "[setup] $$SECONDS s ..."; done) & trap "kill $$!" EXIT;
PIP_INSTALL := $(WATCHED) $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: setup quickstart multiprocess test check types docs docs-check docs-reference help

setup: $(VENV)/.installed  ## the environment in .venv alone; EXTRAS=cuda or tpu for accelerators
	if [ -n "$(EXTRAS)" ]; then $(PIP_INSTALL) -e ".[$(EXTRAS)]"; fi
	echo "[setup] now: source $(VENV)/bin/activate"

quickstart: $(VENV)/.installed  ## train, evaluate and judge a small complete model on this machine
	$(BIN)/python -m experiments.quickstart --workdir="$(WORKDIR)"

# Ends with the first status that is not 0, after both have ended.
multiprocess: WORKDIR = runs/multiprocess
multiprocess: $(VENV)/.installed  ## two processes train one tiny run on this machine's CPU
	set -o pipefail; \
	port=$$($(BIN)/python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])'); \
	process() { \
	  JAX_PLATFORMS=cpu $(BIN)/python -m experiments.train --config=configs/tour.py \
	    --workdir="$(WORKDIR)" --config.data.streams=2 $(FLAGS) --distributed \
	    --coordinator_address=127.0.0.1:$$port --num_processes=2 --process_id=$$1 2>&1 \
	    | sed "s/^/[process $$1] /"; \
	}; \
	process 1 & process 0; first=$$?; wait $$! && exit $$first

test: $(INSTALLED_TEST)  ## run every test
	$(BIN)/python -m pytest -n 2 -q tests

check: $(INSTALLED_TEST)  ## lint, format and the quick tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 -q -m "not slow" tests

docs: $(INSTALLED_DOCS)  ## build the site of docs/ and README.md in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	echo "[docs] build/site/index.html; with its search: $(BIN)/python -m http.server -d build/site"

docs-check: docs $(INSTALLED_TEST)  ## build the site, run every command and Python block of the pages
	$(BIN)/python -m pytest -q tests/docs

docs-reference: $(INSTALLED_DOCS)  ## write docs/config.md and docs/api.md from the code
	$(BIN)/python -m docs.tools.generate

types: $(INSTALLED_TEST)  ## the type hints, read by pyright
	$(BIN)/python -m pyright

help:  ## this list
	sed -n 's/^\([a-z-]*\):.*## /  make \1 	/p' Makefile | expand -t 24

# A launcher may be on the path and still not run (pyenv), so each candidate is executed.
$(BIN)/python:
	chosen=""; found=""; \
	for python in $(PYTHON); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  if ! $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'; then \
	    found="$$found $$python is $$version;"; \
	  elif ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    found="$$found $$python has no venv (Debian: apt install python$$version-venv);"; \
	  else \
	    chosen=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "error: Python 3.11 to 3.14 with venv is needed:$${found:- none of $(PYTHON) runs}" >&2; \
	  exit 2; \
	fi; \
	echo "[setup] creating $(VENV) with $$chosen ($$version)"; \
	$(WATCHED) $$chosen -m venv --clear "$(VENV)"

$(VENV)/.installed: setup.py constraints.txt | $(BIN)/python
	echo "[setup] installing lightning_jax and what it needs (a few minutes the first time)"
	SECONDS=0; $(PIP_INSTALL) -e . && echo "[setup] done in $$SECONDS s"
	touch $@

$(INSTALLED_TEST): setup.py constraints.txt | $(BIN)/python
	echo "[setup] installing lightning_jax, the tests' tools and what they need (a few minutes)"
	SECONDS=0; $(PIP_INSTALL) -e ".[$(TEST_EXTRAS)]" && echo "[setup] done in $$SECONDS s"
	touch $@ $(VENV)/.installed

$(INSTALLED_DOCS): setup.py constraints.txt | $(BIN)/python
	echo "[setup] installing lightning_jax and what builds its pages (a few minutes)"
	SECONDS=0; $(PIP_INSTALL) -e ".[docs]" && echo "[setup] done in $$SECONDS s"
	touch $@ $(VENV)/.installed
