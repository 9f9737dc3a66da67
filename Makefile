# Everything here sets up .venv by itself: a fresh machine needs Python 3.11+, make and Debian's
# package tools. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# Stamps: a target that needs the environment depends on one of them, so a second run is quick.
CORE := .venv/core.stamp
ALL := .venv/all.stamp
BENCH := .venv/bench.stamp
SOURCES := pyproject.toml constraints.txt .ci/venv

# pyright's wrapper would otherwise ask the network whether a newer one exists.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Nothing here waits for a person, nor loads a model from the network unless told to.
export PIP_NO_INPUT := 1
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

define title
printf '\n==> %s\n' '$(1)'
endef

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
	    while IFS=$$'\t' read -r name text; do printf '  make %-22s %s\n' "$$name" "$$text"; done

$(CORE): $(SOURCES)
	@PYTHON='$(PYTHON)' .ci/venv core
	@touch $@

$(ALL): $(SOURCES)
	@PYTHON='$(PYTHON)' .ci/venv all
	@touch $(CORE) $@

$(BENCH): $(SOURCES)
	@PYTHON='$(PYTHON)' .ci/venv bench
	@touch $(CORE) $(ALL) $@

.PHONY: setup
setup: $(ALL) ## Make .venv with all that work on the project needs

.PHONY: redis
redis:
	@.ci/debian redis-server redis-tools

.PHONY: fio
fio:
	@.ci/debian fio

.PHONY: serve
serve: $(CORE) ## Run the server: make serve ARGS="--maxmemory 1gb"
	@$(BIN)/respkv serve $(ARGS)

.PHONY: demo
demo: $(ALL) ## Two inference workers share a document's KV, also across a restart of the server
	@$(BIN)/python -m examples.shared_prompt $(ARGS)

DEMOS := repeated_prompts agentic_workflow shared_document multi_turn_chat

.PHONY: demos
demos: $(ALL) ## What the cache is worth to a model in four workloads: ARGS="--plot FOLDER" draws them
	@for name in $(DEMOS); do $(BIN)/python -m examples.$$name $(ARGS); echo; done

.PHONY: bench
bench: $(ALL) redis fio ## Measure against redis-server and fio on this machine
	@$(BIN)/python -m bench $(ARGS)

.PHONY: bench-codecs
bench-codecs: $(BENCH) ## Codecs on a CPU: against blosc2, zstd, lz4, and error against bits
	@$(BIN)/python -m bench.codecs $(ARGS)
	@$(BIN)/python -m bench.distortion

.PHONY: bench-inference
bench-inference: $(ALL) ## What the cache is worth to a model: first tokens, requests together, the demos
	@$(BIN)/python -m bench.inference $(ARGS)

.PHONY: bench-paged
bench-paged: $(ALL) ## Memory and decode rate of the paged cache, against DynamicCache
	@$(BIN)/python -m bench.paged $(ARGS)

.PHONY: bench-inference-memory
bench-inference-memory: $(ALL) ## What a cached token takes, by tier and codec, against DynamicCache and torch.save
	@$(BIN)/python -m bench.inference_memory $(ARGS)

# These two want an NVIDIA GPU with its driver and a torch built for CUDA. constraints.txt names
# torch 2.13.0; on Linux PyPI's is built for CUDA 13.0 and brings its own triton, 3.7.1, for which
# .ci/venv leaves triton's pin out where there is a driver: on a fresh machine nothing else is to be
# done. Where .venv has the CPU build (2.13.0+cpu), or the driver is for an older CUDA, put another
# build in its place: .venv/bin/pip install --force-reinstall torch --index-url URL, with the URL that
# pytorch.org/get-started gives for the CUDA that nvidia-smi shows.
# .venv/bin/python -c 'import torch; print(torch.cuda.is_available())' says whether all is there.
# Without a GPU the first says what is missing, the second skips; both end well.
.PHONY: bench-gpu
bench-gpu: $(ALL) ## Kernels, attention and eviction on a GPU, in under 10 minutes
	@$(BIN)/python -m bench.gpu $(ARGS)

.PHONY: gpu-test
gpu-test: $(ALL) ## The tests that need a GPU, and those of the kernels, on it
	@$(BIN)/python -m pytest -m gpu $(ARGS)

