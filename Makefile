# Every target builds .venv and installs what it needs by itself. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# A file's tests stay in one process, for what they share is made once a file.
TESTS := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
COMPILED := $(wildcard CMakeLists.txt) $(shell find src -name "*.cpp" -o -name "*.h")

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow gpu bench wheel check format paper results report-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(INSTALLED) ## text to a fine-tuned classifier on this machine, in minutes
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## the default test suite
	$(TESTS)

test-slow: $(INSTALLED) ## the tests that take minutes: kills and resumes, several processes
	$(BIN)/python -m pytest -m "slow and not gpu"

gpu: $(INSTALLED) ## on a machine with a GPU: its tests, then times into results/gpu.json; under 9 minutes, resumable
	$(BIN)/python -m benchmarks.gpu --output results/gpu.json

bench: $(INSTALLED) ## measure the CPU kernels beside their peers; GLUE=<folder> TOKENIZER=<folder> adds real pairs
	$(BIN)/python -m pip install -q -c constraints.txt mambapy
	$(BIN)/python -m benchmarks.kernels --output results/kernels-cpu.json $(if $(GLUE),--glue $(GLUE) --tokenizer $(TOKENIZER))
	$(BIN)/python scripts/render_results.py

wheel: $(INSTALLED) ## build a wheel, install it into an environment of its own and test it there
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -c constraints.txt -w build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q -c constraints.txt "$$(ls build/wheel/*.whl)[experiments]" hypothesis pytest
	cp -r tests examples scripts docs results build/wheel/
	cd build/wheel && venv/bin/python -c "from mabert.ops import native; assert 'build/wheel/venv' in native.kernels.__file__"
	cd build/wheel && venv/bin/python -m pytest -c $(CURDIR)/pyproject.toml --rootdir . tests
	@mkdir -p dist && cp build/wheel/*.whl dist/ && ls dist

check: $(INSTALLED) ## the gate: format, lint, types, floors, paper index, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/paper_index.py --check
	$(BIN)/python scripts/render_results.py --check
	$(TESTS)

format: $(INSTALLED) ## let ruff format and repair what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

results: $(INSTALLED) ## render docs/results.md from results/
	$(BIN)/python scripts/render_results.py

report-check: $(INSTALLED) ## render the experiments' report and look at it in headless Chromium; RESULTS=<folder> names others
	$(BIN)/python scripts/screenshot_report.py --output build/report $(if $(RESULTS),--results $(RESULTS))

paper: $(INSTALLED) ## renew the list of equations and choices in docs/paper.md
	$(BIN)/python scripts/paper_index.py

clean: ## remove everything that these targets made
	rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt $(COMPILED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mabert needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
