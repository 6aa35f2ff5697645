SHELL := /bin/bash
PYTHON ?= python3
ARGS ?= quant=gsrq bits=1 task=longbench
RESULTS ?= outputs/results
TARGET_PYTHON ?= 3.11
WORKERS ?= 2
SIZE ?= gpu
JOBS ?= 2
BIN := .venv/bin
PIP = $(BIN)/python -m pip install -q $(if $(WHEELHOUSE),--no-index --find-links $(WHEELHOUSE))
PINS = $(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(p['dependencies'] if '$(1)' == 'run' else p['optional-dependencies']['$(1)']))"

.PHONY: help setup run test test-gpu lint rows figures tables standin clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .venv/run.ready  ## make .venv with the pinned dependencies; WHEELHOUSE=folder: from its wheels, without an index

run: .venv/run.ready  ## run one cell; ARGS="quant=gsrq bits=1 task=longbench" takes any Hydra overrides; RESULTS=folder of its rows
	@$(BIN)/python run.py results=$(RESULTS) $(ARGS)

test: .venv/dev.ready  ## the whole offline test-suite, in WORKERS=2 processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

test-gpu: .venv/dev.ready  ## only the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

lint: .venv/dev.ready  ## ruff
	@$(BIN)/ruff check .

rows: .venv/run.ready  ## make the committed rows again, only missing ones; EXPERIMENTS="pareto suites" (default: all) SIZE=gpu JOBS=2
	@$(BIN)/python -m kvq.campaign $(EXPERIMENTS) size=$(SIZE) --jobs $(JOBS)

figures: .venv/run.ready  ## draw results/figures from results/ alone, only what changed
	@$(BIN)/python -m experiments --only figures

tables: .venv/run.ready  ## write results/tables, Markdown and LaTeX, the ledger included
	@$(BIN)/python -m experiments --only tables

sweep-status: .venv/run.ready  ## what became of every cell of every sweep (OUT=outputs), and one table of the finished ones
	@$(BIN)/python -m kvq.status $(OUT)

calib-export: .venv/run.ready  ## publish stored calibrations; TO=folder, file.tar or hub repository id
	@$(BIN)/python -m kvq.share export $(TO)

calib-import: .venv/run.ready  ## take calibrations over; FROM=folder, file.tar or hub repository id
	@$(BIN)/python -m kvq.share import $(FROM)

wheelhouse: .venv/run.ready  ## collect the pinned wheels for another machine; TARGET_PYTHON=3.12 WITHOUT=torch
	@$(BIN)/python -m kvq.wheelhouse wheelhouse --python $(TARGET_PYTHON) $(addprefix --without ,$(WITHOUT))

standin: .venv/run.ready  ## train the stand-in model again (needs a GPU, under 15 minutes); the result is in build/stage2
	$(BIN)/python -m kvq.standin.train --work build/standin --out build/stage1 --minutes 5.3 --eval-minutes 0.6
	$(BIN)/python -m kvq.standin.train --work build/standin --out build/stage2 --start build/stage1 --lengths 2048 8192 16384 \
		--text 0.4 --context 0 --prose 0.05 --seed 2 --minutes 2.2 --eval-minutes 0.5

clean:  ## remove logs, partial runs, stored calibrations and rows of make run; results/ stays
	rm -rf outputs multirun

.venv/run.ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else 'error: Python 3.11 or 3.12 is needed, this is ' + sys.version.split()[0] + '; make PYTHON=python3.11 ...')"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing pinned dependencies into .venv (once)"
	@$(call PINS,run) > .venv/run.txt && $(PIP) -r .venv/run.txt
	@touch $@

.venv/dev.ready: .venv/run.ready
	@$(call PINS,dev) > .venv/dev.txt && $(PIP) -r .venv/dev.txt
	@touch $@
