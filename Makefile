# make demo, make test and make check set up .venv by themselves; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= all,datasets,dev
BIN := $(VENV)/bin
# Two processes of one thread each: networks this small are slower on more threads than on one.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.PHONY: demo test test-core core-suite test-slow check clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP)
	$(BIN)/tlexport finetune digits-quickstart --out runs/digits-quickstart
	$(BIN)/tlexport build runs/digits-quickstart --target cpu --target sm89 --out bundles/digits-quickstart

test: check
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

# The suite without the optional extras, in an environment of its own.
test-core:
	$(MAKE) VENV=.venv-core EXTRAS=dev core-suite

core-suite: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python bench/readme.py --check

clean:
	rm -rf .venv .venv-core .mypy_cache .ruff_cache .pytest_cache
