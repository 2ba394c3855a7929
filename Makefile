# kvmesh. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
PY := $(BIN)/python
STUBS := services/client/kvmesh/v1
PROTOC = $(PY) -m grpc_tools.protoc -Iproto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) proto/kvmesh/v1/*.proto
CARGO := cargo --quiet
RUST := --manifest-path rust/Cargo.toml --workspace --locked
# Two lanes side by side: all that starts real engines or shares a mesh, and the rest (tests/fixtures/lanes.py).
LANES := -n 2 --dist loadscope --no-loadscope-reorder
PYTHON_SOURCES := services tests benchmarks examples
# Without compiled bytecode every start of an engine compiles thousands of files anew: half of its time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install up down test test-slow test-docker lint fmt proto docs bench compose-up compose-down clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## install everything into .venv
	@deploy/install.sh -q

up: install ## start a mesh and leave it running; ARGS="--engine mock" and the like are passed on
	@./kvmesh up --detach $(ARGS)

down: ## stop the mesh, whatever state it is in
	@if [ -x $(BIN)/kvmesh ]; then ./kvmesh down $(ARGS); else echo "nothing is installed here, so nothing is running"; fi

test: install ## run all tests but those in containers and the slow ones; ARGS="-k router" and the like are passed on
	@echo "cargo test"
	@$(CARGO) test $(RUST)
	@echo "pytest"
	@$(BIN)/pytest -q -m "not docker and not slow" $(LANES) $(ARGS)

test-slow: install ## run the tests that take minutes each
	@$(BIN)/pytest -q -m "slow and not docker" $(ARGS)

test-docker: install ## build the image and test the stack in containers
	@$(BIN)/pytest -q -m docker $(ARGS)

lint: install ## check style, types, Rust, contracts and generated stubs
	@echo "ruff"
	@$(BIN)/ruff check -q $(PYTHON_SOURCES)
	@$(BIN)/ruff format -q --check $(PYTHON_SOURCES) || { echo "run \`make fmt\`"; exit 1; }
	@echo "pyright"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	@echo "cargo fmt and clippy"
	@cargo fmt --manifest-path rust/Cargo.toml --all -- --check || { echo "run \`make fmt\`"; exit 1; }
	@$(CARGO) clippy $(RUST) --all-targets -- -D warnings
	@echo "lock files of the benchmarks' crates"
	@for crate in benchmarks/*/Cargo.toml; do \
	  $(CARGO) update -q --workspace --locked --manifest-path $$crate \
	  || { echo "run \`cargo update --workspace --manifest-path $$crate\`"; exit 1; }; done
	@echo "buf"
	@$(BIN)/buf lint proto
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; $(call PROTOC,$$fresh); \
	  diff -r -x __pycache__ -x __init__.py "$$fresh/kvmesh/v1" $(STUBS) \
	  || { echo "the stubs are not what proto/ generates: run \`make proto\`"; exit 1; }

fmt: install ## format Python and Rust
	@$(BIN)/ruff check -q --fix-only $(PYTHON_SOURCES)
	@$(BIN)/ruff format -q $(PYTHON_SOURCES)
	@cargo fmt --manifest-path rust/Cargo.toml --all

proto: install ## regenerate the gRPC stubs
	@rm -f $(STUBS)/*_pb2*
	@$(call PROTOC,services/client)

docs: install ## write what the code generates of the reference
	@$(PY) -m kvmesh.frontend.error_table docs/reference/errors.md
	@$(PY) -m kvmesh.cli.reference docs/reference

bench: install ## run every benchmark; writes docs/benchmarks.md
	@$(PY) benchmarks $(ARGS)

compose-up: ## the same mesh in containers
	@deploy/docker/compose.sh up $(ARGS)

compose-down: ## stop the containers
	@deploy/docker/compose.sh down $(ARGS)

clean: down ## remove everything that was built or written here, .venv too
	@rm -rf .venv .kvmesh .cache .pytest_cache .ruff_cache rust/target
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
