# Everything that a newcomer needs: `make demo` and `make test` set up what they use by themselves,
# given a Rust toolchain (rustup reads rust-toolchain.toml) and Python 3.11. `make` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Without make's flags: cargo would look for the job server of --jobs in them, which is not there for it.
CARGO  ?= env -u MAKEFLAGS -u MFLAGS cargo
PYTHON ?= python3
# More arguments for the command behind a target: make demo ARGS='--steps 100'
ARGS ?=

TARGET_DIR := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
TOOLS      := $(abspath $(TARGET_DIR))/tools
DENY_VERSION := 0.20.2
DENY       := $(TOOLS)/bin/cargo-deny
VENV       := .venv
# Of the Python package's native half. Tests share dependencies with cargo's; benchmarks of time take release.
PROFILE    := dev
WHEELS     := $(abspath $(TARGET_DIR))/wheels
K8S_VENV   := $(TOOLS)/k8s-venv
DASH       := $(TOOLS)/dashboards
WORKER     := $(CARGO) run --quiet --locked -p arc-topk-worker --bin arc-worker --

# arc-ps and arc-worker as `make unit` builds them: `cargo build` would compile the workspace again, without its tests' features.
PROGRAMS   := $(CARGO) test --quiet --locked --workspace --no-run --test it

# What the long run of bench-loss compares: dense training, and the defaults.
LONG_CELLS := 'dense adamw,arc ef14 d0.2 int4 catchup20 sketch-int8 warm-int8'
# What its runs by energy compare: dense training, two densities, and what an energy makes of them.
ENERGY_CELLS := 'dense adamw,catchup20 sketch-int8 warm-int8,energy'

.PHONY: help
help: ## list the targets
	@echo 'arc-topk: data-parallel training through sharded parameter servers. Targets:'
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "More arguments for a target's command: make demo ARGS='--steps 100'"

.PHONY: demo
demo: ## train a small language model twice, dense and with ARC-Top-K, and compare (a few minutes after the build)
	@$(PYTHON) worker/data/fetch.py shakespeare || echo 'data: the demo will use its built-in text'
	@echo 'build: the first time takes a few minutes'
	@$(CARGO) build --locked -p arc-topk-worker --bin arc-worker
	@$(WORKER) demo $(ARGS)

# PyTorch, most of what Python needs, is fetched while cargo compiles; what is single-threaded or waits shares the cores.
.PHONY: test
test: ## all that must pass before a change is merged: what .ci/run calls
	@$(MAKE) --no-print-directory '$(VENV)/.ready' & fetching=$$!; \
	  trap 'kill "$$fetching" 2> /dev/null || true' EXIT; \
	  $(MAKE) --no-print-directory fmt-check clippy unit-build; \
	  wait "$$fetching"
	@$(MAKE) --no-print-directory --jobs=2 unit docs deny kernels-check python-lint python
	@$(MAKE) --no-print-directory --jobs=2 pytest k8s-test where-possible
	@echo 'make test: format, lints, tests, documentation, dependencies, CUDA kernels, the Python package, the chart and dashboards are in order'

# What needs programs that a machine may lack; it says what was not tested.
.PHONY: where-possible
where-possible:
	@$(PYTHON) worker/examples/instructions.py --where-possible
	@$(PYTHON) k8s/images/check.py --tested --where-possible
	@if command -v apt-get > /dev/null; then $(MAKE) --no-print-directory --jobs=1 dashboards-test; \
	  else echo 'make test: NOT TESTED: dashboards, which want Debian 12 (its Prometheus is fetched with apt-get)'; fi

.PHONY: fmt-check
fmt-check:
	$(CARGO) fmt --all -- --check

.PHONY: fmt
fmt: ## format the sources
	$(CARGO) fmt --all

.PHONY: clippy
clippy:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

.PHONY: lint
lint: fmt-check clippy ## format check and clippy only

.PHONY: unit-build
unit-build:
	$(CARGO) test --locked --workspace --no-run

.PHONY: unit
unit:
	$(CARGO) test --locked --workspace

# What the Python package is built and tested with, exactly. PyTorch is most of it (2.7 GB).
$(VENV)/.ready: worker/python/requirements.txt
	@echo 'python: fetching PyTorch and what tests and examples use into $(VENV): 2.8 GB, some minutes, once'
	$(PYTHON) -m venv '$(VENV)'
	'$(VENV)/bin/pip' install --quiet --disable-pip-version-check --requirement worker/python/requirements.txt
	touch '$@'

.PHONY: python
python: $(VENV)/.ready ## build the Python package arc_topk and install it into .venv
	rm -rf '$(WHEELS)'
	@echo 'python: building the package arc_topk; the first time takes some minutes'
	'$(VENV)/bin/maturin' build --quiet --locked --profile '$(PROFILE)' --interpreter '$(VENV)/bin/python' \
	  --manifest-path worker/python/Cargo.toml --out '$(WHEELS)'
	'$(VENV)/bin/pip' install --quiet --disable-pip-version-check --no-deps --force-reinstall '$(WHEELS)'/arc_topk-*.whl

