# Two commands do everything on a fresh machine with Python 3.11+ and a C++ compiler: `make demo` and `make test`.
PYTHON ?= python3
EXTRA ?= cpu
RAY_TESTS ?= ray
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
# On CPU machines torch comes in its CPU build where an index offers one:
# make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check bench clean help

demo: $(STAMP)  ## train, embed, index, evaluate, serve and query; writes $(OUT)/report.html
	$(BIN)/slq demo --out $(OUT)

test: $(STAMP)  ## all tests: those without Ray on all cores, then the others one by one, as many start Rays of their own
	$(BIN)/python -m pytest -n logical --maxprocesses 8 -m "not ray"
	$(BIN)/python -m pytest -m "$(RAY_TESTS)"

check: $(STAMP)  ## format, lint, import direction, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(STAMP)  ## ratios of fast paths to slow paths, as JSON; nothing else should run meanwhile
	$(BIN)/slq bench train

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

clean:  ## remove what runs wrote; keeps the installation
	rm -rf runs

$(STAMP): pyproject.toml constraints.txt
	@echo "installing slq into $(VENV) (some 2 GB, a few minutes; only once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		torch==2.13.0 -e '.[$(EXTRA),test]'
	touch $(STAMP)
