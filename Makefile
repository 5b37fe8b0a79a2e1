# Every target sets up what it needs in $(VENV) first. `make` alone lists the targets.
#
#   VENV=DIR          the virtual environment (.venv)
#   PYTHON=EXE        the interpreter it is made from (the first Python >= 3.11 found)
#   TESTS='PATH ...'  which tests `test`, `test-all` and `test-gpu` run (tests)
#   WORKERS=N         how many processes run tests at the same time (3: some of them always wait; 0: this one alone)
#   COCO=DIR          what `bench` streams: a folder with annotations.json and images/ (build/bench: procedural)
#   OFFLINE=1         a machine without a package registry: use the packages that PYTHON already has
#   WHEELS=DIR        with OFFLINE=1: wheels to install beside them

VENV ?= .venv
TESTS ?= tests
WORKERS ?= 3
COCO ?= build/bench
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
export PYTHON OFFLINE

SOURCES := $(wildcard core/*.py core/*/* ops/*.py ops/csrc/* data/*.py launch/* launch/*/* monitoring/*.py monitoring/*/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo unit test test-all coverage test-gpu bench bench-gpu lint wheel clean

help:
	@echo 'make demo       train, evaluate and look at a small detector on this machine (10 minutes on 2 cores)'
	@echo 'make unit       the tests that start no process and run no whole model (2 minutes)'
	@echo 'make test       lint, then every test that needs neither a GPU nor much time'
	@echo 'make test-all   the slow tests as well'
	@echo 'make coverage   which lines and branches of the product make test reaches'
	@echo 'make test-gpu   the tests that need a CUDA device'
	@echo 'make bench      the benchmarks on the CPU; make bench-gpu those of a GPU'
	@echo 'make lint       ruff, pyright, shellcheck and hadolint'
	@echo 'make wheel      dist/ddetr-*.whl'
	@echo 'make setup      only install, into $(VENV)'
	@echo 'make clean      remove what was built (not $(VENV))'

demo: setup
	rm -rf demo
	$(BIN)/python -m ddetr.launch.demo demo

unit: setup
	$(PYTEST) -m 'not integration and not slow and not gpu' $(TESTS)

test: lint
	$(PYTEST) -m 'not slow and not gpu' $(TESTS)

test-all: lint
	$(PYTEST) -m 'not gpu' $(TESTS)

coverage: setup
	$(PYTEST) --cov --cov-report=term-missing:skip-covered -m 'not slow and not gpu' $(TESTS)

test-gpu: setup gpu
	$(PYTEST) -n 0 -m gpu $(TESTS)

bench: setup $(COCO)/annotations.json
	$(BIN)/python benchmarks/deform_attn.py
	$(BIN)/python benchmarks/deform_attn_growth.py
	$(BIN)/python benchmarks/transformers_drop_in.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/padding.py $(COCO)/annotations.json
	$(BIN)/python benchmarks/stream.py $(COCO)/annotations.json $(COCO)/images
	$(BIN)/python benchmarks/stream_endurance.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/failures.py
	$(BIN)/python benchmarks/scaling.py

bench-gpu: setup gpu
	$(PYTEST) -n 0 -m gpu -k 'not sanitizer' tests/ops
	$(BIN)/python benchmarks/cuda_code.py
	$(BIN)/python benchmarks/deform_attn.py --gpu
	$(BIN)/python benchmarks/step.py --device cuda

build/bench/annotations.json: | setup
	rm -rf build/bench
	$(BIN)/ddetr data synth build/bench --images 128 --size 640

# pyright cannot follow the import hook of an editable install, so it reads the package as a wheel lays it out.
lint: setup build/typed/.unpacked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run
	$(BIN)/hadolint Dockerfile
	$(BIN)/pyright --pythonpath $(BIN)/python

wheel: setup
	rm -rf dist
	PYTHONWARNINGS=ignore $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

setup: $(VENV)/.built

clean:
	rm -rf build dist demo *.egg-info ops/*.so .coverage* .pytest_cache .ruff_cache .hypothesis

.PHONY: gpu
gpu: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo 'ddetr: this target needs a CUDA device, and torch sees none (ddetr doctor says more)' >&2; exit 1; }

$(VENV)/.created:
	launch/bootstrap.sh $(VENV)
	@touch $@

# torch first: DeepSpeed's setup looks for it.
$(VENV)/.requirements: pyproject.toml constraints.txt | $(VENV)/.created
ifdef OFFLINE
	$(if $(WHEELS),$(PIP) install --no-index --no-deps $(WHEELS)/*.whl)
else
	@echo 'ddetr: installing torch and the other requirements into $(VENV) (5 GB, a few minutes)'
	$(PIP) install -c constraints.txt --upgrade pip setuptools wheel ninja torch
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*p["dependencies"], *sum(p["optional-dependencies"].values(), []), sep="\n")' \
		>$(VENV)/requirements.txt
	$(PIP) install -c constraints.txt --no-build-isolation -r $(VENV)/requirements.txt
	$(PIP) install -c constraints.txt --no-deps lvis  # judges a test; it requires OpenCV, with which it draws
endif
	@touch $@

$(VENV)/.built: setup.py $(wildcard ops/csrc/*) $(VENV)/.requirements
	@echo 'ddetr: compiling the op'
	PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

build/typed/.unpacked: $(SOURCES) $(VENV)/.built
	rm -rf build/typed
	$(BIN)/python setup.py --quiet build_py --build-lib build/typed
	@touch $@
