# `make test` and `make bench` work on a fresh clone: each command builds its own requirements.
#
#   make test                        in a virtual environment (.venv) that is made once and reused
#   make test PYTHON=python3 VENV=   in the Python at hand, with nothing downloaded

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= auto
ARGS ?=

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# A test that hangs ends after this many seconds, where pytest-timeout is installed.
export PYTEST_TIMEOUT ?= 300

# Bytecode is kept, whatever the shell says: every test process would compile the tests again. Installed packages are
# compiled at their first import, and most of them are never imported.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := install --quiet --no-compile

# Parallel test processes, where pytest-xdist is installed; an idle one takes tests of another one.
WORKERS = $$($(PY) -c 'import importlib.util as u; print("-n $(JOBS) --dist worksteal" if u.find_spec("xdist") else "")')

# The operator tests that run with sanitizers, with all tests of the compiled library.
SANITIZED := $(addprefix tests/ops/test_,contract.py upsample_add.py lateral_connection.py output_conv.py weighted_merge.py reorder.py)

# Other libraries, for the tests that run on them. torch's CUDA build runs on a CPU too. MMCV's pure Python build does.
ECOSYSTEM_VENV ?= .venv-ecosystem
ECOSYSTEM ?= torch==2.12.1 torchvision==0.27.1 segmentation-models-pytorch==0.6.0 effdet==0.4.1 \
	mmcv-lite==2.1.0 mmengine==0.10.7 scipy shapely six terminaltables
ECOSYSTEM_NO_DEPENDENCIES ?= mmdet==3.3.0

# The order that test-random shuffles the tests into.
SEED ?= 1

.PHONY: help build test test-nightly test-random test-large test-ecosystem coverage bench sanitize lint format docs dist clean

help:
	@echo 'make test    the tests, then the Triton kernels under their interpreter'
	@echo 'make test-nightly  the slow tests that `make test` leaves out, and many random cases of each property'
	@echo 'make test-random SEED=7  the tests of `make test` in another order'
	@echo 'make coverage  the lines that the tests of `make test` run; fails below 95 %'
	@echo 'make test-large  the tests that take 16 GB of memory'
	@echo 'make test-ecosystem  the tests on torchvision and other libraries, in an environment of their own (5 GB)'
	@echo 'make bench   the benchmarks on the best device here, compared with eager PyTorch'
	@echo 'make build   the compiled library, fpn_kernels/_native.so (test and bench do this first)'
	@echo 'make sanitize  the operator tests on the compiled library with sanitizers'
	@echo 'make lint    ruff and mypy'
	@echo 'make format  formats the sources for `make lint`'
	@echo 'make docs    the documents as a site, in site/'
	@echo 'make dist    the source distribution, and a wheel made from it, in dist/'
	@echo 'make clean   removes the files of the other commands'
	@echo 'With PYTHON=python3 VENV= each runs in the Python at hand. ARGS="..." is passed on.'

$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip $(INSTALL) "$(TORCH)" "setuptools>=77" "ninja>=1.11"
	$(PY) -m pip $(INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@

# Only changed sources are compiled; a part that cannot be built here is left out, with the reason.
build: $(READY)
	$(PY) setup.py --quiet build_ext --inplace || echo 'fpn_kernels: left out the compiled library (its build needs setuptools >= 77)'

test: build
	$(PY) -m pytest $(WORKERS) $(ARGS)
	@# 5: ARGS left no test of the interpreter's.
	TRITON_INTERPRET=1 $(PY) -m pytest $(WORKERS) -m interpreter $(ARGS) || [ $$? -eq 5 -a -n '$(ARGS)' ]

test-nightly: build
	HYPOTHESIS_PROFILE=nightly PYTEST_TIMEOUT=3600 $(PY) -m pytest $(WORKERS) -m nightly $(ARGS)
	HYPOTHESIS_PROFILE=nightly PYTEST_TIMEOUT=3600 TRITON_INTERPRET=1 $(PY) -m pytest $(WORKERS) -m "nightly and interpreter" $(ARGS)
	$(PY) -m pytest $(WORKERS) $(ARGS) experiments/tests
	TRITON_INTERPRET=1 $(PY) -m pytest $(WORKERS) $(ARGS) experiments/tests

test-random: build
	$(PY) -m pytest $(WORKERS) --random-order-bucket=global --random-order-seed=$(SEED) $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest $(WORKERS) -m interpreter --random-order-bucket=global --random-order-seed=$(SEED) $(ARGS)

coverage: build
	$(PY) -m coverage erase
	$(PY) -m pytest $(WORKERS) --cov --cov-report= $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest $(WORKERS) -m interpreter --cov --cov-append --cov-report= $(ARGS)
	$(PY) -m coverage report

# One after another: each test takes most of the machine's memory.
test-large: build
	FPN_KERNELS_LARGE=1 $(PY) -m pytest -m "large and nightly" $(ARGS) tests/nightly/test_scale.py

$(ECOSYSTEM_VENV)/.ready:
	$(PYTHON) -m venv $(ECOSYSTEM_VENV)
	$(ECOSYSTEM_VENV)/bin/python -m pip $(INSTALL) $(ECOSYSTEM) "setuptools>=77" ninja pytest pytest-timeout
	$(ECOSYSTEM_VENV)/bin/python -m pip $(INSTALL) --no-deps $(ECOSYSTEM_NO_DEPENDENCIES)
	@touch $@

test-ecosystem: $(ECOSYSTEM_VENV)/.ready
	$(ECOSYSTEM_VENV)/bin/python setup.py --quiet build_ext --inplace || echo 'fpn_kernels: left out the compiled library'
	$(ECOSYSTEM_VENV)/bin/python -m pytest -m ecosystem $(ARGS)

bench: build
	$(PY) -m benchmarks $(ARGS)

sanitize: $(READY)
	FPN_KERNELS_SANITIZE=1 $(PY) setup.py --quiet build_ext --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	FPN_KERNELS_LIBRARY=build/sanitize/lib/fpn_kernels/_native.so \
	$(PY) -m pytest $(WORKERS) -k "native and not opcheck" $(ARGS) $(SANITIZED) $$(find tests -name 'test_native*.py' -not -name test_native_build.py)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Strict: a dead link, a page in no menu or an unknown name fails the build.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)
	@echo 'site/index.html'

# Build the wheel from the sdist, so that a file missing from the sdist fails the build.
dist: $(READY)
	rm -rf dist
	$(PY) setup.py --quiet sdist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	@ls dist

clean:
	rm -rf $(VENV) $(ECOSYSTEM_VENV) build dist site *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks fpn_kernels/_native.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
