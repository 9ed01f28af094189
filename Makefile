# make demo, make test and make check set up .venv by themselves; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= all,datasets,dev
BIN := $(VENV)/bin
# Two processes of one thread each: networks this small are slower on more threads than on one.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: demo test test-core core-suite test-slow test-server check clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	$(BIN)/tlexport finetune digits-quickstart --out runs/digits-quickstart
	$(BIN)/tlexport build runs/digits-quickstart --target cpu --target sm89 --out bundles/digits-quickstart

test: check
	$(PYTEST) -m "not slow and not gpu and not server"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu and not server"

# Against the servers, stores and registries that people run, each in an environment of its own where it needs one.
SERVER_STAMP := $(VENV)/.installed-servers
RAY ?= ray

.venv-triton/.installed: constraints-triton.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --disable-pip-version-check -c constraints-triton.txt nvidia-pytriton onnxruntime pillow rdkit 'tritonclient[all]'
	touch $@

.venv-kserve/.installed: constraints-kserve.txt
	$(PYTHON) -m venv .venv-kserve
	.venv-kserve/bin/pip install --quiet --disable-pip-version-check -c constraints-kserve.txt kserve onnxruntime
	touch $@

$(SERVER_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(RAY)]'
	touch $@

# One process: two servers at once would take each other's cores.
test-server: $(SERVER_STAMP) .venv-triton/.installed .venv-kserve/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m server

# The suite without the optional extras, in an environment of its own.
test-core:
	$(MAKE) VENV=.venv-core EXTRAS=dev core-suite

core-suite: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not server"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python bench/readme.py --check

clean:
	rm -rf .venv .venv-core .venv-triton .venv-kserve .mypy_cache .ruff_cache .pytest_cache
