# `make` prints the targets. Each sets up its own environment.

PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 30

# Without compiled files, which some machines switch off, every process compiles torch anew: ten seconds each.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup demo sample test test-runtime test-slow test-gpu attack lint types docs bench release clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target text; do \
		printf 'make %-14s %s\n' "$$target" "$$text"; done

setup: .venv/.ready  ## .venv with everything: the package in development mode, torch, the tests' and the linters' packages

# Install everything in one call, so that pip sees torch's pin together with all that depends on torch.
# Python compiles what it imports; pip would compile every file.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[cpu,openvino,export,rtx,dev]"
	touch $@

# The runtime as a user installs it: no torch, no diffusers, no transformers, no onnx.
.venv-runtime/.ready: pyproject.toml constraints.txt $(shell find runtime -type f -not -name '*.pyc' 2>/dev/null)
	$(PYTHON) -m venv .venv-runtime
	.venv-runtime/bin/pip install --quiet --no-compile --disable-pip-version-check --force-reinstall -c constraints.txt ".[cpu]"
	touch $@

# First the bundle that ships with the package, then the whole way from a checkpoint.
demo: setup .venv-runtime/.ready  ## images from the bundle that ships with the package, and from a checkpoint, in an environment without torch
	mkdir -p demo
	.venv-runtime/bin/latentrt demo -o demo/sheet.png --overwrite
	$(BIN)/latentrt export sample/checkpoint demo/bundle --no-parts --overwrite
	.venv-runtime/bin/latentrt run demo/bundle "a large red circle on a blue background" \
		--steps 25 --guidance-scale 5 --seed 7 -o demo/image.png --overwrite
	@echo "demo/sheet.png shows the bundle that ships with the package, demo/image.png is from demo/bundle"

# The sample model, its bundle in the runtime's package, and README's image. More than an hour on a CPU; an interrupted
# run resumes.
sample: setup  ## train the sample model anew, and make its bundle and README's image; more than an hour
	$(BIN)/python -m sample.train --work scratch/sample --output sample/checkpoint
	$(BIN)/latentrt export sample/checkpoint runtime/latentrt/sample_bundle --precision float16 \
		--default-steps 25 --default-guidance-scale 5 \
		--preview-decoder sample/checkpoint/preview_decoder --deep-cache 0 --overwrite
	$(BIN)/latentrt demo -o docs/demo.png --overwrite

# Tests that `test-runtime` ran are not run again.
test: setup lint types test-runtime  ## lint, types and every test that takes seconds
	LATENTRT_TEST_WITHOUT_RUNTIME=1 $(PYTEST) -m "not slow and not gpu"

# The runtime's tests where a user runs it: without torch, the exporter, engine libraries and OpenVINO.
test-runtime: .venv-runtime/.ready  ## the runtime's tests, in an environment without torch
	.venv-runtime/bin/pip install --quiet --disable-pip-version-check -c constraints.txt pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .venv-runtime/bin/pytest -n $(WORKERS) --dist worksteal tests/runtime -m "not slow and not gpu and not openvino and not extras"

test-slow: setup  ## tests that take minutes, or full-size models
	$(PYTEST) -m "slow and not gpu"

# Without a GPU these tests are skipped, with the reason.
test-gpu: setup  ## tests that need a GPU
	$(BIN)/pytest -m gpu

# Every faulty file, value, swap and kill there is: half an hour on two cores. `ATTACK="--kind images"` runs one kind.
attack: setup  ## every faulty file, value, swap and kill; half an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ATTACK)

lint: setup  ## ruff, and hadolint for docker/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile.*

# Also as on the other systems, with a cache of their own each: the packages use nothing that one of them lacks.
types: setup  ## mypy
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 runtime export engines
	$(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin runtime export engines

# A notebook runs again where it changed. One exports with torch, a minute and a half of one CPU; CONTRIBUTING.md says how
# the pages are built without it. The tests build the pages as well, and follow every link.
docs: setup  ## the documentation, in site/; runs the notebooks, some minutes the first time
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs site
	@rm -rf jupyter_execute  # the notebooks with their outputs, which are in the site
	@echo "site/index.html is the first page"

# The full-size measurement takes half an hour, 24 GB of disk and 12 GiB of memory.
bench: setup  ## measure anew what the documents state; half an hour, 24 GB of disk
	$(BIN)/python -m benchmarks.startup --output benchmarks/results/startup.json
	$(BIN)/python -m benchmarks.quality --graph float32 --graph float16 --output benchmarks/results/quality.json
	$(BIN)/python -m benchmarks.hashing --output benchmarks/results/hashing.json
	$(BIN)/python -m benchmarks.convergence --output benchmarks/results/convergence.json --plot docs/convergence.svg
	rm -f benchmarks/results/samplers.json  # an existing report is continued, not measured again
	$(BIN)/python -m benchmarks.samplers --prompts 128 --output benchmarks/results/samplers.json
	$(BIN)/python -m benchmarks.full_size --work scratch/full --output benchmarks/results/full_size.json

# Nothing is uploaded and no tag is made: CONTRIBUTING.md says what follows.
release: setup  ## the source distribution and the wheel of the last commit in dist/, built twice and checked
	$(BIN)/python -m release.build --output dist

# The training states in scratch/sample stay: they took an hour.
clean:  ## remove the environments and what demo and bench have written
	rm -rf .venv .venv-runtime demo site jupyter_execute docs/generated docs/notebooks/exported-sample scratch/full scratch/bundles
