# Two commands do everything on a fresh machine with Python 3.11+ and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
STAMP := $(VENV)/.installed
# The server's Python backend needs an older numpy than the engine, so it has an environment of its own.
TRITON_VENV ?= .venv-triton
TRITON_REQUIREMENTS := mxcompile/serving/triton/requirements.txt
export MXCOMPILE_TRITON_VENV := $(abspath $(TRITON_VENV))

.PHONY: setup demo test lint format gpu-test gpu-bench gpu-engines clean

setup: $(STAMP)

# constraints.txt pins every package, so that two machines get the same environment.
$(STAMP): pyproject.toml constraints.txt $(TRITON_REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mxcompile needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[build,dev,mpi,plugins,serve,tensorrt-rtx,transformers]'
	$(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --requirement $(TRITON_REQUIREMENTS)
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(BIN)/mxcompile checkpoint create --preset small --seed 0 -o $(DEMO)/checkpoint
	$(BIN)/mxcompile build $(DEMO)/checkpoint -o $(DEMO)/engine --max-seq-len 4096
	$(BIN)/mxcompile validate $(DEMO)/engine --against $(DEMO)/checkpoint --json $(DEMO)/validation.json
	$(BIN)/mxcompile run $(DEMO)/engine --prompt "The lightning layers remember" --max-new-tokens 64
	$(BIN)/mxcompile bench $(DEMO)/engine --backend engine --backend pytorch --backend transformers \
		--prompt-lengths 128,1k --batch-sizes 1 --new-tokens 32 --repeats 3 --passes 1 --json $(DEMO)/bench.json
	$(BIN)/mxcompile bench $(DEMO)/engine --perplexity README.md --json $(DEMO)/text.json
	$(BIN)/mxcompile bench $(DEMO)/engine --state-drift 100,1000 --json $(DEMO)/drift.json
	$(BIN)/mxcompile report $(DEMO)/engine --against $(DEMO)/checkpoint --validation $(DEMO)/validation.json \
		--bench $(DEMO)/bench.json --perplexity $(DEMO)/text.json --state-drift $(DEMO)/drift.json -o $(DEMO)/report.html
	@echo "Report: $(abspath $(DEMO))/report.html"

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cuh' '*.cu' '*.cpp' | xargs -r $(BIN)/clang-format -i

# On a machine with an NVIDIA GPU, nvcc, torch and pytest; uses that machine's own Python.
gpu-test:
	$(PYTHON) benchmarks/gpu/run.py test

gpu-bench:
	$(PYTHON) benchmarks/gpu/run.py bench

# Wants the graphs and the library that docs/gpu-runs.md#engines prepares.
gpu-engines:
	$(PYTHON) benchmarks/gpu/engine_run.py run build/gpu-engines --library build/gpu-trt --results build/gpu-results

clean:
	rm -rf $(VENV) $(TRITON_VENV) $(DEMO) build
