# Everything runs from .venv, which `make setup` makes. `make` alone lists the targets.
PYTHON ?= python3.11
NEWEST := sglang==0.5.23
SGLANG ?= $(NEWEST)
BIN := .venv/bin
SOURCES := $(shell find rust -name '*.rs' -o -name 'Cargo.toml') Cargo.toml Cargo.lock
# Compiled sglang and torch are imported many times: without .pyc files each import takes 30 s, not 12.
unexport PYTHONDONTWRITEBYTECODE
# OpenMP's threads spin by default while they wait for the next operator: half of the demo's processor time.
export OMP_WAIT_POLICY ?= passive
export VIRTUAL_ENV := $(CURDIR)/.venv
export CARGO_TERM_PROGRESS_WHEN := never

.DEFAULT_GOAL := help
.PHONY: help always setup demo serve load test test-all test-engines test-audit test-ranks test-exhaustive test-others test-rust loom shuttle test-models models-loom models-shuttle test-python lint lint-types lint-others docs format interrupts stress ranks ranks-builds ranks-communicators audit probe probe-newest compat architectures same-key shared-weights gpu gpu2 gpu-ranks wheel engines-load engines-cycles verify clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

setup: .venv/.native ## make .venv: sglang, tools and the native module (10 GB, minutes the first time)

# Changes only when another SGLang is asked for, and is looked at each time.
.venv/.requirement: always
	@mkdir -p $(@D)
	@echo '$(SGLANG)' | cmp -s - $@ || echo '$(SGLANG)' >$@

.venv/.packages: pyproject.toml .venv/.requirement
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or make PYTHON=python3.12 setup"; exit 1; }
	@command -v cargo >/dev/null || { echo "cargo not found: install a Rust toolchain (https://rustup.rs)"; exit 1; }
	@echo "setup 1/3: virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv
	@echo "setup 2/3: $(SGLANG) and tools: about 10 GB with CUDA libraries; a minute or two, longer on a slow network"
	@$(BIN)/uv pip install -q --overrides verify/overrides.txt --group dev "$(SGLANG)" "tqdm>=4.60"
	@touch $@

.venv/.native: .venv/.packages $(SOURCES)
	@echo "setup 3/3: building the native module (Rust)"
	@$(BIN)/maturin develop --release --uv -q >.venv/native.log 2>&1 || { cat .venv/native.log; exit 1; }
	@touch $@

demo: setup ## 8 runners of 5 architectures from 8 threads, then the same without the guard
	@$(BIN)/python -m sglang_distguard demo

serve: setup ## two small models behind OpenAI's routes, in one process, on 127.0.0.1:30000
	@$(BIN)/python -m sglang_distguard serve --tiny

load: setup ## wrk asks both models of such a server at once (a minute); needs wrk
	@$(BIN)/python benchmarks/serve_load.py

test: test-rust test-python ## the tests of Rust and of runners in Python, with real SGLang

test-all: test test-models test-others ## every test; CI runs this

test-rust: setup
	@echo "test: Rust core"
	@cargo test -q -p distguard-core

# xdist's own order would begin the longest files last.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test-python: setup
	@echo "test: Python, with real SGLang (the first run makes reference results: a minute more)"
	@$(PYTEST) -m "not slow and not engines and not audit and not ranks and not exhaustive"

test-engines: ## the tests of schedulers, managers, engines and servers
test-audit: ## the tests of the audit and of the look at other releases
test-ranks: ## the tests of several ranks
test-exhaustive: ## all functions of torch, interrupts at bytecodes of hooks, random input, models of images and sounds
test-others: ## all of these, in one session
test-others: KINDS := engines or audit or ranks or exhaustive
test-engines test-audit test-ranks test-exhaustive: KINDS = $(@:test-%=%)
test-engines test-audit test-ranks test-exhaustive test-others: setup
	@echo "test: $(KINDS)"
	@$(PYTEST) -m "($(KINDS)) and not slow"

# Builds of their own: the model checkers replace the locks. `make verify` has the long form.
loom shuttle:
	@RUSTFLAGS="--cfg $@" cargo test -q --release -p distguard-core --target-dir target/$@ --test $@ -- --nocapture

test-models: setup ## model checkers in short form, and one planted bug for each of them
	@echo "test: model checkers"
	@$(MAKE) -s -j2 --output-sync models-loom models-shuttle

models-loom models-shuttle:
	@$(BIN)/python verify/mutations.py --short --checker $(@:models-%=%)

lint: setup ## rustfmt, clippy, ruff, import-linter, pyright, stubtest
	@$(MAKE) -s -j2 --output-sync lint-types lint-others

lint-types:
	@$(BIN)/pyright

lint-others:
	@cargo fmt --all --check
	@cargo clippy -q --workspace --all-targets -- -D warnings
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --check
	@$(BIN)/lint-imports --no-cache --no-logo >.venv/imports.log 2>&1 || { cat .venv/imports.log; exit 1; }
	@$(BIN)/python -m mypy.stubtest sglang_distguard._core

