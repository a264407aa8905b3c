# The interpreter .venv was made with, else python3; `make setup PYTHON=/path/to/python3.12` chooses another.
ifndef PYTHON
PYTHON := $(shell p=$$(sed -n 's/^executable = //p' .venv/pyvenv.cfg 2>/dev/null); \
                  if [ -x "$$p" ]; then echo "$$p"; else echo python3; fi)
endif
# .venv belongs to one interpreter and one folder, and what is in it to one set of pins. The stamp is written last: a
# set-up that was interrupted has none and starts afresh; changed pins are installed over what is there. The names of the
# modules count too: an editable install keeps a list of them, and a file that has moved would not be found.
VENV := $(shell "$(PYTHON)" -c 'import os, sys, zlib; print(f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}-{zlib.crc32((sys.base_prefix + os.getcwd()).encode()):08x}")' 2>/dev/null)
PINS := $(shell { cat pyproject.toml constraints.txt CMakeLists.txt kernels/csrc/* kernels/perl_kernels/coefficient.py; find perl kernels -name '*.py' | sort; } | cksum | cut -d' ' -f1)
STAMP := .venv/stamp-$(VENV)-$(PINS)
PIP := .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Small tensors gain nothing from many threads and lose much; benchmarks take all there are. Tests run in several
# processes of one thread each.
THREADS := $(shell n=$$(nproc 2>/dev/null || echo 2); if [ "$$n" -gt 8 ]; then n=8; fi; echo "$$n")
demo: export OMP_NUM_THREADS ?= $(THREADS)
test vllm-test: export OMP_NUM_THREADS ?= 1
# libgomp's threads would spin for minutes when another process wants the cores.
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help setup demo test vllm-test sanitize mutants lint format bench bench-wheels bench-compare gpu-first clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with the pinned versions, or bring it up to date

demo: $(STAMP) ## train a tiny model on bundled questions over several images; writes runs/demo
	.venv/bin/perl-rl train demo --overwrite $(ARGS)

test: $(STAMP) ## run the tests; ARGS="-k pack" selects some
	.venv/bin/python -m pytest --numprocesses $(THREADS) --dist worksteal $(ARGS)

# A server's environment is its own: what vLLM pins is not what training is tested with.
VLLM_VENV ?= .venv-vllm
vllm-test: $(STAMP) ## train against real vLLM servers; makes .venv-vllm, 6 GB, or takes VLLM_VENV=/path/to/one
	@ls "$(VLLM_VENV)"/lib/python3*/site-packages/vllm-*.dist-info >/dev/null 2>&1 || bash tests/vllm/environment.sh "$(VLLM_VENV)" "$(PYTHON)"
	PERL_TEST_VLLM="$(abspath $(VLLM_VENV))/bin/vllm" .venv/bin/python -m pytest tests/vllm $(ARGS)

sanitize: $(STAMP) ## run the tests of the native rows under AddressSanitizer and UndefinedBehaviorSanitizer; needs cmake
	cmake -S . -B build/sanitize -DPERL_SANITIZE=ON -DPERL_REQUIRE_NATIVE=ON -DPython_EXECUTABLE="$(CURDIR)/.venv/bin/python"
	cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PERL_NATIVE_LIBRARY="$(CURDIR)/build/sanitize/_C.so" .venv/bin/python -m pytest -k "native and not triton" \
	  tests/kernels/test_native.py tests/kernels/test_rows.py $(ARGS)

mutants: $(STAMP) ## whether the tests notice small wrong edits of the core, an hour; ARGS="--only rollout" is one package
	@.venv/bin/python -c 'import cosmic_ray' 2>/dev/null || { echo "Installing cosmic-ray"; $(PIP) --editable '.[mutants]'; }
	.venv/bin/python -m tests.mutants $(ARGS)

lint: $(STAMP) ## ruff and pyright
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pyright

format: $(STAMP) ## put the code in ruff's form
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

bench: $(STAMP) ## measure everything beside its peers; ARGS=--quick in minutes; writes benchmarks/results
	@# Peers that cannot be installed beside our pins.
	@ls .venv/wheels/*.whl >/dev/null 2>&1 || .venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps \
	  --only-binary :all: --retries 1 --timeout 15 --dest .venv/wheels --requirement benchmarks/requirements-no-deps.txt \
	  2>/dev/null || echo "verl could not be fetched: its rows will say that it is missing"
	@wheels=; if ls .venv/wheels/*.whl >/dev/null 2>&1; then wheels="--wheels .venv/wheels"; fi; \
	.venv/bin/python benchmarks/run.py $$wheels $(ARGS)

bench-wheels: $(STAMP) ## collect in .wheels what a GPU machine without a network lacks: benchmarks/run.py --wheels .wheels
	.venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
	  --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  --dest .wheels --requirement benchmarks/wheels.txt

bench-compare: $(STAMP) ## tell whether anything is slower than at BASE=<revision>; ARGS="--only plan" selects some
	@[ -n "$(BASE)" ] || { echo "error: which revision? try: make bench-compare BASE=HEAD" >&2; exit 2; }
	.venv/bin/python -m benchmarks.compare "$(BASE)" $(ARGS)

gpu-first: $(STAMP) ## the first run on a GPU, in parts of at most ten minutes; ARGS=sanitizer is the last of them
	.venv/bin/python benchmarks/gpu_first.py $(ARGS)

clean: ## remove .venv, .venv-vllm, builds and caches; runs/ stays
	rm -rf .venv .venv-vllm build dist .benchmarks .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/stamp-%:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: $(PYTHON) not found; try: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$("$(PYTHON)" --version 2>&1) is too old, 3.11 or newer is needed; try: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) lacks venv and ensurepip; install your system's python3-venv, or: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@ls .venv/stamp-$(VENV)-* >/dev/null 2>&1 || { echo "Making .venv with $(PYTHON)"; "$(PYTHON)" -m venv --clear .venv; }
	@rm -f .venv/stamp-*
	@echo "Installing the pinned packages (several minutes the first time)"
	@# torch first and alone: the native rows are compiled against its headers.
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@.venv/bin/python -c 'from perl_kernels.dispatch import available_backends; print("Native backend:", available_backends()["native"][1])'
	@touch $@
