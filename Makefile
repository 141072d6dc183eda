# Needs Python >= 3.11, make and git. `make help` lists the targets.
# The first target that needs it sets up .venv, once; pip's own configuration (index, proxy, constraints) applies.

PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Overrides for the two commands of the demo, e.g. make demo DEMO_TRAIN_ARGS="trainer.max_steps=20".
DEMO_TRAIN_ARGS ?=
DEMO_EVAL_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PLAY_ARGS ?=
SCREENSHOT_PAGE ?= outputs/demo/report.html
SCREENSHOT_PLAY ?= --prompt "two dogs on a green background" experiment=demo

# Nothing but the set-up uses the network, unless the user says otherwise.
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline

.DEFAULT_GOAL := help
.PHONY: help setup lock demo play test test-slow test-browser screenshot docs bench lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## create .venv and install the package with its development tools

$(STAMP): pyproject.toml
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
		found=; \
		for candidate in $(PYTHON) python3 python python3.14 python3.13 python3.12 python3.11; do \
			if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
			then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo 'No Python >= 3.11 with the venv module was found: install one, or run make PYTHON=/path/to/python.' >&2; \
			exit 1; \
		fi; \
		echo "Creating $(VENV) with $$($$found --version). Done once: about 7 GB on disk, most of it torch."; \
		$$found -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

lock: $(STAMP)  ## write requirements.lock: version and sha256 of every package, for this Python and platform
	$(BIN)/python .ci/lock.py requirements.lock

demo: $(STAMP)  ## fine-tune the shipped model with the SJD2 objective, then compare the decoding methods
	$(BIN)/python train.py experiment=demo $(DEMO_TRAIN_ARGS)
	$(BIN)/python evaluate.py experiment=demo $(DEMO_EVAL_ARGS)

# One thread in each of the two workers: more threads than cores make small models slower.
test: $(STAMP)  ## run the default tier of the tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-slow: $(STAMP)  ## run the tests that decode or train for minutes
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

play: $(STAMP)  ## type a prompt and watch it being decoded, in a browser
	$(BIN)/sjd2 play $(PLAY_ARGS)

test-browser: $(STAMP)  ## open a report's page and that of sjd2 play in headless Chromium; screenshots in outputs/browser
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/laws $(PYTEST_ARGS)

# Needs Chromium, and a report and a model: make demo writes these.
screenshot: $(STAMP)  ## take the README's pictures of pages, docs/images/report.png and play.png
	$(BIN)/python -m tests.tools.browser $(SCREENSHOT_PAGE) docs/images/report.png
	$(BIN)/python -m tests.tools.play_page docs/images/play.png $(SCREENSHOT_PLAY)

# The variable silences an advertisement of mkdocs-material.
docs: $(STAMP)  ## build the documentation site into outputs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)  ## measure every decoding method on the shipped weights
	$(BIN)/python evaluate.py weights=model run_dir=outputs/bench replace_images=true $(BENCH_ARGS)

lint: $(STAMP)  ## check style, types, spelling and that notebooks carry no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/nbstripout --verify notebooks/*.ipynb

format: $(STAMP)  ## repair style and strip notebooks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/nbstripout notebooks/*.ipynb

clean:  ## remove outputs and caches; .venv stays
	rm -rf outputs multirun dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
