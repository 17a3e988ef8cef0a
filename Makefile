# The only commands a person must know. Each sets up what it needs; `make setup` alone does nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
LOWEST := .venv-lowest
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc -type f)
NVCC := $(shell command -v nvcc 2>/dev/null)
# A GPU machine may bring its own torch: without a .venv, the GPU commands use the Python that is there.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help setup demo test test-fast test-lowest fuzz quality cuda bench performance gpu gpu-status docs clean

help:
	@echo "make setup       create .venv and install pycompress with everything it is tested with"
	@echo "make demo        compress a real model, reload it in a new process, print one table"
	@echo "make test        run all tests"
	@echo "make test-fast   run those of the daily loop, in two minutes"
	@echo "make test-lowest apply, save and load on the lowest versions that pyproject.toml allows"
	@echo "make fuzz        random calls of the ops, PYCOMPRESS_FUZZ=4000 of each"
	@echo "make quality     formatters, linters, types; compile the CUDA sources where nvcc is"
	@echo "make bench       time each op against its peers, write bench/results/<cpu>.json"
	@echo "make performance render docs/performance.md and its plots from bench/results"
	@echo "make gpu         on a GPU: build, test, benchmark, write bench/results/<gpu>.json"
	@echo "make gpu-status  kernels that changed since their GPU figures were taken"
	@echo "make docs        build the site into build/docs, check links and paths"

setup: $(INSTALLED)

$(INSTALLED): $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,test,dev,docs,plot,laws]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m pycompress demo

test: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests --numprocesses=auto --dist=loadfile

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests -m "not slow" --numprocesses=auto --dist=loadfile

test-lowest: $(INSTALLED)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt pytest \
	  numpy pyyaml safetensors torch tqdm transformers typer
	$(LOWEST)/bin/python -m pip list | grep -iE "^(numpy|pyyaml|safetensors|torch|tqdm|transformers|typer) "
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=. $(LOWEST)/bin/python -m pytest -q -o addopts=--import-mode=importlib \
	  tests/hub/test_roundtrip.py tests/test_recipe.py

fuzz: $(INSTALLED)
	PYCOMPRESS_FUZZ=$${PYCOMPRESS_FUZZ:-4000} OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz_*.py -q -s

quality: $(INSTALLED) cuda docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

cuda:
ifeq ($(NVCC),)
	@echo "nvcc is not here: the CUDA sources are not compiled"
else
	mkdir -p build/cuda
	for source in $(wildcard csrc/cuda/*.cu); do \
	  $(NVCC) -std=c++17 -O3 --threads=0 --Werror=all-warnings -Xcompiler=-Wall,-Wextra -Icsrc -Icsrc/cuda \
	    -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
	    --compile $$source --output-file build/cuda/$$(basename $$source .cu).o || exit 1; \
	done
endif

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt bitsandbytes faiss-cpu
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python bench/compact.py build/bench.json

performance: $(INSTALLED)
	$(BIN)/python bench/report.py

gpu:
	$(GPU_PYTHON) bench/gpu.py run

gpu-status:
	$(GPU_PYTHON) bench/gpu.py status

docs: $(INSTALLED)
	$(BIN)/python docs/check_links.py
	TERM=dumb $(BIN)/python -m typer pycompress.cli utils docs --name pycompress --output docs/api/cli.md
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

clean:
	rm -rf build pycompress.egg-info pycompress/_C*.so
