# `make` lists the targets.
EXPERIMENT ?= demo
OVERRIDES ?= {}
PYTHON ?= python3
BIN := .venv/bin
DEMO = outputs/$(shell $(BIN)/python -c 'from src.experiments import load_experiment; print(load_experiment("demo").run_id)')

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/installed  ## the whole chain on the embedded data and model: CPU, minutes, no network after the install
	$(BIN)/python -m src.run demo

run: .venv/installed  ## any experiment headless: make run EXPERIMENT=samsum OVERRIDES='{"lora.rank": 8}'
	$(BIN)/python -m src.run '$(EXPERIMENT)' '$(OVERRIDES)'

test: .venv/installed  ## all tests
	$(BIN)/python -m pytest

check: .venv/installed  ## lint and formatting, notebooks included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: .venv/installed  ## run all notebooks in place on the demo, as they are committed
	rm -rf $(DEMO) outputs/published-*
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	rm -rf outputs/demo && mkdir outputs/demo
	cp $(DEMO)/comparison/*.csv $(DEMO)/comparison/*.png $(DEMO)/comparison/side_by_side.html outputs/demo/

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: help demo run test check notebooks