.PHONY: python-lint
python-lint: $(VENV)/.ready ## lint the Python sources and check their types
	cd worker/python && '$(abspath $(VENV))/bin/ruff' check --quiet --config pyproject.toml . ../data ../examples ../kernels
	cd worker/python && '$(abspath $(VENV))/bin/mypy' --no-error-summary

.PHONY: python-test
python-test: python-lint python ## test the Python package with PyTorch, gloo and real shards
	@$(MAKE) --no-print-directory pytest

.PHONY: pytest
pytest:
	$(PROGRAMS)
	cd worker/python && ARC_BIN='$(abspath $(TARGET_DIR))/debug' '$(abspath $(VENV))/bin/pytest' $(ARGS)

.PHONY: kernels
kernels: ## compile the CUDA kernels into worker/kernels/arc.fatbin (after a change to them)
	$(PYTHON) worker/kernels/build.py

.PHONY: kernels-check
kernels-check: ## check that arc.fatbin is what the kernels' sources make (fetches the compiler, 104 MB)
	$(PYTHON) worker/kernels/build.py --check

.PHONY: gpu-check
gpu-check: ## on a machine with an NVIDIA GPU: tests, compute-sanitizer, benchmark and training there
	bash worker/kernels/gpu-check.sh

$(DASH)/.ready: dashboards/tests/requirements.txt dashboards/package-lock.json dashboards/tools/prometheus.py
	$(PYTHON) -m venv '$(DASH)/venv'
	'$(DASH)/venv/bin/pip' install --quiet --disable-pip-version-check --requirement dashboards/tests/requirements.txt
	cd dashboards && PATH='$(DASH)/venv/bin':"$$PATH" npm ci --silent
	$(PYTHON) dashboards/tools/prometheus.py '$(DASH)/prometheus'
	touch '$@'

.PHONY: dashboards-test
dashboards-test: $(DASH)/.ready ## check dashboards and alerts, and watch a real job with a real Prometheus
	$(PROGRAMS)
	cd dashboards && '$(DASH)/venv/bin/ruff' check --quiet . && '$(DASH)/venv/bin/mypy' --no-error-summary
	cd dashboards && ARC_DASHBOARD_TOOLS='$(DASH)' ARC_BIN='$(abspath $(TARGET_DIR))/debug' '$(DASH)/venv/bin/pytest' $(ARGS)

dashboards/screenshots/node_modules/.ready: dashboards/screenshots/package-lock.json $(DASH)/.ready
	@echo "screenshots: fetching Grafana's components: 640 MB, some minutes, once"
	cd dashboards/screenshots && PATH='$(DASH)/venv/bin':"$$PATH" npm ci --silent --ignore-scripts && \
	  PATH='$(DASH)/venv/bin':"$$PATH" node node_modules/esbuild/install.js
	touch '$@'

.PHONY: screenshots
screenshots: dashboards/screenshots/node_modules/.ready ## photograph the dashboards with a real job's data (needs Chromium)
	$(PROGRAMS)
	ARC_DASHBOARD_TOOLS='$(DASH)' ARC_BIN='$(abspath $(TARGET_DIR))/debug' PYTHONPATH=dashboards/tests \
	  '$(DASH)/venv/bin/python' dashboards/screenshots/take.py $(ARGS)

$(K8S_VENV)/.ready: k8s/tests/requirements.txt
	$(PYTHON) -m venv '$(K8S_VENV)'
	'$(K8S_VENV)/bin/pip' install --quiet --disable-pip-version-check --requirement '$<'
	touch '$@'

.PHONY: k8s-test
k8s-test: $(K8S_VENV)/.ready ## render and check the Helm chart with Helm 3 and 4
	$(PROGRAMS)
	cd k8s && ARC_BIN='$(abspath $(TARGET_DIR))/debug' '$(K8S_VENV)/bin/pytest' $(ARGS)

.PHONY: images-test
images-test: ## build the images with buildah and train in containers, one of which is killed (root; buildah, podman, runc)
	$(PYTHON) k8s/images/check.py $(ARGS)

.PHONY: instructions
instructions: ## count the instructions of a step's hot paths and compare them with their baseline (valgrind)
	@$(PYTHON) worker/examples/instructions.py $(ARGS)

.PHONY: docs
docs: ## build the API documentation, warnings denied
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps

.PHONY: deny
deny: $(DENY) ## check the dependencies: bans, licences, sources
	$(DENY) --log-level error check --hide-inclusion-graph bans licenses sources

.PHONY: advisories
advisories: $(DENY) ## check the dependencies against the RustSec database (needs github.com)
	$(DENY) check advisories

# An unoptimised cargo-deny is built in half the time and checks this tree in two seconds.
$(DENY):
	CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=0 $(CARGO) install cargo-deny --version $(DENY_VERSION) --locked \
	  --profile dev --root '$(TOOLS)' --target-dir '$(TOOLS)/build'
	rm -rf '$(TOOLS)/build'