docs: setup ## write the generated tables of docs/process-globals.md and docs/audit.md
	@$(BIN)/python verify/documents.py

format: setup ## format and fix what can be fixed
	@cargo fmt --all
	@$(BIN)/ruff check -q --fix
	@$(BIN)/ruff format -q

interrupts: setup ## Ctrl-C at every bytecode of every hook
	@DISTGUARD_EVERY=1 $(BIN)/python -m pytest -q --timeout 7200 tests/test_interrupts.py

stress: setup ## 50 rounds of the 8-thread test, 32 runners at once, every reference afresh (12 minutes)
	@$(BIN)/python -m pytest -q -m slow -s tests/test_stress.py tests/test_references.py

ranks: ranks-builds ranks-communicators ## the tests of several ranks, 50 times each (make -j2 ranks: an hour and a half)

ranks-builds: RANKS_TESTS := tests/test_agreement.py tests/test_liveness.py tests/test_ranks.py
ranks-communicators: RANKS_TESTS := tests/test_ranks_communicators.py tests/test_ranks_layouts.py tests/test_ranks_turns.py
ranks-builds ranks-communicators: setup
	@DISTGUARD_TIMES=50 $(BIN)/python -m pytest -q --timeout 7200 --durations 20 --durations-min 60 $(RANKS_TESTS)

audit: setup ## which process-globals of SGLang change, and whether each is treated: against ledger/ (20 minutes)
	@$(BIN)/python -m sglang_distguard audit --ledger ledger/$(subst sglang==,,$(SGLANG)).csv

# .venv keeps its SGLang, whatever release is looked at.
probe: ## what another SGLang has for the guard, from its wheel: make probe SGLANG=sglang==VERSION (seconds)
	@$(MAKE) -s setup SGLANG=$(NEWEST)
	@$(BIN)/python verify/probe.py $(SGLANG)

probe-newest: setup ## the same for the three newest releases of the package index; CI runs this
	@$(BIN)/python verify/probe.py --newest 3

compat: ## concurrent tests and audit with another SGLang: make compat SGLANG=sglang==VERSION [KEEP=1] (half an hour)
	@$(MAKE) -s setup SGLANG=$(NEWEST)
	@$(BIN)/python verify/compat.py $(SGLANG) $(if $(KEEP),--keep)

architectures: setup ## every architecture that runs on CPU, alone, guarded and audited; writes docs/ (20 minutes to an hour)
	@$(BIN)/python verify/architectures.py --jobs 2 --seconds 600

same-key: setup ## runners of one path and other content, every architecture; writes docs/ (a quarter of an hour)
	@$(BIN)/python verify/same_key.py --jobs 2

shared-weights: setup ## two runners that share weights, every architecture; writes docs/ (half an hour)
	@$(BIN)/python verify/shared_weights.py --jobs 2

gpu: setup ## runners and engines with CUDA graphs at once on one GPU, with a treatment and without; memory released; loads, streams, other features, scratch memory, the audit (an hour)
	@$(BIN)/python verify/gpu.py .cache/models
	@$(BIN)/python verify/gpu_memory.py .cache/models
	@$(BIN)/python verify/gpu_engines.py .cache/models
	@$(BIN)/python verify/gpu_memory_by_runner.py .cache/models
	@$(BIN)/python verify/gpu_loads.py .cache/models
	@$(BIN)/python verify/gpu_streams.py .cache/models graphs eager processes
	@$(BIN)/python verify/gpu_breadth.py .cache/models
	@$(BIN)/python verify/gpu_scratch.py
	@$(BIN)/python verify/gpu_audit.py .cache/models --keep .cache/audit-runs

gpu2: setup ## runners of one process on two GPUs, from threads whose current device is either (two minutes)
	@$(BIN)/python verify/gpu2.py .cache/models

gpu-ranks: setup ## runners of two ranks over NCCL on two GPUs: bits, cost, memory, a rank that dies (ten minutes)
	@$(BIN)/python verify/gpu_ranks.py .cache/models

wheel: setup ## the wheel for each Python of this machine, each tested in a clean environment (minutes)
	@$(BIN)/python verify/wheel.py

engines-load: setup ## mixed load on engines: opens, closes, cancels, failures; output for docs/ENGINES_LOAD.md (MINUTES=60)
	@$(BIN)/python verify/engines_load.py --minutes $(or $(MINUTES),60)

engines-cycles: setup ## 200 times an engine opened, asked and closed: nothing is left; output in docs/engine-numbers.md
	@$(BIN)/python verify/engine_cycles.py

verify: setup ## model checkers at full length, planted bugs, 10,000 inputs, 200 cycles (under an hour)
	@$(BIN)/python verify/verify.py

clean: ## remove what was built; .venv and .cache stay
	@cargo clean -q
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