# Tests start hundreds of servers, each of which would compile all of respkv anew.
unexport PYTHONDONTWRITEBYTECODE

# Each worker has servers of its own, on ports that the system chooses. What needs the machine to
# itself is marked, and comes afterwards.
WORKERS ?= 2

.PHONY: test
test: lint types $(ALL) redis fio ## What the gate checks: ruff, mypy, pyright, pytest
ifeq ($(strip $(ARGS)),)
	@$(call title,pytest with $(WORKERS) workers)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not long and not alone'
	@$(call title,pytest: what is alone on the machine)
	@$(BIN)/python -m pytest -m 'alone and not long' $$(grep -rl --include='test_*.py' 'mark\.alone' tests)
else
	@$(call title,pytest)
	@$(BIN)/python -m pytest $(ARGS)
endif

.PHONY: lint
lint: $(ALL) ## ruff check and ruff format --check
	@$(call title,ruff check)
	@$(BIN)/ruff check .
	@$(call title,ruff format --check)
	@$(BIN)/ruff format --check .

.PHONY: types
types: $(ALL) ## mypy --strict and pyright
	@$(call title,mypy)
	@$(BIN)/mypy
	@$(call title,pyright)
	@$(BIN)/pyright

.PHONY: format
format: $(ALL) ## Let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

.PHONY: cover
cover: $(ALL) redis fio ## The tests again, with branch coverage
	@$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

# Long runs, outside the gate, which runs a sample of each. ARGS="--seed N" repeats one.
.PHONY: fuzz
fuzz: $(ALL) ## 1,000,000 damaged inputs to the parser, 100,000 to a server
	@$(BIN)/python -m tests.long.fuzz $(ARGS)

.PHONY: kill-test
kill-test: $(ALL) ## 1,000 clients killed in the middle of put, lease, reserve and get
	@$(BIN)/python -m tests.long.kill $(ARGS)

.PHONY: soak
soak: $(ALL) ## 10 minutes of put and get: every byte checked, memory flat
	@$(BIN)/python -m tests.long.soak $(ARGS)

.PHONY: gateway-test
gateway-test: $(ALL) ## The gateway: thousands of requests from its OpenAPI, then 100 clients for 60 s
	@$(BIN)/python -m tests.gateway.contract
	@$(BIN)/python -m tests.gateway.crowd $(ARGS)
	@$(BIN)/python -m pytest -m long tests/gateway

# With file tiers. The last two mount small file systems of their own, as root.
.PHONY: crash-test
crash-test: $(ALL) ## 1,000 servers killed under load: nothing acknowledged lost, no wrong byte
	@$(BIN)/python -m tests.long.crash $(ARGS)

.PHONY: flip-test
flip-test: $(ALL) ## 10,000 single bits flipped in the files: detected or harmless
	@$(BIN)/python -m tests.long.bit_flip $(ARGS)

.PHONY: power-test
power-test: $(ALL) ## 100 power cuts: nothing durable lost, no wrong byte (root)
	@$(BIN)/python -m tests.long.power_cut $(ARGS)

.PHONY: fault-test
fault-test: $(ALL) ## Servers on disks that fail, all tiers and engines (root for FUSE)
	@$(BIN)/python -m pytest -m long $(ARGS)
	@$(BIN)/python -m tests.faults.slow_disk

.PHONY: fill-test
fill-test: $(ALL) ## Tiers on file systems that are too small, 5 minutes each (root)
	@$(BIN)/python -m tests.long.fill $(ARGS)

.PHONY: docs
docs: $(CORE) ## Write docs/commands.md and docs/config.md from the code
	@$(BIN)/python -m respkv.wire.commands >docs/commands.md
	@$(BIN)/python -m respkv.cli.reference >docs/config.md

# The lower bounds of pyproject.toml, each taken as the exact version.
.PHONY: lowest
lowest: redis fio ## Run the tests with the oldest dependencies that pyproject.toml admits
	@.ci/lowest $(ARGS)

.PHONY: image-test
image-test: ## Build the image and run it: Docker, or buildah and podman
	@deploy/image-test.sh

.PHONY: clean
clean: ## Remove what was built; .venv stays
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	@find . -name .venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: distclean
distclean: clean ## Remove .venv as well
	@rm -rf .venv