.PHONY: data
data: ## fetch the public data sets into .data (or ARC_DATA_CACHE)
	$(PYTHON) worker/data/fetch.py $(ARGS)

.PHONY: sim
sim: ## simulate 2000 jobs with faults in virtual time: nothing may be lost, counted twice or different (a minute)
	@echo 'sim: jobs with crashes, partitions and joins, seeds 0..2000; worker/sim/README.md says what is checked'
	$(CARGO) run --locked -p arc-topk-sim -- --seeds 0..2000 $(ARGS)

.PHONY: soak
soak: ## the same with ever new seeds, until one fails or it is interrupted; ARGS='--seconds 3600' ends it
	@echo 'soak: seeds from 2000 on, until one fails; ctrl-C ends it'
	$(CARGO) run --locked -p arc-topk-sim -- --seeds 2000..18446744073709551615 $(ARGS)

# Which crate has the target is seen from its seeds; what is found stays in that crate's fuzz/corpus and fuzz/artifacts.
# The pinned toolchain does: RUSTC_BOOTSTRAP lets it take the sanitizer's flags, which else nightly alone does.
.PHONY: fuzz
fuzz: ## fuzz a target for so many seconds (needs cargo-fuzz): make fuzz ARGS='member_operations 60'
	@set -- $(ARGS); target="$${1:-}" seconds="$${2:-60}"; \
	seeds="$$(ls -d {common,ps,worker}/fuzz/seeds/"$$target" 2>/dev/null || true)"; \
	if [[ -z "$$target" || ! -d "$$seeds" ]]; then \
	  echo 'fuzz: name one of these targets, and seconds:' {common,ps,worker}/fuzz/seeds/*; exit 2; \
	fi; \
	crate="$${seeds%/seeds/*}"; mkdir -p "$$crate/corpus/$$target"; \
	RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --fuzz-dir "$$crate" "$$target" "$$crate/corpus/$$target" "$$seeds" -- \
	  -max_total_time="$$seconds" -print_final_stats=1

.PHONY: bench
bench: ## speed: kernels beside a plain copy, a shard over QUIC beside raw quinn
	$(CARGO) bench --locked --workspace $(ARGS)

.PHONY: bench-loss
bench-loss: ## losses by compressor, feedback, optimizer, density and wire type (under an hour; goes on where it stopped)
	@$(PYTHON) worker/data/fetch.py shakespeare
	$(CARGO) run --locked -p arc-topk-worker --example loss_table -- $(ARGS)
	$(CARGO) run --locked -p arc-topk-worker --example loss_table -- --out runs/loss_long --steps 1400 \
	  --validate-every 100 --rates 0.0005,0.001,0.002 --cells $(LONG_CELLS) $(ARGS)
	$(CARGO) run --locked -p arc-topk-worker --example loss_table -- --out runs/loss_energy --seeds 0 --rates 0.002 --only $(ENERGY_CELLS) $(ARGS)

.PHONY: bench-compare
bench-compare: python ## losses and bytes in PyTorch beside all-reduce, the bf16 hook and PowerSGD (an hour or two; goes on where it stopped)
	@$(PYTHON) worker/data/fetch.py shakespeare reviews minilm
	'$(VENV)/bin/python' worker/python/bench/compare.py $(ARGS)

.PHONY: bench-links
bench-links: PROFILE := release
bench-links: python ## step times over links of a rate, beside gloo, bf16 and PowerSGD (root; iproute2, nftables; an hour, goes on where it stopped)
	'$(VENV)/bin/pip' install --quiet --disable-pip-version-check --requirement worker/python/bench/requirements.txt
	$(CARGO) build --locked --release -p arc-topk-ps --bin arc-ps
	'$(VENV)/bin/python' worker/python/bench/links.py --programs '$(abspath $(TARGET_DIR))/release' $(ARGS)

.PHONY: bench-scale
bench-scale: ## what a step costs up to 256 workers and their shards, all on this machine
	$(CARGO) build --locked --release -p arc-topk-ps --bin arc-ps
	$(CARGO) bench --locked -p arc-topk-worker --bench scale -- --program '$(abspath $(TARGET_DIR))/release/arc-ps' $(ARGS)

.PHONY: bench-overhead
bench-overhead: PROFILE := release
bench-overhead: python ## what averaging costs a PyTorch worker in time and memory, beside gloo
	'$(VENV)/bin/python' worker/python/bench/overhead.py $(ARGS)

.PHONY: bench-optimizer
bench-optimizer: PROFILE := release
bench-optimizer: python ## catch-up AdamW beside PyTorch's
	'$(VENV)/bin/python' worker/python/bench/optimizer.py $(ARGS)

.PHONY: chaos
chaos: ## a job whose processes are killed, stopped and cut off while it trains: stalls and loss (root for namespaces; ARGS='--kills 100')
	$(CARGO) build --quiet --locked -p arc-topk-worker --bin arc-worker --example chaos
	$(TARGET_DIR)/debug/examples/chaos $(ARGS)

.PHONY: clean-tools
clean-tools:
	rm -rf '$(TOOLS)'
