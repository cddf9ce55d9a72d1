# `make` lists the targets.
EXPERIMENT ?= demo
OVERRIDES ?= {}
GPUS ?= 1
JOBS ?= 1
PYTHON ?= python3
BIN := .venv/bin
LAPTOP := {"data.train_rows": 150, "data.validation_rows": 16, "evaluation.rows": 50, "training.num_train_epochs": 2, \
	"training.per_device_train_batch_size": 4, "generation.max_new_tokens": 80}

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/installed  ## the whole chain on the embedded data and model: CPU, minutes, no network after the install
	$(BIN)/python -m src.run demo

run: .venv/installed  ## any recipe headless: make run EXPERIMENT=samsum OVERRIDES='{"lora.r": 8}' [GPUS=2]
	$(BIN)/python -m src.run '$(EXPERIMENT)' '$(OVERRIDES)' '$(GPUS)'

laptop: .venv/installed  ## a real model (SmolLM2-135M) on 150 of SAMSum's chats: 18 minutes on 2 cores
	$(BIN)/python -m src.run samsum_small '$(LAPTOP)'

sweep: .venv/installed  ## a list of runs, JOBS at once with a GPU each: make sweep FILE=sweep.json [JOBS=2]
	$(BIN)/python -m src.sweep '$(FILE)' '$(JOBS)'

try: .venv/installed  ## base and fine-tuned summary of your own dialogue: make try FILE=chat.txt [SECTION=ALLERGY] [RUN=demo]
	@$(BIN)/python -m src.try_it "$$FILE" "$$SECTION" "$$RUN"

lab: .venv/installed  ## open copies of the notebooks in JupyterLab (lab/, which git ignores)
	$(BIN)/python -m src.lab
	$(BIN)/jupyter lab lab

verify: .venv/installed  ## every hash and score of a run from its files again, or of all: make verify [RUN=demo-1a2b3c4d]
	@$(BIN)/python -m src.verify "$$RUN"

audit: .venv/installed  ## known vulnerabilities of what is installed (pip-audit in .audit; needs an advisory database)
	$(BIN)/python -m benchmarks.supply audit

canary: .venv/installed  ## the tests with the newest versions (in .canary) beside the pins, and which library breaks what
	$(BIN)/python -m benchmarks.supply canary $(TESTS)

test: .venv/installed  ## all tests
	$(BIN)/python -m pytest

browser: .venv/installed  ## run every notebook in JupyterLab in Chromium (apt install chromium), light and dark
	$(BIN)/pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	$(BIN)/python -m pytest tests/test_browser.py

links: .venv/installed  ## write the repository's address into badges and links: make links REPOSITORY=owner/name
	$(BIN)/python -m benchmarks.docs '$(REPOSITORY)'

check: .venv/installed  ## lint and formatting, notebooks included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: .venv/installed  ## run all notebooks in a copy of this folder, then take them over as they are committed
	rm -rf .build && mkdir -p .build/outputs && cp -r src notebooks .build/ && cp -rl data .build/
	cp -r outputs/demo outputs/samsum_small .build/outputs/  # what readers filled; 05 shows SAMSum's defects
	cd .build && ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	cd .build && ../$(BIN)/jupyter nbconvert --coalesce-streams --inplace notebooks/*.ipynb  # one line a progress bar
	cp .build/notebooks/*.ipynb notebooks/ && cp .build/outputs/published_recipes/* outputs/published_recipes/
	mv outputs/demo/ratings .build/ && rm -rf outputs/demo
	cp -r .build/outputs/demo-*/evaluations/*/comparison outputs/demo && mv .build/ratings outputs/demo/
	cp -r .build/outputs/demo-*/adapter .build/outputs/demo-*/config.json outputs/demo/ && rm -rf .build  # for 06 and try

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 demo")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: help demo run laptop sweep try lab verify audit canary test browser links check notebooks
