# SPDX-License-Identifier: Apache-2.0
# Thin names for the everyday commands; `make` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-gpu quickstart bench bench-gpu lint format lock clean
IN_ENV := source ./.ci_test_env.sh &&
ARGS ?=

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup:  ## build .venv (does nothing when it is up to date)
	@./.ci_build.sh

# a file at a time: what a file's tests share, as trained models, is made once
test: setup  ## the tests that need neither a GPU nor minutes; ARGS="-k name" goes to pytest
	$(IN_ENV) pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not bench" $(ARGS)

test-slow: setup  ## the tests that take minutes
	$(IN_ENV) pytest -o faulthandler_timeout=3000 -m "slow and not gpu" $(ARGS)

test-gpu: setup  ## the tests that need a GPU
	$(IN_ENV) pytest -o faulthandler_timeout=3000 -m gpu $(ARGS)

quickstart: setup  ## preprocess, train, score and generate on a real genome, in minutes
	$(IN_ENV) examples/quickstart.sh

bench: setup  ## speed and memory beside Vortex, plain PyTorch, gffread, pysam and cp
	$(IN_ENV) python benchmarks/beside_vortex.py
	$(IN_ENV) python benchmarks/mixed_lengths.py
	$(IN_ENV) python benchmarks/preprocess.py
	$(IN_ENV) python benchmarks/data.py
	$(IN_ENV) python benchmarks/training.py
	$(IN_ENV) python benchmarks/plain_model.py
	$(IN_ENV) python benchmarks/layers.py

bench-gpu: setup  ## training, scoring and decoding on a GPU beside the limits of the chip
	$(IN_ENV) python benchmarks/gpu.py

lint: setup  ## check style
	$(IN_ENV) ruff check . && ruff format --check .

format: setup  ## mend style
	$(IN_ENV) ruff check --fix . && ruff format .

# Every version that any build may install; what uv adds after '# via' is why it is there. Excluded: the wrong CUDA core
# (see .ci_build.sh). The markers that sed drops say Linux, or its machines, on which all versions are the same.
lock: setup  ## renew constraints.txt from pyproject.toml; UPGRADE=--upgrade takes newer versions
	$(IN_ENV) uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url \
	    --no-emit-find-links --custom-compile-command 'make lock' --excludes <(echo transformer-engine-cu12) \
	    --extra dev --extra cuda13 $(UPGRADE) pyproject.toml --output-file constraints.txt
	sed -Ei "s/ *;.*platform_machine.*//; s/ ?(and )?sys_platform == 'linux'//; \
	    s/ and python_full_version < '3.13'//; s/python_full_version < '3.13'//; s/ *; *$$//; s/; +and /; /" constraints.txt

clean:  ## remove .venv and caches
	rm -rf .venv .venv.old build dist src/*.egg-info .pytest_cache .ruff_cache
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
