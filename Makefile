# `make train` and `make test` each do the whole set-up; `make test PYTHON=python3.12` uses another interpreter.

PYTHON ?= python3
WORKERS ?= 2
# A file's tests share a worker, and with it what they compile; files start in the order of
# tests/conftest.py. The slowest tests are named at the end.
PYTEST_FLAGS = --ignore=tests/parity --ignore=tests/eval --ignore=tests/tpu -n $(WORKERS) \
  --dist loadscope --no-loadscope-reorder --durations=15

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# An interpreter other than the default gets an environment of its own, named after its version.
ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
endif
BIN := $(VENV)/bin
# torch and transformers stay out of the environment that `make test` uses.
PARITY_VENV := $(VENV)-parity
# lm-evaluation-harness brings a hundred packages of its own.
EVAL_VENV := $(VENV)-eval
# libtpu compiles for TPUs that are not here.
TPU_VENV := $(VENV)-tpu

.PHONY: install train test test-runs test-meshes test-all test-parity test-eval test-tpu lint types format bench clean

install: $(VENV)/.installed

train: install
	$(BIN)/python train.py

test: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# The programs in processes of their own, as users start them: stopped, resumed, several at once.
test-runs: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'runs and not full'

# Further meshes and transports, and further options of the router on them.
test-meshes: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'meshes and not full'

# All three, and the whole products of settings.
test-all: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m ''

test-parity: $(PARITY_VENV)/.installed
	$(PARITY_VENV)/bin/python -m pytest tests/parity

test-eval: $(EVAL_VENV)/.installed
	$(EVAL_VENV)/bin/python -m pytest tests/eval

test-tpu: $(TPU_VENV)/.installed
	$(TPU_VENV)/bin/python -m pytest tests/tpu

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install $(PARITY_VENV)/.installed
	$(BIN)/python -m mixtral_jax bench --config=configs/pretrain/tiny.py
	$(PARITY_VENV)/bin/python -m mixtral_jax bench --train --config=configs/bench/train.py
	$(PARITY_VENV)/bin/python -m mixtral_jax bench --layer --config=configs/bench/layer.py
	$(PARITY_VENV)/bin/python -m mixtral_jax bench --generate --config=configs/bench/generate.py

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache

$(VENV)/.installed: EXTRAS := test
$(PARITY_VENV)/.installed: EXTRAS := test,parity
$(EVAL_VENV)/.installed: EXTRAS := test,eval
$(TPU_VENV)/.installed: EXTRAS := test,tpu

# A Python without ensurepip (Debian's, unless python3-venv is there) fills the environment with its own pip.
%/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: mixtral_jax needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not:" \
	    "$$($(PYTHON) --version 2>&1 | head -n 1). Name another, as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'" >&2; exit 1; }
	@echo "installing what [$(EXTRAS)] needs into $* (once; 1 to 2 GB)"
	@$(PYTHON) -m venv $* 2>/dev/null || $(PYTHON) -m venv --clear --without-pip $*
	@if $*/bin/python -m pip --version >/dev/null 2>&1; then \
	  $*/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'; \
	else \
	  $(PYTHON) -m pip --python $*/bin/python install --quiet -e '.[$(EXTRAS)]'; \
	fi
	@touch $@
